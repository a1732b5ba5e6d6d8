"""qjax info: versions, devices, recipes, kernels, and what a checkpoint holds."""

import argparse
from collections import Counter
from typing import Any

from qjax._version import __version__
from qjax.cli.common import REFERENCE, add_model, load_model, print_json, print_table
from qjax.presets import ALIASES, PRESETS

HELP = "show versions, devices, recipes, kernels, and what a checkpoint holds"
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
    rows = [
        (name, settings["weight"], settings.get("act") or "-", ", ".join(settings["aliases"]))
        for name, settings in data["presets"].items()
    ]
    print_table(("preset", "weights", "activations", "also called"), rows)
    print_table(
        ("kernel op", "implementations"),
        [(op, ", ".join(names)) for op, names in data["kernels"].items()],
    )
    if "model" in data:
        model = data["model"]
        print(f"{model['path']}: {model['model_type']}, {model['parameters']:,} parameters")
        kinds = [(kind, f"{count}") for kind, count in model["leaves"].items()]
        print_table(("leaf", "count"), kinds)
        print(f"{model['bytes']:,} bytes, {model['bits_per_weight']:.3f} bits a weight")


def _environment() -> dict[str, Any]:
    import jax

    from qjax.ops import KERNELS

    presets = {
        name: settings | {"aliases": [a for a, target in ALIASES.items() if target == name]}
        for name, settings in PRESETS.items()
    }
    return {
        "qjax": __version__,
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
        "presets": presets,
        "kernels": {op: list(names) for op, names in KERNELS.items()},
    }


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
