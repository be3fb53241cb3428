"""Pages: what lies in them, that nothing of it becomes HTML, and that memory stays flat."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from w2vbert_fast.report import Chart, Column, Fact, Findings, Page, Row, write_page

COLUMNS = (Column("Name"), Column("Length", "seconds"), Column("Text"))
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028&amp;"


def scripts(path: Path, kind: str) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    found = re.findall(rf'<script type="application/octet-stream" class="{kind}">(.*?)</', text)
    return [json.loads(gzip.decompress(base64.b64decode(content))) for content in found]


def rows_of(path: Path) -> list[Any]:
    return [row for block in scripts(path, "rows") for row in block]


def test_what_a_page_holds(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "out").mkdir()
    words = [("a", 1.5, 1.75, 0.5), ("b", 1.8, 2.0, None), ("c", 1.6, 1.7, 1.0)]
    rows = [
        Row(("one", 2.0, "a b c"), False, str(tmp_path / "clips" / "ü 1#?.wav"), 1.5, 2.0, words),
        Row(("two", None, None), True),
    ]
    page = Page("Title", COLUMNS, [Fact("Rows", "2")], sort=1)
    page.charts.append(Chart("Speed", "minutes", "x", {"speed": [(0.0, 1.0)]}))
    page.findings.append(Findings("Failed", [("ValueError", 1, "two: wrong")], search=True))
    path = tmp_path / "out" / "page.html"
    write_page(path, page, rows)
    assert rows_of(path) == [
        [["one", 2.0, "a b c"], 0, "../clips/%C3%BC%201%23%3F.wav", 1.5, 2.0],
        [["two", None, None], 1, None, 0.0, None],
    ]
    # Text, milliseconds since the last word's end, its length, hundredths.
    assert scripts(path, "words") == [
        [["a", 1500, 250, 50, "b", 50, 200, None, "c", -400, 100, 100], []]
    ]
    (found,) = scripts(path, "page")
    assert found["title"] == "Title" and found["sort"] == 1
    assert found["charts"][0]["lines"] == {"speed": [[0.0, 1.0]]}
    assert found["findings"][0]["entries"] == [["ValueError", 1, "two: wrong"]]
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_no_text_becomes_html_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page = Page(NASTY, (Column(NASTY),), [Fact(NASTY, NASTY)])
    write_page(path, page, [Row((NASTY,), words=[(NASTY, 0.0, 1.0, 1.0)], audio=NASTY)])
    text = path.read_text(encoding="utf-8")
    head = "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;"
    assert text.count("alert(") == 2 * text.count(head) == 4  # the title, twice
    assert "<img" not in text and " src=" not in text.replace("img src=x", "")
    assert set(re.findall(r"\w+://[\w./-]+", text)) == {"http://www.w3.org/2000/svg"}  # a name
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for kind, pattern in (
        ("script", r"<script>(.*?)</script>"),
        ("style", r"<style>(.*?)</style>"),
    ):
        (content,) = re.findall(pattern, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, Page("before", COLUMNS), [])

    def rows() -> Iterator[Row]:
        yield Row(("one", 1.0, "x"))
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_page(path, Page("after", COLUMNS), rows())
    assert scripts(path, "page")[0]["title"] == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_what_is_known_after_the_last_row_is_in_the_head(tmp_path: Path) -> None:
    page = Page("count", (Column("Name"),))
    seen: list[int] = []

    def rows() -> Iterator[Row]:
        for index in range(2500):
            seen.append(index)
            yield Row((str(index),))

    path = tmp_path / "page.html"
    write_page(path, page, rows(), lambda: page.facts.append(Fact("Rows", str(len(seen)))))
    assert [len(block) for block in scripts(path, "rows")] == [1000, 1000, 500]
    assert scripts(path, "page")[0]["facts"] == [{"name": "Rows", "value": "2500"}]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = (Row((f"{i:08d}", float(i), "word " * 20)) for i in range(count))
        tracemalloc.start()
        write_page(tmp_path / "page.html", Page("many", COLUMNS), rows)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(12_000) < 1.2 * peak(3_000)


def test_a_column_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of text, number, seconds, share, got"):
        Column("x", "colour")
