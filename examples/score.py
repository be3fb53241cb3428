"""Word error rate of a CTC checkpoint on the held-out clips of a data folder.

    python examples/score.py DATA --model demo

DATA holds `manifest.jsonl` with `file`, `text`, `split` and, for the split "test", `oov` (words
that no training transcript holds); the clips without any are scored on their own as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jiwer

from w2vbert_fast.inference import load_pipeline, transcribe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
    parser.add_argument("--dtype", help="such as bfloat16 or int8; as load_pipeline's")
    parser.add_argument("--show", action="store_true", help="print every text that is wrong")
    arguments = parser.parse_args()

    with (arguments.data / "manifest.jsonl").open(encoding="utf-8") as manifest:
        rows = [row for row in map(json.loads, manifest) if row["split"] == "test"]
    results = transcribe(
        (arguments.data / row["file"] for row in rows),
        load_pipeline(arguments.model, dtype=arguments.dtype),
    )
    texts = [result.text or "" for result in results]
    if arguments.show:
        for row, text in zip(rows, texts, strict=True):
            if text != row["text"]:
                print(f"{row['file']}\n  said  {row['text']}\n  heard {text}")

    inside = [not row["oov"] for row in rows]
    for name, wanted in (("all", [True] * len(rows)), ("in vocabulary", inside)):
        said = [row["text"] for row, keep in zip(rows, wanted, strict=True) if keep]
        heard = [text for text, keep in zip(texts, wanted, strict=True) if keep]
        result = jiwer.process_words(said, heard)
        words = sum(len(text.split()) for text in said)
        print(f"{name}: {len(said)} clips, {words} words, word error rate {100 * result.wer:.1f} %")


if __name__ == "__main__":
    main()
