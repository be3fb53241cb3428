"""The GPUs that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from csrc_triton.architectures import ARCHITECTURES


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as on the command line, `"cuda:90"` or `"hip:gfx942"`.
        arch: as of `architectures.architecture`, `"sm_90"` or `"gfx942"`.
        gpu: Triton's target.
    """

    name: str
    arch: str
    gpu: GPUTarget

    @classmethod
    def parse(cls, name: str) -> Target:
        """The target of a name.

        Raises:
            ValueError: there is no such target, or its limits are not known.
        """
        backend, _, number = name.partition(":")
        arch = f"sm_{number}" if backend == "cuda" else number if backend == "hip" else ""
        if arch not in ARCHITECTURES or (backend == "hip") != arch.startswith("gfx"):
            known = ", ".join(
                f"hip:{arch}" if arch.startswith("gfx") else f"cuda:{arch.removeprefix('sm_')}"
                for arch in ARCHITECTURES
            )
            raise ValueError(f"target is {name!r}; it must be one of {known}")
        gpu = int(number) if backend == "cuda" else number
        return cls(name, arch, GPUTarget(backend, gpu, ARCHITECTURES[arch].warp_size))

    @classmethod
    def of(cls, arch: str) -> Target:
        """The target of an architecture's name.

        Raises:
            ValueError: there is no such architecture.
        """
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch is {arch!r}; it must be one of {', '.join(ARCHITECTURES)}")
        return cls.parse(arch.replace("sm_", "cuda:") if "sm_" in arch else f"hip:{arch}")
