"""Block after block: read, quantize, write, and go on with what the block gives.

All inputs of a block's linears are observed in one pass, of the original block on the outputs of
the quantized blocks before it, as llm-compressor and ModelOpt do. (Another pass for each stage
inside a block, so that o_proj sees quantized values, would cost three more forward passes a layer.)
Recipes whose methods do not answer to errors of their inputs (SmoothQuant, static scales) see the
outputs of original blocks, in a single pass.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.assign import Assignment, assign
from qjax.blockwise import rotation
from qjax.blockwise.blocks import LayerSpec, Leaves, embed, leaf_names, specs, stem_names
from qjax.blockwise.layer import Task, pass_through, quantize_block
from qjax.blockwise.report import QuantReport, WeightReport
from qjax.config import QuantConfig
from qjax.errors import ConfigError, DataError
from qjax.methods import makes_up
from qjax.models.decoder import DecoderConfig
from qjax.quantize import check_finite, quantize_leaf

STEM = "stem"  # the block in front of the first layer
HEAD = "head"  # the block behind the last one
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Where original weights come from, some at a time."""

    def abstract(self) -> dict[str, Any]:
        """Dotted name -> ShapeDtypeStruct, of all leaves of the model."""

    def read(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Name -> array on the device."""


@runtime_checkable
class ModelSource(Source, Protocol):
    """A Source that knows its model.

    Attributes:
      model_type: Hugging Face's name of the architecture.
      config: of the model.
      dtype: of its weights.
    """

    model_type: str
    config: Any
    dtype: jnp.dtype


class Sink(Protocol):
    """Where finished blocks go."""

    def finished(self, block: str, original: Leaves) -> Leaves | None:
        """The leaves of a block that an earlier run finished; None: it has to be done.

        Raises:
          CheckpointError: it was made from another original, or is damaged.
        """

    def put(
        self, block: str, original: Leaves, leaves: Leaves, reports: Sequence[WeightReport]
    ) -> None:
        """Keep a finished block; leaves have their full names."""

    def reports(self) -> list[WeightReport]:
        """Of all finished blocks, earlier runs' too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to do.

    Attributes:
      config: of the model.
      recipe: how to quantize it.
      batches: int32 [batch, tokens] each, of calibration.
      spill: whether activations wait in host memory between blocks.
    """

    config: DecoderConfig
    recipe: QuantConfig
    batches: Sequence[np.ndarray]
    spill: bool = False


def run(job: Job, source: Source, sink: Sink, progress: Progress | None = None) -> QuantReport:
    """Quantize a decoder block by block.

    Args:
      progress: called as progress(done, total) after each block.

    Raises:
      ConfigError: the recipe does not fit the model.
      DataError: no calibration data, too few tokens, weights or activations that are not finite.
    """
    started = time.monotonic()
    work = _Run(job, source, sink)
    blocks = specs(job.config)
    work.stem()
    for done, (prefix, spec) in enumerate(blocks, 1):
        work.block(prefix, spec)
        if progress is not None:
            progress(done, len(blocks))
    return QuantReport(
        weights=tuple(sink.reports()),
        skipped={},
        tokens=sum(batch.size for batch in job.batches),
        seconds=time.monotonic() - started,
    )


class _Run:
    """One run, and the activations between its blocks."""

    def __init__(self, job: Job, source: Source, sink: Sink) -> None:
        abstract = source.abstract()
        self.job, self.source, self.sink = job, source, sink
        self.names = frozenset(abstract)
        self.rules = {name: how.rule for name, how in assign(abstract, job.recipe).items()}
        if job.recipe.needs_stats and not len(job.batches):
            raise DataError(
                f"{job.recipe.name!r} needs calibration data, and there is none: pass token "
                "batches, texts, a text file, or the name of a data set"
            )
        self.through_quantized = any(makes_up(rule) for rule in self.rules.values())
        self.turn = rotation.plan(job.recipe, job.config)
        self.activations: list[Any] = _Spilled() if job.spill else []

    def stem(self) -> None:
        """What is in front of the layers, and the activations of the first."""
        names = [name for name in stem_names(self.job.config) if name in self.names]
        original = self._read(names)
        leaves = self.sink.finished(STEM, original)
        if leaves is None:
            turned = original if self.turn is None else self.turn.stem(original)
            leaves, reports = self._rounded(turned)
            self.sink.put(STEM, original, leaves, reports)
        run = jax.jit(partial(embed, self.job.config))
        for batch in self.job.batches:
            self.activations.append(run(leaves, jnp.asarray(batch, jnp.int32)))

    def block(self, prefix: str, spec: Any) -> None:
        """One block; the activations become those behind it."""
        names = [f"{prefix}{n}" for n in leaf_names(spec) if f"{prefix}{n}" in self.names]
        original = self._read(names)
        leaves = {name.removeprefix(prefix): leaf for name, leaf in original.items()}
        if self.turn is not None:
            leaves = self.turn.block(spec, leaves)
        task = Task(
            name=prefix.rstrip("."),
            spec=spec,
            leaves=leaves,
            rules={n: self.rules[f"{prefix}{n}"] for n in leaves if f"{prefix}{n}" in self.rules},
            kv=self._kv() if isinstance(spec, LayerSpec) else None,
            through_quantized=self.through_quantized,
            last=not isinstance(spec, LayerSpec),
        )
        block = task.name or HEAD
        done = self.sink.finished(block, original)
        if done is not None:
            mine = {name.removeprefix(prefix): leaf for name, leaf in done.items()}
            pass_through(task, mine, self.activations)
            return
        new, reports = quantize_block(task, self.activations)
        self.sink.put(block, original, {f"{prefix}{n}": v for n, v in new.items()}, reports)

    def _read(self, names: Sequence[str]) -> dict[str, jax.Array]:
        leaves = self.source.read(names)
        check_finite(leaves)
        return leaves

    def _kv(self) -> tuple[str, bool] | None:
        recipe = self.job.recipe
        return None if recipe.kv is None else (recipe.kv, recipe.kv_granularity == "per_head")

    def _rounded(self, leaves: Leaves) -> tuple[dict[str, Any], list[WeightReport]]:
        """The stem's leaves, rounded to nearest by their rules."""
        new, reports = dict(leaves), []
        for name, leaf in leaves.items():
            if name not in self.rules:
                continue
            if self.rules[name].needs_stats:
                raise ConfigError(
                    f"{name} is not calibrated: give it a rule of its own with method 'rtn' and "
                    "act_scale 'dynamic'"
                )
            how = Assignment(rule=self.rules[name], axis=-1)
            new[name] = quantize_leaf(leaf, how, None)
            reports.append(WeightReport(name=name, method="rtn"))
        return new, reports


class _Spilled(list[Any]):
    """Arrays that wait in host memory."""

    def append(self, x: Any) -> None:
        super().append(np.asarray(x))

    def __setitem__(self, index: Any, x: Any) -> None:
        super().__setitem__(index, np.asarray(x))
