"""The card's chart: accuracy per subject."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.metrics import BenchmarkScore, Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT_SIZE = 8.5
# Of base and checkpoint.
COLORS = ("#0072B2", "#E69F00")


def charts(metrics: Metrics) -> dict[str, str]:
    """Return {benchmark: file name} for the benchmarks with several tasks that base and checkpoint were measured on."""
    measured = [name for name in metrics.benchmarks if _columns(metrics, name) is not None]
    return {name: f"{name}-by-subject.png" for name in measured if metrics.benchmarks[name].higher_is_better}


def draw_subjects(metrics: Metrics, benchmark: str, path: Path) -> None:
    """Draw score and standard error per task, base and checkpoint, as a PNG that is readable on a phone.

    The background is opaque, so that it reads the same on light and dark pages; the two colors are distinguishable by
    everybody (M. Okabe and K. Ito, Color Universal Design, 2008).

    Args:
        metrics: The metrics.
        benchmark: One of charts().
        path: The file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    scores = _columns(metrics, benchmark)
    assert scores is not None, benchmark
    info = metrics.benchmarks[benchmark]
    # A dollar sign in a name starts no formula.
    with rc_context({"text.parse_math": False}):
        # Twice the pixels of a page that is 400 wide, where the font sizes are those of its text.
        top, bottom, row = 1.35, 0.5, 0.38
        height = top + row * len(scores[1].tasks) + bottom
        figure = Figure(figsize=(4, height), facecolor="white")
        axes = figure.add_axes((0.05, bottom / height, 0.9, row * len(scores[1].tasks) / height))
        names = (f"{metrics.base_model.split('/')[-1]}, base", f"{metrics.recipe}, quantized")
        _draw_bars(axes, dict(zip(names, scores, strict=True)), info.chance)
        _draw_legend(figure, axes, height, f"Accuracy per subject of {info.dataset.name}")
        figure.savefig(path, dpi=200, metadata={"Software": None})


def _columns(metrics: Metrics, benchmark: str) -> tuple[BenchmarkScore, BenchmarkScore] | None:
    """Return the scores of base and checkpoint, None if either was not measured or has no tasks."""
    base, quantized = metrics.base.scores.get(benchmark), metrics.quantized.scores.get(benchmark)
    return None if base is None or quantized is None or not quantized.tasks else (base, quantized)


def _draw_bars(axes: "Axes", columns: dict[str, BenchmarkScore], chance: float | None) -> None:
    *_, quantized = columns.values()
    subjects = sorted(quantized.tasks)
    if chance is not None:
        axes.axvline(100 * chance, color="#555555", linestyle="--", linewidth=1, label=f"chance, {100 * chance:.0f}%")
    for place, (name, color) in enumerate(zip(columns, COLORS, strict=True)):
        scores = [columns[name].tasks[subject] for subject in subjects]
        axes.barh(
            [number + 0.51 + 0.25 * place for number in range(len(subjects))],
            [100 * score.value for score in scores],
            0.23,
            xerr=[100 * (score.stderr or float("nan")) for score in scores],
            error_kw={"elinewidth": 1, "ecolor": "#222222"},
            color=color,
            label=name,
        )
    for number, subject in enumerate(subjects):
        background = {"facecolor": "white", "edgecolor": "none", "pad": 0}
        axes.text(0.5, number + 0.36, subject.replace("_", " "), fontsize=FONT_SIZE, va="bottom", bbox=background)
    axes.set(xlim=(0, 100), ylim=(len(subjects), -0.15), yticks=[])
    axes.tick_params(labelsize=FONT_SIZE, top=True, labeltop=True)
    axes.set_xlabel("accuracy, %, ± one standard error", fontsize=FONT_SIZE)
    axes.spines[["left", "right"]].set_visible(False)


def _draw_legend(figure: "Figure", axes: "Axes", height: float, title: str) -> None:
    figure.text(0.05, 1 - 0.25 / height, title, fontsize=10.5)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        # The bars first, then the line of chance.
        handles[-len(COLORS) :] + handles[: -len(COLORS)],
        labels[-len(COLORS) :] + labels[: -len(COLORS)],
        loc="upper left",
        bbox_to_anchor=(0.03, 1 - 0.28 / height),
        fontsize=FONT_SIZE,
        frameon=False,
        handlelength=1.2,
    )
