"""Output objects of the models: mappings with attributes that can also be indexed by position.

Field names and their order are those of the reference, so that `outputs.logits`,
`outputs["logits"]`, `outputs[0]` and `outputs.to_tuple()` mean the same here and there. A field
that is `None` is no entry of the mapping and no position.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import MappingKey, register_pytree_node

from w2vbert_fast.models.beside_transformers import join_transformers

HiddenStates = tuple[Tensor | None, ...]
Output = TypeVar("Output", bound="ModelOutput")


class _Entries(OrderedDict[str, Any]):
    """A Python class, in whose place another one can become the base of `ModelOutput`."""


@dataclass(eq=False)
class ModelOutput(_Entries):
    """Base of all outputs: a dictionary of its fields that are not `None`, in the order they came.

    It can be built from its fields, from a mapping, or from an iterable of pairs, which is how
    PyTorch and Accelerate put together what they moved, converted or gathered. Entries can be
    added and replaced, not taken away; setting a field to `None` does that. It is a pytree node.

    As transformers' class of the same name, which it becomes a subclass of where transformers is
    loaded: its pipelines turn any other dictionary into a plain one.

    Raises:
        TypeError: what it is built from holds more than pairs of a name and a value, or a method
            that takes entries away is called.
    """

    def __init_subclass__(cls) -> None:
        register_pytree_node(
            cls,
            _flatten,
            partial(_unflatten, cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        if not names or any(getattr(self, name) is not None for name in names[1:]):
            return
        given = getattr(self, names[0])
        if given is None or isinstance(given, Tensor) or not isinstance(given, Iterable):
            return
        pairs = list(given.items() if isinstance(given, Mapping) else given)
        named = [
            isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
        ]
        if not isinstance(given, Mapping) and not any(named):
            # The value of the first field, such as a tuple of tensors.
            setattr(self, names[0], given if isinstance(given, list | tuple) else tuple(pairs))
            return
        if not all(named):
            wrong = pairs[named.index(False)]
            raise TypeError(
                f"{type(self).__name__} is built from its fields or from pairs of a name and a "
                f"value, got {type(wrong).__name__} among the pairs"
            )
        setattr(self, names[0], None)
        for name, value in pairs:
            setattr(self, name, value)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order: what `return_dict=False` returns."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r} is not set in {type(self).__name__}; set: {list(self)}")
        return OrderedDict.__getitem__(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if value is not None:
            OrderedDict.__setitem__(self, name, value)
        elif name in self:
            OrderedDict.__delitem__(self, name)

    def _keep(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"entries of {type(self).__name__} cannot be taken away; set them to None")

    __delitem__ = __delattr__ = pop = popitem = clear = _keep
    # Named here for the sake of what `join_transformers` puts in front of them.
    update = OrderedDict.update
    setdefault = OrderedDict.setdefault

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(MappingKey(name), value) for name, value in output.items()], list(output)


def _unflatten(cls: type[Output], values: Iterable[Any], names: list[str]) -> Output:
    return cls(dict(zip(names, values, strict=True)))


def as_requested(
    output: Output, return_dict: bool | None, default: bool | None
) -> Output | tuple[Any, ...]:
    """`output` itself, or its tuple when `return_dict` (else the config's `default`) is `False`."""
    if not torch.compiler.is_compiling():
        join_transformers(ModelOutput)
    wanted = default if return_dict is None else return_dict
    return output.to_tuple() if wanted is False else output


@dataclass(eq=False)
class Wav2Vec2BaseModelOutput(ModelOutput):
    """Output of `Wav2Vec2BertModel`.

    Attributes:
        last_hidden_state: `[batch, T', output_hidden_size]`; T' is T, or fewer with an adapter.
        extract_features: `[batch, T, feature_dim]`, the input features after their LayerNorm.
        hidden_states: one tensor more than there are layers, `[batch, T, hidden_size]` each: what
            enters the first layer, then the output of each layer; `None` in the places that were
            not asked for.
        attentions: one `[batch, heads, T, T]` per encoder layer.
    """

    last_hidden_state: Tensor | None = None
    extract_features: Tensor | None = None
    hidden_states: HiddenStates | None = None
    attentions: HiddenStates | None = None
