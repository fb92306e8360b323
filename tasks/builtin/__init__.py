"""Built-in fixtures: a tiny but genuine Gemma 3, and small benchmarks in the layouts of MMLU, ChartQA, and GSM8K."""

from pathlib import Path

FOLDER = Path(__file__).parent
BUILTIN = {"tiny-gemma3": FOLDER / "tiny-gemma3"}
BUILTIN_BENCHMARKS = {name: FOLDER / name for name in ("mmlu-mini", "chartqa-mini", "gsm8k-mini")}
BUILTIN_TEXTS = {"tiny-text": FOLDER / "tiny-text"}
