"""What is measured: real speech cut to fixed lengths, and the list of workloads.

Speech comes from the clips that the repository holds (the demo's samples and `tests/data`, 30 s of
one speaker). A longer utterance is the clips one after another, again from the first when they end;
every utterance starts at another place. The encoder's time does not depend on what is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import w2vbert_fast

SAMPLING_RATE = 16_000
REPOSITORY = Path(__file__).resolve().parent.parent
CLIP_FOLDERS = (Path(w2vbert_fast.__file__).parent / "demo" / "samples", REPOSITORY / "tests/data")

MIXED_SECONDS = (
    1.00, 1.06, 1.14, 1.25, 1.45, 1.65, 1.80, 2.07, 2.35, 2.64, 2.94, 3.29, 3.76, 4.75, 6.43, 19.21,
)  # fmt: skip
"""16 lengths in seconds: equally spaced quantiles of the 355 recordings of 1 to 20 s among the
English telephone prompts that the demo's clips come from."""

TRAINING_SECONDS = MIXED_SECONDS[1::2]
"""8 lengths of the same distribution."""

ENCODER_DTYPES = ("fp32", "bf16", "int8")

KINDS = {
    "encoder": "Encoder",
    "early_exit": "Early exit",
    "features": "Features",
    "end_to_end": "Waveform to text",
    "training": "Training step",
}
"""Kinds of workload, and their titles in the report."""


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        name: as on the command line and in the results.
        kind: one of `KINDS`.
        seconds: length of every utterance.
        dtypes: what it is measured in, unless told otherwise.
        layers: encoder layers, whatever the command line says.
        cpu_layers: encoder layers on a CPU, unless the command line says.
        adapter: with one adapter layer behind the encoder.
        exit_layer: the hidden state that is asked for (early exit).
        rounds: at most so many rounds; None: as the command line says.
        memory: measure peak memory on a CPU, too: a fresh process for each candidate.
    """

    name: str
    kind: str
    seconds: tuple[float, ...]
    dtypes: tuple[str, ...] = ("fp32",)
    layers: int | None = None
    cpu_layers: int = 4
    adapter: bool = False
    exit_layer: int | None = None
    rounds: int | None = None
    memory: bool = False

    def depth(self, device: str, asked: int | None = None) -> int:
        """Encoder layers on "cpu" or "cuda" when the command line asks for `asked`."""
        return self.layers or asked or (24 if device == "cuda" else self.cpu_layers)

    @property
    def audio_seconds(self) -> float:
        """Unpadded audio, all utterances together."""
        return sum(self.seconds)


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("1x10s", "encoder", (10.0,), ENCODER_DTYPES),
        Workload("1x30s", "encoder", (30.0,), ENCODER_DTYPES, memory=True),
        # Half the layers and twice the rounds: peers take up to half a minute for four layers.
        Workload("1x60s", "encoder", (60.0,), ("fp32", "bf16"), cpu_layers=2),
        Workload("16x1-20s", "encoder", MIXED_SECONDS, ("fp32", "bf16"), cpu_layers=2),
        Workload("1x30s, adapter", "encoder", (30.0,), ("fp32", "int8"), adapter=True),
        # The memory, which is what this one is for, does not grow with the number of layers.
        Workload("1x300s", "encoder", (300.0,), ("fp32",), layers=1, rounds=3, memory=True),
        Workload("1x30s, layer 17", "early_exit", (30.0,), ("fp32",), layers=24, exit_layer=17,
                 rounds=3),
        Workload("8x30s", "features", (30.0,) * 8),
        Workload("16x1-20s, demo", "end_to_end", MIXED_SECONDS),
        Workload("train 1x30s", "training", (30.0,), ("fp32", "bf16"), memory=True),
        Workload("train 8x1-20s", "training", TRAINING_SECONDS, ("fp32", "bf16"), memory=True),
    )
}  # fmt: skip


def clips() -> list[np.ndarray] | None:
    """The repository's recordings as float32 `[samples]`; None where none can be decoded."""
    try:
        from w2vbert_fast.recordings.audio import AudioError, load_audio

        files = sorted(f for folder in CLIP_FOLDERS for f in folder.glob("*.flac"))
        return [load_audio(f, sampling_rate=SAMPLING_RATE).samples.numpy() for f in files] or None
    except (ImportError, AudioError):
        return None


def speech(seconds: tuple[float, ...]) -> tuple[list[np.ndarray], str]:
    """Utterances of exactly these lengths.

    Returns:
        Float32 `[samples]` each, at 16 kHz, and what they are: "speech", or "noise" where no
        package that decodes FLAC is installed (times are the same; texts are empty).
    """
    recordings = clips()
    lengths = [round(s * SAMPLING_RATE) for s in seconds]
    if recordings is None:
        rng = np.random.default_rng(0)
        return [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in lengths], "noise"
    joined = np.concatenate(recordings)
    starts = np.cumsum([0, *(len(r) for r in recordings)])
    utterances = []
    for index, length in enumerate(lengths):
        start = int(starts[index % len(recordings)])
        rows = np.arange(start, start + length) % len(joined)
        utterances.append(np.ascontiguousarray(joined[rows], dtype=np.float32))
    return utterances, "speech"


def encoder_inputs(waveforms: list[np.ndarray]) -> list[Tensor]:
    """Input features of each utterance: float32 `[T, 160]`, 50 frames a second."""
    extractor = w2vbert_fast.SeamlessM4TFeatureExtractor()
    result = []
    for waveform in waveforms:
        features = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        valid = int(features["attention_mask"][0].sum())
        result.append(features["input_features"][0, :valid].clone())
    return result


def padded(features: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Utterances as one right-padded batch.

    Returns:
        `[batch, T, 160]`, and the mask `[batch, T]` (int64), None where nothing is padded.
    """
    lengths = torch.tensor([f.shape[0] for f in features])
    batch = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    mask = (torch.arange(batch.shape[1])[None] < lengths[:, None]).long()
    return batch, None if bool(mask.all()) else mask


DEFAULT = tuple(name for name, w in WORKLOADS.items() if w.kind != "training")
"""What is measured unless workloads are named."""

BATCHINGS = ("one by one", "sorted batches of 4", "padded batch")


def batches(features: list[Tensor], batching: str) -> list[list[int]]:
    """Which utterances run together.

    Args:
        features: `[T, 160]` each.
        batching: one of `BATCHINGS`.

    Raises:
        ValueError: an unknown batching.
    """
    order = sorted(range(len(features)), key=lambda i: features[i].shape[0])
    if batching == "one by one":
        return [[i] for i in range(len(features))]
    if batching == "sorted batches of 4":
        return [order[i : i + 4] for i in range(0, len(order), 4)]
    if batching == "padded batch":
        return [list(range(len(features)))]
    raise ValueError(f"batching is {batching!r}; it must be one of {', '.join(BATCHINGS)}")
