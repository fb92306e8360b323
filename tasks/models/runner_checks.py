"""The checks of the C++ runner of phone apps on a program: their names and descriptions."""

RUNNER_CHECKS = {
    "tokenizer": "tokenizing texts",
    "prompts": "prompts up to the maximum length that the program accepts",
    "past_window": "generating past the end of the sliding window",
    "full_length": "generating up to the maximum sequence length",
    "stop": "stopping at the end of a turn",
    "conversations": "a new conversation after longer ones",
    "two_images": "two images in one prompt",
    "late_image": "an image after a text as long as the sliding window",
}
IMAGE_CHECKS = ("two_images", "late_image")


def runner_checks(multimodal: bool) -> list[str]:
    """Return the names of a program's checks."""
    return [name for name in RUNNER_CHECKS if multimodal or name not in IMAGE_CHECKS]
