"""Compare a program with the checkpoint that it was exported from, method by method, by running both.

They are not expected to be bit-identical: int8 activations round differently, and one that falls on the other side of a
rounding boundary changes all that follow. Therefore, every difference is reported next to the activation-quantization
baseline: the difference between the checkpoint with and without quantized activations. A wrong scale, cache, or mask
exceeds it.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, is_multimodal, load_model
from quantize_gemma.tasks.models.metrics import (
    Agreement,
    Divergence,
    ImageDivergence,
    Positions,
    PromptDivergence,
    RunnerCheck,
    VisionError,
)
from quantize_gemma.tasks.models.pte import PteProgram, insert_image_features
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.verify.distances import (
    absolute_difference,
    kl_by_position,
    mean_kl,
    mean_nll,
    same_argmax,
    squared_error,
)
from quantize_gemma.tasks.verify.image_inputs import ImageInput, make_image_input
from quantize_gemma.tasks.verify.long_prompts import TEXT, prompt_lengths
from quantize_gemma.tasks.verify.scenarios import AnsweredPrompt, run_scenarios

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

# The number of tokens that are compared at the start of a text, where the program decodes one at a time.
COMPARED_TOKENS = 128


@dataclass(frozen=True)
class _CheckpointOutputs:
    """Logits, [positions, vocabulary], of the text, the answers to all prompts, and so on; features of the image."""

    text: Tensor
    prompts: Tensor
    features: Tensor | None = None
    image: Tensor | None = None
    late_image: Tensor | None = None


@dataclass(frozen=True)
class _Reference:
    """The checkpoint's outputs with and without quantized activations.

    Attributes:
        act_quant: Outputs with quantized activations, which the program is compared with.
        no_act_quant: Outputs without quantized activations.
        embeddings: The text's token embeddings, [1, tokens, width].
        kl_causal_image: The KL divergence of the text after an image that causal attention causes.
    """

    act_quant: _CheckpointOutputs
    no_act_quant: _CheckpointOutputs
    embeddings: Tensor
    kl_causal_image: float | None


def compare(
    program: Path,
    checkpoint: Path,
    config: PreTrainedConfig,
    max_seq_len: int,
    bidirectional_images: bool,
) -> tuple[Agreement, list[RunnerCheck]]:
    """Return the distance of `program`/model.pte from the checkpoint, and the checks of the C++ runner.

    Args:
        program: The directory of model.pte.
        checkpoint: The checkpoint that it was exported from.
        config: The checkpoint's configuration.
        max_seq_len: The program's maximum sequence length, in tokens.
        bidirectional_images: Whether the tokens of an image attend to each other in both directions in the program;
            False for a text-only one.

    Raises:
        StageFailed: The C++ runner fails on a prompt, or logits are not finite.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lengths = prompt_lengths(config.get_text_config().sliding_window, max_seq_len)
    prompts, features, checks = run_scenarios(program, checkpoint, lengths)
    image = make_image_input(checkpoint, config.image_token_id) if is_multimodal(config.to_dict()) else None
    if image is not None:
        image = image.with_late_prompt(
            tokenizer(TEXT * 99)["input_ids"][: config.text_config.sliding_window], max_seq_len
        )
    reference = _run_checkpoint(checkpoint, prompts, image, bidirectional_images)
    gc.collect()  # The model's modules have reference cycles, and the program takes as much memory again.
    pte = PteProgram(program / "model.pte")
    assert pte.has_image_channel == bidirectional_images, f"bidirectional_images must be {pte.has_image_channel}"
    agreement = _compare_outputs(pte, reference, prompts, image, features)
    report = json.dumps(asdict(agreement))
    if "NaN" in report or "Infinity" in report:
        raise StageFailed(f"the logits of the checkpoint or of the program are not finite: {report}")
    return agreement, checks


def _run_checkpoint(
    checkpoint: Path, prompts: list[AnsweredPrompt], image: ImageInput | None, is_bidirectional: bool
) -> _Reference:
    """Run the checkpoint in float32 with and without quantized activations."""
    import torch

    from quantize_gemma.tasks.models.dequantize import replace_quantized_modules
    from quantize_gemma.tasks.models.float32 import fast_products

    model = load_model(checkpoint, torch.float32)
    replace_quantized_modules(model, "none")
    with torch.no_grad(), fast_products():
        embeddings = model.get_input_embeddings()(_text_ids(prompts))
        act_quant = _checkpoint_outputs(model, prompts, image, is_bidirectional)
        kl_causal_image = None
        if image is not None:
            assert act_quant.image is not None
            assert act_quant.features is not None
            other = _image_logits(model, image, act_quant.features, not is_bidirectional)
            causal, bidirectional = (other, act_quant.image) if is_bidirectional else (act_quant.image, other)
            kl_causal_image = mean_kl(bidirectional, causal)
        disable_activation_quantization(model)
        no_act_quant = _checkpoint_outputs(model, prompts, image, is_bidirectional)
    return _Reference(act_quant, no_act_quant, embeddings, kl_causal_image)


def _text_ids(prompts: list[AnsweredPrompt]) -> Tensor:
    """Return the compared text, the start of the longest prompt: token ids, [1, tokens]."""
    import torch

    return torch.tensor([prompts[-1].ids[:COMPARED_TOKENS]])


def _checkpoint_outputs(
    model: PreTrainedModel, prompts: list[AnsweredPrompt], image: ImageInput | None, is_bidirectional: bool
) -> _CheckpointOutputs:
    import torch

    *shorter, longest = prompts
    # One forward pass gives the logits of the text and of the longest prompt's answer.
    length = _text_ids(prompts).shape[1]
    text, answer = _prompt_logits(model, longest, length).tensor_split([length])
    answers = torch.cat([*(_prompt_logits(model, prompt) for prompt in shorter), answer])
    if image is None:
        return _CheckpointOutputs(text, answers)
    features = model.get_image_features(image.pixels)
    after = _image_logits(model, image, features, is_bidirectional)
    late = None if image.late is None else _image_logits(model, image.late, features, is_bidirectional)
    return _CheckpointOutputs(text, answers, features, after, late)


def _prompt_logits(model: PreTrainedModel, prompt: AnsweredPrompt, start: int = 0) -> Tensor:
    """Return the checkpoint's logits for a prompt's first `start` tokens and for its answer, [tokens, vocabulary]."""
    import torch

    ids = torch.tensor([prompt.ids + prompt.answer[:-1]])
    positions = torch.tensor([*range(start), *prompt.answer_positions])
    logits: Tensor = model(input_ids=ids, logits_to_keep=positions).logits[0].float()
    return logits


def _image_logits(model: PreTrainedModel, image: ImageInput, features: Tensor, is_bidirectional: bool) -> Tensor:
    """Return the logits at the compared positions. The features are parameters because encoding is slow."""
    # Without token types, attention is causal.
    types = {"token_type_ids": image.is_image[None].long()} if is_bidirectional else {}
    embeddings = model.get_input_embeddings()(image.ids.masked_fill(image.is_image, 0))
    merged = insert_image_features(features, embeddings, image.is_image)
    logits: Tensor = model(inputs_embeds=merged, logits_to_keep=image.compared, **types).logits[0].float()
    return logits


def _compare_outputs(
    program: PteProgram,
    reference: _Reference,
    prompts: list[AnsweredPrompt],
    image: ImageInput | None,
    features: Tensor | None,
) -> Agreement:
    """Run the program on the checkpoint's inputs, except for the image, and compare the outputs."""
    eager, baseline = reference.act_quant, reference.no_act_quant
    ids = _text_ids(prompts)
    embedded = program.embed_tokens(ids)
    logits = program.decode(embedded, set(range(len(ids[0]))))
    vision_encoder, after_image, after_late_image = (
        _compare_image(program, reference, image, features)
        if image is not None and features is not None
        else (None, None, None)
    )
    return Agreement(
        tokens=len(logits),
        kl_program=mean_kl(eager.text, logits),
        kl_act_quant=mean_kl(eager.text, baseline.text),
        same_argmax=same_argmax(eager.text, logits),
        nll_checkpoint=mean_nll(eager.text, ids[0]),
        nll_program=mean_nll(logits, ids[0]),
        text_decoder=absolute_difference(eager.text, logits),
        prompts=_compare_prompts(reference, prompts),
        token_embedding=absolute_difference(reference.embeddings, program.without_channel(embedded)) if image else None,
        vision_encoder=vision_encoder,
        image=after_image,
        late_image=after_late_image,
    )


def _compare_prompts(reference: _Reference, prompts: list[AnsweredPrompt]) -> PromptDivergence:
    import torch

    eager, baseline = reference.act_quant.prompts, reference.no_act_quant.prompts
    logits = torch.cat([prompt.logits for prompt in prompts])
    return PromptDivergence(
        tokens=len(logits),
        kl_program=mean_kl(eager, logits),
        kl_act_quant=mean_kl(eager, baseline),
        lengths=[len(prompt.ids) for prompt in prompts],
        positions=Positions(kl_program=kl_by_position(eager, logits), kl_act_quant=kl_by_position(eager, baseline)),
        same_argmax=same_argmax(eager, logits),
    )


def _compare_image(
    program: PteProgram, reference: _Reference, image: ImageInput, features: Tensor
) -> tuple[VisionError, ImageDivergence, Divergence | None]:
    eager, baseline = reference.act_quant, reference.no_act_quant
    assert eager.image is not None
    assert baseline.image is not None
    assert reference.kl_causal_image is not None
    assert eager.features is not None
    assert baseline.features is not None
    logits = _decode_image(program, image, features)
    encoded = program.without_channel(features)
    vision_encoder = VisionError(
        **asdict(absolute_difference(eager.features, encoded)),
        error=squared_error(eager.features, encoded),
        error_act_quant=squared_error(eager.features, baseline.features),
    )
    after_image = ImageDivergence(
        tokens=len(image.is_image),
        kl_program=mean_kl(eager.image, logits),
        kl_act_quant=mean_kl(eager.image, baseline.image),
        kl_causal_image=reference.kl_causal_image,
    )
    late = None
    if image.late is not None:
        assert eager.late_image is not None
        assert baseline.late_image is not None
        logits = _decode_image(program, image.late, features)
        late = Divergence(
            tokens=len(image.late.is_image),
            kl_program=mean_kl(eager.late_image, logits),
            kl_act_quant=mean_kl(eager.late_image, baseline.late_image),
        )
    return vision_encoder, after_image, late


def _decode_image(program: PteProgram, image: ImageInput, features: Tensor) -> Tensor:
    """Return the program's logits at the compared positions."""
    embeddings = insert_image_features(features, program.embed_tokens(image.ids), image.is_image)
    return program.decode(embeddings, set(image.compared.tolist()))
