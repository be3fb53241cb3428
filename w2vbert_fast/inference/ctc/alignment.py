"""Forced alignment: the most probable CTC path through a known transcript, by Viterbi search.

The recursion is that of CTC's forward variables (Graves et al. 2006, section 4.1) with the maximum
in place of the sum, as in Kürzinger et al. 2020 and torchaudio's `forced_align`.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Back pointers that are kept at a time, one byte each.
_MAX_BACK_POINTERS = 1 << 26


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
    search = _Viterbi(emitted, columns[1:], int(columns[0]))
    path: npt.NDArray[np.int64] = tokens[search.path()]
    return path


class _Viterbi:
    """The search through the states blank, label, blank, label, ..., blank.

    Args:
        emitted: float64 ``[num_frames, num_tokens]``, log-probabilities of the distinct tokens.
        labels: ``[num_labels]``, the token of each label.
        blank: the token of the blank.
    """

    def __init__(
        self, emitted: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], blank: int
    ) -> None:
        self.emitted = emitted
        self.states = np.full(2 * len(labels) + 1, blank)
        self.states[1::2] = labels
        # A blank between two labels may be skipped unless they are equal.
        self.may_skip = np.zeros(len(self.states), bool)
        self.may_skip[3::2] = labels[1:] != labels[:-1]

    def path(self) -> npt.NDArray[np.int64]:
        """The token of each frame, ``[num_frames]``."""
        num_frames, num_states = len(self.emitted), len(self.states)
        block = num_frames
        if num_frames * num_states > _MAX_BACK_POINTERS:
            # A kept score takes 8 bytes, a back pointer one: this many frames balance them.
            block = math.isqrt(8 * num_frames)
        starts = range(0, num_frames, block)
        scores = np.full(num_states, -np.inf)
        scores[0] = 0.0
        kept = [scores]
        for start in starts[:-1]:
            kept.append(self._advance(kept[-1], start, start + block, None))
        state = -1
        tokens = np.empty(num_frames, np.int64)
        for start, scores in zip(reversed(starts), reversed(kept), strict=True):
            end = min(start + block, num_frames)
            back = np.zeros((end - start, num_states), np.int8)
            scores = self._advance(scores, start, end, back)
            if state < 0:
                state = num_states - 1
                if num_states > 1 and scores[-2] > scores[-1]:
                    state -= 1
                if scores[state] == -np.inf:
                    raise ValueError("text has probability 0 in log_probs")
            for t in range(end - 1, start - 1, -1):
                tokens[t] = self.states[state]
                state -= int(back[t - start, state])
        return tokens

    def _advance(
        self,
        scores: npt.NDArray[np.float64],
        first: int,
        last: int,
        back: npt.NDArray[np.int8] | None,
    ) -> npt.NDArray[np.float64]:
        """Scores ``[num_states]`` after frame `last - 1` from those before frame `first`.

        `back` ``[last - first, num_states]`` receives from how many states below each came.
        """
        may_skip = self.may_skip[2:]
        for t in range(first, last):
            best = scores.copy()
            better = scores[:-1] > best[1:]
            best[1:][better] = scores[:-1][better]
            skips = may_skip & (scores[:-2] > best[2:])
            best[2:][skips] = scores[:-2][skips]
            if back is not None:
                back[t - first, 1:] = better
                back[t - first, 2:][skips] = 2
            scores = best + self.emitted[t, self.states]
        return scores
