"""Quantize a Flax NNX model of your own: convert, calibrate, quantize, save, restore, run.

Nothing here comes from qjax.models: an MLP and a small transformer, written with plain Flax
layers, go through the same few lines (`quantize_and_save`).

    python examples/your_own_model.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax


def quantize_and_save(model, batches, path):
    """All of qjax that a model needs: fp8 weights and activations, calibrated on `batches`."""
    model = qjax.nn.convert(model)  # nnx.Linear, LinearGeneral, Einsum, Embed -> qjax.nn
    stats = qjax.calibrate(model, batches)  # the largest inputs that each layer sees
    graphdef, state = nnx.split(model)
    cfg = qjax.preset("fp8")  # or "int8", "int4_wo", ...: see qjax.PRESETS
    plan = qjax.plan(state, cfg)  # the dry run: what each weight becomes
    quantized = qjax.quantize(state, cfg, stats)
    qjax.save(path, quantized, config=cfg)
    restored = qjax.restore(path, like=state)
    forward = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return forward, plan, quantized, restored


class MLP(nnx.Module):
    """Features [batch, features] -> logits [batch, classes]."""

    def __init__(self, features, hidden, classes, *, rngs):
        self.up = nnx.Linear(features, hidden, rngs=rngs)
        self.middle = nnx.Linear(hidden, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.middle(nnx.relu(self.up(x)))))


class Block(nnx.Module):
    """Attention and a gated MLP, each on a residual."""

    def __init__(self, features, heads, *, rngs):
        self.attention_norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(features, rngs=rngs)
        self.gate_up = nnx.LinearGeneral(features, (2, 4 * features), use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * features, features, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        gate_up = self.gate_up(self.mlp_norm(x))
        return x + self.down(nnx.silu(gate_up[..., 0, :]) * gate_up[..., 1, :])


class Transformer(nnx.Module):
    """Token ids [batch, seq] -> logits [batch, seq, vocabulary]."""

    def __init__(self, vocabulary, features, heads, depth, *, rngs):
        self.embed = nnx.Embed(vocabulary, features, rngs=rngs)
        self.blocks = nnx.List([Block(features, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def bit_equal(a, b):
    """Whether two trees have the same structure and the same bytes."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def main():
    rng = np.random.default_rng(0)
    examples = {
        "MLP": (
            MLP(32, 256, 10, rngs=nnx.Rngs(0)),
            [jnp.asarray(rng.normal(size=(64, 32)), jnp.float32) for _ in range(5)],
        ),
        "Transformer": (
            Transformer(128, 64, 4, depth=2, rngs=nnx.Rngs(0)),
            [jnp.asarray(rng.integers(0, 128, (4, 32))) for _ in range(5)],
        ),
    }
    for name, (model, (unseen, *batches)) in examples.items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "checkpoint"
            forward, plan, quantized, restored = quantize_and_save(model, batches, path)
        expected = nnx.jit(lambda model, x: model(x))(model, unseen)
        error = jnp.linalg.norm(forward(restored, unseen) - expected) / jnp.linalg.norm(expected)
        print(
            f"{name}: {plan.bytes_before:,} -> {plan.bytes_after:,} bytes, relative error of the "
            f"output {error:.2%}, restored bit for bit: {bit_equal(quantized, restored)}"
        )


if __name__ == "__main__":
    main()
