"""Candidates outside PyTorch: CTranslate2, ONNX Runtime and OpenVINO. Each is optional.

None of them is given an attention mask (CTranslate2 has none), so utterances run one by one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.context import Context, require
from bench.machine import DTYPES, describe
from bench.measure import Candidate, Prepared, Unavailable, first_line


def encoder_candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """What these engines can run of an encoder workload on a CPU."""
    one = len(context.features) == 1
    # All candidates are in memory at once. Exported, 30 s are 18 GB together with all others.
    longest = 30 if context.workload.adapter else 10
    if context.device.type != "cpu" or (one and context.workload.audio_seconds > longest):
        return
    several = "" if one else ", one by one"
    if context.workload.adapter:
        for dtype in dtypes:
            if dtype in ("fp32", "int8"):
                build = partial(_ctranslate2, context, dtype)
                yield Candidate("ctranslate2", "", dtype, build, memory=True)
        return
    for dtype in dtypes:
        if dtype in ("fp32", "int8"):
            build = partial(_onnxruntime, context, dtype)
            yield Candidate("onnxruntime", "sdpa" + several, dtype, build)
        if dtype in ("fp32", "bf16"):
            build = partial(_openvino, context, dtype)
            yield Candidate("openvino", "sdpa" + several, dtype, build)


def _arrays(context: Context, dtype: str) -> list[np.ndarray]:
    """Float32 `[1, T, 160]` of each utterance, rounded to `dtype`."""
    rounding = DTYPES.get(dtype, torch.float32)
    return [np.ascontiguousarray(f.to(rounding).float()[None].numpy()) for f in context.features]


def _ctranslate2(context: Context, dtype: str) -> Prepared:
    require("ctranslate2", "transformers")
    # On AMD processors it takes AVX2 unless it is told otherwise, and is three times slower.
    if "avx512f" in describe()["flags"]:
        os.environ.setdefault("CT2_FORCE_CPU_ISA", "AVX512")
    import ctranslate2

    folder = context.folder / f"ctranslate2-{context.layers}"
    if not folder.is_dir():
        _convert_to_ctranslate2(context, folder)
    model = ctranslate2.models.Wav2Vec2Bert(
        str(folder),
        device="cpu",
        compute_type={"fp32": "float32", "int8": "int8"}[dtype],
        intra_threads=context.threads,
    )
    inputs = [ctranslate2.StorageView.from_array(a) for a in _arrays(context, dtype)]
    return Prepared(
        lambda: [model.encode(x, to_cpu=True) for x in inputs],
        lambda outputs: [torch.from_numpy(np.array(y)[0]) for y in outputs],
    )


def _convert_to_ctranslate2(context: Context, folder: Path) -> None:
    import transformers
    from ctranslate2.converters import TransformersConverter

    config = transformers.Wav2Vec2BertConfig(**context.config_values())
    with torch.device("meta"):
        model = transformers.Wav2Vec2BertForCTC(config)
    encoder = {f"wav2vec2_bert.{name}": w for name, w in context.weights("fp32").items()}
    head = {
        "lm_head.weight": torch.zeros(config.vocab_size, config.hidden_size),
        "lm_head.bias": torch.zeros(config.vocab_size),
    }
    model.load_state_dict({**encoder, **head}, assign=True)
    # Hidden states instead of the logits: the head is left out.
    model.wav2vec2_bert.config.return_hidden = True

    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {f"token-{i}": i for i in range(config.vocab_size)}

    class Converter(TransformersConverter):
        def load_model(self, *_: Any, **__: Any) -> Any:
            return model.eval()

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return Tokenizer()

    source = context.folder / "ctranslate2-source"
    config.save_pretrained(source)
    Converter(str(source)).convert(str(folder))


class _LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor) -> Tensor:
        return self.model(input_features).last_hidden_state


def _onnx_file(context: Context) -> Path:
    """transformers' model with sdpa, exported by torch.onnx; any number of frames."""
    require("onnx", "onnxscript", "transformers")
    path = context.folder / f"model-{context.layers}.onnx"
    if path.exists():
        return path
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    frames = torch.export.Dim("frames", min=2, max=100_000)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                _LastHiddenState(context.reference("fp32")).eval(),
                (torch.zeros(1, 500, 160),),
                path,
                dynamo=True,
                input_names=["input_features"],
                output_names=["last_hidden_state"],
                dynamic_shapes={"input_features": {1: frames}},
            )
        except Exception as error:
            raise Unavailable(f"could not be exported: {first_line(error)}") from error
    return path


def _onnxruntime(context: Context, dtype: str) -> Prepared:
    require("onnxruntime")
    path = _onnx_file(context)
    import onnxruntime

    if dtype == "int8":
        quantized = path.with_name(path.stem + "-int8.onnx")
        if not quantized.exists():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            logging.getLogger().setLevel(logging.ERROR)
            quantize_dynamic(
                path,
                quantized,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
        path = quantized
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = context.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [{"input_features": a} for a in _arrays(context, dtype)]
    return Prepared(
        lambda: [session.run(None, x)[0] for x in inputs],
        lambda outputs: [torch.from_numpy(y[0]) for y in outputs],
    )


def _openvino(context: Context, dtype: str) -> Prepared:
    require("openvino")
    path = _onnx_file(context)
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": context.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(path, "CPU", options)
    inputs = _arrays(context, dtype)
    return Prepared(
        # Results live in the request's own memory until it runs again.
        lambda: [np.array(model(x)[0]) for x in inputs],
        lambda outputs: [torch.from_numpy(y[0]) for y in outputs],
    )
