"""Train the demo checkpoint: a small `Wav2Vec2BertForCTC` on 20 minutes of telephone prompts.

    python examples/make_synthetic_speech.py DATA SYNTHETIC --count 4000
    python examples/train_demo.py DATA OUT --synthetic SYNTHETIC --steps 9000 --bf16

DATA holds `manifest.jsonl` (`file`, `text`, `split`) and the clips; only rows of the split "train"
are trained on, the split "test" is only scored. SYNTHETIC has the same form without splits. OUT
gets `last.pt` (everything that a resumed run needs: the same command goes on where it stopped),
`log.jsonl`, `curve.png` and, at the end, `model/` with the averaged weights in half precision.

A clip is held as log-mel frames at several speeds. A training utterance is a clip, several clips
in a row, or, with `--segments`, a new sentence put together from single words of the real speaker
(see `examples/align_words.py`). Frames are normalised after that, as the feature extractor does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import jiwer
import matplotlib
import numpy as np
import soundfile
import soxr
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from w2vbert_fast import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
)

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


class Sampler:
    """Draws training utterances; all randomness comes from one generator."""

    def __init__(
        self,
        real: list[Clip],
        synthetic: list[Clip],
        words: dict[str, list[np.ndarray]],
        sentences: list[str],
        seed: int,
    ) -> None:
        self.real, self.synthetic, self.words = real, synthetic, words
        self.sentences = sentences
        self.rng = random.Random(seed)

    def utterance(self, real_share: float) -> tuple[str, np.ndarray]:
        """A text and its log-mel frames."""
        draw = self.rng.random()
        if self.synthetic and draw >= real_share:
            return self._joined(self.synthetic, 0.2)
        if self.words and draw < 0.4 * real_share:
            return self._spliced()
        return self._joined(self.real, 0.5)

    def _joined(self, clips: list[Clip], join: float) -> tuple[str, np.ndarray]:
        texts, parts = [], []
        length = 0
        while True:
            clip = self.rng.choice(clips)
            frames = self.rng.choice(clip.frames)
            texts.append(clip.text)
            parts.append(frames)
            length += len(frames)
            if length > MAX_FRAMES // 8 or self.rng.random() >= join:
                return " ".join(texts), np.concatenate(parts)

    def _spliced(self) -> tuple[str, np.ndarray]:
        """A random sentence, each word cut from a recording of the real speaker."""
        words = self.rng.choice(self.sentences).split()
        return " ".join(words), np.concatenate([self.rng.choice(self.words[w]) for w in words])

    def batches(self, frame_budget: int, real_share: float, pool: int = 8):
        """Batches of about `frame_budget` 20 ms frames, from a pool sorted by length."""
        utterances = []
        total = 0
        while total < frame_budget * pool:
            text, frames = self.utterance(real_share)
            frames = warp_and_mask(frames, self.rng)
            utterances.append((text, frames))
            total += len(frames) // 2
        utterances.sort(key=lambda item: len(item[1]))
        batches: list[list[tuple[str, np.ndarray]]] = [[]]
        for item in utterances:
            longest = max(len(item[1]) // 2, 1)
            if batches[-1] and (len(batches[-1]) + 1) * longest > frame_budget:
                batches.append([])
            batches[-1].append(item)
        self.rng.shuffle(batches)
        return batches


def collate(
    batch: list[tuple[str, np.ndarray]], tokenizer: Wav2Vec2CTCTokenizer
) -> dict[str, torch.Tensor]:
    features = [as_features(frames) for _, frames in batch]
    labels = [torch.tensor(tokenizer(text).input_ids) for text, _ in batch]
    mask = [torch.ones(len(f), dtype=torch.long) for f in features]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_features": pad(features, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


@torch.no_grad()
def transcribe(
    model: Wav2Vec2BertForCTC, clips: list[Clip], processor: Wav2Vec2BertProcessor
) -> list[str]:
    """Greedy transcripts of clips at their first speed."""
    model.eval()
    texts = []
    for clip in clips:
        logits = model(as_features(clip.frames[0])[None]).logits
        texts.append(processor.batch_decode(logits.argmax(-1))[0])
    return texts


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_curve(log: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot([row["step"] for row in log], [row["loss"] for row in log])
    left.set(xlabel="step", ylabel="CTC loss (training)", yscale="log")
    scored = [row for row in log if "wer" in row]
    for key, label in (("wer", "all held-out clips"), ("wer_in_vocabulary", "in-vocabulary clips")):
        right.plot([r["step"] for r in scored], [100 * r[key] for r in scored], label=label)
    right.set(xlabel="step", ylabel="word error rate, %", ylim=(0, 105))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--synthetic", type=Path)
    parser.add_argument("--segments", type=Path, help="word cuts made by align_words.py")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--peak-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=400)
    parser.add_argument("--frame-budget", type=int, default=2000, help="20 ms frames in a batch")
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products (autocast)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    processor = make_processor(args.out / "processor")
    tokenizer = processor.tokenizer
    rows = [json.loads(line) for line in (args.data / "manifest.jsonl").open(encoding="utf-8")]
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    in_vocabulary = [row["oov"] == [] for row in test]

    extractor = processor.feature_extractor
    real = load_clips(args.data, train, REAL_SPEEDS, extractor)
    real = [clip for clip in real if max(map(len, clip.frames)) <= MAX_FRAMES]
    held_out = load_clips(args.data, test, (1.0,), extractor)
    synthetic: list[Clip] = []
    if args.synthetic:
        manifest = (args.synthetic / "manifest.jsonl").open(encoding="utf-8")
        rng = random.Random(args.seed)
        for line in manifest:
            row = json.loads(line)
            speed = rng.choice(SYNTHETIC_SPEEDS)
            synthetic += load_clips(args.synthetic, [row], (speed,), extractor)
    words: dict[str, list[np.ndarray]] = {}
    if args.segments:
        words = torch.load(args.segments, weights_only=False)
    sentences = [
        clip.text
        for clip in [*real, *synthetic]
        if len(clip.text.split()) <= 16 and all(word in words for word in clip.text.split())
    ]
    sampler = Sampler(real, synthetic, words, sentences, args.seed)
    print(f"{len(real)} real, {len(synthetic)} synthetic clips, {len(words)} cut words", flush=True)

    model = make_model(tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.02, foreach=True
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    log: list[dict] = []
    step = 0
    last = args.out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        torch.set_rng_state(state["torch_rng"])
        sampler.rng.setstate(state["sampler_rng"])
        log, step = state["log"], state["step"]
        print(f"resumed at step {step}", flush=True)

    def save() -> None:
        temporary = last.with_suffix(".tmp")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "sampler_rng": sampler.rng.getstate(),
                "log": log,
                "step": step,
            },
            temporary,
        )
        temporary.replace(last)
        with (args.out / "log.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in log)
        draw_curve(log, args.out / "curve.png")

    def score() -> dict[str, float]:
        texts = transcribe(average.module, held_out, processor)
        pairs = [(row["text"], text) for row, text in zip(test, texts, strict=True)]
        known = [pair for pair, inside in zip(pairs, in_vocabulary, strict=True) if inside]
        return {
            "wer": jiwer.wer(*map(list, zip(*pairs, strict=True))),
            "wer_in_vocabulary": jiwer.wer(*map(list, zip(*known, strict=True))),
        }

    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    losses: list[float] = []
    started, first_step = time.monotonic(), step
    while step < args.steps:
        # Synthetic voices teach letters and words; the real speaker takes over towards the end.
        real_share = min(1.0, 0.5 + 0.6 * step / args.steps) if synthetic else 1.0
        for batch in sampler.batches(args.frame_budget, real_share):
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.peak_learning_rate, args.warmup)
            with autocast:
                loss = model(**collate(batch, tokenizer)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            losses.append(loss.item())
            step += 1
            if step % 50 == 0 or step == args.steps:
                row = {"step": step, "loss": sum(losses) / len(losses)}
                row["steps_per_minute"] = 60 * (step - first_step) / (time.monotonic() - started)
                losses.clear()
                if step % args.evaluate_every == 0 or step == args.steps:
                    row |= score()
                log.append(row)
                print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
                if step % args.evaluate_every == 0 or step == args.steps:
                    save()
            if step == args.steps:
                break

    final = average.module.to(torch.float16)
    final.save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
