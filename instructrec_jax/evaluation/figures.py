"""Pictures of the report as inline SVG text, drawn by Matplotlib without a display.

Inks are CSS variables (``--ink``, ``--muted``, ``--line``, ``--series-0`` ...) that the page defines for light and
dark, so one picture serves both. Text stays text. The same input gives the same bytes.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from instructrec_jax.errors import UserError

# Colours that mean nothing by themselves: each is replaced by a CSS variable of the page.
_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_SERIES = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line"} | {c: f"series-{i}" for i, c in enumerate(_SERIES)}
_DASHES = ((None, None), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1.5), (9, 3))  # told apart without colour too
_SIZE = (6.4, 3.5)  # inches; 72 user units each
_MOST_POINTS = 400


@dataclass(frozen=True)
class Bar:
    """One system in a dot plot; ``low`` and ``high`` are None where there is no interval."""

    name: str
    mean: float
    low: float | None
    high: float | None
    accent: bool  # the system under test


def require_matplotlib() -> None:
    """Raise ``UserError`` with the remedy where Matplotlib is not installed."""
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the report needs Matplotlib ({error})", remedy="pip install 'instructrec_jax[report]'"
        ) from error


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    label: str,
    x_label: str = "step",
    marked: float | None = None,
    name: str,
) -> str:
    """Lines over training steps, named at their ends.

    Args:
        series: name -> (x, y), at least one point each.
        label: what the picture shows, for readers who do not see it.
        marked: a step to point out.
        name: keeps the ids of one page's pictures apart.
    """
    with _canvas(name, label) as drawing:
        axes = drawing.axes()
        longest = max((max(x) for x, _ in series.values() if len(x)), default=1)
        ends: list[tuple[float, str, str]] = []
        for i, (title, (x, y)) in enumerate(series.items()):
            colour, dashes = _SERIES[i % len(_SERIES)], _DASHES[i % len(_DASHES)]
            x, y = thin(x, y)
            dots = "o" if len(x) <= 20 else ""
            axes.plot(x, y, color=colour, dashes=dashes, lw=1.8, marker=dots, ms=4)
            ends.append((float(y[-1]), title, colour))
        if marked is not None:
            axes.axvline(marked, color=_MUTED, lw=1, dashes=(2, 2), zorder=0)
            right = marked > longest / 2
            axes.annotate(
                f"best step {marked:g}",
                (marked, 0.04),
                xycoords=("data", "axes fraction"),
                xytext=(-5 if right else 5, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                color=_MUTED,
            )
        axes.set_xlim(left=0)
        axes.margins(y=0.08)
        axes.set_xlabel(x_label)
        _name_ends(axes, ends, longest)
    return drawing.svg


def dot_plot(bars: Sequence[Bar], *, label: str, x_label: str, name: str) -> str:
    """A dot with its 95 % interval per system, in the order given from the top down."""
    height = 0.75 + 0.36 * len(bars)
    with _canvas(name, label, (5.2, height)) as drawing:
        axes = drawing.axes()
        for y, bar in enumerate(bars):
            colour = _SERIES[0] if bar.accent else _MUTED
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [y, y], color=colour, lw=2.5 if bar.accent else 1.8, alpha=0.55)
            axes.plot([bar.mean], [y], color=colour, marker="o", ms=8 if bar.accent else 6.5)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks(range(len(bars)), [_short(bar.name) for bar in bars])
        for tick, bar in zip(axes.get_yticklabels(), bars):
            tick.set_fontweight("bold" if bar.accent else "normal")
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=2 if max(len(bar.name) for bar in bars) > 24 else 4)  # room is left
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
    return drawing.svg


def lorenz(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, label: str, name: str) -> str:
    """Lorenz curves of exposure with the diagonal of even exposure and a legend."""
    with _canvas(name, label, (_SIZE[0], 4.4)) as drawing:
        axes = drawing.axes()
        axes.plot([0, 1], [0, 1], color=_LINE, lw=1.2)
        axes.annotate("even", (0.5, 0.5), xytext=(-6, 4), textcoords="offset points", ha="right", color=_MUTED)
        for i, (title, (x, y)) in enumerate(series.items()):
            colour, dashes = _SERIES[i % len(_SERIES)], _DASHES[i % len(_DASHES)]
            axes.plot(x, y, color=colour, dashes=dashes, lw=2.2 if i == 0 else 1.5, label=_short(title))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("share of the catalogue, least shown first")
        axes.set_ylabel("share of all places in the lists")
        if series:
            axes.legend(loc="upper left", frameon=False, labelcolor=_INK, handlelength=2.6, borderaxespad=0.2)
    return drawing.svg


def histogram(
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    label: str,
    x_label: str,
    y_label: str,
    marked: float | None,
    name: str,
) -> str:
    """Bars of counts between edges (one more than counts); ``marked`` is a value to point out."""
    with _canvas(name, label) as drawing:
        axes = drawing.axes()
        axes.stairs(counts, edges, fill=True, color=_SERIES[0], alpha=0.8)
        if marked is not None:
            axes.axvline(marked, color=_MUTED, lw=1.2, dashes=(2, 2))
        axes.set_xlim(left=edges[0])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return drawing.svg


def long_tail(popularity: Sequence[int], *, label: str, name: str) -> str:
    """Training events of each item, the most popular first, on two logarithmic axes; items without events are left out."""
    with _canvas(name, label) as drawing:
        axes = drawing.axes()
        events = np.sort(np.asarray(popularity))[::-1]
        events = events[events > 0]
        # Ranks evenly spaced on the axis: a large catalogue would draw a point per item.
        ranks = np.unique(np.geomspace(1, max(len(events), 1), _MOST_POINTS).astype(int))[: len(events)]
        axes.plot(ranks, events[ranks - 1], color=_SERIES[0], lw=1.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("items, the most popular first")
        axes.set_ylabel("training events")
    return drawing.svg


def thin(x: Sequence[float], y: Sequence[float], most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve with at most ``most`` points: means over equal numbers of neighbours, the last point kept as it is."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) <= most:
        return a, b
    groups = np.array_split(np.arange(len(a) - 1), most - 1)
    return np.append([a[g].mean() for g in groups], a[-1]), np.append([b[g].mean() for g in groups], b[-1])


# -------------------------------------------------------------------------------------------------------------- helpers


class _Drawing:
    """One figure while it is drawn, and its text afterwards."""

    def __init__(self, size: tuple[float, float]):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=size, layout="constrained")
        self.svg = ""

    def axes(self) -> Any:
        axes = self.figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        return axes


@contextmanager
def _canvas(name: str, label: str, size: tuple[float, float] = _SIZE) -> Iterator[_Drawing]:
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's own style must not change the report
        matplotlib.rcParams.update(_STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        # Text is measured in Matplotlib's font and shown in the reader's: a character that only that one has is fine.
        warnings.filterwarnings("ignore", message=r".*[Gg]lyph", category=UserWarning)
        drawing = _Drawing(size)
        FigureCanvasSVG(drawing.figure)
        yield drawing
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing.svg = _inline(buffer.getvalue(), name, label)


_STYLE: dict[str, Any] = {
    "svg.hashsalt": "instructrec",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 12.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.axisbelow": True,
}


def _inline(svg: str, name: str, label: str) -> str:
    """Matplotlib's file as an element of a page: no prologue, no global style, no unused ids, themed colours."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', body)
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", match[0])
        text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text).replace("xlink:href=", "href=")
        text = re.sub("|".join(_VARIABLES), lambda m: f"var(--{_VARIABLES[m[0]]})", text)
        # Sizes and weights stay; the family is the page's affair. Older versions write one "font" property.
        text = re.sub(r"\bfont: (?:(bold|\d+) )?([\d.]+px)[^;\"]*", _font, text)
        return re.sub(r"font-family: [^;\"]*(?:; )?", "", text)

    body = re.sub(r"<[^>]*>", tag, body)  # tags only: text is data
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    box = f' viewBox="{view[1]}"' if view else ""
    return f'<svg{box} role="img" aria-label="{html.escape(label)}">\n{body}\n</svg>'


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" + (f"; font-weight: {match[1]}" if match[1] else "")


def _short(text: str, most: int = 32) -> str:
    """A name that fits beside an axis, without line breaks and control characters (XML has no place for them)."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _name_ends(axes: Any, ends: list[tuple[float, str, str]], x: float) -> None:
    """Names of lines to the right of their last points, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    placed: list[float] = []
    for y, title, colour in sorted(ends, key=lambda e: e[0]):
        at = max(y, placed[-1] + gap) if placed else y
        placed.append(at)
        axes.annotate(
            _short(title, 20),
            (x, at),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
