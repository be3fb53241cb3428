"""Extract hidden states of one layer: semantic features for speech synthesis and codecs.

    python examples/extract_features.py FILE... --model facebook/w2v-bert-2.0 --layer 17

Writes FILE.npy beside every file: float32 [frames, hidden_size], 50 frames a second. Files are
computed together, as one padded batch; each gets what it would get alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from w2vbert_fast import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel
from w2vbert_fast.inference import load_audio
from w2vbert_fast.inference.pipeline import DEMO_FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--model", default=DEMO_FOLDER, help="folder or hub id; default: the demo")
    parser.add_argument("--layer", type=int, default=-1, help="0: before the first; default: last")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = SeamlessM4TFeatureExtractor.from_pretrained(arguments.model)
    model = Wav2Vec2BertModel.from_pretrained(
        arguments.model, device=device, dtype=None if device == "cuda" else torch.float32
    )

    waveforms = [load_audio(file).samples for file in arguments.files]
    inputs = extractor(waveforms, sampling_rate=16_000, return_tensors="pt", device=device)
    with torch.inference_mode():
        states = model(
            inputs["input_features"].to(model.dtype),
            attention_mask=inputs["attention_mask"],
            output_hidden_states=[arguments.layer],
        ).hidden_states[arguments.layer]

    # Hidden states have a frame for every input frame, also in models with an adapter.
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for file, state, length in zip(arguments.files, states, lengths, strict=True):
        target = Path(f"{file}.npy")
        np.save(target, state[:length].float().cpu().numpy())
        print(f"{target}: {length} frames of {state.shape[1]}")


if __name__ == "__main__":
    main()
