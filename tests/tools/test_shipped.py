"""What the lanes know of the kernels that ship: what the launchers ask Triton for."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from triton.runtime.jit import JITFunction

import csrc_triton
from csrc_triton.launch import interpreting
from tools.compile.aot import PLAIN_TWINS, TARGETS
from tools.compile.shipped import shipped_kernels
from tools.compile.target import Target
from tools.verify import races
from tools.verify.small import small_launches

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing")


def written_kernels() -> set[str]:
    """`module:name` of every kernel that is written there."""
    modules = [
        importlib.import_module(name)
        for _, name, _ in pkgutil.walk_packages(csrc_triton.__path__, "csrc_triton.")
    ]
    return {
        f"{function.fn.__module__}:{name}"
        for module in modules
        for name, function in vars(module).items()
        if isinstance(function, JITFunction) and name.endswith("_kernel")
    }


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_launched(target: str) -> None:
    found = [
        k for dtype in ("bfloat16", "float32") for k in shipped_kernels(Target.parse(target), dtype)
    ]
    assert {kernel.request.kernel for kernel in found} == written_kernels()
    assert len({(kernel.name, kernel.dtype) for kernel in found}) == len(found)
    names = {kernel.name for kernel in found}
    assert {*PLAIN_TWINS, *PLAIN_TWINS.values()} <= names
    assert {allowed.kernel for allowed in races.ALLOWED} <= names
    for kernel in found:
        request = kernel.request
        assert request.target == kernel.target.arch
        assert {a.name for a in request.arguments} | set(request.constants) == set(
            request.source.fn.arg_names
        )
        assert request.options["num_warps"] in (1, 2, 4, 8, 16)


def test_a_kernel_that_nobody_launches_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = csrc_triton.ctc._ctc_argmax_kernel
    assert f"{kernel.fn.__module__}:_ctc_argmax_kernel" in written_kernels()
    monkeypatch.setattr(csrc_triton.ctc, "_another_kernel", kernel, raising=False)
    launched = {k.request.kernel for k in shipped_kernels(Target.parse("cuda:80"), "bfloat16")}
    assert "csrc_triton.ctc:_another_kernel" in written_kernels() - launched


@pytest.mark.parametrize("target", races.TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_has_a_small_launch_for_the_verifier(target: str, dtype: str) -> None:
    parsed = Target.parse(target)
    launches = small_launches(parsed, dtype)
    for kernel in shipped_kernels(parsed, dtype):
        launch = launches[kernel.request.key]
        x, y, z = launch.grid
        assert 2 <= x <= 5 and x * y * z <= 64, kernel.name
        for argument in launch.arguments:
            if argument.type.startswith("*"):
                assert argument.value.device.type == "cpu"
