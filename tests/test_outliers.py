"""The outlier twin: the reference model's function, with activations that int8 cannot hold.

Gains of norms are multiplied by up to 64 on a few features, and the columns of the weights that
read them divided: powers of two, so that the function is the same to the last bit of each weight.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import REFERENCE

import qjax
from qjax.checkpoint.orbax import fill
from qjax.data import calibration_data
from qjax.evaluate import evaluate_perplexity
from qjax.text import held_out, token_windows
from qjax.tree import leaves_by_name

NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
FACTORS = (64, 64, 32, 16)


def twin(lm: qjax.LanguageModel) -> qjax.LanguageModel:
    """Written from the definition, with nothing of the library's folding."""
    _, state = lm.split()
    leaves = leaves_by_name(state)
    rng = np.random.default_rng(0)
    for index in range(lm.config.num_hidden_layers):
        for norm, readers in NORMS.items():
            scale = np.ones(lm.config.hidden_size, np.float32)
            scale[rng.choice(len(scale), len(FACTORS), replace=False)] = FACTORS
            gain = f"layers.{index}.{norm}.scale"
            leaves[gain] = leaves[gain] * jnp.asarray(scale, leaves[gain].dtype)
            for reader in readers:
                weight = f"layers.{index}.{reader}.weight"
                leaves[weight] = leaves[weight] / jnp.asarray(scale, leaves[weight].dtype)
    return lm.with_state(fill(state, leaves, "the twin"), None)


@pytest.mark.heavy
def test_smoothquant_recovers_what_per_tensor_int8_loses():
    lm = qjax.load(REFERENCE)
    other = twin(lm)
    windows = token_windows(held_out(), lm.tokenizer, count=16, seq_len=256)
    base = evaluate_perplexity(lm, windows)
    same, _ = evaluate_perplexity(other, windows).change_from(base)
    # Sums of bfloat16 numbers that are the same, but for features whose gain rounds the same way.
    assert abs(same) < 1e-3
    calib = qjax.CalibConfig(num_samples=16, max_seq_length=256, dataset="stdlib")
    batches = calibration_data(None, lm.tokenizer, calib)
    rough = qjax.preset("int8", act_granularity="per_tensor", act_scale="static")
    collapsed, _ = evaluate_perplexity(
        qjax.quantize_model(other, rough, batches), windows
    ).change_from(base)
    smooth = qjax.quantize_model(other, "int8_sq", batches)
    recovered, (low, high) = evaluate_perplexity(smooth, windows).change_from(base)
    assert collapsed > 0.5
    assert recovered < 0.02, (low, high)
