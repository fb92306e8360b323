"""The card's charts: the distance from the base model on text, accuracy per subject, and calibration's error."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.metrics import BenchmarkScore, Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT_SIZE = 8.5
KL_CHART = "kl-histogram.png"
ERROR_CHART = "output-error.png"
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
        _draw_legend(figure, axes, height, f"Accuracy by subject on {info.dataset.name}")
        figure.savefig(path, dpi=200, metadata={"Software": None})


def draw_kl_histogram(metrics: Metrics, path: Path) -> None:
    """Draw how many tokens have which KL divergence from the base model, as a PNG that is readable on a phone.

    Bins are on a logarithmic scale; a divergence below the first edge counts as 0. The program is measured on fewer
    tokens, so the bars are shares.

    Args:
        metrics: The metrics.
        path: The file.
    """
    from matplotlib.figure import Figure

    fidelity = metrics.quantized.fidelity
    shown = {"as shipped": fidelity, "weights only": fidelity.weights_only, "program": metrics.program.fidelity}
    figure = Figure(figsize=(4, 3.1), facecolor="white")
    axes = figure.add_axes((0.14, 0.16, 0.82, 0.56))
    for (name, one), color in zip(shown.items(), (*COLORS, "#009E73"), strict=True):
        # The first bin starts at 0, which is not on a logarithmic scale.
        edges = [one.kl_histogram.edges[1] / 10 ** (1 / 4), *one.kl_histogram.edges[1:]]
        shares = [100 * count / one.tokens for count in one.kl_histogram.counts]
        axes.stairs(shares, edges, color=color, linewidth=1.4, label=f"{name}, mean {one.kl_mean:.3f}")
        axes.axvline(one.kl_mean, color=color, linestyle=":", linewidth=1.2)
    axes.set(xscale="log", ylim=(0, None))
    _label(axes, "KL divergence from the base model, nats", "tokens, %")
    figure.text(0.04, 0.93, "Distance from the base model, token by token", fontsize=10.5)
    figure.legend(
        loc="upper left", bbox_to_anchor=(0.02, 0.92), ncols=2, fontsize=FONT_SIZE, frameon=False, handlelength=1.2
    )
    figure.savefig(path, dpi=200, metadata={"Software": None})


def draw_output_error(metrics: Metrics, path: Path) -> None:
    """Draw the output error that remains after calibration, by role over the blocks, readable on a phone.

    Args:
        metrics: The metrics, of a calibrated recipe.
        path: The file.
    """
    from matplotlib import color_sequences
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    assert metrics.quantized.output_error is not None, metrics.recipe
    roles: dict[str, dict[int, float]] = {}
    for module, error in metrics.quantized.output_error.items():
        _, _, place = module.rpartition(".layers.")
        block, _, role = place.partition(".")
        if block.isdecimal():
            roles.setdefault(role.rpartition(".")[2], {})[int(block)] = 100 * error
    figure = Figure(figsize=(4, 3.3), facecolor="white")
    axes = figure.add_axes((0.15, 0.15, 0.81, 0.53))
    for (role, errors), color in zip(roles.items(), color_sequences["petroff10"], strict=False):
        axes.plot(list(errors), list(errors.values()), ".-", color=color, linewidth=1.2, markersize=4, label=role)
    axes.set(yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "decoder block", "squared error of the outputs, %")
    figure.text(0.04, 0.94, "Output error after calibration, by decoder block", fontsize=10.5)
    figure.legend(
        loc="upper left", bbox_to_anchor=(0.02, 0.93), ncols=4, fontsize=FONT_SIZE, frameon=False, handlelength=1.2
    )
    figure.savefig(path, dpi=200, metadata={"Software": None})


def _label(axes: "Axes", x: str, y: str) -> None:
    """Name both axes, in the size of the page's text, without a frame around them."""
    axes.set_xlabel(x, fontsize=FONT_SIZE)
    axes.set_ylabel(y, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.spines[["top", "right"]].set_visible(False)


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
