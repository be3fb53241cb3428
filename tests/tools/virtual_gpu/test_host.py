"""Launches through Triton's own launcher to a driver that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).resolve().parents[3]


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The stub is loaded for good, so each test has a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(SCRIPTS)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_launches_reach_the_driver_and_write_nothing() -> None:
    done = run("""
import torch, triton, vector_addition
from tools.virtual_gpu.host import NoHostDriver, host_driver

x = torch.zeros(1000)
before = triton.runtime.driver._active
with host_driver("sm_80") as launches:
    assert launches() == 0
    outs = [vector_addition.add(x, x) for _ in range(3)]
    assert launches() == 3
    (kernel,) = vector_addition.add_kernel.device_caches[0][0].values()
    assert ".target sm_80" in kernel.asm["ptx"]
    kernel.run(4, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None,
               x, x, outs[0], 1000, 256)
    assert launches() == 4
assert all(out.isnan().all() for out in outs)
assert triton.runtime.driver._active is before
try:
    with host_driver():
        pass
except NoHostDriver as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert "has loaded a libcuda.so.1" in done.stdout


def test_where_there_is_no_compiler_it_says_so(tmp_path: Path) -> None:
    script = "from tools.virtual_gpu.host import host_driver\nwith host_driver(): pass"
    done = run(script, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "there is no C compiler (gcc or clang)" in done.stderr
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho no room >&2; exit 1\n")
    compiler.chmod(0o755)
    done = run(script, PATH=str(tmp_path))
    assert "gcc does not compile the stub of CUDA: no room" in done.stderr
