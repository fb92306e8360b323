"""The metrics of an example run, for tests that need no release."""

import copy
from typing import Any

from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.metrics import Metrics, parse_metrics

SCORE = {"value": 0.9, "stderr": 0.01, "samples": None}
MMLU = {
    **SCORE,
    "task": "mmlu",
    "task_version": "2",
    "num_fewshot": 0,
    "chat_template": False,
    "metric": "acc",
    "metrics": {},
    "samples": 14042,
    "groups": {"stem": SCORE},
    "tasks": {"anatomy": {**SCORE, "samples": 4}},
    "left_out": 0,
    "device": "cpu",
    "limit": None,
}
INFO = {
    **find_benchmark("mmlu").card_inputs(),
    "dataset": {"name": "cais/mmlu", "revision": "c" * 40, "fixture": False},
}
CHARTQA_INFO = {
    **find_benchmark("chartqa").card_inputs(),
    "dataset": {"name": "HuggingFaceM4/ChartQA", "revision": "d" * 40, "fixture": False},
}
RESPONSE = {"prompt": "Hey?", "response": "Hello."}
SPEED: dict[str, Any] = {
    "rounds": 2,
    "prompt_tokens": 20,
    "generated_tokens": 32,
    "load_seconds": 0.5,
    "first_token_seconds": 0.1,
    "prefill_tokens_per_second": 200.0,
    "decode_tokens_per_second": 12.5,
    "peak_rss_bytes": 10,
}
SAMPLE = {
    **MMLU,
    "samples": 100,
    "checkpoint": SCORE,
    "no_act_quant": SCORE,
    "agreement": 1.0,
    "agreement_act_quant": 1.0,
    "differing": {"both": 0, "first": 0, "second": 0, "neither": 100},
    "pairs": {"both": 90, "first": 0, "second": 0, "neither": 10},
    "disagreements": [],
}
DISTANCES = {
    "tokens": 5110,
    "windows": 10,
    "kl_max": 9.0,
    "kl_histogram": {"edges": [0.0, 1e-5, 0.1, 100.0], "counts": [110, 4000, 1000]},
}
for name, value, stderr in (
    ("kl_mean", 0.131, 0.005),
    ("kl_median", 0.05, 0.002),
    ("kl_90", 0.3, 0.01),
    ("kl_99", 1.2, 0.05),
    ("same_top", 0.779, 0.006),
    ("dp_mean", -0.01, 0.001),
    ("dp_rms", 0.09, 0.002),
    ("ppl", 31.03, 1.1),
    ("ppl_base", 27.58, 0.9),
    ("ppl_log_ratio", 0.118, 0.004),
):
    DISTANCES |= {name: value, f"{name}_stderr": stderr}
FIDELITY = {**DISTANCES, "weights_only": DISTANCES, "second_half": DISTANCES, "chat": None}
DIVERGENCE = {"tokens": 8, "kl_program": 0.0, "kl_act_quant": 0.03}
AGREEMENT = {
    **DIVERGENCE,
    "tokens": 128,
    "same_argmax": 1.0,
    "nll_checkpoint": 3.2,
    "nll_program": 3.2,
    "text_decoder": {"max": 0.02, "mean": 0.001},
    "prompts": {
        **DIVERGENCE,
        "lengths": [1016],
        "positions": {"kl_program": [0.0] * 8, "kl_act_quant": [0.03] * 8},
        "same_argmax": 1.0,
    },
}
METRICS: dict[str, Any] = {
    "schema_version": 2,
    "base_model": "team/tiny",
    "base_revision": "a" * 40,
    "license": {"license": "gemma"},
    "fixture_model": False,
    "text": {"name": "Salesforce/wikitext", "revision": "e" * 40, "fixture": False},
    "benchmarks": {"mmlu": INFO},
    "recipe": "HQQ-INT8-INT4",
    "recipe_hash": "b" * 64,
    "max_seq_len": 1024,
    "run_id": "c0ffee",
    "commands": {"run": "quantize-gemma run", "mmlu": "lm_eval --tasks mmlu"},
    "versions": {
        "lm-eval": "0.4.13",
        "torch": "2",
        "torchao": "0",
        "transformers": "5",
        "optimum-executorch": "1",
        "executorch": "1",
    },
    "loads_in": [],
    "pairs": {"mmlu": {"both": 90, "first": 0, "second": 0, "neither": 10}},
    "base": {"bytes": 1000, "mmlu": MMLU},
    "quantized": {
        "bytes": 500,
        "fidelity": FIDELITY,
        "weight_error": {"linear": 0.01},
        "lossless": False,
        "packed_bytes": 300_000,
        "output_error": None,
        "smoke": {**RESPONSE, "chat_template": True, "new_tokens": 2, "max_new_tokens": 64},
        "mmlu": MMLU,
    },
    "program": {
        "bytes": 400,
        "fidelity": {**DISTANCES, "checkpoint": DISTANCES},
        "task": "text-generation",
        "backend": "xnnpack",
        "dtype": "float32",
        "custom_sdpa": True,
        "custom_kv_cache": True,
        "kv_cache_dtype": "int8",
        "last_logits_only": True,
        "bidirectional_images": True,
        "delegation": {"forward": {"xnnpack": {"linear": 22}, "custom": {}, "portable": {}}},
        "text": RESPONSE,
        "image": None,
        "agreement": AGREEMENT,
        "runner": [{"name": "stop", "cases": 1, "failed": 0, "examples": []}],
        "processor": "A processor",
        "threads": 2,
        "speed": {"text": SPEED},
        "mmlu": SAMPLE,
    },
    "stages": {"quantize": {"seconds": 1.5, "peak_rss_bytes": 10, "bytes": 500}},
    "calibration": None,
    "distillation": None,
    "device_report": None,
    "gate": {"passed": True, "low_confidence": False, "limits": {}, "checks": []},
}


def example_json() -> dict[str, Any]:
    """Return a metrics.json that a test may change."""
    return copy.deepcopy(METRICS)


def example_metrics() -> Metrics:
    """Return the example's metrics.json as dataclasses."""
    return parse_metrics(METRICS)


def with_subjects(subjects: dict[str, tuple[float, float]], samples: int = 100) -> dict[str, Any]:
    """Return a metrics.json with these accuracies on MMLU, base and quantized, on `samples` questions each."""
    content = example_json()
    for index, column in enumerate(("base", "quantized")):
        scores = {name: pair[index] for name, pair in subjects.items()}
        tasks = {
            name: {"value": value, "stderr": (value * (1 - value) / samples) ** 0.5} for name, value in scores.items()
        }
        content[column]["mmlu"] = {**content[column]["mmlu"], "tasks": tasks}
    return content
