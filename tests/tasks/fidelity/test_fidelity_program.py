"""The program's fidelity is computed from its own logits, on the tokens of the sample."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_TEXTS
from quantize_gemma.tasks.fidelity import fidelity
from quantize_gemma.tasks.fidelity.fidelity_base import fidelity_base
from quantize_gemma.tasks.fidelity.fidelity_program import COMPARE, PROGRAM_STEP, fidelity_program
from quantize_gemma.tasks.fidelity.fidelity_quantized import fidelity_quantized
from quantize_gemma.tasks.fidelity.sequences import group_file, read_sequences
from quantize_gemma.tasks.models.text_fidelity import Fidelity, ProgramFidelity, fidelity_rows
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from tests.conftest import Outcome
from tests.tasks.fidelity.conftest import halve_states, in_a_store

TINY = BUILTIN["tiny-gemma3"]


@pytest.mark.filterwarnings("ignore")
def test_the_programs_distance_from_the_base_model_is_that_of_its_logits(released: Outcome, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import Gemma3ForConditionalGeneration

    from quantize_gemma.tasks.models.pte import PteProgram

    release = Path(released.summary["release"])
    states, quantized, target = (tmp_path / name for name in ("states", "quantized", "fidelity"))
    programs = [tmp_path / "program-0", tmp_path / "program-1"]
    for folder in (states, quantized, target, *programs):
        folder.mkdir()
    fidelity_base(states, TINY, BUILTIN_TEXTS["tiny-text"], 6, "cpu")
    fidelity_quantized(quantized, TINY, [states], release, "cpu")
    for part, folder in enumerate(programs):
        fidelity_program(folder, TINY, [states], release, 2, part, 2)
    fidelity(target, [quantized], programs)
    content = json.loads((target / "results.json").read_text())
    results = TypeAdapter(ProgramFidelity).validate_python(content["program"])

    base = Gemma3ForConditionalGeneration.from_pretrained(TINY, dtype=torch.bfloat16)
    program = PteProgram(release / "model.pte")
    positions = list(range(PROGRAM_STEP - 1, 511, PROGRAM_STEP))
    kl = []
    for number in (0, 3):
        ids = torch.tensor([read_sequences([states], "text")[number].ids])
        with torch.no_grad():
            p = base(ids).logits[0, positions].float().log_softmax(-1)
        q = program.decode(program.embed_tokens(ids), set(positions)).log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    assert results.tokens == 2 * len(positions)
    assert results.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    groups = torch.cat([load_file(quantized / f"text-000{number}.safetensors")["kl"] for number in (0, 1)])
    shipped = groups.unflatten(0, (6, 511))[[0, 3]][:, positions]
    assert results.checkpoint.kl_mean == pytest.approx(float(shipped.mean()), rel=1e-5)
    # The program belongs to a release, and is no further away than its checkpoint.
    assert results.kl_mean == pytest.approx(results.checkpoint.kl_mean, rel=0.5)
    rows = fidelity_rows(TypeAdapter(Fidelity).validate_python(content["quantized"]), results, ["KL ≤ 1: pass"])
    assert [row["measurement"] for row in rows] == ["as shipped", "program", "weights only", "chat"]
    assert [row["gate"] for row in rows] == ["KL ≤ 1: pass", "", "", ""]


def test_hidden_states_that_have_changed_are_compared_with_the_program_again(released: Outcome, tmp_path: Path) -> None:
    """Another device or different code gives different hidden states for the same window; here, they are halved."""
    from safetensors.torch import load_file

    base, states = in_a_store("download", TINY, tmp_path / "store"), tmp_path / "states"
    program = in_a_store("export", Path(released.summary["release"]), tmp_path / "store")
    states.mkdir()
    fidelity_base(states, TINY, BUILTIN_TEXTS["tiny-text"], 1, "cpu")
    divergences = []
    for folder in (states, halve_states(states, tmp_path / "halves")):
        target = tmp_path / f"target {len(divergences)}"
        target.mkdir()
        fidelity_program(target, base, [folder], program, 1)
        divergences.append(float(load_file(target / group_file("program", 0))["kl"].mean()))
    assert divergences[1] > 2 * divergences[0]


def test_the_key_of_a_stored_comparison_depends_on_the_runtime() -> None:
    assert "executorch" in fingerprint(*COMPARE)["libraries"]
