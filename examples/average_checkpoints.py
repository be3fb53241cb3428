"""Average the weights of checkpoints of one training run.

    python examples/average_checkpoints.py FOLDER FOLDER... OUT

Each FOLDER holds a model in the form of `save_pretrained`. OUT is a copy of the last one with the
mean of all their weights, which often generalises better than any of them (Wortsman et al. 2022).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from w2vbert_fast import Wav2Vec2BertForCTC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()

    models = [Wav2Vec2BertForCTC.from_pretrained(f, dtype=torch.float32) for f in arguments.folders]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
    models[-1].load_state_dict(mean)
    shutil.copytree(arguments.folders[-1], arguments.out)
    models[-1].half().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
