"""Launches of these tests: those of Triton, caught before they run, and those of written PTX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch
import triton

from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Executor
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.record import Argument, Launch

VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
LACKS_FENCE = VERSION < (3, 7, 1)
"""Triton's fault: no fence between the copies of a pipelined product for sm_90 and that product."""


def caught(target: str, call: Callable[[], object]) -> list[Launch]:
    """The launches of a call, none of them executed."""
    launches: list[Launch] = []
    with activated(target, launches.append):
        call()
    return launches


def changed(launch: Launch, old: str, new: str, which: int = 0) -> Launch:
    """The launch with one occurrence of a text of its PTX replaced."""
    parts = launch.ptx.split(old)
    assert len(parts) > which + 1, f"{old!r} is {len(parts) - 1} times there"
    ptx = old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])
    return dataclasses.replace(launch, ptx=ptx)


def with_fences(launch: Launch) -> Launch:
    """Of a Triton that leaves them out, the launch with fences behind the waits for copies."""
    if not LACKS_FENCE:
        return launch
    wait, fence = r"(cp\.async\.wait_group\s+\d+;)", "fence.proxy.async.shared::cta;"
    return dataclasses.replace(launch, ptx=re.sub(wait, rf"\1\n{fence}", launch.ptx))


def written(
    body: str, tensors: Mapping[str, torch.Tensor], threads: int = 32, shared: int = 0
) -> Launch:
    """A launch of one block of written PTX. %rd0, %rd1, ... are the tensors' addresses and then
    each thread's: %rd10 + i is tensor i at the thread's 8 bytes; %r0 is the thread."""
    names = list(tensors)
    parameters = ",\n".join(f".param .u64 k_param_{i}" for i in range(len(names)))
    loads = "\n".join(
        f"ld.param.b64 %rd{i}, [k_param_{i}];\nmad.wide.u32 %rd{10 + i}, %r0, 8, %rd{i};"
        for i in range(len(names))
    )
    ptx = (
        f".visible .entry k(\n{parameters}\n)\n.reqntid {threads}\n{{\n"
        ".reg .pred %p<8>;\n.reg .b16 %rs<8>;\n.reg .b32 %r<32>;\n.reg .b64 %rd<32>;\n"
        f"mov.u32 %r0, %tid.x;\n{loads}\n{body}\nret;\n}}\n"
    )
    arguments = [Argument(name, "*i64", tensor) for name, tensor in tensors.items()]
    return Launch(
        "t:k", "sm_80", {}, {}, {}, {}, (1, 1, 1), arguments, name="k", ptx=ptx, shared_bytes=shared
    )


def execute(launch: Launch, **checks: bool) -> None:
    Executor(Checks(**checks))(launch)


def computed(statement: str, *sources: torch.Tensor) -> torch.Tensor:
    """What a statement leaves in %rd25 of 64-bit sources in %rd20, %rd21, ...: [32] int64. %r20 and
    %r21 are the sources' low halves, and %r25 is taken where the statement writes it."""
    out = torch.zeros(32, dtype=torch.int64)
    loads = "".join(
        f"ld.global.b64 %rd{20 + i}, [%rd{10 + i}];\ncvt.u32.u64 %r{20 + i}, %rd{20 + i};\n"
        for i in range(len(sources))
    )
    narrow = "cvt.u64.u32 %rd25, %r25;\n" if "%r25" in statement else ""
    store = f"st.global.b64 [%rd{10 + len(sources)}], %rd25;"
    tensors = {f"s{i}": source for i, source in enumerate(sources)} | {"out": out}
    execute(written(f"{loads}{statement}\n{narrow}{store}", tensors))
    return out
