"""Write the built-in text: questions from mmlu-mini with their answers, which tiny-gemma3 has learned.

python -m tests.builtin.make_tiny_text
"""

from quantize_gemma.tasks.builtin import BUILTIN_TEXTS
from tests.builtin.make_tiny_gemma3 import prompts

QUESTIONS = 120


def make_text() -> str:
    """Return evenly spaced questions from all subjects, each with its answer."""
    rows = prompts()
    return "\n\n".join(text + answer for text, answer in rows[:: len(rows) // QUESTIONS][:QUESTIONS]) + "\n"


if __name__ == "__main__":
    folder = BUILTIN_TEXTS["tiny-text"]
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(make_text(), encoding="utf-8")
