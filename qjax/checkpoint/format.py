"""qjax.json: what a checkpoint says about itself. The format is specified in checkpoints/README.md.

Orbax stores arrays and no static metadata, and it restores silently into a target of another
group size or dtype. So every leaf is recorded here, and the restore target is built from this
record alone.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from qjax import numerics, packing
from qjax.errors import CheckpointError, ConfigError, DataError
from qjax.qarray import InputSpec, QArray, is_qarray, validate

FILE = "qjax.json"
VERSION = 1

# (dtype in memory, bits if they are fewer than the dtype has) -> how numbers are packed on disk.
_PACKED = {
    (fmt.dtype.name, fmt.bits if fmt.dtype == jnp.int8 else None): fmt
    for fmt in numerics.FORMATS.values()
    if fmt.bits < 8
}
# Data fields of a QArray, in the order in which they are written.
_PARTS = ("values", "scale", "zero_point", "global_scale")
_INPUT_PARTS = ("scale", "pre_scale", "perm")
# Static fields of an InputSpec; the first two are in every checkpoint.
_INPUT_FIELDS = ("format", "granularity", "group_size", "scale_dtype", "scale_rule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of qjax.json.

    Attributes:
      leaves: dotted name -> record of the leaf, see `record_leaf`.
      model: {'model_type', 'config'}, or None for a bare tree.
      quantization: QuantConfig.to_dict(), or None.
      files: path in the checkpoint -> {'bytes', 'sha256'}, for all files that hold arrays.
      qjax_version: of the writer.
    """

    leaves: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    model: dict[str, Any] | None
    quantization: dict[str, Any] | None
    qjax_version: str

    def to_json(self) -> str:
        head = {"format": "qjax", "format_version": VERSION}
        return json.dumps(head | dataclasses.asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check `path`/qjax.json.

        Raises:
          CheckpointError: missing, not ours, damaged, or of a newer version.
        """
        file = path / FILE
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
        if not file.is_file():
            raise CheckpointError(
                f"{path} has neither {FILE} (a qjax checkpoint) nor config.json (Hugging Face's)"
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # also of numbers with too many digits
            raise CheckpointError(f"{file} is damaged, not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != "qjax":
            raise CheckpointError(f'{file} was not written by qjax: it lacks "format": "qjax"')
        version = data.get("format_version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise CheckpointError(
                f"{file} has format_version {version!r}; this qjax reads 1 to {VERSION}: upgrade "
                f"qjax (the checkpoint was written by qjax {data.get('qjax_version')!r})"
            )
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in fields if name not in data]
        tables = [name for name in ("leaves", "files") if not isinstance(data.get(name), dict)]
        if missing or tables:
            raise CheckpointError(f"{file} is damaged: it lacks {', '.join(missing or tables)}")
        return cls(**{name: data[name] for name in fields})


def record_files(root: Path, folder: str) -> dict[str, dict[str, Any]]:
    """Size and digest of each file under `root`/`folder`, by its path in `root`."""
    return {
        file.relative_to(root).as_posix(): {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted((root / folder).rglob("*"))
        if file.is_file()
    }


def verify_files(root: Path, folder: str, files: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError naming the first file under `root`/`folder` that is missing, truncated,
    changed, or not in `files`."""
    extra = {f.relative_to(root).as_posix() for f in (root / folder).rglob("*") if f.is_file()}
    extra -= files.keys()
    if extra:
        raise CheckpointError(
            f"{root} has files that are not in {FILE}: {', '.join(sorted(extra))}"
        )
    for name, record in files.items():
        file = root / name
        if not file.resolve().is_relative_to((root / folder).resolve()):
            raise CheckpointError(f"{FILE} names {name!r}, which is not under {folder}/")
        if not file.is_file():
            raise CheckpointError(f"{root} is truncated: its file {name} is missing")
        try:
            if file.stat().st_size != record["bytes"]:
                raise CheckpointError(
                    f"{file} is truncated or damaged: it has {file.stat().st_size} bytes, "
                    f"{FILE} says {record['bytes']}; copy it again"
                )
            if _digest(file) != record["sha256"]:
                raise CheckpointError(
                    f"{file} is damaged: its SHA-256 is not the one in {FILE}; copy it again"
                )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{FILE} is damaged at file {name}: {error!r}") from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record_leaf(leaf: Any) -> dict[str, Any]:
    """What qjax.json says of a leaf: shapes and dtypes on disk, and all static fields."""
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        impl = str(jax.random.key_impl(leaf))
        return {"kind": "prng_key", "impl": impl, "parts": {"": _record_array(data)}}
    if not is_qarray(leaf):
        return {"kind": "array", "parts": {"": _record_array(leaf)}}
    parts = {name: array for name, array in split_qarray(leaf).items()}
    spec = leaf.input
    return {
        "kind": "qarray",
        "format": leaf.format,
        "block": list(leaf.block),
        "dtype": leaf.dtype,
        "axis": leaf.axis,
        "layout": leaf.layout,
        "input": None if spec is None else {name: getattr(spec, name) for name in _INPUT_FIELDS},
        "parts": {name: _record_array(array, _bits(leaf, name)) for name, array in parts.items()},
    }


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys (a model with dropout has some)."""
    return not is_qarray(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def split_qarray(q: QArray) -> dict[str, Any]:
    """The arrays of a QArray by part name, as they are in memory; absent parts are left out."""
    parts = {name: getattr(q, name) for name in _PARTS}
    if q.input is not None:
        parts |= {f"input.{name}": getattr(q.input, name) for name in _INPUT_PARTS}
    return {name: array for name, array in parts.items() if array is not None}


def join_qarray(name: str, record: dict[str, Any], parts: dict[str, Any]) -> QArray:
    """Inverse of `split_qarray`, with the static fields of `record`; validated."""
    try:
        if record["kind"] != "qarray" or record["layout"] != "canonical":
            raise CheckpointError(
                f"{FILE}: leaf {name} has kind {record['kind']!r} and layout {record['layout']!r}; "
                "this qjax reads 'array', 'prng_key', and 'qarray' in layout 'canonical'"
            )
        if not jnp.issubdtype(jnp.dtype(record["dtype"]), jnp.floating):
            raise TypeError(f"dtype {record['dtype']!r} is not floating point")
        if len(record["block"]) != 2 or not all(type(n) is int for n in record["block"]):
            raise TypeError(f"block {record['block']!r} is not two integers")
        spec = record["input"]
        if spec is not None:
            fields: dict[str, Any] = {name: spec[name] for name in _INPUT_FIELDS[:2]}
            fields |= {name: spec[name] for name in _INPUT_FIELDS[2:] if name in spec}
            fields |= {p: parts.get(f"input.{p}") for p in _INPUT_PARTS}
            spec = InputSpec(**fields)
        q = QArray(
            **{p: parts.get(p) for p in _PARTS},
            input=spec,
            format=record["format"],
            block=tuple(record["block"]),
            dtype=record["dtype"],
            axis=record["axis"],
            layout=record["layout"],
        )
        validate(q, name)
    except (KeyError, TypeError, AttributeError, ConfigError, DataError) as error:
        raise CheckpointError(f"{FILE} is damaged at leaf {name}: {error}") from error
    return q


def _bits(q: QArray, part: str) -> int | None:
    """Bits of the numbers of a part, if they are fewer than its dtype has; None: they are not."""
    packed = _PACKED.get((q.values.dtype.name, numerics.get_format(q.format).bits))
    return packed.bits if packed is not None and part in ("values", "zero_point") else None


def _record_array(array: Any, bits: int | None = None) -> dict[str, Any]:
    record = {"dtype": jnp.dtype(array.dtype).name, "shape": list(array.shape)}
    return record if bits is None else record | {"bits": bits}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of a checkpoint.

    Attributes:
      memory: the array as it is in memory.
      packed: the format whose bits it is packed by on disk; None: it lies there as it is.
    """

    memory: jax.ShapeDtypeStruct
    packed: numerics.Format | None

    @property
    def disk(self) -> jax.ShapeDtypeStruct:
        """The array as it lies on disk: packed in uint8, or as it is."""
        if self.packed is None:
            return self.memory
        shape = packing.packed_shape(self.memory.shape, self.packed.bits)
        return jax.ShapeDtypeStruct(shape, np.dtype(np.uint8))


def stored(name: str, record: dict[str, Any]) -> Stored:
    """The array that a part's record describes."""
    try:
        shape, dtype = record["shape"], jnp.dtype(record["dtype"])
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape!r} is not a list of sizes")
        return Stored(jax.ShapeDtypeStruct(tuple(shape), dtype), _packed(dtype, record.get("bits")))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{FILE} is damaged at array {name}: {error!r}") from error


def _packed(dtype: jnp.dtype, bits: int | None) -> numerics.Format | None:
    if bits is not None and (dtype.name, bits) not in _PACKED:
        raise ValueError(f"{dtype} is not packed in {bits!r} bits")
    return _PACKED.get((dtype.name, bits))
