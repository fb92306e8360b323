"""The card's chart."""

from pathlib import Path
from typing import Any

# Of MMLU's four choices one is right.
CHANCE = 0.25


def draw_subjects(metrics: dict[str, Any], path: Path) -> None:
    """Draws accuracy and standard error per subject, base and checkpoint, as a PNG that a phone's width does for.

    Its background is opaque, so that it reads the same on light and on dark pages; the colours are two that everybody
    can tell apart (M. Okabe and K. Ito, Color Universal Design, 2008).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A dollar in a name is a dollar.
    with rc_context({"text.parse_math": False}):
        _draw(metrics, Figure).savefig(path, dpi=200, metadata={"Software": None})


def _draw(metrics: dict[str, Any], figure_class: Any) -> Any:
    columns = {
        f"{metrics['base_model'].split('/')[-1]}, base": ("#0072B2", metrics["base"]["mmlu"]["subjects"]),
        f"{metrics['recipe']}, quantized": ("#E69F00", metrics["quantized"]["mmlu"]["subjects"]),
    }
    subjects = sorted(metrics["quantized"]["mmlu"]["subjects"])
    # Twice the pixels of a page 400 wide, where these sizes are those of its text.
    head, foot, line = 1.35, 0.5, 0.38
    height = head + line * len(subjects) + foot
    figure = figure_class(figsize=(4, height), facecolor="white")
    axes = figure.add_axes((0.05, foot / height, 0.9, line * len(subjects) / height))
    axes.axvline(100 * CHANCE, color="#555555", linestyle="--", linewidth=1, label=f"chance, {100 * CHANCE:.0f} %")
    for place, (name, (colour, scores)) in enumerate(columns.items()):
        axes.barh(
            [number + 0.51 + 0.25 * place for number in range(len(subjects))],
            [100 * scores[subject]["accuracy"] for subject in subjects],
            0.23,
            xerr=[100 * (scores[subject]["stderr"] or float("nan")) for subject in subjects],
            error_kw={"elinewidth": 1, "ecolor": "#222222"},
            color=colour,
            label=name,
        )
    for number, subject in enumerate(subjects):
        background = {"facecolor": "white", "edgecolor": "none", "pad": 0}
        axes.text(0.5, number + 0.36, subject.replace("_", " "), fontsize=8.5, va="bottom", bbox=background)
    axes.set(xlim=(0, 100), ylim=(len(subjects), -0.15), yticks=[])
    axes.tick_params(labelsize=8.5, top=True, labeltop=True)
    axes.set_xlabel("accuracy, %, and one standard error", fontsize=8.5)
    axes.spines[["left", "right"]].set_visible(False)
    figure.text(0.05, 1 - 0.25 / height, f"Accuracy per subject of {metrics['benchmark']}", fontsize=10.5)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        [*handles[1:], handles[0]],
        [*labels[1:], labels[0]],
        loc="upper left",
        bbox_to_anchor=(0.03, 1 - 0.28 / height),
        fontsize=8.5,
        frameon=False,
        handlelength=1.2,
    )
    return figure
