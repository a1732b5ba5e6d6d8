"""Time to the first token, and a token, of the loop behind `generate`; and what the bytes need."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.bench.random_model import random_model, recipe
from qjax.bench.shapes import shape
from qjax.errors import ConfigError
from qjax.lm import LanguageModel
from qjax.numerics import get_format, scale_from_amax
from qjax.prepare import prepare
from qjax.qarray import bits_of
from qjax.result import Generation
from qjax.tree import named_leaves

# Bytes a second that a copy reaches, by device; where it was measured.
BANDWIDTH = {"NVIDIA H200": 4.1e12}
IMPLEMENTATIONS = ("qjax", "xla")
# Name -> `prepare`'s kv_cache.
KV = {"bf16": None, "fp8": "fp8_e4m3", "int8": "int8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement.

    Attributes:
      shape, preset, kv: names: of the model, the recipe, what the cache holds.
      batch, input, output: sequences, tokens of a prompt, new tokens.
      implementation: 'qjax', the prepared model; 'xla', the canonical one, whose products XLA does.
      ms_per_token: of a decode step; a median, like the next.
      ttft_ms: from the prompt to the first token.
      tokens_per_s: new tokens of all sequences over all of the time, the prompt's included.
      peak_gib: what the larger of the two programs, that of the prompt and that of the new tokens,
        takes of device memory: weights, cache and temporaries; None where it is not known.
      bound_ms: of a decode step: weights and half of the new tokens' cache read once; None where
        the device's bandwidth is not known.
    """

    shape: str
    preset: str
    kv: str
    batch: int
    input: int
    output: int
    implementation: str
    ms_per_token: float
    ttft_ms: float
    tokens_per_s: float
    peak_gib: float | None
    bound_ms: float | None


def measure(
    name: str,
    preset: str,
    *,
    lm_head: str | None = None,
    kv: str = "bf16",
    batches: Sequence[int] = (1,),
    input: int = 2048,
    output: int = 128,
    implementation: str = "qjax",
    repeats: int = 3,
    config: Any = None,
    generate: Callable[..., Generation] = LanguageModel.generate,
) -> Iterator[Row]:
    """A row a batch size.

    Args:
      name: of the shape, see `shapes.SHAPES`.
      preset: 'bf16' or a preset.
      lm_head: a preset for the output head, or None.
      kv: what the cache holds, a key of KV; others than bf16 for 'qjax' only.
      batches: sequences that run together.
      input, output: tokens; output is 2 or more.
      implementation: 'qjax' or 'xla'.
      repeats: of a timed generation, after one that warms up.
      config: other sizes than the shape's.
      generate: what is timed: (model, prompts, max_new_tokens) -> Generation.
    """
    config = shape(name) if config is None else config
    lm = random_model(config, recipe(preset, lm_head))
    step_bytes = {batch: decode_bytes(lm, batch) for batch in batches}
    if implementation == "qjax":
        scales = cache_scales(lm) if kv == "int8" else None
        lm = prepare(lm, donate=True, kv_cache=KV[kv], kv_scales=scales)
    elif kv != "bf16":
        raise ConfigError(f"kv is {kv!r}; implementation 'xla' has a cache in bf16 only")
    for batch in batches:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, input)).tolist()
        runs = [generate(lm, ids, output).stats for _ in range(repeats + 1)][1:]
        first = median(run.prefill_s for run in runs)
        rest = median(run.decode_s for run in runs)
        peak = runs[-1].program_bytes
        yield Row(
            shape=name,
            preset=preset if lm_head is None else f"{preset}+{lm_head}_lm_head",
            kv=kv,
            batch=batch,
            input=input,
            output=output,
            implementation=implementation,
            ms_per_token=1e3 * rest / (output - 1),
            ttft_ms=1e3 * first,
            tokens_per_s=batch * output / (first + rest),
            peak_gib=None if peak is None else peak / 2**30,
            bound_ms=bound_ms(
                step_bytes[batch],
                cache_bytes(config, batch, input + output // 2, 2 if kv == "bf16" else 1),
            ),
        )


def cache_scales(lm: LanguageModel, tokens: int = 64) -> list[tuple[jax.Array, jax.Array]]:
    """(k_scale, v_scale) of each layer, float32 [kv_heads], for a cache in int8.

    The largest key and value of each head over some random tokens, as calibration would have it.
    """

    @partial(jax.jit, static_argnums=0)
    def amax(graphdef: nnx.GraphDef, state: Any, ids: jax.Array) -> list[tuple[jax.Array, ...]]:
        model = nnx.merge(graphdef, state)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        _, cache = model.hidden(ids, positions, model.init_cache(*ids.shape), fresh=True)
        return [tuple(jnp.max(jnp.abs(x), axis=(0, 2, 3)) for x in (c.k, c.v)) for c in cache]

    ids = np.random.default_rng(1).integers(0, lm.config.vocab_size, (1, tokens))
    found = amax(*lm.split(), jnp.asarray(ids, jnp.int32))
    return [(_step(k), _step(v)) for k, v in found]


def _step(amax: jax.Array) -> jax.Array:
    return scale_from_amax(amax.astype(jnp.float32), get_format("int8"))


def decode_bytes(lm: LanguageModel, batch: int = 1) -> int:
    """Of the weights that a decode step reads: all but the embedding, of which it reads rows, and
    of experts as many as `batch` tokens choose, if they choose at random."""
    tied = lm.config.tie_word_embeddings
    total = 0.0
    for name, leaf in named_leaves(lm.split()[1]):
        if tied or "embed" not in name:
            read = _experts_read(lm.config, name, batch) if ".experts." in name else 1
            total += bits_of(leaf) * read
    return int(total) // 8


def _experts_read(config: Any, name: str, batch: int) -> float:
    """The part of a layer's experts that at least one token goes through."""
    mlp = config.layers[int(name.split(".")[1])].mlp
    return 1 - (1 - mlp.experts_per_token / mlp.experts) ** batch


def cache_bytes(config: Any, batch: int, tokens: int, itemsize: int = 2) -> int:
    """Of the keys and values of so many tokens of each sequence."""
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return each * itemsize * batch * tokens


def bound_ms(*parts: int) -> float | None:
    """The time that a device takes to read so many bytes, or None if its bandwidth is not known."""
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    return None if bandwidth is None else 1e3 * sum(parts) / bandwidth
