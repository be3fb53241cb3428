"""Cut the training recordings into words, with a CTC model that has already learned a little.

    python examples/align_words.py DATA OUT/last SEGMENTS.pt

Each training clip, at each speed of `train_demo.py`, is aligned with its transcript by the most
likely CTC path (Viterbi). A word's cut runs from the middle of the gap before its first letter to
the middle of the gap behind its last one. Poorly aligned clips are left out. SEGMENTS.pt holds,
for each word, a list of log-mel frames `[frames, 80]`; `train_demo.py --segments` makes new
sentences of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from train_demo import REAL_SPEEDS, as_features, load_clips

from w2vbert_fast import Wav2Vec2BertForCTC, Wav2Vec2BertProcessor


def viterbi(log_probabilities: Tensor, labels: list[int], blank: int) -> tuple[list[int], float]:
    """The most likely CTC path through `labels`.

    Args:
        log_probabilities: `[T, vocab]`.
        labels: token ids of the transcript.
        blank: id of the blank.

    Returns:
        For each frame the index of the label it belongs to, or -1 for a blank; and the mean log
        probability of a frame on the path. An utterance too short for its labels gives -inf.
    """
    states = [blank]
    for label in labels:
        states += [label, blank]
    emitted = log_probabilities[:, states].double().numpy()  # [T, 2 U + 1]
    frames, count = emitted.shape
    may_skip = np.zeros(count, dtype=bool)
    for state in range(3, count, 2):
        may_skip[state] = states[state] != states[state - 2]
    score = np.full(count, -np.inf)
    score[:2] = emitted[0, :2]
    back = np.zeros((frames, count), dtype=np.int64)
    for t in range(1, frames):
        candidates = np.full((3, count), -np.inf)
        candidates[0] = score
        candidates[1, 1:] = score[:-1]
        candidates[2, 2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        back[t] = candidates.argmax(0)
        score = candidates.max(0) + emitted[t]
    state = count - 1 if score[-1] >= score[-2] else count - 2
    best = float(score[state]) / frames
    path = [0] * frames
    for t in range(frames - 1, -1, -1):
        path[t] = (state - 1) // 2 if state % 2 else -1
        state -= int(back[t, state])
    return path, best


def word_spans(path: list[int], text: str) -> list[tuple[str, int, int]]:
    """`(word, first frame, end frame)` of each word of `text`, from the path of its characters."""
    spans = []
    start = 0
    for word in text.split():
        letters = range(start, start + len(word))
        hit = [t for t, label in enumerate(path) if label in letters]
        spans.append((word, hit[0], hit[-1] + 1))
        start += len(word) + 1  # the delimiter
    cuts = [0]
    for (_, _, end), (_, following, _) in itertools.pairwise(spans):
        cuts.append((end + following + 1) // 2)
    cuts.append(len(path))
    return [(word, cuts[i], cuts[i + 1]) for i, (word, _, _) in enumerate(spans)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path, help="last/ of train_demo.py")
    parser.add_argument("segments", type=Path)
    parser.add_argument("--worst-score", type=float, default=-0.5, help="mean log probability")
    args = parser.parse_args()

    processor = Wav2Vec2BertProcessor.from_pretrained(args.checkpoint)
    model = Wav2Vec2BertForCTC.from_pretrained(args.checkpoint, dtype=torch.float32)

    rows = [json.loads(line) for line in (args.data / "manifest.jsonl").open(encoding="utf-8")]
    train = [row for row in rows if row["split"] == "train"]
    clips = load_clips(args.data, train, REAL_SPEEDS, processor.feature_extractor)
    words: dict[str, list[np.ndarray]] = {}
    used = 0
    for clip in clips:
        labels = processor.tokenizer(clip.text).input_ids
        for frames in clip.frames:
            logits = model(as_features(frames)[None]).logits[0]
            path, score = viterbi(logits.log_softmax(-1), labels, model.config.pad_token_id)
            if score < args.worst_score:
                continue
            used += 1
            for word, start, end in word_spans(path, clip.text):
                # One encoder frame is two mel frames.
                words.setdefault(word, []).append(frames[2 * start : 2 * end])
    torch.save(words, args.segments)
    total = len(clips) * len(REAL_SPEEDS)
    print(
        f"{used} of {total} clips aligned; "
        f"{sum(map(len, words.values()))} cuts of {len(words)} words"
    )


if __name__ == "__main__":
    main()
