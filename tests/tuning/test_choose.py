"""The fastest of several candidates, by a clock that is not to be trusted."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable

import pytest

from w2vbert_fast.ops.tuned import Found
from w2vbert_fast.tuning.choose import FEWEST_ROUNDS, MOST_ROUNDS, Candidate, fastest

USUAL = "128x256"


class Clock:
    """Seconds that are planted for each candidate, as a shared machine would measure them."""

    def __init__(self, seconds: dict[str, float], seed: int | None = None) -> None:
        self.seconds = seconds
        self.random = None if seed is None else random.Random(seed)
        self.timed: list[str] = []

    def __call__(self, run: Callable[[], object]) -> float:
        name = str(run())
        self.timed.append(name)
        seconds = self.seconds[name]
        if self.random is None:
            return seconds
        drift = 1 + 0.5 * (len(self.timed) // 40 % 2)  # another's work, for a while
        outlier = 6.0 if self.random.random() < 0.1 else 1.0
        return seconds * drift * outlier * self.random.lognormvariate(0, 0.05)

    def candidates(self, wrong: tuple[str, ...] = ()) -> list[Candidate]:
        return [
            Candidate(name, lambda name=name: name, lambda name=name: name not in wrong)  # type: ignore[misc]
            for name in self.seconds
        ]


def planted(winner: str, by: float = 0.85) -> dict[str, float]:
    names = (USUAL, "128x128", "64x128", "64x64", "pytorch")
    slower = {name: 1e-3 * (1 + 0.1 * place) for place, name in enumerate(names)}
    return slower | {winner: by * 1e-3}


@pytest.mark.parametrize("winner", ["128x128", "64x64", "pytorch", USUAL])
@pytest.mark.parametrize("seed", range(25))
def test_the_planted_winner_is_found_under_noise(winner: str, seed: int) -> None:
    clock = Clock(planted(winner), seed)
    found = fastest(clock.candidates(), USUAL, clock)
    assert found is not None and (found.choice, found.usual) == (winner, USUAL)
    assert found.seconds <= found.usual_seconds


@pytest.mark.parametrize("seed", range(25))
def test_the_usual_one_stays_where_nothing_is_clearly_faster(seed: int) -> None:
    clock = Clock(dict.fromkeys((USUAL, "64x64", "pytorch"), 1e-3))
    clock.seconds["pytorch"] = 0.99e-3
    found = fastest(clock.candidates(), USUAL, clock)
    assert found == Found(USUAL, 1e-3, USUAL, 1e-3)


@pytest.mark.parametrize("winner", ["128x128", "pytorch"])
def test_a_candidate_whose_result_is_wrong_is_never_the_answer(
    winner: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(planted(winner, by=0.1))
    with caplog.at_level(logging.WARNING):
        found = fastest(clock.candidates(wrong=(winner,)), USUAL, clock)
    assert found is not None and found.choice == USUAL
    assert winner not in clock.timed and f"{winner} is left out: its result is wrong" in caplog.text


def test_a_candidate_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> bool:
        raise RuntimeError("out of resource: shared memory")

    clock = Clock(planted("64x64"))
    others = [c for c in clock.candidates() if c.choice != "64x64"]
    failing = Candidate("64x64", lambda: "64x64", fail)
    found = fastest([failing, *others], USUAL, clock)
    assert found is not None and found.choice == USUAL
    assert "64x64 is left out: out of resource" in caplog.text


def test_a_wrong_usual_one_is_no_measurement() -> None:
    clock = Clock(planted("64x64"))
    assert fastest(clock.candidates(wrong=(USUAL,)), USUAL, clock) is None


def test_candidates_are_timed_in_turn_and_each_is_first() -> None:
    clock = Clock(dict.fromkeys((USUAL, "64x64", "pytorch"), 1e-3))
    fastest(clock.candidates(), USUAL, clock)
    rounds = [clock.timed[start : start + 3] for start in range(0, len(clock.timed), 3)]
    assert len(rounds) == MOST_ROUNDS
    assert all(sorted(each) == sorted(clock.seconds) for each in rounds)
    assert {each[0] for each in rounds} == {*clock.seconds}


def test_what_is_far_behind_is_not_timed_for_long() -> None:
    clock = Clock({USUAL: 1e-3, "64x64": 9e-3, "pytorch": 1e-3})
    fastest(clock.candidates(), USUAL, clock)
    assert clock.timed.count("64x64") == FEWEST_ROUNDS
    assert clock.timed.count("pytorch") == MOST_ROUNDS


@pytest.mark.parametrize("readings", range(0, 5 * FEWEST_ROUNDS + 5))
def test_nothing_is_judged_by_few_rounds(readings: int) -> None:
    """Time is up after some questions, of which there is one a candidate and one a round."""
    clock = Clock(planted("64x64"))
    asked = itertools.count()
    found = fastest(clock.candidates(), USUAL, clock, lambda: next(asked) >= readings)
    if readings < 5 + FEWEST_ROUNDS:
        assert found is None
    else:
        assert found is not None and found.choice == "64x64"
