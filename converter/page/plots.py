"""The plots of the page, as SVG inside it, in its own colours: light, dark or printed."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from logshift.converter.page.content import Histogram, Layer

# What matplotlib draws with, and the variables of the page's style that these stand for.
_INK, _FAINT, _FLOAT, _PACKED, _CLIPPED = "#010203", "#010204", "#010205", "#010206", "#010207"
_COLORS = {
    _INK: "var(--ink)", _FAINT: "var(--line)", _FLOAT: "var(--float)", _PACKED: "var(--packed)",
    _CLIPPED: "var(--bad)",
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "font.family": ["sans-serif"],
    "font.size": 8, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT,
    "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False, "path.simplify": True, "text.parse_math": False,
}  # fmt: skip


class Plotter:
    """Draws one plot after the other on one figure, which is what takes longest to make."""

    def __init__(self) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context
        self._drawn = 0
        with self._context(_STYLE):
            self._figure = Figure()
            FigureCanvasSVG(self._figure)

    def _draw(self, width: float, height: float, paint: Callable[[Axes], None]) -> str:
        self._drawn += 1
        # Names in one page differ, and do not change from run to run.
        with self._context(_STYLE | {"svg.hashsalt": f"logshift {self._drawn}"}):
            self._figure.clear()
            self._figure.set_size_inches(width, height)
            axes: Axes = self._figure.add_axes((0, 0, 1, 1))
            axes.set_facecolor("none")
            paint(axes)
            file = io.BytesIO()
            self._figure.savefig(
                file, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04,
                metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            )  # fmt: skip
        return _inline(file.getvalue().decode())

    def weights(self, histogram: Histogram) -> str:
        """Draw float weights, and above them the levels that they are stored at."""

        def paint(axes: Axes) -> None:
            if len(histogram.shares):
                scaled = histogram.shares / max(histogram.shares.max(), 1e-12)
                axes.stairs(scaled, histogram.edges, fill=True, color=_FLOAT, label="float")
            shares = histogram.level_shares / max(histogram.level_shares.max(), 1e-12)
            axes.vlines(histogram.levels, 0, shares, color=_PACKED, linewidth=1, label="stored")
            axes.set_xlabel("weight / alpha")
            _finish(axes)

        return self._draw(3.1, 1.1, paint)

    def activations(self, histogram: Histogram) -> str:
        """Draw float activations with the range of their codes; what is outside is clipped."""

        def paint(axes: Axes) -> None:
            # Most of a tensor lies in a few bins: a square root lets the others be seen.
            shares = np.sqrt(histogram.shares)
            middle = (histogram.edges[1:] + histogram.edges[:-1]) / 2
            low, high = histogram.levels
            inside = np.where((middle >= low) & (middle <= high), shares, 0)
            axes.stairs(inside, histogram.edges, fill=True, color=_FLOAT, label="in range")
            axes.stairs(shares - inside, histogram.edges, fill=True, color=_CLIPPED,
                        label="clipped")  # fmt: skip
            for end in (low, high):
                axes.axvline(end, color=_PACKED, linewidth=1)
            axes.set_xlabel("activation")
            _finish(axes)

        return self._draw(3.1, 1.1, paint)

    def points(self, points: np.ndarray) -> str:
        """Draw values of the packed network over those of the float network."""

        def paint(axes: Axes) -> None:
            low, high = float(points.min(initial=0)), float(points.max(initial=0))
            axes.plot([low, high], [low, high], color=_FAINT, linewidth=1)
            axes.plot(points[0], points[1], ".", color=_PACKED, markersize=2.5)
            axes.set_xlabel("float")
            axes.set_ylabel("packed")

        return self._draw(2.6, 2.2, paint)

    def layers(self, layers: Sequence[Layer]) -> str:
        """Draw what every layer adds to the outputs, and its time, from first to last."""

        def paint(axes: Axes) -> None:
            places = np.arange(1, len(layers) + 1)
            words = np.array([layer.weights_noise or 0.0 for layer in layers])
            codes = np.array([layer.codes_noise or 0.0 for layer in layers])
            axes.bar(places, 100 * words, color=_FLOAT, label="by its weights")
            axes.bar(places, 100 * codes, bottom=100 * words, color=_PACKED, label="by its codes")
            axes.set_ylabel("% of the outputs' squares")
            axes.set_xlabel("layer")
            axes.set_xlim(0.2, len(layers) + 0.8)
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

        return self._draw(7.4, 1.8, paint)


def _finish(axes: Axes) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(bottom=0)


def _inline(svg: str) -> str:
    """Return an SVG file as an element of a page: no declarations, its colours, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups, which nothing refers to
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    assert size is not None
    style = f'aria-hidden="true" style="max-width: {float(size[1]):.0f}pt"'
    svg = svg.replace(size[0], style, 1)
    for color, name in _COLORS.items():
        svg = svg.replace(color, name)
    return re.sub(r">\s+<", "><", svg)
