"""`forward` takes the reference's positional arguments in the reference's order."""

from __future__ import annotations

import inspect

import pytest
import transformers

import w2vbert_fast
from tests.helpers.reference import CLASSES


@pytest.mark.parametrize("class_name", CLASSES)
def test_forward_arguments_follow_the_reference(class_name: str) -> None:
    def names(library: object) -> list[str]:
        parameters = inspect.signature(getattr(library, class_name).forward).parameters
        return [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD]

    expected = names(transformers)
    assert names(w2vbert_fast)[: len(expected)] == expected
