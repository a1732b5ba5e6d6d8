"""quantize_checkpoint: a directory in, a quantized checkpoint out, and never the whole model."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qjax.blockwise.folder import FolderSink, identity
from qjax.blockwise.pipeline import Job, ModelSource, run
from qjax.blockwise.report import QuantReport
from qjax.checkpoint.format import FILE
from qjax.checkpoint.hf_reader import HuggingFaceReader
from qjax.checkpoint.own_reader import OwnReader
from qjax.checkpoint.streamed import WorkFolder
from qjax.config import CalibConfig, QuantConfig
from qjax.data import calibration_data, check_ids
from qjax.errors import CheckpointError, DataError
from qjax.lm import as_dtype, as_recipe, load_tokenizer
from qjax.quantize_model import without_misfits


def quantize_checkpoint(
    path: str | os.PathLike[str] | ModelSource,
    out: str | os.PathLike[str],
    cfg: QuantConfig | str,
    data: Any = None,
    *,
    calib: CalibConfig | None = None,
    dtype: Any = None,
    work: str | os.PathLike[str] | None = None,
    strict: bool = True,
    spill: bool = False,
    overwrite: bool = False,
    hf_overrides: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantReport:
    """Quantize a checkpoint that need not fit into memory, block by block.

    Weights come from their files a block at a time and finished blocks go to disk, so that the
    device holds about two blocks and the calibration set's activations, and the host hardly
    anything. The result has the bits that `quantize_model` gives. A run that was interrupted goes
    on behind its last finished block when it is called again with the same arguments.

    Args:
      path: a Hugging Face directory, or a qjax checkpoint that is not quantized; or any other
        source of weights (`qjax.blockwise.pipeline.ModelSource`).
      out: the directory to write; `qjax.load` reads it.
      cfg, data, calib, strict, spill: as in `quantize_model`.
      dtype: of plain weights and of the activations; None: bfloat16, or as a qjax checkpoint has
        it.
      work: where finished blocks are kept until all are; None: a hidden sibling of `out`.
      overwrite: replace a qjax checkpoint at `out`.
      hf_overrides: entries that replace those of a Hugging Face config.json.
      progress: called as progress(done, total) after each block.

    Returns:
      what was done to each weight.

    Raises:
      CheckpointError: `path` cannot be read, `out` exists, or the work folder is of another run.
      ConfigError, DataError: as `quantize_model`.
    """
    out = Path(out).resolve()
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; pass overwrite=True or choose another path")
    source = open_source(path, None if dtype is None else as_dtype(dtype), hf_overrides)
    recipe = as_recipe(cfg)
    if recipe is None:
        raise DataError("cfg is None; give a qjax.QuantConfig or the name of a preset")
    skipped: dict[str, str] = {}
    if not strict:
        recipe, skipped = without_misfits(source.abstract(), recipe)
    tokenizer = None if isinstance(path, ModelSource) else load_tokenizer(Path(path))
    batches: list[Any] = []
    if recipe.needs_stats:
        found = calibration_data(data, tokenizer, calib)
        batches = [check_ids(batch, source.config) for batch in found]
    job = Job(config=source.config.decoder(), recipe=recipe, batches=batches, spill=spill)
    who = identity(job, source.model_type, source.config, source.dtype.name)
    folder = WorkFolder(out.with_name(f".{out.name}.work") if work is None else work, who)
    sink = FolderSink(folder)
    report = run(job, source, sink, progress)

    def add_tokenizer(directory: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    folder.finish(
        out,
        sink.blocks,
        config=recipe,
        model={"model_type": source.model_type, "config": source.config.to_dict()},
        overwrite=overwrite,
        extra=add_tokenizer,
    )
    return dataclasses.replace(report, skipped=skipped)


def open_source(path: Any, dtype: Any, overrides: dict[str, Any] | None) -> ModelSource:
    """The reader of a directory; what is no path is one already."""
    if not isinstance(path, str | os.PathLike):
        return path
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
    if (path / FILE).is_file():
        if overrides:
            raise CheckpointError(
                f"hf_overrides need a Hugging Face directory; {path} is qjax's own"
            )
        return OwnReader(path, dtype)
    return HuggingFaceReader(path, dtype, overrides)
