"""quantize_model: a language model and calibration data in, a quantized language model out."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qjax.assign import assign, misfits
from qjax.blockwise.folder import FolderSink, identity
from qjax.blockwise.memory import MemorySink, MemorySource
from qjax.blockwise.pipeline import Job, run
from qjax.blockwise.report import QuantReport, WeightReport
from qjax.calibrate import calibrate
from qjax.checkpoint.orbax import fill
from qjax.checkpoint.streamed import WorkFolder
from qjax.config import CalibConfig, QuantConfig
from qjax.data import calibration_data
from qjax.errors import ConfigError, DataError
from qjax.lm import LanguageModel, as_recipe
from qjax.models.decoder import Decoder
from qjax.models.registry import abstract_model
from qjax.quantize import check_finite, quantize
from qjax.tree import leaves_by_name


def quantize_model(
    lm: LanguageModel,
    cfg: QuantConfig | str,
    data: Any = None,
    *,
    calib: CalibConfig | None = None,
    strict: bool = True,
    spill: bool = False,
    work: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """A quantized copy of a language model, calibrated on the way if the recipe needs it.

    Recipes with GPTQ, AWQ, SmoothQuant, a search of ranges, a rotation or a quantized cache run
    block by block (`qjax.blockwise`), others weight by weight (`qjax.quantize`).

    Args:
      cfg: a recipe or the name of a preset.
      data: what to calibrate on: batches of token ids [batch, tokens], a list of strings, the name
        of a data set, 'stdlib', or the path of a text file or of a local data set. None: what
        `calib` names, and no data without it.
      calib: how much text; batches that are given are taken as they are.
      strict: a weight whose shape the format cannot take is an error; else it stays as it is, and
        the report says so.
      spill: keep activations in host memory between blocks.
      work: a folder where finished blocks are kept until all are: the same call after an
        interruption goes on behind the last of them. For recipes that run block by block.
      progress: called as progress(done, total) after each weight or block.

    Returns:
      a new model; its `quantization_report` says what was done to each weight.

    Raises:
      ConfigError: the recipe does not fit the model.
      DataError: a model that is quantized already; no data, too little, or not finite.
    """
    recipe = as_recipe(cfg)
    if recipe is None:
        raise DataError("cfg is None; give a qjax.QuantConfig or the name of a preset")
    if not lm.canonical:
        raise DataError("the model is prepared for its kernels; quantize the one it came from")
    if lm.quantization is not None:
        raise DataError(
            f"the model is quantized already, by {lm.quantization.name!r}; start from the original"
        )
    _, state = lm.split()
    skipped: dict[str, str] = {}
    if not strict:
        recipe, skipped = without_misfits(state, recipe)
    check_finite(state)
    batches = []
    if recipe.needs_stats:
        found = calibration_data(data, lm.tokenizer, calib)
        batches = [lm.check_ids(batch) for batch in found]
    if recipe.needs_blocks:
        return _block_by_block(lm, recipe, batches, skipped, spill, work, progress)
    if work is not None:
        raise ConfigError(f"{recipe.name!r} does not run block by block: it takes no work folder")
    started = time.monotonic()
    stats = calibrate(lm.model, batches) if batches else None
    result = lm.with_state(quantize(state, recipe, stats, progress=progress), recipe)
    result.quantization_report = QuantReport(
        weights=tuple(WeightReport(name=name, method="rtn") for name in assign(state, recipe)),
        skipped=skipped,
        tokens=sum(batch.size for batch in batches),
        seconds=time.monotonic() - started,
    )
    return result


def without_misfits(state: Any, recipe: QuantConfig) -> tuple[QuantConfig, dict[str, str]]:
    """The recipe with weights that do not fit their formats ignored, and why each is."""
    skipped = misfits(state, recipe)
    names = [f"^{re.escape(name)}$" for name in skipped]
    return dataclasses.replace(recipe, ignore=(*recipe.ignore, *names)), skipped


def _block_by_block(
    lm: LanguageModel,
    recipe: QuantConfig,
    batches: Sequence[Any],
    skipped: dict[str, str],
    spill: bool,
    work: str | os.PathLike[str] | None,
    progress: Callable[[int, int], None] | None,
) -> LanguageModel:
    if not isinstance(lm.model, Decoder):
        raise DataError(
            f"{recipe.name!r} runs block by block, which takes qjax's decoders, not "
            f"{type(lm.model).__name__}"
        )
    source = MemorySource(leaves_by_name(lm.split()[1]))
    job = Job(config=lm.model.decoder_config, recipe=recipe, batches=batches, spill=spill)
    dtype = jnp.dtype(lm.model.embed_tokens.embedding.get_value().dtype)
    sink: MemorySink | FolderSink = MemorySink()
    if work is not None:
        folder = WorkFolder(work, identity(job, lm.model_type, lm.config, dtype.name))
        sink = FolderSink(folder, keep=True)
    report = run(job, source, sink, progress)
    if isinstance(sink, FolderSink):
        sink.work.remove()
    graphdef, abstract = abstract_model(lm.model_type, lm.config, dtype, recipe)
    result = LanguageModel(
        nnx.merge(graphdef, fill(abstract, sink.leaves, "the quantized model")),
        lm.config,
        model_type=lm.model_type,
        tokenizer=lm.tokenizer,
        quantization=recipe,
    )
    result.quantization_report = dataclasses.replace(report, skipped=skipped)
    return result
