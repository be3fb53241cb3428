"""What the tests share: the GPU marker, and a small checkpoint made with the reference."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

# Before anything imports huggingface_hub: no test depends on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

with contextlib.suppress(ImportError):  # the GPU lane has no need of it
    from hypothesis import HealthCheck, settings

    # Neither an example nor drawing it is a fault for being slow on a busy machine.
    settings.register_profile(
        "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Skipped here and not by a mark, so that the summary has one line for all of them.
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and PyTorch sees none")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer CTC model and its processor, written by the reference.

    The weights are larger than usual, so that the frames of a signal get different tokens.
    """
    import transformers

    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    letters = "abcdefghijklmnopqrstuvwxyz'"
    vocabulary = {token: i for i, token in enumerate(["|", *letters, "[UNK]", "[PAD]"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), unk_token="[UNK]", pad_token="[PAD]", word_delimiter_token="|"
    )
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    transformers.Wav2Vec2BertProcessor(extractor, tokenizer).save_pretrained(folder)
    config = transformers.Wav2Vec2BertConfig(
        vocab_size=len(vocabulary),
        pad_token_id=vocabulary["[PAD]"],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Wav2Vec2BertForCTC(config).save_pretrained(folder)
    return folder
