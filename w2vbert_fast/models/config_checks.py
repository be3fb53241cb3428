"""Checks of single configuration values, each a function of a field's name and its value.

A check returns the value in the one form that the rest of the package relies on (a plain `int`, a
plain `float`, a list) or raises `ValueError` with the field, the value and what is needed.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from w2vbert_fast.ops.activations import ACTIVATIONS

if TYPE_CHECKING:
    from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

Check = Callable[[str, object], Any]


def fail(name: str, value: object, needed: str) -> ValueError:
    """The error for a value that a field cannot take."""
    return ValueError(f"{name} is {value!r}; it must be {needed}")


def _as_integer(value: object) -> int | None:
    """The value as a plain `int`, or None when it is no integer (a bool is none)."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def integer(minimum: int | None = None, *, optional: bool = False) -> Check:
    """An integer, at least `minimum`; None as well where `optional`."""
    needed = "an integer" if minimum is None else f"an integer >= {minimum}"
    needed += " or None" if optional else ""

    def check(name: str, value: object) -> int | None:
        if value is None and optional:
            return None
        number = _as_integer(value)
        if number is None or (minimum is not None and number < minimum):
            raise fail(name, value, needed)
        return number

    return check


def integers(minimum: int) -> Check:
    """A sequence of one or more integers, each at least `minimum`, kept as a list."""
    needed = f"a list of one or more integers >= {minimum}"

    def check(name: str, value: object) -> list[int]:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
            raise fail(name, value, needed)
        numbers_ = [_as_integer(item) for item in value]
        kept = [number for number in numbers_ if number is not None and number >= minimum]
        if len(kept) != len(numbers_):
            raise fail(name, value, needed)
        return kept

    return check


def token_id(name: str, value: object) -> int | list[int] | None:
    """A token id, a list of them, or None."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        ids = [_as_integer(item) for item in value]
        kept = [number for number in ids if number is not None]
        if len(kept) == len(ids):
            return kept
    elif (number := _as_integer(value)) is not None:
        return number
    raise fail(name, value, "an integer, a list of integers or None")


def real(low: float, high: float = math.inf, *, exclusive: bool = False) -> Check:
    """A finite number in `[low, high]`, or in `(low, high]` when `exclusive`."""
    if high == math.inf:
        needed = f"a number {'>' if exclusive else '>='} {low:g}"
    else:
        needed = f"a number from {low:g} to {high:g}"

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise fail(name, value, needed)
        number = float(value)
        below = number <= low if exclusive else number < low
        if below or number > high or not math.isfinite(number):
            raise fail(name, value, needed)
        return number

    return check


def boolean(*, optional: bool = False) -> Check:
    """`True` or `False`; None as well where `optional`."""
    needed = "True, False or None" if optional else "True or False"

    def check(name: str, value: object) -> bool | None:
        if isinstance(value, bool) or (value is None and optional):
            return value
        raise fail(name, value, needed)

    return check


def choice(options: Collection[str | None]) -> Check:
    """One of a few strings (or None)."""
    needed = "one of " + ", ".join(repr(option) for option in options)

    def check(name: str, value: object) -> str | None:
        if (value is None or isinstance(value, str)) and value in options:
            return value
        raise fail(name, value, needed)

    return check


def activation(name: str, value: object) -> object:
    """The name of an activation, or a callable from tensor to tensor."""
    if callable(value) or (isinstance(value, str) and value in ACTIVATIONS):
        return value
    raise fail(name, value, f"a callable or one of {', '.join(sorted(ACTIVATIONS))}")


def floating_dtype(name: str, value: object) -> torch.dtype | None:
    """A floating point `torch.dtype`, from itself or its name (`"float32"`), or None."""
    if value is None:
        return None
    found = value
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise fail(name, value, 'a floating point torch.dtype or its name, such as "float32"')


def label_names(name: str, value: object) -> dict[int, str]:
    """A mapping from class index to label; JSON's string keys become integers."""
    needed = "a mapping of one or more class indices to label names"
    if not isinstance(value, Mapping) or not value:
        raise fail(name, value, needed)
    labels: dict[int, str] = {}
    for key, label in value.items():
        try:
            labels[int(key)] = str(label)
        except (TypeError, ValueError):
            raise fail(name, value, needed) from None
    if len(labels) != len(value):
        raise fail(name, value, "a mapping in which no class index comes twice")
    return labels


def label_indices(name: str, value: object) -> dict[str, int]:
    """A mapping from label to class index; indices written as strings become integers."""
    needed = "a mapping of one or more label names to class indices"
    if not isinstance(value, Mapping) or not value:
        raise fail(name, value, needed)
    try:
        return {str(label): int(index) for label, index in value.items()}
    except (TypeError, ValueError):
        raise fail(name, value, needed) from None


def strings(name: str, value: object) -> list[str] | None:
    """A list of strings or None."""
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    raise fail(name, value, "a list of strings or None")


# Every field that has a rule of its own. Rules between fields: `Wav2Vec2BertConfig.validate`.
FIELD_CHECKS: dict[str, Check] = {
    "vocab_size": integer(1, optional=True),
    "hidden_size": integer(1),
    "num_hidden_layers": integer(0),
    "num_attention_heads": integer(1),
    "intermediate_size": integer(1),
    "feature_projection_input_dim": integer(1),
    "hidden_act": activation,
    "hidden_dropout": real(0, 1),
    "activation_dropout": real(0, 1),
    "attention_dropout": real(0, 1),
    "feat_proj_dropout": real(0, 1),
    "final_dropout": real(0, 1),
    "layerdrop": real(0, 1),
    "initializer_range": real(0),
    "layer_norm_eps": real(0, exclusive=True),
    "apply_spec_augment": boolean(),
    "mask_time_prob": real(0, 1),
    "mask_time_length": integer(1),
    "mask_time_min_masks": integer(0),
    "mask_feature_prob": real(0, 1),
    "mask_feature_length": integer(1),
    "mask_feature_min_masks": integer(0),
    "ctc_loss_reduction": choice(("sum", "mean", "none")),
    "ctc_zero_infinity": boolean(),
    "use_weighted_layer_sum": boolean(),
    "classifier_proj_size": integer(1),
    "tdnn_dim": integers(1),
    "tdnn_kernel": integers(1),
    "tdnn_dilation": integers(1),
    "xvector_output_dim": integer(1),
    "pad_token_id": integer(optional=True),
    "bos_token_id": integer(optional=True),
    "eos_token_id": token_id,
    "add_adapter": boolean(),
    "adapter_kernel_size": integer(1),
    "adapter_stride": integer(1),
    "num_adapter_layers": integer(0),
    "adapter_act": activation,
    "use_intermediate_ffn_before_adapter": boolean(),
    "output_hidden_size": integer(1),
    "position_embeddings_type": choice(("relative_key", "relative", "rotary", None)),
    "rotary_embedding_base": integer(1),
    "max_source_positions": integer(1),
    "left_max_position_embeddings": integer(0),
    "right_max_position_embeddings": integer(0),
    "conv_depthwise_kernel_size": integer(1),
    "conformer_conv_dropout": real(0, 1),
    "output_hidden_states": boolean(optional=True),
    "output_attentions": boolean(optional=True),
    "return_dict": boolean(optional=True),
    "dtype": floating_dtype,
    "architectures": strings,
    "problem_type": choice(
        ("regression", "single_label_classification", "multi_label_classification", None)
    ),
    "is_encoder_decoder": boolean(),
    "chunk_size_feed_forward": integer(0),
}

# Fields of all models of the reference, left out of the file while they hold these values.
UNWRITTEN_DEFAULTS: dict[str, object] = {
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "dtype": None,
    "architectures": None,
    "problem_type": None,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
}


def check_together(config: Wav2Vec2BertConfig) -> None:
    """Raise `ValueError` where values of a configuration exclude each other."""
    heads = config.num_attention_heads
    multiple = f"a multiple of num_attention_heads ({heads})"
    if config.hidden_size % heads:
        raise fail("hidden_size", config.hidden_size, multiple)
    if config.add_adapter and config.output_hidden_size % heads:
        raise fail("output_hidden_size", config.output_hidden_size, multiple)
    if config.position_embeddings_type == "rotary" and (config.hidden_size // heads) % 2:
        needed = f"an even multiple of num_attention_heads ({heads}) for rotary positions"
        raise fail("hidden_size", config.hidden_size, needed)
    if config.position_embeddings_type == "relative" and config.hidden_size % 2:
        raise fail("hidden_size", config.hidden_size, "even for relative positions")
    if config.conv_depthwise_kernel_size % 2 == 0:
        raise fail("conv_depthwise_kernel_size", config.conv_depthwise_kernel_size, "odd")
    if config.use_intermediate_ffn_before_adapter and not config.add_adapter:
        needed = "False unless add_adapter is True"
        raise fail("use_intermediate_ffn_before_adapter", True, needed)
    for name in ("tdnn_kernel", "tdnn_dilation"):
        if len(getattr(config, name)) != len(config.tdnn_dim):
            needed = f"of the same length as tdnn_dim ({len(config.tdnn_dim)})"
            raise fail(name, getattr(config, name), needed)
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        needed = "another type for one label: 'regression', or num_labels must be at least 2"
        raise fail("problem_type", config.problem_type, needed)
