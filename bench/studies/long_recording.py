"""Whether an hour of real recordings has the words of its two halves.

python -m bench.studies.long_recording [--model demo] [--pause-every 12] MANIFEST

MANIFEST is JSON lines with `file`, relative to its folder. The recordings are joined in random
order up to an hour; after every twelfth come 1.1 to 3 s of faint noise, in the middle of one of
which the halves meet. With `--pause-every 0` there is no pause but the recordings' own.
docs/use/offline.md uses the numbers.
"""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path

import torch
from torch import Tensor

from w2vbert_fast.inference import Transcriber, load_audio

RATE = 16_000
NOISE = 3e-4


def hour(manifest: Path, pause_every: int, seconds: float) -> tuple[Tensor, int]:
    """The recordings end to end, float32 `[num_samples]`, and where its halves meet."""
    files = [manifest.parent / json.loads(line)["file"] for line in manifest.open()]
    generator = torch.Generator().manual_seed(5)
    parts: list[Tensor] = []
    meets: list[int] = []
    order: list[int] = []
    length = count = 0
    while length < seconds * RATE:
        order = order or torch.randperm(len(files), generator=generator).tolist()
        parts.append(load_audio(files[order.pop()]).samples)
        length, count = length + len(parts[-1]), count + 1
        if pause_every and count % pause_every == 0:
            pause = int(torch.randint(RATE * 11 // 10, RATE * 3, (1,), generator=generator))
            parts.append(NOISE * torch.randn(pause, generator=generator))
            meets.append(length + pause // 2)
            length += pause
        elif not pause_every:
            meets.append(length)
    return torch.cat(parts), min(meets, key=lambda place: abs(place - length // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pause-every", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3600.0)
    args = parser.parse_args()
    samples, half = hour(args.manifest, args.pause_every, args.seconds)
    transcriber = Transcriber(args.model)
    results = transcriber([samples, samples[:half], samples[half:]])
    whole, first, second = ((result.text or "").split() for result in results)
    joined = [*first, *second]
    changes = difflib.SequenceMatcher(None, whole, joined, autojunk=False).get_opcodes()
    different = [change for change in changes if change[0] != "equal"]
    print(f"{len(samples) / RATE:.1f} s, halves meet at {half / RATE:.1f} s")
    print(f"{len(whole)} and {len(joined)} words, {len(different)} differences")
    for _, a, b, c, d in different:
        print(f"  word {a}: {' '.join(whole[a:b])!r}, halves: {' '.join(joined[c:d])!r}")


if __name__ == "__main__":
    main()
