"""Synthesise extra training speech from the words of a training split.

Sentences are the training transcripts themselves and random walks over their word bigrams, so every
word and almost every word pair occurs in the training data; nothing of the test split is read.
Voices are those of two offline synthesisers, `flite` (slt, rms, awb, kal16) and `espeak-ng`
(American and British accents at several pitches and rates). Both must be on PATH.

    python examples/make_synthetic_speech.py DATA_DIR OUT_DIR --count 3000

OUT_DIR gets `clips/*.flac` (16 kHz mono) and `manifest.jsonl` (`file`, `text`, `seconds`, `voice`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000
FLITE_VOICES = ("slt", "slt", "slt", "rms", "awb", "kal16")
ESPEAK_VOICES = ("en-us", "en-us+f2", "en-us+f3", "en-us+f4", "en-us+m3", "en-gb", "en-gb+f3")
START, END = "<start>", "<end>"


def bigram_successors(transcripts: list[str]) -> dict[str, list[str]]:
    """Words that follow each word in the transcripts, repeated as often as they do."""
    successors: dict[str, list[str]] = {}
    for transcript in transcripts:
        words = [START, *transcript.split(), END]
        for word, following in itertools.pairwise(words):
            successors.setdefault(word, []).append(following)
    return successors


def random_sentence(
    rng: random.Random, successors: dict[str, list[str]], vocabulary: list[str], max_words: int = 14
) -> str:
    """A random walk over the bigrams that now and then jumps to any word of the vocabulary."""
    words: list[str] = []
    current = START
    while len(words) < max_words:
        jump = rng.random() < 0.25
        current = rng.choice(vocabulary) if jump else rng.choice(successors[current])
        if current == END:
            if words:
                break
            current = START
            continue
        words.append(current)
    return " ".join(words)


def speak(text: str, voice: str, rng: random.Random) -> np.ndarray:
    """Synthesise `text` with `voice` ("flite:NAME" or "espeak:NAME"): float32 at 16 kHz."""
    engine, name = voice.split(":")
    if engine == "flite":
        stretch = rng.uniform(0.9, 1.3)
        command = ["flite", "-voice", name, "--setf", f"duration_stretch={stretch:.2f}"]
        command += ["-t", text, "-o", "/dev/stdout"]
    else:
        command = ["espeak-ng", "-v", name, "-s", str(rng.randint(120, 190))]
        command += ["-p", str(rng.randint(35, 75)), "--stdout", text]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    # Both tools write a RIFF header with an unknown length to a pipe: read the samples behind it.
    rate = int.from_bytes(wav[24:28], "little")
    pcm = np.frombuffer(wav[44 : 44 + (len(wav) - 44) // 2 * 2], dtype="<i2")
    samples = pcm.astype(np.float32) / 32768
    return samples if rate == SAMPLING_RATE else soxr.resample(samples, rate, SAMPLING_RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with manifest.jsonl (split, text)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    rows = [json.loads(line) for line in (args.data / "manifest.jsonl").open(encoding="utf-8")]
    transcripts = [row["text"] for row in rows if row["split"] == "train"]
    successors = bigram_successors(transcripts)
    vocabulary = sorted({word for transcript in transcripts for word in transcript.split()})
    short = [transcript for transcript in transcripts if len(transcript.split()) <= 14]
    (args.out / "clips").mkdir(parents=True, exist_ok=True)

    def one(index: int) -> dict[str, object]:
        rng = random.Random(f"{args.seed}-{index}")
        if rng.random() < 0.3:
            text = rng.choice(short)
        else:
            text = random_sentence(rng, successors, vocabulary)
        if rng.random() < 0.75:
            voice = "flite:" + rng.choice(FLITE_VOICES)
        else:
            voice = "espeak:" + rng.choice(ESPEAK_VOICES)
        samples = speak(text, voice, rng)
        name = f"clips/{index:06d}.flac"
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        (args.out / name).write_bytes(buffer.getvalue())
        seconds = round(len(samples) / SAMPLING_RATE, 3)
        return {"file": name, "text": text, "seconds": seconds, "voice": voice}

    with ThreadPoolExecutor(args.threads) as pool:
        made = list(pool.map(one, range(args.count)))
    with (args.out / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        for row in made:
            manifest.write(json.dumps(row) + "\n")
    hours = sum(float(str(row["seconds"])) for row in made) / 3600
    print(f"{len(made)} clips, {hours:.2f} h, in {args.out}")


if __name__ == "__main__":
    main()
