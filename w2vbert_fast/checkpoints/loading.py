"""From the tensors of a checkpoint to the parameters of a model: names, conversions, placement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from w2vbert_fast.checkpoints.weights import Checkpoint, CheckpointError, listed

logger = logging.getLogger(__name__)

# Heads of pre-training, which no model here has.
_PRETRAINING_PREFIXES = ("quantizer.", "project_q.", "project_hid.")

# Magnitude and direction of a weight-normalised `weight` (Salimans and Kingma 2016).
_WEIGHT_NORM_SUFFIXES = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)

_FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_RENAMED_SUFFIXES = ((".gamma", ".weight"), (".beta", ".bias"))

_MASK_EMBEDDING = "masked_spec_embed"

NamesAsStored = Callable[[], set[str] | None]
"""Names of the tensors that the model would have by the checkpoint's own configuration, if any."""

_Source = tuple[str, ...]
"""One stored tensor, or magnitude and direction of a weight-normalised weight."""


@dataclass
class _Plan:
    """Which stored tensors make which tensor of the model, and what does not fit."""

    sources: dict[str, _Source] = field(default_factory=dict)
    headless: list[str] = field(default_factory=list)  # the head, where none of its kind is stored
    added: list[str] = field(default_factory=list)  # missing, as the caller's configuration adds it
    removed: list[str] = field(default_factory=list)  # stored, but of what the caller took away
    optional: list[str] = field(default_factory=list)  # may be missing without a word
    missing: list[str] = field(default_factory=list)
    unexpected: dict[str, str] = field(default_factory=dict)  # stored name by the model's for it
    ignored: list[str] = field(default_factory=list)  # stored, known, and of no use to the model
    mismatched: dict[str, str] = field(default_factory=dict)  # name: both shapes
    unusable: list[str] = field(default_factory=list)


@dataclass
class LoadingInfo:
    """What a checkpoint and a model did not have in common.

    Attributes:
        missing: parameters of the model that the checkpoint does not give.
        unexpected: stored tensors that the model has no use for.
        mismatched: parameters whose stored shape differs: name, stored shape, shape in the model.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def empty(self) -> list[str]:
        """Names of the parameters that are allocated, and hold no values yet."""
        return [*self.missing, *(name for name, _, _ in self.mismatched)]


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    base_model_prefix: str,
    heads: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    names_as_stored: NamesAsStored = lambda: None,
) -> LoadingInfo:
    """Give every parameter and buffer of a model on the meta device its values.

    Names, shapes and dtypes are all checked before the first tensor is read. A checkpoint of the
    encoder alone, or with another head, fits a model with a head and the other way round:
    `base_model_prefix` is added or taken away, the head is initialised or left out. Nor does it
    matter what a changed configuration adds to the model or takes away from it.

    Args:
        model: a model on the meta device.
        checkpoint: the stored tensors.
        base_model_prefix: name of the encoder within a model with a head.
        heads: what the heads of this model family keep their weights in.
        dtype: floating point tensors are converted to it.
        device: where the tensors go.
        strict: whether missing and unexpected tensors are an error; else they are warned of, and
            missing ones are initialised.
        ignore_mismatched_sizes: initialise tensors whose stored shape differs, with a warning,
            instead of raising.
        names_as_stored: asked where something is missing or unexpected. What the model has beyond
            these names, or lacks of them, is due to the configuration that the caller changed: it
            is warned of, and no error.

    Raises:
        CheckpointError: the checkpoint does not fit the model or cannot be read.
    """
    plan = _match(model, checkpoint, base_model_prefix, heads)
    name = type(model).__name__
    wanted = model.state_dict(keep_vars=True)
    if plan.missing or plan.unexpected:
        _set_apart(plan, wanted, names_as_stored())
    _raise_problems(plan, checkpoint.name, name, strict, ignore_mismatched_sizes)
    empty = [*plan.headless, *plan.added, *plan.missing]
    unexpected = [*plan.removed, *plan.unexpected.values()]
    if empty or plan.mismatched:
        logger.warning(
            "%s does not give these parameters of %s, which are newly initialised: %s",
            checkpoint.name,
            name,
            listed([*_outermost(empty, wanted.keys() - empty), *plan.mismatched.values()]),
        )
    if unexpected:
        kept = checkpoint.tensors.keys() - unexpected
        logger.warning(
            "%s: %s has no use for %s", checkpoint.name, name, listed(_outermost(unexpected, kept))
        )
    if plan.ignored:
        logger.info("%s: %s has no use for %s", checkpoint.name, name, listed(plan.ignored))
    if plan.optional:
        logger.info("%s is newly initialised", listed(plan.optional))
    mismatched = [
        (entry, checkpoint.tensors[plan.sources.pop(entry)[-1]].shape, tuple(wanted[entry].shape))
        for entry in plan.mismatched
    ]
    _fill(model, plan.sources, checkpoint, dtype, device)
    info = LoadingInfo([*empty, *plan.optional], [*unexpected, *plan.ignored], mismatched)
    for entry in info.empty:
        meta = wanted[entry]
        kept_dtype = dtype if meta.is_floating_point() else meta.dtype
        place(model, entry, torch.empty(meta.shape, dtype=kept_dtype, device=device))
    return info


def _set_apart(plan: _Plan, wanted: Mapping[str, Tensor], as_stored: set[str] | None) -> None:
    """Move what is due to the caller's configuration from what is missing or unexpected."""
    if as_stored is None:
        return
    plan.added = [name for name in plan.missing if name not in as_stored]
    plan.missing = [name for name in plan.missing if name in as_stored]
    taken_away = as_stored - wanted.keys()
    for name in [name for name in plan.unexpected if _is_among(name, taken_away)]:
        plan.removed.append(plan.unexpected.pop(name))


def _is_among(name: str, names: Collection[str]) -> bool:
    """Whether a stored tensor is one of a model's, or makes one of them."""
    halves = [suffix for pair in _WEIGHT_NORM_SUFFIXES for suffix in pair if name.endswith(suffix)]
    whole = name.removesuffix(halves[0]) + ".weight" if halves else name
    return _current_name(whole, names) in names


def _outermost(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Modules that hold nothing but the named tensors, in place of these; sorted as the names."""
    shared = {""}
    for other in others:
        while (other := other.rpartition(".")[0]) not in shared:
            shared.add(other)
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        depth = 1
        while ".".join(parts[:depth]) in shared:
            depth += 1
        found[".".join(parts[:depth])] = None
    return list(found)


def _raise_problems(
    plan: _Plan, checkpoint: str, model: str, strict: bool, ignore_mismatched_sizes: bool
) -> None:
    problems = []
    if plan.unusable:
        problems.append(f"unusable ({len(plan.unusable)}): {listed(plan.unusable)}")
    if plan.mismatched and not ignore_mismatched_sizes:
        shapes = listed(plan.mismatched.values())
        problems.append(f"wrong shape ({len(plan.mismatched)}): {shapes}")
    loose = strict and (plan.missing or plan.unexpected)
    if strict and plan.missing:
        problems.append(f"missing ({len(plan.missing)}): {listed(plan.missing)}")
    if strict and plan.unexpected:
        stored = plan.unexpected.values()
        problems.append(f"unexpected ({len(stored)}): {listed(stored)}")
    if not problems:
        return
    if loose:
        problems.append("strict=False initialises what is missing and leaves out the unexpected")
    if plan.mismatched and not ignore_mismatched_sizes:
        problems.append("ignore_mismatched_sizes=True initialises what has the wrong shape")
    lines = "\n  ".join(problems)
    raise CheckpointError(f"{checkpoint} does not fit {model}:\n  {lines}")


def _match(
    model: nn.Module, checkpoint: Checkpoint, base_model_prefix: str, heads: Collection[str]
) -> _Plan:
    wanted = model.state_dict(keep_vars=True)
    stored = checkpoint.tensors
    base = base_model_prefix + "."
    model_has_head = any(name.startswith(base) for name in wanted)
    stored_has_base = any(name.startswith(base) for name in stored)
    head_modules = {
        name.partition(".")[0] for name in wanted if model_has_head and not name.startswith(base)
    }
    plan = _Plan()

    stored_heads = {name.partition(".")[0] for name in stored} & set(heads)
    other_head = model_has_head and not stored_heads & head_modules

    # Names of the stored tensors as the model would have them.
    placed: dict[str, str] = {}
    stored_has_head = False
    for name in stored:
        in_head = name.partition(".")[0] in head_modules
        if name.removeprefix(base).startswith(_PRETRAINING_PREFIXES):
            plan.ignored.append(name)
        elif other_head and name.partition(".")[0] in stored_heads:
            plan.removed.append(name)
        elif stored_has_base and not name.startswith(base):
            stored_has_head = True
            if model_has_head:
                placed[name] = name
            else:
                plan.ignored.append(name)
        elif model_has_head and not stored_has_base and not in_head:
            placed[base + name] = name
        else:
            stored_has_head = stored_has_head or in_head
            placed[name if model_has_head else name.removeprefix(base)] = name

    _join_weight_norm(plan, placed, wanted)
    transient = {name for name, _ in model.named_buffers()} - wanted.keys()
    for name, stored_name in placed.items():
        target = _current_name(name, wanted)
        if target in plan.sources:
            others = " and ".join(plan.sources[target])
            plan.unusable.append(f"{target} is given twice, by {others} and by {stored_name}")
        elif target in wanted:
            plan.sources[target] = (stored_name,)
        elif target.rpartition(".")[2] == _MASK_EMBEDDING or target in transient:
            plan.ignored.append(stored_name)
        else:
            plan.unexpected[name] = stored_name

    for name, tensor in wanted.items():
        if name in plan.sources:
            _check_source(plan, name, tensor, checkpoint)
        elif name.rpartition(".")[2] == _MASK_EMBEDDING:
            plan.optional.append(name)
        elif model_has_head and not name.startswith(base) and not stored_has_head:
            plan.headless.append(name)
        else:
            plan.missing.append(name)
    return plan


def _join_weight_norm(plan: _Plan, placed: dict[str, str], wanted: Collection[str]) -> None:
    """Move the pairs of weight-normalised weights from `placed` to the plan's sources."""
    for magnitude_suffix, direction_suffix in _WEIGHT_NORM_SUFFIXES:
        for magnitude in [name for name in placed if name.endswith(magnitude_suffix)]:
            stem = magnitude.removesuffix(magnitude_suffix)
            direction, target = stem + direction_suffix, stem + ".weight"
            if magnitude not in wanted and target in wanted and direction in placed:
                plan.sources[target] = (placed.pop(magnitude), placed.pop(direction))


def _current_name(name: str, wanted: Collection[str]) -> str:
    """The present name of a tensor that may have an older one."""
    for old, new in _RENAMED_SUFFIXES:
        renamed = name.removesuffix(old) + new
        if name not in wanted and name.endswith(old) and renamed in wanted:
            return renamed
    return name


def _check_source(plan: _Plan, name: str, tensor: Tensor, checkpoint: Checkpoint) -> None:
    parts = [checkpoint.tensors[part] for part in plan.sources[name]]
    for part, stored in zip(plan.sources[name], parts, strict=True):
        if stored.dtype not in _FLOATING_DTYPES and tensor.is_floating_point():
            plan.unusable.append(f"{part} is {stored.dtype_name}, a floating point type is needed")
            return
    shape = parts[-1].shape
    if shape != tuple(tensor.shape):
        plan.mismatched[name] = f"{name} is {list(shape)}, {list(tensor.shape)} is needed"
    elif len(parts) == 2 and not _is_magnitude(parts[0].shape, shape):
        magnitude, direction = plan.sources[name]
        plan.unusable.append(
            f"{magnitude} is {list(parts[0].shape)}, no magnitude of {direction} {list(shape)}"
        )


def _is_magnitude(magnitude: tuple[int, ...], direction: tuple[int, ...]) -> bool:
    """Whether a shape is that of one norm in all, or of one for each index of one dimension."""
    if not magnitude:
        return True
    kept = [length for length in magnitude if length != 1]
    fits = len(magnitude) == len(direction) and all(
        length in (1, full) for length, full in zip(magnitude, direction, strict=True)
    )
    return fits and len(kept) <= 1


def _fill(
    model: nn.Module,
    sources: Mapping[str, _Source],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read every source and give it to the model, one tensor at a time."""
    singles = {source[0]: name for name, source in sources.items() if len(source) == 1}
    for stored_name, tensor in checkpoint.read(singles, dtype=dtype, device=device):
        place(model, singles[stored_name], tensor)
    for name, source in sources.items():
        if len(source) == 2:
            halves = dict(checkpoint.read(source))
            weight = _weight_norm(halves[source[0]], halves[source[1]])
            place(model, name, weight.to(device=device, dtype=dtype))


def _weight_norm(magnitude: Tensor, direction: Tensor) -> Tensor:
    """`magnitude * direction / ||direction||`, in float32 at least.

    The norm goes over the dimensions in which the magnitude has length 1; over all for a scalar.
    """
    wide = torch.promote_types(direction.dtype, torch.float32)
    magnitude, direction = magnitude.to(wide), direction.to(wide)
    over = [d for d in range(direction.dim()) if not magnitude.dim() or magnitude.shape[d] == 1]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=over, keepdim=True)
    return direction * (magnitude / norm)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        setattr(module, leaf, tensor)
