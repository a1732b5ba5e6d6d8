"""GPTQ: weights are rounded column by column, later columns make up for the error of earlier ones.

Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323 (equations 2 and 3, Algorithm 1), in the
form of Chen et al., https://arxiv.org/abs/2507.18553, who show that it is Babai's nearest plane
algorithm. With H = R R^T, R upper triangular, and d = w - q the change of a row,

    d H d^T = sum over j of (sum over i <= j of d_i R_ij)^2,

so that, once q_0 ... q_(j-1) are chosen, the best q_j is the number nearest to

    w_j + (sum over i < j of d_i R_ij) / R_jj.

That is the paper's updated column: R^-1 is its Cholesky factor of H^-1. Here nothing is inverted,
and instead of updating all later columns, a column sums up the errors of earlier ones.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax import numerics
from qjax.algorithms.scale_search import ScaleSearch, search_scales
from qjax.algorithms.scales import (
    Grid,
    Scales,
    WeightSpec,
    as_qarray,
    block_length,
    decode,
    encode,
    expand,
    find_scales,
)
from qjax.algorithms.statistics import EXACT, gram_loss
from qjax.errors import ConfigError
from qjax.qarray import QArray

MAX_DAMPING = 1.0


class GptqInfo(NamedTuple):
    """How it went, for each matrix of a stack.

    Attributes:
      error: float32 [...], tr(dW H dW^T) of the result.
      damping: float32 [...], the share of the mean of diag(H) that was added to the diagonal.
      fell_back: bool [...], H could not be factorized at any damping up to MAX_DAMPING, or holds
        NaN: the result is round-to-nearest.
    """

    error: Any
    damping: Any
    fell_back: Any


class _Factor(NamedTuple):
    """R [in, in], upper triangular, of H in the order of `order` int32 [in]; how it was had."""

    r: Any
    order: Any
    damping: Any
    ok: Any


@partial(jax.jit, static_argnames=("spec", "act_order", "damping", "block", "search"))
def gptq(
    weight: jax.Array,
    gram: jax.Array,
    spec: WeightSpec,
    *,
    scales: Scales | None = None,
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    search: ScaleSearch | None = None,
) -> tuple[QArray, GptqInfo]:
    """Quantize weights so that the outputs for the calibration data change little.

    Inputs that are 0 in all calibration data get weight 0, as in the paper's code.

    Args:
      weight: floating point [..., out, in]. Weights that share an input may be concatenated along
        out: rows do not see each other.
      gram: float32 [..., in, in], sum over tokens of x x^T, in any unit.
      spec: the grid. Groups of up to `block` columns get scales from the columns as they are when
        their turn comes; wider groups from the original weight.
      scales: given scales, used as they are ("static groups").
      act_order: columns in descending order of diag(H). Always with static groups, so that the
        result is in the original order and needs no permutation at run time.
      damping: added to the diagonal, as a share of its mean; ten times more after each Cholesky
        factorization that fails.
      block: columns that are rounded between products with all earlier ones. Speed only.
      search: how scales are searched for, in place of the largest magnitude; an error is weighted
        by R_jj^2, which is what it costs above (by H_jj with static groups).

    Returns:
      a QArray without an input spec, and what happened.

    Raises:
      ConfigError: damping outside (0, MAX_DAMPING]; search with given scales.
    """
    if not 0 < damping <= MAX_DAMPING:
        raise ConfigError(f"damping is {damping}; it must be above 0 and at most {MAX_DAMPING}")
    if scales is not None and search is not None:
        raise ConfigError("scales are given, and search asks to find them; choose one")
    lead, matrix = weight.shape[:-2], weight.shape[-2:]
    grams = gram.reshape(-1, *gram.shape[-2:])
    # One by one: batches of large matrices are slow on GPUs.
    factors = lax.map(partial(_factorize, damping=damping, act_order=act_order), grams)
    moments = jnp.diagonal(grams, axis1=-2, axis2=-1)
    targets = weight.astype(jnp.float32).reshape(-1, *matrix)
    targets = jnp.where(moments[:, None, :] == 0, 0, targets)
    wide = matrix[1] if spec.block[1] == -1 else spec.block[1]
    whole = jnp.abs(targets).max(axis=(-2, -1))
    if scales is not None:
        scales = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), scales)
    elif act_order or wide > block or matrix[1] % wide:
        scales = jax.vmap(partial(_static_scales, spec=spec, search=search))(targets, moments)
    length = wide if scales is None else block_length(matrix[1], block)
    solve = partial(_solve, spec=spec, search=search, length=length)
    codes, found = jax.vmap(solve)(targets, factors, scales, whole)
    codes, found = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), (codes, found))
    change = weight.astype(jnp.float32) - decode(codes, *expand(found, spec, weight.shape))
    info = GptqInfo(
        error=jnp.sum(gram_loss(change, gram), axis=-1),
        damping=factors.damping.reshape(lead),
        fell_back=~factors.ok.reshape(lead),
    )
    return as_qarray(codes, spec, found, weight.dtype), info


def _factorize(gram: jax.Array, damping: float, act_order: bool) -> _Factor:
    """H [in, in] -> R, with damping that grows until there is one; else the identity."""
    size = gram.shape[-1]
    diagonal = jnp.diagonal(gram)
    alive = diagonal > 0
    # In units of the mean of diag(H) no setting depends on the number of tokens.
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive, dtype=jnp.float32), 1)
    unit = jnp.where(mean > 0, mean, 1)
    order = jnp.arange(size)
    if act_order:
        order = jnp.argsort(-diagonal, stable=True)
        gram, alive = gram[order][:, order], alive[order]
    # Upper times its transpose is lower times its transpose, read backwards.
    backwards = gram[::-1, ::-1] / unit
    holes = jnp.where(alive, 0.0, 1.0)[::-1]

    def attempt(share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        damped = backwards + jnp.diag(holes + share)
        lower = lax.linalg.cholesky(damped, symmetrize_input=False)
        return share, lower, jnp.isfinite(lower).all()

    share, lower, ok = lax.while_loop(
        lambda state: ~state[2] & (state[0] * 10 <= MAX_DAMPING * 1.001),
        lambda state: attempt(state[0] * 10),
        attempt(jnp.float32(damping)),
    )
    r = jnp.where(ok, jnp.triu(lower[::-1, ::-1]), jnp.eye(size, dtype=jnp.float32))
    return _Factor(r=r, order=order, damping=share, ok=ok)


def _static_scales(
    weight: jax.Array, moments: jax.Array, spec: WeightSpec, search: ScaleSearch | None
) -> Scales:
    """Scales of the original weight [out, in]; moments is diag(H) [in]."""
    if search is None:
        return find_scales(weight, spec)
    return search_scales(weight, spec, search, moments)


def _solve(
    weight: jax.Array,
    factor: _Factor,
    static: Scales | None,
    whole: jax.Array,
    *,
    spec: WeightSpec,
    search: ScaleSearch | None,
    length: int,
) -> tuple[jax.Array, Scales]:
    """One matrix [out, in], `length` columns at a time, each as one row of its transpose.

    Args:
      static: scales; None: found for each block of columns, which is a group.
      whole: float32 scalar, largest magnitude of the matrix.

    Returns:
      codes, float32 [out, in], and scales.
    """
    order, r = factor.order, factor.r
    blocks = (weight.shape[1] // length, length)
    rows = weight.T[order].reshape(*blocks, -1)
    at = jnp.arange(blocks[0])
    diagonal = r.reshape(*blocks, *blocks)[at, :, at, :]
    grid = None
    if static is not None:
        grid = expand(static, spec, weight.shape)
        grid = jax.tree.map(lambda x: x.T[order].reshape(rows.shape), grid)

    def one_block(delta: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        start, w, r_block, grid = xs
        before = lax.dynamic_slice_in_dim(r, start, length, axis=1)
        owed = jnp.matmul(before.T, delta, precision=EXACT)
        found = None
        if grid is None:
            found, grid = _group_scales(w, owed, r_block, whole, spec, search)
        codes, change = _round_block(w, owed, r_block, grid, numerics.get_format(spec.format))
        return lax.dynamic_update_slice_in_dim(delta, change, start, axis=0), (codes, found)

    nothing = jnp.zeros(weight.shape[::-1], jnp.float32)
    xs = (at * length, rows, diagonal, grid)
    _, (codes, found) = lax.scan(one_block, nothing, xs)
    codes = jnp.zeros_like(nothing).at[order].set(codes.reshape(nothing.shape)).T
    if static is not None:
        return codes, static
    # One column of scales a group, [groups, out/rows, 1]; the global scale is the same for all.
    return codes, jax.tree.map(lambda x: x[..., 0].T if x.ndim == 3 else x[0], found)


def _group_scales(
    w: jax.Array,
    owed: jax.Array,
    r: jax.Array,
    whole: jax.Array,
    spec: WeightSpec,
    search: ScaleSearch | None,
) -> tuple[Scales, Grid]:
    """Scales of one group from its updated columns; and its grid, step and zero [columns, out].

    All columns of a group are updated at once: w + owed R^-1, with the group's own part of R.
    """
    updated = (w + lax.linalg.triangular_solve(r, owed, left_side=True, transpose_a=True)).T
    if search is None:
        found = find_scales(updated, spec, whole)
    else:
        found = search_scales(updated, spec, search, jnp.diagonal(r) ** 2, whole)
    step, zero = expand(found, spec, updated.shape)
    return found, (step.T, None if zero is None else zero.T)


def _round_block(
    w: jax.Array, owed: jax.Array, r: jax.Array, grid: Grid, fmt: numerics.Format
) -> tuple[jax.Array, jax.Array]:
    """Codes and changes w - q, float32 [columns, out], of the columns of one block.

    Args:
      w: [columns, out], the columns as they were at first.
      owed: [columns, out], what the errors of earlier blocks add up to.
      r: [columns, columns], the block's own part of R.
      grid: step and zero point, [columns, out].
    """

    def column(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, change = state
        step, zero = jax.tree.map(lambda x: x[j], grid)
        # Rows of `change` that are still to come are 0.
        debt = owed[j] + jnp.sum(r[:, j, None] * change, axis=0)
        code = encode(w[j] + debt / r[j, j], step, zero, fmt)
        return codes.at[j].set(code), change.at[j].set(w[j] - decode(code, step, zero))

    return lax.fori_loop(0, len(w), column, (jnp.zeros_like(w), jnp.zeros_like(w)))
