"""report.html: the report as one file that needs nothing else, figures and style inside, no script."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imgopt_fast.training.stages import title

if TYPE_CHECKING:
    from imgopt_fast.training.report import Report

FIGURES = {
    "curves.png": "Loss, accuracy and density over the epochs",
    "samples.png": "Training images and what the network saw of them, with the parameters that were drawn",
    "confusion.png": "How often the final network takes images of one class (row) for another (column), in percent",
    "mistakes.png": "Images that the final network gets wrong",
}
LAYERS = "What each layer alone costs when it is int8, and its share of the time"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8885; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; }
figure img { max-width: 100%; background: white; }
figcaption { color: #888; }
.wide { overflow-x: auto; }
.notes { font-size: .85rem; color: #888; }
"""


def page(report: Report) -> str:
    """The page; its figures are those that the run folder has by now."""
    from imgopt_fast.training.report import data_line, note_lines, time_lines, title_line

    data, heading = report.dataset, title_line(report)
    shown = [(name, caption) for name, caption in FIGURES.items() if (report.path / name).exists()]
    parts = [
        f"<h1>{html.escape(heading)}</h1>",
        f"<p>{html.escape(data_line(report))}</p>",
        _table(report.cells()),
        *(f"<p>{html.escape(line)}</p>" for line in report.epoch_lines()),
        f'<div class="notes">{_marked(_list(note_lines(report)))}</div>',
        "<h2>Where the time went</h2>",
        _list(time_lines(report)),
        *(_figure(name, (report.path / name).read_bytes(), caption) for name, caption in shown),
    ]
    if report.layers is not None:
        parts.append("<h2>Layers of the int8 network</h2>")
        parts.append(_figure("layers.png", (report.path / "layers.png").read_bytes(), LAYERS))
        parts.append(f'<div class="wide"><pre>{html.escape(str(report.layers))}</pre></div>')
    if data.skipped:
        parts.append(f"<h2>{len(data.skipped)} images that cannot be read were left out</h2>")
        parts.append(_list([f"{name}: {reason}" for name, reason in data.skipped]))
    parts.append("<h2>Epochs</h2>")
    config, head = (
        report.config,
        ("epoch", "stage", "training loss", "validation", "learning rate", "density", "images/s"),
    )
    lines = [
        (str(row.epoch), title(row.stage, config), f"{row.train_loss:.4f}", f"{row.eval_top1:.2%}", f"{row.lr:.3g}",
         f"{row.density:.0%}", f"{row.images_per_second:,.0f}")
        for row in report.epochs
    ]  # fmt: skip
    parts.append(_table([head, *lines]))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(cells: Sequence[Sequence[str]]) -> str:
    rows = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", cells[0]), *(("td", row) for row in cells[1:])]
    ]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _marked(text: str) -> str:
    """The two marks of Markdown that the notes have."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text))


def _figure(name: str, content: bytes, caption: str) -> str:
    data = base64.b64encode(content).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
