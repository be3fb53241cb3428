"""Transcripts take the Unicode form of the vocabulary; scores do not depend on it."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
import transformers

from tests.helpers.training import STILL, config, make_model, read_rows, write_clips
from w2vbert_fast import Wav2Vec2CTCTokenizer
from w2vbert_fast.training import finetune
from w2vbert_fast.training.vocabulary import Spelling, build_tokenizer, unknown_characters

SPECIAL = ["[PAD]", "[UNK]", "|"]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def tokenizer_of(folder: Path, tokens: list[str], **options: object) -> Wav2Vec2CTCTokenizer:
    path = folder / "vocab.json"
    path.write_text(json.dumps({t: i for i, t in enumerate([*SPECIAL, *tokens])}))
    arguments = {"bos_token": None, "eos_token": None, "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return Wav2Vec2CTCTokenizer(path, **arguments, **options)  # type: ignore[arg-type]


FRENCH, KOREAN = "caf\u00e9 no\u00ebl", "\ud55c\uad6d\uc5b4"
VIETNAMESE = "ti\u1ebfng vi\u1ec7t"
YYA, YA_NUKTA = "\u09df", "\u09af\u09bc"  # the same letter; NFC has the second one, too
YORUBA = nfc("\u1eb9\u0301 e\u0301 o")  # composed as far as it goes, and a mark of its own

CASES = {
    "NFC": (sorted(set(FRENCH)), nfd(FRENCH), FRENCH),
    "NFC of syllables": (sorted(set(KOREAN)), nfd(KOREAN), KOREAN),
    "NFC with marks": (sorted({*YORUBA, "\u0323"}), nfd(YORUBA), YORUBA),
    "NFD": (sorted(set(nfd(VIETNAMESE))), VIETNAMESE, nfd(VIETNAMESE)),
    "NFD of jamo": (sorted(set(nfd(KOREAN))), KOREAN, nfd(KOREAN)),
    "NFD in tokens of two": (["c", "a", "f", "e\u0301"], "caf\u00e9", "cafe\u0301"),
    "neither": ([YYA, "\u09b8", "\u09ae"], "\u09b8\u09ae" + YYA, "\u09b8\u09ae" + YYA),
    "neither, texts in NFC": ([YYA, "\u09b8"], "\u09b8" + YA_NUKTA, "\u09b8" + YYA),
    "neither, both known": ([YYA, *YA_NUKTA], YYA + YA_NUKTA, YYA + YA_NUKTA),
    "NFC without a letter": (["\u00e9", "a", "\u0301"], "a\u0301\u00e9", "a\u0301\u00e9"),
    "vowel signs": (["\u09cb", "\u0995", YYA], "\u0995\u09c7\u09be", "\u0995\u09cb"),
    "beside what it lacks": (["\u00ea", "\u0301"], "!\u1ebf", "!\u00ea\u0301"),
    "no accents": (["a", "e"], "ae", "ae"),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_take_the_form_of_the_vocabulary(tmp_path: Path, case: str) -> None:
    tokens, text, wanted = CASES[case]
    tokens = [token for token in tokens if token != " "]
    tokenizer = tokenizer_of(tmp_path, tokens)
    spelling = Spelling(tokenizer)
    assert spelling(text) == wanted
    assert spelling(wanted) == wanted
    assert set(spelling.unknown(wanted)) <= {"!"}
    # The reference reads it without the unknown token, and so do we, with the same ids.
    tokenizer.save_pretrained(tmp_path)
    reference = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    ids = reference(wanted).input_ids
    assert ids.count(reference.unk_token_id) == wanted.count("!")
    assert tokenizer(wanted).input_ids == ids


def test_the_tokenizer_itself_does_not_normalise(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, ["e", "\u00e9"])
    assert tokenizer("e\u0301\u00e9").input_ids == [3, 1, 4]


def test_a_spelling_is_the_same_text_and_lacks_nothing_that_a_form_has(tmp_path: Path) -> None:
    rng = random.Random(0)
    alphabet = [*"aeo", "\u00e9", "\u1ebf", "\u1eb9", "\u0301", "\u0302", "\u0323", YYA, *YA_NUKTA]
    alphabet += ["\u2126", "\u03a9", *nfd("\ud55c"), "\ud55c", "\ud558"]
    for _ in range(100):
        tokens = rng.sample(alphabet, rng.randint(1, len(alphabet)))
        spelling = Spelling(tokenizer_of(tmp_path, tokens))
        for _ in range(10):
            text = "".join(rng.choices(alphabet, k=5))
            spelled = spelling(text)
            assert nfd(spelled) == nfd(text)
            assert spelling(spelled) == spelled
            if not (spelling.unknown(nfc(text)) and spelling.unknown(nfd(text))):
                assert spelling.unknown(spelled) == []


def test_what_a_vocabulary_lacks_is_named_in_one_piece(tmp_path: Path) -> None:
    spelling = Spelling(tokenizer_of(tmp_path, ["a", "e", "\u00e4"]))
    assert unknown_characters(spelling, ["e\u0301 a\u0308", "\u00e9!"]) == {"!": 1, "\u00e9": 2}
    # Upper-case vocabularies read lower-case texts.
    upper = Spelling(tokenizer_of(tmp_path, ["E", "\u00c9"], do_lower_case=True))
    assert upper("e\u0301e") == "\u00e9e" and upper.unknown("\u00e9e") == []


def test_a_new_vocabulary_is_in_nfc(tmp_path: Path) -> None:
    tokenizer = build_tokenizer([nfd(FRENCH), FRENCH], tmp_path)
    assert sorted(tokenizer.encoder, key=tokenizer.encoder.get)[3:] == sorted(set(FRENCH) - {" "})  # type: ignore[arg-type]
    assert Spelling(tokenizer)(nfd(FRENCH)) == FRENCH


@pytest.mark.parametrize("form", [nfc, nfd])
def test_a_vocabulary_of_decomposed_characters_trains(tmp_path: Path, form: object) -> None:
    tokens = sorted(set(nfd(KOREAN)))
    model = make_model(
        tmp_path / "model", **STILL, feature_projection_input_dim=160, vocab_size=3 + len(tokens)
    )
    tokenizer_of(model, tokens)
    manifest = write_clips(tmp_path / "clips", [{"text": form(KOREAN)}, {"text": form(KOREAN)}])  # type: ignore[operator]
    options = {"train": manifest, "eval": manifest, "steps": 1}
    result = finetune(config(model, tmp_path / "out", **options))
    for row in read_rows(tmp_path / "out" / "predictions.jsonl"):
        assert row["reference"] == nfd(KOREAN)
    reference = transformers.Wav2Vec2CTCTokenizer.from_pretrained(result.last)
    assert reference.unk_token_id not in reference(nfd(KOREAN)).input_ids
