"""The card and its charts show what was measured, and nothing else."""

import copy
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from quantize_gemma.tasks.card import check_front_matter, read_loading_environments, render
from quantize_gemma.tasks.card.chart import (
    charts,
    compare_subjects,
    draw_kl_histogram,
    draw_output_error,
    draw_subjects,
)
from quantize_gemma.tasks.card.eval_results import eval_results
from quantize_gemma.tasks.card.front_matter import as_yaml, front_matter
from quantize_gemma.tasks.gate.checks import judge
from quantize_gemma.tasks.gate.metrics import check_devices, collect_pairs, pair_outcomes, read_outcomes
from quantize_gemma.tasks.models.license import clean_license
from quantize_gemma.tasks.models.metrics import SCHEMA, json_schema, parse_metrics, to_json
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.models.tables import quality_rows
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import versions
from tests.cards import PLACES, faults, markdown_texts
from tests.compatibility.loading import CARD
from tests.conftest import Outcome
from tests.flows.test_run import metrics_of
from tests.metrics import DIVERGENCE, MMLU, example_json, example_metrics, with_subjects

CHART = "mmlu-by-subject.png"


@pytest.fixture
def measured(released: Outcome) -> dict[str, Any]:
    return copy.deepcopy(metrics_of(released))


def card(metrics: dict[str, Any]) -> str:
    return render(parse_metrics(metrics), load_recipe("HQQ-INT8-INT4"), {})


def quality(metrics: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {row["metric"]: row for row in quality_rows(parse_metrics(metrics))}


def judge_again(metrics: dict[str, Any]) -> None:
    parsed = parse_metrics(metrics)
    metrics["gate"] = to_json(judge(parsed.benchmarks, parsed, parsed.pairs, parsed.gate.limits))


def table_row(text: str, first: str) -> list[str]:
    """Return the cells of the only table row that starts with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def add_chartqa(metrics: dict[str, Any]) -> None:
    for column, value in (("base", 0.5), ("quantized", 0.42)):
        score = {"value": value, "stderr": 0.01, "samples": 2500}
        further = {"relaxed_human": score, "relaxed_augmented": score}
        further["normalized_overall"] = {"value": value + 0.1, "stderr": 0.012, "samples": 2500}
        task = {"task": "chartqa", "metric": "relaxed_overall", "groups": {}, "tasks": {}}
        metrics[column]["chartqa"] = {**MMLU, **score, **task, "metrics": further}
    metrics["pairs"]["chartqa"] = {"both": 950, "first": 300, "second": 100, "neither": 1150}
    judge_again(metrics)


def test_every_score_has_its_column_its_standard_error_and_its_number_of_questions(measured: dict[str, Any]) -> None:
    measured["quantized"]["mmlu"] |= {"value": 0.9, "stderr": 0.0199}
    measured["quantized"]["mmlu"]["groups"]["stem"] = {"value": 0.8, "stderr": 0.05, "samples": None}
    measured["program"]["mmlu"] |= {"value": 0.75, "stderr": 0.0435}
    text = card(measured)
    assert table_row(text, "MMLU, 228 samples")[1:] == ["100.00 ± 0.00", "90.00 ± 1.99", "—"]
    assert table_row(text, "MMLU, stem")[1:] == ["100.00 ± 0.00", "80.00 ± 5.00", "—"]
    assert table_row(text, "MMLU, the program's 100 samples")[1:] == ["—", "100.00 ± 0.00", "75.00 ± 4.35"]
    rows = quality(measured)
    assert rows["MMLU, the program's 100 samples"]["program"] == "75.00 ± 4.35"
    assert rows["MMLU, the program's 100 samples"]["base"] == "—"


def test_the_distance_from_the_base_model_has_a_table_and_the_card_says_why_a_release_fails(
    measured: dict[str, Any],
) -> None:
    text = card(measured)
    section = text[text.index("\n# Distance from the base model\n") :]
    first = section[section.index("\n| ") :].split("\n\n")[0].strip().splitlines()
    assert (
        first[0] == "| measurement | KL, nats | KL p99 | same top, % | perplexity | base perplexity | tokens | gate |"
    )
    assert [line.split("|")[1].strip() for line in first[2:]] == ["as shipped", "program", "weights only", "chat"]
    assert first[2].endswith("| 7,154 | KL ≤ 0.25: pass, same top ≥ 70: pass |")
    assert "fails the gate" not in text
    measured["quantized"]["fidelity"] |= {"kl_mean": 0.464, "kl_mean_stderr": 0.013}
    judge_again(measured)
    text = card(measured)
    assert "| as shipped | 0.4640 ± 0.0130 |" in text
    assert "KL ≤ 0.25: fail" in text
    reason = "- on 7,154 tokens of text, the KL divergence from the base model is 0.4640 nats (limit ≤ 0.25): fail"
    assert text.index("**This release fails the gate and is not published:**") < text.index(reason)


def render_example(task: str, recipe: str) -> str:
    """Return the card of a release with this recipe, for a text-only or a multimodal model."""
    measured = example_json()
    measured["program"]["task"] = task
    return render(parse_metrics(measured), load_recipe(recipe), {})


def test_a_text_only_models_card_says_nothing_about_a_vision_tower() -> None:
    assert "; 8-bit vision tower. This repository" in render_example("multimodal-text-to-text", "GPTQ-INT8-INT4")
    assert "vision tower" not in render_example("multimodal-text-to-text", "HQQ-INT8-INT4")
    for recipe in ("GPTQ-INT8-INT4", "DISTILL-INT8-INT4-HEAD8", "EXACT", "HQQ-INT8-INT4"):
        text = render_example("text-generation", recipe)
        assert "vision tower" not in text
        assert "fc2" not in text
        assert "position_embedding" not in text


def test_only_a_language_model_on_its_grid_is_called_lossless() -> None:
    measured = example_json()
    assert "ossless" not in card(measured)
    measured["quantized"]["lossless"] = True
    assert "- **Lossless:** every quantized weight of the language model equals" in card(measured)
    assert "vision tower" not in card(measured)
    measured["program"]["task"] = "multimodal-text-to-text"
    assert "the checkpoint's dtype. This does not apply to the vision tower." in card(measured)


def test_the_histogram_is_as_high_as_the_share_of_the_tokens(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    def height(counts: list[int]) -> int:
        measured = example_json()
        measured["quantized"]["fidelity"] |= {
            "tokens": sum(counts),
            "kl_histogram": {"edges": [0.0, 1e-5, 1e-3, 1e-1, 100.0], "counts": counts},
        }
        for one in (measured["quantized"]["fidelity"]["weights_only"], measured["program"]["fidelity"]):
            one |= {"tokens": 10, "kl_histogram": {"edges": [0.0, 1e-5, 1e-3, 1e-1, 100.0], "counts": [0, 0, 0, 10]}}
        draw_kl_histogram(parse_metrics(measured), tmp_path / "kl.png")
        with Image.open(tmp_path / "kl.png") as image:
            shipped = (np.asarray(image.convert("RGB")) == (0xD5, 0x5E, 0x00)).all(-1)
        # Leave out the legend and the line at the mean.
        rows = np.flatnonzero(shipped[200:, :400].sum(1) > 20)
        return int(rows.max() - rows.min())

    half, whole = height([0, 50, 50, 0]), height([0, 100, 0, 0])
    assert half == pytest.approx(whole / 2, abs=4)


def test_a_change_without_a_standard_error_is_not_significant() -> None:
    metrics = parse_metrics(with_subjects({"anatomy": (1.0, 0.0), "virology": (1.0, 0.5)}, samples=2))
    anatomy, virology = compare_subjects(metrics, "mmlu")
    assert (anatomy.change, anatomy.error, anatomy.is_significant) == (-100.0, None, False)
    assert virology.error == pytest.approx(100 * 1.96 * (0.5 * 0.5 / 2) ** 0.5)


def test_scores_of_different_devices_are_not_compared() -> None:
    metrics = example_metrics()
    check_devices(metrics.base, metrics.quantized)
    score = metrics.quantized.scores["mmlu"]
    assert score is not None
    on_gpu = replace(metrics.quantized, scores={"mmlu": replace(score, device="cuda")})
    with pytest.raises(StageFailed, match="on cpu for the base model and on cuda for the checkpoint: use one device"):
        check_devices(metrics.base, on_gpu)


def test_the_json_schema_is_current_and_a_release_validates(released: Outcome) -> None:
    assert SCHEMA.read_text() == json_schema(), "run python -m quantize_gemma.tasks.models.metrics"
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for content in (metrics_of(released), example_json()):
        validator.validate(content)
        assert to_json(parse_metrics(content)).keys() == content.keys()
        assert not validator.is_valid({**content, "unknown": 1})
        assert not validator.is_valid({**content, "schema_version": 1})
    # The card names the schema's path.
    assert "tasks/models/metrics.schema.json" in (Path(released.summary["release"]) / "README.md").read_text()


@pytest.mark.parametrize("missing", [(), ("base",), ("quantized",), ("base", "quantized", "program")])
def test_any_score_may_be_missing_and_is_a_dash(missing: tuple[str, ...], tmp_path: Path) -> None:
    measured = example_json()
    for column in missing:
        measured[column]["mmlu"] = None
    text = card(measured)
    if "base" in missing and "quantized" in missing:
        assert "| MMLU, 14,042 samples" not in text
    else:
        cells = ["—" if column in missing else "90.00 ± 1.00" for column in ("base", "quantized")]
        assert table_row(text, "MMLU, 14,042 samples")[1:] == [*cells, "—"]
        assert table_row(text, "MMLU, stem")[1:] == [*cells, "—"]
    assert ("a fixed sample of" in text) == ("program" not in missing)
    assert (CHART in text) == (not missing)
    assert ("multiple-choice" in text) == ("quantized" not in missing)
    assert charts(parse_metrics(measured)) == ({} if set(missing) & {"base", "quantized"} else {"mmlu": CHART})
    if "base" not in missing:
        assert quality(measured)["MMLU, 14,042 samples"]["base"] == "90.00 ± 1.00"


def test_the_hubs_client_reads_a_result_of_every_benchmark_that_has_a_dataset_on_the_hub() -> None:
    from huggingface_hub import parse_eval_result_entries

    measured = example_json()
    # Read as a float or a date, a commit would change.
    measured["benchmarks"]["mmlu"]["dataset"]["revision"] = "12e34"
    files = eval_results(parse_metrics(measured))
    assert list(files) == [".eval_results/mmlu.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(as_yaml(files[".eval_results/mmlu.yaml"])))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("cais/mmlu", "mmlu", "12e34")
    assert entry.value == 90.0
    assert entry.notes == "acc of HQQ-INT8-INT4, zero-shot, lm-eval 0.4.13, standard error 1.00"
    measured["benchmarks"]["mmlu"]["dataset"]["name"] = "mirror"
    assert eval_results(parse_metrics(measured)) == {}


@pytest.mark.parametrize("part", ["fixture", "limit", "quantized"])
def test_a_fixture_a_part_of_a_dataset_and_missing_scores_are_not_evaluation_results(part: str) -> None:
    measured = example_json()
    if part == "fixture":
        measured["benchmarks"]["mmlu"]["dataset"]["fixture"] = True
    elif part == "limit":
        measured["quantized"]["mmlu"]["limit"] = 50
    else:
        measured["quantized"]["mmlu"] = None
    assert eval_results(parse_metrics(measured)) == {}


def test_the_metadata_says_how_many_samples_a_score_on_a_part_of_a_dataset_has() -> None:
    measured = example_json()

    def metric() -> str:
        (result,) = front_matter(parse_metrics(measured))["model-index"][0]["results"]
        return result["metrics"][0]["name"]

    assert metric() == "acc"
    measured["quantized"]["mmlu"] |= {"limit": 50, "samples": 2850}
    assert metric() == "acc, 2,850 samples"


def test_a_card_names_the_samples_of_the_column_that_its_table_does_not_have() -> None:
    measured, recipe = example_json(), load_recipe("HQQ-INT8-INT4")
    sizes = {"samples/mmlu_base.jsonl": 1}
    assert "column of the table, and one for the checkpoint in float32 without activation quantization" in render(
        parse_metrics(measured), recipe, sizes
    )
    measured["program"]["mmlu"] |= {"differing": None, "agreement_act_quant": None}
    assert "one file for each benchmark and column of the table." in render(parse_metrics(measured), recipe, sizes)


def test_a_card_without_chartqa_does_not_mention_it(measured: dict[str, Any]) -> None:
    del measured["benchmarks"]["chartqa"]
    for column in ("base", "quantized", "program"):
        del measured[column]["chartqa"]
    del measured["pairs"]["chartqa"]
    judge_again(measured)
    assert "ChartQA" not in card(measured)
    assert "visual-question-answering" not in card(measured)
    assert not any("ChartQA" in row["metric"] for row in quality_rows(parse_metrics(measured)))


def test_agreement_is_shown_next_to_the_activation_quantization_baseline(measured: dict[str, Any]) -> None:
    assert "gives the same answer as the checkpoint to 100 of 100 questions" in card(measured)
    assert "the program and the checkpoint answer differently" not in card(measured)
    answer = {"answer": "B", "margin": 0.25}
    disagreement = {"task": "anatomy", "doc_id": 1, "prompt": "?", "target": "B"}
    disagreement |= {"checkpoint": answer, "no_act_quant": answer, "program": {"answer": "D", "margin": 1.5}}
    measured["program"]["mmlu"] |= {"agreement": 0.97, "agreement_act_quant": 0.96, "disagreements": [disagreement] * 3}
    text = " ".join(card(measured).split())
    assert "gives the same answer as the checkpoint to 97 of 100 questions" in text
    assert (
        "the checkpoint gives the same answer with and without activation quantization to 96 of 100 questions" in text
    )
    assert "The questions that the program and the checkpoint answer differently are in `metrics.json`" in text
    rows = quality(measured)
    assert rows["MMLU, same answers as the checkpoint, %"]["program"] == "97.0"
    assert rows["MMLU, same answers as without activation quantization, %"]["quantized"] == "96.0"


def test_chartqa_has_its_rows_where_it_was_measured(measured: dict[str, Any]) -> None:
    add_chartqa(measured)
    text = card(measured)
    for part in ("2,500 samples", "human", "augmented"):
        assert table_row(text, f"ChartQA, {part}")[1:] == ["50.00 ± 1.00", "42.00 ± 1.00", "—"]
    assert table_row(text, "ChartQA, normalized")[1:] == ["60.00 ± 1.20", "52.00 ± 1.20", "—"]
    assert table_row(text, "chartqa drop")[1:3] == ["8.00 ± 0.78", "≤ 10"]
    rows = quality(measured)
    assert rows["ChartQA, human"] == {
        "metric": "ChartQA, human",
        "base": "50.00 ± 1.00",
        "quantized": "42.00 ± 1.00",
        "program": "—",
    }


def test_the_gates_checks_are_on_the_card_and_low_confidence_is_explained(measured: dict[str, Any]) -> None:
    text = card(measured)
    assert table_row(text, "mmlu drop")[1:] == ["0.00 ± 0.43", "≤ 5", "5", "over 99.9%", "pass"]
    assert table_row(text, "program kl image")[4:] == ["", "pass"]
    assert "low confidence" not in text
    measured["pairs"]["mmlu"] = {"both": 20, "first": 0, "second": 0, "neither": 0}
    judge_again(measured)
    text = card(measured)
    assert table_row(text, "mmlu drop")[1:] == ["0.00 ± 4.55", "≤ 5", "5", "86.4%", "pass (low confidence)"]
    assert "passes with low confidence" in text


def test_the_current_loading_code_ran_with_the_installed_libraries_and_with_others() -> None:
    record = json.loads((CARD / "loads_in.json").read_text())
    template = hashlib.sha256((CARD / "loading.py.j2").read_bytes()).hexdigest()
    assert record["snippet_sha256"] == template, "the loading code has changed since it was run: make compatibility"
    installed = versions(("torch", "torchao", "transformers"))
    pinned, newest = read_loading_environments()
    assert pinned.items() >= installed.items(), "the loading code did not run with these versions: make compatibility"
    assert newest["transformers"] != pinned["transformers"]


def test_card_and_metrics_name_the_versions_that_the_loading_code_ran_with(measured: dict[str, Any]) -> None:
    assert measured["loads_in"] == read_loading_environments()
    measured["loads_in"] = [{"python": "3.11.1", "torch": "1.0", "torchao": "2.0", "transformers": "3.0"}]
    assert "with each of these sets of versions" in card(measured)
    assert [line for line in card(measured).splitlines() if line.startswith("- transformers ")] == [
        "- transformers 3.0, torch 1.0, torchao 2.0"
    ]


def test_a_questions_outcomes_are_paired_by_question_not_by_position(tmp_path: Path) -> None:
    def evaluated(name: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    one = [{"task": "a", "doc_id": n, "score": float(n == 1)} for n in range(4)]
    other = [{"task": "a", "doc_id": n, "score": 1.0} for n in (3, 1, 0, 2)]
    before, after = (read_outcomes(evaluated(name, rows)) for name, rows in (("one", one), ("other", other)))
    assert pair_outcomes(before, after) == {"both": 1, "first": 0, "second": 3, "neither": 0}
    with pytest.raises(AssertionError, match="different questions"):
        pair_outcomes(before, {**after, "a 4": True})
    # A score that is neither correct nor incorrect has no outcome.
    assert read_outcomes(evaluated("parts", [{"task": "a", "doc_id": 0, "score": 0.5}])) is None
    assert read_outcomes(evaluated("none", [{"task": "a", "doc_id": 0, "score": None}])) is None
    assert collect_pairs({}, ["mmlu"]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "ACME: terms",
        "a\nlicense: mit",
        "a\n---\n# b",
        "```\n````\n# a",
        "a | b",
        "# a",
        "1. a",
        "\u00ad# a",
        "<img src=x onerror=a>",
        "[a](javascript:b)",
        "*a* _b_ `c` ~~d~~ $$e$$",
        "see https://a.b/c, WWW.a.b and http://",
        '" + evil() + r"\\',
        "\\",
        "12e34",
        "\x1b[31m\ud800\u202e",
        "\x85",
    ],
)
def test_no_text_changes_a_cards_metadata_its_structure_or_its_programs(text: str, measured: dict[str, Any]) -> None:
    assert faults(parse_metrics(measured), dict.fromkeys(PLACES, text)) == []
    assert (
        faults(parse_metrics(measured), dict.fromkeys(PLACES, text) | {"license": "other", "license_name": text}) == []
    )


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.fixed_dictionaries({place: markdown_texts() for place in PLACES}))
def test_no_random_texts_change_a_cards_structure(texts: dict[str, str], released: Outcome) -> None:
    assert faults(parse_metrics(metrics_of(released)), texts) == []


def test_a_calibration_dataset_on_the_hub_is_in_the_metadata_and_a_text_file_is_not(measured: dict[str, Any]) -> None:
    counts = {"sequences": 64, "answers": 0, "length": 512, "tokens": 32768}
    for name, expected in (("Salesforce/wikitext", ["Salesforce/wikitext"]), ("notes.txt", None)):
        dataset = {"name": name, "revision": "a" * 40, "fixture": False}
        text = card({**measured, "calibration": {"dataset": dataset, **counts}})
        assert yaml.safe_load(text.split("---")[1]).get("datasets") == expected


def test_the_card_starts_with_a_summary_of_quality_size_and_speed(measured: dict[str, Any]) -> None:
    summary = card(measured).split("\n# Running with transformers\n")[0]
    measurements = ("KL divergence from the base model, nats", "same top token as the base model")
    for row in ("size", *measurements, "speed, tokens/s"):
        assert f"| {row} |" in summary, row
    for benchmark in measured["benchmarks"].values():
        assert f"| {benchmark['title']} |" in summary
    measured["program"]["threads"] = 1
    assert ", with 1 thread.\n" in card(measured)


def test_text_that_is_a_number_in_yaml_1_2_stays_text(measured: dict[str, Any]) -> None:
    measured["benchmarks"]["mmlu"]["dataset"]["revision"] = "12e34"
    assert 'revision: "12e34"' in card(measured)


@pytest.mark.parametrize(
    ("fields", "cleaned"),
    [
        ({"license": "gemma"}, {"license": "gemma"}),
        ({"license": ["mit", "gemma"]}, {}),
        ({"license": "gemma\nbase_model: a/b"}, {}),
        ({"license_name": "no license"}, {}),
        ({"license": "other", "license_name": "ACME: terms"}, {"license": "other", "license_name": "ACME: terms"}),
        ({"license": "other", "license_name": "a\nb"}, {"license": "other"}),
        ({"license": "other", "license_name": 5}, {"license": "other"}),
        ({"license": "other", "license_link": "LICENSE.md"}, {"license": "other", "license_link": "LICENSE.md"}),
        ({"license": "other", "license_link": "https://a.b/c"}, {"license": "other", "license_link": "https://a.b/c"}),
        *(
            ({"license": "other", "license_link": link}, {"license": "other"})
            for link in (
                "javascript:alert(1)",
                "JavaScript:alert(1)",
                "data:text/html,x",
                "https://a.b/ c",
                "https://",
                "https://user:password@a.b/c",
                "https://[a",
                "../secrets",
                "LICENSE) [x](javascript:y)",
            )
        ),
        (None, {}),
        ({}, {}),
    ],
)
def test_only_well_formed_license_fields_are_passed_on(fields: Any, cleaned: dict[str, str]) -> None:
    assert clean_license(fields) == cleaned


def test_special_characters_in_the_license_link_are_escaped(measured: dict[str, Any]) -> None:
    measured["license"] = {"license": "other", "license_link": "https://a.b/c_(d)?e=f&copy;g"}
    assert "[terms](https://a.b/c_%28d%29?e=f&amp;copy;g)" in card(measured)


def test_a_card_whose_metadata_reads_back_differently_fails(measured: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card(measured))
    check_front_matter(tmp_path / "README.md", parse_metrics(measured))
    with pytest.raises(StageFailed, match="differs from what was written"):
        check_front_matter(tmp_path / "README.md", parse_metrics({**measured, "base_model": "another"}))


def draw(metrics: dict[str, Any], path: Path) -> list[str]:
    """Draw the chart by subject as an SVG; return its texts, which matplotlib writes as comments."""
    draw_subjects(parse_metrics(metrics), "mmlu", path)
    return re.findall(r"<!-- (.*) -->", path.read_text(encoding="utf-8"))


def many_subjects(moved: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return 57 subjects with different scores; those in `moved` change by that much, and all others by one point."""
    scores = {f"subject_{number}": 0.3 + 0.01 * number for number in range(57)}
    return {name: (score, score + moved.get(name, -0.01)) for name, score in scores.items()}


def test_a_chart_of_many_subjects_names_those_that_changed_by_more_than_the_error(tmp_path: Path) -> None:
    # With 100 questions per subject, half of them correct, the margin of error is 14 points.
    moved = {"subject_20": -0.2, "subject_30": 0.18, "subject_40": -0.25, "subject_10": 0.1}
    shown = draw(with_subjects(many_subjects(moved)), tmp_path / "chart.svg")
    assert [text for text in shown if re.match("subject|[+−]", text)] == [
        *("subject 40", "−25.0", "subject 20", "−20.0", "subject 30", "+18.0"),
    ]
    assert {
        *("MMLU by subject", "3 of 57 changed by more than the margin of error", "chance", "change, points"),
        *("tiny, base", "HQQ-INT8-INT4, quantized", "margin of error of the change, 95%", "accuracy, %"),
    } <= set(shown)


def test_a_chart_of_57_subjects_fits_on_a_phone_however_many_changed(tmp_path: Path) -> None:
    from PIL import Image

    metrics = with_subjects(many_subjects({f"subject_{number}": -0.2 - 0.001 * number for number in range(30)}))
    shown = draw(metrics, tmp_path / "chart.svg")
    assert "30 of 57 changed by more than the margin of error" in shown
    assert [text for text in shown if text.startswith("subject")] == [f"subject {n}" for n in range(29, 21, -1)]
    assert "largest changes, points" in shown
    draw_subjects(parse_metrics(metrics), "mmlu", tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert (image.width, image.height <= 1450) == (800, True)


def test_a_chart_of_few_subjects_names_all(tmp_path: Path) -> None:
    shown = draw(with_subjects({"anatomy": (0.6, 0.61), "virology": (0.5, 0.2)}), tmp_path / "two.svg")
    assert "1 of 2 changed by more than the margin of error" in shown
    assert [text for text in shown if re.match("anatomy|virology|[+−]", text)] == [
        "virology",
        "−30.0",
        "anatomy",
        "+1.0",
    ]
    metrics = with_subjects({"anatomy": (0.6, 0.2)})
    for column in ("base", "quantized"):
        # A single question has no standard error, so it is unknown whether the change is significant.
        metrics[column]["mmlu"]["tasks"]["anatomy"]["stderr"] = None
    shown = draw(metrics, tmp_path / "one.svg")
    assert {"0 of 1 changed by more than the margin of error", "anatomy", "−40.0"} <= set(shown)


def test_dots_are_at_the_scores_and_bars_are_as_wide_as_the_error(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    metrics = with_subjects({"anatomy": (0.5, 0.7), "virology": (0.9, 0.3)})
    draw_subjects(parse_metrics(metrics), "mmlu", tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        pixels = np.asarray(image.convert("RGB"))[268:]

    def rows(color: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Return the first and the last column with this color, for each of the two subjects."""
        same = (pixels == color).all(-1)
        # Ignore single pixels with this color at the edges of letters.
        same[same.sum(1) < 3] = False
        colored = np.flatnonzero(same.any(1))
        upper, lower = np.split(same, [int(colored.mean())])
        columns = [np.flatnonzero(part.any(0)) for part in (upper, lower)]
        return [(int(one.min()), int(one.max())) for one in columns]

    base, quantized = ([np.mean(row) for row in rows(color)] for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)))
    # Virology comes first; the scale is in pixels per point.
    point = (base[0] - base[1]) / 40
    assert point > 5
    assert quantized[0] == pytest.approx(base[0] - 60 * point, abs=2)
    assert quantized[1] == pytest.approx(base[1] + 20 * point, abs=2)
    errors = [196 * (0.9 * 0.1 / 100 + 0.3 * 0.7 / 100) ** 0.5, 196 * (0.25 / 100 + 0.7 * 0.3 / 100) ** 0.5]
    bars = rows((0xDD, 0xDD, 0xDD))
    # Scores end at 100%.
    assert bars[0] == pytest.approx((base[0] - errors[0] * point, base[0] + 10 * point), abs=3)
    assert bars[1] == pytest.approx((base[1] - errors[1] * point, base[1] + errors[1] * point), abs=3)


def test_a_name_with_dollar_signs_is_drawn_as_text(tmp_path: Path) -> None:
    metrics = with_subjects({"$x^$_{": (0.6, 0.2)}) | {"base_model": "team/$x^$_{", "recipe": "$\\frac$"}
    assert {"$x^$_{, base", "$\\frac$, quantized", "$x^$ {"} <= set(draw(metrics, tmp_path / "chart.svg"))


def test_a_users_matplotlib_settings_do_not_change_a_chart(tmp_path: Path) -> None:
    from matplotlib import rc_context

    metrics = example_json()
    metrics["quantized"]["output_error"] = {"model.layers.0.mlp.up_proj": 0.01, "model.layers.1.mlp.up_proj": 0.02}

    def charts_of(folder: Path) -> list[bytes]:
        folder.mkdir()
        parsed = parse_metrics(metrics)
        draw_subjects(parsed, "mmlu", folder / "subjects.png")
        draw_kl_histogram(parsed, folder / "kl.png")
        draw_output_error(parsed, folder / "error.png")
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    before = charts_of(tmp_path / "before")
    with rc_context({"axes.facecolor": "red", "font.size": 20, "savefig.facecolor": "black", "lines.linewidth": 9}):
        assert charts_of(tmp_path / "after") == before


@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_a_card_says_how_an_images_tokens_attend_and_what_causal_attention_changes(is_bidirectional: bool) -> None:
    metrics = example_json()
    metrics["program"]["bidirectional_images"] = is_bidirectional
    metrics["program"]["agreement"]["image"] = {**DIVERGENCE, "kl_causal_image": 1.5}
    text = card(metrics)
    assert ("With causal attention, the text after the image would have a KL divergence of 1.5" in text) == (
        is_bidirectional
    )
    assert ("in the program, attention is causal throughout" in text) == (not is_bidirectional)
    assert ("this causes a KL divergence of 1.5 nats" in text) == (not is_bidirectional)
