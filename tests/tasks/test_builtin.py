"""The built-in fixtures are what they say they are."""

import json
from pathlib import Path

from tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from tasks.builtin.make_mmlu_mini import read_questions
from tasks.checkpoint import read_config, read_headers


def test_mmlu_mini_has_lm_evals_57_subjects_with_balanced_answers() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    subjects = {path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml")}
    questions = read_questions()
    assert len(subjects) == 57
    assert set(questions) == subjects
    texts = set()
    for subject, splits in questions.items():
        assert sorted(question["answer"] for question in splits["test"]) == [0, 1, 2, 3], subject
        assert len(splits["dev"]) == 2, subject
        for question in splits["test"] + splits["dev"]:
            assert len(set(question["choices"])) == 4, question
            texts.add((question["question"], *question["choices"]))
    assert len(texts) == 57 * 6


def test_mmlu_minis_parquet_files_hold_the_written_questions() -> None:
    import pyarrow.parquet

    for subject, splits in read_questions().items():
        for split, questions in splits.items():
            path = BUILTIN_BENCHMARKS["mmlu-mini"] / subject / f"{split}-00000-of-00001.parquet"
            expected = [{"subject": subject, **question} for question in questions]
            assert pyarrow.parquet.read_table(path).to_pylist() == expected, (subject, split)


def test_tiny_gemma3_keeps_the_difficulties_of_the_4b_model() -> None:
    path = BUILTIN["tiny-gemma3"]
    config = read_config(path)
    text, vision = config["text_config"], config["vision_config"]
    assert sum(file.stat().st_size for file in path.iterdir()) <= 3_000_000
    assert not any(name.endswith("lm_head.weight") for name in read_headers(path))
    assert {"sliding_attention", "full_attention"} == set(text["layer_types"])
    assert text["head_dim"] != text["hidden_size"] / text["num_attention_heads"]
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert vision["intermediate_size"] % 32
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [1, 6]
