"""Forced alignment: the most probable CTC path through a known transcript, by Viterbi search.

The recursion is that of CTC's forward variables (Graves et al. 2006, section 4.1) with the maximum
in place of the sum, as in Kürzinger et al. 2020 and torchaudio's `forced_align`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Back pointers that are kept at a time, one byte each.
_MAX_BACK_POINTERS = 1 << 26
_FARTHEST = 3


def align(log_probs: Tensor, labels: list[int], blank: int) -> npt.NDArray[np.int64]:
    """The most probable CTC path that collapses to given labels (Viterbi search, in float64).

    Where the back pointers of all frames would take more than 64 MB, only every so many scores are
    kept and the frames in between are searched twice: memory grows with the square root of the
    length.

    Args:
        log_probs: floating point ``[num_frames, vocab]``, log-softmax.
        labels: the ids of the transcript's characters, without the blank.
        blank: id of the blank.

    Returns:
        int64 ``[num_frames]``, the token of each frame. Where two paths are equally probable, the
        one that stays longer on a token.

    Raises:
        ValueError: a label is no column of `log_probs` or is the blank; or there are fewer frames
            than the labels need, a frame each and a blank between repeats.
    """
    num_frames, vocab = log_probs.shape
    wrong = [label for label in labels if label == blank or not 0 <= label < vocab]
    if wrong or not 0 <= blank < vocab:
        raise ValueError(
            f"labels must be ids below {vocab} other than the blank {blank}, got {wrong[:5]}"
        )
    repeats = sum(a == b for a, b in itertools.pairwise(labels))
    if num_frames < len(labels) + repeats:
        raise ValueError(
            f"text needs at least {len(labels) + repeats} frames, log_probs has {num_frames}"
        )
    if not num_frames:
        return np.zeros(0, np.int64)
    # Each distinct token once: a transcript repeats the few characters of its alphabet.
    tokens, columns = np.unique(np.array([blank, *labels]), return_inverse=True)
    emitted = log_probs[:, torch.from_numpy(tokens).to(log_probs.device)].double().cpu().numpy()
    states = np.full(2 * len(labels) + 1, columns[0])
    states[1::2] = columns[1:]
    # A blank between two labels may be skipped unless they are equal.
    skips = np.zeros(len(states), np.int8)
    skips[3::2] = columns[2:] != columns[1:-1]
    path = best_path(emitted, Graph(states, skips, np.zeros(len(states)), [0.0], 2))
    if path is None:
        raise ValueError("text has probability 0 in log_probs")
    found: npt.NDArray[np.int64] = tokens[states[path]]
    return found


@dataclass(frozen=True)
class Graph:
    """States in a row: in every frame a path stays, or goes on by one state or a few.

    Attributes:
        states: ``[num_states]``, the column of what each emits.
        skips: int8 ``[num_states]``, how many states in front of each may be skipped: bit 0: one;
            bit 1: two.
        entry: float64 ``[num_states]``, what it costs to go on to a state.
        initial: scores of the first states in front of the first frame.
        final: in how many of the last states a path may end.
        progress: float64 ``[num_states]``, what is added to scores where they are compared with
            each other before the end: a path that is ahead has paid for what others still owe.
    """

    states: npt.NDArray[np.int64]
    skips: npt.NDArray[np.int8]
    entry: npt.NDArray[np.float64]
    initial: list[float]
    final: int
    progress: npt.NDArray[np.float64] | None = None


def best_path(
    emitted: npt.NDArray[np.floating], graph: Graph, beam: float = math.inf
) -> npt.NDArray[np.int64] | None:
    """The state of each frame on the best path through a graph (Viterbi search).

    Args:
        emitted: floating point ``[num_frames, num_columns]``, log-probabilities.
        graph: the states.
        beam: in each frame, states in front of the first and behind the last one whose score and
            progress are so close to the best are given up; infinite: none, and the path is the best
            of all.

    Returns:
        int64 ``[num_frames]``; None: all paths to the end have probability 0 or were given up.
    """
    return _Viterbi(emitted, graph, beam).path()


@dataclass
class _Block:
    """Frames in a row: the scores in front of them and, while there is room, back pointers."""

    first: int
    last: int
    low: int
    scores: npt.NDArray[np.float64]
    back: list[tuple[int, npt.NDArray[np.int8]]] | None

    @property
    def size(self) -> int:
        return sum(len(steps) for _, steps in self.back or ())


class _Viterbi:
    def __init__(self, emitted: npt.NDArray[np.floating], graph: Graph, beam: float) -> None:
        self.emitted, self.graph, self.beam = emitted, graph, beam
        # For each step of more than one state, 0 where it may end and minus infinity elsewhere.
        self.allowed = {
            1 + bit: np.where(graph.skips & bit, 0.0, -np.inf)
            for bit in (1, 2)
            if (graph.skips & bit).any()
        }
        self.priced = bool(graph.entry.any())

    def path(self) -> npt.NDArray[np.int64] | None:
        num_frames, num_states = len(self.emitted), len(self.graph.states)
        # A kept score takes 8 bytes, a back pointer one: this many frames balance them.
        step = max(1, math.isqrt(8 * num_frames))
        low, scores = 0, np.array(self.graph.initial)
        blocks: list[_Block] = []
        forgotten = stored = 0
        for first in range(0, num_frames, step):
            block = _Block(first, min(first + step, num_frames), low, scores, None)
            low, scores = self._advance(block)
            blocks.append(block)
            stored += block.size
            while stored > _MAX_BACK_POINTERS and forgotten < len(blocks) - 1:
                stored -= blocks[forgotten].size
                blocks[forgotten].back = None
                forgotten += 1
        ends = scores[max(0, num_states - self.graph.final - low) :]
        if low + len(scores) < num_states or ends.max(initial=-np.inf) == -np.inf:
            return None
        # Of equal ones the last.
        state = num_states - 1 - int(ends[::-1].argmax())
        path = np.empty(num_frames, np.int64)
        for block in reversed(blocks):
            if block.back is None:
                self._advance(block)
            assert block.back is not None
            for t in range(block.last - 1, block.first - 1, -1):
                path[t] = state
                lowest, steps = block.back[t - block.first]
                state -= int(steps[state - lowest])
            block.back = None
        return path

    def _advance(self, block: _Block) -> tuple[int, npt.NDArray[np.float64]]:
        """The first state and the scores behind a block; it gets its back pointers."""
        graph, low, scores = self.graph, block.low, block.scores
        block.back = []
        for t in range(block.first, block.last):
            high = min(low + len(scores) + _FARTHEST, len(graph.states))
            padded = np.full(high - low + _FARTHEST, -np.inf)
            padded[_FARTHEST : _FARTHEST + len(scores)] = scores
            stay, move = padded[_FARTHEST:], padded[_FARTHEST - 1 : -1]
            steps = np.ones(high - low, np.int8)
            for by, allowed in self.allowed.items():
                far = padded[_FARTHEST - by : -by] + allowed[low:high]
                better = far > move
                move = np.where(better, far, move)
                steps[better] = by
            if self.priced:
                move = move - graph.entry[low:high]
            better = move > stay
            steps *= better
            scores = np.where(better, move, stay)
            scores += self.emitted[t].take(graph.states[low:high])
            block.back.append((low, steps))
            if self.beam < math.inf:
                ranked = scores
                if graph.progress is not None:
                    ranked = scores + graph.progress[low:high]
                kept = ranked >= ranked.max() - self.beam
                first, end = int(kept.argmax()), len(kept) - int(kept[::-1].argmax())
                scores = scores[first:end]
                low += first
        return low, scores
