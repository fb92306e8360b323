"""lm-eval's own `hf` model, whose loglikelihoods cost less and are the same to the bit on a CPU.

The command line's default is one question per forward, without padding. Padding is what changes results in their last
bits, by way of the attention's blocks; the number of rows that a matrix product works on does not. So many questions
are packed into one row without padding: all that works on single tokens runs on all of them at once, attention runs
on each question alone. Only the positions that are asked for reach lm_head.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, drop_vision_tower
from quantize_gemma.tasks.models.dequantize import dequantize_once
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.patches import patched_loading
from quantize_gemma.tasks.runtime.worker import report_progress, trim_memory

# More tokens per batch make no matrix product faster, only the memory larger.
TOKENS = {"cpu": 4096, "cuda": 32_768}
# Each is a row of logits over the vocabulary.
POSITIONS = 256

Request = tuple[Any, list[int], list[int]]


def load_packed(checkpoint: str, device: str, batch_size: int | str) -> Callable[[list[Any]], list[Any]]:
    """Returns the answerer of a checkpoint: of [context, continuation] to [log-likelihood, is greedy]."""
    return answering(PackedLM(Path(checkpoint), device, batch_size))


def answering(model: LM) -> Callable[[list[Any]], list[Any]]:
    """Returns a model of lm-eval as an answerer."""

    def answer(requests: list[Any]) -> list[Any]:
        given = [Instance("loglikelihood", {}, (context, continuation), 0) for context, continuation in requests]
        return [[score, greedy] for score, greedy in model.loglikelihood(given, disable_tqdm=True)]

    return answer


class PackedLM(HFLM):
    """HFLM, for checkpoints of Gemma 3, plain or quantized, read as text alone."""

    def __init__(self, checkpoint: Path, device: str, batch_size: int | str, unrounded: bool = False) -> None:
        """`batch_size` is the most questions of a batch; with "auto" only tokens count.

        `unrounded` is for reference: float32, and no activation is quantized. It is slow, and takes no more memory.
        """
        ALL_ATTENTION_FUNCTIONS.register("packed", _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("packed", sdpa_mask)
        with patched_loading():
            super().__init__(
                pretrained=str(checkpoint),
                device=device,
                dtype="bfloat16",
                batch_size=1,
                attn_implementation="packed",
            )
        self.tokens = TOKENS[torch.device(device).type]
        self.rows = None if batch_size == "auto" else int(batch_size)
        drop_vision_tower(self.model)
        if unrounded:
            disable_activation_quantization(self.model)
            self.model.to(torch.float32)
        else:
            dequantize_once(self.model)
        gc.collect()
        trim_memory()

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Returns (sum of the continuation's log-probabilities, whether each of its tokens is the likeliest).

        A request is (strings or None, context, continuation), the last two as tokens.
        """
        sharing = share_rows(requests, self.max_length)
        wanted = {row: max(len(requests[number][2]) for number in sharing[row]) for row in sharing}
        answers: list[Any] = [None] * len(requests)
        rows = sorted(sharing, key=lambda row: (-len(row), row))
        done = 0
        while done < len(rows):
            batch = self._next_batch(rows[done:], wanted)
            try:
                logits = self._logits(batch, [wanted[row] for row in batch])
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or len(batch) == 1:
                    raise
                self.tokens = sum(map(len, batch)) // 2
                logits = None
            if logits is None:
                # Here, where the error no longer holds what the forward had made.
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            for row, part in zip(batch, logits, strict=True):
                logs = torch.log_softmax(part, dim=-1)
                for number in sharing[row]:
                    strings, _, continuation = requests[number]
                    answers[number] = score_continuation(logs, continuation)
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, answers[number])
            done += len(batch)
            report_progress(done, len(rows), "questions")
        return answers

    def _next_batch(self, rows: list[tuple[int, ...]], wanted: dict[tuple[int, ...], int]) -> list[tuple[int, ...]]:
        """Returns as many of the first rows as fit, at least one."""
        tokens = positions = count = 0
        for row in rows[: self.rows]:
            tokens += len(row)
            positions += wanted[row]
            if count and (tokens > self.tokens or positions > POSITIONS):
                break
            count += 1
        return rows[:count]

    def _logits(self, batch: list[tuple[int, ...]], wanted: list[int]) -> list[Any]:
        """Returns the logits of each row's last positions, so many of them."""
        lengths = [len(row) for row in batch]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        kept = [position for end, count in zip(ends, wanted, strict=True) for position in range(end - count, end)]
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor([token for row in batch for token in row], device=self.device)[None],
                position_ids=torch.cat([torch.arange(length, device=self.device) for length in lengths])[None],
                # Made, the model makes none of its own over the whole row.
                attention_mask=dict.fromkeys(GEMMA3.layer_types),
                questions=_Questions(self.model.config, lengths, self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(kept, device=self.device),
            ).logits[0]
        return list(logits.split(wanted))


def share_rows(requests: list[Request], max_length: int) -> dict[tuple[int, ...], list[int]]:
    """Returns {a row of tokens that is to be read: the numbers of the requests that its logits answer}.

    Continuations of one token after the same context, as the letters of a question, share a row. What is longer than
    `max_length` is cut on the left, as lm-eval does.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(max_length + 1) :][:-1]
        sharing.setdefault(tuple(tokens), []).append(number)
    return sharing


def score_continuation(logs: Any, continuation: list[int]) -> tuple[float, bool]:
    """Returns a continuation's answer from the log-probabilities at the last positions of its row."""
    logs = logs[-len(continuation) :]
    tokens = torch.tensor(continuation, device=logs.device)
    return float(logs.gather(1, tokens[:, None]).sum()), bool((logs.argmax(-1) == tokens).all())


class _Questions:
    """Where the questions of a row are, and the masks that the model itself makes for a question of such a length."""

    def __init__(self, config: Any, lengths: list[int], device: Any) -> None:
        # Neighbours of the same length are attended to in one go: (length, how many).
        self.runs: list[tuple[int, int]] = []
        for length in lengths:
            if self.runs and self.runs[-1][0] == length:
                self.runs[-1] = length, self.runs[-1][1] + 1
            else:
                self.runs.append((length, 1))
        self.masks = {
            length: create_masks_for_generate(
                config=config,
                input_embeds=torch.empty(1, length, 1, dtype=torch.bfloat16, device=device),
                attention_mask=None,
                cache_position=torch.arange(length, device=device),
                past_key_values=None,
            )
            for length, _ in self.runs
        }


def _attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    questions: _Questions | None = None,
    **keywords: Any,
) -> tuple[Any, None]:
    """Attends within each question of a row. Tensors are [1, heads, tokens, width], the result [1, tokens, …]."""
    if questions is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    outputs = []
    start = 0
    for length, count in questions.runs:
        stop = start + length * count
        parts = [whole[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for whole in (query, key, value)]
        mask = questions.masks[length][module.layer_type]
        output, _ = sdpa_attention_forward(module, *parts, mask, **keywords)
        outputs.append(output.flatten(0, 1))
        start = stop
    return torch.cat(outputs)[None], None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
