"""Statistics of two models' predictions per token, with standard errors for tokens that are correlated.

Tokens of one window are correlated, so a window counts as one observation. Standard errors are those of a mean over
clusters, linearized if the number of tokens differs (W. G. Cochran, Sampling Techniques, 3rd ed., 1977, section 9A).
That of a quantile is Woodruff's: the standard error of the share of tokens below it, read off the distribution (R. S.
Woodruff, Confidence intervals for medians and other position measures, JASA 47, 1952). A maximum has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

QUANTILES = {"kl_median": 0.5, "kl_90": 0.9, "kl_99": 0.99}
# The edges of the histogram of KL divergences, in nats: four bins for each factor of ten.
EDGES = [0.0, *(float(f"{10 ** (exponent / 4):.3g}") for exponent in range(-20, 9))]


def summarize(tokens: Mapping[str, NDArray[np.float32]], windows: NDArray[np.int64]) -> JsonObject:
    """Return the metrics of fidelity, named as in llama.cpp's --kl-divergence.

    Args:
        tokens: compare_logits()'s columns.
        windows: The number of each token's window, from 0.

    Returns:
        `kl_mean`, `kl_median`, `kl_90`, `kl_99` and `kl_max` in nats; `same_top`, a fraction; `dp_mean` and `dp_rms`,
        the change in the true token's probability; `ppl` and `ppl_base`, perplexities, and `ppl_log_ratio`, the
        logarithm of their ratio; `tokens` and `windows`; and a standard error `…_stderr` of each except the maximum,
        None for a single window.
    """
    kl, same_top, nll_base, nll = (tokens[name].astype(np.float64) for name in ("kl", "same_top", "nll_base", "nll"))
    change = np.exp(-nll) - np.exp(-nll_base)
    square, square_stderr = mean_and_stderr(change**2, windows)
    rms = math.sqrt(square)
    metrics = {
        "kl_mean": mean_and_stderr(kl, windows),
        **{name: quantile_and_stderr(kl, windows, share) for name, share in QUANTILES.items()},
        "same_top": mean_and_stderr(same_top, windows),
        "dp_mean": mean_and_stderr(change, windows),
        "dp_rms": (rms, None if square_stderr is None else square_stderr / (2 * rms) if rms else 0.0),
        "ppl": _perplexity(nll, windows),
        "ppl_base": _perplexity(nll_base, windows),
        "ppl_log_ratio": mean_and_stderr(nll - nll_base, windows),
    }
    summary: JsonObject = {"tokens": len(kl), "windows": len(np.unique(windows)), "kl_max": float(kl.max())}
    for name, (value, stderr) in metrics.items():
        summary |= {name: value, f"{name}_stderr": stderr}
    return summary


def histogram(kl: NDArray[np.float32]) -> JsonObject:
    """Return the histogram of KL divergences: {"edges": in nats, "counts": tokens between them}.

    Rounding can make the divergence of equal distributions slightly negative: this counts as 0.
    """
    counts, _ = np.histogram(np.clip(kl, EDGES[0], EDGES[-1]), bins=EDGES)
    return {"edges": EDGES, "counts": counts.tolist()}


def mean_and_stderr(values: Values, windows: NDArray[np.int64]) -> tuple[float, float | None]:
    """Return the mean over all tokens, and its standard error over windows, None for a single window."""
    totals, counts = np.bincount(windows, weights=values), np.bincount(windows)
    mean = float(totals.sum() / counts.sum())
    number = len(counts)
    if number < 2:
        return mean, None
    residuals = totals - mean * counts
    return mean, math.sqrt(number / (number - 1) * float(residuals @ residuals)) / len(values)


def quantile_and_stderr(values: Values, windows: NDArray[np.int64], share: float) -> tuple[float, float | None]:
    """Return the quantile of all tokens for this share, and its standard error over windows."""
    quantile = float(np.quantile(values, share))
    _, stderr = mean_and_stderr((values <= quantile).astype(np.float64), windows)
    if stderr is None:
        return quantile, None
    low, high = np.quantile(values, [max(share - stderr, 0.0), min(share + stderr, 1.0)])
    return quantile, float(high - low) / 2


def _perplexity(nll: Values, windows: NDArray[np.int64]) -> tuple[float, float | None]:
    mean, stderr = mean_and_stderr(nll, windows)
    return math.exp(mean), None if stderr is None else math.exp(mean) * stderr
