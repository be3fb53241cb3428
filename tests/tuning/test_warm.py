"""Kernels compiled before they are needed, for a GPU that is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from triton import knobs

from csrc_triton import plans
from csrc_triton.norm import layer_norm
from tests.helpers.waiting import PATIENCE
from tools.virtual_gpu.driver import activated
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.ops.dispatch import force_triton
from w2vbert_fast.tuning import warm
from w2vbert_fast.tuning.measure import forward

CPU = torch.device("cpu")
launched: list[Any] = []


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    launched.clear()
    with activated("sm_90", launched.append), force_triton():
        yield
    plans.forget()


def names(launches: list[warm.Launch]) -> set[str]:
    return {launch.function.__name__ for launch in launches}


def tiles(launches: list[warm.Launch]) -> set[tuple[int, int]]:
    products = [launch.keywords for launch in launches if "GATED" in launch.keywords]
    return {(keywords["BLOCK_M"], keywords["BLOCK_N"]) for keywords in products}


def test_what_a_model_launches_is_noted_and_not_launched() -> None:
    config = Wav2Vec2BertConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=32,
    )
    model = Wav2Vec2BertForCTC(config).bfloat16().eval()
    model.use_fast_kernels = True
    few = warm.model_launches(model, forward, (100,))
    assert launched == []
    assert names(few) == {
        *("_log_mel_fwd_kernel", "_sum_blocks_kernel", "_normalize_stack_kernel"),
        *("_norm_fwd_kernel", "_linear_kernel", "_conv_norm_act_fwd_kernel"),
        *("shaw_attention_fwd_kernel", "_ctc_argmax_kernel", "_ctc_collapse_kernel"),
    }
    once = warm.distinct(few)
    # The second layer has no kernel of its own.
    assert len(once) < len(few) / 1.5 and names(once) == names(few)
    longer = warm.model_launches(model, forward, (100, 30_000))
    assert tiles(warm.distinct(longer)) > tiles(once)


def test_kernels_are_compiled_in_threads_and_the_next_call_compiles_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.ones(64)
    calls = [
        partial(layer_norm, torch.ones(5, width), weight[:width], weight[:width], 1e-5)
        for width in (32, 64)
    ]
    with warm.noted() as launches:
        for call in (*calls, *calls):
            call()
    assert len(launches) == 4 and launched == []
    both, threads = threading.Barrier(2, timeout=PATIENCE), []
    compile_one = warm.Launch.compile

    def compiled(launch: warm.Launch) -> float:
        both.wait()  # for another thread that compiles at the same time
        threads.append(threading.get_ident())
        return compile_one(launch)

    monkeypatch.setattr(warm.Launch, "compile", compiled)
    kernels, seconds, waited = warm.compile_all(launches, CPU, workers=2)
    assert kernels == 2 and len({*threads}) == 2 and launched == []
    assert seconds > 0 and waited > 0
    asked: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **given: asked.append(given))
    for call in calls:
        call()
    assert len(launched) == 2 and asked == []
    with warm.noted() as again:  # what by now goes without asking Triton
        calls[0]()
    assert len(again) == 1 and len(launched) == 2
