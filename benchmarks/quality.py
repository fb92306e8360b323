"""Compare recipes by quality and size: `python -m benchmarks.quality --model DIR --text FILE --calibration FILE`.

Every recipe runs through the flow's own stages, each in its own process. Quality is the weights-only fidelity: both
models compute in float32 without quantized activations, on the first windows of the text. On disk, an int4 weight takes
a whole byte, so the table compares the sizes of the programs and of the packed weights: integers and scales at their
bit widths, plus everything that is not quantized.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import empty_folder, machine, run
from quantize_gemma.tasks.models.checkpoint import linear_shapes, read_headers
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.plot_style import COLORS, MARGIN, WIDE, add_axes, label_logarithmic, new_figure
from quantize_gemma.tasks.models.recipe import Recipe, load_recipe, match_rules, packed_bytes

RECIPES = (
    "HQQ-INT8-INT4",
    "SEARCH-INT8-INT4",
    "GPTQ-INT8-INT4",
    "GPTQ-INT8-INT4-HEAD8",
    "DISTILL-INT8-INT4",
    "DISTILL-INT8-INT4-HEAD8",
)
COLUMNS = ("name", "program_bytes", "packed_bytes", "ppl", "kl_mean", "same_top", "seconds", "peak_rss_bytes")


def our_untie(target: str, checkpoint: str) -> dict[str, Any]:
    """Untie as the flow does."""
    from quantize_gemma.tasks.untie import untie

    return untie(Path(target), Path(checkpoint))


def our_quantize(target: str, checkpoint: str, recipe: str, calibration: str | None) -> dict[str, Any]:
    """Quantize as the flow does."""
    from quantize_gemma.tasks.quantize import quantize

    source = Path(calibration) if calibration else None
    return quantize(Path(target), Path(checkpoint), load_recipe(recipe).to_json(), "cpu", source)


def our_distill(target: str, checkpoint: str, base: str, recipe: str, calibration: str) -> dict[str, Any]:
    """Distill as the flow does."""
    from quantize_gemma.tasks.quantize.distill import distill

    content = load_recipe(recipe).to_json()
    return distill(Path(target), Path(checkpoint), Path(base), content, "cpu", Path(calibration))


def our_calibrate(target: str, checkpoint: str, text: str, recipe: str, fidelity_text: str) -> dict[str, Any]:
    """Prepare the calibration tokens as the flow does."""
    from quantize_gemma.tasks.calibrate import calibrate, digest_text

    parsed_recipe = load_recipe(recipe)
    settings = parsed_recipe.calibration
    assert settings is not None, f"{recipe} needs no calibration"
    return calibrate(
        Path(target),
        Path(checkpoint),
        settings.sequences,
        settings.length,
        settings.answers,
        text=text,
        digest=digest_text(text),
        fidelity_text=Path(fidelity_text),
        distilled=parsed_recipe.distillation.sequences if parsed_recipe.distillation else 0,
    )


def our_fidelity_base(target: str, checkpoint: str, text: str, windows: int) -> dict[str, Any]:
    """Compute the base model's hidden states as the flow does."""
    from quantize_gemma.tasks.fidelity.fidelity_base import fidelity_base

    return fidelity_base(Path(target), Path(checkpoint), Path(text), windows, "cpu")


def our_fidelity(target: str, base: str, states: str, checkpoint: str) -> dict[str, Any]:
    """Compare a checkpoint with the base model as the flow does."""
    from quantize_gemma.tasks.fidelity import summarize_quantized
    from quantize_gemma.tasks.fidelity.fidelity_quantized import fidelity_quantized

    output = fidelity_quantized(Path(target), Path(base), [Path(states)], Path(checkpoint), "cpu")
    results = summarize_quantized([Path(target)])
    (Path(target) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return output


def our_export(target: str, checkpoint: str, max_seq_len: int) -> dict[str, Any]:
    """Export as the flow does."""
    from quantize_gemma.tasks.export import export

    return export(Path(target), Path(checkpoint), max_seq_len)


def count_packed_bytes(checkpoint: Path, recipe: Recipe | None) -> int:
    """Return packed_bytes() of an untied checkpoint, or of a base checkpoint without a recipe."""
    shapes = {GEMMA3.runtime_name(name): tensor.shape for name, tensor in read_headers(checkpoint).items()}
    return packed_bytes(shapes, match_rules(recipe, linear_shapes(shapes)) if recipe else {})


def measure(
    folder: Path, model: Path, text: Path, calibration: Path | None, recipes: list[str], windows: int, export: bool
) -> list[dict[str, Any]]:
    """Return the table's rows, the base model's first."""
    corpus, untied, states = (empty_folder(folder / name) for name in ("text", "untied", "states"))
    shutil.copyfile(text, corpus / "text.txt")
    run("benchmarks.quality:our_untie", target=untied, checkpoint=model)
    step = run("benchmarks.quality:our_fidelity_base", target=states, checkpoint=untied, text=corpus, windows=windows)
    base = {"name": "base", "packed_bytes": count_packed_bytes(model, None), "kl_mean": 0.0, "same_top": 1.0}
    rows: list[dict[str, Any]] = [{**base, "seconds": step["seconds"], "peak_rss_bytes": step["peak_rss_bytes"]}]
    for name in recipes:
        recipe, tokens = load_recipe(name), None
        if recipe.calibration is not None:
            assert calibration is not None, f"{name} needs --calibration"
            tokens = empty_folder(folder / "calibration")
            run(
                "benchmarks.quality:our_calibrate",
                target=tokens,
                checkpoint=untied,
                text=str(calibration),
                recipe=name,
                fidelity_text=str(text),
            )
        quantized, results = empty_folder(folder / "quantized"), empty_folder(folder / "results")
        step = run(
            "benchmarks.quality:our_quantize", target=quantized, checkpoint=untied, recipe=name, calibration=tokens
        )
        if recipe.distillation is not None:
            distilled = empty_folder(folder / "distilled")
            inputs = {"checkpoint": quantized, "base": untied, "recipe": name, "calibration": tokens}
            training = run("benchmarks.quality:our_distill", target=distilled, **inputs)
            step["seconds"] += training["seconds"]
            step["peak_rss_bytes"] = max(step["peak_rss_bytes"], training["peak_rss_bytes"])
            quantized = distilled
        run("benchmarks.quality:our_fidelity", target=results, base=untied, states=states, checkpoint=quantized)
        metrics = json.loads((results / "results.json").read_text(encoding="utf-8"))["weights_only"]
        rows[0]["ppl"] = metrics["ppl_base"]
        row = {"name": recipe.name, "packed_bytes": count_packed_bytes(untied, recipe)}
        if export:
            program = empty_folder(folder / "program")
            run("benchmarks.quality:our_export", target=program, checkpoint=quantized, max_seq_len=1024)
            row["program_bytes"] = (program / "model.pte").stat().st_size
        row |= {key: metrics[key] for key in ("ppl", "kl_mean", "same_top")}
        if len(rows) == 1:  # Its perplexity is known by now.
            print(format_row(rows[0]))
        rows.append({**row, "seconds": step["seconds"], "peak_rss_bytes": step["peak_rss_bytes"]})
        print(format_row(rows[-1]), flush=True)
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def format_row(row: dict[str, Any]) -> str:
    """Return one row of the table as Markdown."""

    def show(column: str, pattern: str, factor: float = 1.0) -> str:
        value = row.get(column)
        return "" if value is None else format(value * factor, pattern)

    cells = [
        row["name"],
        show("program_bytes", ",.0f"),
        show("packed_bytes", ",.0f"),
        show("ppl", ".2f"),
        show("kl_mean", ".4f"),
        show("same_top", ".1f", 100),
        show("seconds", ".1f"),
        show("peak_rss_bytes", ".2f", 1e-9),
    ]
    return f"| {' | '.join(cells)} |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the recipes' KL divergence versus the size of the program, in the format of the file name's extension.

    If a program was not exported, the plot shows packed sizes instead.
    """
    # A lossless recipe cannot be drawn on a logarithmic scale.
    drawn_rows = [row for row in rows if row["kl_mean"] > 0]
    if not drawn_rows:
        print(f"there is nothing to plot into {path}: every recipe is lossless", file=sys.stderr)
        return
    exported = all(row.get("program_bytes") for row in drawn_rows)
    size = "program_bytes" if exported else "packed_bytes"
    title = f"KL divergence versus {'program' if exported else 'packed'} size"
    subtitle = "from the base model, weights only, in nats; lower is better"
    with new_figure(path, title, 3.6, WIDE, subtitle) as figure:
        axes = add_axes(figure, 0.55, MARGIN, 0.75, 0.45)
        for row in drawn_rows:
            # Move overlapping labels of close points apart.
            ratios = [other_row["kl_mean"] / row["kl_mean"] for other_row in drawn_rows if other_row[size] == row[size]]
            shift = 6 * (any(0.8 < ratio < 1 for ratio in ratios) - any(1 < ratio < 1.25 for ratio in ratios))
            point = (row[size] / 1e6, row["kl_mean"])
            axes.plot(*point, "o", color=COLORS["quantized"], markersize=7)
            label = {"text": f"{row['name']}  {row['kl_mean']:.3f}", "bbox": {"color": "white", "pad": 0.5}}
            axes.annotate(xy=point, xytext=(9, shift), textcoords="offset points", va="center", **label)
        sizes, kls = [row[size] / 1e6 for row in drawn_rows], [row["kl_mean"] for row in drawn_rows]
        width = max(max(sizes) - min(sizes), 0.1 * max(sizes))
        axes.set(xlim=(min(sizes) - 0.1 * width, max(sizes) + 0.6 * width), xlabel="MB")
        axes.set(yscale="log", ylim=(0.5 * min(kls), 1.5 * max(kls)))
        axes.grid(axis="y")
        label_logarithmic(axes.yaxis)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the directory of the base checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="the text to measure on")
    parser.add_argument("--calibration", type=Path, help="the text to calibrate on, for calibrated recipes")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="names, or paths that end in .json")
    parser.add_argument("--windows", type=int, default=10, help="windows of 512 tokens of the text [default: 10]")
    parser.add_argument(
        "--export",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="export each recipe's program, for its size [default: export]",
    )
    parser.add_argument(
        "--plot", type=Path, help="plot KL divergence versus the program's size into this file, .png or .svg"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    recipes = [str(Path(name).resolve()) if name.endswith(".json") else name for name in options.recipes]
    calibrated = [name for name in recipes if load_recipe(name).calibration is not None]
    if calibrated and options.calibration is None:
        parser.error(f"{', '.join(calibrated)} cannot be quantized without a text: add --calibration FILE")
    print("| recipe | program, bytes | packed, bytes | PPL | KL | same top token, % | seconds | peak memory, GB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            Path(folder),
            options.model.resolve(),
            options.text.resolve(),
            options.calibration and options.calibration.resolve(),
            recipes,
            options.windows,
            options.export,
        )
    if options.json:
        result = {"model": str(options.model), "machine": machine(), "text": options.text.name, "recipes": rows}
        print(json.dumps(result))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
