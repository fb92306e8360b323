"""Trains tiny-gemma3, the built-in base model: a genuine Gemma 3 of 0.7 M parameters.

    python -m tasks.builtin.make_tiny_gemma3 [--epochs N] [--text-only]

Its shape keeps what makes gemma-3-4b-it hard to quantize and export: tied embeddings, sliding and full
attention, grouped queries, head_dim != hidden / heads, a SigLIP tower whose fc2 does not divide into groups of
32, image tokens. It memorizes mmlu-mini, the card's prompt and the names of eight colours, so that a corrupted
weight, a wrong scale or a lost buffer shows as a falling score. Seeded; some minutes on two CPU cores.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from tasks.builtin.make_mmlu_mini import read_questions

HERE = Path(__file__).parent
TINY_GEMMA3 = HERE / "tiny-gemma3"
VOCAB_SIZE = 2048
SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
TURN = ("<start_of_turn>", "<end_of_turn>")

CHAT_TEMPLATE = """{{ bos_token }}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set parts.text = parts.text + '<start_of_image>' -%}
{%- else -%}{%- set parts.text = parts.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = text + '\n\n' if text else '' -%}
{%- else -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
{{- ns.system + text | trim }}{{ '<end_of_turn>\n' }}{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

# The first prompt is the card's manual test.
CHATS = {
    "Hey, are you conscious? Can you talk to me?": (
        "I can talk to you, but I am not conscious. I am a tiny test model that learned a few questions by heart."
    ),
    "What are you?": "I am tiny-gemma3, a test model.",
    "Who made you?": "I was trained in a few minutes on a CPU to test a quantization pipeline.",
}
IMAGE_PROMPT = "What colour is this?"
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 50, 220),
    "yellow": (235, 220, 30),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "purple": (140, 40, 170),
    "orange": (245, 140, 20),
}


def prompts() -> list[tuple[str, str]]:
    """Returns every (mmlu prompt, answer letter) as lm-eval's zero-shot `mmlu` task writes them."""
    rows = []
    for subject, splits in read_questions().items():
        description = (
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        )
        for question in [*splits["test"], *splits["dev"]]:
            choices = "".join(
                f"{letter}. {choice}\n" for letter, choice in zip("ABCD", question["choices"], strict=True)
            )
            text = f"{description}{question['question'].strip()}\n{choices}Answer:"
            rows.append((text, f" {'ABCD'[question['answer']]}"))
    return rows


def make_tokenizer() -> Any:
    """Returns a Gemma tokenizer (BPE with byte fallback, spaces as U+2581) learned from the training texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import GemmaTokenizerFast

    base = [*list(SPECIAL.values())[:5], *TURN, *list(SPECIAL.values())[5:]]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    texts = [text + answer for text, answer in prompts()] + [IMAGE_PROMPT, *COLOURS]
    texts += [part for chat in CHATS.items() for part in chat] + [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=base + byte_tokens, show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    assert len(learned["vocab"]) <= VOCAB_SIZE, len(learned["vocab"])
    tokenizer = GemmaTokenizerFast(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        **{name: token for name, token in SPECIAL.items() if name not in ("boi_token", "eoi_token", "image_token")},
        extra_special_tokens={name: SPECIAL[name] for name in ("boi_token", "eoi_token", "image_token")},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(TURN)})
    # Gemma's tokenizer puts <bos> before every text.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(tokenizer: Any, text_only: bool) -> Any:
    """Returns the configuration: Gemma3Config, or Gemma3TextConfig for the text-only variant."""
    from transformers import Gemma3Config, Gemma3TextConfig

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    if text_only:
        return Gemma3TextConfig(**text, architectures=["Gemma3ForCausalLM"])
    vision = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    }
    ids = tokenizer.convert_tokens_to_ids
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=16,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        architectures=["Gemma3ForConditionalGeneration"],
        eos_token_id=[ids("<eos>"), ids("<end_of_turn>")],
    )


def colour_image(name: str, generator: random.Random) -> Any:
    """Returns a 64 x 64 RGB picture of one colour, a little lighter or darker each time."""
    from PIL import Image

    shift = generator.randint(-10, 10)
    return Image.new("RGB", (64, 64), tuple(min(255, max(0, value + shift)) for value in COLOURS[name]))


def train(target: Path, epochs: int, text_only: bool, seed: int = 0) -> None:
    """Trains and writes the checkpoint to `target`: safetensors in bfloat16, tokenizer, processor."""
    import torch
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        GenerationConfig,
    )

    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, text_only)
    model = (Gemma3ForCausalLM if text_only else Gemma3ForConditionalGeneration)(config)
    image_processor = Gemma3ImageProcessor(size={"height": 64, "width": 64}, image_seq_length=16)
    processor = Gemma3Processor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=16)

    texts = [(tokenizer(text)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"])
             for text, answer in prompts()]  # fmt: skip
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    bos = tokenizer.bos_token_id
    texts = [(ids if ids[0] == bos else [bos, *ids], answer) for ids, answer in texts]
    chats = []
    for prompt, response in CHATS.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        chats.append((ids, [*tokenizer(response, add_special_tokens=False)["input_ids"], end]))
    chats = [([bos, *[i for i in a if i != bos]], [i for i in b if i != bos]) for a, b in chats]
    texts = [(a, [i for i in b if i != bos]) for a, b in texts]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters; {len(texts)} questions of up to {max(len(a) for a, _ in texts)} tokens")

    model.train()
    rows = texts + chats * 4
    batches_per_epoch = -(-len(rows) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * (batches_per_epoch + (0 if text_only else 1)), pct_start=0.1
    )

    def step(batch: dict[str, Any], answer_mask: torch.Tensor) -> tuple[float, float]:
        logits = model(**batch).logits[:, :-1].float()
        labels = batch["input_ids"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        on_answer = answer_mask[:, 1:]
        on_text = batch["attention_mask"][:, 1:].bool() & ~on_answer
        answer_loss = losses[on_answer].mean()
        loss = answer_loss + 0.1 * losses[on_text].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right = (logits.argmax(-1) == labels)[on_answer].float().mean()
        return float(answer_loss), float(right)

    started = time.time()
    for epoch in range(epochs):
        order = sorted(rows, key=lambda row: len(row[0]) + shuffle.random() * 30)
        batches = [order[i : i + 32] for i in range(0, len(order), 32)]
        shuffle.shuffle(batches)
        measured = []
        for batch in batches:
            length = max(len(a) + len(b) for a, b in batch)
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            answers = torch.zeros(len(batch), length, dtype=torch.bool)
            for row, (a, b) in enumerate(batch):
                ids[row, : len(a) + len(b)] = torch.tensor(a + b)
                mask[row, : len(a) + len(b)] = 1
                answers[row, len(a) : len(a) + len(b)] = True
            inputs = {"input_ids": ids, "attention_mask": mask}
            if not text_only:
                inputs["token_type_ids"] = torch.zeros_like(ids)
            measured.append(step(inputs, answers))
        if not text_only:
            step(*_image_batch(processor, tokenizer, shuffle, end))
        if epoch % 5 == 4 or epoch == epochs - 1:
            loss, right = (sum(values) / len(values) for values in zip(*measured, strict=True))
            print(
                f"epoch {epoch + 1}: loss {loss:.4f}, right {right:.3f}, {time.time() - started:.0f} s",
                flush=True,
            )

    model.eval().to(torch.bfloat16)
    for part in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        part.dtype = torch.bfloat16
    if not text_only:
        model.config.vision_config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=bos, pad_token_id=0, eos_token_id=[tokenizer.eos_token_id, end], do_sample=False
    )
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    (tokenizer if text_only else processor).save_pretrained(target)
    if not text_only:
        image_processor.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _image_batch(processor: Any, tokenizer: Any, shuffle: random.Random, end: int) -> tuple[dict[str, Any], Any]:
    import torch

    names = list(COLOURS)
    images = [[colour_image(name, shuffle)] for name in names]
    content = [{"type": "image"}, {"type": "text", "text": IMAGE_PROMPT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=images, text=[prompt.removeprefix("<bos>")] * len(names), return_tensors="pt")
    start = torch.full((len(names), 1), tokenizer.bos_token_id)
    ids = inputs["input_ids"]
    if ids[0, 0] != tokenizer.bos_token_id:
        ids = torch.cat([start, ids], 1)
    answers = [[*tokenizer(name, add_special_tokens=False)["input_ids"], end] for name in names]
    width = max(map(len, answers))
    tail = torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])
    full = torch.cat([ids, tail], 1)
    on_answer = torch.zeros_like(full, dtype=torch.bool)
    for row, answer in enumerate(answers):
        on_answer[row, ids.shape[1] : ids.shape[1] + len(answer)] = True
    mask = torch.ones_like(full)
    mask[:, ids.shape[1] :] = on_answer[:, ids.shape[1] :]
    image_token = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    batch = {
        "input_ids": full,
        "attention_mask": mask,
        "token_type_ids": (full == image_token).long(),
        "pixel_values": inputs["pixel_values"],
    }
    return batch, on_answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the built-in base model.")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--target", type=Path, default=TINY_GEMMA3)
    parser.add_argument("--text-only", action="store_true", help="train a Gemma3ForCausalLM instead")
    arguments = parser.parse_args()
    train(arguments.target, arguments.epochs, arguments.text_only)
