"""Reading the weights of a Hugging Face directory some at a time, by our names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qjax.checkpoint.huggingface import Stacks, is_computed, read_config, weight_files
from qjax.errors import CheckpointError
from qjax.models.registry import abstract_model, get_family
from qjax.models.tensors import new_names, renamed
from qjax.tree import leaves_by_name

HEAD, TABLE = "lm_head.weight", "embed_tokens.embedding"


class HuggingFaceReader:
    """A model's weights, each read from its file when it is asked for.

    Attributes:
      model_type, config: of the model.
      dtype: that weights are read in.
    """

    def __init__(self, path: Path, dtype: Any = None, overrides: dict[str, Any] | None = None):
        """Read config.json and the names in the files; no weight.

        Raises:
          CheckpointError: missing, damaged, or its tensors are not those of the model.
        """
        raw = read_config(path) | (overrides or {})
        self.path = path
        self.model_type = raw["model_type"]
        self.family = get_family(self.model_type)
        self.config = self.family.from_hf(raw)
        self.dtype = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)
        _, state = abstract_model(self.model_type, self.config, self.dtype)
        self._state = state
        self._abstract = leaves_by_name(state)
        self._places = self._find()

    def abstract(self) -> dict[str, Any]:
        return {
            n: jax.ShapeDtypeStruct(leaf.shape, self.dtype) for n, leaf in self._abstract.items()
        }

    def read(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Name -> array on the device.

        Raises:
          CheckpointError: a truncated file, a tensor of another shape.
        """
        wanted = set(names)
        if TABLE in wanted and HEAD not in self._abstract and HEAD in self._places:
            wanted.add(HEAD)
        places = dict.fromkeys(place for name in wanted for place in self._places[name])
        stacks, found = Stacks(self._state), {}
        for file, tensor_name in places:
            tensor = _tensor(file, tensor_name)
            parts = renamed(tensor_name, tensor, self.family.tensors, self.config)
            for name, part in stacks.joined(parts):
                if name in wanted:
                    found[name] = part
        stacks.check(self.path)
        self._check_tied(found)
        return {name: self._placed(name, found[name]) for name in names}

    def _find(self) -> dict[str, list[tuple[Path, str]]]:
        """Our name -> the file and the name of each tensor that it is made of."""
        places: dict[str, list[tuple[Path, str]]] = {}
        for file in weight_files(self.path):
            try:
                with safe_open(file, "np") as tensors:
                    keys = [name for name in tensors.keys()]  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
            for key in keys:
                if is_computed(key, self.family):
                    continue
                for name in new_names(key, self.family.tensors):
                    places.setdefault(name.partition("[")[0], []).append((file, key))
        missing = [f"lacks {name}" for name in self._abstract if name not in places]
        extra = [n for n in places if n not in self._abstract and n != HEAD]
        problems = missing + [f"has {name}, which the model lacks" for name in extra]
        if problems:
            raise CheckpointError(
                f"{self.path} does not fit the model: it {'; it '.join(problems[:4])}"
            )
        return places

    def _placed(self, name: str, tensor: np.ndarray) -> jax.Array:
        expected = tuple(self._abstract[name].shape)
        if tensor.shape != expected:
            raise CheckpointError(
                f"{self.path} does not fit the model: it has {name} of shape {tensor.shape}, the "
                f"model {expected}"
            )
        return jnp.asarray(tensor).astype(self.dtype)

    def _check_tied(self, found: dict[str, np.ndarray]) -> None:
        """Tied models are sometimes stored with their head."""
        head = found.pop(HEAD, None) if HEAD not in self._abstract else None
        if head is not None and not np.array_equal(head, found[TABLE]):
            raise CheckpointError(
                f"{self.path} is tied (tie_word_embeddings), but its {HEAD} is not its embedding"
            )


def _tensor(file: Path, name: str) -> np.ndarray:
    try:
        with safe_open(file, "np") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
