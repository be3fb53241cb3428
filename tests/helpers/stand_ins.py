"""What stands in for what a reader of README and docs has: the one place where that is decided.

Checkpoints of the hub are small models with random weights or the demo's, under the names that the
pages use; recordings are the demo's samples. Whatever cannot run is listed in `NOT_RUN`.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import torch

import w2vbert_fast
from tests.helpers.signals import film
from w2vbert_fast import Wav2Vec2BertConfig
from w2vbert_fast.export.original import convert_to_original
from w2vbert_fast.inference import load_audio

DEMO = Path(w2vbert_fast.__file__).parent / "demo"

REPLACED = {
    'device="cuda"': 'device="cpu"',
    'out="runs/first"': 'out="runs/python", steps=1, num_workers=0, frame_budget=500',
    # Fewer layers, and no C++ compiler.
    "export hf-audio/wav2vec2-bert-CV16-en": "export my-model",
    "layer17.onnx --layer 17": "layer17.onnx --layer 1",
    "--format aoti": "--format torch",
    "num_gpus=1, num_cpus=4, concurrency=(1, 8)": "num_cpus=0.0, concurrency=(1, 1)",
    "--engine ray --actors 1:8": "--engine ray --actors 1 --cpus-per-actor 0",
}
"""Text of blocks -> what is run in its place."""

ADDED = {
    "w2vbert-fast transcribe rows.jsonl": "--frame-budget 500",
    "w2vbert-fast finetune": "--steps 1 --workers 0 --frame-budget 500",
    "w2vbert-fast convert conformer_shaw.pt": "--config facebook/w2v-bert-2.0",
}
"""Beginning of a command -> what is put behind it."""

NOT_RUN = {
    "accelerate config": "asks questions",
    "accelerate launch": "starts a process for each GPU; its command is the one above on that page",
    "ray start": "starts a cluster of machines",
    "w2vbert-fast transcribe https://example.org": "needs a network",
    "w2vbert-fast transcribe --out results 's3://bucket": "needs a network, and an account",
    "w2vbert-fast tune --model": "needs a GPU",
    "w2vbert-fast warm --model": "needs a GPU",
    "RAY_ADDRESS=HEAD:6379 w2vbert-fast": "needs that cluster",
}
"""Beginning of a command -> the reason why it is not run."""

ARPA = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-2.0\t<unk>\t0
0\t<s>\t-0.3
-0.7\t</s>\t0
-0.5\twelcome\t-0.2

\\2-grams:
-0.3\t<s> welcome

\\end\\
"""

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 18,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 2],
}


def save(folder: Path, kind: str, **fields: Any) -> None:
    """A small model with random weights and its feature extractor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(w2vbert_fast, kind)(Wav2Vec2BertConfig(**{**SMALL, **fields}))
    model.save_pretrained(folder)
    w2vbert_fast.SeamlessM4TFeatureExtractor(padding_value=1).save_pretrained(folder)


def fill_data_sets(path: Path, rows: list[dict[str, str]]) -> None:
    """Two recordings and their transcripts in every layout that the page on data sets names."""
    for folder in ("prompts", "cv/en/clips", "kaldi/train", "voices/data"):
        (path / folder).mkdir(parents=True)
    lines: dict[str, list[str]] = {
        "interviews.csv": ["path,sentence"],
        "prompts/metadata.csv": ["file_name,text"],
        "cv/en/validated.tsv": ["client_id\tpath\tsentence"],
    }
    for row in rows:
        name, audio, text = row["id"], row["audio"], row["text"]
        for folder in ("prompts", "cv/en/clips"):
            shutil.copy(audio, path / folder / f"{name}.flac")
        entry = {"audio_filepath": audio, "offset": 0.1, "duration": 1.0, "text": text}
        for file, line in (
            ("interviews.csv", f"{audio},{text}"),
            ("prompts/metadata.csv", f"{name}.flac,{text}"),
            ("cv/en/validated.tsv", f"ann\t{name}.flac\t{text}"),
            ("nemo.json", json.dumps(entry)),
            ("kaldi/train/wav.scp", f"{name} {audio}"),
            ("kaldi/train/text", f"{name} {text}"),
        ):
            lines.setdefault(file, []).append(line)
    for file, content in lines.items():
        (path / file).write_text("\n".join(content) + "\n")
    table = pyarrow.table(
        {
            "audio": [{"bytes": Path(r["audio"]).read_bytes(), "path": r["id"]} for r in rows],
            "text": [row["text"] for row in rows],
        }
    )
    pyarrow.parquet.write_table(table, path / "voices/data/train-00000-of-00001.parquet")
    shutil.copytree(Path(__file__).parents[1] / "data/saved_to_disk", path / "saved")


def fill(path: Path) -> None:
    """Puts what the pages name into a folder: checkpoints, recordings, manifests, statistics."""
    (path / "w2vbert_fast").symlink_to(DEMO.parent)
    save(path / "facebook/w2v-bert-2.0", "Wav2Vec2BertModel")
    few = {"num_hidden_layers": 2, "num_labels": 2}
    for name in ("runs/emotions/best", "pipecat-ai/smart-turn"):
        save(path / name, "Wav2Vec2BertForSequenceClassification", **few)
    save(path / "my-x-vector-model", "Wav2Vec2BertForXVector", **few)
    demo = w2vbert_fast.Wav2Vec2BertForCTC.from_pretrained(DEMO, dtype="float32")
    demo.save_pretrained(path / "hf-audio/wav2vec2-bert-CV16-en")
    save(path / "my-model", "Wav2Vec2BertForCTC", num_hidden_layers=1, vocab_size=30)
    for name in ("hf-audio/wav2vec2-bert-CV16-en", "my-model"):
        w2vbert_fast.Wav2Vec2BertProcessor.from_pretrained(DEMO).save_pretrained(path / name)
    shutil.copy(DEMO / "vocab.json", path)
    for name in ("wav2vec2bert_stats.pt", "w2vbert2_mean_var_stats_emilia.pt"):
        torch.save({"mean": torch.randn(48), "var": torch.rand(48) + 0.1}, path / name)

    samples = sorted((DEMO / "samples").glob("*.flac"))
    for name, sample in zip(
        ("a.wav", "b.m4a", "talk.mp3", "talk.wav", "interview.mp3"), samples, strict=True
    ):
        shutil.copy(sample, path / name)
    (path / "talk.txt").write_text("Press * to return to the main menu.")
    (path / "calls").mkdir()
    for sample in samples[:2]:
        shutil.copy(sample, path / "calls" / f"{sample.stem}.wav")
    clips = [json.loads(line) for line in (DEMO / "samples.jsonl").read_text().splitlines()]
    rows = [
        {"id": Path(clip["file"]).stem, "audio": str(DEMO / clip["file"]), "text": clip["text"]}
        for clip in clips
    ]
    for name in ("rows.jsonl", "train.jsonl", "dev.jsonl", "corpus.jsonl"):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (path / "rows.csv").write_text("audio\n" + "".join(f"{row['audio']}\n" for row in rows[:2]))
    fill_data_sets(path, rows[:2])
    (path / "shards").mkdir()
    with tarfile.open(path / "shards" / "0.tar", "w") as shard:
        shard.add(samples[0], "0.flac")
    (path / "4gram.arpa.gz").write_bytes(gzip.compress(ARPA.encode()))
    (path / "words.txt").write_text("welcome\n")
    converted = path / "conformer_shaw.pt"
    convert_to_original(path / "facebook/w2v-bert-2.0", converted)
    tensors = torch.load(converted, weights_only=True)
    torch.save(
        {"model": {**tensors["model"], "final_target_proj.weight": torch.zeros(1)}}, converted
    )
    first, second = (load_audio(sample).samples.numpy() for sample in samples[:2])
    call = np.zeros((max(len(first), len(second)), 2), np.float32)
    call[: len(first), 0], call[: len(second), 1] = first, second
    soundfile.write(path / "call.wav", call, 16_000)
    (path / "film.mkv").write_bytes(film(["eng", "deu"]))
    whole = samples[0].read_bytes()
    (path / "broken.flac").write_bytes(whole[: len(whole) // 2])
    with wave.open(str(path / "prompt.wav"), "wb") as prompt:
        prompt.setparams((1, 2, 16_000, 0, "NONE", ""))
        signal = load_audio(samples[1]).samples
        prompt.writeframes((signal * 32767).to(torch.int16).numpy().tobytes())
