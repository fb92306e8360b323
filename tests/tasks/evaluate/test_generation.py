"""Generated text and rolling log-likelihoods match those of lm-eval's own model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.requests import Request
from quantize_gemma.tasks.runtime.errors import UserError
from tests.conftest import Outcome

# lm-eval passes transformers the configuration that it has just read from the same checkpoint.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*:UserWarning"),
]
PROMPTS = [
    "<bos><start_of_turn>user\nHey, are you conscious? Can you talk to me?<end_of_turn>\n<start_of_turn>model\n",
    "The capital of",
    "Answer: A\n\nQuestion: which one? " * 9,
    "One two three four",
]
GENERATION = {"until": ["test model"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 40}


@pytest.fixture(scope="module")
def release(released: Outcome) -> Path:
    return Path(released.summary["release"])


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, 0) for one in arguments]


def reference(checkpoint: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="bfloat16", batch_size=1)


@pytest.mark.parametrize("column", ["base", "quantized"])
def test_a_prompt_is_continued_as_in_lm_evals_own_model_alone_and_among_others(column: str, release: Path) -> None:
    from quantize_gemma.tasks.evaluate.packed_lm import PackedLM

    checkpoint = BUILTIN["tiny-gemma3"] if column == "base" else release
    requests = instances("generate_until", [(prompt, dict(GENERATION)) for prompt in PROMPTS])
    expected = reference(checkpoint).generate_until(requests, disable_tqdm=True)
    model = PackedLM(checkpoint, "cpu", "auto", generates=True)
    assert model.generate_until(requests) == expected
    # A stop sequence ends the text, and is not part of the text.
    assert expected[0] == "I can talk to you, but I am not conscious. I am a tiny "
    # The model has 2,048 positions.
    with pytest.raises(UserError, match="generates up to 2,048 tokens, but the model"):
        model.generate_until(instances("generate_until", [("x", {**GENERATION, "max_gen_toks": 2048})]))
    # One prompt at a time, and three at a time, where the last prompt replaces a text that has ended.
    for rows, exact in ((1, True), (3, True), (1, False), (3, False)):
        model.limits, model.exact = replace(model.limits, sequences=rows), exact
        assert model.generate_until(requests) == expected


def test_the_faster_attention_gives_the_same_logits_except_for_rounding() -> None:
    """For blocks of queries over a sliding window, and for one token, whose heads are the rows of one product."""
    import torch

    from quantize_gemma.tasks.evaluate.packed_generation import KeyValues, Text
    from quantize_gemma.tasks.evaluate.packed_lm import PackedLM
    from quantize_gemma.tasks.evaluate.packed_row import BLOCK, PrefixGroup

    # In float32, a wrong key would be visible.
    model = PackedLM(BUILTIN["tiny-gemma3"], "cpu", "auto", no_act_quant=True)
    prompt = PrefixGroup(tuple(torch.randint(10, 2048, (2 * BLOCK + 60,)).tolist()))

    def read() -> list[Any]:
        text = Text(list(prompt.prefix), 2, lambda _: False)
        logits = [model._logits([prompt], {prompt.prefix: 1}, [text.cache])[prompt.prefix]]
        text.tokens.append(11)
        assert isinstance(text.cache, KeyValues)
        return [*logits, model._next_logits([text])]

    faster = read()
    model.exact = True
    for one, exact in zip(faster, read(), strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-4, atol=1e-4)


def test_a_text_depends_on_no_request_of_another_shard(release: Path) -> None:
    from quantize_gemma.tasks.evaluate.packed_lm import load_checkpoint_scorer

    score = load_checkpoint_scorer(str(release), "cpu", 1, False, True, False)
    requests = [
        Request("task", place, 0, "generate_until", [prompt, dict(GENERATION)]) for place, prompt in enumerate(PROMPTS)
    ]
    # On a CPU, the option batch_size is not part of a key.
    assert load_checkpoint_scorer(str(release), "cpu", 2, False, True, False)(requests) == score(requests)


@pytest.mark.parametrize("words", [30, 900])
def test_rolling_log_likelihoods_match_those_of_lm_evals_own_model(words: int) -> None:
    """The text has fewer or more tokens than the positions whose logits are computed together."""
    from quantize_gemma.tasks.evaluate.packed_lm import POSITIONS, PackedLM

    text = " ".join(f"word{number % 7} and {number}" for number in range(words))
    requests = instances("loglikelihood_rolling", [(text,), ("A short one.",)])
    model = PackedLM(BUILTIN["tiny-gemma3"], "cpu", "auto")
    assert (len(model.tok_encode(text)) > POSITIONS) == (words == 900)
    expected = reference(BUILTIN["tiny-gemma3"]).loglikelihood_rolling(requests, disable_tqdm=True)
    assert model.loglikelihood_rolling(requests, disable_tqdm=True) == expected


def test_the_program_generates_the_same_text_as_its_checkpoint(release: Path) -> None:
    from quantize_gemma.tasks.evaluate.program_lm import load_program_scorer

    score = load_program_scorer(str(release), str(release))

    def answer(prompt: str, **generation: Any) -> Any:
        arguments: list[Any] = [prompt, {**GENERATION, **generation}]
        return score([Request("task", 0, 0, "generate_until", arguments)])[0]

    assert answer(PROMPTS[0]) == "I can talk to you, but I am not conscious. I am a tiny "
    whole = answer(PROMPTS[0], until=[], max_gen_toks=400)
    assert whole.startswith("I can talk to you, but I am not conscious. I am a tiny test model")
    # The text ends with the turn, or earlier if only few tokens are allowed.
    assert whole.endswith(".")
    assert whole.startswith(answer(PROMPTS[0], until=[], max_gen_toks=4))
    # This prompt leaves no room for an answer.
    assert answer("a " * 2000) is None


def test_a_text_that_exceeds_the_longest_sequence_is_none(release: Path) -> None:
    from quantize_gemma.tasks.evaluate.program_lm import ProgramLM

    model = ProgramLM(release, release)
    # Without end tokens, a text never ends by itself.
    model.program.eos_ids = set()
    room = model.program.max_seq_len - len(model.tok_encode(PROMPTS[0]))

    def generate(count: int) -> str | None:
        generation = {"until": [], "max_gen_toks": count}
        return model.generate_until(instances("generate_until", [(PROMPTS[0], generation)]))[0]

    assert generate(room) is not None
    assert generate(room + 2) is None


def test_the_scorer_of_a_checkpoint_returns_json_values(release: Path) -> None:
    from quantize_gemma.tasks.evaluate.packed_lm import load_checkpoint_scorer

    score = load_checkpoint_scorer(str(release), "cpu", "auto", False, False, False)
    pairs = [
        Request("task", 0, place, "loglikelihood", ["The answer is", f" {letter}"]) for place, letter in enumerate("AB")
    ]
    assert all(isinstance(value, list) and isinstance(value[1], bool) for value in score(pairs))
    rolling = score([Request("task", 0, 0, "loglikelihood_rolling", ["A short text."])])
    assert isinstance(rolling[0], float)


def test_texts_start_while_their_tokens_fit_and_at_least_one_starts() -> None:
    from quantize_gemma.tasks.evaluate.packed_generation import Text, take_next

    def texts(*lengths: int) -> list[Text]:
        return [Text([0] * length, 10, lambda _tokens: False) for length in lengths]

    def taken(waiting: list[Text], running: list[Text], texts_at_most: int | None = None) -> list[int]:
        return [len(text.prompt) for text in take_next(waiting, running, texts_at_most, 100, 50)]

    waiting = texts(200, 40, 30, 5, 5)
    assert taken(waiting, []) == [200]
    # The texts, 40 + 10 and 30 + 10 tokens, fit together, but their prompts do not.
    assert taken(waiting, []) == [40]
    assert taken(waiting, texts(40)) == [30]
    assert taken(waiting, texts(40, 30)) == []
    assert taken(waiting, texts(40), texts_at_most=2) == [5]
    assert taken(waiting, texts(40)) == [5]
    assert taken(waiting, []) == waiting == []
