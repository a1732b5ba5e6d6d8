"""One model in many formats: quality, size and speed side by side."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.config import CalibConfig, QuantConfig
from qjax.data import STDLIB_CALIBRATION, calibration_data
from qjax.errors import CheckpointError, ConfigError, DataError
from qjax.evaluate.layers import model_errors
from qjax.evaluate.perplexity import Perplexity, evaluate_perplexity
from qjax.lm import LanguageModel, load
from qjax.presets import preset
from qjax.qarray import QArray, bits_of
from qjax.quantize import check_finite
from qjax.quantize_model import quantize_model
from qjax.text import held_out, token_windows
from qjax.tree import named_leaves

Progress = Callable[[str, int, int], None]
PROMPT = 'def read_config(path, encoding="utf-8"):\n    """'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One format of the comparison.

    Attributes:
      preset: name of the recipe; the dtype for the baseline.
      perplexity, perplexity_ci: on held-out text, with its 95 % bootstrap interval.
      change, change_ci: relative change of perplexity against the baseline, with its 95 % paired
        bootstrap interval; 0 for the baseline.
      bits_per_byte: the loss in bits a byte of text.
      bits_per_weight: of the quantized matrices, scales counted (baseline: of the same matrices).
      model_bits_per_weight: of the whole model, embeddings and norms included.
      bytes_on_disk: of the saved checkpoint, all files.
      prefill_tokens_per_s, decode_tokens_per_s: of the sample, on this machine.
      sample: greedy continuation of the prompt.
      layer_errors: name -> relative error of each quantized weight or its outputs, see
        `qjax.evaluate.layers.model_errors`.
    """

    preset: str
    perplexity: float
    perplexity_ci: tuple[float, float]
    change: float
    change_ci: tuple[float, float]
    bits_per_byte: float | None
    bits_per_weight: float
    model_bits_per_weight: float
    bytes_on_disk: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    sample: str
    layer_errors: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows and what they were measured on.

    Attributes:
      baseline: the model as loaded.
      rows: one for each preset, in the order asked for.
      setup: text provenance (Python version, SHA-256), windows, device, prompt.
    """

    baseline: Row
    rows: tuple[Row, ...]
    setup: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """{'baseline': {...}, 'rows': [...], 'setup': {...}}, JSON-ready."""
        return dataclasses.asdict(self)


def compare(
    lm: LanguageModel,
    presets: Sequence[str | QuantConfig],
    *,
    sequences: int = 64,
    seq_len: int = 512,
    calib: CalibConfig | None = None,
    sample_tokens: int = 48,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Quantize, save, restore, evaluate and sample a model in each of several formats.

    Each format is evaluated as restored from disk, and the restored tree must equal the saved one
    bit for bit.

    Args:
      lm: the original model, with a tokenizer.
      presets: names or recipes.
      sequences, seq_len: held-out windows to evaluate on.
      calib: calibration text, for recipes that need it; None: STDLIB_CALIBRATION.
      sample_tokens: length of the sample.
      directory: where to leave the checkpoints, one a preset; None: they are not kept.
      progress: called as progress(stage, done, total).

    Raises:
      DataError: no tokenizer, a model that is quantized already, a window that does not fit.
      ConfigError: an unknown preset, or one that does not fit the model.
    """
    tokenizer = lm.require_tokenizer("comparing formats")
    if lm.quantization is not None:
        raise DataError(f"the model is quantized already, by {lm.quantization.name!r}")
    recipes = [preset(p) if isinstance(p, str) else p for p in presets]
    base_name = jax.tree.leaves(lm.split()[1])[0].dtype.name
    names = [base_name, *(recipe.name for recipe in recipes)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{name!r} is asked for more than once; give recipes names of their own"
            )
    check_finite(lm.split()[1])
    calib = calib or STDLIB_CALIBRATION
    text = held_out()
    windows = token_windows(text, tokenizer, count=sequences, seq_len=seq_len)
    batches = []
    if any(recipe.needs_stats for recipe in recipes):
        batches = calibration_data(None, tokenizer, calib)
    with tempfile.TemporaryDirectory() as temporary:
        root = directory or Path(temporary)
        base = _Measured(lm, base_name, windows, root, sample_tokens, progress)
        rows = []
        for recipe in recipes:
            stage = _stage(progress, f"quantize {recipe.name}")
            quantized = quantize_model(lm, recipe, batches, progress=stage)
            measured = _Measured(quantized, recipe.name, windows, root, sample_tokens, progress)
            rows.append(measured.row(base.perplexity, model_errors(lm, quantized)))
    return Comparison(
        baseline=base.row(base.perplexity, {}),
        rows=tuple(rows),
        setup={
            "text": text.provenance(),
            "sequences": sequences,
            "seq_len": seq_len,
            "calibration": dataclasses.asdict(calib) if batches else None,
            "prompt": PROMPT,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
    )


class _Measured:
    """A model saved, restored, and measured as restored."""

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        windows: np.ndarray,
        root: Path,
        sample_tokens: int,
        progress: Progress | None,
    ) -> None:
        path = root / name
        lm.save(path)
        self.name = name
        self.lm = load(path)
        _, self.state = self.lm.split()
        if not trees_equal(self.state, lm.split()[1]):
            raise CheckpointError(f"{path} does not restore to what was saved; the disk is faulty")
        self.bytes_on_disk = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        stage = _stage(progress, f"evaluate {name}")
        self.perplexity = evaluate_perplexity(self.lm, windows, progress=stage)
        self.sample = self.lm.generate(PROMPT, sample_tokens)

    def row(self, base: Perplexity, errors: dict[str, float]) -> Row:
        change, change_ci = self.perplexity.change_from(base)
        leaves = [leaf for _, leaf in named_leaves(self.state)]
        matrices = [leaf for leaf in leaves if isinstance(leaf, QArray)] or [
            leaf for name, leaf in named_leaves(self.state) if name.endswith(".weight")
        ]
        text = self.sample.text
        assert text is not None
        return Row(
            preset=self.name,
            perplexity=self.perplexity.perplexity,
            perplexity_ci=self.perplexity.interval,
            change=change,
            change_ci=change_ci,
            bits_per_byte=self.perplexity.bits_per_byte,
            bits_per_weight=bits_per_weight(matrices),
            model_bits_per_weight=bits_per_weight(leaves),
            bytes_on_disk=self.bytes_on_disk,
            prefill_tokens_per_s=self.sample.stats.prefill_tokens_per_s,
            decode_tokens_per_s=self.sample.stats.decode_tokens_per_s,
            sample=text[0],
            layer_errors=errors,
        )


def bits_per_weight(leaves: Sequence[Any]) -> float:
    """Bits in memory, scales counted, over the number of logical weights of `leaves`."""
    return bits_of(leaves) / sum(leaf.size for leaf in leaves)


@jax.jit
def _equal(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    bits = [_as_bits(x) == _as_bits(y) for x, y in zip(a, b, strict=True)]
    return jax.numpy.stack([part.all() for part in bits]).all()


def _as_bits(x: jax.Array) -> jax.Array:
    if x.dtype in (jax.numpy.int2, jax.numpy.int4):
        return x
    if x.dtype == jax.numpy.float4_e2m1fn:
        return jax.lax.bitcast_convert_type(x, jax.numpy.uint4)
    unsigned = {1: "uint8", 2: "uint16", 4: "uint32"}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned)


def trees_equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure (static fields included) and the same bits."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    if structures[0] != structures[1]:
        return False
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    if any(x.shape != y.shape or x.dtype != y.dtype for x, y in zip(left, right, strict=True)):
        return False
    return bool(_equal(left, right))


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
