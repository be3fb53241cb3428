"""Subtitles: cue limits, the two formats and plain text, with and without spaces."""

# ruff: noqa: RUF001 - full-width marks

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from w2vbert_fast.inference.ctc.subtitles import Layout, cues, srt, txt, vtt
from w2vbert_fast.inference.ctc.timestamps import Character, Word


def word(text: str, start: float, end: float) -> Word:
    step = (end - start) / len(text)
    characters = [
        Character(c, start + i * step, start + (i + 1) * step, 1.0) for i, c in enumerate(text)
    ]
    return Word(text, start, end, 1.0, characters)


def width(text: str) -> int:
    """Columns as terminals and East Asian Width count them."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    # Vowels and final consonants of Korean syllables are part of the first one's columns.
    jamo = sum("\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7ff" for c in text)
    return len(text) + wide - jamo - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def spoken(text: str, *pauses: int, pace: float = 0.2) -> Word:
    """A character every `pace` seconds, each 60 ms long; a pause in front of some of them."""
    characters, now = [], 0.0
    for i, c in enumerate(text):
        now += 1.2 * (i in pauses)
        characters.append(Character(c, now, now + 0.06, 1.0))
        now += pace
    return Word(text, 0.0, characters[-1].end, 1.0, characters)


def sentence(text: str, start: float = 0.0, pace: float = 0.3, gap: float = 0.1) -> list[Word]:
    return [
        word(text, start + i * pace, start + (i + 1) * pace - gap)
        for i, text in enumerate(text.split())
    ]


def test_srt_file() -> None:
    words = [*sentence("press one to hear it"), *sentence("or hang up", start=3661.5)]
    assert srt(words) == (
        "1\n00:00:00,000 --> 00:00:01,400\npress one to hear it\n\n"
        "2\n01:01:01,500 --> 01:01:02,500\nor hang up\n"
    )


def test_vtt_file() -> None:
    words = [word("a<b", 0.5, 2.0), word("&c", 2.1, 2.5)]
    assert vtt(words) == "WEBVTT\n\n00:00:00.500 --> 00:00:02.500\na&lt;b &amp;c\n"


def test_plain_text_has_a_line_a_cue() -> None:
    words = [*sentence("one two"), *sentence("three", start=5.0)]
    assert txt(words) == "one two\nthree\n"


def test_a_word_without_a_length_is_shown_for_a_millisecond() -> None:
    words = [word("a.", 1, 1), word("b", 1, 2)]
    assert srt(words).splitlines()[1::4] == [
        "00:00:01,000 --> 00:00:01,001",
        "00:00:01,001 --> 00:00:02,000",
    ]


def test_a_word_that_is_cut_and_lasts_into_the_next_one() -> None:
    made = cues([word("ab", 1, 5), word("c", 2, 3)], Layout(line_length=1, max_lines=1))
    assert [(cue.start, cue.end, cue.lines) for cue in made] == [
        (1, 2, ["a"]),
        (2, 2, ["b"]),
        (2, 3, ["c"]),
    ]


def test_no_words() -> None:
    assert (cues([]), srt([]), vtt([]), txt([])) == ([], "", "WEBVTT\n", "")


def test_a_pause_ends_a_cue_and_a_shorter_gap_does_not() -> None:
    assert len(cues([word("a", 0, 1), word("b", 1.59, 2)])) == 1
    assert len(cues([word("a", 0, 1), word("b", 1.61, 2)])) == 2
    assert len(cues([word("a", 0, 1), word("b", 1.5, 2)], Layout(pause_seconds=0.5))) == 2


def test_the_longest_time_ends_a_cue() -> None:
    words = sentence("a b c d", pace=2.0, gap=0.5)  # "d" ends at 7.5 s
    assert [cue.lines for cue in cues(words)] == [["a b c"], ["d"]]
    assert [cue.lines for cue in cues(words, Layout(max_seconds=7.5))] == [["a b c d"]]


def test_a_line_may_be_full() -> None:
    assert [cue.lines for cue in cues(sentence("abc defg"), Layout(8, 1))] == [["abc defg"]]
    assert [cue.lines for cue in cues(sentence("abc defg"), Layout(7, 1))] == [["abc"], ["defg"]]
    assert cues([word("a" * 42, 0, 2)])[0].lines == ["a" * 42]
    assert cues([word("a" * 43, 0, 2)])[0].lines == ["a" * 42, "a"]


def test_a_cue_has_at_most_two_lines() -> None:
    made = cues(sentence(" ".join(["a" * 40] * 3)))
    assert [len(cue.lines) for cue in made] == [2, 1]


def test_a_word_that_is_cut_fills_its_lines_and_times() -> None:
    (cue,) = cues([word("abcdefgh", 0, 2)], Layout(line_length=4))
    assert cue.lines == ["abcd", "efgh"]
    made = cues([word("abcdefgh", 10, 26)], Layout(max_seconds=6))  # 2 s a character
    assert [cue.lines for cue in made] == [["abc"], ["def"], ["gh"]]


def test_a_sentence_ends_a_cue() -> None:
    assert [cue.lines for cue in cues(sentence("It is. What is it?"))] == [
        ["It is."],
        ["What is it?"],
    ]


def test_lines_are_balanced() -> None:
    (cue,) = cues(sentence("after the tone say your temporary message and then", pace=0.2))
    assert cue.lines == ["after the tone say your", "temporary message and then"]


def test_short_cues_stay_until_the_next() -> None:
    first, second = cues([word("a", 0, 0.1), word("b", 0.8, 0.9)])
    assert (first.start, first.end) == (0, 0.8)
    assert (second.start, second.end) == (0.8, pytest.approx(1.8))


def test_text_without_spaces_is_cut_between_characters() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    made = cues([word(text, 0.0, 20.0)])
    assert "".join(line for cue in made for line in cue.lines) == text
    assert all(len(line) <= 42 for cue in made for line in cue.lines)
    assert all(cue.end - cue.start <= 7 for cue in made)


def lines_of(*words: Word, layout: Layout | None = None) -> list[list[str]]:
    return [cue.lines for cue in cues(words, layout or Layout())]


def test_sentences_without_spaces_end_cues() -> None:
    assert lines_of(spoken("今天很好。我们走？好！“好。”他说……是．ﾊｲ｡も")) == [
        ["今天很好。"],
        ["我们走？"],
        ["好！"],
        ["“好。”"],
        ["他说……"],
        ["是．"],
        ["ﾊｲ｡"],
        ["も"],
    ]
    assert lines_of(spoken("他说好.我有3.5元!好")) == [["他说好."], ["我有3.5元!"], ["好"]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("你要说印度那可真是个奇葩的国家", ["你要说印度", "那可真是个奇葩的国家"]),
        ("とうきょうへいきました", ["とうきょうへ", "いきました"]),
        ("วันนี้อากาศดีมาก", ["วันนี้", "อากาศดีมาก"]),
        ("ມື້ນີ້ອາກາດດີ", ["ມື້ນີ້", "ອາກາດດີ"]),
        ("我用iPhone手机", ["我用", "iPhone手机"]),
    ],
)
def test_pauses_without_spaces_end_cues(text: str, parts: list[str]) -> None:
    word = spoken(text, len(parts[0]))
    first, second = cues([word])
    assert [first.lines, second.lines] == [[parts[0]], [parts[1]]]
    assert second.start == word.characters[len(parts[0])].start
    assert first.end == pytest.approx(word.characters[len(parts[0]) - 1].end, abs=1)
    # The same characters without a pause, and a pause that is too short.
    assert lines_of(spoken(text)) == lines_of(word, layout=Layout(pause_seconds=2)) == [[text]]


def test_a_pause_in_a_word_of_letters_does_not_divide_it() -> None:
    assert lines_of(spoken("hello", 3)) == [["hello"]]
    assert lines_of(spoken("안녕하세요", 2), spoken_later(spoken("네"), 9)) == [
        ["안녕하세요"],
        ["네"],
    ]
    # Unless it is too long for a line anyway, as where a vocabulary has no spaces.
    assert lines_of(spoken("helloworld" * 5, 15)) == [
        ["helloworldhello"],
        ["world" + "helloworld" * 3],
    ]


def spoken_later(word: Word, seconds: float) -> Word:
    characters = [replace(c, start=c.start + seconds, end=c.end + seconds) for c in word.characters]
    return replace(word, start=word.start + seconds, end=word.end + seconds, characters=characters)


def test_wide_characters_take_two_columns_and_marks_none() -> None:
    assert lines_of(spoken("国" * 42, pace=0.1)) == [["国" * 21] * 2]
    assert lines_of(spoken("国" * 43, pace=0.1)) == [["国" * 21] * 2, ["国"]]
    assert lines_of(spoken("한" * 43, pace=0.1)) == [["한" * 21] * 2, ["한"]]
    # Decomposed: three characters a syllable, two columns.
    assert lines_of(spoken(unicodedata.normalize("NFD", "한") * 42, pace=0.03)) == [
        [unicodedata.normalize("NFD", "한") * 21] * 2
    ]
    # Thai: a vowel or a tone above takes no place, SARA AM takes one.
    assert lines_of(spoken("ที่" * 42 + "น้ำ" * 21, pace=0.03)) == [["ที่" * 42, "น้ำ" * 21]]


def test_lines_neither_begin_with_closing_marks_nor_end_with_opening_ones() -> None:
    layout = Layout(line_length=8, max_lines=9)
    assert lines_of(spoken("国国国国、国国国", pace=0.1), layout=layout) == [
        ["国国国", "国、国", "国国"]
    ]
    assert lines_of(spoken("国国国「国」", pace=0.1), layout=layout) == [["国国国", "「国」"]]
    assert lines_of(spoken("カカカカッカカー", pace=0.1), layout=layout) == [
        ["カカカ", "カッカ", "カー"]
    ]
    # A point ends a sentence, but no number; the colour of an emoji is a part of it.
    assert lines_of(spoken("値は３．１４．国")) == [["値は３．１４．"], ["国"]]
    assert lines_of(spoken("👍🏽👍🏽👍🏽👍🏽👍🏽", pace=0.1), layout=layout) == [
        ["👍🏽👍🏽👍🏽", "👍🏽👍🏽"]
    ]
    assert lines_of(spoken("กกกกกกกกเกๆ", pace=0.1), layout=layout) == [["กกกกกก", "กกเกๆ"]]


def test_a_word_whose_characters_do_not_spell_it_is_spread_evenly() -> None:
    written = replace(spoken("二十年。三十年。"), text="20年。三十年。")
    assert lines_of(written) == [["20年。"], ["三十年。"]]
    bare = replace(spoken("今天很好。我们走。"), characters=[])
    first, second = cues([bare])
    assert (first.lines, second.lines) == (["今天很好。"], ["我们走。"])
    assert second.start == pytest.approx(bare.end * 5 / 9)


def test_tokens_of_several_characters() -> None:
    tokens = [Character("今天", 0, 1, 1.0), Character("好。我", 1, 4, 1.0)]
    first, second = cues([Word("今天好。我", 0, 4, 1.0, tokens)])
    assert (first.lines, second.lines) == (["今天好。"], ["我"])
    assert (first.end, second.start) == (3, 3)


def test_plain_text_without_spaces_stays_without() -> None:
    assert txt([spoken("国" * 42, pace=0.1), spoken_later(spoken("好"), 9)]) == "国" * 42 + "\n好\n"


def test_closing_quotes_belong_to_the_sentence() -> None:
    assert lines_of(*sentence('He said: "Go." I went. (Why?) ठीक है। हाँ')) == [
        ['He said: "Go."'],
        ["I went."],
        ["(Why?)"],
        ["ठीक है।"],
        ["हाँ"],
    ]


words_in_time = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=60),
        st.floats(0, 3),
        st.floats(0, 9),
    ),
    max_size=40,
)


def placed(drawn: list[tuple[str, float, float]]) -> list[Word]:
    now, words = 0.0, []
    for text, gap, seconds in drawn:
        words.append(word(text, now + gap, now + gap + seconds))
        now += gap + seconds
    return words


def test_words_of_a_cue() -> None:
    words = sentence("a b c d e")
    assert lines_of(*words, layout=Layout(max_words=2)) == [["a b"], ["c d"], ["e"]]
    assert lines_of(spoken("今天很好"), layout=Layout(max_words=3)) == [["今天很"], ["好"]]
    named = [replace(word, channel="agent") for word in words]
    assert [cue.lines for cue in cues(named, Layout(max_words=2))] == [
        ["agent: a b"],
        ["agent: c d"],
        ["agent: e"],
    ]


def test_a_name_stands_apart_and_on_the_only_line() -> None:
    """A part of a word behind a name has a space in front, and one line is one with a name, too."""
    words = [replace(word("cooperation", 0, 2), channel="agent")]
    narrow = Layout(line_length=12, max_lines=1)
    assert [cue.lines for cue in cues(words, narrow)] == [
        ["agent: coope"],
        ["agent: ratio"],
        ["agent: n"],
    ]
    assert txt([replace(spoken("今天很好", 2), channel="agent")]) == "agent: 今天\nagent: 很好\n"


def test_a_cue_stays_until_it_can_be_read() -> None:
    long, later = word("a" * 40, 1, 2), word("b" * 40, 9, 9.5)
    assert [cue.end for cue in cues([long, later])] == [2, 10]
    assert [cue.end for cue in cues([long, later], Layout(reading_speed=10))] == [5, 13]
    # A wide character takes as long as two; the longest time and the next cue are limits.
    assert cues([word("国" * 20, 1, 2)], Layout(reading_speed=10))[0].end == 5
    assert [cue.end for cue in cues([long, later], Layout(reading_speed=6))] == [
        pytest.approx(1 + 40 / 6),
        pytest.approx(9 + 40 / 6),
    ]
    assert [cue.end for cue in cues([long, later], Layout(reading_speed=1))] == [8, 16]
    assert cues([long, word("b", 3, 4)], Layout(reading_speed=10))[0].end == 3
    # Never shorter than it is spoken.
    assert cues([long], Layout(reading_speed=1000))[0].end == 2


def test_highlighted_words() -> None:
    words = [word("a<b", 0.5, 1.0), word("c", 1.2, 2.0), replace(word("d", 9, 10), channel=1)]
    assert vtt(words, Layout(highlight_words=True)) == "\n".join(
        [
            "WEBVTT\n",
            "00:00:00.500 --> 00:00:01.000\n<u>a&lt;b</u> c\n",
            "00:00:01.000 --> 00:00:01.200\na&lt;b c\n",
            "00:00:01.200 --> 00:00:02.000\na&lt;b <u>c</u>\n",
            "00:00:09.000 --> 00:00:10.000\n<v channel 1><u>d</u>\n",
        ]
    )
    assert vtt([word("a", 0, 0.5)], Layout(highlight_words=True)).endswith(
        "\n00:00:00.000 --> 00:00:00.500\n<u>a</u>\n\n00:00:00.500 --> 00:00:01.000\na\n"
    )
    characters = vtt([spoken("今天", pace=0.06)], Layout(highlight_words=True, min_seconds=0))
    assert characters.count("-->") == 2 and "今<u>天</u>" in characters


@given(drawn=st.lists(st.tuples(st.text("abc", min_size=1), st.floats(0, 1), st.floats(0, 2))))
@settings(max_examples=50, deadline=None)
def test_a_highlighted_cue_is_as_long_as_the_cue(drawn: list[tuple[str, float, float]]) -> None:
    words = placed(drawn)

    def times(layout: Layout) -> list[list[str]]:
        return [line.split(" --> ") for line in vtt(words, layout).split("\n") if "-->" in line]

    plain = times(Layout())
    joined: list[list[str]] = []
    for start, end in times(Layout(highlight_words=True)):
        assert start < end
        if joined and joined[-1][1] == start and start not in [first for first, _ in plain]:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    assert joined == plain


@given(drawn=words_in_time, line_length=st.integers(4, 50), max_lines=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_limits_hold_and_nothing_is_lost(
    drawn: list[tuple[str, float, float]], line_length: int, max_lines: int
) -> None:
    words = placed(drawn)
    layout = Layout(line_length=line_length, max_lines=max_lines)
    made = cues(words, layout)
    for cue in made:
        assert 1 <= len(cue.lines) <= max_lines
        assert all(width(line) <= line_length for line in cue.lines)
    shown = "".join("".join(cue.lines) for cue in made).replace(" ", "")
    assert shown == "".join(w.text for w in words)
    for cue in made:
        assert cue.end - cue.start <= 7 + 1e-6
    for left, right in itertools.pairwise(made):
        assert left.start <= left.end <= right.start

    times = re.findall(r"(\d+):(\d\d):(\d\d),(\d{3})", srt(words, layout))
    assert len(times) == 2 * len(made)
    clock = [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in times]
    assert clock == sorted(clock)
    assert all(start < end for start, end in zip(clock[::2], clock[1::2], strict=True))
    assert all(
        math.isclose(found, cue.start, abs_tol=0.06)
        for found, cue in zip(clock[::2], made, strict=True)
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"words\[1\] 'b' is from 0 to 1"):
        srt([word("a", 5, 6), word("b", 0, 1)])
    with pytest.raises(ValueError, match=r"words\[0\]"):
        vtt([word("a", 0, float("nan"))])
    with pytest.raises(ValueError, match=r"words\[0\]"):
        txt([word("a", -1, 1)])
    with pytest.raises(ValueError, match="line_length must be positive, got 0"):
        Layout(line_length=0)
    with pytest.raises(ValueError, match="max_seconds must be positive, got 0"):
        Layout(max_seconds=0)
    with pytest.raises(ValueError, match="max_words must be positive, got 0"):
        Layout(max_words=0)
    with pytest.raises(ValueError, match="reading_speed must be positive, got nan"):
        Layout(reading_speed=math.nan)
    with pytest.raises(ValueError, match="min_seconds"):
        Layout(min_seconds=8)
    with pytest.raises(ValueError, match="min_seconds"):
        Layout(min_seconds=-0.1)
    assert Layout(min_seconds=0).min_seconds == 0
