"""The compiler lane: that it finds what it looks for, and what it says of the kernels that ship."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tools.compile import amdgcn, aot, machine_code, sass
from tools.compile.aot import Row, check_kernel
from tools.compile.machine_code import default_cache
from tools.compile.occupancy import blocks_per_multiprocessor
from tools.compile.shipped import Shipped, shipped_kernels
from tools.compile.target import Target
from tools.virtual_gpu.requests import Uncompiled, requests

# One kernel of each family, with the largest tile of those that have several, and the plain twin of
# attention. Of the products: the epilogue with an activation and the one with two accumulators.
# What is left out differs in its epilogue or its tile alone.
QUICK = (
    "shaw_attention_fwd/relative_key",
    "shaw_attention_fwd/no_positions",
    "linear/linear_silu",
    "linear/linear_glu",
    "conv_norm_act_fwd/conv_norm_act",
    "norm_fwd/residual_double_layer_norm",
    "ctc_argmax/characters",
)
QUICK_TENSOR_CORES = {"cuda:80": "HMMA", "cuda:90": "HGMMA", "hip:gfx942": "MFMA"}


@triton.jit
def _normalise_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x / tl.sum(x, 0))


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, steps, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EXTRA: tl.constexpr
):  # fmt: skip
    rows = tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * BLOCK_K + inner[None, :]
    b_ptrs = b_ptr + inner[:, None] * BLOCK + rows[None, :]
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for _ in range(steps):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), total)
        for _ in tl.static_range(EXTRA):
            total = tl.exp2(total)
        a_ptrs += BLOCK * BLOCK_K
        b_ptrs += BLOCK * BLOCK_K
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], total)


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _asked(target: str, call: Callable[[], object]) -> Uncompiled:
    with requests(Target.parse(target).gpu) as found:
        call()
    (request,) = found
    return request


def _pointwise(
    target: str,
    block: int = 1024,
    num_warps: int = 4,
    kernel: Any = _normalise_kernel,
    x: torch.Tensor | None = None,
    **options: int,
) -> Shipped:
    x = _empty(block) if x is None else x
    request = _asked(
        target, lambda: kernel[(1,)](x, BLOCK=block, num_warps=num_warps, num_stages=1, **options)
    )
    return Shipped("normalise", "float32", Target.parse(target), request)


def _product(
    target: str, num_stages: int = 2, name: str = "product", extra: int = 0, steps: int = 17
) -> Shipped:
    a, out = _empty(64, 64, dtype=torch.bfloat16), _empty(64, 64)
    request = _asked(
        target,
        lambda: _product_kernel[(1,)](
            a, a, out, steps, BLOCK=64, BLOCK_K=64, EXTRA=extra, num_warps=4, num_stages=num_stages
        ),
    )
    return Shipped(name, "bfloat16", Target.parse(target), request)


def _check(kernel: Shipped, cache: Path, *others: Shipped) -> Row:
    return check_kernel(kernel, {other.name: other for other in (kernel, *others)}, cache)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_a_good_kernel_passes(target: str, tmp_path: Path) -> None:
    row = _check(_pointwise(target), tmp_path)
    assert row.problems == ()
    assert row.code is not None
    assert row.code.tensor_core == row.code.products == {}
    # 1024 elements, 4 warps: two loads of 4 elements a thread, or one where a warp has 64 threads.
    assert row.code.load_bits == {"128": 1 if "gfx" in target else 2}
    assert row.code.hot_loop is None

    row = _check(_product(target), tmp_path)
    assert row.problems == ()
    assert row.code is not None
    assert row.code.products == {"bfloat16": 1}
    assert list(row.code.tensor_core) == [QUICK_TENSOR_CORES[target]]
    assert row.code.hot_loop is not None
    assert row.code.hot_loop < row.code.instructions


def test_a_spill_fails_where_none_is_allowed(tmp_path: Path) -> None:
    # 8192 values a warp: 256 registers a thread, where 255 is the most.
    row = _check(_pointwise("cuda:80", 8192, num_warps=1), tmp_path)
    assert row.code is not None and row.code.spills > 0
    assert row.problems == (f"{row.code.spills} instructions load or store spilled registers",)
    row = _check(_pointwise("cuda:120", 8192, num_warps=1), tmp_path)
    assert row.code is not None and row.code.spills > 0
    assert row.problems == ()


def test_the_cap_on_registers_is_kept(tmp_path: Path) -> None:
    row = _check(_pointwise("cuda:80", 4096, num_warps=1), tmp_path)
    assert row.code is not None and row.code.registers > 128
    row = _check(_pointwise("cuda:80", 4096, num_warps=1, maxnreg=64), tmp_path)
    assert row.code is not None and row.code.registers == 64
    assert row.problems == (f"{row.code.spills} instructions load or store spilled registers",)


def test_spills_on_amd_are_counted(tmp_path: Path) -> None:
    row = _check(_pointwise("hip:gfx942", 32768, num_warps=1), tmp_path)
    assert row.code is not None and row.code.spills > 0


def test_a_product_without_tensor_cores_fails() -> None:
    code = machine_code.Code(64, 0, 0, 0, {"float32": 2, "bfloat16": 1}, {}, {}, None, 1)
    for target, multiplied in (
        ("cuda:80", "bfloat16"),
        # Float32 has full precision on AMD's tensor cores alone.
        ("hip:gfx942", "float32 and bfloat16"),
    ):
        problems = list(aot.find_problems(_pointwise(target), code, 8, None))
        assert problems == [f"it multiplies {multiplied} without a tensor-core instruction"]
        used = replace(code, tensor_core={"HMMA": 1})
        assert not list(aot.find_problems(_pointwise(target), used, 8, None))
        others = replace(code, products={"float64": 1})
        assert not list(aot.find_problems(_pointwise(target), others, 8, None))
    # Nor are they asked of Turing.
    assert not list(aot.find_problems(_pointwise("cuda:75"), code, 8, None))


@pytest.mark.parametrize(
    ("target", "num_stages", "limit"), [("cuda:90", 16, 227), ("cuda:89", 8, 99)]
)
def test_too_much_shared_memory_fails(
    target: str, num_stages: int, limit: int, tmp_path: Path
) -> None:
    row = _check(_product(target, num_stages), tmp_path)
    assert row.code is not None and row.code.shared_bytes > limit * 1024
    assert row.blocks == 0
    (problem,) = row.problems
    assert problem.startswith(f"it needs {row.code.shared_bytes} bytes of shared memory; ")
    assert problem.endswith(f"has {limit * 1024}")


def test_a_block_that_does_not_fit_fails() -> None:
    code = machine_code.Code(129, 0, 0, 0, {}, {}, {}, None, 1)
    blocks = blocks_per_multiprocessor("sm_90", 16, code.registers, 0)
    problems = list(aot.find_problems(_pointwise("cuda:90", num_warps=16), code, blocks, None))
    assert problems == ["a block of 16 warps with 129 registers does not fit"]


def test_a_kernel_that_does_not_compile_fails(tmp_path: Path) -> None:
    row = _check(_pointwise("cuda:80", 1000, kernel=_broken_kernel), tmp_path)
    assert row.code is None
    (problem,) = row.problems
    assert problem.startswith("it does not compile: ") and "power of 2" in problem
    assert not list(tmp_path.iterdir())


def test_a_slow_far_loop_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "PLAIN_TWINS", {"same": "product", "slow": "product"})
    plain = _product("cuda:80")
    row = _check(_product("cuda:80", name="same"), tmp_path, plain)
    assert row.far_loop == 1 and row.problems == ()

    slow = _product("cuda:80", name="slow", extra=3)
    row = _check(slow, tmp_path, plain)
    assert row.far_loop is not None and row.far_loop > 1.1
    (problem,) = row.problems
    assert problem.startswith(f"its far loop has {row.far_loop:.2f} times the instructions of ")
    # Elsewhere it is shown and not judged.
    row = _check(_product("cuda:120", name="slow", extra=3), tmp_path, _product("cuda:120"))
    assert row.far_loop is not None and row.far_loop > 1.1 and row.problems == ()

    row = _check(slow, tmp_path)
    assert row.problems == ("its far loop, or that of product, was not found",)


def test_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _check(_pointwise("cuda:80"), tmp_path)

    def compile_again(*_: object) -> None:
        raise RuntimeError("compiled again")

    monkeypatch.setattr(Uncompiled, "compiled", compile_again)
    assert _check(_pointwise("cuda:80"), tmp_path) == first
    for other in (
        _pointwise("cuda:80", num_warps=8),
        _pointwise("cuda:80", block=2048),
        _pointwise("cuda:80", x=torch.empty(1025)[1:]),  # not aligned
        _pointwise("cuda:80", x=_empty(1024, dtype=torch.float16)),
        _pointwise("cuda:89"),
    ):
        assert "compiled again" in _check(other, tmp_path).problems[0]


def test_exit_status_and_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra: list[str] = []

    def shipped(target: Target, dtype: str) -> list[Shipped]:
        wrong = replace(_pointwise(target.name, 1000, kernel=_broken_kernel), name="wrong")
        return [_pointwise(target.name), _product(target.name), *([wrong] if extra else [])]

    monkeypatch.setattr(aot, "shipped_kernels", shipped)
    file = tmp_path / "rows.json"
    cache = ["--cache", str(tmp_path / "cache")]
    options = ["--targets", "cuda:80,hip:gfx942", "--dtypes", "bfloat16", "--json", str(file)]
    assert aot.main([*options, *cache]) == 0
    rows = json.loads(file.read_text())
    assert [(row["target"], row["kernel"]) for row in rows] == [
        (target, name) for target in ("cuda:80", "hip:gfx942") for name in ("normalise", "product")
    ]
    assert [list(row["code"]["tensor_core"]) for row in rows] == [[], ["HMMA"], [], ["MFMA"]]
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert output.endswith("4 kernels, 0 failed\n")

    extra.append("one that does not compile")
    assert aot.main([*options, *cache]) == 1
    output = capsys.readouterr().out
    assert "wrong, float32, cuda:80: it does not compile: " in output
    assert output.endswith("6 kernels, 2 failed\n")
    assert [len(row["problems"]) for row in json.loads(file.read_text())] == [0, 0, 1, 0, 0, 1]

    assert aot.main([*options, *cache, "--kernels", "norm,nothing"]) == 0
    assert capsys.readouterr().out.endswith("2 kernels, 0 failed\n")
    assert aot.main([*options, *cache, "--kernels", "nothing"]) == 2
    assert "no kernel's name has nothing" in capsys.readouterr().err

    monkeypatch.setattr(aot, "interpreting", lambda: True)
    assert aot.main([*options, *cache]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "cuda:70"], "target is 'cuda:70'; it must be one of cuda:75, cuda:80"),
        (["--targets", "cuda:80,sm_90"], "target is 'sm_90'"),
        (["--targets", "cuda:gfx942"], "target is 'cuda:gfx942'"),
        (["--targets", "hip:sm_90"], "target is 'hip:sm_90'"),
        (["--targets", "hip:90"], "target is 'hip:90'"),
        (["--targets", ","], "no target is named"),
        (["--dtypes", "bf16"], "it is 'bf16'; known are float32, float16, bfloat16"),
    ],
)
def test_bad_arguments(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        aot.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tools.compile", "tools.verify"])
def test_the_commands_run(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--targets", ","])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(command, run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"usage: python -m {command} " in error and "no target is named" in error


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared_bytes", "blocks"),
    [
        ("sm_80", 4, 128, 0, 4),  # 16 warps of 4096 registers
        ("sm_80", 4, 129, 0, 3),
        ("sm_80", 1, 129, 0, 12),  # 4352 registers a warp: 3 in each quarter, though 15 in all
        ("sm_90", 8, 128, 65536, 2),
        ("sm_90", 8, 255, 0, 1),
        ("sm_90", 4, 16, 0, 16),  # 64 warps
        ("sm_90", 1, 16, 0, 32),  # 32 blocks
        ("sm_90", 4, 32, 65536, 3),  # 3 x 65 KiB of 228
        ("sm_90", 4, 32, 227 * 1024, 1),
        ("sm_90", 4, 32, 227 * 1024 + 1, 0),
        ("sm_80", 4, 32, 81 * 1024, 2),
        ("sm_89", 4, 32, 50 * 1024, 1),
        ("sm_120", 4, 16, 0, 12),  # 48 warps
        ("sm_75", 4, 64, 32 * 1024, 2),
        ("gfx942", 4, 239, 32 * 1024, 2),
        ("gfx942", 4, 239, 33 * 1024, 1),
        ("gfx942", 4, 512, 0, 1),
        ("gfx942", 8, 512, 0, 0),
        ("gfx942", 8, 64, 0, 4),
        ("gfx950", 4, 128, 80 * 1024, 2),
    ],
)
def test_blocks_per_multiprocessor(
    arch: str, num_warps: int, registers: int, shared_bytes: int, blocks: int
) -> None:
    assert blocks_per_multiprocessor(arch, num_warps, registers, shared_bytes) == blocks


def test_tensor_memory_limits_blocks() -> None:
    assert [blocks_per_multiprocessor("sm_100", 4, 64, 0, c) for c in (128, 256, 512)] == [4, 2, 1]


AMD_LOOPS = """
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
\tglobal_load_dwordx4 v[6:9], v[4:5], off
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[34:35], v[68:69], v[2:17]
\ts_cbranch_execz .LBB0_4
; %bb.3:                                ;   in Loop: Header=BB0_2 Depth=2
\tglobal_load_ushort v1, v[2:3], off
\tbuffer_load_dword v2, v0, s[0:3], 0 offen
.LBB0_4:                                ;   in Loop: Header=BB0_2 Depth=2
\ts_cbranch_scc1 .LBB0_2
; %bb.5:                                ;   in Loop: Header=BB0_1 Depth=1
\ts_cbranch_vccnz .LBB0_1
; %bb.6:
\ts_cbranch_scc0 .LBB0_9
.LBB0_7:
\tv_mov_b32_e32 v1, v2
.LBB0_8:                                ; =>This Inner Loop Header: Depth=1
\tv_add_f32_e32 v1, v1, v1
\ts_cbranch_execnz .LBB0_8
; %bb.10:
\ts_endpgm
.LBB0_9:
\ts_nop 0
\ts_branch .LBB0_7
\t.amdhsa_kernel kernel
\t\t.amdhsa_next_free_vgpr 70
\t.end_amdhsa_kernel
    .vgpr_spill_count: 3
"""


def test_reading_amd_code() -> None:
    code = amdgcn.instructions(AMD_LOOPS)
    assert len(code) == 15
    assert [opcode for opcode, loop in code if loop == "BB0_2"] == [
        "v_mfma_f32_32x32x8_bf16",
        "s_cbranch_execz",
        "global_load_ushort",
        "buffer_load_dword",
        "s_cbranch_scc1",
    ]
    assert [opcode for opcode, loop in code if loop not in ("BB0_2", None)] == [
        "v_add_f32_e32",
        "s_cbranch_execnz",
    ]
    # Without the block of BB0_9, which branches back and is no loop.
    assert amdgcn.hot_loop(AMD_LOOPS) == 5
    other_way = AMD_LOOPS.replace("v_mfma_f32", "v_fma_f32").replace("v_add_f32", "v_mfma_f32")
    assert amdgcn.hot_loop(other_way) == 2
    # As many in both: the shorter. None in either: the longer.
    assert amdgcn.hot_loop(AMD_LOOPS.replace("v_add_f32", "v_mfma_f32")) == 2
    assert amdgcn.hot_loop(AMD_LOOPS.replace("v_mfma_f32", "v_fma_f32")) == 5
    assert amdgcn.hot_loop("\ts_nop 0\n\ts_endpgm\n") is None
    assert amdgcn.global_load_widths(Counter(opcode for opcode, _ in code)) == {
        128: 1,
        32: 1,
        16: 1,
    }
    assert amdgcn.resource_usage(AMD_LOOPS) == (70, 3)
    with pytest.raises(ValueError, match=r"does not say its \.vgpr_spill_count"):
        amdgcn.resource_usage(AMD_LOOPS.replace("vgpr_spill_count", "none"))


@pytest.mark.parametrize("name", QUICK_TENSOR_CORES)
def test_shipped_kernels(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = {kernel.name: kernel for kernel in shipped_kernels(Target.parse(name), "bfloat16")}
    rows = [check_kernel(shipped[quick], shipped, default_cache()) for quick in QUICK]
    with capsys.disabled():
        print("\n" + "\n".join(aot.table_line(row) for row in rows))
    assert [(row.kernel, row.problems) for row in rows if row.problems] == []
    for row in rows:
        assert row.code is not None
        multiplies = row.kernel.startswith(("shaw_attention", "linear"))
        assert list(row.code.products) == (["bfloat16"] if multiplies else [])
        assert list(row.code.tensor_core) == ([QUICK_TENSOR_CORES[name]] if multiplies else [])
    # Not one comparison fell out silently.
    far_loops = [row.far_loop for row in rows if row.kernel.endswith("relative_key")]
    assert len(far_loops) == 1 and far_loops[0] is not None


@pytest.mark.parametrize("name", ["cuda:80", "cuda:90"])
def test_convolution_loads(name: str) -> None:
    """Global loads for each output element, counted in the machine code."""
    shipped = {kernel.name: kernel for kernel in shipped_kernels(Target.parse(name), "bfloat16")}
    request = shipped["conv_norm_act_fwd/conv_norm_act"].request
    text = sass.disassemble(request.compiled().asm["cubin"])
    loop = sass.hot_loop(text)
    assert loop is not None

    def elements(opcodes: Any) -> int:
        return sum(n * bits // 16 for bits, n in sass.global_load_widths(opcodes).items())

    constants = request.constants
    turns = constants["K"] // constants["UNROLL"]
    of_thread = elements(sass.opcode_counts(text)) + (turns - 1) * elements(loop.opcodes)
    outputs = 2 ** constants["LOG_ROWS"] * constants["CHANNELS"]
    loads = of_thread * 32 * request.options["num_warps"] / outputs
    # One tap's row of x and of the weight is the least that the loop must hold.
    assert elements(loop.opcodes) >= 2 * constants["UNROLL"]
    assert 2 * 31 / 16 <= loads <= 6
