"""The GPU and the model that something is measured or compiled for."""

from __future__ import annotations

import os
from typing import Any

import torch

from w2vbert_fast import models
from w2vbert_fast.inference.pipeline import find_device
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.ops import dispatch


def find_gpu(device: str | None) -> torch.device:
    """A CUDA or ROCm device that Triton's kernels run on; `None`: the first.

    Raises:
        ValueError: `device` is unknown or not there.
        RuntimeError: there is none, or no kernel runs on it; the message says what is missing.
    """
    found = find_device(device)
    if found.type != "cuda":
        raise RuntimeError(
            f"this needs a CUDA or ROCm device, and PyTorch {torch.__version__} "
            + ("sees none" if device is None else f"was asked for {device!r}")
            + ": on a CPU there is nothing to tune or to compile"
        )
    found = torch.device("cuda", found.index or 0)
    if dispatch.implementation(torch.empty(0, device=found)) != "triton":
        raise RuntimeError(f"no Triton kernel runs on {found}: {dispatch.explain(found)}")
    return found


def load(
    source: str | os.PathLike[str] | None, device: torch.device, dtype: str | None
) -> models.Wav2Vec2BertPreTrainedModel:
    """A model in evaluation mode, with its fast kernels.

    Args:
        source: a folder or a hub id; `None`: the published encoder's shape, with random weights.
        device: where.
        dtype: such as "bfloat16"; `None`: the checkpoint's own, of random weights bfloat16.

    Raises:
        OSError: the checkpoint is not to be had.
        ValueError: it is damaged, or `dtype` is unknown.
    """
    if dtype == "int8":
        raise ValueError("dtype is 'int8', which is for CPUs")
    if source is None:
        kind = getattr(torch, dtype or "bfloat16")
        with torch.device(device):
            model: Any = models.Wav2Vec2BertModel(Wav2Vec2BertConfig()).to(kind).eval()
        model.use_fast_kernels = True
        return model  # type: ignore[no-any-return]
    config = Wav2Vec2BertConfig.from_pretrained(source)
    name = (config.architectures or ["Wav2Vec2BertModel"])[0]
    kind = getattr(models, name, models.Wav2Vec2BertModel)
    model = kind.from_pretrained(source, device=device, dtype=dtype, use_fast_kernels=True)
    return model.eval()  # type: ignore[no-any-return]
