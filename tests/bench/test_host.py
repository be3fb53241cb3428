"""`python -m bench.host`: launches in multiples of a bare one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional

from bench import host
from bench.host import Result, Row
from tools.virtual_gpu.driver import activated
from w2vbert_fast.ops.dispatch import force_triton


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time goes by where a call says so, and every launch is counted."""
    state = {"now": 0.0, "launches": 0}
    monkeypatch.setattr(host.time, "thread_time", lambda: state["now"])
    return state


def test_a_launch_is_a_multiple_of_the_bare_one_of_its_round(clock: dict[str, float]) -> None:
    # Of the machine: warm-up, then two calls a round.
    paces = iter([1.0] * 6 + [pace for pace in (1.0, 8.0, 8.0, 8.0, 2.0) for _ in range(2)])

    def call(seconds: float, launches: int, pace: float) -> None:
        clock["now"] += seconds * pace
        clock["launches"] += launches

    modes = []

    @contextlib.contextmanager
    def mode():
        modes.append("in")
        yield
        modes.append("out")

    pace = 1.0

    def bare() -> None:
        nonlocal pace
        pace = next(paces)
        call(1.0, 1, pace)

    rows = [
        Row("bare launch", bare),
        Row("three of two", lambda: call(12.0, 3, pace)),
        Row("a layer", lambda: call(20.0, 4, pace), mode),
        Row("nothing launched", lambda: call(1.0, 0, 1.0)),
        Row("half a library's", lambda: call(6.0, 1, pace), library=1),
    ]
    results = host.measure(rows, lambda: int(clock["launches"]), rounds=5)
    found = {row.name: (row.launches, round(row.multiple, 6)) for row in results}
    assert found == {"bare launch": (1, 1.0), "three of two": (3, 4.0), "a layer": (4, 5.0)} | {
        "half a library's": (2, 3.0)
    }
    assert modes[:2] == ["in", "out"]


def test_the_limits_are_checked() -> None:
    (name, limit), *_ = host.LIMITS.items()
    assert host.missed([Result(name, 14, limit, 1.0), Result("another", 1, 99.0, 1.0)]) == []
    (line,) = host.missed([Result(name, 14, limit + 0.1, 1.0)])
    assert name in line and f"at most {limit:g}" in line


def test_so_many_products_of_a_layer_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    products: list[object] = []
    linear = functional.linear

    def counted(*args: torch.Tensor) -> torch.Tensor:
        products.append(args)
        return linear(*args)

    monkeypatch.setattr(functional, "linear", counted)
    found = []
    with activated("sm_90", launched.append), force_triton():
        for layers in (3, 2):
            run = host.forward(layers)
            with host.products_by_pytorch():
                run()  # what is prepared once
                launched.clear(), products.clear()
                run()
            found.append((len(launched), len(products)))
    (three, products_of_three), (two, products_of_two) = found
    assert (three - two, products_of_three - products_of_two) == (14 - host.PRODUCTS, host.PRODUCTS)
