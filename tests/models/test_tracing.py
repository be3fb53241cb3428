"""Tracing and exporting: transformers' code under `accelerate`, a clear error from our models."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.reference import padded_batch, pair, relative_error
from tests.integrations.test_integration_transformers import ADAPTER, FEATURES, NO_DROPOUT, both


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.model(x, attention_mask=mask).logits


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            yield


Record = Callable[..., Any]
RECORDS: dict[str, Record] = {
    "trace": lambda model, *inputs: torch.jit.trace(model, inputs, strict=False),
    "export": lambda model, *inputs: torch.export.export(model, inputs, strict=False).module(),
    "strict export": lambda model, *inputs: torch.export.export(model, inputs).module(),
}


@pytest.fixture(autouse=True)
def autocast_caches() -> Iterator[None]:
    """PyTorch's older ONNX exporter leaves the cache of autocast off where it fails."""
    before = torch.is_autocast_cache_enabled()
    yield
    torch.set_autocast_cache_enabled(before)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_of_an_accelerated_model_holds_for_other_masks(record: Record) -> None:
    reference, fast = both(**NO_DROPOUT, **ADAPTER)
    x, mask = padded_batch((30, 21), FEATURES)
    recorded = record(Logits(fast).eval(), x, mask)
    for other in (mask, mask.flip(0), torch.ones_like(mask)):
        expected = reference(x, attention_mask=other).logits
        assert relative_error(recorded(x, other), expected) <= 1e-5


def test_the_older_onnx_exporter_takes_an_accelerated_model() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    reference, fast = both(**NO_DROPOUT)
    x, mask = padded_batch((30, 21), FEATURES)
    file = io.BytesIO()
    torch.onnx.export(Logits(fast).eval(), (x, mask), file, dynamo=False, input_names=["x", "mask"])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for other in (mask, mask.flip(0)):
        (logits,) = session.run(None, {"x": x.numpy(), "mask": other.numpy()})
        expected = reference(x, attention_mask=other).logits
        assert relative_error(torch.from_numpy(logits), expected) <= 1e-5


OUR_RECORDS: dict[str, Record] = {
    "trace": RECORDS["trace"],
    "trace without a mask": lambda model, x, mask: torch.jit.trace(model, (x,)),
    "export": RECORDS["export"],
    "onnx": lambda model, *inputs: torch.onnx.export(model, inputs, io.BytesIO(), dynamo=False),
    "script": lambda model, *inputs: torch.jit.script(model),
    "fx": lambda model, *inputs: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, *inputs: make_fx(model)(*inputs),
}


@pytest.mark.parametrize("record", OUR_RECORDS.values(), ids=OUR_RECORDS)
@pytest.mark.parametrize("use_fast_kernels", [False, True])
def test_a_record_of_our_own_model_is_an_error_that_says_what_to_do(
    record: Record, use_fast_kernels: bool
) -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    ours.use_fast_kernels = use_fast_kernels  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"cannot record this model.*`w2vbert-fast export`"):
        record(Logits(ours).eval(), *padded_batch((30, 21), FEATURES))
