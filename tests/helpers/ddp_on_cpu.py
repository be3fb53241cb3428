"""`w2vbert-fast` in one of several processes: `torchrun -m tests.helpers.ddp_on_cpu finetune ...`.

Says at the end how many of gloo's threads are left.
"""

from __future__ import annotations

import sys
from pathlib import Path

from w2vbert_fast.cli import main


def run() -> None:
    try:
        main()
    finally:
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        left = sum("gloo" in name for name in names)
        print(f"threads of gloo: {left}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run()
