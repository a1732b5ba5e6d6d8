"""Which implementations of each op run on this device, asked of themselves with tiny calls.

Nothing is computed: a call is traced for the device, and an implementation that does not run there
says why. `qjax info` prints it.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import skipped
from qjax_kernels.target import Target, target
from qjax_kernels.tuned import lookup

PORTABLE = "triton"  # compiles for more GPUs than were timed
TIMED = ("NVIDIA H200",)  # beside those that have a tuned table
NOT_TIMED = "compiled, not timed on this device"

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
FP8 = jnp.float8_e4m3fn
_Probe = Callable[[str | None], Any]


@dataclasses.dataclass(frozen=True)
class Support:
    """An op on a device.

    Attributes:
      op: its name.
      notes: implementation -> '' where it runs, 'compiled, not timed ...', or why it does not run.
      runs: those that run, best first.
      skipped: 'implementation: reason' of what a call that names none skips.
    """

    op: str
    notes: Mapping[str, str]
    runs: tuple[str, ...]
    skipped: tuple[str, ...]


def support() -> list[Support]:
    """Of every op, on the device that `target.target` finds."""
    device = target()
    return [_asked(op, names, probe, device) for op, names, probe in _probes()]


def _asked(op: str, names: Mapping[str, Any], probe: _Probe, device: Target) -> Support:
    notes, runs = {}, []
    for name in names:
        try:
            probe(name)
        except NotImplementedError as reason:
            # dispatch's sentence, of which the reason is the end.
            notes[name] = str(reason).partition(f"{name}: ")[2] or str(reason)
            continue
        runs.append(name)
        notes[name] = NOT_TIMED if name == PORTABLE and not _timed(device) else ""
    probe(None)
    return Support(op, notes, tuple(runs), tuple(skipped().get(op, ())))


def _timed(device: Target) -> bool:
    found = lookup.table_of(device)
    return device.kind in TIMED or (found is not None and not found.stands_in)


def _shape(*dimensions: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


def _probes() -> Iterator[tuple[str, Mapping[str, Any], _Probe]]:
    """(op as dispatch calls it, its implementations, a call by a name or None)."""

    def api(folder: str) -> Any:
        return importlib.import_module(f"qjax_kernels.{folder}.api")

    def probe(function: Callable[..., Any], *arguments: Any, **static: Any) -> _Probe:
        def call(implementation: str | None) -> Any:
            # A function of its own: jit remembers traces for another device by function.
            run = functools.partial(function, **static, implementation=implementation)
            return jax.eval_shape(lambda *given: run(*given), *arguments)

        return call

    yield from _products(api, probe)
    yield from _attention(api, probe)
    pages, sizes = _shape(4, 2, 64, 64), (_shape(2, dtype=I32),)
    x, weight = _shape(2, 256), _shape(256)
    norm = api("norm_quant")
    call = probe(norm.norm_quant, x, weight, eps=1e-5)
    yield "norm_quant", norm.IMPLEMENTATIONS, call
    glu = api("glu_quant")
    yield "glu_quant", glu.IMPLEMENTATIONS, probe(glu.glu_quant, x)
    rows = api("quantize_rows")
    yield "quantize_rows", rows.IMPLEMENTATIONS, probe(rows.quantize_rows, x, out_dtype=FP8)
    rope = api("rope_cache")
    qkv, angles = _shape(2, 12 * 64), _shape(2, 32, dtype=F32)
    call = probe(rope.rope_cache, qkv, angles, angles, pages, pages, *sizes, *sizes)
    yield "rope_cache", rope.IMPLEMENTATIONS, call
    sampling = api("sampling")
    logits = _shape(2, 256, dtype=F32)
    yield "sample", sampling.IMPLEMENTATIONS, probe(sampling.sample, logits, _shape(2, dtype=F32))
    yield "argmax", sampling.ARGMAX_IMPLEMENTATIONS, probe(sampling.argmax, logits)


def _attention(
    api: Callable[[str], Any], probe: Callable[..., _Probe]
) -> Iterator[tuple[str, Mapping[str, Any], _Probe]]:
    pages, table = _shape(4, 2, 64, 64), _shape(2, 2, dtype=I32)
    lengths = _shape(2, dtype=I32)
    decode = api("decode_attention")
    call = probe(decode.decode_attention, _shape(2, 8, 64), pages, pages, table, lengths)
    yield "decode_attention", decode.IMPLEMENTATIONS, call
    prefill = api("prefill_attention")
    q, k = _shape(2, 64, 8, 64), _shape(2, 64, 2, 64)
    yield "prefill_attention", prefill.IMPLEMENTATIONS, probe(prefill.prefill_attention, q, k, k)
    cache = (pages, pages, table, lengths, lengths)
    call = probe(prefill.paged_prefill_attention, q, *cache)
    yield "paged_prefill_attention", prefill.PAGED_IMPLEMENTATIONS, call


def _products(
    api: Callable[[str], Any], probe: Callable[..., _Probe]
) -> Iterator[tuple[str, Mapping[str, Any], _Probe]]:
    weight_only, scaled = api("weight_only_gemm"), api("scaled_gemm")
    x, values = _shape(16, 256), _shape(64, 256, dtype=jnp.int4)
    scale, out = _shape(64, 2), {"out_dtype": BF16}
    call = probe(weight_only.weight_only_gemm, x, values, scale, **out)
    yield "weight_only_gemm", weight_only.IMPLEMENTATIONS, call
    weight = jax.eval_shape(weight_only.prepare, values, scale)
    call = probe(weight_only.prepared_gemm, x, weight, **out)
    yield "prepared_gemm", weight_only.PREPARED_IMPLEMENTATIONS, call
    residual = _shape(x.shape[0], weight.shape[0])
    call = probe(weight_only.residual_gemm, x, weight, residual, _shape(weight.shape[0]))
    yield "residual_gemm", weight_only.RESIDUAL_IMPLEMENTATIONS, call
    prepare = functools.partial(weight_only.prepare, operand=jnp.dtype(FP8).name)
    weight = jax.eval_shape(prepare, values, scale)
    narrow, x_scale = _shape(16, 256, dtype=FP8), _shape(16, 1, dtype=F32)
    call = probe(weight_only.w4a8_gemm, narrow, x_scale, weight, **out)
    yield "w4a8_gemm", weight_only.W4A8_IMPLEMENTATIONS, call
    values, scale = _shape(64, 256, dtype=FP8), _shape(64, 1, dtype=F32)
    call = probe(scaled.scaled_gemm, narrow, x_scale, values, scale, **out)
    yield "scaled_gemm", scaled.IMPLEMENTATIONS, call
    plain = api("plain_gemm")
    call = probe(plain.plain_gemm, x, _shape(64, 256), **out)
    yield "plain_gemm", plain.IMPLEMENTATIONS, call
    swiglu = api("gemm_swiglu")
    call = probe(swiglu.gemm_swiglu, x, _shape(64, 256), **out)
    yield "gemm_swiglu", swiglu.IMPLEMENTATIONS, call
    grouped = api("grouped_gemm")
    experts, sizes = _shape(4, 64, 256), _shape(4, dtype=I32)
    call = probe(grouped.grouped_gemm, x, experts, sizes, **out)
    yield "grouped_gemm", grouped.IMPLEMENTATIONS, call
    values, scale = _shape(4, 64, 256, dtype=jnp.int4), _shape(4, 64, 2)
    weight = jax.eval_shape(grouped.prepare, values, scale)
    call = probe(grouped.prepared_grouped_gemm, x, weight, sizes, **out)
    yield "prepared_grouped_gemm", grouped.PREPARED_IMPLEMENTATIONS, call
