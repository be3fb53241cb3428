"""Transcribe recordings from Python.

python examples/transcribe.py                     # the clips that ship with the package
python examples/transcribe.py FILE... --model hf-audio/wav2vec2-bert-CV16-en
"""

from __future__ import annotations

import argparse

from w2vbert_fast.inference import load_pipeline, transcribe
from w2vbert_fast.inference.pipeline import DEMO_FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="default: the demo's clips")
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
    arguments = parser.parse_args()

    pipeline = load_pipeline(arguments.model)
    files = arguments.files or sorted(DEMO_FOLDER.glob("samples/*.flac"))
    for transcript in transcribe(files, pipeline):
        if transcript.error is not None:
            print(f"{transcript.file}: {transcript.error}")
        else:
            print(f"{transcript.file} ({transcript.audio_seconds:.1f} s): {transcript.text}")


if __name__ == "__main__":
    main()
