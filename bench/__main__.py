"""`python -m bench`: this library against its peers, on this machine: docs/inside/measuring.md."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench import machine, targets
from bench.context import limit_threads
from bench.peers.pytorch import quiet
from bench.rows import SCHEMA, Row, parse, read_json
from bench.workloads import DEFAULT, REPOSITORY, WORKLOADS

PEERS = (
    "transformers", "ctranslate2", "onnxruntime", "openvino", "kaldi-native-fbank",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--workload", action="append", choices=tuple(WORKLOADS), help="repeat for several"
    )
    p.add_argument("--peer", dest="peers", action="append", choices=(*PEERS, "none"),
                   help="repeat for several")  # fmt: skip
    p.add_argument("--match", default="", help='of the peers, only labels with this, as "sdpa, c"')
    p.add_argument("--without", action="append", default=[], metavar="TEXT",
                   help="of the peers, no labels with this; repeat for several")  # fmt: skip
    p.add_argument("--dtype", dest="dtypes", action="append", choices=("fp32", "bf16", "int8"))
    p.add_argument("--rounds", type=int, default=5, help="rounds at most (5)")
    p.add_argument("--budget", type=float, default=4.0, help="seconds of timing a candidate (4)")
    p.add_argument("--layers", type=int, help="encoder layers (2 or 4 on a CPU, 24 on a GPU)")
    p.add_argument("--threads", type=int, default=machine.cores(), help="CPU threads (all cores)")
    p.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    p.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    p.add_argument(
        "--check", action="store_true", help="print the targets; exit 1 if one is missed"
    )
    p.add_argument("--from", dest="source", type=Path, action="append", metavar="FILE",
                   help="with --check: judge these results instead of measuring")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a candidate disagreed or, with --check, a target was missed; 2 for misuse."""
    arguments = parser().parse_args(argv)
    if arguments.rounds < 1 or arguments.threads < 1 or (arguments.layers or 1) < 1:
        print("--rounds, --threads and --layers must be at least 1", file=sys.stderr)
        return 2
    if arguments.source:
        if not arguments.check:
            print("--from needs --check", file=sys.stderr)
            return 2
        try:
            files = [parse(read_json(path), str(path)) for path in arguments.source]
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return _check(targets.evaluate([row for file in files for row in file.rows]))
    quiet()
    limit_threads(arguments.threads)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no CUDA device, nothing was measured", file=sys.stderr)
        return 2
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    import torch

    from bench.runner import LAYERED, Settings, run_workload
    from bench.workloads import speech

    device = torch.device(arguments.device)
    started = time.perf_counter()
    settings = Settings(
        **{f.name: getattr(arguments, f.name) for f in fields(Settings) if f.name in arguments},
        pause=0.25 if arguments.device == "cpu" else 0.0,
    )
    for dtype in machine.DTYPES:
        if settings.dtypes is None or dtype in settings.dtypes or "int8" in settings.dtypes:
            settings.gemms[dtype] = machine.best_gemm(dtype, device)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.commit(REPOSITORY),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": arguments.device,
        "threads": settings.threads,
        "layers": arguments.layers or (24 if arguments.device == "cuda" else 4),
        "audio": speech((1.0,))[1],
        "gemm_rate": {dtype: gemm.rate for dtype, gemm in settings.gemms.items()},
        "gemm": {dtype: gemm.name for dtype, gemm in settings.gemms.items()},
        "packed_gemm_rate": {d: machine.packed_gemm_rate(d, device) for d in settings.gemms},
    }
    _print_header(result)
    names = arguments.workload or list(DEFAULT)
    measured: list[Row] = []
    disagreements = []
    with tempfile.TemporaryDirectory(prefix="w2vbert-bench-") as folder:
        for name in names:
            workload = WORKLOADS[name]
            layers = workload.depth(arguments.device, arguments.layers)
            depth = f", {layers} layers" if workload.kind in LAYERED else ""
            print(f"\n{name} ({workload.kind}{depth}, {workload.audio_seconds:.0f} s of audio)")
            # Exports are kept for the workloads that use the same model.
            settings.folder = Path(folder)
            rows, wrong = run_workload(workload, settings, print_row)
            measured += rows
            disagreements += wrong
            # After each one, so that a run that is cut leaves what it had.
            result["rows"] = [asdict(row) for row in measured]
            result["targets"] = targets.evaluate(
                measured, counted=arguments.check and name == names[-1]
            )
            result["wall_seconds"] = round(time.perf_counter() - started, 1)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if arguments.out is not None:
        print(f"\nwritten: {arguments.out}")
    print(f"{result['wall_seconds']:.0f} s in all")
    status = _check(result["targets"]) if arguments.check else 0
    for wrong in disagreements:
        print(
            f"DISAGREES, not reported: {wrong.label}: error {wrong.error:.2e}, "
            f"at most {wrong.limit:.2e} counts",
            file=sys.stderr,
        )
    return 1 if disagreements else status


def _print_header(result: dict[str, Any]) -> None:
    where = result["machine"]
    print(f"{where['gpu'] if result['device'] == 'cuda' else where['cpu']}, "
          f"{result['threads']} threads, commit {result['commit']}")  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    for dtype, rate in result["gemm_rate"].items():
        line = f"best GEMM, {dtype}: {rate / 1e9:.0f} GFLOP/s ({result['gemm'][dtype]})"
        packed = result["packed_gemm_rate"][dtype]
        print(line if packed is None else f"{line}; with a packed weight {packed / 1e9:.0f}")


def print_row(row: Row) -> None:
    """One line of the table."""
    line = f"  {row.dtype:<5} {row.name:<52}"
    if row.seconds is None:
        print(f"{line} - {row.skipped}", flush=True)
        return
    median, low, high = (seconds * 1e3 for seconds in row.times)
    line += f" {median:9.1f} ms [{low:.1f}, {high:.1f}] x{row.seconds['rounds']}"
    line += f"  {row.speed[0]:7.1f} s/s"
    if row.share_of_gemm is not None and row.flops is not None:
        line += f"  {row.flops / median / 1e6:6.0f} GFLOP/s ({row.share_of_gemm:.2f} of GEMM)"
    if row.peak_bytes_above_weights is not None:
        line += f"  peak {row.peak_bytes_above_weights / 1e9:.2f} GB"
    if row.error is not None:
        line += f"  error {row.error:.1e}"
    print(line, flush=True)


def _check(evaluated: list[dict[str, Any]]) -> int:
    print("\n" + targets.render(evaluated))
    return 1 if any(entry["reached"] is False for entry in evaluated) else 0


if __name__ == "__main__":
    sys.exit(main())
