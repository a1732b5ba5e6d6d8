"""Reading Hugging Face directories: config.json and *.safetensors. No pickle, no remote code."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qjax.checkpoint.orbax import fill
from qjax.errors import CheckpointError
from qjax.models.registry import Family
from qjax.models.tensors import renamed
from qjax.tree import named_leaves

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      CheckpointError: missing, damaged, or of a model that is quantized already.
    """
    data = _read_json(path / "config.json")
    quantization = data.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{path} is quantized already (quant_method {method!r}), which qjax does not read yet; "
            "load the original checkpoint and quantize it"
        )
    if not isinstance(data.get("model_type"), str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type")
    generation = path / "generation_config.json"
    if generation.is_file():
        # Instruct models list the token that ends a turn only there.
        ends = _ids(data.get("eos_token_id")) | _ids(_read_json(generation).get("eos_token_id"))
        data["eos_token_id"] = sorted(ends)
    return data


def _ids(value: Any) -> set[int]:
    """None, an id, or a list of ids, as a set."""
    if value is None:
        return set()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}; it must be an integer or a list of them")
    return set(ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return data


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model, from its index if it has one.

    Raises:
      CheckpointError: none there, or the index names a file that is missing or outside `path`.
    """
    if (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / INDEX} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise CheckpointError(f"{path / INDEX} names {name!r}, which is not in {path}")
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    others = [f.name for f in path.glob("*.bin")] + [f.name for f in path.glob("*.pt")]
    hint = f"; {others[0]} is a pickle, which qjax never opens: convert it" if others else ""
    raise CheckpointError(f"{path} has no {SINGLE} and no {INDEX}{hint}")


def load_state(
    path: Path,
    family: Family,
    config: Any,
    abstract_state: Any,
    place: Callable[[str, np.ndarray], Any],
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Stream the weights of `path` into the structure of `abstract_state`.

    Args:
      config: of the model.
      place: name and tensor -> the leaf.
      progress: called as progress(done, total) after each file.

    Raises:
      CheckpointError: a truncated file; names or shapes that are not the model's.
    """
    leaves: dict[str, Any] = {}
    stacks = Stacks(abstract_state)
    files = weight_files(path)
    for done, file in enumerate(files, 1):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if is_computed(name, family):
                        continue
                    parts = renamed(name, tensors.get_tensor(name), family.tensors, config)
                    for ours, part in stacks.joined(parts):
                        leaves[ours] = place(ours, part)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
        if progress is not None:
            progress(done, len(files))
    stacks.check(path)
    if "lm_head.weight" in leaves and abstract_state_lacks(abstract_state, "lm_head"):
        # Tied models are sometimes stored with their head.
        head = leaves.pop("lm_head.weight")
        if not jnp.array_equal(head, leaves.get("embed_tokens.embedding", 0)):
            raise CheckpointError(
                f"{path} is tied (tie_word_embeddings), but its lm_head.weight is not its embedding"
            )
    return fill(abstract_state, leaves, str(path))


class Stacks:
    """Weights of experts, which come one by one and are leaves [experts, out, in].

    Only stacks that are not complete are held, in host memory.
    """

    def __init__(self, abstract_state: Any) -> None:
        self.shapes = {n: tuple(leaf.shape) for n, leaf in named_leaves(abstract_state)}
        self.stacks: dict[str, np.ndarray] = {}
        self.missing: dict[str, set[int]] = {}
        self.misfits: dict[str, np.ndarray] = {}

    def joined(self, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """What is complete: tensors that are no part of a stack, and stacks with their last."""
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(.*)\[(\d+)\]", name)
            if match is None:
                yield name, tensor
                continue
            stack, index = match[1], int(match[2])
            shape = self.shapes.get(stack, (0,))
            if index >= shape[0] or tensor.shape != shape[1:]:
                self.misfits[name] = tensor
                continue
            if stack not in self.stacks:
                self.stacks[stack] = np.empty(shape, tensor.dtype)
                self.missing[stack] = set(range(shape[0]))
            self.stacks[stack][index] = tensor
            self.missing[stack].discard(index)
            if not self.missing[stack]:
                del self.missing[stack]
                yield stack, self.stacks.pop(stack)

    def check(self, path: Path) -> None:
        """Raise CheckpointError if something is left."""
        problems = [f"lacks {n}[{i}]" for n, left in self.missing.items() for i in sorted(left)]
        problems += [
            f"has {name} of shape {tensor.shape}, which the model has no place for"
            for name, tensor in self.misfits.items()
        ]
        if problems:
            more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
            raise CheckpointError(
                f"{path} does not fit the model: it " + "; it ".join(problems[:4]) + more
            )


def abstract_state_lacks(state: Any, key: str) -> bool:
    """Whether the top level of an NNX state has nothing under `key`."""
    return key not in state or not state[key]


def is_computed(name: str, family: Family) -> bool:
    """Whether a tensor is a buffer, which models compute."""
    return name.endswith("rotary_emb.inv_freq") or any(
        re.fullmatch(pattern, name) for pattern in family.computed
    )
