"""What launchers launch, for the tests of the ledger."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from triton.backends.compiler import GPUTarget

from tools.virtual_gpu.requests import Uncompiled, requests


@pytest.fixture
def launched() -> Iterator[list[Uncompiled]]:
    """The launches of a test, of an H100 and none of them made."""
    with requests(GPUTarget("cuda", 90, 32)) as found:
        yield found
