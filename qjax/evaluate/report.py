"""A comparison as one HTML page: the table, the plots, the samples. No script, no outside file."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from qjax.evaluate.compare import Comparison, Row
from qjax.tree import natural_order

COLUMNS = (
    "format",
    "bits/weight",
    "on disk",
    "perplexity",
    "95 % interval",
    "change",
    "95 % paired",
    "tokens/s here",
)
SPEED_NOTE = (
    "Speed on a CPU is not the point: it has no low-precision matrix units, and the kernels that "
    "turn fewer bytes into less time are for NVIDIA GPUs."
)


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table's cells as text, baseline first, in the order of COLUMNS."""
    return [_cells(comparison.baseline)] + [_cells(row) for row in comparison.rows]


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.perplexity_ci
    first, last = row.change_ci
    base = not row.layer_errors
    return (
        row.preset,
        f"{row.bits_per_weight:.3f}",
        f"{row.bytes_on_disk / 2**20:.1f} MiB",
        f"{row.perplexity:.4f}",
        f"{low:.3f} .. {high:.3f}",
        "" if base else f"{row.change:+.2%}",
        "" if base else f"{first:+.2%} .. {last:+.2%}",
        f"{row.decode_tokens_per_s:.0f}",
    )


def write_report(comparison: Comparison, path: Path) -> list[Path]:
    """Write the page to `path` and its two plots beside it as PNG.

    Returns:
      the files written: the page first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = {
        "perplexity_vs_size": _plot_size(comparison),
        "layer_errors": _plot_layers(comparison),
    }
    written = [path]
    for name, png in plots.items():
        written.append(path.with_name(f"{name}.png"))
        written[-1].write_bytes(png)
    path.write_text(_page(comparison, plots), encoding="utf-8")
    return written


def _page(comparison: Comparison, plots: dict[str, bytes]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in table_rows(comparison)
    )
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in plots.items()
    )
    prompt = comparison.setup["prompt"]
    samples = "".join(
        f"<h3>{html.escape(row.preset)}</h3><pre><b>{html.escape(prompt)}</b>"
        f"{html.escape(row.sample)}</pre>"
        for row in (comparison.baseline, *comparison.rows)
    )
    text = comparison.setup["text"]
    setup = (
        f"{comparison.setup['sequences']} windows of {comparison.setup['seq_len']} tokens of "
        f"held-out standard-library source (Python {text['python']}, SHA-256 "
        f"{text['sha256'][:16]}…), on {comparison.setup['device']}, jax {comparison.setup['jax']}. "
        "Change: perplexity against the baseline, with a 95 % bootstrap interval of the paired "
        "per-sequence difference. Bits per weight count the scales of the quantized matrices."
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>qjax: formats compared</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left; font-weight: 600 }}
img {{ max-width: 100%; margin-top: 1.5rem }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto }}
p {{ color: #444 }}
</style>
<h1>One model in {len(comparison.rows) + 1} formats</h1>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p>{html.escape(setup)}</p><p>{html.escape(SPEED_NOTE)}</p>
{images}
<h2>Samples</h2><p>Greedy continuations of the same prompt.</p>{samples}
</html>
"""


def _figure() -> tuple[Any, Any]:
    # The object interface: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _plot_size(comparison: Comparison) -> bytes:
    figure, axes = _figure()
    for index, row in enumerate((comparison.baseline, *comparison.rows)):
        # The error bar is the paired interval: it says what the format costs, not how hard the
        # text is, which all formats share.
        base = comparison.baseline.perplexity
        low, high = (base * (1 + change) for change in row.change_ci)
        errors = [[max(row.perplexity - low, 0)], [max(high - row.perplexity, 0)]]
        size = row.bytes_on_disk / 2**20
        axes.errorbar(size, row.perplexity, yerr=errors, fmt="o", capsize=4, color=f"C{index}")
        axes.annotate(row.preset, (size, row.perplexity), (6, 6), textcoords="offset points")
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("size on disk, MiB")
    axes.set_ylabel("held-out perplexity")
    axes.set_title("What each format costs, with the paired 95 % interval")
    axes.grid(alpha=0.3)
    return _png(figure)


def _plot_layers(comparison: Comparison) -> bytes:
    figure, axes = _figure()
    for index, row in enumerate(comparison.rows, 1):
        names = sorted(row.layer_errors, key=natural_order)
        # Formats may share their weights (int8, int8_wo): dashes let the one below show through.
        axes.plot(
            [row.layer_errors[name] for name in names],
            marker=".",
            linewidth=0.8,
            linestyle=("-", "--")[index % 2],
            color=f"C{index}",
            label=row.preset,
        )
    axes.set_yscale("log")
    axes.set_xlabel("quantized weight, in model order")
    axes.set_ylabel("relative error of the weight")
    axes.set_title("Per-layer error: ||W - Q|| / ||W||")
    if comparison.rows:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return _png(figure)
