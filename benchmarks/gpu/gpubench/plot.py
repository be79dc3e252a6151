"""Bar charts: PNG where matplotlib is installed, SVG by the few lines below where it is not."""

import importlib
import importlib.util
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

Bar = tuple[str, float, float | None]
"""Label, measured value and target."""

_ROW, _LEFT, _WIDE, _TOP = 22, 330, 420, 40


def bar_chart(path: Path, title: str, bars: Sequence[Bar]) -> Path:
    """Draws the bars with a mark at each target; returns the file, whose suffix says how it was drawn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        return _by_matplotlib(path.with_suffix(".png"), title, bars)
    path = path.with_suffix(".svg")
    path.write_text(svg(title, bars), encoding="utf-8")
    return path


def svg(title: str, bars: Sequence[Bar]) -> str:
    """The chart as SVG."""
    most = max([1e-9, *(max(value, target or 0.0) for _, value, target in bars)])
    height = _TOP + _ROW * len(bars) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDE + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
    ]
    for i, (label, value, target) in enumerate(bars):
        y, wide = _TOP + i * _ROW, _WIDE * value / most
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{wide:.1f}" height="{_ROW - 8}" fill="#4477aa"/>',
            f'<text x="{_LEFT + wide + 6:.1f}" y="{y + 14}">{value:.3g}</text>',
        ]
        if target is not None:
            x = _LEFT + _WIDE * target / most
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + _ROW - 2}" stroke="#cc3311"/>')
    return "\n".join([*parts, "</svg>", ""])


def _by_matplotlib(path: Path, title: str, bars: Sequence[Bar]) -> Path:
    figure: Any = importlib.import_module("matplotlib.figure").Figure(
        figsize=(10, 1 + 0.3 * len(bars)), layout="constrained"
    )
    axes = figure.subplots()
    places = range(len(bars))
    axes.barh(places, [value for _, value, _ in bars], color="#4477aa")
    axes.set_yticks(places, [label for label, _, _ in bars])
    axes.invert_yaxis()
    axes.set_title(title)
    for place, (_, _, target) in zip(places, bars, strict=True):
        if target is not None:
            axes.plot([target, target], [place - 0.45, place + 0.45], color="#cc3311")
    figure.savefig(path, dpi=110)
    return path
