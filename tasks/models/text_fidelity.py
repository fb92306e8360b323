"""A model's distance from its base model on text, as frozen dataclasses: a column's `fidelity` in metrics.json."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The number of tokens with a KL divergence between neighboring edges, which are in nats."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances from the base model, token by token. Each has a standard error, which is None for a single window.

    Attributes:
        tokens, windows: The number of tokens and of windows that were compared.
        kl_mean, kl_median, kl_90, kl_99, kl_max: The KL divergence from the base model, in nats.
        same_top: The share of tokens whose most likely token is the same.
        dp_mean, dp_rms: The mean and the root mean square of the change in the true token's probability.
        ppl, ppl_base: The model's perplexity and the base model's.
        ppl_log_ratio: The logarithm of their ratio.
        kl_histogram: The histogram of KL divergences.
    """

    tokens: int
    windows: int
    kl_mean: float
    kl_mean_stderr: float | None
    kl_median: float
    kl_median_stderr: float | None
    kl_90: float
    kl_90_stderr: float | None
    kl_99: float
    kl_99_stderr: float | None
    kl_max: float
    same_top: float
    same_top_stderr: float | None
    dp_mean: float
    dp_mean_stderr: float | None
    dp_rms: float
    dp_rms_stderr: float | None
    ppl: float
    ppl_stderr: float | None
    ppl_base: float
    ppl_base_stderr: float | None
    ppl_log_ratio: float
    ppl_log_ratio_stderr: float | None
    kl_histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class Fidelity(Distances):
    """The quantized checkpoint's distances, as shipped.

    Attributes:
        weights_only: The distances of both models in float32, without quantized activations.
        second_half: The distances on the second half of each window, which llama.cpp scores.
        chat: The distances on the base model's answers to fixed prompts; None without a chat template.
    """

    weights_only: Distances
    second_half: Distances
    chat: Distances | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceFidelity:
    """The quantized checkpoint's distances from a model other than its base, such as the one before fine-tuning."""

    name: str
    revision: str
    fidelity: Fidelity


@dataclass(frozen=True, kw_only=True)
class ProgramFidelity(Distances):
    """The program's distances on a sample of tokens; `checkpoint` has the checkpoint's on the same tokens."""

    checkpoint: Distances


@dataclass(frozen=True)
class Damage:
    """The mean KL divergence, in nats, that quantizing one module alone causes.

    Attributes:
        block: The number of its decoder block; None for the embedding and lm_head.
        role: Its name in the block, or "embed_tokens" or "lm_head".
        parameters: The number of its weights.
        weights, weights_stderr: The divergence from quantizing its weights; the standard error is None for one window.
        activations, activations_stderr: The divergence from quantizing its input; None if the recipe does not.
    """

    block: int | None
    role: str
    parameters: int
    weights: float
    weights_stderr: float | None
    activations: float | None
    activations_stderr: float | None


# The parts of a module that can be quantized.
KINDS = ("weights", "activations")


def parse_damage(rows: object) -> list[Damage]:
    """Return the Damage of each row of a diagnosis. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(list[Damage]).validate_python(rows)


def damage_rows(measurements: Sequence[Damage], kind: str) -> list[dict[str, str]]:
    """Return a table of the KL divergence from quantizing each module alone: a row per block, a column per role.

    Args:
        measurements: The damage of each module.
        kind: One of KINDS.
    """
    roles = list(dict.fromkeys(damage.role for damage in measurements if damage.block is not None))
    cells: dict[str, dict[str, str]] = {}
    for damage in measurements:
        value = getattr(damage, kind)
        row = cells.setdefault(damage.role if damage.block is None else f"block {damage.block}", {})
        # Modules outside of blocks have one value, shown in the first column.
        row[roles[0] if damage.block is None else damage.role] = "" if value is None else f"{value:.2g}"
    return [
        {"block": name, **{role.rpartition(".")[2]: row.get(role, "") for role in roles}} for name, row in cells.items()
    ]


def reference_rows(reference: ReferenceFidelity) -> dict[str, Distances]:
    """Return the distances from a reference model, by their names in the table."""
    name, distances = reference.name, reference.fidelity
    return {f"from {name}, as shipped": distances, f"from {name}, weights only": distances.weights_only}


def fidelity_rows(
    quantized: Fidelity, program: ProgramFidelity, checks: Sequence[str], reference: ReferenceFidelity | None = None
) -> list[dict[str, str]]:
    """Return the rows of the fidelity table, the most important first.

    Args:
        quantized: The quantized checkpoint's.
        program: The program's.
        checks: The limits of the quantized checkpoint as shipped, with the results of the gate's checks.
        reference: Its distances from a reference model, if there is one.
    """
    columns: dict[str, Distances] = {
        "as shipped": quantized,
        "program": program,
        "weights only": quantized.weights_only,
        **({} if quantized.chat is None else {"chat": quantized.chat}),
        **({} if reference is None else reference_rows(reference)),
    }
    return [
        {
            "measurement": title,
            "KL, nats": _with_stderr(distances.kl_mean, distances.kl_mean_stderr, 4),
            "KL p99": f"{distances.kl_99:.3f}",
            "same top, %": _with_stderr(100 * distances.same_top, _percent(distances.same_top_stderr), 1),
            "perplexity": _perplexity(distances.ppl),
            "base perplexity": _perplexity(distances.ppl_base),
            "tokens": f"{distances.tokens:,}",
            "gate": ", ".join(checks) if distances is quantized else "",
        }
        for title, distances in columns.items()
    ]


def _with_stderr(value: float, stderr: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
