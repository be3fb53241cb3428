"""Tiny models and data for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers

from tests.helpers.reference import TINY
from tests.helpers.signals import speech_like
from w2vbert_fast.training import FinetuneConfig, Utterance

FEATURES = TINY["feature_projection_input_dim"]
STILL: dict[str, Any] = {
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "attention_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "final_dropout": 0.0,
}
"""A model whose training draws no random number."""

RESTLESS: dict[str, Any] = {
    "layerdrop": 0.3,
    "mask_time_prob": 0.2,
    "mask_time_length": 2,
    "attention_dropout": 0.1,
    "conformer_conv_dropout": 0.1,
    "final_dropout": 0.1,
}
"""One whose training draws all that it can."""

TEXTS = ("one two", "three", "four five six")


def make_model(folder: Path, class_name: str = "Wav2Vec2BertForCTC", **config: Any) -> Path:
    """A folder with a random tiny model of the reference, its extractor and, for CTC, tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = {**TINY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **config}
        reference = getattr(transformers, class_name)
        reference(transformers.Wav2Vec2BertConfig(**values)).save_pretrained(folder)
    bins = values["feature_projection_input_dim"] // 2
    extractor = transformers.SeamlessM4TFeatureExtractor(
        feature_size=bins, num_mel_bins=bins, padding_value=1
    )
    extractor.save_pretrained(folder)
    if class_name == "Wav2Vec2BertForCTC":
        letters = "abcdefghijklmnopqrstuvwxyz"[: values["vocab_size"] - 3]
        tokens = ["[PAD]", "[UNK]", "|", *letters]
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        transformers.Wav2Vec2CTCTokenizer(
            str(folder / "vocab.json"),
            bos_token=None,
            eos_token=None,
            unk_token="[UNK]",
            pad_token="[PAD]",
        ).save_pretrained(folder)
    return folder


class RandomSource:
    """Utterances of random features, the same in every epoch unless `varies`."""

    def __init__(
        self, count: int = 8, seed: int = 0, task: str = "ctc", varies: bool = False
    ) -> None:
        self.seed, self.task, self.varies = seed, task, varies
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(20, 40, (count,), generator=generator).tolist()
        self.replaced: dict[int, Utterance] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def num_frames(self, index: int, epoch: int) -> int:
        return self.lengths[index]

    def fingerprint(self) -> str:
        return f"{self.seed} {self.lengths}"

    def load(self, index: int, epoch: int) -> Utterance:
        if index in self.replaced:
            return self.replaced[index]
        seed = 1000 * self.seed + index + (100_000 * epoch if self.varies else 0)
        generator = torch.Generator().manual_seed(seed)
        frames = self.lengths[index]
        features = torch.randn(frames, FEATURES, generator=generator)
        if self.task == "ctc":
            labels = torch.randint(3, TINY["vocab_size"], (5,), generator=generator)
        elif self.task == "frames":
            labels = torch.randint(0, TINY["num_labels"], (frames,), generator=generator)
        else:
            labels = torch.tensor(index % TINY["num_labels"])
        return Utterance(f"random {index}", features, labels, "abc")


def config(model: Path, out: Path, **options: Any) -> FinetuneConfig:
    """A configuration for custom data; short and single-threaded unless told otherwise."""
    values: dict[str, Any] = {
        "steps": 4,
        "evaluate_every": 1000,
        "log_every": 1,
        "num_workers": 0,
        "tensorboard": False,
        "device": "cpu",
        "frame_budget": 100,
        "learning_rate": 1e-3,
        **options,
    }
    values.setdefault("train", "unused")
    values.setdefault("eval", "unused")
    return FinetuneConfig(model=model, out=out, **values)


def write_clips(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A manifest of three short recordings, with texts or with other fields."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    with manifest.open("w", encoding="utf-8") as file:
        for index, entries in enumerate(rows or [{"text": text} for text in TEXTS]):
            name = f"{index}.wav"
            soundfile.write(folder / name, speech_like(0.8 + 0.2 * index, 16_000, index), 16_000)
            file.write(json.dumps({"audio": name, **entries}) + "\n")
    return manifest


def metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` without times."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
