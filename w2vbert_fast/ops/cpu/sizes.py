"""Few different sizes of products.

oneDNN prepares a product for its number of rows, which takes longer than a small product itself,
and keeps what it has prepared: about half a megabyte.
"""

from __future__ import annotations

_SIZES_AN_OCTAVE = 16
"""Numbers of rows between a power of two and the next."""


def rounded_up(num_rows: int) -> int:
    """The next of the few numbers: at most a sixteenth more, the same number below 32."""
    step = 1 << max(0, num_rows.bit_length() - _SIZES_AN_OCTAVE.bit_length())
    return -(-num_rows // step) * step
