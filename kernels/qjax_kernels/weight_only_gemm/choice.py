"""Which tiles a call takes: those measured at the nearest size, or the first guess."""

import dataclasses

from qjax_kernels.tuned import lookup
from qjax_kernels.weight_only_gemm.config import (
    Config,
    candidates,
    fp8_candidates,
    stream_fits,
    tiled_fits,
)
from qjax_kernels.weight_only_gemm.layout import Prepared


def choose(tokens: int, weight: Prepared, *, cores: int) -> Config:
    """The configuration for x [tokens, in]; fp8 activations if the weight is prepared for them."""
    fp8 = weight.operand == "float8_e4m3fn"
    op = "w4a8_gemm" if fp8 else "prepared_gemm"
    group_size = None if weight.groups == 1 else weight.group_size
    for entry in lookup.nearest(op, weight.format, group_size, tokens, *weight.shape):
        if entry.implementation == "mosaic":
            config = fitted(Config(**entry.config), tokens)
            if valid(config, weight):
                return config
    guess = fp8_candidates if fp8 else candidates
    return guess(tokens, weight, cores=cores)[0]


def fitted(config: Config, tokens: int) -> Config:
    """Without room for tokens that are not there."""
    if config.kernel == "tiled" or tokens >= config.tokens:
        return config
    return dataclasses.replace(config, tokens=-(-tokens // 8) * 8)


def valid(config: Config, weight: Prepared) -> bool:
    """Whether a configuration takes a weight."""
    fp8 = weight.operand == "float8_e4m3fn"
    if config.tiles % (2 if fp8 else 1) or config.tiles % config.parts:
        return False
    if config.kernel == "stream":
        columns = -(-weight.in_features // 64)
        enough = columns >= config.warpgroups * config.tiles * config.cluster
        return enough and stream_fits(config, weight)
    return tiled_fits(config, weight, 8 if fp8 else 16)
