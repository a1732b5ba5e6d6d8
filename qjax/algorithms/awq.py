"""AWQ: weights of important inputs are scaled up before rounding, and weights are clipped.

Lin et al., https://arxiv.org/abs/2306.00978, equations 4 and 5 (scales), section 3.2 (clipping);
grids, normalisation and "duo scaling" as in AutoAWQ and llm-compressor. They run the model for
each point of the grid. Here the loss of a point is tr(dW H dW^T), the same squared error of the
layer's outputs over all calibration tokens, from their Gram matrix H alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.algorithms.scales import (
    Scales,
    WeightSpec,
    block_amax,
    block_sum,
    fake_quantize,
    fill_blocks,
    find_scales,
)
from qjax.algorithms.statistics import gram_loss
from qjax.blocks import blocked
from qjax.errors import ConfigError, one_of

LARGEST, SMALLEST = 1e4, 1e-4  # of a scale; beyond, 16-bit activations would suffer


class AwqSearch(NamedTuple):
    """What the grid gave.

    Attributes:
      scale: float32 [in], s of the best point: quantize W * s, feed x / s.
      losses: float32 [points], tr(dW H dW^T) with dW = round(W * s) / s - W.
      alphas: float32 [points], 0 first: s = 1, which is round-to-nearest.
      best: int32 scalar, which point has the least loss; 0 if none is below round-to-nearest.
    """

    scale: Any
    losses: Any
    alphas: Any
    best: Any


@partial(jax.jit, static_argnames=("spec", "grid", "duo_scaling", "alpha"))
def awq_scale(
    weights: Sequence[jax.Array],
    gram: jax.Array,
    mean_abs: jax.Array,
    spec: WeightSpec,
    *,
    grid: int = 20,
    duo_scaling: bool | str = True,
    alpha: float | None = None,
) -> AwqSearch:
    """Search the scale of one input, which all weights that read it share.

    With x the mean magnitude of each input and w that of each column of the weights, relative to
    the largest of its block:

        s = x^alpha / (w^(1 - alpha) + 1e-4)    duo_scaling True
        s = x^alpha                             duo_scaling False (the paper)

    for alpha = 1/grid, 2/grid ... 1, each divided by sqrt(max s * min s); and s = 1 for alpha = 0.

    Args:
      weights: floating point [out, in] each, with one `in`.
      gram: float32 [in, in], sum over tokens of x x^T.
      mean_abs: float32 [in].
      spec: the grid of the weights.
      grid: steps of alpha from 0 to 1.
      duo_scaling: True, False, or 'both' (all points of either).
      alpha: this one, 0..1, in place of the grid; with 'both' the better of its two points.

    Raises:
      ConfigError: grid below 1, an unknown duo_scaling.
    """
    if grid < 1:
        raise ConfigError(f"grid is {grid}; it must be 1 or more")
    one_of("duo_scaling", str(duo_scaling), ("True", "False", "both"))
    stacked = [weight.astype(jnp.float32) for weight in weights]
    relative = _relative_magnitude(stacked, spec)
    steps = np.arange(1, grid + 1, dtype=np.float32) / grid
    if alpha is not None:
        steps = np.full(1, alpha, np.float32)
    plain = mean_abs ** steps[:, None]
    duo = plain / (relative ** (1 - steps[:, None]) + 1e-4)
    points = {"True": [duo], "False": [plain], "both": [plain, duo]}[str(duo_scaling)]
    scales = jnp.stack([jnp.ones_like(mean_abs), *map(_normalised, jnp.concatenate(points))])

    def loss(scale: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for weight in stacked:
            change = fake_quantize(weight * scale, spec) / scale - weight
            total += gram_loss(change, gram).sum()
        return total

    losses = lax.map(loss, scales)
    alphas = jnp.asarray(np.concatenate([[0], *[steps] * len(points)]), jnp.float32)
    # NaN is never least; the first of equals wins.
    places = jnp.arange(len(losses))
    allowed = (places == 0) == (alpha == 0) if alpha is not None else places >= 0
    usable = allowed & ~jnp.isnan(losses)
    best = jnp.argmin(jnp.where(usable, losses, jnp.inf)).astype(jnp.int32)
    return AwqSearch(scale=scales[best], losses=losses, alphas=alphas, best=best)


def _relative_magnitude(weights: list[jax.Array], spec: WeightSpec) -> jax.Array:
    """[in], mean over all outputs of |w| / (the largest of its block + 1e-6)."""
    total = jnp.zeros(weights[0].shape[-1], jnp.float32)
    for weight in weights:
        size = jnp.abs(weight)
        largest = fill_blocks(block_amax(weight, spec.block), spec.block, weight.shape)
        total += jnp.sum(size / (largest + 1e-6), axis=0)
    return total / sum(len(weight) for weight in weights)


def _normalised(scale: jax.Array) -> jax.Array:
    scale = jnp.clip(scale, SMALLEST, LARGEST)
    return jnp.clip(scale / jnp.sqrt(scale.max() * scale.min()), SMALLEST, LARGEST)


@partial(jax.jit, static_argnames=("spec", "grid", "max_shrink"))
def awq_clip(
    weight: jax.Array,
    gram: jax.Array,
    spec: WeightSpec,
    *,
    grid: int = 20,
    max_shrink: float = 0.5,
) -> jax.Array:
    """Where to clip each block: the limit with the least error of the block's part of the output.

    The loss of a limit is dw H_g dw^T summed over the block's rows, H_g the part of the Gram
    matrix that belongs to its columns: blocks of other columns are taken to be exact, as in
    AutoAWQ.

    Args:
      weight: floating point [..., out, in].
      gram: float32 [..., in, in].
      grid, max_shrink: limits tried are (1 - i/grid) * largest |w|, above 1 - max_shrink.

    Returns:
      float32 [..., out/rows, in/columns], limits of |w|; the largest |w| where clipping loses.

    Raises:
      ConfigError: grid below 1, max_shrink outside (0, 1].
    """
    if grid < 1 or not 0 < max_shrink <= 1:
        raise ConfigError(f"grid {grid}, max_shrink {max_shrink}: need grid >= 1, 0 < shrink <= 1")
    weight = weight.astype(jnp.float32)
    amax = block_amax(weight, spec.block)
    blocks = _diagonal_blocks(gram, amax.shape[-1], spec.block[1])
    by_row = (spec.block[0], 1)

    def loss(limit: jax.Array) -> jax.Array:
        change = fake_quantize(weight, spec, clip_scales(weight, spec, limit)) - weight
        parts = blocked(change, (1, spec.block[1]))[..., :, 0, :, :]  # [..., out, groups, columns]
        moved = jnp.einsum("...ogi,...gij->...ogj", parts, blocks)
        return block_sum(jnp.sum(moved * parts, axis=-1), by_row)

    def consider(
        best: tuple[jax.Array, jax.Array], ratio: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        limit = amax * ratio
        tried = loss(limit)
        better = tried < best[1]
        return (jnp.where(better, limit, best[0]), jnp.where(better, tried, best[1])), None

    steps = np.arange(1, np.ceil(grid * max_shrink - 1e-9), dtype=np.float32)
    (limit, _), _ = lax.scan(consider, (amax, loss(amax)), jnp.asarray(1 - steps / grid))
    return limit


def _diagonal_blocks(gram: jax.Array, groups: int, columns: int) -> jax.Array:
    """[..., in, in] -> [..., groups, columns, columns]; what is missing of the last one is 0."""
    blocks = blocked(gram, (columns, columns))
    at = jnp.arange(groups)
    return jnp.moveaxis(blocks[..., at, :, at, :], 0, -3)


def clip_scales(weight: jax.Array, spec: WeightSpec, limit: jax.Array) -> Scales:
    """The scales of a clipped weight; rounding against them saturates what was clipped.

    Args:
      weight: floating point [..., out, in].
      limit: [..., out/rows, in/columns], as of `awq_clip`.
    """
    weight = weight.astype(jnp.float32)
    bound = fill_blocks(limit, spec.block, weight.shape)
    whole = jnp.abs(weight).max(axis=(-2, -1))
    return find_scales(jnp.clip(weight, -bound, bound), spec, whole)
