"""Saving and restoring any tree of arrays and QArrays: an Orbax directory beside qjax.json."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qjax import packing
from qjax._version import __version__
from qjax.checkpoint import format as fmt
from qjax.config import QuantConfig
from qjax.errors import CheckpointError
from qjax.numerics import Format
from qjax.qarray import is_qarray
from qjax.tree import is_array, leaves_by_name, map_named

ARRAYS = "arrays"

ShardingFor = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


def save(
    path: str | os.PathLike[str],
    params: Any,
    *,
    config: QuantConfig | None = None,
    model: dict[str, Any] | None = None,
    overwrite: bool = False,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a tree of arrays and QArrays to the directory `path`.

    Atomic: everything is written to a hidden sibling directory, which takes the name `path` only
    when it is complete, so an interrupted save leaves nothing that loads.

    Args:
      path: must not exist, unless `overwrite` and it is a qjax checkpoint.
      params: any pytree; numbers of fewer than 8 bits take their bits on disk.
      config: the recipe, recorded in qjax.json.
      model: {'model_type', 'config'}, recorded in qjax.json.
      extra: called with the unfinished directory, to add files (a tokenizer).

    Raises:
      CheckpointError: `path` exists, or is something else than a checkpoint.
    """
    path = Path(path).resolve()  # through links: what they point at is replaced, not they
    leaves = leaves_by_name(params)
    if not leaves:
        raise CheckpointError(f"nothing to save to {path}: the tree has no leaves")
    for name, leaf in leaves.items():
        if not is_array(leaf):
            raise CheckpointError(
                f"leaf {name} is {leaf!r} ({type(leaf).__name__}), not an array; wrap it with "
                "jnp.asarray or keep it out of the tree"
            )
    with replacing(path, overwrite) as unfinished:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished / ARRAYS, _to_disk(leaves))
        # Orbax notes the path it wrote to, which is not the final one and nobody's business.
        (unfinished / ARRAYS / "commit_success.txt").unlink(missing_ok=True)
        if extra is not None:
            extra(unfinished)
        manifest = fmt.Manifest(
            leaves={name: fmt.record_leaf(leaf) for name, leaf in leaves.items()},
            files=fmt.record_files(unfinished, ARRAYS),
            model=model,
            quantization=None if config is None else config.to_dict(),
            qjax_version=__version__,
        )
        (unfinished / fmt.FILE).write_text(manifest.to_json(), encoding="utf-8")


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh directory that becomes `path` if the block ends well, and is removed if not."""
    old = None
    if path.exists():
        ours = path.is_dir() and ((path / fmt.FILE).is_file() or not any(path.iterdir()))
        if not overwrite or not ours:
            why = "pass overwrite=True" if ours else "it is no qjax checkpoint: choose another path"
            raise CheckpointError(f"{path} exists already; {why}")
        old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished-{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        yield unfinished
        if old is not None:
            path.rename(old)
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if old is not None and old.exists() and not path.exists():
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old)


def restore(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    sharding: ShardingFor | jax.sharding.Sharding | None = None,
) -> Any:
    """Read what `save` wrote, bit for bit.

    Args:
      path: a checkpoint directory.
      like: a pytree with the names of the saved one (NNX state, dict; concrete or abstract,
        quantized or not): the result has its structure. Only names and logical shapes of `like`
        matter; dtypes and formats are those on disk. None: a flat dict, dotted name -> leaf.
      sharding: where arrays go, straight from disk: one sharding for all, or a function of
        (name of the array, its ShapeDtypeStruct in memory), names as in
        'mlp.up_proj.weight.values'. Numbers of fewer than 8 bits are packed along their last axis
        on disk: each shard must get whole bytes. None: the default device.

    Returns:
      the leaves, arrays and QArrays.

    Raises:
      CheckpointError: missing, foreign, truncated or newer; or its names are not those of `like`.
    """
    reader = OrbaxReader(path)
    leaves = reader.leaves(list(reader.manifest.leaves), _sharding_function(sharding))
    return leaves if like is None else fill(like, leaves, str(reader.path))


class OrbaxReader:
    """A checkpoint that is read a few leaves at a time.

    Attributes:
      path: of its directory.
      manifest: the contents of its qjax.json.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Check all that can be checked before the arrays are read.

        Raises:
          CheckpointError: missing, foreign, truncated or newer.
        """
        self.path = Path(path).absolute()
        self.manifest = fmt.Manifest.read(self.path)
        # Before Orbax sees a byte: it reports damage late, and not for every kind of it.
        fmt.verify_files(self.path, ARRAYS, self.manifest.files)
        self._stored = _expected(self.manifest)
        self._folders = _folders(self.manifest)
        for folder, names in _by_folder(self._folders, list(self._stored)).items():
            on_disk = {name: self._stored[name].disk for name in names}
            with self._reading(), ocp.PyTreeCheckpointer() as checkpointer:
                found = checkpointer.metadata(self.path / folder).item_metadata.tree
                _compare(self.path, on_disk, found)

    def abstract(self) -> dict[str, Any]:
        """Name -> leaf, with shapes in the place of arrays."""
        names = list(self.manifest.leaves)
        arrays = {name: stored.memory for name, stored in self._stored.items()}
        return jax.eval_shape(lambda arrays: self._joined(names, arrays), arrays)

    def read(self, names: Sequence[str], device: jax.Device) -> Iterator[tuple[str, Any]]:
        """(name, leaf) of each of `names`, on the device."""
        sharding = jax.sharding.SingleDeviceSharding(device)
        yield from self.leaves(names, lambda name, spec: sharding).items()

    def leaves(self, names: Sequence[str], sharding_for: ShardingFor) -> dict[str, Any]:
        """Name -> leaf, arrays where `sharding_for` puts them."""
        return self._joined(names, self._read(self._array_names(names), sharding_for))

    def _joined(self, names: Sequence[str], arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _join(name, self.manifest.leaves[name], arrays) for name in names}

    def _array_names(self, names: Sequence[str]) -> list[str]:
        parts = ((name, self.manifest.leaves[name]["parts"]) for name in names)
        return [array for name, part in parts for array in _array_names(name, part).values()]

    def _read(self, names: Sequence[str], sharding_for: ShardingFor) -> dict[str, jax.Array]:
        """The arrays called so, as they are in memory."""
        target = {
            name: _placed(name, stored.disk, sharding_for(name, stored.memory))
            for name in names
            for stored in [self._stored[name]]
        }
        arrays: dict[str, jax.Array] = {}
        for folder, inside in _by_folder(self._folders, names).items():
            part = {name: target[name] for name in inside}
            how = ocp.args.PyTreeRestore(
                item=part,
                restore_args=ocp.checkpoint_utils.construct_restore_args(part),
                partial_restore=True,
            )
            with self._reading(), ocp.PyTreeCheckpointer() as checkpointer:
                arrays |= checkpointer.restore(self.path / folder, args=how)
        return {name: _unpacked(array, self._stored[name]) for name, array in arrays.items()}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: its arrays cannot be read: {str(error)[:300]}"
            ) from error


def fill(like: Any, leaves: Mapping[str, Any], source: str) -> Any:
    """The tree `like` with its leaves replaced by those of the same name.

    Raises:
      CheckpointError: if names or logical shapes differ, listing some.
    """
    wanted = leaves_by_name(like)
    problems = [f"lacks {name}" for name in wanted if name not in leaves]
    problems += [f"has {name}, which the model lacks" for name in leaves if name not in wanted]
    problems += [
        f"has {name} of shape {tuple(leaves[name].shape)}, the model {tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in leaves and tuple(leaves[name].shape) != tuple(leaf.shape)
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{source} does not fit the model: it " + "; it ".join(problems[:4]) + more
        )
    return map_named(lambda name, _: leaves[name], like)


def _array_names(name: str, leaf_parts: Any) -> dict[str, str]:
    """Part name -> name of the array on disk."""
    return {part: f"{name}.{part}" if part else name for part in leaf_parts}


def _to_disk(leaves: dict[str, Any]) -> dict[str, Any]:
    arrays = {}
    for name, leaf in leaves.items():
        if fmt.is_key(leaf):
            leaf = jax.random.key_data(leaf)
        parts = fmt.split_qarray(leaf) if is_qarray(leaf) else {"": leaf}
        records = fmt.record_leaf(leaf)["parts"]
        names = _array_names(name, parts)
        for part, array in parts.items():
            packed = fmt.stored(names[part], records[part]).packed
            arrays[names[part]] = array if packed is None else packing.pack(array, packed)
    return arrays


def _expected(manifest: fmt.Manifest) -> dict[str, fmt.Stored]:
    """Array name -> what it is in memory and on disk, from qjax.json."""
    expected = {}
    for name, record in manifest.leaves.items():
        parts = record.get("parts") if isinstance(record, dict) else None
        if not isinstance(parts, dict):
            raise CheckpointError(f"{fmt.FILE} is damaged at leaf {name}: it lists no arrays")
        for part, array_name in _array_names(name, parts).items():
            expected[array_name] = fmt.stored(array_name, parts[part])
    return expected


def _folders(manifest: fmt.Manifest) -> dict[str, str]:
    """Array name -> the Orbax directory it lies in: `arrays`, or a folder in it."""
    found: dict[str, str] = {}
    for leaf, record in manifest.leaves.items():
        folder = record.get("folder")
        if folder is not None and (not isinstance(folder, str) or Path(folder).name != folder):
            raise CheckpointError(f"{fmt.FILE} is damaged at leaf {leaf}: folder {folder!r}")
        path = ARRAYS if folder is None else f"{ARRAYS}/{folder}"
        found |= dict.fromkeys(_array_names(leaf, record["parts"]).values(), path)
    return found


def _by_folder(folders: Mapping[str, str], names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(folders[name], []).append(name)
    return groups


def _placed(
    name: str, on_disk: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
    try:
        sharding.shard_shape(on_disk.shape)
    except ValueError as error:
        raise CheckpointError(
            f"{name}, {on_disk.dtype}{on_disk.shape} on disk, cannot be sharded as asked: {error}"
        ) from error
    return jax.ShapeDtypeStruct(on_disk.shape, on_disk.dtype, sharding=sharding)


@partial(jax.jit, static_argnames=("packed", "n", "sharding"))
def _unpack_onto(
    array: jax.Array, packed: Format, n: int, sharding: jax.sharding.Sharding
) -> jax.Array:
    return jax.lax.with_sharding_constraint(packing.unpack(array, packed, n), sharding)


def _unpacked(array: jax.Array, stored: fmt.Stored) -> jax.Array:
    """From disk -> as in memory with the same sharding: shards keep their parts."""
    if stored.packed is None:
        return array
    return _unpack_onto(array, stored.packed, stored.memory.shape[-1], array.sharding)


def _compare(path: Path, expected: dict[str, jax.ShapeDtypeStruct], found: Any) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in {fmt.FILE}" for name in found if name not in expected]
    for name, spec in expected.items():
        if name in found:
            have = (tuple(found[name].shape), np.dtype(found[name].dtype))
            if have != (spec.shape, np.dtype(spec.dtype)):
                problems.append(f"{name} is {have}, {fmt.FILE} says {(spec.shape, spec.dtype)}")
    if problems:
        raise CheckpointError(
            f"{path} does not hold what its {fmt.FILE} says: {'; '.join(problems[:4])}"
        )


def _join(name: str, record: dict[str, Any], arrays: Mapping[str, Any]) -> Any:
    names = _array_names(name, record["parts"])
    if record.get("kind") in ("array", "prng_key") and list(record["parts"]) != [""]:
        raise CheckpointError(f"{fmt.FILE} is damaged at leaf {name}: it must have one array")
    if record.get("kind") == "array":
        return arrays[name]
    if record.get("kind") == "prng_key":
        return _wrap_key(name, record, arrays[name])
    return fmt.join_qarray(name, record, {part: arrays[at] for part, at in names.items()})


def _wrap_key(name: str, record: dict[str, Any], data: jax.Array) -> jax.Array:
    try:
        return jax.random.wrap_key_data(data, impl=record["impl"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{fmt.FILE} is damaged at PRNG key {name}: {error}") from error


def _sharding_function(sharding: ShardingFor | jax.sharding.Sharding | None) -> ShardingFor:
    if callable(sharding):
        return sharding
    one = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return lambda name, spec: one
