"""The tokenizer's files and vocabularies, and where it departs from the reference."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.processing.test_tokenization import LETTERS, ids_of, make_folders, write
from w2vbert_fast import Wav2Vec2CTCTokenizer
from w2vbert_fast.processing.tokenizer import AddedToken

Reference = transformers.Wav2Vec2CTCTokenizer
AddedTokenOfReference = transformers.AddedToken
TEXTS = ["hello <s> you [PAD]", "sch ch é|", "uh mm uhm <laugh> ~", " A ß  word", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tokenizers"))


def same(a: Any, b: Any) -> None:
    assert a.get_vocab() == b.get_vocab()
    assert a.all_special_tokens == b.all_special_tokens
    assert a.all_special_ids == b.all_special_ids
    for text in TEXTS:
        assert a(text).input_ids == b(text).input_ids
    path = [*range(len(a) + 2), *range(len(a) - 1, -1, -1)]
    assert a.decode(path) == b.decode(path)


def test_ours_to_the_reference_and_back(folders: dict[str, Path], tmp_path: Path) -> None:
    for number, folder in enumerate(folders.values()):
        ours = Wav2Vec2CTCTokenizer.from_pretrained(folder)
        ours.add_tokens(["<new>", "q"])
        paths = ours.save_pretrained(tmp_path / f"{number} ours")
        assert all(Path(path).is_file() for path in paths)
        reference = Reference.from_pretrained(tmp_path / f"{number} ours")
        same(ours, reference)
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{number} ours")
        assert type(auto) is Reference
        reference.save_pretrained(tmp_path / f"{number} theirs")
        same(ours, Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / f"{number} theirs"))
        again = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / f"{number} ours")
        same(ours, again)
        assert again.added_tokens_decoder == ours.added_tokens_decoder
        same(ours, pickle.loads(pickle.dumps(ours)))
        same(ours, copy.deepcopy(ours))


def test_readers_before_added_tokens_decoder(folders: dict[str, Path], tmp_path: Path) -> None:
    """They take the special tokens and those beyond the vocabulary from files of their own."""
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folders["extra specials"])
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": config["do_lower_case"]})
    )
    same(ours, Wav2Vec2CTCTokenizer.from_pretrained(tmp_path))
    same(ours, Reference.from_pretrained(tmp_path))


def test_entries_survive(tmp_path: Path) -> None:
    entries = {"note": {"a": [1, "é"]}, "processor_class": "Wav2Vec2BertProcessor", "noise": None}
    folder = write(tmp_path / "a", vocab=ids_of("é", "日"), tokenizer_config=entries)
    Wav2Vec2CTCTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    text = (tmp_path / "b" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert entries.items() <= json.loads(text).items()
    assert json.loads(text)["tokenizer_class"] == "Wav2Vec2CTCTokenizer"
    assert json.loads((tmp_path / "b" / "vocab.json").read_text(encoding="utf-8")) == {
        "é": 0,
        "日": 1,
    }


def test_entries_that_calls_follow(tmp_path: Path) -> None:
    entries = {
        "model_input_names": ["input_ids"],
        "padding_side": "left",
        "truncation_side": "left",
    }
    folder = write(tmp_path, vocab=ids_of("<pad>", "a", "b"), tokenizer_config=entries)
    Wav2Vec2CTCTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    assert ours(["ab", "b"], padding=True) == {"input_ids": [[1, 2], [0, 2]]}
    assert ours("ab", max_length=1) == {"input_ids": [2]}
    assert ours(["ab"], return_attention_mask=True).attention_mask == [[1, 1]]


def test_stale_added_tokens_are_removed(tmp_path: Path) -> None:
    vocab = ids_of("<pad>", "<s>", "</s>", "<unk>", "|", "a")
    folder = write(tmp_path, vocab=vocab, added_tokens={"old": 77})
    Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert "old" not in Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).get_vocab()


def test_special_tokens_as_objects(tmp_path: Path) -> None:
    """Some writers repeat special tokens as objects, in lists too; the reference makes names of
    them there."""
    token = {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False}
    folder = write(
        tmp_path,
        vocab=ids_of(*LETTERS, "|", "[UNK]", "[PAD]"),
        tokenizer_config={"unk_token": {"content": "[UNK]"}, "pad_token": "[PAD]"},
        special_tokens_map={"bos_token": token, "additional_special_tokens": [token, token]},
        added_tokens={"<s>": 30, "</s>": 31},
    )
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    assert ours.all_special_tokens == ["<s>", "</s>", "[UNK]", "[PAD]", "|"]
    assert ours.all_special_ids == [30, 31, 28, 29, 27]
    assert len(ours) == 32


LANGUAGES = {
    "deu": ids_of("<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "sch", "ch", "ä", "ß"),
    "eng": ids_of("<pad>", "<s>", "</s>", "<unk>", "|", "b", "a", "th"),
}


def test_languages(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", vocab=LANGUAGES, tokenizer_config={"target_lang": "deu"})
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    same(ours, Reference.from_pretrained(folder))
    ours.set_target_lang("eng")
    assert ours.target_lang == "eng"
    english = Reference.from_pretrained(folder, target_lang="eng")
    same(ours, english)
    assert ours("ab sch th").input_ids == english("ab sch th").input_ids
    ours.add_tokens("<new>")
    new_id = ours.convert_tokens_to_ids("<new>")
    assert new_id == 8
    ours.save_pretrained(tmp_path / "y")
    assert json.loads((tmp_path / "y" / "vocab.json").read_text()) == LANGUAGES
    same(ours, Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "y"))
    ours.set_target_lang("deu")
    assert ours("sch<new>ä").input_ids == [7, 11, 9]
    with pytest.raises(ValueError, match=r"target_lang must be one of deu, eng.*got 'fra'"):
        ours.set_target_lang("fra")
    assert ours.target_lang == "deu"
    with pytest.raises(ValueError, match=r"target_lang must be one of deu, eng.*got None"):
        Wav2Vec2CTCTokenizer.from_pretrained(folder, target_lang=None)
    flat = write(tmp_path / "z", vocab=LANGUAGES["eng"])
    with pytest.raises(ValueError, match=r"'eng', but .*vocab\.json has no languages"):
        Wav2Vec2CTCTokenizer.from_pretrained(flat, target_lang="eng")


@pytest.mark.parametrize("saver", [Wav2Vec2CTCTokenizer, Reference])
def test_saved_with_another_language(saver: Any, tmp_path: Path) -> None:
    """The files hold the saver's tokens of several characters, which have other ids here."""
    folder = write(tmp_path / "x", vocab=LANGUAGES, tokenizer_config={"target_lang": "deu"})
    german = saver.from_pretrained(folder)
    german.add_tokens("<new>")
    german.save_pretrained(tmp_path / "y")
    english = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "y", target_lang="eng")
    assert english.get_vocab() == {**LANGUAGES["eng"], "<new>": 11}
    assert english.tokenize("sch th") == ["s", "c", "h", "th"]
    same(Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "y"), german)
    english.save_pretrained(tmp_path / "z")
    other = write(tmp_path / "z", vocab={**LANGUAGES, "x": {**LANGUAGES["deu"], "ö": 11}})
    assert "<new>" in Wav2Vec2CTCTokenizer.from_pretrained(other).get_vocab()
    assert "<new>" not in Wav2Vec2CTCTokenizer.from_pretrained(other, target_lang="x").get_vocab()


# Where the reference goes wrong

VOCABULARY = ids_of("<pad>", "<s>", "</s>", "<unk>", "_", "<space>", *LETTERS)


def test_word_delimiter_of_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path, vocab=VOCABULARY, tokenizer_config={"word_delimiter_token": "_"})
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    same(ours, Reference(str(folder / "vocab.json"), word_delimiter_token="_"))
    assert ours.word_delimiter_token_id == 4
    assert ours.decode(ours("hi you").input_ids) == "hi you"
    Reference.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path)
    for saved in (tmp_path, tmp_path / "theirs"):
        assert Wav2Vec2CTCTokenizer.from_pretrained(saved).word_delimiter_token == "_"


def test_word_delimiter_of_several_characters(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=VOCABULARY) / "vocab.json"
    ours = Wav2Vec2CTCTokenizer(vocab, word_delimiter_token="<space>")
    assert ours.tokenize("a b") == ["a", "<space>", "b"]
    assert ours.decode(ours("hi you").input_ids) == "hi you"


def test_no_word_delimiter(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab={**VOCABULARY, " ": len(VOCABULARY)}) / "vocab.json"
    ours = Wav2Vec2CTCTokenizer(vocab, word_delimiter_token=None)
    assert ours.tokenize("a b") == ["a", " ", "b"]
    assert ours.decode(ours("a b").input_ids) == "a b"
    assert ours.word_delimiter_token_id is None
    ours.save_pretrained(tmp_path)
    assert Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).word_delimiter_token is None


def test_unknown_characters(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=ids_of("<pad>", "a", "|")) / "vocab.json"
    ours = Wav2Vec2CTCTokenizer(vocab)
    assert ours.unk_token_id == 5
    assert ours("aé").input_ids == [1, 5]
    without = Wav2Vec2CTCTokenizer(vocab, unk_token=None)
    with pytest.raises(ValueError, match="token 'é' is not in the vocabulary"):
        without("aé")
    assert without.decode([1, 99]) == "a"


def test_ids_of_vocabularies_with_gaps(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab={"a": 1, "b": 5, "|": 6, "<pad>": 3}) / "vocab.json"
    ours = Wav2Vec2CTCTokenizer(vocab)
    assert [ours.bos_token_id, ours.eos_token_id, ours.unk_token_id] == [4, 7, 8]
    assert ours.decode(ours("ab").input_ids) == "ab"


# Changing the vocabulary


def test_adding_tokens(folders: dict[str, Path]) -> None:
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folders["fine-tuned"])
    reference = Reference.from_pretrained(folders["fine-tuned"])
    for tokens in ("<x>", ["<y>", "<x>", "a"], [], [""]):
        assert ours.add_tokens(tokens) == reference.add_tokens(tokens)
        same(ours, reference)
    assert ours.add_tokens(["<z>"], special_tokens=True) == 1
    reference.add_tokens(["<z>"], special_tokens=True)
    same(ours, reference)
    assert ours.decode([ours.convert_tokens_to_ids("<z>"), 0], skip_special_tokens=True) == "a"
    stripping = transformers.AddedToken("<w>", lstrip=True)
    assert ours.add_tokens(AddedToken("<v>", lstrip=True)) == 1
    assert ours.add_tokens(stripping) == 1
    reference.add_tokens([transformers.AddedToken("<v>", lstrip=True, normalized=False), stripping])
    assert ours.tokenize("a <v> <w> b") == reference.tokenize("a <v> <w> b")
    with pytest.raises(TypeError, match="new_tokens must be a string"):
        ours.add_tokens([3])


def test_flags_of_added_tokens(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=ids_of(*LETTERS, "A", "B", "<unk>", "<pad>")) / "vocab.json"
    contents = ("[N]", "aB", "A", "<unk>")
    flags = [
        dict(zip(("lstrip", "rstrip", "single_word", "normalized", "special"), bits, strict=True))
        for bits in itertools.product([False, True], repeat=5)
    ]
    texts = ["A {0} B{0}", " {0}  {0}a {0} ", "{0}{0} A", "b{0} <pad> {0}<unk>"]

    def state(tokenizer: Any, content: str) -> Any:
        tokens = [
            (index, *(getattr(token, name) for name in ("content", *flags[0])))
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.content.lower() == content.lower()
        ]
        filled = [text.format(content) for text in texts]
        ids = [tokenizer(text).input_ids for text in filled]
        return (
            tokens,
            [tokenizer.tokenize(text) for text in filled],
            [tokenizer.decode(i, skip_special_tokens=True, group_tokens=False) for i in ids],
            sorted(tokenizer.all_special_tokens),
        )

    for number, (content, flag) in enumerate(itertools.product(contents, flags)):
        found = []
        for kind, token in ((Wav2Vec2CTCTokenizer, AddedToken), (Reference, AddedTokenOfReference)):
            tokenizer = kind(vocab, do_lower_case=number % 3 == 0)
            added = token(content, **flag)
            call = number % 4
            if call == 0:
                tokenizer.add_tokens([added])
            elif call == 1:
                tokenizer.add_tokens([added], special_tokens=True)
            elif call == 2:
                tokenizer.add_special_tokens({"additional_special_tokens": [added]})
            else:
                tokenizer.add_special_tokens({"eos_token": added})
            found.append(state(tokenizer, content))
        assert found[0] == found[1], (content, flag)
    for token in (AddedToken("x"), AddedToken("x", special=True)):
        assert token.normalized == AddedTokenOfReference("x", special=token.special).normalized


def test_flags_of_added_tokens_in_files(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folders["fine-tuned"])
    ours.add_tokens([AddedToken("[N]", lstrip=True), AddedToken("[M]", rstrip=True)])
    ours.add_special_tokens({"eos_token": AddedToken("[E]", lstrip=True, single_word=True)})
    ours.save_pretrained(tmp_path)
    text = "a [N] b [M] a [E] b[E]"
    wanted = ours.tokenize(text)
    assert wanted[:3] == ["a", "[N]", "|"] and "[E]" in wanted
    for kind in (Wav2Vec2CTCTokenizer, Reference):
        assert kind.from_pretrained(tmp_path).tokenize(text) == wanted


def test_setting_special_tokens(folders: dict[str, Path]) -> None:
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folders["fine-tuned"])
    reference = Reference.from_pretrained(folders["fine-tuned"])
    change: dict[str, Any] = {"mask_token": "<m>", "additional_special_tokens": ["<n>", "b"]}
    assert ours.add_special_tokens(change) == reference.add_special_tokens(change) == 2
    same(ours, reference)
    ours.pad_token = "a"
    assert ours.pad_token_id == 0
    assert ours.decode([1, 0, 1]) == "bb"
    ours.pad_token_id = 2
    assert ours.pad_token == "c"
    ours.mask_token = None
    assert ours.mask_token_id is None
    with pytest.raises(ValueError, match="got 'pad'"):
        ours.add_special_tokens({"pad": "x"})
    with pytest.raises(TypeError, match="pad_token must be a string"):
        ours.pad_token = 3  # type: ignore[assignment]


# Files that cannot be loaded


def test_broken_files(tmp_path: Path) -> None:
    load = Wav2Vec2CTCTokenizer.from_pretrained
    with pytest.raises(OSError, match=r"holds no tokenizer: no vocab\.json"):
        load(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")
    write(tmp_path, vocab=[1])
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        load(tmp_path)
    for vocab in ({"a": "0"}, {"a": -1}, {"a": 1.5}, {"a": True}):
        write(tmp_path, vocab=vocab)
        with pytest.raises(ValueError, match=r"ids in .* must be integers from 0 on.* for 'a'"):
            load(tmp_path)
    write(tmp_path, vocab={"a": 0})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON file"):
        load(tmp_path)
    for entries, error, message in (
        ({"tokenizer_class": "BertTokenizer"}, ValueError, "'BertTokenizer'"),
        ({"pad_token": 3}, TypeError, "pad_token must be a string"),
        ({"padding_side": "top"}, ValueError, "padding_side must be"),
        ({"added_tokens_decoder": {"3": {}}}, TypeError, r"added_tokens_decoder\[3\] must be"),
    ):
        write(tmp_path, tokenizer_config=entries)
        with pytest.raises(error, match=message):
            load(tmp_path)
    write(tmp_path, tokenizer_config={})
    with pytest.raises(TypeError, match="do_lowercase"):
        load(tmp_path, do_lowercase=True)
    assert load(tmp_path, do_lower_case=True, pad_token="a").pad_token_id == 0
    with pytest.raises(NotADirectoryError, match=r"vocab\.json"):
        load(tmp_path).save_pretrained(tmp_path / "vocab.json")
