"""qjax info: versions, devices, recipes, kernels and their tuning, what a checkpoint holds."""

import argparse
from collections import Counter
from typing import Any

from qjax import compile_cache
from qjax._version import __version__
from qjax.cli.common import REFERENCE, add_model, load_model, print_json, print_table
from qjax.errors import ConfigError
from qjax.presets import ALIASES, PRESETS, preset

HELP = "show versions, devices, recipes, which kernels run here, and what a checkpoint holds"
EXAMPLES = """examples:
  qjax info
  qjax info --model my-int4 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Collect and print."""
    data = _environment()
    if args.model != REFERENCE or REFERENCE.is_dir():
        data["model"] = _model(args)
    if args.json:
        print_json(data)
        return
    print(f"qjax {data['qjax']}, jax {data['jax']}, devices: {', '.join(data['devices'])}")
    kept = data["compilation_cache"]
    if kept["path"] is None:
        print(f"compiled programs are not kept: {kept['reason']}")
    else:
        print(
            f"compiled programs: {kept['path']} ({kept['reason']}), {kept['programs']} of "
            f"{kept['bytes'] / 2**20:.1f} MiB"
        )
    rows = [
        (name, settings["weight"], settings.get("act") or "-", ", ".join(settings["aliases"]))
        for name, settings in data["presets"].items()
    ]
    print_table(("preset", "weights", "activations", "also called"), rows)
    for name, settings in data["presets"].items():
        if settings["note"]:
            print(f"{name}: {settings['note']}")
    _print_kernels(data)
    if "model" in data:
        model = data["model"]
        print(f"{model['path']}: {model['model_type']}, {model['parameters']:,} parameters")
        kinds = [(kind, f"{count}") for kind, count in model["leaves"].items()]
        print_table(("leaf", "count"), kinds)
        print(f"{model['bytes']:,} bytes, {model['bits_per_weight']:.3f} bits a weight")


def _environment() -> dict[str, Any]:
    import jax

    presets = {
        name: settings
        | {"aliases": [a for a, target in ALIASES.items() if target == name], "note": _note(name)}
        for name, settings in PRESETS.items()
    }
    return {
        "qjax": __version__,
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
        "compilation_cache": _compilation_cache(),
        "presets": presets,
        "kernels": _kernels(),
        "tuned": _tuned(),
    }


def _note(name: str) -> str:
    """What a preset's products do besides, or why no kernel reads its weights; '' for neither."""
    import jax
    import jax.numpy as jnp

    from qjax.algorithms.rtn import rtn
    from qjax.runtime.dense import by_groups, refusal
    from qjax.runtime.weights import Projection

    size = 512  # whole groups of every size
    weight = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    amax = jax.ShapeDtypeStruct((size,), jnp.float32)
    rule = preset(name).rules[0]
    q = jax.eval_shape(lambda w, amax: rtn(w, rule, -1, amax), weight, amax)
    return refusal(Projection(weight=q)) or by_groups(q) or ""


def _compilation_cache() -> dict[str, Any]:
    """Where compiled programs are kept, and what is there."""
    found = compile_cache.status()
    files = () if found.path is None else found.path.glob("*-cache")
    sizes = [file.stat().st_size for file in files]
    return {
        "path": None if found.path is None else str(found.path),
        "reason": found.reason,
        "programs": len(sizes),
        "bytes": sum(sizes),
    }


def _kernels() -> dict[str, Any]:
    """Op -> its implementations, best first: whether each runs here, and a note on it."""
    from qjax_kernels.support import support

    return {
        found.op: {
            "runs": list(found.runs),
            "notes": dict(found.notes),
            "skipped": list(found.skipped),
        }
        for found in support()
    }


def _tuned() -> dict[str, Any] | None:
    """The tuned table in use."""
    from qjax_kernels.target import target
    from qjax_kernels.tuned.lookup import table_of
    from qjax_kernels.tuned.schema import TableError

    try:
        found = table_of(target())
    except TableError as error:
        raise ConfigError(f"{error}; correct or delete the file, or see qjax tune") from error
    if found is None:
        return None
    table = found.table
    return {
        "file": str(found.path),
        "device": table.device,
        "stands_in": found.stands_in,
        "date": table.date,
        "commit": table.commit,
        "versions": dict(table.versions),
        "entries": len(table.entries),
    }


def _print_kernels(data: dict[str, Any]) -> None:
    kernels = data["kernels"]
    rows = [(op, ", ".join(found["runs"])) for op, found in kernels.items()]
    print_table(("kernel op", "runs here, best first"), rows)
    # Each sentence once, with the ops it is of: (implementation, what is said) -> ops.
    said: dict[tuple[str, str], list[str]] = {}
    for op, found in kernels.items():
        notes = {(name, note) for name, note in found["notes"].items() if note}
        skipped = [reason.partition(": ")[::2] for reason in found["skipped"]]
        # Skipped although it runs, such as where the tuned table has another one faster.
        notes |= {(name, f"skipped: {why}") for name, why in skipped if name in found["runs"]}
        for pair in sorted(notes):
            said.setdefault(pair, []).append(op)
    for (name, note), ops in said.items():
        print(f"{name}: {note} ({', '.join(ops)})")
    tuned = data["tuned"]
    if tuned is None:
        print("no tuned table for this device: kernels take the first guess of a cost model")
        return
    stands_in = ", which stands in for this device's" if tuned["stands_in"] else ""
    print(
        f"tuned table: {tuned['device']}{stands_in}, {tuned['date']}, commit {tuned['commit']}, "
        f"{tuned['entries']} entries: {tuned['file']}"
    )


def _model(args: argparse.Namespace) -> dict[str, Any]:
    from qjax.qarray import bits_of, is_qarray
    from qjax.tree import named_leaves

    lm = load_model(args)
    leaves = [leaf for _, leaf in named_leaves(lm.split()[1])]
    kinds = Counter(leaf.format if is_qarray(leaf) else leaf.dtype.name for leaf in leaves)
    size = sum(leaf.size for leaf in leaves)
    return {
        "path": str(args.model),
        "model_type": lm.model_type,
        "config": lm.config.to_dict(),
        "quantization": None if lm.quantization is None else lm.quantization.to_dict(),
        "parameters": size,
        "leaves": dict(kinds),
        "bytes": bits_of(leaves) // 8,
        "bits_per_weight": bits_of(leaves) / size,
    }
