"""What the verbs share: the model argument, JSON, tables, progress bars."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.errors import CheckpointError

if TYPE_CHECKING:
    from qjax.lm import LanguageModel

REFERENCE = Path(__file__).resolve().parents[2] / "checkpoints" / "reference"


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model and --dtype, the same on every verb."""
    parser.add_argument(
        "--model",
        type=Path,
        default=REFERENCE,
        help="checkpoint directory, qjax's or Hugging Face's (default: the reference model)",
    )
    parser.add_argument(
        "--dtype", help="type of plain weights and activations: bfloat16, float32 (default: stored)"
    )


def load_model(args: argparse.Namespace) -> "LanguageModel":
    """The model the arguments name."""
    from qjax.lm import load

    if args.model == REFERENCE and not REFERENCE.is_dir():
        raise CheckpointError(
            "the reference model is part of qjax's source tree, not of the installed package; pass "
            "--model DIRECTORY"
        )
    with progress_bars() as progress:
        return load(
            args.model, args.dtype, progress=lambda done, total: progress("load", done, total)
        )


def print_json(data: Any) -> None:
    """The only thing a verb prints on standard output under --json."""
    print(json.dumps(data, indent=2))


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error: yields progress(stage, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.start()  # at the first call: bars that never move leave no empty line
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def print_table(
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    title: str = "",
    optional: Sequence[str] = (),
) -> None:
    """A table on standard output; the first column is a name, the rest are numbers.

    On a terminal too narrow for all, `optional` columns are left out, the first of them first.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        # A pipe or a log has no width of its own: never cut cells there.
        console.width = max(console.width, 140)
    cells = [columns, *rows]
    for name in optional:
        # Rich puts a blank on each side of a cell, and one between columns.
        if sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True)) <= console.width:
            break
        at = cells[0].index(name)
        cells = [row[:at] + row[at + 1 :] for row in cells]
    table = Table(title=title or None, box=SIMPLE_HEAD)
    for index, column in enumerate(cells[0]):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in cells[1:]:
        table.add_row(*row)
    console.print(table)
