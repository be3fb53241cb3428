"""The benchmark report: checked input, what the charts show, and a page that needs nothing else."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.ledger.forward import ledger
from bench.ledger.workload import Workload
from bench.report import __main__ as report
from bench.report.charts import (
    WIDTH,
    Bar,
    BarChart,
    Line,
    bar_charts,
    digits,
    line_chart,
    picture,
)
from bench.report.page import groups, ledger_picture, page, scaling_lines, speed_picture
from bench.rows import parse
from tests.bench.conftest import launches_move_nothing

SVG = "{http://www.w3.org/2000/svg}"


def row(workload: str, implementation: str, median: float | None, **other: Any) -> dict[str, Any]:
    seconds = None
    if median is not None:
        seconds = {"median": median, "p20": median * 0.9, "p80": median * 1.2, "rounds": 5}
    return {
        "workload": workload,
        "kind": "encoder",
        "implementation": implementation,
        "configuration": "",
        "dtype": "fp32",
        "audio_seconds": 30.0,
        "seconds": seconds,
        "flops": None,
        "share_of_gemm": None,
        "peak_bytes_above_weights": None,
        "error": None,
        "error_kind": None,
        "skipped": None,
        **other,
    }


@pytest.fixture
def raw() -> dict[str, Any]:
    return {
        "schema": "w2vbert-bench/v1",
        "machine": {"cpu": "Some <CPU> & more", "cores": 2, "flags": ["avx2"], "gpu": None},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00",
        "threads": 2,
        "layers": 4,
        "gemm_rate": {"fp32": 4.4e11},
        "rows": [
            row("1x30s", "w2vbert_fast", 0.5, share_of_gemm=0.86, peak_bytes_above_weights=2**27),
            row("1x30s", "transformers", 1.5, configuration="eager"),
            row("1x30s", "transformers", 1.0, configuration="sdpa, one by one"),
            row("1x10s", "w2vbert_fast", 0.125, audio_seconds=10.0),
            row("1x10s", "transformers", 0.25, audio_seconds=10.0, configuration="sdpa"),
            row(
                *("1x300s", "w2vbert_fast", 3.0),
                **{"audio_seconds": 300.0, "layers": 2, "peak_bytes_above_weights": 2**30},
            ),
            row("1x300s", "transformers", None, audio_seconds=300.0, skipped="needs 58 GB"),
            row("1x30s", "w2vbert_fast", 0.25, dtype="bf16", error=3e-3, error_kind="to float64"),
        ],
        "targets": [
            {"row": "encoder", "target": ">= 1.7", "measured": 2.0, "reached": True},
            {"row": "int8", "target": ">= 3.5", "measured": None, "reached": None},
        ],
    }


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        launches_move_nothing(patch)
        return ledger(Workload(1, 96, layers=2))


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def paths_of(svg: str, *styles: str) -> list[list[tuple[float, float]]]:
    """Corners of every path that has all of some styles."""
    return [
        [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))]
        for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
        if all(style in path.get("style", "") for style in styles)
    ]


def bars_of(svg: str) -> list[tuple[str, float, float]]:
    """Kind, width and y of every bar."""
    return [
        (kind, max(x for x, _ in corners) - min(x for x, _ in corners), max(y for _, y in corners))
        for kind in ("ours", "peer")
        for corners in paths_of(svg, f"fill: var(--{kind})")
    ]


def texts_of(svg: str) -> dict[str, tuple[float, float]]:
    """Where every text stands."""
    return {
        text.text or "": (float(text.get("x", "")), float(text.get("y", "")))
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
    }


def test_page_needs_no_other_file(raw: dict[str, Any], counted: dict[str, Any]) -> None:
    text = page([parse(raw, "results")], counted)
    parsed = Page(text)
    attributes = [name for _, found in parsed.tags for name in found]
    assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "@import" not in text and "url(" not in text
    # The only addresses are names of namespaces, and what is drawn again is in the page.
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"' <]+", text)) == names
    assert set(re.findall(r'xlink:href="(.)', text)) <= {"#"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        parsed.tags
    )
    assert "prefers-color-scheme: dark" in text


def test_page_says_where_its_numbers_come_from(
    raw: dict[str, Any], counted: dict[str, Any]
) -> None:
    parsed = Page(page([parse(raw, "results")], counted))
    shown = " ".join(parsed.texts)
    for needed in (
        *("Some <CPU> & more", "2 cores, 2 threads", "torch 2.13.0", "transformers 5.23.0"),
        *("commit abc1234", "2026-01-02T03:04:05", "avx2", "fp32 440 GFLOP/s"),
        *(
            "A model, not a measurement.",
            "needs 58 GB",
            "450.0 to 600.0",
            "86%",
            "error to float64",
        ),
        *("reached", "not measured", "A100 SXM 80 GB", "H100 SXM", "MI300X", "data sheet"),
    ):
        assert needed in shown, needed


def test_every_chart_has_a_table_below(raw: dict[str, Any], counted: dict[str, Any]) -> None:
    text = page([parse(raw, "results")], counted)
    charts = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    # Four groups' speed, one chart of scaling, two groups' memory, four of the ledger, three GPUs.
    assert len(charts) == 4 + 1 + 2 + 4 + 3
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img" and root.get("aria-label")
    cards = text.split('<div class="card">')[1:]
    assert [card.count("<svg ") for card in cards] == [1] * len(charts)
    # The ledger's four share the table below them.
    below = [card.partition("</svg>")[2].lstrip() for card in cards]
    assert [text.startswith("<details>") for text in below].count(False) == 4
    assert all("<table>" in text for text in below if text.startswith("<details>"))
    assert "<table>" in below[-4]


def test_groups_keep_the_order_of_the_file_and_of_dtypes(raw: dict[str, Any]) -> None:
    found = [(workload, dtype, len(rows)) for _, workload, dtype, rows in groups(parse(raw, "r"))]
    assert found == [
        ("1x30s", "fp32", 3),
        ("1x30s", "bf16", 1),
        ("1x10s", "fp32", 2),
        ("1x300s", "fp32", 2),
    ]


def test_speed_and_its_spread(raw: dict[str, Any]) -> None:
    first = parse(raw, "results").rows[0]
    assert first.speed == pytest.approx((60.0, 30 / 0.6, 30 / 0.45))


def test_lines_take_the_best_configuration_and_count_layers(raw: dict[str, Any]) -> None:
    ours, reference = scaling_lines(parse(raw, "results"), "fp32")
    assert (ours.label, reference.label) == ("w2vbert_fast", "transformers")
    assert [(x, pytest.approx(y)) for x, y, _, _ in ours.points] == [
        (10.0, 80.0 * 4),
        (30.0, 60.0 * 4),
        (300.0, 100.0 * 2),
    ]
    assert [(x, pytest.approx(y)) for x, y, _, _ in reference.points] == [(10.0, 160), (30.0, 120)]


def test_bars_are_in_proportion() -> None:
    bars = [Bar("a", 10.0, ours=True), Bar("b", 2.5, (2.0, 4.0))]
    svg = bar_charts([BarChart("Title", "unit", bars)])
    (kind_a, width_a, y_a), (kind_b, width_b, y_b) = bars_of(svg)
    assert (kind_a, kind_b) == ("ours", "peer")
    assert width_a == pytest.approx(4 * width_b, rel=0.01) and y_a < y_b
    strokes = paths_of(svg, "stroke: var(--ink)")
    ((low, high),) = [ends for ends in strokes if ends[0][0] != ends[-1][0]]  # but for its caps
    assert low[0] == pytest.approx(width_b * 0.8, rel=0.01)
    assert high[0] == pytest.approx(width_b * 1.6, rel=0.01)
    assert low[1] == high[1] == pytest.approx(y_b - 6)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-9, 5e12]])
def test_bars_of_odd_values_stay_inside(values: list[float]) -> None:
    chart = BarChart("<&>", "unit", [Bar("x" * 200, value) for value in values])
    svg = bar_charts([chart])
    bars = bars_of(svg)
    assert len(bars) == len(values)
    assert all(0 <= width < WIDTH for _, width, _ in bars)
    texts = texts_of(svg)
    assert max(map(len, texts)) < 60 and "<&>" in texts
    height = float(ElementTree.fromstring(svg).get("height", ""))
    assert all(0 <= x < WIDTH and 0 < y < height for x, y in texts.values())


def test_lines_stay_inside_and_rise_upwards() -> None:
    line = Line("a", ((1.0, 5.0, 4.0, 6.0), (10.0, 50.0, 40.0, 60.0)))
    root = ElementTree.fromstring(line_chart("T", "y", "x", [line, Line("b", ((1.0, 5, 5, 5),))]))
    _, _, width, height = map(float, root.get("viewBox", "").split())
    markers = [(float(m.get("x", "")), float(m.get("y", ""))) for m in root.iter(f"{SVG}use")]
    # Those of the first line, of the second, and of each in the legend.
    assert len(markers) == 2 + 1 + 2
    assert markers[0][0] < markers[1][0] and markers[0][1] > markers[1][1]
    assert markers[2] == markers[0]
    assert all(0 < x < width and 0 < y < height for x, y in markers)
    assert {"T", "x", "y", "a", "b", "1", "10"} <= set(
        texts_of(ElementTree.tostring(root, "unicode"))
    )


def test_pictures_carry_their_own_colours(raw: dict[str, Any], counted: dict[str, Any]) -> None:
    speed = speed_picture(parse(raw, "results"))
    assert speed is not None
    for drawn, unit in ((speed, "seconds of audio"), (ledger_picture(counted), "is better")):
        assert "prefers-color-scheme: dark" in drawn
        shown = [text.text or "" for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
        assert len([text for text in shown if unit in text]) == 2
    assert "A model, not a measurement" in ledger_picture(counted)
    texts = [text.text for text in ElementTree.fromstring(speed).iter(f"{SVG}text")]
    # Of each implementation the fastest configuration only.
    assert "transformers, sdpa, one by one" in texts and "transformers, eager" not in texts
    other = copy.deepcopy(raw)
    for row in other["rows"]:
        row["layers"] = other["layers"] + (row["workload"] == "1x30s")
    drawn = str(speed_picture(parse(other, "results")))
    assert f" {other['layers']} layers, 1x30s: {other['layers'] + 1};" in drawn
    nothing = copy.deepcopy(raw)
    nothing["rows"] = nothing["rows"][3:5]
    assert speed_picture(parse(nothing, "results")) is None


def test_a_picture_places_charts_side_by_side() -> None:
    charts = [BarChart(f"chart {i}", "u", [Bar("a", 1.0)] * (i + 1)) for i in range(3)]
    places = texts_of(picture(charts))
    first, second, third = (places[chart.title] for chart in charts)
    assert first[1] == second[1] and first[0] == third[0]
    assert third[1] > first[1] and second[0] > first[0] + WIDTH


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (14, "14"),
        (16.96, "17.0"),
        (2.8349, "2.83"),
        (0.01234, "0.0123"),
        (123456.7, "123,457"),
        (2e-6, "2.00e-06"),
    ],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema="other"), "schema is 'other'"),
        (lambda r: r.pop("commit"), "lacks commit"),
        (lambda r: r["rows"][0].pop("dtype"), r"rows\[0\]: lacks dtype"),
        (lambda r: r["rows"][1].update(kind="decoder"), r"rows\[1\]: kind is 'decoder'"),
        (lambda r: r["rows"][0].update(seconds=None), "either seconds or the reason"),
        (lambda r: r["rows"][0].update(skipped="no"), "either seconds or the reason"),
        (lambda r: r["rows"][0].update(audio_seconds=0), "audio_seconds is 0"),
        (lambda r: r["rows"][0]["seconds"].update(p20=9.0), "p20 9.0, median 0.5"),
        (lambda r: r["rows"][0]["seconds"].update(median=float("nan")), "numbers median"),
    ],
)
def test_what_is_not_of_the_schema_is_refused(
    raw: dict[str, Any], change: Any, message: str
) -> None:
    change(raw)
    with pytest.raises(ValueError, match=message):
        parse(raw, "file.json")


def test_command(tmp_path: Path, raw: dict[str, Any], counted: dict[str, Any]) -> None:
    results, costs, out = tmp_path / "r.json", tmp_path / "l.json", tmp_path / "new" / "page.html"
    results.write_text(json.dumps(raw))
    costs.write_text(json.dumps(counted))
    pictures = tmp_path / "pictures"
    arguments = [str(results), str(costs), "--out", str(out), "--pictures", str(pictures)]
    assert report.main(arguments) == 0
    assert "Cost ledger" in out.read_text()
    assert {file.name for file in pictures.iterdir()} == {"speed_cpu.svg", "ledger.svg"}
    assert report.main([str(results), str(costs), "--out", str(out), "--no-ledger"]) == 0
    assert "Cost ledger" not in out.read_text()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "no JSON"), ("[]", "a JSON object")]
)
def test_bad_files(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    out = tmp_path / "page.html"
    assert report.main([str(file), "--out", str(out), "--no-ledger"]) == 2
    assert message in capsys.readouterr().err and not out.exists()
