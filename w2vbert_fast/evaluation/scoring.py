"""`evaluate`: error rates with their intervals, where the errors are, and comparisons."""

from __future__ import annotations

import functools
import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w2vbert_fast.checkpoints.files import make_folder, write_json, write_text
from w2vbert_fast.evaluation.bootstrap import interval, resampled_rates, share_better
from w2vbert_fast.evaluation.normalisation import AUTO, Normalisation, chosen
from w2vbert_fast.evaluation.outcomes import (
    Outcome,
    is_results,
    of_results,
    of_runner,
    references,
)
from w2vbert_fast.inference.runner import Flow, Transcriber
from w2vbert_fast.inference.tasks.transcribe import Transcribe
from w2vbert_fast.recordings.inputs import Inputs, open_inputs
from w2vbert_fast.recordings.rows import how_many
from w2vbert_fast.training.scores import Alignment, align, separates_words

SUMMARY_FILE = "evaluation.json"
UTTERANCES_FILE = "utterances.jsonl"
SCORES = {"wer": "words", "cer": "characters"}
"""Error rates, and what each counts."""

# Bounds of the durations that are told apart, in seconds.
_DURATIONS = (2.0, 5.0, 10.0, 20.0, 40.0)
_LISTED, _GROUPS = 10, 30
_SAVED = 1000


@dataclass(frozen=True)
class Scored:
    """A row that all systems have recognised, as texts are compared.

    Attributes:
        name: id of the row, or the recording's name.
        seconds: length of the recording.
        group: see `Evaluation.by`.
        reference: what was said.
        hypotheses: what each system recognised.
        alignments: the errors of each system, by "wer" and "cer".
        audio: name of the recording.
        offset: where the row begins in it, in seconds.
        words: those of the first system that has their times, see `Outcome.words`.
    """

    name: str
    seconds: float
    group: str
    reference: str
    hypotheses: tuple[str, ...]
    alignments: dict[str, tuple[Alignment, ...]]
    audio: str
    offset: float
    words: tuple[tuple[str, float, float, float], ...] = ()

    def errors(self, score: str) -> list[int]:
        """How many errors each system has made."""
        return [len(alignment.edits) for alignment in self.alignments[score]]

    def length(self, score: str) -> int:
        """Words or characters of the reference."""
        return self.alignments[score][0].length

    def row(self) -> dict[str, Any]:
        """A line of `utterances.jsonl`."""
        row: dict[str, Any] = {"id": self.name, "seconds": round(self.seconds, 4)}
        row |= {"group": self.group} if self.group else {}
        row |= {"reference": self.reference, "hypotheses": list(self.hypotheses)}
        for score, unit in SCORES.items():
            row |= {unit: self.length(score), f"{score}_errors": self.errors(score)}
        return row


@dataclass(frozen=True)
class Evaluation:
    """Scores of one system, or of two on the same rows.

    Attributes:
        systems: names of models or of folders with results.
        rows: what was scored.
        left_out: names of the other rows, and why.
        normalisation: how texts were made alike.
        metric: "wer" or "cer": what errors are counted in where it is one of them, characters where
            no spaces separate words.
        by: column that rows are told apart by; None: none.
        resamples: draws of the bootstrap.
        seed: of them.
    """

    systems: tuple[str, ...]
    rows: tuple[Scored, ...]
    left_out: tuple[tuple[str, str], ...]
    normalisation: Normalisation
    metric: str
    by: str | None = None
    resamples: int = 1000
    seed: int = 0

    def summary(self) -> dict[str, Any]:
        """All numbers, as JSON takes them. Rates are fractions, intervals hold 95 % of the draws.

        `systems`: `name`, `wer`, `wer_interval`, `cer`, `cer_interval`, kinds of errors. Of two,
        `comparison`: for each rate the `difference` (second less first), its `interval` and the
        share of draws in which the second is `better`. `groups`: rates by `duration` and by column.
        `edits`: of each system the errors and how often it makes them. `worst`: rows with most
        errors.
        """
        return self._summary

    @functools.cached_property
    def _summary(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "rows": len(self.rows),
            "left_out": [{"row": name, "reason": reason} for name, reason in self.left_out],
            "seconds": round(sum(row.seconds for row in self.rows), 3),
            **{unit: sum(r.length(score) for r in self.rows) for score, unit in SCORES.items()},
            "normalisation": str(self.normalisation),
            "metric": self.metric,
            "resamples": self.resamples,
        }
        systems: list[dict[str, Any]] = [{"name": name} for name in self.systems]
        comparison: dict[str, Any] = {}
        for score in SCORES:
            draws = resampled_rates(
                np.array([row.errors(score) for row in self.rows]).T,
                [row.length(score) for row in self.rows],
                self.resamples,
                self.seed,
            )
            rates = self._rates(self.rows, score)
            for system, rate, drawn in zip(systems, rates, draws, strict=True):
                system |= {score: rate, f"{score}_interval": interval(drawn)}
            if len(systems) == 2:
                first, second = draws
                comparison[score] = {
                    "difference": rates[1] - rates[0],
                    "interval": interval(second - first),
                    "better": share_better(first, second),
                }
        for index, system in enumerate(systems):
            system |= self._kinds(index)
        content["systems"] = systems
        if comparison:
            errors = [row.errors(self.metric) for row in self.rows]
            comparison["rows"] = {
                "better": sum(second < first for first, second in errors),
                "worse": sum(second > first for first, second in errors),
                "equal": sum(second == first for first, second in errors),
            }
            content["comparison"] = comparison
        content["groups"] = {
            name: [
                {
                    "value": value,
                    "rows": len(rows),
                    SCORES[self.metric]: sum(row.length(self.metric) for row in rows),
                    self.metric: self._rates(rows, self.metric),
                }
                for value, rows in groups.items()
            ]
            for name, groups in self._groups().items()
        }
        content["edits"] = [self._edits(index) for index in range(len(self.systems))]
        worst = sorted(self.rows, key=lambda row: -sum(row.errors(self.metric)))
        content["worst"] = [row.row() for row in worst[:_SAVED] if any(row.errors(self.metric))]
        return content

    def _rates(self, rows: Iterable[Scored], score: str) -> list[float]:
        found = list(rows)
        length = max(1, sum(row.length(score) for row in found))
        counts = np.array([row.errors(score) for row in found])  # [rows, systems]
        return [float(count) / length for count in counts.sum(0)]

    def _all_edits(self, index: int) -> Counter[tuple[str, str]]:
        """The errors of a system, in the units of the metric."""
        return Counter(
            edit for row in self.rows for edit in row.alignments[self.metric][index].edits
        )

    def _kinds(self, index: int) -> dict[str, int]:
        counts = self._all_edits(index)
        kinds = {"substitutions": 0, "deletions": 0, "insertions": 0}
        for (said, heard), count in counts.items():
            kinds["insertions" if not said else "substitutions" if heard else "deletions"] += count
        return kinds

    def _edits(self, index: int) -> list[dict[str, Any]]:
        return [
            {"said": said, "heard": heard, "count": count}
            for (said, heard), count in self._all_edits(index).most_common(_SAVED)
        ]

    def _groups(self) -> dict[str, dict[str, list[Scored]]]:
        """Rows by duration, from short to long, and by the column, the most frequent first."""
        found: dict[str, dict[str, list[Scored]]] = {"duration": {}}
        bounds = (0.0, *_DURATIONS)
        for low, high in zip(bounds, (*_DURATIONS, np.inf), strict=True):
            rows = [row for row in self.rows if low <= row.seconds < high]
            name = f"{low:g} to {high:g} s" if high < np.inf else f"from {low:g} s"
            found["duration"] |= {name: rows} if rows else {}
        if self.by is not None:
            groups: dict[str, list[Scored]] = {}
            for row in self.rows:
                groups.setdefault(row.group, []).append(row)
            found[self.by] = dict(sorted(groups.items(), key=lambda item: -len(item[1])))
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `evaluation.json`, the summary, and `utterances.jsonl`, a line for each row.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = make_folder(folder)
        write_json(path / SUMMARY_FILE, self.summary())
        lines = [json.dumps(row.row(), ensure_ascii=False) + "\n" for row in self.rows]
        write_text(path / UTTERANCES_FILE, "".join(lines))

    def __str__(self) -> str:
        return _text(self.summary())


def evaluate(
    data: str | os.PathLike[str] | Inputs,
    model: str | os.PathLike[str] = "demo",
    against: str | os.PathLike[str] | None = None,
    *,
    normalise: str = AUTO,
    by: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    flow: Flow | None = None,
    watch: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Score a model on transcribed recordings, or compare two on the same rows.

    Args:
        data: data set with transcripts, or other input of a job whose rows have them.
        model: "demo", a folder or a hub id; or the folder of a job of `transcribe`, whose results
            are scored as they are.
        against: another one.
        normalise: what does not count: "none", "case", "punctuation", "case,punctuation", or
            "auto": what references have and no hypothesis of a system has, or the reverse.
        by: column of the data to tell scores apart by, such as the speaker.
        resamples: draws of the bootstrap.
        seed: of them.
        flow: how recordings are read and batched.
        watch: is told a model's name, how many rows it has done, and of how many.
        **options: of `Transcribe`, for models: device, dtype, beam, lm, ...

    Raises:
        OSError: data, a model or a folder cannot be found.
        ValueError: nothing can be scored, or an argument is impossible.
        TypeError: an option is unknown.
        ImportError: a package of the extra `evaluate` is missing.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    names = [os.fspath(name) for name in (model, against) if name is not None]
    chosen(normalise, ())
    options = {k: v for k, v in options.items() if v != getattr(Transcribe, k, ...)}
    if options and all(map(is_results, names)):
        raise ValueError(f"{', '.join(options)}: no effect on results, which are as they are")
    inputs = data if isinstance(data, Inputs) else open_inputs([os.fspath(data)])
    wanted = references(inputs, by)
    found: list[list[Outcome]] = []
    for name in names:
        if is_results(name):
            found.append(of_results(name, wanted))
            continue

        def told(done: int, name: str = name) -> None:
            if watch is not None:
                watch(name, done, len(wanted))

        runner = Transcriber(name, flow=flow, **options)
        found.append(of_runner(runner, inputs, len(wanted), told))
    left_out: list[tuple[str, str]] = []
    kept: list[int] = []
    for index, (row, outcomes) in enumerate(zip(wanted, zip(*found, strict=True), strict=True)):
        problems = [row.problem, *(outcome.error for outcome in outcomes)]
        problem = next((problem for problem in problems if problem is not None), None)
        if problem is None:
            kept.append(index)
        else:
            left_out.append((row.id, problem))
    if not kept:
        raise ValueError(f"no row can be scored: {left_out[0][0]}: {left_out[0][1]}")
    said = [wanted[i].text or "" for i in kept]
    heard = [[outcomes[i].text or "" for i in kept] for outcomes in found]
    normalisation = chosen(normalise, (said, *heard))
    said = [normalisation(text) for text in said]
    heard = [[normalisation(text) for text in texts] for texts in heard]
    alignments = {
        score: list(
            zip(*(align(list(zip(said, t, strict=True)), score) for t in heard), strict=True)
        )
        for score in SCORES
    }
    rows = tuple(
        Scored(
            wanted[i].id,
            next((o[i].seconds or 0.0 for o in found if o[i].seconds), 0.0),
            wanted[i].group,
            said[place],
            tuple(texts[place] for texts in heard),
            {score: found_here[place] for score, found_here in alignments.items()},
            wanted[i].audio,
            wanted[i].offset,
            next((outcomes[i].words for outcomes in found if outcomes[i].words), ()),
        )
        for place, i in enumerate(kept)
    )
    metric = "wer" if separates_words(said) else "cer"
    return Evaluation(
        tuple(names), rows, tuple(left_out), normalisation, metric, by, resamples, seed
    )


def _text(summary: dict[str, Any]) -> str:
    """A summary for people to read."""
    metric = summary["metric"]
    unit = SCORES[metric]
    systems = summary["systems"]
    count = summary["rows"] + len(summary["left_out"])
    lines = [
        f"{summary['rows']} of {how_many(count)}, {summary['seconds'] / 60:.1f} min, "
        f"{how_many(summary['words'], 'word')}, {how_many(summary['characters'], 'character')}",
        f"texts are compared in: {summary['normalisation']}",
        "",
    ]
    table = [["% (95 % interval)", "WER", "CER", *("substituted", "deleted", "inserted")]]
    table += [
        [
            system["name"],
            *(_percent(system[score], system[f"{score}_interval"]) for score in SCORES),
            *(str(system[k]) for k in ("substitutions", "deletions", "insertions")),
        ]
        for system in systems
    ]
    compared = summary.get("comparison")
    if compared:
        differences = [
            _percent(compared[score]["difference"], compared[score]["interval"], "+")
            for score in SCORES
        ]
        table.append(["difference", *differences])
    lines += _columns(table)
    if compared:
        rows = compared["rows"]
        share = 100 * compared[metric]["better"]
        lines.append(
            f"{systems[1]['name']} has the lower {metric.upper()} in {share:.1f} % of "
            f"{summary['resamples']} draws; it is better in {how_many(rows['better'])}, worse in "
            f"{rows['worse']}, equal in {rows['equal']}"
        )
    for name, groups in summary["groups"].items():
        table = [[f"{metric.upper()}, %, by {name}", "rows", unit, *(s["name"] for s in systems)]]
        table += [
            [g["value"], str(g["rows"]), str(g[unit]), *(f"{100 * r:.2f}" for r in g[metric])]
            for g in groups[:_GROUPS]
        ]
        lines += ["", *_columns(table)]
        lines += [f"and {len(groups) - _GROUPS} more"] * (len(groups) > _GROUPS)
    for system, edits in zip(systems, summary["edits"], strict=True):
        if edits:
            lines += ["", f"most frequent errors of {system['name']}:"]
        for edit in edits[:_LISTED]:
            said, heard = repr(edit["said"]), repr(edit["heard"])
            change = f"{said} is heard as {heard}" if edit["heard"] else f"{said} is lost"
            lines.append(f"{edit['count']:6}  {change if edit['said'] else f'{heard} is added'}")
    if summary["worst"]:
        lines += ["", "rows with most errors:"]
    for row in summary["worst"][:_LISTED]:
        errors = " and ".join(map(str, row[f"{metric}_errors"]))
        lines.append(f"  {row['id']}: {errors} errors in {row[unit]} {unit}")
        for what, text in (("said", row["reference"]), *(("heard", t) for t in row["hypotheses"])):
            lines.append(f"    {what:6}{textwrap.shorten(text, 400, placeholder=' ...')}")
    if summary["left_out"]:
        lines += ["", "left out:"]
        lines += [f"  {row['row']}: {row['reason']}" for row in summary["left_out"][:_LISTED]]
        if len(summary["left_out"]) > _LISTED:
            lines.append(f"  and {len(summary['left_out']) - _LISTED} more")
    return "\n".join(lines)


def _percent(rate: float, bounds: Sequence[float], sign: str = "") -> str:
    low, high = bounds
    return f"{100 * rate:{sign}.2f} ({100 * low:{sign}.2f} to {100 * high:{sign}.2f})"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their cells below each other."""
    count = max(map(len, rows))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(count)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
