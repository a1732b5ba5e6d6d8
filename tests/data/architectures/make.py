"""Make the checkpoints beside this file: tiny random models, and what transformers computes.

Each is a form of its family that differs from the usual one in what its config says. Run it with
torch 2.13 and transformers 5.17, which the tests themselves do not need:

    python tests/data/architectures/make.py

reference.npz holds input_ids [2, 20], float32 logits [2, 20, vocabulary] of the model loaded in
float32, and greedy [2, 8], the tokens that continue input_ids[:, :12].
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
SMALL |= {"pad_token_id": None}
GATED = SMALL | {"intermediate_size": 48}
TALL = GATED | {"num_hidden_layers": 3, "num_key_value_heads": 2}
OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OLD |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MPT = {"vocab_size": 64, "d_model": 36, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = [1.0, 2.0, 4.0, 8.0]
SHORT = [1.0, 1.1, 1.2, 1.3]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3 = {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "num_attention_heads": 2}
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
FALCON = SMALL | {"ffn_hidden_size": 48}

VARIANTS = {
    "llama_linear": ("llama", GATED | {"attention_bias": True, "mlp_bias": True, "rope_parameters":
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    "llama_dynamic": ("llama", GATED | {"num_key_value_heads": 1, "rope_parameters":
        {"rope_type": "dynamic", "factor": 2.0}}),
    "llama_yarn": ("llama", GATED | {"head_dim": 16, "rope_parameters": YARN}),
    "mistral_full": ("mistral", GATED | {"sliding_window": None, "head_dim": 12,
        "num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mistral_yarn": ("mistral", GATED | {"sliding_window": 5, "num_key_value_heads": 2,
        "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False,
        "beta_fast": 16, "beta_slow": 2, "rope_theta": 1000.0}}),
    "mixtral_window": ("mixtral", GATED | {"sliding_window": 6, "num_local_experts": 3,
        "num_experts_per_tok": 1, "num_key_value_heads": 2}),
    "qwen2_window": ("qwen2", TALL | {"use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1}),
    "qwen3_bias": ("qwen3", GATED | {"attention_bias": True, "head_dim": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": YARN |
        {"attention_factor": 1.25}}),
    "qwen3_moe_mixed": ("qwen3_moe", TALL | MOE | {"norm_topk_prob": False, "mlp_only_layers": [1],
        "use_sliding_window": True, "sliding_window": 5, "attention_bias": True, "head_dim": 8}),
    "qwen3_moe_step": ("qwen3_moe", TALL | MOE | {"decoder_sparse_step": 2, "head_dim": 8,
        "norm_topk_prob": True}),
    "falcon_serial": ("falcon", FALCON | {"multi_query": False, "parallel_attn": False,
        "bias": True}),
    "falcon_alibi": ("falcon", FALCON | {"multi_query": False, "alibi": True, "hidden_size": 48,
        "num_attention_heads": 6, "bias": True}),
    "falcon_11b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}),
    "mpt_clip": ("mpt", MPT | {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
    "gpt2_inverse": ("gpt2", OLD | {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "gpt2_unscaled": ("gpt2", OLD | {"scale_attn_weights": False, "tie_word_embeddings": False}),
    "gptj_inner": ("gptj", OLD | {"n_inner": 40, "rotary_dim": 4, "activation_function": "gelu"}),
    "opt_post": ("opt", SMALL | {"ffn_dim": 48, "do_layer_norm_before": False,
        "word_embed_proj_dim": 16}),
    "opt_bare": ("opt", SMALL | {"ffn_dim": 48, "enable_bias": False, "activation_function": "gelu",
        "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True}),
    "phi3_long": ("phi3", GATED | PHI3 | {"original_max_position_embeddings": 8,
        "sliding_window": 7, "rope_parameters": LONGROPE}),
    "phi3_short": ("phi3", GATED | PHI3 | {"original_max_position_embeddings": 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True, "rope_parameters": LONGROPE | {"attention_factor": 1.5}}),
    "gemma2_uncapped": ("gemma2", TALL | {"attention_bias": True, "head_dim": 8,
        "query_pre_attn_scalar": 20, "sliding_window": 5, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "hidden_activation": "gelu"}),
    "gemma3_pattern": ("gemma3_text", TALL | {"head_dim": 8, "query_pre_attn_scalar": 20,
        "sliding_window": 5, "sliding_window_pattern": 2, "final_logit_softcapping": 20.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
}  # fmt: skip


def make(name: str, model_type: str, fields: dict) -> None:
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sorted(VARIANTS).index(name))
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(config)
    gemma = model_type.startswith("gemma")
    for weight_name, weight in model.named_parameters():
        scale = 0.2 if weight.ndim > 1 else 0.1
        ones = weight.ndim == 1 and weight_name.endswith("weight") and not gemma
        weight.data = torch.randn(weight.shape) * scale + (1.0 if ones else 0.0)
    folder = HERE / name
    model.bfloat16().save_pretrained(folder)
    # With eager attention it adds Falcon's ALiBi twice, and with any other it has no soft caps.
    how = "eager" if gemma else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=how
    )
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(
            ids[:, :12], max_new_tokens=8, do_sample=False, attention_mask=torch.ones(2, 12)
        )[:, 12:]
    np.savez(
        folder / "reference.npz",
        input_ids=ids.numpy().astype(np.int32),
        logits=logits.numpy().astype(np.float32),
        greedy=greedy.numpy().astype(np.int32),
    )


if __name__ == "__main__":
    for variant in sys.argv[1:] or VARIANTS:
        make(variant, *VARIANTS[variant])
        print(variant)
