"""The artifacts that a run shows in Prefect's UI."""

from prefect.types.names import ArtifactKey
from pydantic import TypeAdapter

from quantize_gemma.flows.report import artifact_key


def test_every_name_of_a_chart_is_a_valid_key() -> None:
    for name in ("mmlu-by-subject", "kl_divergence", "AraDiCE_ArabicMMLU_lev-by-subject"):
        assert TypeAdapter(ArtifactKey).validate_python(artifact_key(name))
