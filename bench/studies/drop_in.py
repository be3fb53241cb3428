"""How fast transformers' encoder is once `accelerate` has had it, on a CPU.

python -m bench.studies.drop_in [--width 192] [--seconds 0.5] [--layers 4] [--rounds 7]
                                [--dtype bf16] [--out FILE]

The same random weights and features of an encoder, as wide as the published one unless told
otherwise, in four forms: transformers with eager and with SDPA attention, transformers accelerated,
and this package's own model with its fast kernels. The forms take turns, with an untimed call
before each timed one. docs/use/transformers.md has the numbers.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import w2vbert_fast
from bench.machine import DTYPES, write_results
from bench.measure import Candidate, Prepared, Timing, interleave, relative_error
from w2vbert_fast.integrations.transformers import accelerate

SECONDS = (10.0, 30.0)
WIDTH = 1024
FRAMES_PER_SECOND = 50
LIMITS = {"fp32": 1e-5, "bf16": 3e-2}
"""Largest relative error against transformers (eager) in the same dtype."""


def shape(layers: int, width: int) -> dict[str, int]:
    """Settings of a configuration with heads of 64 channels, as the published one has."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "output_hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 64),
    }


def forms(layers: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The models by name, all with the same weights, in evaluation mode."""
    import transformers

    config = transformers.Wav2Vec2BertConfig(**shape(layers, width))
    torch.manual_seed(0)
    eager = transformers.Wav2Vec2BertModel._from_config(config, attn_implementation="eager")
    eager = eager.to(dtype).eval()
    made: dict[str, Any] = {"transformers, eager": eager}
    try:
        sdpa = transformers.Wav2Vec2BertModel._from_config(
            copy.deepcopy(config), attn_implementation="sdpa"
        )
        sdpa.load_state_dict(eager.state_dict())
        made["transformers, sdpa"] = sdpa.to(dtype).eval()
    except ValueError as error:  # what transformers says where a model has no such attention
        print(f"transformers, sdpa: {str(error).splitlines()[0]}")
    made["transformers, accelerated"] = accelerate(copy.deepcopy(eager))
    own_config = w2vbert_fast.Wav2Vec2BertConfig.from_dict(shape(layers, width))
    ours = w2vbert_fast.Wav2Vec2BertModel(own_config)
    ours.load_state_dict(eager.state_dict())
    ours = ours.to(dtype).eval()
    ours.use_fast_kernels = True
    made["w2vbert_fast"] = ours
    return made


def measure(models: dict[str, Any], x: Tensor, rounds: int, limit: float) -> dict[str, list[float]]:
    """Seconds of each round of each form; every form's answer is checked first."""
    expected = models["transformers, eager"](x).last_hidden_state
    timings = []
    for name, model in models.items():
        error = relative_error([model(x).last_hidden_state], [expected])
        if not error <= limit:
            raise SystemExit(f"{name} differs from transformers by {error:.1e}")
        prepared = Prepared(partial(model, x), list)
        candidate = Candidate(name, "", "", lambda prepared=prepared: prepared)
        timings.append(Timing(candidate, prepared))
    interleave(timings, {}, x.device, rounds=rounds, budget=math.inf, pause=0.0, warm=True)
    return {timing.candidate.implementation: timing.seconds for timing in timings}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 64, or below it")
    parser.add_argument("--seconds", type=float, action="append", help=f"default: {SECONDS}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    rows = []
    for dtype_name in arguments.dtype or DTYPES:
        dtype = DTYPES[dtype_name]
        models = forms(arguments.layers, arguments.width, dtype)
        for seconds in arguments.seconds or SECONDS:
            x = torch.randn(1, max(1, round(seconds * FRAMES_PER_SECOND)), 160).to(dtype)
            times = measure(models, x, arguments.rounds, LIMITS[dtype_name])
            medians = {name: statistics.median(found) for name, found in times.items()}
            plain = ("transformers, eager", "transformers, sdpa")
            best = min(median for name, median in medians.items() if name in plain)
            for name, median in medians.items():
                print(
                    f"{dtype_name} 1 x {seconds:g} s  {name:26} {1e3 * median:8.1f} ms"
                    f"  {best / median:5.2f} x transformers"
                )
                row = {"dtype": dtype_name, "seconds_of_audio": seconds, "form": name}
                rows.append({**row, "median": median, "rounds": times[name]})
    if arguments.out is not None:
        write_results(arguments.out, layers=arguments.layers, width=arguments.width, rows=rows)


if __name__ == "__main__":
    main()
