"""transformers' own Wav2Vec2-BERT models on our operations, in place.

    from w2vbert_fast.integrations.transformers import accelerate

    model = AutoModelForCTC.from_pretrained("hf-audio/wav2vec2-bert-CV16-en")
    accelerate(model)

`accelerate` gives the encoders in a model, their layers and their adapters another class: a
subclass of their own with another `forward`. Nothing else changes: the parameters, the state dict,
the names, and every other instance of the class stay as they are. docs/use/transformers.md has what
works, what runs transformers' own code, and what differs.

The subclasses carry the names that they have in transformers, and are attributes of this module, so
that pickles find them. transformers is imported when it is first needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from w2vbert_fast.integrations.transformers import versions
from w2vbert_fast.integrations.transformers.classes import (
    Fast,
    FastEncoder,
    _new_ctc,  # noqa: F401  (where pickles that are older than `classes` find it)
    check_family,
    fast_classes,
    replacements,
)
from w2vbert_fast.integrations.transformers.families import FAMILIES
from w2vbert_fast.integrations.transformers.search import (
    is_inside,
    may_hold_modules,
    modules_in,
    places_in,
)
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel

if TYPE_CHECKING:
    FastSeamlessM4TFeatureExtractor: Any

logger = logging.getLogger(__name__)

_Holder = TypeVar("_Holder")


def accelerate(model: _Holder) -> _Holder:
    """Make the Wav2Vec2-BERT encoders in a model run on our operations, in place.

    Every `Wav2Vec2BertEncoder` and `SeamlessM4Tv2ConformerEncoder` of transformers that is found,
    and the adapters behind them. What stands in front of them and behind (feature projection,
    heads, decoders) computes what it did, but for `Wav2Vec2BertForCTC`, whose logits are the blank
    in padded frames. The parameters are the same objects; LoRA and other adapters may be put in
    before or after. A call that asks for what our code cannot do (attention maps, ...) runs
    transformers' code, which the log says once for each reason; so does one that `torch.jit.trace`,
    `torch.export` or an ONNX exporter records.

    In a padded batch an utterance gets the answer that it gets alone. Padded frames are zero in
    `hidden_states` and repeat the utterance's last frame in `last_hidden_state` (transformers
    leaves there, and lets the adapter read, whatever the arithmetic gives).

    The log says at level INFO which encoders were found, and at WARNING what was left as it is,
    because it derives from transformers' classes or is a model of this package.

    Args:
        model: a module, or what holds modules at any depth: a pipeline of transformers, a dict, a
            list, an object with models in its attributes. Nothing happens to encoders that are
            accelerated already.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` can hold no modules.
        ValueError: there is no such encoder in it, or one has a `forward` of its own.
        ImportError: transformers is too old, or newer than what was tested and not what this was
            made for; see docs/use/transformers.md.
    """
    modules = modules_of(model)
    _check_families(modules.values())
    fast = replacements(modules)
    encoders = [
        path
        for path, module in modules.items()
        if issubclass(fast.get(path, type(module)), FastEncoder)
    ]
    own = {path: m for path, m in modules.items() if isinstance(m, Wav2Vec2BertPreTrainedModel)}
    slow = [path for path, module in own.items() if not module.use_fast_kernels]
    if not encoders and (slow or not own):
        raise ValueError(_nothing_found(model, modules, slow))
    for path in fast:
        if "forward" in modules[path].__dict__:
            raise ValueError(
                f"a {type(modules[path]).__name__} in model has a forward of its own (an "
                f"offloading library's, for instance), behind which model{path} cannot be "
                "accelerated; call accelerate() first"
            )
    for path, kind in fast.items():
        modules[path].__class__ = kind
    if encoders:
        logger.info("accelerated: %s", ", ".join(f"model{path}" for path in encoders))
    for line in (*_subclasses(modules), *_switches(modules, slow)):
        logger.warning("%s", line)
    return model


def accelerated(model: Any) -> dict[str, nn.Module]:
    """The encoders in a model that `accelerate` has made run on our operations.

    Args:
        model: as in `accelerate`.

    Returns:
        The encoders by where they are in `model`, such as `.wav2vec2_bert.encoder`.

    Raises:
        TypeError: `model` can hold no modules.
    """
    found = modules_of(model).items()
    return {path: module for path, module in found if isinstance(module, FastEncoder)}


def restore(model: _Holder) -> _Holder:
    """Undo `accelerate`, in place; the parameters keep their values.

    Args:
        model: as in `accelerate`. Nothing happens where nothing was accelerated.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` can hold no modules.
    """
    for module in modules_of(model).values():
        if isinstance(module, Fast) and module._w2vbert_own:
            module.__class__ = module._w2vbert_reference
    return model


def modules_of(model: Any) -> dict[str, nn.Module]:
    if not may_hold_modules(model):
        raise TypeError(
            f"model is {type(model).__qualname__}; it must be a torch.nn.Module, or a pipeline, "
            "dict, list or other object that holds some"
        )
    return modules_in(model)


def _subclasses(modules: dict[str, nn.Module]) -> Iterator[str]:
    """What to say of modules that derive from transformers' classes and were left as they are."""
    references = tuple(kind._w2vbert_reference for kind in fast_classes().values())
    left = {
        f"model{path}": type(module).__qualname__
        for path, module in modules.items()
        if isinstance(module, references)
        and not isinstance(module, Fast)
        and type(module) not in references
    }
    if left:
        yield (
            f"{', '.join(sorted(set(left.values())))} derive from transformers' classes with code "
            f"of their own, which cannot be replaced; these run it: {', '.join(left)}"
        )


def _switches(modules: dict[str, nn.Module], slow: Iterable[str]) -> Iterator[str]:
    """What to say of this package's own models that run without their fast kernels."""
    for path in slow:
        if not any(is_inside(path, other) for other in slow if other != path):
            yield (
                f"model{path} is w2vbert_fast's own {type(modules[path]).__name__}, for which "
                "there is nothing to replace: switch it with use_fast_kernels = True, or load it "
                "with from_pretrained(..., use_fast_kernels=True)"
            )


def _nothing_found(model: Any, modules: dict[str, nn.Module], slow: list[str]) -> str:
    places = places_in(model)
    more = f" and {len(places) - 12} more" if len(places) > 12 else ""
    looked = (
        f"looked through {', '.join(places[:12])}{more}, and what these hold: {len(modules)} "
        "modules in all"
        if places
        else "it holds nothing that could be one"
    )
    return "; ".join(
        [
            *_switches(modules, slow),
            f"model is {type(model).__qualname__}, which contains no Wav2Vec2BertEncoder and no "
            f"SeamlessM4Tv2ConformerEncoder of transformers ({looked})",
            *_subclasses(modules),
        ]
    )


def _check_families(modules: Iterable[nn.Module]) -> None:
    """That the models of transformers in a model are those that our classes stand in for."""
    versions.installed()
    origins = {kind.__module__ for module in modules for kind in type(module).__mro__}
    for family in FAMILIES:
        if f"transformers.models.{family.module}" in origins:
            check_family(family)


def __getattr__(name: str) -> Any:
    """The subclasses, for pickles, and the feature extractor, whose base is transformers'."""
    if name == "FastSeamlessM4TFeatureExtractor":
        from w2vbert_fast.integrations.transformers.feature_extractor import fast_feature_extractor
        from w2vbert_fast.integrations.transformers.probe import check_feature_extractor

        versions.require("SeamlessM4TFeatureExtractor", check_feature_extractor)
        return fast_feature_extractor()
    for family in FAMILIES:
        if name.startswith(family.prefix):
            check_family(family)
            if name in fast_classes():
                return fast_classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
