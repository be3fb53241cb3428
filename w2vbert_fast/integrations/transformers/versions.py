"""Which versions of transformers the integration works with.

Versions between the oldest and the newest that were tested are taken as they are, older ones are
refused. A newer one is checked in this process when it is first used, and refused only where the
check finds a difference.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

OLDEST, NEWEST = "4.37", "5.24"
"""The oldest and the newest minor version of transformers that the integration was tested with."""

_passed: set[tuple[str, str]] = set()
_lock = threading.RLock()


def installed() -> str:
    """The version of transformers.

    Raises:
        ImportError: it is older than `OLDEST`, or there is none.
    """
    version = str(importlib.import_module("transformers").__version__)
    if _minor(version) < _minor(OLDEST):
        raise ImportError(
            f"transformers {version} is installed; w2vbert_fast.integrations.transformers needs "
            f"{OLDEST} or later. w2vbert_fast's own models need no transformers"
        )
    return version


def require(what: str, check: Callable[[], None]) -> None:
    """Return where something of the transformers that is installed can be stood in for.

    Args:
        what: the part of transformers that is used, for messages: a class or a model.
        check: compares that part with what this package was made for, and raises an exception that
            says what differs. Called for versions newer than `NEWEST` only, until it has passed;
            that it has is a warning in the log, once for each part.

    Raises:
        ImportError: transformers is older than `OLDEST`, or newer than `NEWEST` and the check
            failed.
    """
    version = installed()
    if _minor(version) <= _minor(NEWEST):
        return
    with _lock:
        if (version, what) in _passed:
            return
        try:
            check()
        except Exception as error:
            reason = str(error) if type(error) is Mismatch else f"{type(error).__name__}: {error}"
            raise ImportError(
                f"transformers {version} is installed, newer than {NEWEST}, the newest that was "
                f"tested, and its {what} is not what w2vbert_fast.integrations.transformers was "
                f"made for: {reason}. w2vbert_fast's own models need no transformers"
            ) from error
        _passed.add((version, what))
    logger.warning(
        "transformers %s is newer than %s, the newest that was tested; its %s was checked just now "
        "and gave equal answers. This is said once",
        version,
        NEWEST,
        what,
    )


class Mismatch(Exception):
    """What a check has found to differ."""


def _minor(version: str) -> tuple[int, int]:
    """(5, 24) of "5.24.0", "5.24.0.dev0" or "5.24rc1"."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    if found is None:
        raise ImportError(f"transformers.__version__ is {version!r}, which is no version")
    return int(found[1]), int(found[2] or 0)
