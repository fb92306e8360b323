"""Built-in fixtures: a tiny genuine Gemma 3 and a small benchmark in MMLU's layout, to try an installation."""

from pathlib import Path

HERE = Path(__file__).parent
BUILTIN = {"tiny-gemma3": HERE / "tiny-gemma3"}
BUILTIN_BENCHMARKS = {"mmlu-mini": HERE / "mmlu-mini"}
