"""The command `w2vbert-fast align`: when the words of a transcript are said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from w2vbert_fast.cli import jobs, transcribe
from w2vbert_fast.cli.options import argument, option, values
from w2vbert_fast.inference.jobs.formats import BESIDE, listed

if TYPE_CHECKING:
    from w2vbert_fast.recordings.inputs import Inputs as Surveyed

SHORT = "Find when the words of a transcript are said."
HELP = (
    "Find when the words of a transcript are said: of a recording and a text file, or of data sets "
    "with transcripts. Capitals, digits, marks and characters that the model lacks stay in the "
    "text. Speech that the transcript lacks (unwritten) and words that are probably not said "
    "(unsaid, by their places from 0) are reported.\n\n"
    f"Prints a JSON object for each recording; with --format {listed([*BESIDE], 'or')} writes a "
    "file beside the recording, or to --out FILE. With --out DIR it is a job. " + jobs.HELP
)


@dataclass(kw_only=True)
class Inputs(jobs.Inputs):
    """A recording and its transcript, or data sets that have both."""

    inputs: list[str] = argument(
        "A recording and its transcript, a UTF-8 text file whose name ends with .txt; or data "
        "sets with transcripts (docs/use/datasets.md).",
        metavar="AUDIO TRANSCRIPT | DATA...",
    )

    def open(self, *, say: bool = True) -> Surveyed:
        from w2vbert_fast.recordings.inputs import Files, Folder, open_transcribed

        if not any(name.lower().endswith(".txt") for name in self.inputs):
            found = super().open(say=say)
            if all(isinstance(part, Files | Folder) for part in found.parts):
                raise ValueError(
                    "there is no transcript: align AUDIO TRANSCRIPT, a text file whose name ends "
                    "with .txt, or data sets with transcripts"
                )
            return found
        if len(self.inputs) != 2:
            raise ValueError("a transcript goes with one recording: align AUDIO TRANSCRIPT")
        return open_transcribed(*self.inputs)


@dataclass(kw_only=True)
class Times:
    timestamps: str = option("word", "Of what there are times.", metavar="word|character")


def command(
    source: Inputs,
    model: transcribe.Model,
    target: transcribe.Target,
    sound: jobs.Sound,
    times: Times,
    subtitles: transcribe.Subtitles,
    chunks: jobs.Chunks,
    job: jobs.Job,
) -> int:
    """Run a job, or align and print; the exit status."""
    task = {**values(model, chunks, times), **sound.of_task()}
    as_json = not (job.formats or target.out)
    return transcribe.perform("align", source, task, target, subtitles, job, as_json=as_json)
