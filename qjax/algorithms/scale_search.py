"""Scales that are searched for, block by block: the least weighted error of the weights.

`importance` None is the plain mean squared error ("mse" in llm-compressor and ModelOpt). With the
mean square of each input, E[x_j^2], it is the diagonal of the output error tr(dW H dW^T): the
importance matrix of llama.cpp, and llm-compressor's `imatrix_mse`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import numerics
from qjax.algorithms.scales import (
    Scales,
    WeightSpec,
    block_sum,
    decode,
    encode,
    expand,
    find_scales,
)
from qjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """Which scales are tried, and by what they are judged.

    Tried are the scales of p times the block, p = 1, 1 - 1/grid, ... above 1 - max_shrink, and
    1 + 1/grid ... up to 1 + max_grow. Without refit these are the candidates of the toolkits:
    (100, 0.2, norm 2.4) are llm-compressor's for mse, (20, 0.95, norm 3) those for imatrix.

    Attributes:
      grid: steps from 1 to 0.
      max_shrink: the smallest p tried is just above 1 - max_shrink.
      max_grow: the largest p tried is 1 + max_grow.
      norm: the error of a weight is |w - q|^norm.
      refit: after rounding, take the scale that is best for these numbers, sum of i w q over sum
        of i q^2 (as llama.cpp does), and round once more. Not for scales that are powers of 2.
    """

    grid: int = 20
    max_shrink: float = 0.5
    max_grow: float = 0.0
    norm: float = 2.0
    refit: bool = False

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.max_shrink <= 1 or self.max_grow < 0 or self.norm <= 0:
            raise ConfigError(
                f"{self}: choose grid >= 1, 0 < max_shrink <= 1, max_grow >= 0, norm > 0"
            )

    @property
    def ratios(self) -> np.ndarray:
        """float32, 1 first."""
        steps = np.arange(self.grid * self.max_shrink - 1e-9)
        more = np.arange(1, self.grid * self.max_grow + 1e-9)
        return np.concatenate([1 - steps / self.grid, 1 + more / self.grid]).astype(np.float32)


@partial(jax.jit, static_argnames=("spec", "search"))
def search_scales(
    weight: jax.Array,
    spec: WeightSpec,
    search: ScaleSearch,
    importance: jax.Array | None = None,
    global_amax: jax.Array | None = None,
) -> Scales:
    """For each block the scale, of those that `search` tries, with the least error.

    error of a block = sum over it of importance * |w - q|^norm

    Args:
      weight: floating point [..., out, in].
      importance: float32, not negative, broadcasts against weight: [in] or of its shape; None: 1.
      global_amax: see `find_scales`.

    Returns:
      scales whose error is at most that of `find_scales`, which wins a tie.
    """
    weight = weight.astype(jnp.float32)
    fmt = numerics.get_format(spec.format)
    importance = jnp.broadcast_to(
        jnp.float32(1) if importance is None else importance, weight.shape
    )

    def attempt(scales: Scales, refit: bool) -> tuple[Scales, jax.Array]:
        step, zero = expand(scales, spec, weight.shape)
        codes = encode(weight, step, zero, fmt)
        if refit:
            scales = _refit(weight, codes, importance, scales, spec)
            step, zero = expand(scales, spec, weight.shape)
            codes = encode(weight, step, zero, fmt)
        difference = jnp.abs(weight - decode(codes, step, zero))
        error = importance * difference**search.norm
        return scales, block_sum(error, spec.block)

    def consider(
        best: tuple[Scales, jax.Array], ratio: jax.Array
    ) -> tuple[tuple[Scales, jax.Array], None]:
        tried = attempt(find_scales(weight * ratio, spec, global_amax), refits)
        better = tried[1] < best[1]
        return jax.tree.map(partial(_where, better), tried, best), None

    if global_amax is None:
        global_amax = jnp.abs(weight).max(axis=(-2, -1))
    plain = find_scales(weight, spec, global_amax)
    refits = search.refit and spec.scale_dtype != numerics.POWERS_OF_TWO
    ratios = search.ratios if refits else search.ratios[1:]
    (scales, _), _ = lax.scan(consider, attempt(plain, False), jnp.asarray(ratios))
    return scales


def _where(better: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Block by block; the global scale, of another shape, is the same in both."""
    return jnp.where(better, new, old) if new.shape == better.shape else old


def _refit(
    weight: jax.Array, codes: jax.Array, importance: jax.Array, scales: Scales, spec: WeightSpec
) -> Scales:
    """The least-squares scale of each block for given codes, where there is a positive one."""
    _, zero = expand(scales, spec, weight.shape)
    levels = codes if zero is None else codes - zero
    above = block_sum(importance * weight * levels, spec.block)
    below = block_sum(importance * levels * levels, spec.block)
    if scales.global_scale is not None:
        below = below * scales.global_scale[..., None, None]
    fits = (above > 0) & (below > 0)
    best = jnp.where(fits, above, 1) / jnp.where(fits, below, 1)
    best = jnp.maximum(best, jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(fits, numerics.representable(best, spec.scale_dtype), scales.scale)
    return dataclasses.replace(scales, scale=scale)
