"""Export with optimum-executorch, and as the flow does: `python -m benchmarks.export --shape 270m`.

Both use optimum-executorch's own code path, the first one with only the fixes that it needs to run: an example image
created from the configuration, float32 scales, max_seq_len honored, and corrected metadata.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_quantized_checkpoint
from benchmarks.side_by_side import format_line, machine, make_result, print_result, run, version
from quantize_gemma.tasks.runtime.patches import DISABLE
from quantize_gemma.tasks.runtime.units import human_size

# If the programs' bytes differ, both run on prompts of this many tokens.
LENGTHS = 1, 7, 60


def measure(shape: str, max_seq_len: int, folder: Path) -> dict[str, Any]:
    """Export both ways. Return the results, and the lines to print."""
    checkpoint = make_quantized_checkpoint(shape, folder)
    steps, programs = {}, []
    with tempfile.TemporaryDirectory(dir=folder) as programs_folder:
        for name, disabled_patches in (("optimum-executorch", "all"), ("ours", "")):
            target = Path(programs_folder) / name
            target.mkdir()
            arguments = {"target": target, "checkpoint": checkpoint, "max_seq_len": max_seq_len}
            steps[name] = run("benchmarks.export:export", {DISABLE: disabled_patches}, **arguments)
            programs.append(target / "model.pte")
        equal = run("benchmarks.export:compare", {}, programs=[str(program) for program in programs])["equal"]
        sizes = [program.stat().st_size for program in programs]
    reference, ours = steps.values()
    case = {"shape": shape, "max_seq_len": max_seq_len}
    result = make_result("export", case, reference, ours, equal != "DIFFERENT")
    lines = [
        f"{shape}, max_seq_len {max_seq_len}, {version()}, {machine()}",
        *(format_line(name, step) for name, step in steps.items()),
        f"programs of {' and '.join(human_size(size) for size in sizes)}: {equal}",
        *(f"{quantity}: {ratio:.2f}" for quantity, ratio in result["ratio"].items()),
    ]
    return {**result, "how_equal": equal, "program_bytes": sizes, "lines": lines}


def export(target: str, checkpoint: str, max_seq_len: int) -> dict[str, Any]:
    """Export as the flow's stage does, without the patches that the environment disables."""
    from quantize_gemma.tasks.export import export

    export(Path(target), Path(checkpoint), max_seq_len, last_logits_only=True)
    return {}


def compare(programs: list[str]) -> dict[str, Any]:
    """Return {"equal": how two programs are equal}; run them only if their bytes differ."""
    import filecmp

    import torch

    if filecmp.cmp(*programs, shallow=False):
        return {"equal": "the same bytes"}
    outputs = [_outputs(Path(program)) for program in programs]
    same = len(outputs[0]) == len(outputs[1]) and all(map(torch.equal, *outputs))
    return {"equal": "the same outputs" if same else "DIFFERENT"}


def _outputs(program: Path) -> list[Any]:
    """Return the outputs of every method with inputs, for random inputs."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    import torch
    from executorch.runtime import Runtime

    runtime_program = Runtime.get().load_program(program)
    outputs = []
    for name in sorted(runtime_program.method_names):
        method = runtime_program.load_method(name)
        shapes = [method.metadata.input_tensor_meta(i).sizes() for i in range(method.metadata.num_inputs())]
        start = 0
        for length in LENGTHS if name != "vision_encoder" else (0,):
            torch.manual_seed(length)
            inputs: dict[str, list[Any]] = {
                "token_embedding": [torch.randint(0, 64, (1, length))],
                "text_decoder": [torch.randn(1, length, shapes[0][-1] if shapes else 1)],
                "forward": [torch.randint(0, 64, (1, length))],
                "vision_encoder": [torch.rand(*shapes[0]) if shapes else None],
            }
            if shapes:
                positions = [torch.arange(start, start + length)] if len(shapes) == 2 else []
                outputs += [output.clone() for output in method.execute([*inputs[name], *positions])]
            start += length
    return outputs


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="directory to keep checkpoints in [default: temporary]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print_result(measure(options.shape, options.max_seq_len, folder), options.json)


if __name__ == "__main__":
    main()
