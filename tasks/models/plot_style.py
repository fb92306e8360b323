"""The style of every plot: sizes, fonts, colors, and the position of the title.

All of matplotlib's settings come from here, and none from a user's matplotlibrc, so that equal numbers give equal
files. The font is the one that ships with matplotlib.

The background is opaque white. A card has one file for light and dark pages, and a plot is also viewed on its own, on
an unknown background: with a transparent one, lines and text would have to be in a gray that has little contrast.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# In inches. A plot on a card has twice as many pixels as a phone's page, which is 400 wide; its text is as large as the
# page's.
WIDTH, WIDE = 4.0, 7.0
DPI = 200
MARGIN = 0.16
FONT_SIZE, TITLE_SIZE = 8.5, 10.5
# Colors that color-blind people can tell apart: M. Okabe and K. Ito, Color Universal Design, 2008. Yellow is left out
# because it is too light for lines on white.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000"),
)
# What a color means in every plot.
COLORS = {"base": BLUE, "quantized": VERMILION, "program": GREEN, "weights only": PURPLE}
INK, GRAY, LIGHT = "#222222", "#595959", "#DDDDDD"
STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "text.color": INK,
    # A dollar sign in a name does not start a formula.
    "text.parse_math": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.labelsize": FONT_SIZE,
    "axes.titlelocation": "left",
    "axes.titlesize": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "xtick.color": GRAY,
    "xtick.labelcolor": INK,
    "xtick.labelsize": FONT_SIZE,
    "ytick.color": GRAY,
    "ytick.labelcolor": INK,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.labelspacing": 0.35,
    "legend.columnspacing": 1.2,
}


@contextlib.contextmanager
def new_figure(path: Path, title: str, height: float, width: float = WIDTH, subtitle: str = "") -> Iterator["Figure"]:
    """Yield a figure with a title at the top left, and save it when the block ends.

    Args:
        path: The file, .png or .svg.
        title: What the plot shows.
        height: The figure's height, in inches.
        width: Its width, in inches.
        subtitle: The main result, or how to read the plot, in smaller type; it may have several lines.
    """
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()
        rcParams.update(STYLE)
        figure = Figure(figsize=(width, height))
        left = MARGIN / width
        figure.text(left, 1 - MARGIN / height, title, fontsize=TITLE_SIZE, weight="bold", va="top")
        top = 1 - (MARGIN + 0.23) / height
        figure.text(left, top, subtitle, color=GRAY, va="top", linespacing=1.25)
        yield figure
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def add_axes(figure: "Figure", left: float, right: float, top: float, bottom: float, **options: Any) -> "Axes":
    """Return axes with these margins to the figure's edges, in inches."""
    width, height = figure.get_size_inches()
    rectangle = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure.add_axes(rectangle, **options)


def add_legend(figure: "Figure", top: float, columns: int) -> None:
    """Add a legend below the title, `top` inches from the top."""
    width, height = figure.get_size_inches()
    corner = (MARGIN / width, 1 - top / height)
    figure.legend(loc="upper left", bbox_to_anchor=corner, ncols=columns)


def label_logarithmic(axis: "Axis") -> None:
    """Label a logarithmic axis with plain numbers: powers of ten, and in a small range also 2 and 5 times these."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
