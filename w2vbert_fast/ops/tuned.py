"""What was measured to be fastest on a device, and where that is kept.

`w2vbert-fast tune` measures and writes; products of matrices, CUDA graphs and batches of jobs ask
here. A measurement counts on the machine that it was made on alone: the same GPU, driver, PyTorch
and Triton. Tables that ship in `csrc_triton/tuned` count on their GPU, behind the user's own.

Nothing is measured here. Where nothing was, `usual` stands.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from w2vbert_fast.ops import dispatch

if TYPE_CHECKING:
    from csrc_triton.gemm.config import LinearConfig
    from csrc_triton.gemm.measured import Product

logger = logging.getLogger(__name__)

SCHEMA = "w2vbert-tuned/v1"
PYTORCH = "pytorch"
"""The choice of PyTorch's own product in place of a tile."""
PYTORCH_FROM = 2049
"""Tokens from which on it may be chosen. With fewer the host is what is waited for, and between
launches of Triton's kernels alone there is the least to do."""
GRAPH_LIMIT = "graph limit"
FRAME_BUDGET = "frame budget"
SMALLEST_BUCKET, LARGEST_BUCKET = 64, 65536

Choice = str | int
"""A tile such as "128x256", or `PYTORCH`; of limits and budgets, a number."""


@dataclass(frozen=True)
class Machine:
    """What a measurement was made on.

    Attributes:
        gpu: the name that its driver gives it.
        multiprocessors: which it has.
        driver: its version.
        triton: its version.
        torch: its version.
    """

    gpu: str
    multiprocessors: int
    driver: str
    triton: str
    torch: str


@dataclass(frozen=True)
class Case:
    """What there is to choose for.

    Attributes:
        operation: "linear", of an activation "linear silu", "linear glu"; `GRAPH_LIMIT`,
            `FRAME_BUDGET`.
        shape: columns and inner size of a product; of a model layers, width and inner width.
        dtype: such as "bfloat16".
        bucket: tokens, up to the next power of two; 0 where they do not matter.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    bucket: int = 0


@dataclass(frozen=True)
class Found:
    """What was measured for a case.

    Attributes:
        choice: the fastest.
        seconds: that it took.
        usual: what would run without a measurement.
        usual_seconds: that this took, beside it.
    """

    choice: Choice
    seconds: float
    usual: Choice
    usual_seconds: float


Entries = dict[tuple[Machine, Case], Found]


def bucket_of(num_tokens: int) -> int:
    """The next power of two, within bounds."""
    return min(max(1 << max(num_tokens - 1, 0).bit_length(), SMALLEST_BUCKET), LARGEST_BUCKET)


def case_of(product: Product) -> Case:
    """The case that a product belongs to."""
    ends = "" if product.epilogue == "identity" else f" {product.epilogue}"
    shape = (product.product_columns, product.in_features)
    dtype = str(product.dtype).removeprefix("torch.")
    return Case(f"linear{ends}", shape, dtype, bucket_of(product.num_tokens))


def model_case(operation: str, config: Any, dtype: torch.dtype) -> Case:
    """The case of a limit or budget of a model, by its configuration."""
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    return Case(operation, shape, str(dtype).removeprefix("torch."))


def tile_name(config: LinearConfig) -> str:
    """By which a table knows a tile; those of one architecture and dtype all have their own."""
    return f"{config.block_m}x{config.block_n}"


# --- the file -------------------------------------------------------------------------------------


def user_file() -> Path:
    """Where a user's measurements are kept, in the cache folder of the Hugging Face hub's."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "w2vbert_fast" / "tuned.json"


def parse(text: str) -> Entries:
    """The entries of a table.

    Raises:
        ValueError: it is no table, or a part of one.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"it is no table of schema {SCHEMA}")
    rows = content.get("entries")
    if not isinstance(rows, list):
        raise ValueError("it has no list of entries")
    return dict(_entry(row) for row in rows)


_KINDS: dict[str, type | tuple[type, ...]] = {
    **{"gpu": str, "multiprocessors": int, "driver": str, "triton": str, "torch": str},
    **{"operation": str, "shape": list, "dtype": str, "bucket": int},
    **{"choice": (str, int), "seconds": (int, float)},
    **{"usual": (str, int), "usual_seconds": (int, float)},
}


def _entry(row: Any) -> tuple[tuple[Machine, Case], Found]:
    if not isinstance(row, dict) or set(row) != set(_KINDS):
        raise ValueError(f"an entry is {row!r}; it must have {', '.join(_KINDS)}")
    for name, kind in _KINDS.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name} of an entry is {row[name]!r}")
    if not all(type(size) is int for size in row["shape"]):
        raise ValueError(f"shape of an entry is {row['shape']!r}")
    values = {**row, "shape": tuple(row["shape"])}

    def part(kind: Any) -> Any:
        return kind(**{field.name: values[field.name] for field in fields(kind)})

    return (part(Machine), part(Case)), part(Found)


def written(entries: Mapping[tuple[Machine, Case], Found]) -> str:
    """A table, an entry a line, in one order."""
    ordered = sorted(entries.items(), key=lambda item: str([astuple(part) for part in item[0]]))
    rows = [
        json.dumps({**asdict(machine), **asdict(case), **asdict(found)})
        for (machine, case), found in ordered
    ]
    return f'{{"schema": "{SCHEMA}", "entries": [\n' + ",\n".join(rows) + "\n]}\n"


_warned: set[Path] = set()


def read(path: Path) -> Entries:
    """The entries of a file; none where there is no file, or where it is no table, which the log
    says once."""
    try:
        return parse(path.read_bytes().decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if path not in _warned:
            _warned.add(path)
            logger.warning(
                "%s is ignored: %s; `w2vbert-fast tune` writes it anew",
                path,
                " ".join(str(error).split())[:200],
            )
        return {}


def merge(path: Path, entries: Entries) -> None:
    """Add entries to a file; other processes may do so at the same time, and read it.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f"{path.name}.lock")):
        text = written(read(path) | entries)
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes, where the system has locks of files."""
    try:
        import fcntl
    except ImportError:  # Windows: of two that write at once one is lost
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- this machine ---------------------------------------------------------------------------------


@functools.cache
def machine(device: torch.device) -> Machine:
    """The machine that a CUDA or ROCm device is in."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return Machine(
        properties.name,
        properties.multi_processor_count,
        _driver(),
        triton.__version__,
        str(torch.__version__),
    )


def _driver() -> str:
    for module in ("nvidia", "amdgpu"):
        with contextlib.suppress(OSError):
            return Path(f"/sys/module/{module}/version").read_text().strip()
    return "unknown"


@functools.cache
def of_device(device: torch.device) -> dict[Case, Found]:
    """All that is known of a device: of its kind from what ships, then of itself."""
    if device.type != "cuda" or not dispatch.has_triton():
        return {}
    here = machine(device)
    kind = (here.gpu, here.multiprocessors)
    found: dict[Case, Found] = {}
    for path in shipped_files():
        entries = read(path).items()
        found |= {case: f for (m, case), f in entries if (m.gpu, m.multiprocessors) == kind}
    return found | {case: f for (m, case), f in read(user_file()).items() if m == here}


def shipped_files() -> list[Path]:
    """Tables that came with the package."""
    import csrc_triton

    return sorted((Path(csrc_triton.__file__).parent / "tuned").glob("*.json"))


# --- choices --------------------------------------------------------------------------------------

_asked: set[Case] | None = None


def forget() -> None:
    """Look at the files again at the next choice, as after tuning."""
    from csrc_triton.gemm import measured

    of_device.cache_clear()
    _product_by_pytorch.cache_clear()
    measured.use(tile)


@contextlib.contextmanager
def asked() -> Iterator[set[Case]]:
    """The cases of all products that are computed inside."""
    global _asked
    forget()  # so that no plan answers
    _asked = set()
    try:
        yield _asked
    finally:
        _asked = None
        forget()


def choice(device: torch.device, case: Case) -> Choice | None:
    """What was measured to be the fastest; `None` where nothing was."""
    if _asked is not None:
        _asked.add(case)
    found = of_device(device).get(case)
    return None if found is None else found.choice


def tile(device: torch.device, product: Product) -> LinearConfig | None:
    """The tile that was measured to be the fastest; `None`: the predicted one."""
    from csrc_triton.architectures import architecture
    from csrc_triton.gemm.config import linear_candidates

    name = choice(device, case_of(product))
    if name is None or name == PYTORCH:
        return None
    candidates = linear_candidates(product.dtype, architecture(device))
    return next((config for config in candidates if tile_name(config) == name), None)


@functools.lru_cache(maxsize=4096)
def _product_by_pytorch(
    device: torch.device, num_tokens: int, columns: int, in_features: int, dtype: torch.dtype
) -> bool:
    from csrc_triton.gemm.measured import Product

    if not may_be_pytorchs(num_tokens, dtype):
        return False
    case = case_of(Product(num_tokens, columns, in_features, dtype, "identity"))
    found = choice(device, case)
    if found is None:
        return usually_by_pytorch(device)
    return found == PYTORCH


def may_be_pytorchs(num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own is a way to compute a product that nothing follows. Of float32 it is
    not: that is in full precision here, whatever PyTorch is allowed to do."""
    return num_tokens >= PYTORCH_FROM and dtype.itemsize == 2


def usually_by_pytorch(device: torch.device) -> bool:
    """Whether products that may be PyTorch's are where nobody has measured: on Hopper, where others
    found the vendor's a fifth faster."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def product_by_pytorch(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `x @ weight.T` and a bias, with nothing behind them, run PyTorch's own kernel.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
    """
    return x.is_cuda and _product_by_pytorch(x.device, x.shape[0], *weight.shape, x.dtype)


def number(device: torch.device, case: Case) -> int | None:
    """A limit or budget that was measured for a model; `None` where none was."""
    found = choice(device, case)
    return found if isinstance(found, int) else None


def explain(device: torch.device | str) -> str:
    """What is tuned on a device, in one line."""
    device = torch.device(device)
    if device.type != "cuda":
        return "nothing to tune: tiles are of GPUs"
    if not dispatch.has_triton():
        return "nothing to tune: there are no Triton kernels"
    found = of_device(device)
    usual = "PyTorch's own" if usually_by_pytorch(device) else "Triton's, with predicted tiles"
    rest = (
        f"products in 16 bits of more than {PYTORCH_FROM - 1:,} tokens with nothing behind them "
        f"are {usual}"
    )
    if not found:
        return f"nothing is tuned: {rest}; `w2vbert-fast tune` measures"
    by_pytorch = sum(f.choice == PYTORCH for f in found.values())
    changed = sum(f.choice != f.usual for f in found.values())
    return (
        f"{len(found)} cases are tuned, {changed} of them run something else than usual, "
        f"{by_pytorch} PyTorch's own product; elsewhere {rest}"
    )
