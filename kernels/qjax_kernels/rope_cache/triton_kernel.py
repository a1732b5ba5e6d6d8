"""Some heads of some tokens by one block: read once, rotated, rounded, written to their place."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

from qjax_kernels.triton_rows import quantized


@triton.jit
def _put(target, x, scale, mask):
    """Store float32 x at `target` in its dtype, divided by the scale if that is an 8-bit one."""
    dtype: tl.constexpr = target.dtype.element_ty
    if dtype.primitive_bitwidth == 8:
        x = quantized(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), dtype, True)
    tl.store(target, x.to(dtype), mask=mask)


@triton.jit
def _put_heads(
    target,
    first,
    second,
    rest,
    scale,
    here,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Store heads, [rows, 1] pointers to which are `target`, from their three parts."""
    HALF: tl.constexpr = ROTARY // 2
    WIDTH: tl.constexpr = first.shape[1]
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * WIDTH])
        _put(target + column, both, scale, here & (column < ROTARY))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        _put(target + column, first, scale, here & (column < HALF))
        _put(target + (HALF + column), second, scale, here & (column < HALF))
    if ROTARY < HEAD_DIM:
        column = ROTARY + tl.arange(0, rest.shape[1])[None, :]
        _put(target + column, rest, scale, here & (column < HEAD_DIM))


@triton.jit
def rope_cache(
    qkv,
    cos,
    sin,
    old_k_pages,
    old_v_pages,
    page,
    slot,
    k_scale,
    v_scale,
    tokens,
    pages,
    q,
    k_pages,
    v_pages,
    k,
    v,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WITH_KV: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
):
    """Arguments to `slot` .. `pages` are inputs, then outputs; the new pages are the old memory.

    WIDTH and REST: powers of two that cover half of the rotated dims, and the dims that are not.
    K_SCALES, V_SCALES: how many scales there are, one or one for each head.
    """
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = ROTARY // 2
    BLOCKS: tl.constexpr = ALL // BLOCK_HEADS
    block = tl.program_id(0) % BLOCKS
    row = tl.arange(0, BLOCK_TOKENS * BLOCK_HEADS)[:, None]
    token = (tl.program_id(0) // BLOCKS) * BLOCK_TOKENS + row // BLOCK_HEADS
    head = block * BLOCK_HEADS + row % BLOCK_HEADS
    here = token < tokens
    source = qkv + (token.to(tl.int64) * ALL + head) * HEAD_DIM

    column = tl.arange(0, WIDTH)[None, :]
    mask = here & (column < HALF)
    if INTERLEAVED:
        pair = tl.arange(0, 2 * WIDTH)[None, :]
        both = tl.load(source + pair, mask=here & (pair < ROTARY), other=0.0)
        both = tl.reshape(both, [BLOCK_TOKENS * BLOCK_HEADS, WIDTH, 2])
        first, second = tl.split(both)
    else:
        first = tl.load(source + column, mask=mask, other=0.0)
        second = tl.load(source + (HALF + column), mask=mask, other=0.0)
    rest = first
    if ROTARY < HEAD_DIM:
        other = ROTARY + tl.arange(0, REST)[None, :]
        rest = tl.load(source + other, mask=here & (other < HEAD_DIM), other=0.0)
    c = tl.load(cos + token * HALF + column, mask=mask, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=mask, other=0.0)
    at_page = tl.load(page + token, mask=here, other=-1)
    at_slot = tl.load(slot + token, mask=here, other=0)

    first = first.to(tl.float32)
    second = second.to(tl.float32)
    rest = rest.to(tl.float32)
    is_value = head >= HEADS + KV_HEADS
    # Not by cos 1 and sin 0: infinities would become NaN.
    new_first = tl.where(is_value, first, first * c - second * s)
    new_second = tl.where(is_value, second, second * c + first * s)

    written = here & (at_page >= 0) & (at_page < pages)
    if block * BLOCK_HEADS < HEADS:
        target = q + (token.to(tl.int64) * HEADS + head) * HEAD_DIM
        _put_heads(target, new_first, new_second, rest, 1.0, here, ROTARY, HEAD_DIM, INTERLEAVED)
    elif block * BLOCK_HEADS < HEADS + KV_HEADS:
        head -= HEADS
        place = (at_page.to(tl.int64) * KV_HEADS + head) * PAGE_SIZE + at_slot
        scale = tl.load(k_scale + head % K_SCALES)
        _put_heads(
            k_pages + place * HEAD_DIM, new_first, new_second, rest, scale, written,
            ROTARY, HEAD_DIM, INTERLEAVED,
        )  # fmt: skip
        if WITH_KV:
            target = k + (token.to(tl.int64) * KV_HEADS + head) * HEAD_DIM
            _put_heads(
                target, new_first, new_second, rest, 1.0, here, ROTARY, HEAD_DIM, INTERLEAVED
            )
    else:
        head -= HEADS + KV_HEADS
        place = (at_page.to(tl.int64) * KV_HEADS + head) * PAGE_SIZE + at_slot
        scale = tl.load(v_scale + head % V_SCALES)
        _put_heads(
            v_pages + place * HEAD_DIM, new_first, new_second, rest, scale, written,
            ROTARY, HEAD_DIM, INTERLEAVED,
        )  # fmt: skip
        if WITH_KV:
            target = v + (token.to(tl.int64) * KV_HEADS + head) * HEAD_DIM
            _put_heads(
                target, new_first, new_second, rest, 1.0, here, ROTARY, HEAD_DIM, INTERLEAVED
            )
