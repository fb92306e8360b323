"""The card's chart: accuracy per subject."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.metrics import Metrics, MmluScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One of MMLU's four choices is correct.
CHANCE = 0.25
FONT_SIZE = 8.5


def draw_subjects(metrics: Metrics, path: Path) -> None:
    """Draw accuracy and standard error per subject, base and checkpoint, as a PNG that is readable on a phone.

    Draws nothing if either was not measured. The background is opaque, so that it reads the same on light and dark
    pages; the two colors are distinguishable by everybody (M. Okabe and K. Ito, Color Universal Design, 2008).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    scores = metrics.mmlu_columns()
    if scores is None:
        return
    # A dollar sign in a name starts no formula.
    with rc_context({"text.parse_math": False}):
        # Twice the pixels of a page that is 400 wide, where the font sizes are those of its text.
        top, bottom, row = 1.35, 0.5, 0.38
        height = top + row * len(scores[1].subjects) + bottom
        figure = Figure(figsize=(4, height), facecolor="white")
        axes = figure.add_axes((0.05, bottom / height, 0.9, row * len(scores[1].subjects) / height))
        names = (f"{metrics.base_model.split('/')[-1]}, base", f"{metrics.recipe}, quantized")
        _draw_bars(axes, dict(zip(names, scores, strict=True)))
        _draw_legend(figure, axes, height, f"Accuracy per subject of {metrics.benchmark}")
        figure.savefig(path, dpi=200, metadata={"Software": None})


def _draw_bars(axes: "Axes", columns: dict[str, MmluScore]) -> None:
    *_, quantized = columns.values()
    subjects = sorted(quantized.subjects)
    axes.axvline(100 * CHANCE, color="#555555", linestyle="--", linewidth=1, label=f"chance, {100 * CHANCE:.0f}%")
    for place, (name, color) in enumerate(zip(columns, ("#0072B2", "#E69F00"), strict=True)):
        scores = [columns[name].subjects[subject] for subject in subjects]
        axes.barh(
            [number + 0.51 + 0.25 * place for number in range(len(subjects))],
            [100 * score.accuracy for score in scores],
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
        [*handles[1:], handles[0]],
        [*labels[1:], labels[0]],
        loc="upper left",
        bbox_to_anchor=(0.03, 1 - 0.28 / height),
        fontsize=FONT_SIZE,
        frameon=False,
        handlelength=1.2,
    )
