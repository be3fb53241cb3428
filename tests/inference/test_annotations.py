"""TextGrid and CTM, to the letter."""

from __future__ import annotations

from w2vbert_fast.inference.ctc.annotations import ctm, textgrid
from w2vbert_fast.inference.ctc.timestamps import Character, Word

SAID = Word('say "hi"', 0.25, 1.0, 0.5, [Character("say", 0.25, 0.5, 1.0)])
TEXTGRID = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.500000
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.500000
        intervals: size = 3
        intervals [1]:
            xmin = 0.000000
            xmax = 0.250000
            text = ""
        intervals [2]:
            xmin = 0.250000
            xmax = 1.000000
            text = "say ""hi"""
        intervals [3]:
            xmin = 1.000000
            xmax = 1.500000
            text = ""
'''


def intervals(text: str) -> list[tuple[str, str, str]]:
    found = [line.split(" = ")[1] for line in text.splitlines() if line.startswith(" " * 12)]
    return list(zip(found[::3], found[1::3], found[2::3], strict=True))


def test_textgrid() -> None:
    assert textgrid([SAID], 1.5) == TEXTGRID
    assert intervals(textgrid([], 2.0)) == [("0.000000", "2.000000", '""')]
    with_characters = textgrid([SAID], 1.5, characters=True)
    assert "size = 2" in with_characters and 'name = "characters"' in with_characters


def test_intervals_of_a_tier_follow_each_other() -> None:
    words = [
        *(Word("a", 0, 1, 1.0, []), Word("b", 0.5, 2, 1.0, []), Word("c", 1, 2, 1.0, [])),
        *(Word("d", 2, 2, 1.0, []), Word("e", 2.0000001, 3, 1.0, [])),
    ]
    assert intervals(textgrid(words, 2.5)) == [
        ("0.000000", "1.000000", '"a"'),
        ("1.000000", "2.000000", '"b"'),
        ("2.000000", "3.000000", '"e"'),
    ]
    channels = [Word("a", 0, 1, 1.0, [], "agent"), Word("b", 0, 1, 1.0, [], 1)]
    text = textgrid(channels, 1.0)
    assert 'name = "words agent"' in text and 'name = "words channel 1"' in text


def test_ctm() -> None:
    assert ctm([SAID], "my talk") == 'my_talk 1 0.250 0.750 say"hi" 0.5000\n'
    assert ctm([Word("a", 1, 2, 1.0, [], "the agent")], "x") == "x the_agent 1.000 1.000 a 1.0000\n"
    assert ctm([], "x") == ""
