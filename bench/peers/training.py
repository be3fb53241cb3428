"""Candidates for a training step: this library, and transformers in each of its configurations.

A pass over the workload is the forward and backward pass of every batch, gradients added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import training
from bench.flops import reference_bytes
from bench.machine import DTYPES
from bench.measure import Candidate, Prepared
from bench.peers.context import Context, gather
from bench.peers.pytorch import compile_layers
from bench.workloads import batches, padded

BATCHINGS = ("one by one", "padded batch")
REFERENCE_LABEL = "transformers, sdpa"
CONFIGURATIONS = (("sdpa", ""), ("eager", ""), ("sdpa", "compiled"), ("eager", "compiled"))


def candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """Ours, then transformers', for a workload of training."""
    modes = [(dtype, mode) for dtype in dtypes for mode in training.MODES[dtype]]
    for dtype, mode in modes:
        build = partial(_ours, context, dtype, mode)
        yield Candidate("w2vbert_fast", mode, dtype, build, memory=True)
    several = len(context.features) > 1
    for dtype, mode in modes:
        for attention, compiled in CONFIGURATIONS:
            for batching in BATCHINGS if several else BATCHINGS[:1]:
                if batching == "padded batch" and (attention, compiled) != ("sdpa", ""):
                    continue  # five times the work: never the best, and one row shows it
                parts = (attention, compiled, batching if several else "", mode)
                yield Candidate(
                    "transformers",
                    ", ".join(part for part in parts if part),
                    dtype,
                    partial(_transformers, context, dtype, mode, attention, compiled, batching),
                    bytes_needed=_needed(context, dtype, batching),
                    # Memory is for one long utterance.
                    memory=not several,
                )


def _needed(context: Context, dtype: str, batching: str) -> int:
    """What every layer keeps for its backward pass: position vectors and maps of the attention, and
    some 30 values a token and channel."""
    lengths = [f.shape[0] for f in context.features]
    config, size = context.our_config(), DTYPES[dtype].itemsize
    sizes = []
    for rows in batches(context.features, batching):
        kept = reference_bytes(config, [lengths[i] for i in rows], size)
        tokens = len(rows) * max(lengths[i] for i in rows)
        sizes.append(context.layers * (kept + 30 * size * tokens * config.hidden_size))
    return max(sizes)


def _ours(context: Context, dtype: str, mode: str) -> Prepared:
    import w2vbert_fast

    config = w2vbert_fast.Wav2Vec2BertConfig(**training.config_values(context))
    with torch.device("meta"):
        model = w2vbert_fast.Wav2Vec2BertForCTC(config)
    stored = training.weights_dtype(dtype, mode)
    model.load_state_dict(training.weights(context, stored), assign=True)
    model.train().use_fast_kernels = True
    return _prepared(context, model, dtype, mode, [list(range(len(context.features)))])


def _transformers(
    context: Context, dtype: str, mode: str, attention: str, compiled: str, batching: str
) -> Prepared:
    model = training.reference(context, training.weights_dtype(dtype, mode), attention)
    prepared = _prepared(context, model, dtype, mode, batches(context.features, batching))
    if compiled:
        layers = model.wav2vec2_bert.encoder.layers
        restore = compile_layers(layers, compiled, len(context.features) == 1)
        try:
            # A layer whose weights have gradients already is compiled once more.
            prepared.run()
            prepared.run()
        finally:
            restore()
        prepared.reset()
    return prepared


def _prepared(
    context: Context, model: nn.Module, dtype: str, mode: str, groups: list[list[int]]
) -> Prepared:
    stored = training.weights_dtype(dtype, mode)
    lengths = [f.shape[0] for f in context.features]
    targets = training.labels(context)
    inputs: list[tuple[dict[str, Any], Tensor]] = []
    for rows in groups:
        x, mask = padded([context.features[i] for i in rows])
        batch = {
            "input_features": x.to(context.device, DTYPES[stored]),
            "attention_mask": None if mask is None else mask.to(context.device),
        }
        wanted = training.padded_labels([targets[i] for i in rows]).to(context.device)
        inputs.append((batch, wanted))
    autocast: Callable[[], Any] = partial(
        torch.autocast, context.device.type, torch.bfloat16, enabled=mode == "autocast"
    )

    def run() -> list[Tensor]:
        logits = []
        with training.recording():
            for batch, wanted in inputs:
                with autocast():
                    output = model(**batch).logits
                training.loss(output, wanted).backward()
                logits.append(output.detach())
        return logits

    def collect(logits: list[Tensor]) -> list[training.Errors]:
        errors = training.truth(context, stored).errors(gather(groups, lengths, logits), model)
        model.zero_grad()
        return [errors]

    return Prepared(run, collect, parameters=tuple(model.parameters()), reset=model.zero_grad)
