"""How near the times of an alignment are to where clips were joined, and what an hour takes.

    python -m bench.studies.alignment MANIFEST [--model demo] [--hours 1]

MANIFEST is JSON lines with `file`, relative to its folder, `text` and perhaps `split`, of which
only "test" is used. Clips are cut to their speech and joined five at a time with pauses of 0.1 to
0.5 s; printed is the distance of the first word's start and the last word's end of each clip from
where it was put, for the transcript as it is, with capitals and marks, and with digits; then what
is found of a clip, or of a word, that the transcript lacks, and of a word too many. For the hour
the model's output of all that is repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from w2vbert_fast.inference import load_audio, load_pipeline
from w2vbert_fast.inference.ctc.known_text import align_text
from w2vbert_fast.inference.ctc.timestamps import _speech, frame_seconds, measure_delay

CLIPS = 5
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}


def with_marks(text: str) -> str:
    return text.capitalize().replace(" and ", ", and ") + "."


def with_digits(text: str) -> str:
    return re.sub(r"\w+", lambda word: NUMBERS.get(word[0], word[0]), text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--hours", type=float, default=0.0)
    options = parser.parse_args()
    pipeline = load_pipeline(options.model)
    tokenizer, frame = pipeline.processor.tokenizer, frame_seconds(pipeline.model.config)
    delay = measure_delay(pipeline.model, pipeline.processor)
    rows = [json.loads(line) for line in options.manifest.read_text().splitlines()]
    rows = [row for row in rows if row.get("split", "test") == "test"]
    rng = random.Random(0)
    rng.shuffle(rows)
    joined: list[tuple[list[str], list[tuple[float, float]], Tensor]] = []
    for first in range(0, len(rows), CLIPS):
        parts, spans, now = [], [], 0
        for row in rows[first : first + CLIPS]:
            speech = _speech(load_audio(options.manifest.parent / row["file"]).samples)
            pause = rng.randint(1600, 8000)
            parts += [torch.zeros(pause), speech]
            spans.append(((now + pause) / 16_000, (now + pause + len(speech)) / 16_000))
            now += pause + len(speech)
        samples = torch.cat([*parts, torch.zeros(4000)])
        samples += 1e-4 * torch.randn(len(samples), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            logits, _ = pipeline.logits([samples])
        texts = [row["text"] for row in rows[first : first + CLIPS]]
        joined.append((texts, spans, logits[0].float().log_softmax(-1)))

    forms: dict[str, Callable[[str], str]] = {
        "as it is": str,
        "with capitals and marks": with_marks,
        "with digits": with_digits,
    }
    for name, form in forms.items():
        errors, unsaid, unwritten, count = [], 0, 0, 0
        for texts, spans, log_probs in joined:
            shown = [form(text) for text in texts]
            found = align_text(log_probs, " ".join(shown), tokenizer, frame, delay=delay)
            words = iter(found.words)
            for text, (start, end) in zip(shown, spans, strict=True):
                own = [next(words) for _ in text.split()]
                errors += [abs(own[0].start - start), abs(own[-1].end - end)]
                count += len(own)
            unsaid += len(found.unsaid)
            unwritten += len(found.unwritten)
        tenths = statistics.quantiles(errors, n=10)
        print(
            f"{name}: {len(errors)} joints, median {1000 * statistics.median(errors):.0f} ms, "
            f"90 % {1000 * tenths[8]:.0f} ms; of {count} words {unsaid} called unsaid; "
            f"{unwritten} stretches called unwritten"
        )

    vocabulary = sorted({word for texts, *_ in joined for text in texts for word in text.split()})
    clips = words_found = extra = 0
    for texts, spans, log_probs in joined:
        which = rng.randrange(len(texts))
        rest = " ".join(texts[:which] + texts[which + 1 :])
        start, end = spans[which]
        found = align_text(log_probs, rest, tokenizer, frame, delay=delay)
        clips += 0.5 * (end - start) < sum(
            max(0.0, min(one.end, end) - max(one.start, start)) for one in found.unwritten
        )
        said = " ".join(texts).split()
        place = rng.randrange(len(said))
        fewer, more = [*said[:place], *said[place + 1 :]], list(said)
        more.insert(place, rng.choice(vocabulary))
        found = align_text(log_probs, " ".join(fewer), tokenizer, frame, delay=delay)
        words_found += bool(found.unwritten)
        found = align_text(log_probs, " ".join(more), tokenizer, frame, delay=delay)
        extra += place in found.unsaid
    total = len(joined)
    print(
        f"found: {clips} of {total} missing clips, {words_found} of {total} missing words, ", end=""
    )
    print(f"{extra} of {total} words too many")

    if options.hours:
        frames = sum(len(log_probs) for *_, log_probs in joined)
        times = max(1, round(options.hours * 3600 / frame / frames))
        log_probs = torch.cat([log_probs for *_, log_probs in joined] * times)
        text = " ".join([text for texts, *_ in joined for text in texts] * times)
        before, start = _peak(), time.perf_counter()
        found = align_text(log_probs, text, tokenizer, frame, delay=delay)
        print(
            f"{len(log_probs) * frame / 3600:.2f} h, {len(found.words)} words: "
            f"{time.perf_counter() - start:.0f} s, peak memory {_peak():.2f} GB "
            f"({before:.2f} before)"
        )


def _peak() -> float:
    """Most memory that the process has had so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
