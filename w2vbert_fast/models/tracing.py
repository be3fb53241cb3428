"""Whether a call is recorded, to be run again on other inputs."""

from __future__ import annotations

import sys

import torch

# PyTorch 2.5 cannot be asked. There what compiles without Dynamo is an export; one with Dynamo
# (`strict=True`) looks like `torch.compile`.
_is_exporting = getattr(torch.compiler, "is_exporting", None) or (
    lambda: not torch.compiler.is_dynamo_compiling()
)


def recorder() -> str | None:
    """What records the operations of this call as a graph: "torch.jit.trace" (the older ONNX
    exporter too), "torch.export" or "make_fx"; `None` where nothing does.

    What a call decides by the values of its inputs, such as the lengths of the utterances, is a
    constant of such a graph. `torch.compile` is none of these: it guards what it has assumed.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace"
    if torch.compiler.is_compiling():
        return "torch.export" if _is_exporting() else None
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return "make_fx" if tracer is not None and tracer.get_proxy_mode() is not None else None
