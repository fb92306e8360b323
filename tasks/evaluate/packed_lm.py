"""A faster version of lm-eval's own `hf` model; on a CPU, log-likelihoods are bit-identical.

By default, lm-eval's command line runs one request per forward pass, without padding. Padding changes the last bits of
the results, through the blocks of attention; the number of rows of a matrix product does not. Therefore, several
sequences are packed into one row without padding (packed_row.py), and a question's answers share its tokens. Only the
positions whose logits are needed reach lm_head. Text generation works the same way (packed_generation.py).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantize_gemma.tasks.evaluate.packed_generation import KeyValues, LastTokens, Text, take_next
from quantize_gemma.tasks.evaluate.packed_row import Limits, PackedRow, PrefixGroup, Tokens, group_by_prefix
from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, drop_vision_encoder
from quantize_gemma.tasks.models.dequantize import reorder_weights, replace_quantized_modules
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.requests import Request, Score
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.machine import trim_memory
from quantize_gemma.tasks.runtime.patches import patched_loading
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.strict_json import JsonValue

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

# More tokens per batch do not make matrix products faster, but take more memory.
TOKENS = {"cpu": 4096, "cuda": 32_768}
# The maximum number of positions in a batch; each is a row of logits over the vocabulary.
POSITIONS = 256
# The number of last tokens of a text in which to look for a stop sequence.
STOP_TOKENS = 32

# The maximum number of tokens of texts generated together, prompts included. For gemma-3-4b, 16,384 take 2.3 GB.
CACHED_TOKENS = {"cpu": 16_384, "cuda": 131_072}

# A request of lm-eval: (strings or None, context, continuation), the last two as tokens.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


def load_checkpoint_scorer(
    checkpoint: str, device: str, batch_size: int | str, no_act_quant: bool, generates: bool, exact: bool
) -> Score:
    """Load a checkpoint; return a function that answers requests."""
    return make_scorer(PackedLM(Path(checkpoint), device, batch_size, no_act_quant, generates, exact))


def make_scorer(model: LM) -> Score:
    """Return a function that answers requests, all of one kind, with an lm-eval model."""

    def score(requests: list[Request]) -> list[JsonValue]:
        instances = [Instance(request.kind, {}, tuple(request.arguments), 0) for request in requests]
        answers = getattr(model, requests[0].kind)(instances, disable_tqdm=True)
        return [list(value) if isinstance(value, tuple) else value for value in answers]

    return score


class PackedLM(HFLM):  # type: ignore[misc]
    """HFLM for plain and quantized Gemma 3 checkpoints, text only."""

    def __init__(
        self,
        checkpoint: Path,
        device: str,
        batch_size: int | str,
        no_act_quant: bool = False,
        generates: bool = False,
        exact: bool = False,
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: Its directory.
            device: "cpu" or "cuda", or "cuda:0" and so on.
            batch_size: The maximum number of sequences in a batch; "auto" limits only the tokens.
            no_act_quant: Whether to compute in float32 without quantized activations, for reference. This is slow, but
                takes no more memory.
            generates: Whether it generates text, for which lm_head is dequantized, too.
            exact: Whether text is bit-identical to that of lm-eval's own model with one sequence at a time. Otherwise,
                it can differ where two tokens are equally likely. Log-likelihoods are always exact on a CPU.
        """
        ALL_ATTENTION_FUNCTIONS.register("packed", _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("packed", sdpa_mask)
        with patched_loading():
            super().__init__(
                pretrained=str(checkpoint),
                device=device,
                dtype="bfloat16",
                # The batch size in which windows of perplexities are passed to _loglikelihood_tokens().
                batch_size=64,
                attn_implementation="packed",
            )
        kind = torch.device(device).type
        self.cached_tokens = CACHED_TOKENS[kind]
        self.limits = Limits(TOKENS[kind], POSITIONS, None if batch_size == "auto" else int(batch_size))
        self.exact = exact
        drop_vision_encoder(self.model)
        if no_act_quant:
            disable_activation_quantization(self.model)
            self.model.to(torch.float32)
        else:
            replace_quantized_modules(self.model, "all" if generates else "backbone")
            if device == "cpu":
                reorder_weights(self.model, head=generates)
        gc.collect()
        trim_memory()

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (sum of the continuation's log-probabilities, whether each of its tokens is the most likely)."""
        sharing = share_rows(requests, self.max_length)
        counts = {row: max(len(requests[number][2]) for number in sharing[row]) for row in sharing}
        responses: dict[int, tuple[float, bool]] = {}
        count = 0
        for row in [row for row in counts if counts[row] > POSITIONS]:
            # Alone: all of its logits would not fit.
            for number in sharing[row]:
                responses[number] = self._score_long(row, requests[number][2])
            del counts[row]
            count += 1
            report_progress(count, len(sharing), "questions")
        waiting = group_by_prefix(counts, self.limits)
        while waiting:
            batch = self._next_batch(waiting, counts)
            try:
                logits = self._logits(batch, counts)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or sum(len(group.endings) for group in batch) == 1:
                    raise
                logits = None
            if logits is None:
                # Only here, because the exception kept the tensors of the forward pass alive.
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.limits = replace(self.limits, tokens=sum(group.tokens for group in batch) // 2)
                remaining_counts = {sequence: counts[sequence] for group in waiting for sequence in group.sequences}
                waiting = group_by_prefix(remaining_counts, self.limits)
                continue
            del waiting[: len(batch)]
            for group in batch:
                if missing_endings := [ending for ending in group.endings if group.prefix + ending not in logits]:
                    waiting.append(PrefixGroup(group.prefix, tuple(missing_endings)))
            for row, part in logits.items():
                logs = torch.log_softmax(part, dim=-1)
                for number in sharing[row]:
                    strings, _, continuation = requests[number]
                    responses[number] = score_continuation(logs, continuation)
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, responses[number])
            count += len(logits)
            report_progress(count, len(sharing), "questions")
        return [responses[number] for number in range(len(requests))]

    def _next_batch(self, groups: list[PrefixGroup], counts: Mapping[Tokens, int]) -> list[PrefixGroup]:
        """Return as many of the first groups as fit, but at least one."""
        count = 1
        sequences = groups[0].sequences
        for group in groups[1:]:
            sequences += group.sequences
            if not self.limits.allow(sequences, counts):
                break
            count += 1
        return groups[:count]

    def _score_long(self, row: tuple[int, ...], continuation: list[int]) -> tuple[float, bool]:
        """Return the score of a continuation of many tokens, whose logits are computed POSITIONS at a time."""
        with torch.no_grad():
            states = self.model.model(input_ids=torch.tensor([row], device=self.device), use_cache=False)
            scores, greedy = [], True
            positions = states.last_hidden_state[0, -len(continuation) :]
            for start in range(0, len(continuation), POSITIONS):
                logs = torch.log_softmax(self.model.lm_head(positions[start : start + POSITIONS]), dim=-1)
                tokens = torch.tensor(continuation[start : start + POSITIONS], device=logs.device)
                scores.append(logs.gather(1, tokens[:, None])[:, 0])
                greedy = greedy and bool((logs.argmax(-1) == tokens).all())
        return float(torch.cat(scores).sum()), greedy

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy texts."""
        texts = [self._start(*request.args) for request in requests]
        waiting = sorted(texts, key=lambda text: -len(text.prompt))
        running: list[Text] = []
        while waiting or running:
            if active := take_next(waiting, running, self.limits.sequences, self.cached_tokens, self.limits.tokens):
                prompts = [PrefixGroup(tuple(text.prompt)) for text in active]
                counts = {prompt.prefix: 1 for prompt in prompts}
                prompt_logits = self._logits(prompts, counts, [text.cache for text in active])
                logits = torch.cat([prompt_logits[prompt.prefix] for prompt in prompts])
                running += active
            else:
                active, logits = running, self._next_logits(running)
            for text, token in zip(active, logits.max(-1).indices.tolist(), strict=True):
                text.tokens.append(token)
                if text.is_finished():
                    text.cache.release()
            running = [text for text in running if not text.is_finished()]
            report_progress(len(texts) - len(running) - len(waiting), len(texts), "questions")
        return [
            postprocess_generated_text(self.tok_decode(text.tokens), self._stop_sequences(request.args[1]), None)
            for text, request in zip(texts, requests, strict=True)
        ]

    def _start(self, context: str, generation: dict[str, object]) -> Text:
        """Return a text without generated tokens; its prompt is truncated on the left, as in lm-eval.

        Raises:
            UserError: The text could be as long as the model's longest sequence.
        """
        settings = normalize_gen_kwargs(generation, self.max_gen_toks)
        stop, ends = self._stop_sequences(generation), stop_tokens(self.model)

        def has_ended(tokens: list[int]) -> bool:
            # Look for a stop sequence only in the last few tokens, where it would end.
            tail = self.tok_decode(tokens[-STOP_TOKENS:], skip_special_tokens=False)
            return tokens[-1] in ends or any(text in tail for text in stop if text)

        max_prompt = self.max_length - settings["max_gen_toks"]
        if max_prompt < 1:
            raise UserError(
                f"the task generates up to {settings['max_gen_toks']:,} tokens, but the model's sequences have at most "
                f"{self.max_length:,}, prompt included: choose another task"
            )
        tokens, _ = self.tok_batch_encode([context], left_truncate_len=max_prompt, truncation=self.truncation)
        return Text(tokens[0].tolist(), settings["max_gen_toks"], has_ended)

    def _stop_sequences(self, generation: dict[str, object]) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        return list(handle_stop_sequences(normalize_gen_kwargs(generation)["until"], eos=eos))

    def _next_logits(self, texts: list[Text]) -> Tensor:
        """Return the logits after the last token of each text, [texts, vocabulary]."""
        with torch.no_grad():
            logits: Tensor = self.model(
                input_ids=torch.tensor([[text.tokens[-1] for text in texts]], device=self.device),
                position_ids=torch.tensor([[text.cache.length for text in texts]], device=self.device),
                attention_mask=dict.fromkeys(GEMMA3.layer_types),
                sequences=LastTokens([text.cache for text in texts], self.exact),
                use_cache=False,
            ).logits[0]
        for text in texts:
            text.cache.length += 1
        return logits

    def _logits(
        self, groups: list[PrefixGroup], counts: Mapping[Tokens, int], caches: Sequence[KeyValues] = ()
    ) -> dict[Tokens, Tensor]:
        """Return the logits of each sequence's last positions, [positions, vocabulary].

        Sequences whose last bits would differ if they ran alone are left out.

        Args:
            groups: The sequences.
            counts: The number of positions of each sequence.
            caches: The caches of the groups to fill, if any.
        """
        row = PackedRow(self.model.config, groups, self.device, caches, exact=not caches or self.exact)
        sequences = [sequence for group in groups for sequence in group.sequences]
        scored_indices = [
            indices[-counts[sequence] :] for sequence, indices in zip(sequences, row.sequences, strict=True)
        ]
        positions = sorted({index for indices in scored_indices for index in indices})
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor([row.tokens], device=self.device),
                position_ids=torch.tensor([row.positions], device=self.device),
                # Pass None as masks, so that the model does not create one for the whole row.
                attention_mask=dict.fromkeys(GEMMA3.layer_types),
                sequences=row,
                use_cache=False,
                logits_to_keep=torch.tensor(positions, device=self.device),
            ).logits[0]
        for cache, group in zip(caches, groups, strict=bool(caches)):
            cache.length += len(group.prefix)
        rows = {index: number for number, index in enumerate(positions)}
        return {
            sequence: logits[[rows[index] for index in indices]]
            for number, (sequence, indices) in enumerate(zip(sequences, scored_indices, strict=True))
            if number not in row.unequal_sequences
        }


def share_rows(requests: list[TokenRequest], max_length: int) -> dict[tuple[int, ...], list[int]]:
    """Return {row of input tokens: numbers of the requests that its logits score}.

    Single-token continuations of the same context, such as the letters of a question, share a row. Rows that are longer
    than `max_length` are truncated on the left, as in lm-eval.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(max_length + 1) :][:-1]
        sharing.setdefault(tuple(tokens), []).append(number)
    return sharing


def score_continuation(logs: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return a continuation's (log-likelihood, is greedy) from the log-probabilities at its row's last positions."""
    logs = logs[-len(continuation) :]
    tokens = torch.tensor(continuation, device=logs.device)
    token_logs = logs.gather(1, tokens[:, None])
    # argmax takes longer than everything else here, and is needed only if several tokens could be the most likely.
    greedy = bool((token_logs[:, 0] == logs.amax(-1)).all()) and bool((logs.argmax(-1) == tokens).all())
    return float(token_logs.sum()), greedy


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens after which a model stops generating."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else {ids} - {None}


def _attend(
    module: Gemma3Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequences: PackedRow | LastTokens | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within each sequence of a row. Tensors are [1, heads, tokens, width], the result [1, tokens, …]."""
    if sequences is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    return sequences.attend(module, query, key, value, **kwargs), None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
