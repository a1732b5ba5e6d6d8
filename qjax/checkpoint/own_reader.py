"""Reading the weights of a qjax checkpoint some at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qjax.checkpoint.format import FILE
from qjax.checkpoint.orbax import OrbaxReader
from qjax.errors import CheckpointError, DataError
from qjax.models.registry import get_family


class OwnReader:
    """A model's plain weights, each read when it is asked for.

    Attributes:
      model_type, config: of the model.
      dtype: that weights are read in.
    """

    def __init__(self, path: Path, dtype: Any = None):
        """Check the files; read no weight.

        Raises:
          CheckpointError: missing, damaged, or no language model.
          DataError: it is quantized already.
        """
        self.reader = OrbaxReader(path)
        manifest = self.reader.manifest
        if manifest.model is None:
            raise CheckpointError(f"{path} is a bare tree of arrays, not a language model")
        if manifest.quantization is not None:
            name = manifest.quantization.get("name")
            raise DataError(f"{path} is quantized already, by {name!r}; quantize the original")
        try:
            self.model_type = manifest.model["model_type"]
            self.config = get_family(self.model_type).from_dict(manifest.model["config"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / FILE} is damaged: {error!r}") from error
        stored = self.reader.abstract()["embed_tokens.embedding"].dtype
        self.dtype = jnp.dtype(stored if dtype is None else dtype)

    def abstract(self) -> dict[str, Any]:
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, self.dtype)
            for name, leaf in self.reader.abstract().items()
        }

    def read(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Name -> array on the device."""
        found = self.reader.read(names, jax.devices()[0])
        return {name: leaf.astype(self.dtype) for name, leaf in found}
