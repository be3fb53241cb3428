"""Which of several ways to compute the same is the fastest, on a machine that is not quiet.

Candidates are timed in turn, and each reading is divided by that of the usual candidate beside it:
what slows the machine for a while slows both. Medians of these ratios are compared, and the usual
one is kept where nothing is clearly faster. A candidate whose result is wrong, or that fails, is no
candidate.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from w2vbert_fast.ops.tuned import Choice, Found

logger = logging.getLogger(__name__)

FEWEST_ROUNDS, MOST_ROUNDS = 7, 25
CLEARLY = 0.98
"""Of the time of what would run anyway, the most that something else may take to replace it."""


@dataclass(frozen=True)
class Candidate:
    """One of the ways.

    Attributes:
        choice: as tables have it.
        run: computes once, or as often as one reading of the clock needs.
        right: whether what it computes is right.
    """

    choice: Choice
    run: Callable[[], object]
    right: Callable[[], bool]


Clock = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


def fastest(
    candidates: Sequence[Candidate],
    usual: Choice,
    clock: Clock,
    is_over: Callable[[], bool] = lambda: False,
) -> Found | None:
    """The fastest candidate; the usual one where none takes less than `CLEARLY` of its time.

    Args:
        candidates: all, the usual one among them.
        usual: the choice of what would run without a measurement.
        clock: times a candidate.
        is_over: whether time is up. What has had fewer than `FEWEST_ROUNDS` then is not judged.

    Returns:
        What was found; `None` where time was up before, or the usual candidate is none itself.
    """
    left = [candidate for candidate in candidates if not is_over() and _is_right(candidate)]
    if usual not in [candidate.choice for candidate in left]:
        return None
    ratios: dict[Choice, list[float]] = {candidate.choice: [] for candidate in left}
    usual_seconds: list[float] = []
    for round_number in range(MOST_ROUNDS):
        if is_over():
            break
        # Each is the first one in turn: whoever follows an idle pause pays for it.
        first = round_number % len(left)
        seconds = {c.choice: clock(c.run) for c in (*left[first:], *left[:first])}
        usual_seconds.append(seconds[usual])
        for choice, taken in seconds.items():
            ratios[choice].append(taken / seconds[usual])
        if round_number + 1 >= FEWEST_ROUNDS:
            left = _in_question(left, ratios, usual)
            if len(left) == 1:
                break
    if len(usual_seconds) < FEWEST_ROUNDS:
        return None
    medians = {choice: statistics.median(found) for choice, found in ratios.items()}
    best = min(medians, key=lambda choice: medians[choice])
    if medians[best] > CLEARLY:
        best = usual
    taken = statistics.median(usual_seconds)
    return Found(best, medians[best] * taken, usual, taken)


def _is_right(candidate: Candidate) -> bool:
    try:
        right = candidate.right()
    # What a candidate throws, a compiler's error or too little memory, says that it is none.
    except Exception as error:
        logger.warning("%s is left out: %s", candidate.choice, " ".join(str(error).split())[:200])
        return False
    if not right:
        logger.warning("%s is left out: its result is wrong", candidate.choice)
    return right


def _in_question(
    left: Sequence[Candidate], ratios: dict[Choice, list[float]], usual: Choice
) -> list[Candidate]:
    """Without those that are slower than the leader beyond the scatter of both; but the usual one,
    with which all are compared, as long as two are in question."""
    quartiles = {c.choice: statistics.quantiles(ratios[c.choice], n=4) for c in left}
    leader = min(quartiles, key=lambda choice: quartiles[choice][1])
    stay = [c for c in left if quartiles[c.choice][0] <= quartiles[leader][2]]
    return stay if len(stay) == 1 else [c for c in left if c in stay or c.choice == usual]
