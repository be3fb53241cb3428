"""What a job costs beside its model: wall time of a job over features and model alone.

python -m bench.studies.offline [--model demo] [--layers N] [--rows 2208] [--pairs 5]
                                [--out FILE] AUDIO...

Every pair is two fresh processes on the same recordings, repeated to `--rows`. One runs the job:
manifest, decoding, batches, model, texts, shards, journal. The other has the samples in memory
already and runs features and model on the batches of the job. Both meet every batch for the first
time, since oneDNN prepares itself for each new number of frames. The process that begins changes
from pair to pair. Loading the model is not counted. docs/use/offline.md uses the numbers.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import write_results
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.inference import Flow, Transcriber
from w2vbert_fast.inference.jobs.job import Job
from w2vbert_fast.inference.pipeline import DEMO_FOLDER
from w2vbert_fast.inference.tasks.base import Piece
from w2vbert_fast.processing import Wav2Vec2BertProcessor
from w2vbert_fast.recordings.inputs import open_inputs

WARM_UP_SECONDS = 10


def real_width(folder: Path, layers: int) -> str:
    """A CTC model of the published width with random weights, and the demo's tokenizer."""
    processor = Wav2Vec2BertProcessor.from_pretrained(DEMO_FOLDER)
    config = Wav2Vec2BertConfig(
        num_hidden_layers=layers,
        vocab_size=len(processor.tokenizer),
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Wav2Vec2BertForCTC(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def loaded(model: str, threads: int) -> Transcriber:
    """A transcriber whose model has run once, on noise."""
    torch.set_num_threads(threads)
    transcriber = Transcriber(model, flow=Flow())
    noise = 0.1 * torch.randn(WARM_UP_SECONDS * transcriber.task.extractor.sampling_rate)
    transcriber.task.run([Piece(noise)] * 2)
    return transcriber


def run_job(transcriber: Transcriber, manifest: str) -> dict[str, float]:
    """Seconds of a job from its first line to its summary."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        job = Job(transcriber, open_inputs([manifest]), Path(folder) / "out", stream=io.StringIO())
        content = job.run().content
        seconds = time.perf_counter() - start
    run = content["this_run"]
    return {
        "rows": content["good"],
        "seconds": seconds,
        "model_seconds": run["model_seconds"],
        "waiting_for_audio_seconds": run["waiting_for_audio_seconds"],
    }


def run_model(transcriber: Transcriber, manifest: str) -> dict[str, float]:
    """Seconds that features and model take for the same batches, whose samples are in memory."""
    batches: list[list[Piece]] = []
    task = transcriber.task
    compute = task.run

    def remember(pieces: Any) -> list[Any]:
        batches.append(list(pieces))
        return [[] for _ in pieces]

    task.run = remember  # type: ignore[method-assign]
    rows = 0
    for window in transcriber.windows(open_inputs([manifest]).rows()):
        rows += sum(result.error is None for result in transcriber.batcher.run(window))
    start = time.perf_counter()
    for batch in batches:
        compute(batch)
    return {"rows": rows, "seconds": time.perf_counter() - start, "batches": len(batches)}


def pairs(
    model: str, paths: list[Path], rows: int, count: int, threads: int, first: int
) -> dict[str, Any]:
    """Job and model in turns, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {"job": [], "model": []}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "rows.jsonl"
        repeated = itertools.islice(itertools.cycle(paths), rows)
        lines = [json.dumps({"audio_filepath": str(path.resolve())}) + "\n" for path in repeated]
        manifest.write_text("".join(lines))
        for pair in range(count):
            for kind in ("job", "model") if (first + pair) % 2 == 0 else ("model", "job"):
                command = [sys.executable, "-m", "bench.studies.offline", "--child", kind]
                command += ["--model", model, "--threads", str(threads), str(manifest)]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[kind].append(json.loads(answer.stdout.splitlines()[-1]))
            job, alone = found["job"][-1], found["model"][-1]
            assert job["rows"] == alone["rows"] == rows
            ratio = job["seconds"] / alone["seconds"]
            print(
                f"job {job['seconds']:.2f} s (model {job['model_seconds']:.2f}, waiting for audio "
                f"{job['waiting_for_audio_seconds']:.2f}), alone {alone['seconds']:.2f} s, "
                f"ratio {ratio:.3f}",
                flush=True,
            )
            ratios.append(ratio)
    return {"median_ratio": statistics.median(ratios), "ratios": ratios, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("audio", nargs="+", type=Path, help="recordings, or folders of them")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layers", type=int, help="of a random model of the published width")
    parser.add_argument("--rows", type=int, default=2208)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="1: the model alone begins")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    parser.add_argument("--child", choices=("job", "model"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run = run_job if arguments.child == "job" else run_model
        print(json.dumps(run(loaded(arguments.model, arguments.threads), str(arguments.audio[0]))))
        return
    names = [str(path) for path in arguments.audio]
    paths = [Path(row.audio) for row in open_inputs(names).rows()]
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if arguments.layers is not None:
            model = real_width(Path(folder), arguments.layers)
        counts = arguments.rows, arguments.pairs, arguments.threads, arguments.first
        result = pairs(model, paths, *counts)
    print(f"median of {arguments.pairs} ratios: {result['median_ratio']:.3f}")
    if arguments.out is not None:
        write_results(arguments.out, **{**vars(arguments), **result})


if __name__ == "__main__":
    main()
