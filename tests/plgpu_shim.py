"""Lets the CPU interpreter of Mosaic GPU kernels run what jax 0.11.2's lacks: `wgmma` with its left
operand in registers, `mma`, `griddepcontrol_*`, and reading through `cluster_ref`.

Import it, then run kernels with `interpret=plgpu.InterpretGPUParams()`. It builds on private
modules of JAX, so it holds for the version that constraints.txt names.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

reset = gpu_callbacks.reset_gpu_interpret_mode_state  # call it after a kernel that raised


def races_found() -> bool:
    """Whether the last kernel, run with `detect_races=True`, had a race."""
    return gpu_callbacks.get_races().races_found


def _multiply(accumulator: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return accumulator + jnp.dot(a.astype(accumulator.dtype), b.astype(accumulator.dtype))


mlir.register_lowering(
    primitives.mma_p, mlir.lower_fun(_multiply, multiple_results=False), platform="cpu"
)
for _primitive in (
    primitives.griddepcontrol_wait_p,
    primitives.griddepcontrol_launch_dependents_p,
):
    mlir.register_lowering(_primitive, lambda context, *_, **__: (), platform="cpu")


def _callback(interpreter, function, result, token, **arguments):
    return callback.io_callback(
        gpu_callbacks.fail_on_exception(function),
        result,
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        **arguments,
    )


def _buffer(key, transforms, mesh_location, thread, source_info):
    """(memory, key, range, content, logging information) of a buffer seen through transforms."""
    memory, key = (
        gpu_callbacks._get_shared_memory(),
        gpu_callbacks.HostAllocationKey.from_array(key),
    )
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    where = memory.access(key, transforms)
    content, _, _ = memory.get_buffer_content(key, where, thread, logging_info=info)
    return memory, key, where, content, info


def _wgmma(self, eqn, token, get_invals):
    if hasattr(eqn.invars[1].aval, "inner_aval"):  # the left operand is in shared memory
        return _wgmma_of_refs(self, eqn, token, get_invals)
    accumulator, a, b, *leaves = get_invals()
    names = ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
    trees = tuple(eqn.params[name] or jax.tree.structure([]) for name in names)
    acc_views, _, b_views = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    accumulator, acc_views = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, accumulator, acc_views)
    b, b_views = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_views)

    def run(*, token, mesh_location, thread, accumulator, acc_views, a, b, b_views):
        at = (mesh_location, thread, eqn.source_info)
        right = _buffer(b, b_views, *at)[3]
        memory, key, where, content, info = _buffer(accumulator, acc_views, *at)
        total = content + np.matmul(np.asarray(a), right, dtype=content.dtype)
        memory.store_buffer_content(key, where, total, thread, logging_info=info)
        return token

    arguments = {"accumulator": accumulator, "acc_views": acc_views, "a": a, "b": b}
    token = _callback(
        self, run, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, b_views=b_views, **arguments
    )
    return token, []


_wgmma_of_refs = jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p
jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p = _wgmma


def _get(self, eqn, token, get_invals):
    ref, *leaves = get_invals()
    views = jax.tree.unflatten(eqn.params["tree"], leaves)
    remote = [view for view in views if isinstance(view, core.ClusterRefTransform)]
    if not remote:
        return _get_of_own(self, eqn, token, get_invals)
    ref, views = jaxpr_interpret.resolve_ref(
        eqn.invars[0].aval,
        ref,
        tuple(view for view in views if not isinstance(view, core.ClusterRefTransform)),
    )
    coordinates = dict(zip(self.mesh.cluster_names, self.mesh_location.block_coords, strict=True))
    for view in remote:
        coordinates |= dict(zip(view.dims, view.idxs, strict=True))
    block = 0
    for name, size in zip(self.mesh.cluster_names, self.cluster_dims, strict=True):
        block = block * size + coordinates[name]
    fields = [field.name for field in dataclasses.fields(gpu_callbacks.HostAllocationKey)]
    return gpu_callbacks.call_get(
        token=token,
        result_shape_and_dtype=eqn.outvars[0].aval,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=jnp.asarray(ref).at[fields.index("block_id")].set(block),
        transforms=views,
        source_info=eqn.source_info,
    )


_get_of_own = jaxpr_interpret.JaxprInterpreter._interpret_get_p
jaxpr_interpret.JaxprInterpreter._interpret_get_p = _get
