"""Candidates that run in PyTorch: this library, and transformers in each of its configurations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.flops import reference_bytes
from bench.machine import DTYPES
from bench.measure import Candidate, Prepared, Unavailable
from bench.peers.context import Context, gather
from bench.workloads import BATCHINGS, batches, padded

REFERENCE = ("transformers", "sdpa")
"""Implementation and attention whose bf16 error is the measure for ours: transformers' default."""

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
    several = len(context.features) > 1
    for dtype in dtypes:
        if dtype == "int8":
            continue
        for attention, compiled in _configurations(context, dtype):
            for batching in BATCHINGS if several else BATCHINGS[:1]:
                if (attention, compiled) != ("sdpa", "") and batching == "padded batch":
                    continue  # five times the work: never the best, and one row shows it
                parts = [attention.replace("_attention", ""), compiled]
                parts += [batching] if several else []
                yield Candidate(
                    "transformers",
                    ", ".join(p for p in parts if p),
                    dtype,
                    partial(_transformers, context, dtype, attention, compiled, batching),
                    bytes_needed=_needed(context, dtype, batching),
                    memory=(attention, compiled) == ("sdpa", ""),
                )


def _configurations(context: Context, dtype: str) -> list[tuple[str, str]]:
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
    lengths = [f.shape[0] for f in context.features]
    config, size = context.our_config(), DTYPES[dtype].itemsize
    groups = batches(context.features, batching)
    return max(reference_bytes(config, [lengths[i] for i in rows], size) for rows in groups)


def _ours(context: Context, dtype: str, packed: bool = False) -> Prepared:
    model = our_model(context, dtype)
    if packed:
        try:
            model.pack_weights()
        except ValueError as error:
            raise Unavailable(str(error)) from error
    floating = next(model.parameters()).dtype
    x, mask = padded(context.features)
    x = x.to(context.device, floating)
    mask = None if mask is None else mask.to(context.device)
    lengths = [f.shape[0] for f in context.features]
    rows = [list(range(len(lengths)))]

    def collect(output: Tensor) -> list[Tensor]:
        if context.workload.adapter:
            return list(output)  # one utterance: all of its frames are valid
        return gather(rows, lengths, [output])

    return Prepared(lambda: model(x, attention_mask=mask).last_hidden_state, collect)


def our_model(context: Context, dtype: str) -> Any:
    """This library's bare model with `use_fast_kernels=True`, over the shared weights."""
    import w2vbert_fast

    config = context.our_config()
    if dtype == "int8":
        if context.device.type != "cpu":
            raise Unavailable("int8 is for CPUs")
        folder = context.folder / f"ours-{context.layers}-{context.workload.adapter}"
        if not folder.is_dir():
            plain = _with_weights(w2vbert_fast.Wav2Vec2BertModel, config, context.weights("fp32"))
            plain.save_pretrained(folder)
        try:
            model = w2vbert_fast.Wav2Vec2BertModel.from_pretrained(
                folder, dtype="int8", use_fast_kernels=True
            )
        except (TypeError, ValueError) as error:
            raise Unavailable(f"this version has no int8: {error}") from error
        return model.eval()
    model = _with_weights(w2vbert_fast.Wav2Vec2BertModel, config, context.weights(dtype))
    model.use_fast_kernels = True
    return model


def _with_weights(make: Callable[[Any], Any], config: Any, weights: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        model = make(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def compile_layers(layers: Iterable[nn.Module], how: str, one_length: bool) -> Callable[[], None]:
    """Compile every layer (one graph for all of them). Returns what undoes global settings."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    options: dict[str, Any] = {"dynamic": not one_length}
    if how == "compiled max-autotune":
        options["mode"] = "max-autotune-no-cudagraphs"
    before = inductor.freezing, torch._dynamo.config.recompile_limit
    inductor.freezing = how == "compiled, frozen"
    # One code object serves all layers; beyond the limit the rest would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(**options)

    def restore() -> None:
        inductor.freezing, torch._dynamo.config.recompile_limit = before

    return restore


def _transformers(
    context: Context, dtype: str, attention: str, compiled: str, batching: str
) -> Prepared:
    model = context.reference(dtype, attention)
    lengths = [f.shape[0] for f in context.features]
    groups = batches(context.features, batching)
    inputs = []
    for rows in groups:
        x, mask = padded([context.features[i] for i in rows])
        mask = None if mask is None else mask.to(context.device)
        inputs.append((x.to(context.device, DTYPES[dtype]), mask))

    def run() -> list[Tensor]:
        return [model(x, attention_mask=mask).last_hidden_state for x, mask in inputs]

    if compiled:
        restore = compile_layers(model.encoder.layers, compiled, len(lengths) == 1)
        try:
            with torch.inference_mode():
                run()
        finally:
            restore()

    def collect(outputs: list[Tensor]) -> list[Tensor]:
        if context.workload.adapter:
            return list(outputs[0])
        return gather(groups, lengths, outputs)

    return Prepared(run, collect)


def early_exit_candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """One hidden state: ours stops behind that layer, transformers returns all of them."""
    layer = context.workload.exit_layer
    assert layer is not None
    for dtype in dtypes:
        yield Candidate(
            "w2vbert_fast", f"encode(layer={layer})", dtype, partial(_encode, context, dtype, layer)
        )
        for compiled in ("", "compiled"):
            yield Candidate(
                "transformers",
                ", ".join(p for p in ("sdpa", compiled, "output_hidden_states") if p),
                dtype,
                partial(_hidden_states, context, dtype, layer, compiled),
                bytes_needed=_needed(context, dtype, BATCHINGS[0]),
            )


def _encode(context: Context, dtype: str, layer: int) -> Prepared:
    model = our_model(context, dtype)
    if not hasattr(model, "encode"):
        raise Unavailable("this version has no encode()")
    x = context.features[0][None].to(context.device, DTYPES[dtype])
    return Prepared(lambda: model.encode(x, layer=layer), lambda output: list(output))


def _hidden_states(context: Context, dtype: str, layer: int, compiled: str) -> Prepared:
    model = context.reference(dtype)
    x = context.features[0][None].to(context.device, DTYPES[dtype])

    def run() -> Tensor:
        return model(x, output_hidden_states=True).hidden_states[layer]

    if compiled:
        restore = compile_layers(model.encoder.layers, compiled, True)
        try:
            with torch.inference_mode():
                run()
        finally:
            restore()
    return Prepared(run, lambda output: list(output))


def quiet() -> None:
    """No progress bars and hints among the results."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
