"""Launch plans: a second call does what the first did, and none where what was assumed has changed.

The kernels' plans run on the virtual GPU's driver without executing anything: what counts is which
kernel is launched, on what.
"""

from __future__ import annotations

from tests.helpers.scripts import run_compiled

PRELUDE = """
import functools, threading
import torch, triton
import triton.language as tl
from torch import nn
from triton import knobs
from csrc_triton import architectures, plans
from csrc_triton.gemm import config as tiles, linear
from csrc_triton.gemm.forward import _launch
from csrc_triton.norm import residual_layer_norm
from tools.virtual_gpu.driver import activated

launches = []
slow = []


def counted(launcher):
    @functools.wraps(launcher)
    def run(*args):
        slow.append(args)
        return launcher(*args)
    return plans.planned(run)


from csrc_triton.gemm import forward
forward._launch = counted(forward._launch.__wrapped__)


def call(*args, **keywords):
    '''Whether it went by a plan, and what was launched.'''
    before = len(slow)
    launches.clear()
    out = linear(*args, **keywords)
    return len(slow) == before, [launch.described() for launch in launches], out


x, w, b = torch.ones(20, 64), torch.ones(32, 64), torch.ones(32)
"""


def run(script: str) -> None:
    run_compiled(PRELUDE + script)


def test_a_plan_serves_arguments_like_those_and_no_others() -> None:
    run("""
with activated("sm_90", launches.append):
    planned, first, out = call(x, w, b, "silu")
    assert not planned and len(first) == 1
    other = [torch.zeros_like(t) for t in (x, w, b)]
    planned, second, again = call(*other, "silu")
    assert planned and second == first and again is not out and again.shape == (20, 32)
    assert launches[0].arguments[0].value is other[0] and launches[0].arguments[3].value is again
    assert call(x, nn.Parameter(w), b, "silu")[0]

    square = torch.ones(256, 256).half()
    many = torch.ones(9000, 256).half()
    unaligned = torch.ones(20 * 64 + 1)[1:].view(20, 64)
    wide = torch.ones(20, 80)[:, :64]
    odd = torch.ones(20, 67)[:, :64]
    changed = {
        "dtype": (x.half(), w.half(), b.half(), "silu"),
        "alignment": (unaligned, w, b, "silu"),
        "stride": (wide, w, b, "silu"),
        "stride, no multiple of 16": (odd, w, b, "silu"),
        "tokens": (torch.ones(21, 64), w, b, "silu"),
        "few tokens": (many[:20], square, None, "silu"),
        "many tokens, of larger tiles": (many, square, None, "silu"),
        "one token": (torch.ones(1, 64), w, b, "silu"),
        "no token": (torch.ones(0, 64), w, b, "silu"),
        "shape": (x, torch.ones(16, 64), torch.ones(16), "silu"),
        "no bias": (x, w, None, "silu"),
        "activation": (x, w, b, "gelu"),
    }
    for name, args in changed.items():
        planned, found, _ = call(*args)
        assert not planned, name
        assert call(*args)[:2] == (True, found), name
        plans.forget()
        assert call(*args)[:2] == (False, found), name  # what Triton itself would launch
    hints = [call(*changed[name])[1][0]["hints"] for name in ("alignment", "stride")]
    assert "x_ptr" not in hints[0] and "x_ptr" in hints[1]
    hints = [call(*changed[n])[1][0]["hints"] for n in ("stride", "stride, no multiple of 16")]
    assert "stride_x_row" in hints[0] and "stride_x_row" not in hints[1]
    names = ("few tokens", "many tokens, of larger tiles")
    small, large = (call(*changed[name])[1][0]["constants"]["BLOCK_M"] for name in names)
    assert small < large
""")


def test_what_does_not_fit_is_refused_beside_a_plan() -> None:
    run("""
with activated("sm_80", launches.append):
    for _ in range(2):
        call(x, w, b)
    for wrong, said in (
        ((x, w.half(), b), "weight is torch.float16"),
        ((x, w.t().contiguous().t(), b), "last dimension must be contiguous"),
        ((x, w.to("meta"), b), "weight is on meta"),
        ((x, w, b, "no such"), "activation is 'no such'"),
    ):
        for _ in range(2):
            try:
                call(*wrong)
            except ValueError as error:
                assert said in str(error), error
            else:
                raise AssertionError(wrong)
    assert call(x, w, b)[0]
""")


def test_results_that_are_given_are_written_and_returned() -> None:
    run("""
with activated("sm_80", launches.append):
    for _ in range(2):
        out = torch.empty(20, 32)
        planned, _, found = call(x, w, b, out=out)
        assert found is out and launches[0].arguments[3].value is out
    assert planned
    # A configuration of the caller's is never planned.
    config = tiles.linear_candidates(torch.float32, "sm_80")[0]
    assert not any(call(x, w, b, config=config)[0] for _ in range(2))
    norm = (torch.ones(64), torch.ones(64), 1e-5)
    for _ in range(2):
        launches.clear()
        y, z = residual_layer_norm(x, x, 0.5, *norm)
        values = {a.name: a.value for a in launches[0].arguments}
        assert values["sum_ptr"] is y and values["first_ptr"] is z and y is not z
        assert values["scale"] == 0.5
    residual_layer_norm(x, x, 1.0, *norm)
    assert {a.name: a.value for a in launches[1].arguments}["scale"] == 1.0
""")


def test_a_tensor_that_is_given_twice_may_be_two_the_next_time() -> None:
    run("""
from csrc_triton.gemm import epilogue_backward

norm = (torch.ones(64), torch.ones(64), 1e-5)
with activated("sm_80", launches.append):
    for residual in (x, torch.zeros(20, 64), x):
        launches.clear()
        residual_layer_norm(residual, x, 0.5, *norm)
        values = {a.name: a.value for a in launches[0].arguments}
        assert values["residual_ptr"].data_ptr() == residual.data_ptr()
        assert values["x_ptr"].data_ptr() == x.data_ptr()
    grad, y, other = (torch.ones(20, 64) for _ in range(3))
    for out in (y, other, grad, y):
        launches.clear()
        dy, _ = epilogue_backward(grad, y, "silu", out=out)
        values = {a.name: a.value for a in launches[0].arguments}
        assert dy is out and values["dy_ptr"].data_ptr() == out.data_ptr()
        assert values["y_ptr"].data_ptr() == y.data_ptr()
""")


def test_drivers_settings_and_hooks() -> None:
    run("""
with activated("sm_80", launches.append):
    call(x, w)
    assert call(x, w)[0]
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        planned, found, _ = call(x, w)
        assert not planned and found[0]["options"]["debug"]
    assert call(x, w)[0]

    seen = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(seen.append)
        assert not any(call(x, w)[0] for _ in range(2))
        chain.remove(seen.append)
        assert call(x, w)[0]
    assert len(seen) == 4

    knobs.runtime.add_stages_inspection_hook = lambda *a: ("key", "hash")
    assert not call(x, w)[0]
    knobs.runtime.add_stages_inspection_hook = None
    assert call(x, w)[0]
with activated("sm_90", launches.append):
    planned, found, _ = call(x, w)
    assert not planned and found[0]["target"] == "sm_90"
    assert call(x, w)[0]

    # The current device is another one, and another stream is current.
    driver = triton.runtime.driver.active
    here = current = driver.get_current_device()
    asked, entered = [], []
    driver.get_current_stream = lambda device: asked.append(device) or 7
    driver.get_current_device = lambda: current
    plans.forget()
    call(x, w)
    asked.clear()
    assert call(x, w)[0] and asked == [here]

    class Device:
        def __init__(self, index):
            entered.append(index)
        def __enter__(self):
            global current
            current = here
        def __exit__(self, *error):
            pass

    current = ("sm_90", -1)
    torch.cuda.device = Device
    assert call(x, w)[0] and entered == [here]
""")


def test_only_so_many_plans_are_kept_and_other_tensors_have_none() -> None:
    run("""
class Special(torch.Tensor):
    pass


with activated("sm_80", launches.append):
    plans.MOST_PLANS = 3
    for tokens in (1, 2, 3):
        call(torch.ones(tokens, 64), w)
    assert call(torch.ones(1, 64), w)[0]
    call(torch.ones(4, 64), w)
    assert not call(torch.ones(1, 64), w)[0]
    special = x.as_subclass(Special)
    assert not any(call(special, w)[0] for _ in range(2))


@plans.planned
def with_a_view(x):
    from tests.tools.virtual_gpu.scripts.vector_addition import add_kernel

    out = plans.empty((3,), x.dtype, x.device)
    plans.launch(add_kernel, (1,), x[1:], x, out, 3, BLOCK=4)


with activated("sm_80", launches.append):
    for start in (1.0, 2.0):  # of a view nobody could know whose it is
        launches.clear()
        given = torch.full((4,), start)
        with_a_view(given)
        assert launches[0].arguments[0].value[0] == start
""")


def test_a_measured_tile_is_taken_and_plans_from_before_it_are_dropped() -> None:
    run("""
from csrc_triton.gemm import linear_glu, measured
half, weight = torch.ones(20, 64).half(), torch.ones(32, 64).half()
tiles_of = tiles.linear_candidates(torch.float16, "sm_90")
asked = []


def find(device, product):
    asked.append((device, product))
    return tiles_of[1] if product.epilogue in ("identity", "glu") else None


with activated("sm_90", launches.append):
    _, (predicted,), _ = call(half, weight)
    assert call(half, weight)[0]
    measured.use(find)
    planned, (found,), _ = call(half, weight)
    assert not planned and found["constants"]["BLOCK_M"] == tiles_of[1].block_m
    assert found["constants"] != predicted["constants"]
    assert call(half, weight)[:2] == (True, [found]) and len(asked) == 1
    assert asked[0] == (half.device, measured.Product(20, 32, 64, torch.float16, "identity"))
    _, (silu,), _ = call(half, weight, None, "silu")
    assert silu["constants"]["BLOCK_M"] == predicted["constants"]["BLOCK_M"]
    linear_glu(half, weight)
    assert asked[-1][1].epilogue == "glu"
    call(half, weight, None, config=tiles_of[0])
    assert len(asked) == 3  # a caller's own tile is taken as it is
    measured.use(None)
    assert call(half, weight)[:2] == (False, [predicted])
""")


def test_attention_backward_is_planned_also_where_heads_share_scratch_memory() -> None:
    run("""
from dataclasses import replace
from csrc_triton.attention import backward, build_tile_map, shaw_attention_backward
from csrc_triton.attention.config import attention_backward_config

backward._launch = counted(backward._launch.__wrapped__)


def arguments():
    shapes = ((20, 4, 16),) * 5 + ((4, 20),)
    tensors = [torch.ones(shape) for shape in shapes]
    return *tensors, torch.tensor([0, 20], dtype=torch.int32)


def backward_of(given, limit=None):
    distances = torch.ones(7, 16)
    config = attention_backward_config(16, torch.float32, "sm_80", has_dropout=False)
    if limit is not None:
        backward.attention_backward_config = lambda *a, **k: replace(config, scratch_limit=limit)
    slow.clear()
    launches.clear()
    tiles = build_tile_map(given[-1], config.tile, num_tokens=20, max_seqlen=20)
    out = tuple(torch.empty(20, 4, 16) for _ in range(3))
    _, _, _, found = shaw_attention_backward(
        *given, 20, distance_embedding=distances, left_max_position=4, right_max_position=2,
        tile_map=tiles, out=out,
    )
    values = [{a.name: a.value for a in launch.arguments} for launch in launches]
    for value in values:
        assert value.get("q_ptr", given[1]) is given[1]
        assert value.get("dq_ptr", out[0]) is out[0] and value.get("dk_ptr", out[1]) is out[1]
        scores = value.get("scratch_ptr", value.get("scores_ptr"))
        assert scores is None or scores.storage_offset() > 0  # memory in front may be read
    assert found.shape == (7, 16)
    return len(slow), [launch.described() for launch in launches]


with activated("sm_80", launches.append):
    slowly, first = backward_of(arguments())
    assert slowly == 1 and len(first) == 5
    assert backward_of(arguments()) == (0, first)
    plans.forget()
    slowly, each = backward_of(arguments(), limit=1)
    assert slowly == 4 and len(each) == 20
    assert backward_of(arguments(), limit=1) == (0, each)
""")


def test_tritons_function_in_c_is_called_as_triton_calls_it() -> None:
    """Triton's own launcher, over a driver that does nothing."""
    run("""
from triton.backends.nvidia.driver import CudaLauncher
from tools.virtual_gpu.host import host_driver

passed, ran = [], []
run_it = CudaLauncher.__call__


@functools.wraps(run_it)
def counting(launcher, *args):
    ran.append(launcher)
    run_it(launcher, *args)


CudaLauncher.__call__ = counting
with host_driver("sm_80") as reached:
    utils = triton.runtime.driver.active.utils
    launch = utils.launch
    utils.launch = lambda *args: passed.append(args) or launch(*args)

    def calls():
        '''Of two calls, the second by a plan: how often Triton's Python ran, and what reached C.'''
        plans.forget()
        found = []
        for is_planned in (False, True):
            passed.clear(), ran.clear()
            assert call(x, w, b, "silu")[0] == is_planned
            ((*others, arguments),) = passed
            del others[8:11]  # metadata of the launch, and two hooks, which are empty
            shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in arguments]
            found.append((len(ran), [*others, shapes]))
        return found

    (usual, first), (planned, second) = calls()
    assert usual == 2 and planned == 0 and first == second and reached() == 2
    (kernel,) = forward._linear_kernel.device_caches[0][0].values()
    sizes = []
    allocate = lambda size, alignment, stream: sizes.append(size) or torch.empty(size)
    triton.set_allocator(allocate)
    kernel.run.global_scratch_size = 64  # new for every launch
    (usual, first), (planned, second) = calls()
    assert (usual, planned, len(sizes), len(first)) == (1, 1, 2, len(second))
""")
