"""Train the demo checkpoint: a small `Wav2Vec2BertForCTC` on 20 minutes of telephone prompts.

    python examples/make_synthetic_speech.py DATA SYNTHETIC --count 4000
    python examples/train_demo.py DATA OUT --synthetic SYNTHETIC --precision bf16

DATA holds `manifest.jsonl` (`file`, `text`, `split`) and the clips; only rows of the split "train"
are trained on, the split "test" is only scored. SYNTHETIC has the same form without splits.

The training itself is `w2vbert_fast.training.finetune`: OUT gets what `docs/use/finetune.md` lists,
the same command goes on where it was killed, and at the end there is `model/` with the averaged
weights in half precision. What is here is the data: a clip is held as log-mel frames at several
speeds, and a training utterance is a clip, several clips in a row, or, with `--segments`, a new
sentence put together from single words of the real speaker (see `examples/align_words.py`). Frames
are normalised after that, as the feature extractor does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from w2vbert_fast import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
)
from w2vbert_fast.training import FinetuneConfig, Utterance, finetune
from w2vbert_fast.training.scores import error_rates

SAMPLING_RATE = 16_000
REAL_SPEEDS = (0.85, 0.92, 1.0, 1.08, 1.16)
SYNTHETIC_SPEEDS = (0.9, 1.0, 1.1)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz'"
MAX_FRAMES = (
    3000  # of 10 ms: longer clips are not trained on, joined ones stay below an eighth of it
)


def make_processor(folder: Path) -> Wav2Vec2BertProcessor:
    """A character tokenizer (blank, word delimiter, a-z, apostrophe) and the mel front end."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "|", *CHARACTERS]
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(path),
        bos_token=None,
        eos_token=None,
        unk_token="[UNK]",
        pad_token="[PAD]",
        word_delimiter_token="|",
    )
    return Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(padding_value=1.0), tokenizer)


def make_model(tokenizer: Wav2Vec2CTCTokenizer) -> Wav2Vec2BertForCTC:
    return Wav2Vec2BertForCTC(
        Wav2Vec2BertConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=640,
            ctc_loss_reduction="mean",
            ctc_zero_infinity=True,
            # Dropout on the wide activations would cost a third of a step on a CPU.
            conformer_conv_dropout=0.1,
            final_dropout=0.1,
            layerdrop=0.0,
            mask_time_prob=0.05,
            mask_time_length=8,
            mask_time_min_masks=0,
            mask_feature_prob=0.05,
            mask_feature_length=16,
        )
    )


@dataclass
class Clip:
    """One recording: its words and its log-mel frames, float16 `[frames, 80]`, at each speed."""

    text: str
    frames: list[np.ndarray]


def load_clips(
    folder: Path,
    rows: list[dict],
    speeds: tuple[float, ...],
    extractor: SeamlessM4TFeatureExtractor,
) -> list[Clip]:
    """Log-mel frames, not yet normalised, of every row at every speed."""
    clips = []
    for row in rows:
        samples, rate = soundfile.read(folder / row["file"], dtype="float32")
        frames = []
        for speed in speeds:
            changed = soxr.resample(samples, rate * speed, SAMPLING_RATE)
            mel = extractor(
                changed,
                sampling_rate=SAMPLING_RATE,
                do_normalize_per_mel_bins=False,
                return_tensors="np",
            )["input_features"]
            frames.append(mel[0].reshape(-1, 80).astype(np.float16))
        clips.append(Clip(row["text"], frames))
    return clips


def as_features(frames: np.ndarray) -> torch.Tensor:
    """Log-mel `[frames, 80]` -> normalised and stacked in pairs, `[frames // 2, 160]`."""
    frames = frames.astype(np.float32)
    frames = (frames - frames.mean(0)) / np.sqrt(frames.var(0, ddof=1) + 1e-7)
    even = len(frames) // 2 * 2
    return torch.from_numpy(frames[:even].reshape(-1, 160))


def warp_and_mask(frames: np.ndarray, rng: random.Random) -> np.ndarray:
    """Stretch the mel axis as another vocal tract would, and blank out two bands of it.

    Args:
        frames: log-mel `[frames, 80]`.
        rng: where the randomness comes from.

    Returns:
        A changed copy, float32 `[frames, 80]`; a blanked bin holds its mean over time, which
        becomes 0 when the utterance is normalised.
    """
    bins = frames.shape[1]
    frames = frames.astype(np.float32)
    if rng.random() < 0.6:
        source = np.clip(np.arange(bins) * rng.uniform(0.92, 1.08), 0, bins - 1)
        lower = np.minimum(source.astype(int), bins - 2)
        share = (source - lower).astype(np.float32)
        frames = frames[:, lower] * (1 - share) + frames[:, lower + 1] * share
    for _ in range(2):
        width = rng.randint(0, 12)
        first = rng.randint(0, bins - width)
        frames[:, first : first + width] = frames[:, first : first + width].mean(0)
    return frames


@dataclass
class Draw:
    """What a training utterance is made of: its words, and stretches of log-mel `[frames, 80]`."""

    text: str
    parts: list[np.ndarray]

    @property
    def length(self) -> int:
        """Log-mel frames, 10 ms each."""
        return sum(map(len, self.parts))


class TrainingUtterances:
    """Utterances put together at random; each follows from the seed, the epoch and its index.

    Args:
        real: clips of the real speaker.
        synthetic: clips of synthetic voices, which teach letters and words.
        words: stretches of the real speaker's log-mel frames for each word.
        tokenizer: makes the labels.
        count: utterances in an epoch.
        epochs: epochs in all.
        seed: where the randomness comes from.
    """

    def __init__(
        self,
        real: list[Clip],
        synthetic: list[Clip],
        words: dict[str, list[np.ndarray]],
        tokenizer: Wav2Vec2CTCTokenizer,
        count: int,
        epochs: int,
        seed: int,
    ) -> None:
        self.real, self.synthetic, self.words = real, synthetic, words
        self.sentences = [
            clip.text
            for clip in [*real, *synthetic]
            if len(clip.text.split()) <= 16 and all(word in words for word in clip.text.split())
        ]
        self.tokenizer, self.count, self.epochs, self.seed = tokenizer, count, epochs, seed

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return f"{digest([*self.real, *self.synthetic])} {len(self.words)} {self.count}"

    def num_frames(self, index: int, epoch: int) -> int:
        return self._draw(self._rng(index, epoch), epoch).length // 2

    def load(self, index: int, epoch: int) -> Utterance:
        rng = self._rng(index, epoch)
        draw = self._draw(rng, epoch)
        features = as_features(warp_and_mask(np.concatenate(draw.parts), rng))
        labels = torch.tensor(self.tokenizer(draw.text).input_ids)
        return Utterance(f"{epoch}:{index} ({draw.text})", features, labels, draw.text)

    def _rng(self, index: int, epoch: int) -> random.Random:
        return random.Random(f"{self.seed} {epoch} {index}")

    def _draw(self, rng: random.Random, epoch: int) -> Draw:
        # The real speaker takes over towards the end.
        real_share = min(1.0, 0.5 + 0.6 * epoch / self.epochs) if self.synthetic else 1.0
        share = rng.random()
        if self.synthetic and share >= real_share:
            return joined(self.synthetic, 0.2, rng)
        if self.sentences and share < 0.4 * real_share:
            # A random sentence, each word cut from a recording of the real speaker.
            words = rng.choice(self.sentences).split()
            return Draw(" ".join(words), [rng.choice(self.words[word]) for word in words])
        return joined(self.real, 0.5, rng)


def joined(clips: list[Clip], probability: float, rng: random.Random) -> Draw:
    """A random clip, followed by another one with some probability, and so on."""
    draw = Draw("", [])
    texts = []
    while True:
        clip = rng.choice(clips)
        texts.append(clip.text)
        draw.parts.append(rng.choice(clip.frames))
        if draw.length > MAX_FRAMES // 8 or rng.random() >= probability:
            return Draw(" ".join(texts), draw.parts)


class HeldOutClips:
    """Clips as they are, for scoring."""

    def __init__(self, clips: list[Clip], tokenizer: Wav2Vec2CTCTokenizer) -> None:
        self.clips, self.tokenizer = clips, tokenizer

    def __len__(self) -> int:
        return len(self.clips)

    def fingerprint(self) -> str:
        return digest(self.clips)

    def num_frames(self, index: int, epoch: int) -> int:
        return len(self.clips[index].frames[0]) // 2

    def load(self, index: int, epoch: int) -> Utterance:
        clip = self.clips[index]
        labels = torch.tensor(self.tokenizer(clip.text).input_ids)
        return Utterance(str(index), as_features(clip.frames[0]), labels, clip.text)


def digest(clips: list[Clip]) -> str:
    """Changes when a clip does."""
    found = hashlib.sha256()
    for clip in clips:
        found.update(clip.text.encode())
        for frames in clip.frames:
            found.update(frames.tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--synthetic", type=Path)
    parser.add_argument("--segments", type=Path, help="word cuts made by align_words.py")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, not from nothing")
    parser.add_argument("--epochs", type=int, default=72)
    parser.add_argument("--utterances", type=int, default=1000, help="in an epoch")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=400)
    parser.add_argument("--frame-budget", type=int, default=2000, help="20 ms frames in a batch")
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_args()

    start = args.out / "start"
    processor = make_processor(start)
    tokenizer = processor.tokenizer
    manifest = args.data / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.open(encoding="utf-8")]
    test = [row for row in rows if row["split"] == "test"]

    extractor = processor.feature_extractor
    train = [row for row in rows if row["split"] == "train"]
    real = load_clips(args.data, train, REAL_SPEEDS, extractor)
    real = [clip for clip in real if max(map(len, clip.frames)) <= MAX_FRAMES]
    held_out = load_clips(args.data, test, (1.0,), extractor)
    synthetic: list[Clip] = []
    if args.synthetic:
        rng = random.Random(args.seed)
        for line in (args.synthetic / "manifest.jsonl").open(encoding="utf-8"):
            speed = rng.choice(SYNTHETIC_SPEEDS)
            synthetic += load_clips(args.synthetic, [json.loads(line)], (speed,), extractor)
    words: dict[str, list[np.ndarray]] = {}
    if args.segments:
        words = torch.load(args.segments, weights_only=False)
    print(f"{len(real)} real, {len(synthetic)} synthetic clips, {len(words)} cut words", flush=True)

    torch.manual_seed(args.seed)
    model = make_model(tokenizer)
    if args.start:
        trained = Wav2Vec2BertForCTC.from_pretrained(args.start, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    model.save_pretrained(start)
    processor.save_pretrained(start)

    config = FinetuneConfig(
        model=start,
        train=manifest,
        eval=manifest,
        out=args.out,
        epochs=args.epochs,
        frame_budget=args.frame_budget,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        decay="cosine",
        weight_decay=0.02,
        average=0.998,
        precision=args.precision,
        evaluate_every=args.evaluate_every,
        log_every=50,
        # All frames are in memory.
        num_workers=0,
        seed=args.seed,
    )
    result = finetune(
        config,
        train=TrainingUtterances(
            real, synthetic, words, tokenizer, args.utterances, args.epochs, args.seed
        ),
        evaluation=HeldOutClips(held_out, tokenizer),
    )
    lines = (args.out / "predictions.jsonl").open(encoding="utf-8")
    predictions = [json.loads(line) for line in lines]
    known = [
        (row["reference"], row["hypothesis"])
        for row in predictions
        if test[int(row["name"])]["oov"] == []
    ]
    print(f"best word error rate {100 * result.best_score:.2f} % at step {result.best_step}")
    if known:
        print(f"in-vocabulary clips, last step: {100 * error_rates(known)['wer']:.2f} %")
    final = Wav2Vec2BertForCTC.from_pretrained(result.last).to(torch.float16)
    final.save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
