"""How sure an error rate is: the bootstrap over utterances (Bisani and Ney 2004).

Utterances are drawn with replacement, as many as there are, and the rate is computed again. Several
systems are scored on the same draws, so that what is hard for all of them cancels in differences.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

COVERED = 0.95
"""What share of the draws an interval holds."""


def resampled_rates(
    errors: ArrayLike, lengths: ArrayLike, resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """Error rates of utterances drawn with replacement.

    Args:
        errors: integers ``[num_systems, num_utterances]``.
        lengths: integers ``[num_utterances]``, of the references.
        resamples: how many draws.
        seed: of the draws: equal seeds draw equal utterances.

    Returns:
        ``[num_systems, resamples]``.
    """
    wrong, total = np.asarray(errors), np.asarray(lengths)
    random = np.random.default_rng(seed)
    rates = np.empty((len(wrong), resamples))
    for draw in range(resamples):
        drawn = random.integers(len(total), size=len(total))
        rates[:, draw] = wrong[:, drawn].sum(1) / max(1, total[drawn].sum())
    return rates


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Between which bounds 95 % of the draws lie, half of the others on each side."""
    low, high = np.quantile(values, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def share_better(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """In what share of the draws the second rate is lower; one where both are equal is half."""
    return float((second < first).mean() + (second <= first).mean()) / 2
