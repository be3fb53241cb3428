"""The verifier lane: kernels that are right, racy or broken, and those that ship."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tools.compile.machine_code import default_cache
from tools.compile.shipped import Shipped, shipped_kernels
from tools.compile.target import Target
from tools.verify import races
from tools.verify.races import Allowed, Row, verify_kernel
from tools.verify.small import small_launches
from tools.verify.stores import CannotFollow, Store, duplicate_stores, keep_one_thread
from tools.virtual_gpu.record import Argument
from tools.virtual_gpu.requests import Uncompiled, requests

needs_verifier = pytest.mark.skipif(not races.available(), reason="needs sentryward")

SM_80 = Target.parse("cuda:80")
A_DAY = 86_400.0
"""Seconds for proofs that take a few: the verdict is never that there was no time."""


@triton.jit
def _scale_kernel(x_ptr, out_ptr, length, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Doubles x; with SHARED every program writes the first block."""
    offsets = tl.arange(0, BLOCK)
    first = tl.program_id(0) * BLOCK
    mask = first + offsets < length
    x = tl.load(x_ptr + first + offsets, mask=mask)
    if SHARED:
        tl.store(out_ptr + offsets, 2 * x, mask=mask)
    else:
        tl.store(out_ptr + first + offsets, 2 * x, mask=mask)


def _scale(shared: bool, blocks: int = 2) -> Uncompiled:
    x = torch.zeros(200)
    with requests(SM_80.gpu) as found:
        _scale_kernel[(blocks,)](x, x, 200, SHARED=shared, BLOCK=128)
    return found[0]


def _verify(launch: Uncompiled, cache: Path, timeout: float = A_DAY) -> Row:
    return verify_kernel(Shipped(launch.name, "float32", SM_80, launch), launch, cache, timeout)


HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(
	.param .u64 .ptr .global .align 4 k_param_0,
	.param .u32 k_param_1
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b32 %r<30>;
	.reg .b64 %rd<9>;
	.shared .align 4 .b8 smem[1024];
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b32 %r20, [k_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b32 %r2, [%rd3];
	and.b32 %r3, %r1, 62;
	shl.b32 %r4, %r3, 1;
	mov.b32 %r5, smem;
	add.s32 %r6, %r5, %r4;
"""
TAIL = "\tret;\n}\n"
REDUCED = "\tshfl.sync.bfly.b32 %r7, %r2, 1, 31, -1;\n\tadd.f32 %r8, %r2, %r7;\n"


def _compiled(monkeypatch: pytest.MonkeyPatch, ptx: str) -> Uncompiled:
    """A launch whose compiled form is this PTX."""
    kernel = SimpleNamespace(asm={"ptx": ptx}, metadata=SimpleNamespace(shared=0))
    monkeypatch.setattr(Uncompiled, "compiled", lambda launch: kernel)
    arguments = [Argument("x_ptr", "*fp32", torch.zeros(64)), Argument("n", "i32", 3)]
    return replace(_scale(False), kernel="t:k", grid=(1, 1, 1), arguments=arguments)


@needs_verifier
def test_a_good_kernel_is_proved_and_a_racy_one_refuted(tmp_path: Path) -> None:
    row = _verify(_scale(False), tmp_path)
    assert (row.state, row.reason, row.failed) == ("proved", "", False)
    row = _verify(_scale(True), tmp_path)
    assert (row.state, row.allowed, row.failed) == ("refuted", False, True)
    assert row.reason.startswith("conflicting_accesses_unordered")
    assert "test_verify.py:" in row.reason
    assert row.duplicates == ()


@needs_verifier
def test_a_missing_barrier_is_refuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = """
	shl.b32 %r9, %r1, 2;
	add.s32 %r10, %r5, %r9;
	st.shared.b32 [%r10], %r2;
	{barrier}
	xor.b32 %r11, %r9, 128;
	add.s32 %r12, %r5, %r11;
	ld.shared.b32 %r13, [%r12];
	st.global.b32 [%rd3], %r13;
"""
    right = HEAD + exchange.replace("{barrier}", "bar.sync 0;") + TAIL
    assert _verify(_compiled(monkeypatch, right), tmp_path).state == "proved"
    wrong = HEAD + exchange.replace("{barrier}", "") + TAIL
    row = _verify(_compiled(monkeypatch, wrong), tmp_path)
    assert row.state == "refuted" and row.failed


@needs_verifier
@pytest.mark.parametrize("listed", [True, False])
def test_a_duplicate_store_must_be_of_one_value_and_listed(
    listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (Allowed("k", ("cuda:80",), "two lanes hold one sum"),) if listed else ()
    monkeypatch.setattr(races, "ALLOWED", entries)
    store = "\tst.shared.b32 [%r6], {value};\n"

    same = HEAD + REDUCED + store.replace("{value}", "%r8") + TAIL
    row = _verify(_compiled(monkeypatch, same), tmp_path)
    assert (row.state, row.allowed, row.failed) == ("refuted", listed, not listed)
    assert len(row.duplicates) == 1

    # Each lane's own value, under the same name and so no less listed.
    other = HEAD + REDUCED + store.replace("{value}", "%r2") + TAIL
    row = _verify(_compiled(monkeypatch, other), tmp_path)
    assert row.state == "refuted" and row.failed
    assert row.duplicates == () and "the values were not shown to be equal" in row.reason

    # A duplicate store does not hide a race beside it.
    both = HEAD + REDUCED + store.replace("{value}", "%r8")
    both += "\tst.global.b32 [%rd1], %r1;\n" + TAIL
    row = _verify(_compiled(monkeypatch, both), tmp_path)
    assert row.state == "refuted" and row.failed


@needs_verifier
def test_control_flow_that_depends_on_data_is_not_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptx = HEAD + "\tsetp.eq.s32 %p1, %r2, 0;\n\t@%p1 bra $L_end;\n\tbar.sync 0;\n$L_end:\n" + TAIL
    row = _verify(_compiled(monkeypatch, ptx), tmp_path)
    assert (row.state, row.failed) == ("not decided", False)
    assert row.reason.startswith("control_predicate_not_static")


def test_duplicate_stores_are_found_and_thinned_out() -> None:
    store = "\tst.shared.b32 [ %r6 + 0 ], %r8;\n"
    for barred, expected in (
        (HEAD + REDUCED + store + TAIL, Store),
        (HEAD + REDUCED.replace("add.f32", "sub.f32") + store + TAIL, str),
        (
            HEAD + REDUCED.replace("bfly.b32 %r7, %r2, 1", "bfly.b32 %r7, %r2, 2") + store + TAIL,
            str,
        ),
        # Added up over lanes 0 and 1, and over 2 and 3, is not the same sum.
        (HEAD + REDUCED + store.replace("%r6", "%r5") + TAIL, str),
    ):
        found = duplicate_stores(barred, (1, 1, 1), 64, {"k_param_1": 3}, {})
        (answer,) = found.values()
        assert isinstance(answer, expected)
    ptx = HEAD + REDUCED + store + TAIL
    found = duplicate_stores(ptx, (1, 1, 1), 64, {"k_param_1": 3}, {})
    ((line, answer),) = found.items()
    assert answer == Store(line, mask=1) and "st.shared" in ptx.splitlines()[line - 1]
    thinned = keep_one_thread(ptx, [answer])
    assert thinned.count("\n") == ptx.count("\n")
    assert duplicate_stores(thinned, (1, 1, 1), 64, {"k_param_1": 3}, {}) == {}


@pytest.mark.parametrize("special", ["%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.y"])
def test_all_blocks_of_a_grid_are_followed(special: str) -> None:
    """Lanes store a sum of their own in some blocks and one value in the others."""
    own = f"""
	mov.u32 %r9, {special};
	setp.gt.s32 %p1, %r9, {1 if "n" in special else 0};
	@%p1 mov.b32 %r8, %r2;
"""
    ptx = HEAD + REDUCED + own + "\tst.shared.b32 [%r6], %r8;\n" + TAIL
    for grid, expected in (((1, 1, 1), Store), ((2, 2, 2), str)):
        (answer,) = duplicate_stores(ptx, grid, 64, {"k_param_1": 3}, {}).values()
        assert isinstance(answer, expected), grid


@pytest.mark.parametrize(("address", "expected"), [("%r6", Store), ("%r7", str)])
def test_one_address_of_shared_memory_holds_one_value(address: str, expected: type) -> None:
    """%r6 is one address for lanes 2 i and 2 i + 1, %r7 one for each lane."""
    loads = f"""
	shl.b32 %r9, %r1, 2;
	add.s32 %r7, %r5, %r9;
	ld.shared.b32 %r8, [{address}];
	bar.sync 0;
	st.shared.b32 [%r6], %r8;
"""
    (answer,) = duplicate_stores(HEAD + loads + TAIL, (1, 1, 1), 64, {"k_param_1": 3}, {}).values()
    assert isinstance(answer, expected)


def test_loops_and_branches_are_followed() -> None:
    loop = """
	mov.b32 %r9, 0;
	mov.b32 %r10, %r2;
$L_loop:
	shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;
	max.f32 %r10, %r10, %r11;
	add.s32 %r9, %r9, 1;
	setp.lt.s32 %p1, %r9, %r20;
	@%p1 bra $L_loop;
	setp.lt.f32 %p2, %r10, 0f00000000;
	@%p2 bra $L_skip;
	mul.f32 %r10, %r10, %r10;
$L_skip:
	st.shared.b32 [%r6], %r10;
"""
    found = duplicate_stores(HEAD + loop + TAIL, (1, 1, 1), 64, {"k_param_1": 3}, {})
    (answer,) = found.values()
    assert isinstance(answer, Store)
    # Without its value, the length of the loop is not known.
    with pytest.raises(CannotFollow, match="the branch in line"):
        duplicate_stores(HEAD + loop + TAIL, (1, 1, 1), 64, {}, {})


@needs_verifier
def test_proofs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _verify(_scale(False), tmp_path)

    def ask_again(*_: object) -> Any:
        raise RuntimeError("asked again")

    monkeypatch.setattr(races, "_ask", ask_again)
    assert _verify(_scale(False), tmp_path) == first
    with pytest.raises(RuntimeError, match="asked again"):
        _verify(_scale(False, blocks=3), tmp_path)


@needs_verifier
def test_a_proof_that_lacked_time_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []

    def ask(ptx: str, config: object, timeout: float) -> dict[str, Any]:
        times.append(timeout)
        return {"result": "timeout", "diagnostics": [{"code": "time_budget"}]}

    monkeypatch.setattr(races, "_ask", ask)
    for timeout in (10.0, 10.0, 5.0, 20.0):
        row = _verify(_scale(False), tmp_path, timeout)
        assert (row.state, row.reason) == ("not decided", "time_budget")
    assert times == [10.0, 20.0]


def test_a_kernel_without_a_launch_is_not_decided(tmp_path: Path) -> None:
    kernel = Shipped("k", "float32", SM_80, _scale(False))
    row = verify_kernel(kernel, None, tmp_path)
    assert (row.state, row.reason) == ("not decided", "no launch is given for it")
    row = verify_kernel(replace(kernel, target=Target.parse("hip:gfx942")), None, tmp_path)
    assert (row.state, row.reason) == ("not decided", "the verifier reads PTX")


def test_exit_status_and_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "right": Row("cuda:80", "bfloat16", "right", "proved", "", 1.0, (), False),
        "open": Row("cuda:80", "bfloat16", "open", "not decided", "wgmma", 1.0, (), False),
        "same": Row("cuda:80", "bfloat16", "same", "refuted", "x", 1.0, ("a.py:1",), True),
        "racy": Row("cuda:80", "bfloat16", "racy", "refuted", "race", 1.0, (), False),
    }
    shipped = Shipped("right", "bfloat16", SM_80, _scale(False))
    kernels = [replace(shipped, name=name) for name in ("right", "open", "same")]
    monkeypatch.setattr(races, "available", lambda: True)
    monkeypatch.setattr(races, "shipped_kernels", lambda target, dtype: kernels)
    monkeypatch.setattr(races, "small_launches", lambda target, dtype: {})
    monkeypatch.setattr(races, "verify_kernel", lambda kernel, *_: rows[kernel.name])
    file = tmp_path / "rows.json"
    options = ["--targets", "cuda:80", "--dtypes", "bfloat16", "--json", str(file)]
    assert races.main(options) == 0
    output = capsys.readouterr().out
    assert output.endswith("3 questions: 1 proved, 1 refuted (1 of them allowed), 1 not decided\n")
    assert "same, bfloat16, cuda:80: a.py:1" in output
    assert [row["state"] for row in json.loads(file.read_text())] == [
        "proved", "not decided", "refuted",
    ]  # fmt: skip
    kernels.append(replace(shipped, name="racy"))
    assert races.main(options) == 1
    assert "4 questions: 1 proved, 2 refuted (1 of them allowed)" in capsys.readouterr().out
    assert races.main([*options, "--kernels", "nothing"]) == 2
    monkeypatch.setattr(races, "available", lambda: False)
    assert races.main(options) == 2
    assert "needs sentryward" in capsys.readouterr().err
    monkeypatch.setattr(races, "interpreting", lambda: True)
    assert races.main(options) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_bad_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-1", "soon", "inf"):
        with pytest.raises(SystemExit) as stop:
            races.main(["--timeout", text])
        assert stop.value.code == 2
        assert "it must be a number above 0" in capsys.readouterr().err


@needs_verifier
@pytest.mark.parametrize(
    ("name", "state", "allowed"),
    [
        ("norm_fwd/residual_layer_norm", "proved", False),
        ("ctc_argmax/word_pieces", "proved", False),
        ("ctc_argmax/characters", "refuted", True),
    ],
)
def test_shipped_kernels(name: str, state: str, allowed: bool) -> None:
    (kernel,) = [k for k in shipped_kernels(SM_80, "bfloat16") if k.name == name]
    launch = small_launches(SM_80, "bfloat16")[kernel.request.key]
    row = verify_kernel(kernel, launch, default_cache(), A_DAY)
    assert (row.state, row.allowed) == (state, allowed), row.reason
