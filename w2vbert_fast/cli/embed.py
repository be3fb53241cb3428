"""The command `w2vbert-fast embed`: a job that writes hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from w2vbert_fast.cli import jobs
from w2vbert_fast.cli.options import option, values

SHORT = "Write hidden states of recordings."
HELP = f"Write the hidden states of a layer for every recording.\n\n{jobs.HELP}"


@dataclass(kw_only=True)
class Embedding:
    layer: int = option(-1, "Index into hidden_states; -1: the last.")
    stats: str | None = option(None, "Mean and variance to normalise with.", metavar="FILE")
    pool: str = option("none", "Over frames.", metavar="mean|none")
    embedding_dtype: str = option("float32", "Of what is written.", metavar="float32|float16")


def command(
    source: jobs.Inputs,
    model: jobs.Model,
    target: jobs.Out,
    embedding: Embedding,
    sound: jobs.Sound,
    chunks: jobs.Chunks,
    job: jobs.Job,
) -> int:
    """Run the job; the exit status."""
    task = {**values(model, embedding, chunks), **sound.of_task()}
    return jobs.run_job("embed", source, target.out, task, job)
