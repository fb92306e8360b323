"""What the C++ runner of phone apps makes of prompts, images and conversations, beside the program itself.

The runner must generate what the program generates in ExecuTorch's Python runtime, token for token. Each comparison
belongs to a named check of the gate. compare.py compares the logits behind the answers to text with the checkpoint's.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.models.chat import TEXT_PROMPT, has_chat_template
from quantize_gemma.tasks.models.checkpoint import end_token_ids
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.runner_checks import runner_checks
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.verify.image_inputs import image_segments, solid_image
from quantize_gemma.tasks.verify.long_prompts import ANSWER_TOKENS, make_prompt

if TYPE_CHECKING:
    from executorch.extension.llm.runner import MultimodalRunner, Stats, TextLLMRunner
    from pytorch_tokenizers import CppHFTokenizer
    from torch import Tensor

    from quantize_gemma.tasks.models.pte import PteProgram

# Tokens of the answer that fills the longest sequence.
FULL_TOKENS = 2
# Enough for a model that ends its turn at all to a short question.
TURN_TOKENS = 64


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and the program's greedy answer.

    Attributes:
        ids: The prompt's token ids, the BOS token included.
        answer: The answer's token ids.
        logits: The logits that chose them, [tokens, vocabulary].
    """

    ids: list[int]
    answer: list[int]
    logits: Tensor

    @property
    def answer_positions(self) -> list[int]:
        """The positions of prompt and answer whose logits choose the answer's tokens."""
        start = len(self.ids) - 1
        return list(range(start, start + len(self.answer)))


@dataclass(frozen=True)
class RunnerCheck:
    """What the runner was asked to do; see RUNNER_CHECKS.

    Attributes:
        name: The name of the check.
        cases: How often it was tried; 0 if the program's sequences are too short, or the model ends no turn.
        failures: What went wrong.
    """

    name: str
    cases: int
    failures: list[str]


@dataclass(frozen=True)
class Scenario:
    """A prompt for the runner.

    Attributes:
        checks: The checks that it belongs to.
        what: What it is, for messages.
        segments: Texts, and the pixels of images, [1, channels, height, width].
        max_new_tokens: The most tokens that are generated.
    """

    checks: tuple[str, ...]
    what: str
    segments: Sequence[str | Tensor]
    max_new_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True)
class _Expected:
    """What the program generates.

    Attributes:
        length: The tokens of the prompt, those of images included.
        ids: The token ids of a text; None with images.
        tokens: The generated tokens.
        logits: The logits that chose them.
        shows: The checks that it says something about: a turn that does not end shows no stop.
    """

    length: int
    ids: list[int] | None
    tokens: list[int]
    logits: Tensor
    shows: tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    """What the runner generates: the UTF-8 bytes of each token.

    The runner's Python binding stops at a token that is only part of a character: there the answer is cut off.
    """

    tokens: list[bytes]
    is_cut_off: bool
    prompt_tokens: int


def run_scenarios(
    program: Path, checkpoint: Path, lengths: list[int]
) -> tuple[list[AnsweredPrompt], list[RunnerCheck]]:
    """Return the program's answers to prompts of each length, in tokens, and the checks of the runner.

    The program runs in its own process, whose memory is released afterwards.

    Raises:
        StageFailed: The C++ runner fails at a prompt.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "program": str(program / "model.pte"),
            "checkpoint": str(checkpoint),
            "lengths": lengths,
            "logits": f"{folder}/logits.safetensors",
        }
        result = worker.run("quantize_gemma.tasks.verify.scenarios:run_in_process", arguments, lambda *_: None, None)
        logits = load_file(f"{folder}/logits.safetensors")
    prompts = [
        AnsweredPrompt(prompt["ids"], prompt["answer"], logits[str(number)])
        for number, prompt in enumerate(result["prompts"])
    ]
    return prompts, [RunnerCheck(**check) for check in result["checks"]]


def run_in_process(program: str, checkpoint: str, lengths: list[int], logits: str) -> dict[str, Any]:
    """Run all scenarios in this process, and write the logits of the prompts' answers to the safetensors file `logits`.

    Returns:
        {"prompts": [{"ids", "answer"}], "checks": [RunnerCheck as a dictionary]}; the logits' names are the prompts'
        numbers.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from quantize_gemma.tasks.models.pte import PteProgram

    config = AutoConfig.from_pretrained(checkpoint)
    tokenizer = load_runner_tokenizer(Path(checkpoint))
    window = config.get_text_config().sliding_window
    scenarios = list(_make_scenarios(Path(checkpoint), tokenizer, lengths, window))
    pte = PteProgram(Path(program))
    # Those of the model: a runner that does not know them all goes on.
    pte.eos_ids = set(end_token_ids(Path(checkpoint)))
    # The first conversation comes first here, and last in the runner, after longer ones.
    expected = {number: _expect(pte, tokenizer, scenario, window) for number, scenario in enumerate(scenarios)}
    fitting = {number: one for number, one in expected.items() if one is not None}
    multimodal = pte.multimodal
    del pte
    gc.collect()  # The program is loaded once more, and takes as much again.
    order = sorted(fitting, key=lambda number: "conversations" in scenarios[number].checks)
    runner = _load_runner(program, checkpoint, multimodal)
    answers = {number: _ask(runner, scenarios[number], multimodal) for number in order}
    checks = {name: RunnerCheck(name, 0, []) for name in runner_checks(multimodal) if name != "tokenizer"}
    for number, one in fitting.items():
        failure = _compare(tokenizer, scenarios[number], one, answers[number], _runner_name(multimodal))
        for name in one.shows:
            before = checks[name]
            checks[name] = RunnerCheck(name, before.cases + 1, before.failures + ([failure] if failure else []))
    prompts = [one for number, one in fitting.items() if "prompts" in scenarios[number].checks]
    save_file({str(number): one.logits for number, one in enumerate(prompts)}, logits)
    return {
        "prompts": [{"ids": one.ids, "answer": one.tokens} for one in prompts],
        "checks": [asdict(check) for check in checks.values()],
    }


def load_runner_tokenizer(checkpoint: Path) -> CppHFTokenizer:
    """Return the tokenizer of the C++ runner. Raises StageFailed if it cannot read the checkpoint's."""
    from pytorch_tokenizers import CppHFTokenizer

    tokenizer = CppHFTokenizer()
    path = checkpoint / "tokenizer.json"
    try:
        tokenizer.load(str(path))
    except RuntimeError as error:
        raise StageFailed(f"the C++ tokenizer of phone apps cannot read {path}: {error}") from None
    return tokenizer


def _make_scenarios(checkpoint: Path, tokenizer: CppHFTokenizer, lengths: list[int], window: int) -> Iterator[Scenario]:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    library = AutoTokenizer.from_pretrained(checkpoint)
    turn = TEXT_PROMPT
    if has_chat_template(library):
        chat = [{"role": "user", "content": TEXT_PROMPT}]
        turn = str(library.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    yield Scenario(("stop", "conversations"), "a short question", [turn], TURN_TOKENS)
    for length in lengths:
        checks = ("prompts", "past_window") if length < window else ("prompts",)
        yield Scenario(checks, f"a prompt of {length:,} tokens", [make_prompt(tokenizer, length)])
    # The last prompt leaves room for an answer, which may be shorter. This one is full after its second token.
    length = lengths[-1] + ANSWER_TOKENS - FULL_TOKENS
    full = [make_prompt(tokenizer, length)]
    yield Scenario(("full_length",), f"a prompt of {length:,} tokens", full, FULL_TOKENS)
    if hasattr(AutoConfig.from_pretrained(checkpoint), "vision_config"):
        processor = AutoProcessor.from_pretrained(checkpoint)
        images = [solid_image(processor, color) for color in ((30, 50, 220), (220, 30, 30))]
        yield Scenario(("two_images",), "a prompt with two images", image_segments(processor, images))
        early = f"{make_prompt(tokenizer, window)}\n\n"
        after = f"{processor.tokenizer.eoi_token}\n\n{turn}"
        late: list[str | Tensor] = [f"{early}{processor.boi_token}", images[0], after]
        yield Scenario(("late_image",), f"an image after {window:,} tokens", late)


def _expect(pte: PteProgram, tokenizer: CppHFTokenizer, scenario: Scenario, window: int) -> _Expected | None:
    """Return what the program generates in the Python runtime; None if its sequences are too short."""
    import torch

    parts: list[Tensor] = []
    texts: list[list[int]] = []
    for segment in scenario.segments:
        if isinstance(segment, str):
            texts.append(tokenizer.encode(segment, 0 if parts else _num_bos(segment), 0))
            parts.append(pte.embed_tokens(torch.tensor([texts[-1]])))
        else:
            parts.append(pte.encode_image(segment))
    prompt = torch.cat(parts, dim=1)
    room = pte.max_seq_len - prompt.shape[1]
    if room < min(scenario.max_new_tokens, ANSWER_TOKENS):
        return None
    tokens, logits = pte.generate(prompt, min(scenario.max_new_tokens, room))
    end = prompt.shape[1] + len(tokens)
    happened = {"past_window": end > window, "full_length": end == pte.max_seq_len, "stop": tokens[-1] in pte.eos_ids}
    shows = tuple(name for name in scenario.checks if happened.get(name, True))
    return _Expected(prompt.shape[1], texts[0] if len(parts) == 1 else None, tokens, logits, shows)


def _num_bos(text: str) -> int:
    """Return how many BOS tokens the runner is told to put before a prompt: a chat template has written one."""
    return 0 if text.startswith(GEMMA3.bos_token) else 1


def _load_runner(program: str, checkpoint: str, multimodal: bool) -> MultimodalRunner | TextLLMRunner:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import MultimodalRunner, TextLLMRunner

    return (MultimodalRunner if multimodal else TextLLMRunner)(program, f"{checkpoint}/tokenizer.json")


def _ask(runner: MultimodalRunner | TextLLMRunner, scenario: Scenario, multimodal: bool) -> _Answer:
    """Return the runner's greedy answer in a new conversation. Raises StageFailed if it fails."""
    from executorch.extension.llm.runner import GenerationConfig, make_image_input, make_text_input

    first = scenario.segments[0]
    assert isinstance(first, str), "a prompt begins with a text"
    config = GenerationConfig(
        max_new_tokens=scenario.max_new_tokens, temperature=0.0, echo=False, num_bos=_num_bos(first)
    )
    tokens: list[bytes] = []
    stats: list[Stats] = []
    is_cut_off = False
    runner.reset()
    try:
        prompt = [make_text_input(one) if isinstance(one, str) else make_image_input(one) for one in scenario.segments]
        runner.generate(prompt if multimodal else first, config, lambda one: tokens.append(one.encode()), stats.append)
    except RuntimeError as error:
        name = _runner_name(multimodal)
        raise StageFailed(f"the program fails in {name} at {scenario.what}: {error}") from None
    except UnicodeDecodeError as error:
        tokens.append(error.object)
        is_cut_off = True
    return _Answer(tokens, is_cut_off, stats[-1].num_prompt_tokens if stats else -1)


def _compare(
    tokenizer: CppHFTokenizer, scenario: Scenario, expected: _Expected, answer: _Answer, runner: str
) -> str | None:
    """Return what is wrong with the runner's answer; None if nothing is."""
    if answer.prompt_tokens not in (-1, expected.length):
        return f"{runner} reads {answer.prompt_tokens:,} tokens of {scenario.what}, which has {expected.length:,}"
    tokens = [_decode_bytes(tokenizer, token) for token in expected.tokens]
    found = answer.tokens
    if len(tokens) < min(scenario.max_new_tokens, FULL_TOKENS):
        # The runner does not stop at the token that follows the prompt: docs/upstream.md.
        found = found[: len(tokens)]
    if found == (tokens[: len(found)] if answer.is_cut_off else tokens):
        return None
    return (
        f"{runner} answers {scenario.what} with {b''.join(answer.tokens)!r}, but the program's own logits say "
        f"{b''.join(tokens)!r}"
    )


def _decode_bytes(tokenizer: CppHFTokenizer, token: int) -> bytes:
    try:
        return str(tokenizer.decode(token)).encode()
    except UnicodeDecodeError as error:
        return error.object


def _runner_name(multimodal: bool) -> str:
    return "MultimodalRunner" if multimodal else "TextLLMRunner"
