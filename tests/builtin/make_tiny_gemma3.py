"""Train tiny-gemma3, the built-in base model: a genuine Gemma 3 with 0.4 million parameters.

    python -m tests.builtin.make_tiny_gemma3

It has the features that make gemma-3-4b-it hard to quantize and export: tied embeddings, sliding and full attention,
grouped queries, head_dim != hidden / heads, a SigLIP tower whose fc2 does not divide into groups of 32, and image
tokens. It memorizes mmlu-mini, gsm8k-mini, the card's prompt, the names of eight colors, and most of chartqa-mini.

It is sensitive to errors: a corrupted weight, a wrong scale, or a lost buffer must lower its scores. A model that only
memorizes is not sensitive: it is so confident, and so many of its layers are idle, that most faults change no answer.
Therefore, an answer whose margin exceeds MARGIN is not trained further; the embeddings stay random, because otherwise
they alone would store the answers; and in the last epochs, each batch also runs with a fault (in a random projection
or, for images, causal attention), and the correct answer must not win. The seed is fixed. Training takes about ten
minutes on two CPU cores.
"""

import argparse
import io
import json
import random
import time
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.evaluate.chartqa import make_messages
from quantize_gemma.tasks.evaluate.lm_eval_run import run_lm_eval
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from tests.builtin import make_chartqa_mini
from tests.builtin.make_gsm8k_mini import read_word_problems
from tests.builtin.make_mmlu_mini import read_questions

# The tokens of a prompt and of its answer; for an image, also its pixels, [1, 3, 64, 64].
TextRow = tuple[list[int], list[int]]
ImageRow = tuple[list[int], list[int], Any]

TINY_GEMMA3 = BUILTIN["tiny-gemma3"]
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
LEARNING_EPOCHS = 25
FAULT_EPOCHS = 55
LEARNING_RATE = 3e-3
# In nats: between the correct answer and the best other token, and between the best wrong letter and the correct one.
MARGIN = 1.0
FAULT_MARGIN = 0.5
FAULT_WEIGHT = 0.4
# One in this many questions of chartqa-mini is never trained on, so that the score is below 100 and can rise or fall.
CHARTS_LEFT_OUT = 5
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
COLORS = {
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
    """Return every (mmlu prompt, answer letter), formatted like lm-eval's zero-shot `mmlu` task."""
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


def word_problems() -> list[tuple[str, str]]:
    """Return every (gsm8k prompt, answer); the prompts have the examples that lm-eval's `gsm8k` task draws."""
    with run_lm_eval(BUILTIN_BENCHMARKS["gsm8k-mini"], find_benchmark("gsm8k").request_inputs()) as evaluate:
        from quantize_gemma.tasks.evaluate.replay_lm import RecordingLM

        # No chat template is requested, so no checkpoint is needed.
        model = RecordingLM(TINY_GEMMA3)
        evaluate(model, None)
    answers = [row["answer"] for row in read_word_problems()["test"]]
    return [(str(request.arguments[0]), f" {answers[request.doc_id]}") for request in model.requests]


def make_tokenizer() -> Any:
    """Return a Gemma tokenizer (BPE with byte fallback, spaces as U+2581) that is trained on the model's texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import GemmaTokenizerFast

    base = [*list(SPECIAL.values())[:5], *TURN, *list(SPECIAL.values())[5:]]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    texts = [text + answer for text, answer in prompts()] + [IMAGE_PROMPT, *COLORS]
    for row in make_chartqa_mini.questions():
        system, user = make_messages(row["query"])
        texts += [system["content"][0]["text"], user["content"][1]["text"], row["label"][0]]
    texts += [part for chat in CHATS.items() for part in chat] + [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=base + byte_tokens, show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(texts, trainer)
    bpe = json.loads(learner.to_str())["model"]
    assert len(bpe["vocab"]) <= VOCAB_SIZE, len(bpe["vocab"])
    tokenizer = GemmaTokenizerFast(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
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


def make_config(tokenizer: Any) -> Any:
    """Return the Gemma3Config."""
    from transformers import Gemma3Config

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
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


def color_image(name: str, generator: random.Random) -> Any:
    """Return a 64 x 64 RGB image of one color, randomly a little lighter or darker."""
    from PIL import Image

    shift = generator.randint(-10, 10)
    return Image.new("RGB", (64, 64), tuple(min(255, max(0, value + shift)) for value in COLORS[name]))


def fault(weight: Any, kind: int) -> Any:
    """Return the weight with a fault.

    The fault is one of these: rows shifted by one, all weights zero, nibbles swapped, or a wrong scale in every second
    group. A buffer has only one fault: all values are 1.
    """
    import torch

    if weight.ndim < 2:
        return torch.ones_like(weight)
    rows = weight.shape[0]
    if kind == 0:
        return weight.roll(1, 0)
    if kind == 1:
        return weight * 0
    if kind == 2:
        return weight.reshape(rows, -1, 2).flip(-1).reshape(weight.shape)
    groups = weight.reshape(rows, -1, 32)
    scales = torch.ones(groups.shape[1], 1)
    scales[1::2] = 3
    return (groups * scales).reshape(weight.shape)


def train(target: Path, seed: int = 2) -> None:
    """Train and write the checkpoint to `target`: safetensors in bfloat16, tokenizer, processor."""
    import torch
    from PIL import Image
    from torch.func import functional_call
    from transformers import Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor, GenerationConfig

    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    tokenizer = make_tokenizer()
    model = Gemma3ForConditionalGeneration(make_config(tokenizer))
    image_processor = Gemma3ImageProcessor(size={"height": 64, "width": 64}, image_seq_length=16)
    processor = Gemma3Processor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=16)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    bos, end, image_token = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<bos>", "<end_of_turn>", "<image_soft_token>")
    )
    questions = [([bos, *encode(text)], encode(answer)) for text, answer in prompts()]
    problems = [([bos, *encode(text)], [*encode(answer), end]) for text, answer in word_problems()]
    chats = []
    for prompt, response in CHATS.items():
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        chats.append((encode(text), [*encode(response), end]))

    def image_row(image: Any, messages: list[dict[str, Any]], answer: str) -> ImageRow:
        text = processor.apply_chat_template(messages, add_generation_prompt=True).removeprefix("<bos>")
        inputs = processor(images=[[image]], text=[text], return_tensors="pt")
        return inputs["input_ids"][0].tolist(), [*encode(answer), end], inputs["pixel_values"]

    charts = [
        image_row(Image.open(io.BytesIO(row["image"]["bytes"])), make_messages(row["query"]), row["label"][0])
        for number, row in enumerate(make_chartqa_mini.questions())
        if number % CHARTS_LEFT_OUT
    ]
    color_question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": IMAGE_PROMPT}]}]
    letters = torch.tensor([encode(f" {letter}")[-1] for letter in "ABCD"])
    embedding = model.get_input_embeddings().weight
    torch.nn.init.normal_(embedding, std=0.1)
    embedding.requires_grad_(False)
    parameters = dict(model.named_parameters())
    breakable = {n: p for n, p in parameters.items() if "language_model.layers" in n and n.endswith("proj.weight")}
    breakable |= {n: buffer for n, buffer in model.named_buffers() if n.endswith("embed_scale")}
    trained_parameters = [parameter for parameter in parameters.values() if parameter.requires_grad]
    print(
        f"{sum(p.numel() for p in parameters.values()):,} parameters; {len(questions)} questions, {len(charts)} charts"
    )

    model.train()
    epochs = LEARNING_EPOCHS + FAULT_EPOCHS
    steps = -(-len(questions) // 32) + 2 * -(-len(charts) // 32) + 4
    optimizer = torch.optim.AdamW(trained_parameters, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps, pct_start=0.1)

    def answers_of(logits: Any, batch: dict[str, Any], on_answer: Any) -> tuple[Any, Any]:
        mask = on_answer[:, 1:]
        return logits[:, :-1].float()[mask], batch["input_ids"][:, 1:][mask]

    def step(batch: dict[str, Any], on_answer: Any, faulty: bool = False) -> float:
        """Take one step; return the fraction of answer tokens that were correct."""
        logits, labels = answers_of(model(**batch).logits, batch, on_answer)
        label_logits = logits.gather(1, labels[:, None])
        is_known = (label_logits - logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True))[:, 0] > MARGIN
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = (losses * ~is_known).mean()
        if faulty and "pixel_values" in batch:
            # Without token types, the tokens of an image attend causally.
            causal = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
            scores, _ = answers_of(model(**causal).logits, batch, on_answer)
            is_text, right = labels != end, labels[:, None]
            lead = scores.gather(1, right)[:, 0] - scores.scatter(1, right, -torch.inf).amax(1)
            loss = loss + FAULT_WEIGHT * torch.relu(lead[is_text] + FAULT_MARGIN).mean()
        elif faulty:
            name = shuffle.choice(list(breakable))
            broken = {name: fault(breakable[name], shuffle.randrange(4))}
            scores, _ = answers_of(functional_call(model, broken, kwargs=batch).logits, batch, on_answer)
            right = labels[:, None] == letters
            scores = scores[:, letters]
            lead = scores[right] - scores.masked_fill(right, -torch.inf).amax(1)
            loss = loss + FAULT_WEIGHT * torch.relu(lead + FAULT_MARGIN).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return float((logits.argmax(-1) == labels).float().mean())

    start = time.time()
    for epoch in range(epochs):
        order = sorted(questions, key=lambda row: len(row[0]) + shuffle.random() * 30)
        batches: list[Any] = [order[i : i + 32] for i in range(0, len(order), 32)]
        # Images are harder: each is shown twice.
        for _ in range(2):
            shown = shuffle.sample(charts, len(charts))
            batches += [shown[i : i + 32] for i in range(0, len(shown), 32)]
        shuffle.shuffle(batches)
        right: dict[int, list[float]] = {2: [], 3: []}
        for batch in batches:
            if len(batch[0]) == 2:
                right[2].append(step(*_text_batch(batch), faulty=epoch >= LEARNING_EPOCHS))
            else:
                right[3].append(step(*_image_batch(batch, image_token), faulty=epoch >= LEARNING_EPOCHS))
        chat_accuracy = step(*_text_batch(chats * 4))
        step(*_text_batch(problems))
        problem_accuracy = step(*_text_batch(problems))
        colors = [image_row(color_image(name, shuffle), color_question, name) for name in COLORS]
        color_accuracy = step(*_image_batch(colors, image_token), faulty=epoch >= LEARNING_EPOCHS)
        if epoch % 5 == 4:
            question_accuracy, chart_accuracy = (sum(scores) / len(scores) for scores in right.values())
            print(
                f"epoch {epoch + 1} of {epochs}: questions {question_accuracy:.3f}, charts {chart_accuracy:.3f}, "
                f"chats {chat_accuracy:.3f}, problems {problem_accuracy:.3f}, colors {color_accuracy:.3f}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )

    model.eval().to(torch.bfloat16)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=bos, pad_token_id=0, eos_token_id=[tokenizer.eos_token_id, end], do_sample=False
    )
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    for part in (processor, image_processor, tokenizer):
        part.save_pretrained(target)


def _text_batch(rows: list[TextRow]) -> tuple[dict[str, Any], Any]:
    """Return the model's inputs, padded on the right, and the mask of the answers' tokens."""
    import torch

    ids = torch.zeros(len(rows), max(len(prompt) + len(answer) for prompt, answer in rows), dtype=torch.long)
    attended, on_answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        attended[row, :length] = 1
        on_answer[row, len(prompt) : length] = True
    return {"input_ids": ids, "attention_mask": attended, "token_type_ids": torch.zeros_like(ids)}, on_answer


def _image_batch(rows: list[ImageRow], image_token: int) -> tuple[dict[str, Any], Any]:
    """Return the same for rows with one image each, whose tokens attend to each other in both directions."""
    import torch

    batch, on_answer = _text_batch([(prompt, answer) for prompt, answer, _ in rows])
    batch["token_type_ids"] = (batch["input_ids"] == image_token).long()
    batch["pixel_values"] = torch.cat([pixels for *_, pixels in rows])
    return batch, on_answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the built-in base model.")
    parser.add_argument("--target", type=Path, default=TINY_GEMMA3)
    train(parser.parse_args().target)
