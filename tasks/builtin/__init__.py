"""Built-in fixtures: a tiny genuine Gemma 3, and small benchmarks in MMLU's and ChartQA's layout, to try it all."""

from pathlib import Path

HERE = Path(__file__).parent
BUILTIN = {"tiny-gemma3": HERE / "tiny-gemma3"}
BUILTIN_BENCHMARKS = {"mmlu-mini": HERE / "mmlu-mini", "chartqa-mini": HERE / "chartqa-mini"}
BUILTIN_TEXTS = {"tiny-text": HERE / "tiny-text"}
