"""`w2vbert-fast` under FSDP on processors: `torchrun -m tests.helpers.fsdp_on_cpu finetune ...`.

Accelerate shards weights only where it sees accelerators. PyTorch's FSDP runs on processors as well
(gloo), so Accelerate is told that these processes are of the other kind; nothing else is changed.
"""

from __future__ import annotations

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from w2vbert_fast.cli import main

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Wav2Vec2BertEncoderLayer",
}
initialise = PartialState.__init__


def pretend(self: PartialState, *arguments: object, **options: object) -> None:
    initialise(self, *arguments, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU


PartialState.__init__ = pretend

if __name__ == "__main__":
    status: str | int | None = None
    try:
        main()
    except SystemExit as end:
        status = end.code
    # PyTorch's caches of meshes keep the group, and one of gloo's threads that lets go of a tensor
    # while the interpreter ends would abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
