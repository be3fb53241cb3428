"""The command `w2vbert-fast classify`: a job that writes classes."""

from __future__ import annotations

from w2vbert_fast.cli import jobs
from w2vbert_fast.cli.options import values

SHORT = "Write classes of recordings."
HELP = (
    "Write the class of every recording, the classes of its frames, or its x-vector, as the "
    f"model's head has it.\n\n{jobs.HELP}"
)


def command(
    source: jobs.Inputs,
    model: jobs.Model,
    target: jobs.Out,
    sound: jobs.Sound,
    chunks: jobs.Chunks,
    job: jobs.Job,
) -> int:
    """Run the job; the exit status."""
    task = {**values(model, chunks), **sound.of_task()}
    return jobs.run_job("classify", source, target.out, task, job)
