"""Our models, tokenizer and extractor in transformers' pipelines, and the fast extractor in its
processors."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import w2vbert_fast
from tests.processing.test_tokenization import ids_of, write
from w2vbert_fast.integrations.transformers import FastSeamlessM4TFeatureExtractor

LETTERS = "abcdefgh"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "vocab_size": 4 + len(LETTERS),
    "num_labels": 7,
    "classifier_proj_size": 16,
}


def recordings() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # An even number of mel frames each, so that no clip ends in half a pair.
    return [rng.standard_normal(400 + 160 * n).astype(np.float32) for n in (99, 149, 61)]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    return write(folder, vocab=ids_of("<pad>", "<s>", "<unk>", "|", *LETTERS)) / "vocab.json"


def parts(library: Any, name: str, vocab: Path) -> dict[str, Any]:
    """Model, tokenizer and extractor of one library, with the same weights in each."""
    torch.manual_seed(0)
    reference = getattr(transformers, name)(transformers.Wav2Vec2BertConfig(**SIZES))
    if hasattr(reference, "lm_head"):
        # So that the texts have letters, blanks and several words.
        reference.lm_head.weight.data *= 20
        reference.lm_head.bias.data[3] += 2.0
    model = getattr(library, name)(library.Wav2Vec2BertConfig(**SIZES))
    model.load_state_dict(reference.state_dict())
    return {
        "model": model.eval(),
        "tokenizer": library.Wav2Vec2CTCTokenizer(vocab, eos_token="<s>"),
        "feature_extractor": library.SeamlessM4TFeatureExtractor(padding_value=1.0),
    }


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("stamps", [None, "char", "word"])
def test_speech_recognition(vocab: Path, stamps: str | None, batch_size: int) -> None:
    found = []
    for library in (w2vbert_fast, transformers):
        given = parts(library, "Wav2Vec2BertForCTC", vocab)
        pipe = transformers.pipeline("automatic-speech-recognition", **given)
        arguments = {} if stamps is None else {"return_timestamps": stamps}
        # transformers alone: in its batches the reference decodes padding too.
        size = batch_size if library is w2vbert_fast else 1
        found.append(pipe(recordings(), batch_size=size, **arguments))
        found.append(pipe(recordings()[0], chunk_length_s=0.64, batch_size=size, **arguments))
    ours, wanted = found[:2], found[2:]
    assert ours == wanted
    assert all(len(set(result["text"])) > 3 for result in wanted[0])
    if stamps is not None:
        assert all(len(result["chunks"]) > 1 for result in wanted[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_audio_classification(vocab: Path, batch_size: int) -> None:
    found = []
    for library in (w2vbert_fast, transformers):
        given = parts(library, "Wav2Vec2BertForSequenceClassification", vocab)
        given.pop("tokenizer")
        pipe = transformers.pipeline("audio-classification", **given)
        found.append(pipe(recordings(), top_k=3, batch_size=batch_size))
    for ours, wanted in zip(*found, strict=True):
        assert [row["label"] for row in ours] == [row["label"] for row in wanted]
        scores = [[row["score"] for row in rows] for rows in (ours, wanted)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


def test_a_pipeline_is_saved(vocab: Path, tmp_path: Path) -> None:
    given = parts(w2vbert_fast, "Wav2Vec2BertForCTC", vocab)
    pipe = transformers.pipeline("automatic-speech-recognition", **given)
    assert "Wav2Vec2BertForCTC" in repr(pipe)
    wanted = pipe(recordings()[0])
    pipe.save_pretrained(tmp_path)
    again = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path))
    assert type(again.model) is transformers.Wav2Vec2BertForCTC
    assert again(recordings()[0]) == wanted
    processor = w2vbert_fast.AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.get_vocab() == given["tokenizer"].get_vocab()


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A decoder that passes for one of pyctcdecode, which is not among the test packages."""

    class BeamSearchDecoderCTC:
        _alphabet = types.SimpleNamespace(labels=["", "<s>", "⁇", " ", *LETTERS])

        def decode_beams(self, logits: np.ndarray) -> list[tuple[Any, ...]]:
            return [(f"{len(logits)} frames", None, [("frames", (1, 2))])]

    package = types.ModuleType("pyctcdecode")
    package.BeamSearchDecoderCTC = BeamSearchDecoderCTC  # type: ignore[attr-defined]
    alphabet = types.ModuleType("pyctcdecode.alphabet")
    alphabet.BLANK_TOKEN_PTN = re.compile(r"^[<\[]pad[>\]]$")  # type: ignore[attr-defined]
    alphabet.UNK_TOKEN_PTN = re.compile(r"^[<\[]unk[>\]]$")  # type: ignore[attr-defined]
    alphabet.UNK_TOKEN = "⁇"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyctcdecode", package)
    monkeypatch.setitem(sys.modules, "pyctcdecode.alphabet", alphabet)
    return BeamSearchDecoderCTC()


def test_the_fast_extractor_with_a_language_model(vocab: Path, decoder: Any) -> None:
    theirs = parts(transformers, "Wav2Vec2BertForCTC", vocab)
    reference, tokenizer = theirs["feature_extractor"], theirs["tokenizer"]
    with_lm = transformers.Wav2Vec2ProcessorWithLM(reference, tokenizer, decoder)
    ours = parts(w2vbert_fast, "Wav2Vec2BertForCTC", vocab)
    processor = w2vbert_fast.Wav2Vec2BertProcessor(ours["feature_extractor"], ours["tokenizer"])
    wanted = with_lm(recordings(), sampling_rate=16000, return_tensors="pt")
    for source in (
        reference,
        transformers.Wav2Vec2BertProcessor(reference, tokenizer),
        with_lm,
        ours["feature_extractor"],
        processor,
        FastSeamlessM4TFeatureExtractor.from_extractor(reference),
    ):
        fast = FastSeamlessM4TFeatureExtractor.from_extractor(source)
        assert type(fast) is FastSeamlessM4TFeatureExtractor
        assert fast.to_dict() == reference.to_dict()
        again = transformers.Wav2Vec2ProcessorWithLM(fast, tokenizer, decoder)
        found = again(recordings(), sampling_rate=16000, return_tensors="pt")
        assert found["attention_mask"].equal(wanted["attention_mask"])
        torch.testing.assert_close(
            found["input_features"], wanted["input_features"], rtol=1e-4, atol=1e-4
        )
        pipe = transformers.pipeline(
            "automatic-speech-recognition",
            model=theirs["model"],
            tokenizer=tokenizer,
            feature_extractor=fast,
            decoder=decoder,
        )
        assert pipe(recordings()[0], return_timestamps="word")["text"] == "50 frames"
    with pytest.raises(TypeError, match=r"extractor is .*Wav2Vec2CTCTokenizer; it must be"):
        FastSeamlessM4TFeatureExtractor.from_extractor(tokenizer)
