"""Which utterances make a batch: length buckets, a budget of frames, and shares of processes.

The batches of an epoch follow from the seed and the epoch alone. A position in the training data is
therefore two numbers, the epoch and how many steps of it are done.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from w2vbert_fast.training.data import UtteranceSource

BUCKET_RATIO = 1.15
"""Lengths within one bucket differ by no more than this factor."""


def frame_budget_batches(
    lengths: Sequence[int], budget: int, rng: random.Random
) -> list[list[int]]:
    """Group utterances of similar length.

    Utterances are shuffled within their bucket, the buckets are gone through from short to long,
    and a batch is closed when the next utterance would exceed the budget; then the batches are
    shuffled.

    Args:
        lengths: frames of each utterance, at least 1.
        budget: most frames in a batch. A longer utterance is a batch of its own.
        rng: where the order comes from.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    # The sort is stable, so the order within a bucket stays random.
    order.sort(key=lambda index: int(math.log(lengths[index]) / math.log(BUCKET_RATIO)))
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not batches or lengths[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= lengths[index]
    rng.shuffle(batches)
    return batches


class BatchPlan:
    """The batches of every epoch, dealt out to processes and steps.

    A step takes `accumulate` batches of each of `num_processes` processes. What is left at the end
    of an epoch and fills no step is left out (other utterances in each epoch); an epoch of less
    than one step starts over within the step.

    Args:
        source: the data.
        budget: frames in a batch of one process.
        num_processes: processes that train together.
        accumulate: batches of one process in a step.
        seed: where the order comes from.

    Raises:
        ValueError: the source is empty.
    """

    def __init__(
        self,
        source: UtteranceSource,
        budget: int,
        num_processes: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        if len(source) == 0:
            raise ValueError("there is nothing to train on: no utterance is left")
        self.source = source
        self.budget = budget
        self.num_processes = num_processes
        self.accumulate = accumulate
        self.seed = seed
        self._epoch: tuple[int, list[list[list[int]]]] | None = None

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """The steps of an epoch: for each, its batches; process 0's first batch comes first."""
        if self._epoch is None or self._epoch[0] != epoch:
            lengths = [max(1, self.source.num_frames(i, epoch)) for i in range(len(self.source))]
            rng = random.Random(f"batches {self.seed} {epoch}")
            batches = frame_budget_batches(lengths, self.budget, rng)
            per_step = self.num_processes * self.accumulate
            if len(batches) < per_step:
                batches = [batches[i % len(batches)] for i in range(per_step)]
            count = len(batches) // per_step
            grouped = [batches[i * per_step : (i + 1) * per_step] for i in range(count)]
            self._epoch = (epoch, grouped)
        return self._epoch[1]

    def num_steps(self, epochs: int) -> int:
        """Steps in a number of epochs."""
        return sum(len(self.steps(epoch)) for epoch in range(epochs))

    def keys(self, process: int, epoch: int, done: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of one process in the rest of an epoch.

        Args:
            process: index of the process.
            epoch: the epoch.
            done: steps of the epoch to leave out.

        Yields:
            (index, epoch) of each utterance of a batch; `accumulate` batches for each step.
        """
        for step in self.steps(epoch)[done:]:
            for batch in step[process :: self.num_processes]:
                yield [(index, epoch) for index in batch]
