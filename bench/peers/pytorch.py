"""Candidates that run in PyTorch: this library, and transformers in each of its configurations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.context import Context, gather
from bench.flops import reference_bytes
from bench.machine import DTYPES
from bench.measure import Candidate, Prepared, Unavailable, joined
from bench.workloads import BATCHINGS, batches

PACKED = "packed weights"
"""Our configuration after `model.pack_weights()`."""


def encoder_candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """Ours, then transformers', for an encoder workload."""
    for dtype in dtypes:
        yield Candidate(
            "w2vbert_fast", "", dtype, partial(_ours, context, dtype), memory=dtype != "int8"
        )
        if context.device.type == "cpu" and context.workload.audio_seconds <= 60:
            build = partial(_ours, context, dtype, packed=True)
            yield Candidate("w2vbert_fast", PACKED, dtype, build)
    for dtype in dtypes:
        if dtype == "int8":
            continue
        for attention, compiled, batching in in_batches(context, _configurations(context)):
            several = len(context.features) > 1
            yield Candidate(
                "transformers",
                joined(attention.replace("_attention", ""), compiled, batching if several else ""),
                dtype,
                partial(_transformers, context, dtype, attention, compiled, batching),
                bytes_needed=_needed(context, dtype, batching),
                memory=(attention, compiled) == ("sdpa", ""),
            )


def in_batches(
    context: Context,
    configurations: Iterable[tuple[str, str]],
    batchings: Sequence[str] = BATCHINGS,
) -> Iterator[tuple[str, str, str]]:
    """Attention, compilation and batching of what transformers runs."""
    for attention, compiled in configurations:
        for batching in batchings if len(context.features) > 1 else batchings[:1]:
            # Five times the work: never the best, and one row shows it.
            if batching != "padded batch" or (attention, compiled) == ("sdpa", ""):
                yield attention, compiled, batching


def _configurations(context: Context) -> list[tuple[str, str]]:
    """(attention, how it is compiled)."""
    if context.workload.adapter:
        return [("sdpa", "")]
    modes = ["compiled"]
    if context.device.type == "cuda":
        modes.append("compiled max-autotune")
    found = [("sdpa", ""), ("eager", ""), *(("sdpa", m) for m in modes)]
    # These two are compiled anew for each length, so they are for one utterance only; and as they
    # take half a minute for that, for those that every other configuration runs, too.
    if len(context.features) == 1 and context.workload.audio_seconds <= 30:
        found.append(("flex_attention", ""))
        if context.device.type == "cpu":
            # The compiler stores frozen weights in the layout that its GEMMs like best.
            found.append(("sdpa", "compiled, frozen"))
    return found


def _needed(context: Context, dtype: str, batching: str) -> int:
    config, size = context.our_config(), DTYPES[dtype].itemsize
    return context.largest(batching, lambda lengths: reference_bytes(config, lengths, size))


def _prepared(
    context: Context,
    model: Any,
    dtype: torch.dtype,
    groups: list[list[int]],
    compiled: str = "",
) -> Prepared:
    """Of the last hidden states of a model of ours or transformers'."""
    inputs = [context.batch(rows, dtype) for rows in groups]

    def run() -> list[Tensor]:
        return [model(**batch).last_hidden_state for batch in inputs]

    def collect(outputs: list[Tensor]) -> list[Tensor]:
        if context.workload.adapter:
            return list(outputs[0])  # one utterance: all of its frames are valid
        return gather(groups, context.lengths, outputs)

    if compiled:
        compile_layers(model.encoder.layers, compiled, len(context.features) == 1, run)
    return Prepared(run, collect)


def _ours(context: Context, dtype: str, packed: bool = False) -> Prepared:
    model = our_model(context, dtype)
    if packed:
        try:
            model.pack_weights()
        except ValueError as error:
            raise Unavailable(str(error)) from error
    everything = batches(context.features, "padded batch")
    return _prepared(context, model, next(model.parameters()).dtype, everything)


def _transformers(
    context: Context, dtype: str, attention: str, compiled: str, batching: str
) -> Prepared:
    model, groups = context.reference(dtype, attention), batches(context.features, batching)
    return _prepared(context, model, DTYPES[dtype], groups, compiled)


def our_model(context: Context, dtype: str) -> Any:
    """This library's bare model with `use_fast_kernels=True`, over the shared weights."""
    import w2vbert_fast

    config = context.our_config()
    if dtype == "int8":
        if context.device.type != "cpu":
            raise Unavailable("int8 is for CPUs")
        folder = context.folder / f"ours-{context.layers}-{context.workload.adapter}"
        if not folder.is_dir():
            plain = with_weights(w2vbert_fast.Wav2Vec2BertModel, config, context.weights("fp32"))
            plain.save_pretrained(folder)
        try:
            model = w2vbert_fast.Wav2Vec2BertModel.from_pretrained(
                folder, dtype="int8", use_fast_kernels=True
            )
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return model.eval()
    model = with_weights(w2vbert_fast.Wav2Vec2BertModel, config, context.weights(dtype))
    model.use_fast_kernels = True
    return model.eval().requires_grad_(False)


def with_weights(make: Callable[[Any], Any], config: Any, weights: dict[str, Tensor]) -> Any:
    """A model over shared weights."""
    with torch.device("meta"):
        model = make(config)
    model.load_state_dict(weights, assign=True)
    return model


def compile_layers(
    layers: Iterable[nn.Module], how: str, one_length: bool, run: Callable[[], object]
) -> None:
    """Compile every layer (one graph for all of them), which `run` then does."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    options: dict[str, Any] = {"dynamic": not one_length}
    if how == "compiled max-autotune":
        options["mode"] = "max-autotune-no-cudagraphs"
    for layer in layers:
        layer.compile(**options)
    # One code object serves all layers; beyond the limit the rest would run uncompiled.
    with (
        inductor.patch(freezing=how == "compiled, frozen"),
        torch._dynamo.config.patch(recompile_limit=64),
        torch.inference_mode(),
    ):
        run()


def early_exit_candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """One hidden state: ours stops behind that layer, transformers returns all of them."""
    layer = context.workload.exit_layer
    assert layer is not None
    for dtype in dtypes:
        ours = partial(_encode, context, dtype, layer)
        yield Candidate("w2vbert_fast", f"encode(layer={layer})", dtype, ours)
        for compiled in ("", "compiled"):
            yield Candidate(
                "transformers",
                joined("sdpa", compiled, "output_hidden_states"),
                dtype,
                partial(_hidden_states, context, dtype, layer, compiled),
                bytes_needed=_needed(context, dtype, BATCHINGS[0]),
            )


def _encode(context: Context, dtype: str, layer: int) -> Prepared:
    model, batch = our_model(context, dtype), context.batch([0], DTYPES[dtype])
    return Prepared(lambda: model.encode(batch["input_features"], layer=layer), list)


def _hidden_states(context: Context, dtype: str, layer: int, compiled: str) -> Prepared:
    model, batch = context.reference(dtype), context.batch([0], DTYPES[dtype])

    def run() -> Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[layer]

    if compiled:
        compile_layers(model.encoder.layers, compiled, True, run)
    return Prepared(run, list)


def quiet() -> None:
    """No progress bars and hints among the results."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
