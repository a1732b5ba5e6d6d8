"""Some heads of some tokens by one block: read once, normalized, rotated, rounded, written to their
place."""

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
def _heads(
    source,
    here,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Heads, [rows, 1] pointers to which are `source`, in three parts: of each pair that is rotated
    the first and the second number, and what is not rotated (any numbers if that is nothing)."""
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        pair = tl.arange(0, 2 * TURNED)[None, :]
        both = tl.load(source + pair, mask=here & (pair < ROTARY), other=0.0)
        first, second = tl.split(tl.reshape(both, [source.shape[0], TURNED, 2]))
    else:
        column = tl.arange(0, TURNED)[None, :]
        mask = here & (column < HALF)
        first = tl.load(source + column, mask=mask, other=0.0)
        second = tl.load(source + (HALF + column), mask=mask, other=0.0)
    rest = first
    if ROTARY < HEAD_DIM:
        column = ROTARY + tl.arange(0, REST)[None, :]
        rest = tl.load(source + column, mask=here & (column < HEAD_DIM), other=0.0)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


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
    q_norm,
    k_norm,
    tokens,
    pages,
    q,
    k_pages,
    v_pages,
    k,
    v,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TURNED: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WITH_KV: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
):
    """Arguments to `slot` .. `pages` are inputs, then outputs; the new pages are the old memory.

    WIDTH: of rows of qkv, which may have columns behind the heads. TURNED and REST: powers of two
    that cover half of the rotated dims, and the dims that are not rotated.
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
    source = qkv + token.to(tl.int64) * WIDTH + head * HEAD_DIM

    first, second, rest = _heads(source, here, ROTARY, HEAD_DIM, TURNED, REST, INTERLEAVED)
    column = tl.arange(0, TURNED)[None, :]
    mask = here & (column < HALF)
    c = tl.load(cos + token * HALF + column, mask=mask, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=mask, other=0.0)
    at_page = tl.load(page + token, mask=here, other=-1)
    at_slot = tl.load(slot + token, mask=here, other=0)

    is_value = head >= HEADS + KV_HEADS
    if HAS_NORMS:
        total = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        if ROTARY < HEAD_DIM:
            total += tl.sum(rest * rest, axis=1, keep_dims=True)
        factor = tl.rsqrt(total / HEAD_DIM + EPS)
        # Blocks have heads of one kind; those of values take no notice.
        weight = k_norm
        if block * BLOCK_HEADS < HEADS:
            weight = q_norm
        one = tl.zeros([1, 1], tl.int32)
        parts = _heads(weight + one, one == 0, ROTARY, HEAD_DIM, TURNED, REST, INTERLEAVED)
        first = tl.where(is_value, first, first * factor * (parts[0] + OFFSET))
        second = tl.where(is_value, second, second * factor * (parts[1] + OFFSET))
        rest = tl.where(is_value, rest, rest * factor * (parts[2] + OFFSET))
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
