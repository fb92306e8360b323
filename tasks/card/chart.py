"""The card's charts: the distance from the base model on text, scores by subject, and calibration's error."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.metrics import BenchmarkScore, Metrics
from quantize_gemma.tasks.models.plot_style import (
    COLORS,
    GRAY,
    LIGHT,
    MARGIN,
    PALETTE,
    add_axes,
    add_legend,
    label_logarithmic,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KL_CHART = "kl-histogram.png"
ERROR_CHART = "output-error.png"
# Standard errors in half of a 95% confidence interval.
CONFIDENT = 1.96
# The maximum number of named subjects, and the heights of a subject's row and of its name, in inches: 57 subjects take
# at most 1,400 pixels.
NAMES = 8
ROW, NAME = 0.07, 0.16
# The background of a row with a name.
SHADE = "#F3F3F3"


@dataclass(frozen=True)
class Subject:
    """A task of a benchmark, as the chart shows it; scores are in percent.

    Attributes:
        name: The task's name.
        base, quantized: The scores.
        error: Half of the 95% confidence interval of their difference; None if a standard error is not known. It treats
            the two scores as independent. Both are measured on the same documents, so it is more likely too wide than
            too narrow.
    """

    name: str
    base: float
    quantized: float
    error: float | None

    @property
    def change(self) -> float:
        """The change from the base model, in points."""
        return self.quantized - self.base

    @property
    def is_significant(self) -> bool:
        """Whether the change is larger than its margin of error."""
        return self.error is not None and abs(self.change) > self.error


def charts(metrics: Metrics) -> dict[str, str]:
    """Return {benchmark: file name} for benchmarks with several tasks, measured on base model and checkpoint."""
    measured = [name for name in metrics.benchmarks if _columns(metrics, name) is not None]
    return {name: f"{name}-by-subject.png" for name in measured if metrics.benchmarks[name].higher_is_better}


def draw_subjects(metrics: Metrics, benchmark: str, path: Path) -> None:
    """Draw the scores of base model and checkpoint per task, sorted by the change, as a PNG for small screens.

    A gray bar around the base model's score is the margin of error of the change. At most NAMES subjects whose change
    exceeds it are named; if there are no more than NAMES subjects, all of them are.

    Args:
        metrics: The metrics.
        benchmark: One of charts().
        path: The file.
    """
    info = metrics.benchmarks[benchmark]
    subjects = compare_subjects(metrics, benchmark)
    labeled_names = choose_named(subjects)
    rows = ROW * (len(subjects) + 1) + NAME * len(labeled_names)
    top, bottom = 1.34, 0.45
    significant_count = sum(subject.is_significant for subject in subjects)
    subtitle = f"{significant_count} of {len(subjects)} changed by more than the margin of error"
    with new_figure(path, f"{info.title} by subject", top + rows + bottom, subtitle=subtitle) as figure:
        axes = add_axes(figure, MARGIN, MARGIN, top, bottom)
        _draw_dumbbells(axes, subjects, labeled_names)
        if info.chance is not None:
            axes.axvline(100 * info.chance, color=GRAY, linestyle="--", linewidth=0.9, zorder=0.5)
            axes.text(100 * info.chance, -0.03, "chance", color=GRAY, ha="center", va="bottom")
        if labeled_names:
            header = "largest changes, points" if significant_count > len(labeled_names) else "change, points"
            axes.text(0.99, 1, header, color=GRAY, transform=axes.transAxes, ha="right", va="bottom")
        metric = info.metric.partition(",")[0].replace("_", " ")
        axes.set_xlabel(f"{'accuracy' if metric.startswith('acc') else metric}, %")
        names = {"base": metrics.base_model.split("/")[-1], "quantized": metrics.recipe}
        for column, name in names.items():
            axes.plot([], [], "o", color=COLORS[column], markersize=3.6, label=f"{name}, {column}")
        label = "margin of error of the change, 95%"
        axes.plot([], [], color=LIGHT, linewidth=3.6, solid_capstyle="butt", label=label)
        add_legend(figure, 0.62, 1)


def compare_subjects(metrics: Metrics, benchmark: str) -> list[Subject]:
    """Return the tasks of one of charts(), sorted by the change, the largest drop first."""
    columns = _columns(metrics, benchmark)
    assert columns is not None, benchmark
    base, quantized = columns
    subjects = []
    for name, after in quantized.tasks.items():
        before = base.tasks[name]
        error = None
        if before.stderr is not None and after.stderr is not None:
            # A standard error of zero only shows that each model answers all questions correctly, or none; it is not a
            # margin of error.
            error = 100 * CONFIDENT * math.hypot(before.stderr, after.stderr) or None
        subjects.append(Subject(name, 100 * before.value, 100 * after.value, error))
    return sorted(subjects, key=lambda subject: (subject.change, subject.name))


def choose_named(subjects: list[Subject]) -> set[str]:
    """Return the subjects to name: all if there are at most NAMES, else those with the largest significant changes."""
    candidates = subjects if len(subjects) <= NAMES else [subject for subject in subjects if subject.is_significant]
    return {subject.name for subject in sorted(candidates, key=lambda subject: -abs(subject.change))[:NAMES]}


def draw_kl_histogram(metrics: Metrics, path: Path) -> None:
    """Draw histograms of the tokens' KL divergence from the base model, as a PNG for small screens.

    Bins are on a logarithmic scale; the first bin also has all smaller divergences. The program is measured on fewer
    tokens, so the bars are shares.

    Args:
        metrics: The metrics.
        path: The file.
    """
    from matplotlib.ticker import MaxNLocator

    fidelity = metrics.quantized.fidelity
    columns = {
        "as shipped": (fidelity, COLORS["quantized"]),
        "weights only": (fidelity.weights_only, COLORS["weights only"]),
        "program": (metrics.program.fidelity, COLORS["program"]),
    }
    with new_figure(path, "Distance from the base model, by token", 3.1) as figure:
        axes = add_axes(figure, 0.38, MARGIN, 1.03, 0.45)
        for number, (name, (distances, color)) in enumerate(columns.items()):
            # The first bin starts at 0, which is not on a logarithmic scale.
            edges = [distances.kl_histogram.edges[1] / 10 ** (1 / 4), *distances.kl_histogram.edges[1:]]
            shares = [100 * count / distances.tokens for count in distances.kl_histogram.counts]
            label = f"{name}, mean {distances.kl_mean:.3f}"
            # Draw the first line on top.
            axes.stairs(shares, edges, color=color, linewidth=1.4, label=label, zorder=4 - number)
            axes.axvline(distances.kl_mean, color=color, linestyle=":", linewidth=1.2)
        axes.set(xscale="log", ylim=(0, None), xlabel="KL divergence from the base model, nats", title="tokens, %")
        axes.set_xticks([0.0001, 0.001, 0.01, 0.1, 1, 10], ["0.0001", "0.001", "0.01", "0.1", "1", "10"])
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        add_legend(figure, 0.42, 2)


def draw_output_error(metrics: Metrics, path: Path) -> None:
    """Draw the error that rounding adds to outputs, by role and decoder block, as a PNG for small screens.

    Args:
        metrics: The metrics of a release with a calibrated recipe.
        path: The file.
    """
    from matplotlib.ticker import MaxNLocator

    assert metrics.quantized.output_error is not None, metrics.recipe
    roles: dict[str, dict[int, float]] = {}
    for module, error in metrics.quantized.output_error.items():
        _, _, module_name = module.rpartition(".layers.")
        block, _, role = module_name.partition(".")
        if block.isdecimal():
            roles.setdefault(role, {})[int(block)] = 100 * error
    with new_figure(path, "Output error of rounding, after calibration", 3.3) as figure:
        axes = add_axes(figure, 0.48, MARGIN, 1.03, 0.45)
        for (role, errors), color in zip(roles.items(), PALETTE, strict=False):
            part, _, name = role.rpartition(".")
            marker = "s--" if part == "mlp" else "o-"
            axes.plot(
                list(errors), list(errors.values()), marker, color=color, linewidth=1.1, markersize=2.5, label=name
            )
        axes.set(yscale="log", xlabel="decoder block", title="relative squared error, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        label_logarithmic(axes.yaxis)
        add_legend(figure, 0.42, 4)


def _columns(metrics: Metrics, benchmark: str) -> tuple[BenchmarkScore, BenchmarkScore] | None:
    """Return the scores of base model and checkpoint; None if either was not measured or has no tasks."""
    base, quantized = metrics.base.scores.get(benchmark), metrics.quantized.scores.get(benchmark)
    return None if base is None or quantized is None or not quantized.tasks else (base, quantized)


def _draw_dumbbells(axes: "Axes", subjects: list[Subject], labeled_names: set[str]) -> None:
    """Draw a row for each subject; rows with a name are taller and have a gray background."""
    heights, height = [], 0.0
    for subject in subjects:
        if subject.name in labeled_names:
            axes.axhspan(height, height + NAME + ROW, color=SHADE, linewidth=0, zorder=0)
            _write_name(axes, subject, height + 0.02)
            height += NAME
        heights.append(height + ROW / 2)
        height += ROW
    base, quantized = [subject.base for subject in subjects], [subject.quantized for subject in subjects]
    # Insignificant changes are paler.
    alpha = [1.0 if subject.is_significant else 0.55 for subject in subjects]
    axes.hlines(heights, base, quantized, color=GRAY, linewidth=0.8, alpha=alpha)
    for name, scores in (("base", base), ("quantized", quantized)):
        axes.scatter(scores, heights, 12, [(COLORS[name], opacity) for opacity in alpha], linewidths=0, zorder=3)
    low = [max(subject.base - (subject.error or 0), 0) for subject in subjects]
    high = [min(subject.base + (subject.error or 0), 100) for subject in subjects]
    axes.hlines(heights, low, high, color=LIGHT, linewidth=3.6, zorder=0.8)
    axes.set(ylim=(height + ROW / 2, -ROW / 2), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _write_name(axes: "Axes", subject: Subject, height: float) -> None:
    """Write a subject's name at the left of its row, and its change at the right, on an opaque background."""
    change = f"{subject.change:+.1f}".replace("-", "\N{MINUS SIGN}")
    for x, side, text in ((0.01, "left", subject.name.replace("_", " ")), (0.99, "right", change)):
        background = {"color": SHADE, "pad": 0.5}
        axes.text(x, height, text, transform=axes.get_yaxis_transform(), ha=side, va="top", bbox=background)
