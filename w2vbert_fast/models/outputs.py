"""Output objects of the models: indexed by name, by attribute and by position.

Field names and their order are those of the reference, so that `outputs.logits`,
`outputs["logits"]`, `outputs[0]` and `outputs.to_tuple()` mean the same here and there. Fields
that are `None` do not count as positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

HiddenStates = tuple[Tensor | None, ...]
Output = TypeVar("Output", bound="ModelOutput")


@dataclass
class ModelOutput:
    """Base of all outputs."""

    def keys(self) -> list[str]:
        """Names of the fields that are set."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order: what `return_dict=False` returns."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(f"{key!r} is not set in {type(self).__name__}; set: {self.keys()}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


def as_requested(
    output: Output, return_dict: bool | None, default: bool | None
) -> Output | tuple[Any, ...]:
    """`output` itself, or its tuple when `return_dict` (else the config's `default`) is `False`."""
    wanted = default if return_dict is None else return_dict
    return output.to_tuple() if wanted is False else output


@dataclass
class Wav2Vec2BaseModelOutput(ModelOutput):
    """Output of `Wav2Vec2BertModel`.

    Attributes:
        last_hidden_state: `[batch, T', output_hidden_size]`; T' is T, or fewer with an adapter.
        extract_features: `[batch, T, feature_dim]`, the input features after their LayerNorm.
        hidden_states: `num_hidden_layers + 1` tensors `[batch, T, hidden_size]`: what enters the
            first layer, then the output of each layer; `None` in the places that were not asked
            for.
        attentions: one `[batch, heads, T, T]` per encoder layer.
    """

    last_hidden_state: Tensor | None = None
    extract_features: Tensor | None = None
    hidden_states: HiddenStates | None = None
    attentions: HiddenStates | None = None


@dataclass
class _HeadOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: HiddenStates | None = None
    attentions: HiddenStates | None = None


@dataclass
class CausalLMOutput(_HeadOutput):
    """Output of `Wav2Vec2BertForCTC`: `loss` (scalar), `logits` `[batch, T', vocab_size]`."""


@dataclass
class SequenceClassifierOutput(_HeadOutput):
    """Output of `Wav2Vec2BertForSequenceClassification`: `logits` `[batch, num_labels]`."""


@dataclass
class TokenClassifierOutput(_HeadOutput):
    """Output of `Wav2Vec2BertForAudioFrameClassification`: `logits` `[batch, T, num_labels]`."""


@dataclass
class XVectorOutput(ModelOutput):
    """Output of `Wav2Vec2BertForXVector`.

    Attributes:
        loss: scalar AM-softmax loss.
        logits: `[batch, xvector_output_dim]`.
        embeddings: `[batch, xvector_output_dim]`, the speaker embeddings.
        hidden_states: see `Wav2Vec2BaseModelOutput`.
        attentions: see `Wav2Vec2BaseModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: HiddenStates | None = None
    attentions: HiddenStates | None = None
