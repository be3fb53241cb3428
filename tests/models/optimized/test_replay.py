"""Layers by recorded launches: the same answers, and none where what was assumed has changed."""

from __future__ import annotations

from tests.helpers.scripts import run_compiled

PRELUDE = """
import copy, gc, sys, weakref
from dataclasses import replace
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from csrc_triton import plans
from csrc_triton.script import Recording
from tools.virtual_gpu.driver import activated
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.model import Wav2Vec2BertModel
from w2vbert_fast.models.optimized import replay
from w2vbert_fast.ops import repeated
from w2vbert_fast.ops.dispatch import force_triton

recorded = []


def told(record):
    def recording(*given):
        found, made = record(*given)
        recorded.append(found is not None)
        return found, made

    return recording


repeated._record = told(repeated._record)
repeated._record_with_gradient = told(repeated._record_with_gradient)


def encoder_of(layers=3, **changes):
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        num_hidden_layers=layers, hidden_size=16, intermediate_size=16, num_attention_heads=1,
        output_hidden_size=16, left_max_position_embeddings=4, right_max_position_embeddings=2,
        conv_depthwise_kernel_size=3, **{"layerdrop": 0.0, **changes},
    )
    model = Wav2Vec2BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.use_fast_kernels = True
    return model.encoder


def batch(*lengths):
    return PackedBatch.from_lengths(lengths, max(lengths), "cpu")


layout = batch(5, 3)
x = torch.randn(8, 16)


def forward(encoder, x=x, layout=layout, maps=False):
    '''Output, and for each layer whether it was recorded and whether that can be repeated.'''
    recorded.clear()
    output = encoder.run_layers(x, layout, set(), maps, None)[0]
    return output, list(recorded)
"""


def run(script: str) -> None:
    run_compiled(PRELUDE + script)


EXECUTED = """
from torch.utils._python_dispatch import _disable_current_modes
from tools.virtual_gpu.executor import Executor
from tools.virtual_gpu.global_memory import Checks

# A buffer's other parts are not written by this launch, and nobody knows which is scratch memory.
execute = Executor(Checks(races=False, written_once=False, written_whole=False, garbage=False))
numbers = []


def execute_at(launch):
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]

    def tensor_at(argument):
        if not argument.type.startswith("*") or not isinstance(argument.value, int):
            return argument
        numbers.append(argument.value)
        for tensor in alive:
            start = tensor.data_ptr()
            if start <= argument.value < start + tensor.nbytes:
                view = tensor.untyped_storage()
                view = torch.tensor([], dtype=torch.uint8).set_(view)
                return replace(argument, value=view[argument.value - view.data_ptr():])
        raise AssertionError(argument)

    with _disable_current_modes():  # what executes a launch is no operation of the layer
        execute(replace(launch, arguments=[tensor_at(a) for a in launch.arguments]))
"""


def test_repeated_launches_give_the_same_bits() -> None:
    """On the virtual GPU, where memory is what was allocated and nothing else."""
    run(
        EXECUTED
        + """
with activated("sm_80", execute_at) as driver, force_triton(), torch.inference_mode():
    driver.takes_addresses = True
    encoder = encoder_of()
    first, found = forward(encoder)
    assert found == [True, True], found  # the second layer is as the first, the last is not
    assert numbers  # so it was by addresses
    plans.forget()
    numbers.clear()
    driver.takes_addresses = False
    plain, found = forward(encoder)
    assert found == [False, False] and not numbers
    assert torch.equal(first, plain)
    driver.takes_addresses = True
    plans.forget()
    forward(encoder)
    numbers.clear()
    kept = first.clone()
    again, found = forward(encoder, x.clone())
    assert not found and numbers and torch.equal(again, first)
    for weight in encoder.parameters():
        weight.mul_(1.5)  # is read where it lies
    numbers.clear()
    output, states, _ = encoder.run_layers(x, layout, {1, 3}, False, None)
    assert len(recorded) == 0 and numbers
    driver.takes_addresses = False
    plans.forget()
    usual, usual_states, _ = encoder.run_layers(x, layout, {1, 3}, False, None)
    assert torch.equal(output, usual) and not torch.equal(output, first)
    assert torch.equal(first, kept) and torch.equal(again, kept)  # nobody wrote there
    assert all(torch.equal(states[i], usual_states[i]) for i in (1, 3))
"""
    )


def test_a_repeated_training_step_gives_the_same_bits() -> None:
    """Two forward passes, then both backward: dropout, gradients that add up, one of no contiguous
    memory and one of no tokens but the first."""
    run(
        EXECUTED
        + """
def step(encoder):
    torch.manual_seed(1)
    inputs = [torch.randn(8, 16, requires_grad=True) for _ in range(2)]
    outputs = [encoder.run_layers(x, layout, set(), False, None)[0] for x in inputs]
    outputs[0].sum().backward()
    with torch.autocast("cpu", torch.bfloat16):  # which is of no concern to a gradient
        outputs[1][:1].square().sum().backward()
    made = [*outputs, *[x.grad for x in inputs], *[p.grad for p in encoder.parameters()]]
    for parameter in encoder.parameters():
        parameter.grad = None
    return made


with activated("sm_80", execute_at) as driver, force_triton():
    dropouts = {"attention_dropout": 0.25, "conformer_conv_dropout": 0.25, "hidden_dropout": 0.25}
    encoder = encoder_of(2, **dropouts).train()
    encoder.layers[1].ffn2.requires_grad_(False)
    plain = step(encoder)
    assert not any(recorded) and not numbers
    recorded.clear()
    plans.forget()
    driver.takes_addresses = True
    found = step(encoder)
    assert recorded == [True] * 2 and numbers  # the second pass repeats what the first recorded
    for one, other in zip(found, plain, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert sum(one is None for one in found) == 4
"""
    )


def test_a_repeated_step_of_mixed_precision_gives_the_same_bits() -> None:
    """Under autocast, its loss scaled."""
    run(
        EXECUTED
        + """
def step(encoder, scaler):
    torch.manual_seed(1)
    given = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder.run_layers(given, layout, set(), False, None)[0]
    scaler.scale(output.float().square().sum()).backward()
    made = [output, given.grad, *[parameter.grad for parameter in encoder.parameters()]]
    for parameter in encoder.parameters():
        parameter.grad = None
    return made


with activated("sm_80", execute_at) as driver, force_triton():
    encoder = encoder_of(1, conformer_conv_dropout=0.25).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plain = step(encoder, scaler)
    assert not any(recorded) and not numbers
    assert plain[1].any() and all(torch.isfinite(grad).all() for grad in plain)
    driver.takes_addresses = True
    plans.forget()
    recorded.clear()
    for found in (step(encoder, scaler), step(encoder, scaler)):
        for one, other in zip(found, plain, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert recorded == [True] and numbers
"""
    )


WHAT = """
launches = []


def what(encoder, x=x, layout=layout):
    '''The output's launches: kernels, grids, numbers, and which of what was given is read where.'''
    launches.clear()
    recorded.clear()
    output = encoder.run_layers(x, layout, set(), False, None)[0]
    if output.requires_grad:
        output.sum().backward()
        for parameter in encoder.parameters():
            parameter.grad = None
    given = {t.data_ptr() for t in (x, layout.cu_seqlens, *encoder.parameters())}

    def value_of(argument):
        value = argument.value
        if argument.type.startswith("*") and value is not None:
            address = value if isinstance(value, int) else value.data_ptr()
            return argument.type, address if address in given else "memory"
        return value

    return [
        (r.kernel, r.grid, r.constants, r.hints, [value_of(a) for a in r.arguments])
        for r in launches
    ]


def ordinary(encoder, *given):
    driver.takes_addresses = False
    plans.forget()
    found = what(encoder, *given)
    driver.takes_addresses = True
    plans.forget()
    return found


def by_addresses():
    return any(
        isinstance(a.value, int) for launch in launches for a in launch.arguments
        if a.type.startswith("*")
    )
"""


def test_layers_that_are_alike_share_what_was_recorded_and_others_do_not() -> None:
    run(
        WHAT
        + """
with activated("sm_90", launches.append) as driver, force_triton(), torch.inference_mode():
    encoder = encoder_of()
    usual = ordinary(encoder)
    assert what(encoder) == usual and recorded == [True, True]  # the last layer is another kind
    assert what(encoder) == usual and recorded == [] and by_addresses()
    other = encoder_of()  # another model of this kind
    repeated = what(other)
    assert recorded == [] and by_addresses()
    assert repeated == ordinary(other)
    what(encoder)
    unaligned = torch.randn(8 * 16 + 1)[1:].view(8, 16)
    for given in (
        (torch.randn(9, 16), batch(5, 4)),
        (torch.randn(8, 16), batch(5, 2, 1)),
        (torch.randn(8, 16), batch(6, 2)),
        (unaligned, layout),
        (x, replace(layout, seqused_k=torch.tensor([4, 3], dtype=torch.int32))),
    ):
        what(encoder)
        found = what(encoder, *given)
        assert recorded and found == what(encoder, *given) and not recorded
        assert found == ordinary(encoder, *given)

    first = encoder.layers[0]
    linear, norm = first.ffn1.output_dense, first.ffn2_layer_norm
    key = first.self_attn.linear_k.weight

    changes = {
        "an attribute": lambda: setattr(norm, "eps", 1e-3),
        "an activation": lambda: setattr(first.ffn1, "activation", "relu"),
        "a parameter": lambda: setattr(norm, "weight", nn.Parameter(norm.weight.detach().clone())),
        "no parameter": lambda: setattr(linear, "bias", None),
        "memory": lambda: setattr(norm.weight, "data", norm.weight.detach().clone()),
        "projections that no longer follow each other": lambda: setattr(key, "data", key.clone()),
        "a child": lambda: setattr(first, "conv_module", copy.deepcopy(first.conv_module)),
        "strides": lambda: setattr(linear.weight, "data", wide()),
        "strides alone": lambda: setattr(linear.weight, "data", overlapping()),
        "kernels that are off": lambda: setattr(first.ffn2, "use_fast_kernels", False),
    }

    def wide():
        return torch.randn(16, 32)[:, :16]

    def overlapping():
        return linear.weight.detach().as_strided((16, 16), (8, 1))

    for name, change in changes.items():
        what(encoder)
        what(encoder)
        assert not recorded
        change()
        found = [what(encoder) for _ in range(2)]
        assert found == [ordinary(encoder)] * 2, name

    def outcome(see):
        '''Launches, or what is wrong.'''
        try:
            return see(encoder)
        except (ValueError, RuntimeError) as error:
            return str(error)

    for part in (norm.weight.detach().view(torch.bfloat16)[:16], norm.weight.detach()[:8]):
        what(encoder)
        whole, norm.weight.data = norm.weight.data, part  # another dtype or shape, all else equal
        found = outcome(what)
        assert recorded or isinstance(found, str)
        assert found == outcome(ordinary)
        driver.takes_addresses = True
        norm.weight.data = whole
    encoder.half()
    half = x.half()
    halves = what(encoder, half)
    assert recorded and halves == what(encoder, half) == ordinary(encoder, half)
"""
    )


def test_what_is_watched_or_touched_runs_as_it_always_did() -> None:
    run(
        WHAT
        + """
class Linear(nn.Linear):
    pass


seen = []


def look(*_):
    seen.append(1)


with activated("sm_90", launches.append) as driver, force_triton(), torch.no_grad():
    driver.takes_addresses = True
    encoder = encoder_of()
    layer = encoder.layers[0]
    what(encoder)

    def is_repeated(layers):
        '''Of three.'''
        what(encoder)
        what(encoder)
        own = sum(isinstance(launch.arguments[0].value, int) for launch in launches)
        return own == 14 * layers or print(own, layers, file=sys.stderr)

    assert is_repeated(3)
    for kind in ("register_forward_hook", "register_forward_pre_hook"):
        for module in (layer.ffn1, layer.ffn1.output_dense, layer.final_layer_norm):
            handle = getattr(module, kind)(look)
            assert is_repeated(2), (kind, module)
            handle.remove()
            assert is_repeated(3)
    assert seen
    handle = nn.modules.module.register_module_forward_hook(look)
    assert is_repeated(0)
    handle.remove()
    layer.ffn1.forward = layer.ffn1.forward
    assert is_repeated(2)
    del layer.ffn1.forward
    layer.ffn1.output_dense.__class__ = Linear
    assert is_repeated(2)
    layer.ffn1.output_dense.__class__ = nn.Linear
    layer.ffn1.register_buffer("scale", torch.ones(1))
    assert is_repeated(2)
    del layer.ffn1.scale
    layer.ffn1.note = torch.ones(2)
    assert is_repeated(2)
    del layer.ffn1.note
    layer.ffn2.output_dropout.p = 0.5
    assert is_repeated(3)  # which is not training
    layer.ffn2.output_dropout.train()
    assert is_repeated(3)  # which is an operation of PyTorch's
    layer.eval()
    assert is_repeated(3)
    for watcher in (FlopCounterMode(display=False), torch.profiler.profile()):
        with watcher:
            assert is_repeated(0), watcher
    with torch.autocast("cpu", torch.bfloat16):
        assert is_repeated(0)
    assert is_repeated(3)
    asked = []
    stream = driver.get_current_stream
    driver.get_current_stream = lambda device: asked.append(device) or 7
    plans.forget()
    what(encoder)
    asked.clear()
    assert is_repeated(3) and len(asked) >= 2 * 3

    here = current = driver.get_current_device()
    driver.get_current_device = lambda: current
    plans.forget()
    what(encoder)
    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            global current
            current = here

        def __exit__(self, *_):
            global current
            current = "another"

    usual_device, torch.cuda.device, current = torch.cuda.device, Device, "another"
    what(encoder)
    assert entered == [here] * 4  # the norm in front of three layers
    torch.cuda.device, current = usual_device, here
    maps = encoder.run_layers(x, layout, set(), True, None)[2]
    assert len(maps) == 3
    freed = [weakref.ref(o) for o in (encoder, layer, layer.ffn1, layer.ffn1.output_dense.weight)]
    del encoder, layer, module
    launches.clear()
    gc.collect()
    assert [ref() is None for ref in freed] == [True] * 4
"""
    )


def test_a_training_step_is_repeated_where_nothing_else_than_autograd_looks() -> None:
    run(
        WHAT
        + """
from torch.utils.checkpoint import checkpoint


def fails(function, text):
    try:
        function()
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)


seen = []


def look(*_):
    seen.append(1)


with activated("sm_90", launches.append) as driver, force_triton():
    driver.takes_addresses = True
    encoder = encoder_of(conformer_conv_dropout=0.25, attention_dropout=0.25).train()
    layer = encoder.layers[1]
    weight = layer.ffn1.output_dense.weight
    number = len(usual := ordinary(encoder))

    def is_repeated(layers):
        what(encoder)
        what(encoder)
        own = sum(isinstance(launch.arguments[0].value, int) for launch in launches)
        return own == number // 3 * layers or print(own, number, layers, file=sys.stderr)

    # The gradient that was recorded with the first is not launched.
    assert what(encoder) == usual and recorded == [True] * 3  # x needs no gradient
    assert what(encoder) == usual and not recorded and by_addresses()
    x.requires_grad_()
    what(encoder)
    assert by_addresses() and not recorded  # the first is now as the second
    mixed = {dtype: torch.autocast("cpu", dtype) for dtype in (torch.bfloat16, torch.float16)}
    found = {}
    for dtype, autocast in mixed.items():
        with autocast:
            what(encoder)
            assert recorded == [True] * 2
            found[dtype] = what(encoder)
            assert not recorded and by_addresses()
    for dtype, autocast in mixed.items():
        with autocast:
            assert found[dtype] == ordinary(encoder)
    assert found[torch.bfloat16] != found[torch.float16]
    encoder.config.layerdrop = 1e-9
    apart = ordinary(encoder)
    assert what(encoder) == apart and recorded == [True]  # all three are alike
    assert what(encoder) == apart and not recorded and by_addresses()
    encoder.config.layerdrop = 0.0
    plans.forget()
    changes = {
        "a frozen parameter": lambda: weight.requires_grad_(False),
        "a frozen projection": lambda: layer.self_attn.linear_k.requires_grad_(False),
        "a frozen layer": lambda: layer.requires_grad_(False),
        "all frozen, but for what comes in": lambda: encoder.requires_grad_(False),
        "dropout": lambda: setattr(layer.self_attn.dropout, "p", 0.0),
        "evaluation": encoder.eval,
        "an attribute": lambda: setattr(layer.final_layer_norm, "eps", 1e-3),
        "memory": lambda: setattr(weight, "data", weight.detach().clone()),
        "nothing that has a gradient": lambda: x.requires_grad_(False),
    }


    def but_for_distances(found):
        '''Their gradient is computed where they are frozen too, but not by a repeated step.'''
        kernels = ("shaw_attention_bwd_shares_kernel", "shaw_attention_bwd_distances_kernel")
        return [launch for launch in found if launch[0].rpartition(":")[2] not in kernels]

    for name, change in changes.items():
        what(encoder)
        change()
        found = [what(encoder) for _ in range(2)]
        assert by_addresses(), name
        found.append(ordinary(encoder))
        if name != "a frozen parameter":  # with it of one layer or of all
            found = [*map(but_for_distances, found)]
        assert found == [found[-1]] * 3, name
    encoder = encoder_of().train()
    layer = encoder.layers[1]
    weight = layer.ffn1.output_dense.weight
    number = len(ordinary(encoder))
    assert is_repeated(3)

    for watcher in (
        FlopCounterMode(display=False), torch.profiler.profile(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        assert isinstance(replay.layer_runner(x, layout), replay._Replays)
        with watcher:
            assert not isinstance(replay.layer_runner(x, layout), replay._Replays), watcher
    handle = layer.ffn1.register_forward_hook(look)
    assert is_repeated(2)
    handle.remove()
    checkpoint(lambda x: encoder.run_layers(x, layout, set(), False, None)[0], x,
               use_reentrant=False).sum().backward()

    accumulate = weight.view_as(weight).grad_fn.next_functions[0][0]
    for register in (
        weight.register_hook, weight.register_post_accumulate_grad_hook, accumulate.register_hook,
    ):
        plans.forget()
        seen.clear()
        handle = register(look)
        what(encoder)  # which may record
        assert len(seen) == 1, register
        handle.remove()
        what(encoder)
        handle = register(look)
        assert is_repeated(3) and len(seen) == 3, register
        handle.remove()

    inputs = x.clone().requires_grad_()
    inputs.register_hook(look)
    output = lambda: encoder.run_layers(inputs, layout, set(), False, None)[0].sum()
    plans.forget()
    for times in (1, 2):
        output().backward()
        assert len(seen) == 3 + times
    fails(torch.autograd.grad(output(), inputs, create_graph=True)[0].sum().backward, "double")
    y = output()
    y.backward(retain_graph=True)
    y.backward()
    fails(y.backward, "second time")
    for changed in (weight, layer.self_attn.linear_v.weight):  # which lies behind the query's
        y = output()
        with torch.no_grad():
            changed.add_(1.0)
        fails(y.backward, "inplace")

    def alive():
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    del y
    assert is_repeated(3)
    before = alive()
    plans.forget()
    assert is_repeated(3) and alive() == before  # what was recorded keeps nothing
"""
    )


def test_threads_record_at_once() -> None:
    """Each its own launches, of kernels that are loaded once."""
    run(
        """
import threading

own = threading.local()
with activated("sm_90", lambda launch: own.launches.append(launch)) as driver, force_triton():
    driver.takes_addresses = True
    shared, found = encoder_of(), []
    together = threading.Barrier(2)

    def work():
        own.launches = []
        together.wait()
        with torch.inference_mode():
            for _ in range(2):
                shared.run_layers(x, layout, set(), False, None)
        found.append([(r.kernel, r.grid, r.constants) for r in own.launches])

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    first, second = found
    assert first == second and first[: len(first) // 2] == first[len(first) // 2 :]
"""
    )
