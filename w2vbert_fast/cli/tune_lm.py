"""The command `w2vbert-fast tune-lm`: weights of a language model by transcribed recordings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from w2vbert_fast.cli import jobs, transcribe
from w2vbert_fast.cli.evaluate import Computing, Data
from w2vbert_fast.cli.messages import ITEMS_FAILED, log_shown, one_line, report, write_line
from w2vbert_fast.cli.options import REQUIRED, option, values
from w2vbert_fast.recordings.rows import how_many

if TYPE_CHECKING:
    from w2vbert_fast.evaluation.tuning import Trial, Tuned

SHORT = "Find weights of a language model on transcribed recordings."
HELP = (
    "Find the weight of a language model and the word bonus with the lowest error rate on "
    "transcribed recordings, on which neither the model nor the language model was trained.\n\n"
    "DATA is a data set as finetune takes it. The language model is that of --lm, or the one in "
    "the model's language_model/. Some forty pairs are tried. What is printed last are the options "
    "to transcribe with."
)


@dataclass(kw_only=True)
class Tuning:
    model: str = option(REQUIRED, "The model.", metavar="PATH|HUB_ID")
    normalise: str = option("auto", "What does not count, as for evaluate.", metavar="NAMES")


@dataclass(kw_only=True)
class Search(transcribe.Search):
    beam: int = option(100, "Hypotheses of the beam search.")


@dataclass(kw_only=True)
class Printing:
    as_json: bool = option(False, "Print the result as JSON.", "--json")


def command(
    data: Data,
    tuning: Tuning,
    printing: Printing,
    computing: Computing,
    search: Search,
    sound: jobs.Sound,
    chunks: jobs.Chunks,
    reading: jobs.Reading,
) -> int:
    """Tune, and print what was found; the exit status."""
    from w2vbert_fast.evaluation import tune_lm
    from w2vbert_fast.inference.runner import Flow

    with log_shown("w2vbert_fast.inference"):
        found = tune_lm(
            data.open(),
            **values(tuning),
            flow=Flow(**reading.flow(probe=False)),
            watch=_show,
            **{**values(computing, chunks), **sound.of_task(), **search.of_task()},
        )
    if printing.as_json:
        write_line(json.dumps(asdict(found), ensure_ascii=False))
    else:
        _print(found)
    for name, reason in found.left_out:
        report(f"{one_line(name)} is left out: {one_line(reason)}")
    return ITEMS_FAILED if found.left_out else 0


def _show(trial: Trial) -> None:
    weight, bonus = trial.weights
    report(f"weight {weight:g}, word bonus {bonus:g}: {100 * trial.rate:.2f} %")


def _print(found: Tuned) -> None:
    low, high = found.interval
    for line in (
        f"{found.metric.upper()} of {how_many(found.rows)}, texts in {found.normalisation}",
        f"{100 * found.greedy:.2f} % without a beam search",
        f"{100 * found.start.rate:.2f} % with weight {found.start.weights.lm_weight:g} and word "
        f"bonus {found.start.weights.word_bonus:g}",
        f"{100 * found.best.rate:.2f} % ({100 * low:.2f} to {100 * high:.2f}) with the best of "
        f"{len(found.trials)} pairs, lower in {100 * found.better:.0f} % of draws",
        f"--lm-weight {found.best.weights.lm_weight:g} "
        f"--word-bonus {found.best.weights.word_bonus:g}",
    ):
        write_line(line)
