"""The command `w2vbert-fast warm`: a model's kernels, compiled before they are needed."""

from __future__ import annotations

from w2vbert_fast.cli.messages import write_line
from w2vbert_fast.cli.tune import Model

SHORT = "Compile a model's kernels for this GPU."
HELP = (
    "Compile the Triton kernels that a model needs for batches up to 32,000 frames, in parallel, "
    "into Triton's cache, where later processes find them: the first call then does not wait for "
    "them. Says how long it would have waited."
)


def command(model: Model) -> int:
    """Compile; the exit status."""
    from w2vbert_fast.tuning.measure import forward
    from w2vbert_fast.tuning.model import find_gpu, load
    from w2vbert_fast.tuning.warm import compile_all, model_launches

    device = find_gpu(model.device)
    network = load(model.model, device, model.dtype and model.dtype.value)
    kernels, taken, waited = compile_all(model_launches(network, forward), device)
    write_line(
        f"{kernels} kernels are compiled, in {taken:.1f} s; one after another, as first calls need "
        f"them, they would have taken {waited:.1f} s"
    )
    return 0
