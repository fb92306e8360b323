"""A checkpoint as from quantization-aware training: its language model's weights are on an int4 grid."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantize_gemma.tasks.models.checkpoint import weight_files

GROUP = 32


def to_grid(weight: torch.Tensor, dtype: torch.dtype, negative: bool = False) -> torch.Tensor:
    """Return a matrix whose groups of 32 columns are a bfloat16 scale times integers in [-8, 7].

    With `negative`, scales are signed as in GGUF's q4_0: a group's largest weight is -8 times its scale.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (largest / -8 if negative else largest.abs() / 7.5).bfloat16().float()
    integers = (groups / scales).round().clamp(-8, 7).nan_to_num(0)
    return (integers * scales).view(weight.shape).to(dtype)


def write_grid_checkpoint(
    source: Path, target: Path, dtype: torch.dtype = torch.bfloat16, negative: bool = False
) -> Path:
    """Write the checkpoint with the matrices of its language model on the grid."""
    target.mkdir()
    for path in source.iterdir():
        if not path.name.endswith((".safetensors", ".index.json", "README.md")):
            (target / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor for path in weight_files(source) for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        if "vision" not in name and "projector" not in name and tensor.ndim == 2:
            tensors[name] = to_grid(tensor, dtype, negative)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
