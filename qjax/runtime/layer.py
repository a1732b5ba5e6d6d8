"""One decoder layer with prepared weights: at a decode step, six to ten kernels.

[residual sum, norm, quantization] -> product with q, k and v -> [rotation, keys and values into
their pages] -> attention -> product with o -> [residual sum, norm, quantization] -> product with
gate and up [, SwiGLU, quantization] -> product with down. Around weight-only products of few tokens
the norms are parts of the products. Where attention and the MLP read the same rows, one product
makes q, k, v and up of them, and the last two add to the residual. Each is called by its op's name:
where a kernel does not run, as on a CPU, its reference does.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.nn.layer import PARALLEL, POST, SANDWICH, SERIAL, SHARED
from qjax.runtime.attention import Pages, Shape, Where, Written, attend
from qjax.runtime.feed_forward import activated, feed_forward, inner
from qjax.runtime.products import Rows, normed, project, quantized, side_by_side, splits, summed
from qjax.runtime.weights import JOINED, LayerWeights, Norm, Projection

Stream = jax.Array | ops.Summed
# [tokens, all of q, k, v] -> attention's result as the product with o takes it, and the pages.
Attention = Callable[[jax.Array], tuple[Rows, Written]]
Result = tuple[Stream, jax.Array | None, Written]


@partial(jax.jit, static_argnames="shape")
def decoder_layer(
    x: Stream,
    residual: jax.Array | None,
    weights: LayerWeights,
    pages: Pages,
    where: Where,
    behind: Norm | None,
    shape: Shape,
) -> Result:
    """One layer. Jitted: layers of equal shapes are traced once.

    Args:
      x: [batch * tokens, features]: what the layer before adds to the residual; or their sum.
      residual: of the same shape; None where x is the sum.
      behind: the norm behind this layer, where the layer's last product does its part of it.

    Returns:
      what this layer adds to the residual, or with a norm `behind` their sum; the residual, or None
      where they are added up; and the layer's pages of keys and of values.
    """
    attention = partial(attend, weights=weights, pages=pages, where=where, shape=shape)
    return _ARRANGED[weights.config.arrangement](x, residual, weights, behind, attention)


def _serial(
    x: Stream,
    residual: jax.Array | None,
    weights: LayerWeights,
    behind: Norm | None,
    attention: Attention,
) -> Result:
    """Also a sandwich, whose parts' results are normalized before they are added."""
    rows, residual = normed(x, residual, weights.attention_norm, weights.qkv)
    dtype, norm = residual.dtype, weights.mlp_norm
    assert norm is not None
    mixed, written = attention(_products(rows, weights.qkv, dtype))
    y: Stream
    if norm_inside(len(residual), weights):
        y = summed(mixed, weights.o, residual, norm)
    else:
        y = _again(project(mixed, weights.o, dtype), weights.attention_output_norm)
    rows, residual = normed(y, residual, norm, weights.behind_mlp_norm)
    if behind is not None:
        y = summed(inner(rows, weights, dtype), weights.down, residual, behind)
    else:
        y = _again(feed_forward(rows, weights, dtype), weights.mlp_output_norm)
    return y, residual, written


def _parallel(
    x: Stream,
    residual: jax.Array | None,
    weights: LayerWeights,
    behind: Norm | None,
    attention: Attention,
) -> Result:
    """Attention and the MLP beside each other, with one norm or one each."""
    if weights.gated == JOINED:
        rows, total = normed(x, residual, weights.attention_norm, weights.qkv)
        both = project(rows, weights.qkv[0], total.dtype)
        mixed, written = attention(both)
        y = project(mixed, weights.o, total.dtype, total)
        return project(activated(both, weights), weights.down, y.dtype, y), None, written
    if weights.mlp_norm is None:
        rows, total = normed(x, residual, weights.attention_norm, ())
        other = quantized(rows.values, weights.behind_mlp_norm)
        rows = quantized(rows.values, weights.qkv)
    else:
        rows, total = normed(x, residual, weights.attention_norm, weights.qkv)
        other, _ = normed(total, None, weights.mlp_norm, weights.behind_mlp_norm)
    mixed, written = attention(_products(rows, weights.qkv, total.dtype))
    y = project(mixed, weights.o, total.dtype, total)
    return feed_forward(other, weights, y.dtype, y), None, written


def _post(
    x: Stream,
    residual: jax.Array | None,
    weights: LayerWeights,
    behind: Norm | None,
    attention: Attention,
) -> Result:
    """The norms are those of the sums that the next part reads, and adds to."""
    assert isinstance(x, jax.Array)
    assert weights.mlp_norm is not None
    x = x if residual is None else x + residual
    rows = quantized(x, weights.qkv)
    mixed, written = attention(_products(rows, weights.qkv, x.dtype))
    y = project(mixed, weights.o, x.dtype)
    x = normed(y, x, weights.attention_norm, ())[0].values
    y = feed_forward(quantized(x, weights.behind_mlp_norm), weights, x.dtype)
    return normed(y, x, weights.mlp_norm, ())[0].values, None, written


_ARRANGED: dict[str, Callable[..., Result]] = {
    SERIAL: _serial,
    SANDWICH: _serial,
    PARALLEL: _parallel,
    SHARED: _parallel,
    POST: _post,
}


def _products(rows: Rows, parts: Sequence[Projection], dtype: jnp.dtype) -> jax.Array:
    return side_by_side([project(rows, part, dtype) for part in parts])


def _again(y: jax.Array, norm: Norm | None) -> jax.Array:
    """The norm of a part's result, in a sandwich."""
    return y if norm is None else normed(y, None, norm, ())[0].values


def norm_inside(tokens: int, weights: LayerWeights) -> bool:
    """Whether the products with o, and with gate and up, do the norm between them."""
    norm = weights.mlp_norm
    if weights.config.arrangement != SERIAL or norm is None:
        return False
    return splits(tokens, norm, weights.o, weights.gate_up)


def norm_behind(tokens: int, weights: LayerWeights, following: LayerWeights) -> Norm | None:
    """That between two layers, if the products around it do it."""
    if {weights.config.arrangement, following.config.arrangement} != {SERIAL}:
        return None
    norm = following.attention_norm
    return norm if splits(tokens, norm, weights.down, following.qkv) else None
