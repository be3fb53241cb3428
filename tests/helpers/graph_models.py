"""Models with and without graphs, for the tests of `compile_for_inference`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from tests.helpers.graphs import Rerun
from tests.helpers.reference import TINY, pair, relative_error

FEATURES = TINY["feature_projection_input_dim"]
RAGGED = (31, 24, 1, 13)


def encoder_of(model: nn.Module) -> Any:
    return model.base_model.encoder


def graphed(
    class_name: str = "Wav2Vec2BertModel", *, options: dict[str, Any] | None = None, **config: Any
) -> tuple[Any, Any, Rerun]:
    """A model that runs operation by operation, its twin with graphs, and the twin's device."""
    _, plain = pair(class_name, **config)
    plain.use_fast_kernels = True
    ours = copy.deepcopy(plain).compile_for_inference(**(options or {}))
    device = Rerun()
    encoder_of(ours).layer_graphs.device = device
    return plain, ours, device


def same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert relative_error(got, expected) <= 1e-6
