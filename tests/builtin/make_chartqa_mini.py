"""Draw and write chartqa-mini, the built-in chart benchmark, in the layout of `HuggingFaceM4/ChartQA`.

    python -m tests.builtin.make_chartqa_mini

draws the charts of charts.json (written for this project) and writes chartqa-mini/data/test-00000-of-00001.parquet and
the README next to it, so that `datasets.load_dataset(<chartqa-mini>)` reads it like ChartQA.

The charts are large and simple: tiny-gemma3 sees them at 64 x 64 pixels.
"""

import io
import json
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN_BENCHMARKS

FOLDER = Path(__file__).parent
CHARTS = FOLDER / "charts.json"
CHARTQA_MINI = BUILTIN_BENCHMARKS["chartqa-mini"]
KINDS = ("human", "machine")
SIZE = WIDTH, HEIGHT = 256, 192
# The plot area for bars and lines; a pie is in its center.
LEFT, TOP, RIGHT, BOTTOM = 24, 24, 248, 168
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
    "black": (20, 20, 20),
}


def read_chartqa() -> list[dict[str, Any]]:
    """Return [{"kind", "title", "unit", "points": [[label, color, value]], "human", "machine"}].

    `human` and `machine` are the questions of that kind, [query, label].
    """
    charts: list[dict[str, Any]] = json.loads(CHARTS.read_text(encoding="utf-8"))
    return charts


def questions() -> list[dict[str, Any]]:
    """Return the dataset's rows, with the image as PNG: first the questions of kind `human`, then the others."""
    charts = [(chart, _png(draw(chart))) for chart in read_chartqa()]
    return [
        {"image": {"bytes": png, "path": None}, "query": query, "label": [label], "human_or_machine": number}
        for number, kind in enumerate(KINDS)
        for chart, png in charts
        for query, label in chart[kind]
    ]


def draw(chart: dict[str, Any]) -> Any:
    """Return the chart as an image: bars, a line, or a pie. The font is Pillow's bitmap font, the same everywhere."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default_imagefont()
    pen.text((LEFT, 6), chart["title"], "black", font)
    points = chart["points"]
    if chart["kind"] == "pie":
        _draw_pie(pen, points, chart["unit"], font)
        return image
    top = max(value for _, _, value in points)
    step = (RIGHT - LEFT) / len(points)
    corners = [
        (LEFT + step * (number + 0.5), BOTTOM - (BOTTOM - TOP - 16) * value / top)
        for number, (_, _, value) in enumerate(points)
    ]
    if chart["kind"] == "line":
        pen.line(corners, COLORS[points[0][1]], 8)
    for (middle, height), (label, color, value) in zip(corners, points, strict=True):
        if chart["kind"] == "bar":
            pen.rectangle((middle - step * 0.38, height, middle + step * 0.38, BOTTOM), COLORS[color])
        value_text = f"{value}{chart['unit']}"
        pen.text((middle - 3 * len(value_text), height - 16), value_text, "black", font)
        pen.text((middle - 3 * len(label), BOTTOM + 6), label, "black", font)
    pen.line((LEFT, BOTTOM, RIGHT, BOTTOM), "black", 2)
    return image


def _draw_pie(pen: Any, points: list[Any], unit: str, font: Any) -> None:
    total = sum(value for _, _, value in points)
    start = -90.0
    for number, (label, color, value) in enumerate(points):
        end = start + 360 * value / total
        pen.pieslice((16, TOP, 160, TOP + 144), start, end, COLORS[color])
        start = end
        pen.rectangle((176, 40 + 24 * number, 188, 52 + 24 * number), COLORS[color])
        pen.text((194, 40 + 24 * number), f"{label} {value}{unit}", "black", font)


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def write_chartqa_mini(target: Path = CHARTQA_MINI) -> None:
    """Write the test split as a parquet file, and the README."""
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    features = Features(
        {
            "image": Image(),
            "query": Value("string"),
            "label": List(Value("string")),
            "human_or_machine": ClassLabel(names=list(KINDS)),
        }
    )
    (target / "data").mkdir(parents=True, exist_ok=True)
    Dataset.from_list(questions(), features=features).to_parquet(target / "data" / "test-00000-of-00001.parquet")
    (target / "README.md").write_text(DATASET_CARD, encoding="utf-8")


DATASET_CARD = """---
license: cc0-1.0
language:
- en
task_categories:
- visual-question-answering
configs:
- config_name: default
  data_files:
  - split: test
    path: data/test-*
---

# chartqa-mini

A test fixture: charts drawn for this project and short questions about them, in the file layout of
HuggingFaceM4/ChartQA. A model that scores well on it has memorized it; the score says nothing about reading charts.
"""

if __name__ == "__main__":
    write_chartqa_mini()
