"""Products, to be tuned."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.random import fold_in, normal, randint, uniform

from qjax_kernels import bound
from qjax_kernels.plain_gemm import mosaic as plain_mosaic
from qjax_kernels.plain_gemm import xla as plain_xla
from qjax_kernels.scaled_gemm import choice as scaled_choice
from qjax_kernels.scaled_gemm import mosaic as scaled_mosaic
from qjax_kernels.scaled_gemm import xla as scaled_xla
from qjax_kernels.tuning.problem import Problem
from qjax_kernels.weight_only_gemm import choice as weight_choice
from qjax_kernels.weight_only_gemm import config as weight_config
from qjax_kernels.weight_only_gemm import mosaic as weight_mosaic
from qjax_kernels.weight_only_gemm.layout import prepare

OUT = jnp.bfloat16
FP8 = jnp.float8_e4m3fn


class Linear(Problem):
    """A product with a weight [n, k]."""

    dtype: ClassVar[Any]  # of the weights
    scale_dtype: ClassVar[Any] = jnp.float32
    x_dtype: ClassVar[Any] = jnp.bfloat16
    x_scales: ClassVar[bool] = False

    @property
    def format(self) -> str:
        return jnp.dtype(self.dtype).name

    @property
    def work(self) -> bound.Work:
        job = self.job
        return bound.LINEAR[job.op].work(self.m, job.n, job.k, job.group_size)

    @property
    def rotated_bytes(self) -> float:
        job = self.job
        return bound.LINEAR[job.op].weight_bytes(job.n, job.k, job.group_size)

    def rotated(self, seed: jax.Array) -> Any:
        """Values [n, k] and scale [n, groups]."""
        n, k, group_size = self.job.n, self.job.k, self.job.group_size
        key = fold_in(jax.random.key(1), seed)
        groups = 1 if group_size is None else k // group_size
        return (
            _values(key, (n, k), self.dtype),
            _scales(fold_in(key, 1), (n, groups), self.scale_dtype),
        )

    def shared(self, seed: jax.Array) -> Any:
        key = fold_in(jax.random.key(0), seed)
        x = _values(key, (self.m, self.job.k), self.x_dtype)
        if not self.x_scales:
            return (x,)
        return x, _scales(fold_in(key, 1), (self.m, 1), jnp.float32)

    def reference(self, shared: Any, rotated: Any) -> jax.Array:
        values, scale = rotated
        scale = jnp.repeat(scale.astype(jnp.float32), values.shape[1] // scale.shape[1], axis=1)
        x = shared[0][self.rows].astype(jnp.float32)
        w = values.astype(jnp.float32) * scale
        y = jnp.matmul(x, w.T, precision=jax.lax.Precision.HIGHEST)
        return y * shared[1][self.rows] if self.x_scales else y


class WeightOnly(Linear):
    """Float activations."""

    table_op = "prepared_gemm"
    limit = 0.01  # rounding x, weights and the result to bfloat16 makes 2.5e-3
    operand: ClassVar[str] = "float16"

    def candidates(self) -> list[Any]:
        return weight_config.candidates(self.m, self._abstract(), cores=self.cores)

    def chosen(self) -> Any:
        return weight_choice.choose(self.m, self._abstract(), cores=self.cores)

    def prepare(self, rotated: Any) -> Any:
        return prepare(*rotated, operand=self.operand)

    def call(self, config: Any) -> Callable[[Any, Any], jax.Array]:
        run = partial(weight_mosaic.prepared_gemm, out_dtype=OUT, config=config)
        return lambda shared, weight: run(shared[0], weight)

    def _abstract(self) -> Any:
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        return jax.eval_shape(lambda seed: self.prepare(self.rotated(seed)), seed)


class W4A16(WeightOnly):
    """int4 with bfloat16 scales for groups."""

    dtype, scale_dtype = jnp.int4, jnp.bfloat16


class W8A16(WeightOnly):
    """int8 with a float32 scale for each output."""

    dtype = jnp.int8


class W4A8(WeightOnly):
    """int4 with scales for groups, e4m3 activations with one for each token."""

    table_op = "w4a8_gemm"
    dtype, scale_dtype = jnp.int4, jnp.bfloat16
    x_dtype, x_scales = FP8, True
    operand = "float8_e4m3fn"
    limit = 0.03  # the tensor cores keep 14 bits of a group's sum

    def candidates(self) -> list[Any]:
        return weight_config.fp8_candidates(self.m, self._abstract(), cores=self.cores)

    def call(self, config: Any) -> Callable[[Any, Any], jax.Array]:
        run = partial(weight_mosaic.fp8_prepared_gemm, out_dtype=OUT, config=config)
        return lambda shared, weight: run(shared[0], shared[1], weight)


class Scaled(Linear):
    """Both operands of 8 bits, a scale for each token and each output."""

    table_op = "scaled_gemm"
    x_scales = True
    limit = 0.02  # as for w4a8, of the whole sum; int8 sums are exact

    def _sizes(self) -> dict[str, Any]:
        sizes = {"m": self.m, "n": self.job.n, "k": self.job.k}
        return sizes | {"dtype": self.dtype, "cores": self.cores}

    def candidates(self) -> list[Any]:
        from qjax_kernels.scaled_gemm import plan

        return plan.candidates(**self._sizes())

    def chosen(self) -> Any:
        options = {"out_dtype": OUT, "blocked": False, "residual": False, "bias": False}
        return scaled_choice.choose(**self._sizes(), **options)

    def call(self, config: Any) -> Callable[[Any, Any], jax.Array]:
        if config is None:
            return lambda shared, weight: scaled_xla.scaled_gemm(*shared, *weight, out_dtype=OUT)
        run = partial(scaled_mosaic.scaled_gemm, out_dtype=OUT, config=config)
        return lambda shared, weight: run(*shared, *weight)

    @property
    def by_xla(self) -> bool:
        return True


class Fp8(Scaled):
    """e4m3 x e4m3."""

    dtype = x_dtype = FP8


class Int8(Scaled):
    """int8 x int8."""

    dtype = x_dtype = jnp.int8


class Plain(Scaled):
    """bfloat16 x bfloat16, without scales."""

    table_op = "plain_gemm"
    dtype = jnp.bfloat16
    x_scales = False
    limit = 0.01  # rounding the result to bfloat16 makes 1.7e-3

    def rotated(self, seed: jax.Array) -> Any:
        return (super().rotated(seed)[0],)

    def call(self, config: Any) -> Callable[[Any, Any], jax.Array]:
        run: Callable[..., jax.Array] = plain_xla.plain_gemm
        if config is not None:
            run = partial(plain_mosaic.plain_gemm, config=config)
        return lambda shared, weight: run(*shared, *weight, out_dtype=OUT)

    def reference(self, shared: Any, rotated: Any) -> jax.Array:
        x, w = shared[0][self.rows].astype(jnp.float32), rotated[0].astype(jnp.float32)
        return jnp.matmul(x, w.T, precision=jax.lax.Precision.HIGHEST)


def _values(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Integers over the whole range, normal floats."""
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return randint(key, shape, int(limits.min), int(limits.max) + 1, jnp.int32).astype(dtype)
    return normal(key, shape, jnp.float32).astype(dtype)


def _scales(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Scales that vary by a factor of four."""
    return uniform(key, shape, jnp.float32, 0.005, 0.02).astype(dtype)
