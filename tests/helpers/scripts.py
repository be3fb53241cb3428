"""Scripts in processes of their own: pytest's runs Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.snippets import ROOT


def run_compiled(script: str) -> None:
    """Run a script of ours where Triton compiles; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
