"""What training the reference model leaves: weights as Hugging Face has them, a log, a plot."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference_corpus import END_OF_TEXT, write_json
from safetensors.flax import load_file, save_file
from tokenizers import Tokenizer

from qjax.models.llama import LlamaConfig
from qjax.tree import map_named, named_leaves

Params = Any  # an nnx.State of the model's weights
SHARD_BYTES = 15 * 2**20


def hf_name(name: str) -> str:
    """Our name of a weight -> Hugging Face's (the inverse of qjax.models.llama.HF_NAMES)."""
    name = re.sub(r"\.(scale|embedding)$", ".weight", name)
    return name if name.startswith("lm_head.") else f"model.{name}"


def export(folder: Path, model_cfg: LlamaConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Write a directory that transformers and qjax load: bfloat16 weights, tokenizer, config."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, jax.Array]] = [{}]
    for name, leaf in named_leaves(params):
        array = leaf.astype(jnp.bfloat16)
        if sum(other.nbytes for other in shards[-1].values()) + array.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][hf_name(name)] = array
    where, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        total += sum(array.nbytes for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)

    end = tokenizer.token_to_id(END_OF_TEXT)
    sizes = model_cfg.to_dict()
    rope = sizes.pop("rope")
    config = sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": rope["theta"],
        "torch_dtype": "bfloat16",
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    write_json(folder / "generation_config.json", generation)

    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": model_cfg.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def load_exported(folder: Path, params: Params) -> Params:
    """The weights of an exported directory, in the dtypes of `params`."""
    arrays: dict[str, jax.Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(file)
    return map_named(lambda name, leaf: arrays[hf_name(name)].astype(leaf.dtype), params)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write training.json (one line a key) and loss.png."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    (folder / "training.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    plot(folder / "loss.png", report)


def plot(path: Path, report: dict[str, Any]) -> None:
    """Training and held-out loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    millions = report["training"]["batch"] * report["training"]["length"] / 1e6
    result = report["result"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, label, style in (
        ("train", "training", {"color": "0.65", "linewidth": 1}),
        ("held_out", "held out", {"color": "C0", "linewidth": 2}),
    ):
        points = np.array(report["curves"][key])
        axes.plot(points[:, 0] * millions, points[:, 1], label=label, **style)
    low = min(loss for _, loss, *_ in report["curves"]["train"])
    axes.set(
        xlabel="tokens (millions)",
        ylabel="loss (nats per token)",
        ylim=(low - 0.1, low + 2),
        title=f"Held out: perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.3f} bits per byte",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
