"""Decoded frames at the times that their file gives them: silence where there are none.

A file's time stamps say when a frame is presented. Between two of them there may be nothing, since
a call was muted or packets were lost; a player is silent there, and so is what is made here.

Time stamps are also rounded, jittered, and start anew where two streams were joined. So a gap
counts when it is as long as those that FFmpeg's resampler fills, and is still there a second later;
frames that come early follow those before them; and a clock that jumps back is a new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from w2vbert_fast.recordings.audio_files import Block, Damaged

# `min_hard_comp` of FFmpeg's resampler: what is shorter is jitter.
_SMALLEST_GAP = 0.1
# Before the first frame there is no jitter, but there is an encoder's delay.
_SMALLEST_LEAD = 0.01
_LOOK_AHEAD = 1.0
_CLOCK_JUMPS_BACK = 1.0
_CLOCK_JUMPS_AHEAD = 3600.0
_LONGEST_GAP = 24 * 3600.0


class Frame(NamedTuple):
    """A decoded frame.

    Attributes:
        time: when it is presented, in seconds; None: after the frame before it.
        block: its samples.
    """

    time: float | None
    block: Block


def on_timeline(
    frames: Iterable[Frame], origin: float | None, clock_restarts: bool
) -> Iterator[Block]:
    """The samples of frames, with silence where the time stamps leave a gap.

    Args:
        frames: in the order of the file.
        origin: when the earliest of the file's other streams begins, in seconds, which is the time
            0 of a player if this stream begins later; None: there are none.
        clock_restarts: the format lets its clock jump, so that hours ahead are another clock.

    Raises:
        Damaged: a gap is longer than a day.
    """
    held: deque[tuple[float, Block]] = deque()  # by how much frames are late, if nothing is silent
    held_seconds = 0.0
    first: float | None = None
    played = silent = shift = late = 0.0

    def release(at_the_end: bool) -> Iterator[Block]:
        nonlocal held_seconds, silent
        while held:
            behind, block = held[0]
            if behind - silent > _SMALLEST_GAP:
                if held_seconds < _LOOK_AHEAD and not at_the_end:
                    return
                gap = min(later for later, _ in held) - silent
                if gap > _SMALLEST_GAP:
                    silence = _silence(gap, block)
                    silent += silence.seconds
                    yield silence
            held.popleft()
            held_seconds -= block.seconds
            yield block

    for time, block in frames:
        if time is not None:
            if first is None:
                first = time - played
                lead = 0.0 if origin is None else first - origin
                if lead > _SMALLEST_LEAD:
                    yield _silence(lead, block)
            now = time - first - played + shift
            jump = now - late
            if now - silent < -_CLOCK_JUMPS_BACK or (clock_restarts and jump > _CLOCK_JUMPS_AHEAD):
                shift -= jump
                now = late
            late = now
        held.append((late, block))
        held_seconds += block.seconds
        played += block.seconds
        yield from release(False)
    yield from release(True)


def _silence(seconds: float, like: Block) -> Block:
    if seconds > _LONGEST_GAP:
        raise Damaged(
            f"damaged: its time stamps leave out {seconds / 3600:.0f} hours between two frames"
        )
    count = round(seconds * like.sampling_rate)
    # A view that takes no memory.
    shape = (like.samples.shape[0], count)
    return Block(like.sampling_rate, np.broadcast_to(np.float32(0), shape))
