"""Configuration of the Wav2Vec2-BERT models.

The fields, their defaults and the file format are those of transformers'
`models/wav2vec2_bert/configuration_wav2vec2_bert.py`, so that a `config.json` goes both ways.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from w2vbert_fast.checkpoints.files import make_folder, read_json, write_text
from w2vbert_fast.checkpoints.hub import FilesMixin
from w2vbert_fast.checkpoints.keywords import LOADING
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.models.fields import (
    FloatingDtype,
    LabelCount,
    LabelIndices,
    LabelNames,
    activation,
    boolean,
    choice,
    fail,
    field_class,
    fields_of,
    floating_dtype,
    integer,
    integers,
    real,
    share,
    strings,
    text,
    token_id,
)

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"

_Config = TypeVar("_Config", bound="Wav2Vec2BertConfig")

# Besides the rows: an older name, and keys of all models of the reference, which are kept.
_FURTHER_KEYS = (
    "torch_dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "task_specific_params",
    "tokenizer_class",
    "use_cache",
)

# What a file leaves out where both are so.
_USUAL_LABELS = {
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
}


@field_class
class Wav2Vec2BertConfig(FilesMixin):
    """All that determines a Wav2Vec2-BERT model besides its weights.

    Values are checked when they are set, here and later (`config.layerdrop = 2` raises), and the
    values together by `validate`, which every constructor, loader and writer calls. Keyword
    arguments that are not listed, such as the keys of the pre-training heads in published files,
    become attributes and survive a round trip through `to_dict` or a file.

    Args:
        ...: the rows below.
        **kwargs: further keys, kept as they are; `torch_dtype` is the older name of `dtype`.

    Raises:
        ValueError: a value that no model can have; the message names the field.
    """

    _keywords = LOADING

    vocab_size: int | None = integer(
        None,
        1,
        "number of CTC classes, blank included; needed by `Wav2Vec2BertForCTC` only.",
        optional=True,
    )
    hidden_size: int = integer(
        1024, 1, "width of the encoder; a multiple of `num_attention_heads`."
    )
    num_hidden_layers: int = integer(24, 0, "number of Conformer layers.")
    num_attention_heads: int = integer(16, 1, "attention heads of every layer, the adapter's too.")
    intermediate_size: int = integer(4096, 1, "inner width of the feed-forward blocks.")
    feature_projection_input_dim: int = integer(
        160, 1, "width of `input_features`: mel bins times stacked frames."
    )
    hidden_act: str | Callable[[torch.Tensor], torch.Tensor] = activation(
        "swish",
        "activation of the feed-forward and convolution blocks: a name or a callable from tensor "
        "to tensor. A configuration with a callable cannot be written to a file.",
    )
    hidden_dropout: float = share(0.0, "dropout after each block.")
    activation_dropout: float = share(0.0, "dropout inside the feed-forward blocks.")
    attention_dropout: float = share(0.0, "dropout of the attention probabilities.")
    feat_proj_dropout: float = share(0.0, "dropout after the feature projection.")
    final_dropout: float = share(0.1, "dropout before the CTC head.")
    layerdrop: float = share(0.1, "probability that training skips a layer.")
    initializer_range: float = real(
        0.02, 0, "standard deviation of newly initialised linear layers."
    )
    layer_norm_eps: float = real(1e-5, 0, "epsilon of every LayerNorm.", exclusive=True)
    apply_spec_augment: bool = boolean(True, "whether training masks its inputs (SpecAugment).")
    mask_time_prob: float = share(0.05, "share of the frames to mask, before overlaps.")
    mask_time_length: int = integer(10, 1, "frames in one span.")
    mask_time_min_masks: int = integer(2, 0, "least number of spans for one utterance.")
    mask_feature_prob: float = share(0.0, "share of the hidden channels to mask, before overlaps.")
    mask_feature_length: int = integer(10, 1, "channels in one span.")
    mask_feature_min_masks: int = integer(0, 0, "least number of channel spans for one utterance.")
    ctc_loss_reduction: str = choice(
        "sum", ("sum", "mean", "none"), '`"sum"`, `"mean"` or `"none"`.'
    )
    ctc_zero_infinity: bool = boolean(
        False, "whether an infinite CTC loss and its gradient count as zero."
    )
    use_weighted_layer_sum: bool = boolean(
        False, "whether classifiers read a learned average of all layers."
    )
    classifier_proj_size: int = integer(768, 1, "width of the classifiers' projection.")
    tdnn_dim: Sequence[int] = integers(
        (512, 512, 512, 512, 1500),
        1,
        "output channels of the TDNN layers of `Wav2Vec2BertForXVector`.",
    )
    tdnn_kernel: Sequence[int] = integers((5, 3, 3, 1, 1), 1, "their kernel sizes in frames.")
    tdnn_dilation: Sequence[int] = integers((1, 2, 3, 1, 1), 1, "their dilations in frames.")
    xvector_output_dim: int = integer(512, 1, "width of the speaker embedding.")
    pad_token_id: int | None = integer(
        0, None, "id of the padding token, which is the CTC blank.", optional=True
    )
    bos_token_id: int | None = integer(
        1, None, "id of the beginning-of-sequence token.", optional=True
    )
    eos_token_id: int | list[int] | None = token_id(2, "id (or ids) of the end-of-sequence token.")
    add_adapter: bool = boolean(False, "whether a downsampling adapter follows the encoder.")
    adapter_kernel_size: int = integer(3, 1, "kernel of the adapter's convolutions in frames.")
    adapter_stride: int = integer(2, 1, "frames that one adapter layer turns into one.")
    num_adapter_layers: int = integer(1, 0, "number of adapter layers.")
    adapter_act: str | Callable[[torch.Tensor], torch.Tensor] = activation(
        "relu", "activation of the adapter's feed-forward blocks, as `hidden_act`."
    )
    use_intermediate_ffn_before_adapter: bool = boolean(
        False, "whether a feed-forward block stands before the adapter; needs `add_adapter`."
    )
    output_hidden_size: int | None = integer(
        None, 1, "width of the adapter's output; None for `hidden_size`."
    )
    position_embeddings_type: str | None = choice(
        "relative_key",
        ("relative_key", "relative", "rotary", None),
        '`"relative_key"` (Shaw et al. 2018), `"relative"` (Transformer-XL), `"rotary"`, or None '
        "for no position embeddings.",
    )
    rotary_embedding_base: int = integer(10000, 1, "base of the rotary frequencies.")
    max_source_positions: int = integer(
        5000, 1, 'frames for which the `"relative"` table is made beforehand.'
    )
    left_max_position_embeddings: int = integer(
        64, 0, 'farthest distinct distance to the left, in frames (`"relative_key"`).'
    )
    right_max_position_embeddings: int = integer(
        8, 0, 'farthest distinct distance to the right, in frames (`"relative_key"`).'
    )
    conv_depthwise_kernel_size: int = integer(
        31, 1, "taps of the causal depthwise convolution; odd."
    )
    conformer_conv_dropout: float = share(0.1, "dropout of the convolution blocks.")
    _: KW_ONLY
    output_hidden_states: bool | None = boolean(
        False,
        "whether models return all hidden states unless told otherwise.",
        optional=True,
        common=True,
    )
    output_attentions: bool | None = boolean(
        False,
        "whether models return attention probabilities unless told otherwise.",
        optional=True,
        common=True,
    )
    return_dict: bool | None = boolean(
        True,
        "whether models return named outputs (True or None) or tuples (False) unless told "
        "otherwise.",
        optional=True,
        common=True,
    )
    dtype: FloatingDtype = FloatingDtype("dtype of the weights: a `torch.dtype` or its name.")
    num_labels: LabelCount = LabelCount(
        "number of classes of a classifier; makes the names `LABEL_0`, `LABEL_1`, ..."
    )
    id2label: LabelNames = LabelNames(
        "names of the classes by index; the indices may be strings, as in JSON."
    )
    label2id: LabelIndices = LabelIndices(
        "indices of the classes by name; by default the inverse of `id2label`."
    )
    problem_type: str | None = choice(
        None,
        ("regression", "single_label_classification", "multi_label_classification", None),
        '`"regression"`, `"single_label_classification"`, `"multi_label_classification"`, or None '
        "to infer it from `num_labels` and the labels.",
        common=True,
    )
    architectures: Sequence[str] | None = strings(
        "class names of the models that the weights are for.", common=True
    )
    name_or_path: str = text("", "where the configuration was loaded from; not written to files.")
    is_encoder_decoder: bool = boolean(
        False, "of all models of the reference; without a meaning here.", common=True
    )
    chunk_size_feed_forward: int = integer(
        0, 0, "of all models of the reference; without a meaning here.", common=True
    )

    model_type: ClassVar[str] = "wav2vec2-bert"
    # Which revision on the hub is not kept. The pipelines of transformers up to 5.16 read it.
    _commit_hash: ClassVar[None] = None
    # Two configurations are equal by value, and values can be changed.
    __hash__ = None  # type: ignore[assignment]

    def _begin(self, values: dict[str, Any], further: dict[str, Any]) -> None:
        """The constructor's work: see `fields.field_class`."""
        older_dtype, older_name = further.pop("torch_dtype", None), further.pop("_name_or_path", "")
        if values["dtype"] is None:
            values["dtype"] = older_dtype
        if values["output_hidden_size"] is None:
            values["output_hidden_size"] = values["hidden_size"]
        values["name_or_path"] = str(values["name_or_path"] or older_name or "")
        labels = {name: values.pop(name) for name in ("num_labels", "id2label", "label2id")}
        for name, value in values.items():
            setattr(self, name, value)
        self._set_labels(**labels)
        self._set_unknown(further)
        self.validate()

    def _set_labels(
        self,
        num_labels: int | None,
        id2label: Mapping[int, str] | Mapping[str, str] | None,
        label2id: Mapping[str, int] | None,
    ) -> None:
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            self.id2label = id2label
            if num_labels is not None and num_labels != self.num_labels:
                logger.warning(
                    "num_labels is %r but id2label names %d labels; id2label counts",
                    num_labels,
                    self.num_labels,
                )
        if label2id is not None:
            self.label2id = label2id

    def _set_unknown(self, entries: Mapping[str, Any]) -> None:
        model_type = entries.get("model_type", self.model_type)
        if model_type != self.model_type:
            models = ", ".join(self.architectures or ())
            of_models = f", the model of another architecture ({models})" if models else ""
            raise ValueError(
                f"model_type is {model_type!r}{of_models}; it must be {self.model_type!r}"
            )
        # A key that would hide a method or a private attribute is carried along, not set.
        self._hidden_entries: dict[str, Any] = {}
        for name, value in entries.items():
            if name.startswith("_") or hasattr(type(self), name):
                if name not in ("model_type", "_name_or_path", "_commit_hash"):
                    self._hidden_entries[name] = value
            else:
                setattr(self, name, value)

    def validate(self) -> None:
        """Check the values against each other.

        Raises:
            ValueError: values that no model can have together; the message names the fields.
        """
        heads = self.num_attention_heads
        multiple = f"a multiple of num_attention_heads ({heads})"
        if self.hidden_size % heads:
            raise fail("hidden_size", self.hidden_size, multiple)
        width = self.output_hidden_size
        if self.add_adapter and (width is None or width % heads):
            raise fail("output_hidden_size", width, multiple)
        if self.position_embeddings_type == "rotary" and (self.hidden_size // heads) % 2:
            needed = f"an even multiple of num_attention_heads ({heads}) for rotary positions"
            raise fail("hidden_size", self.hidden_size, needed)
        if self.position_embeddings_type == "relative" and self.hidden_size % 2:
            raise fail("hidden_size", self.hidden_size, "even for relative positions")
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise fail("conv_depthwise_kernel_size", self.conv_depthwise_kernel_size, "odd")
        if self.use_intermediate_ffn_before_adapter and not self.add_adapter:
            needed = "False unless add_adapter is True"
            raise fail("use_intermediate_ffn_before_adapter", True, needed)
        for name in ("tdnn_kernel", "tdnn_dilation"):
            if len(getattr(self, name)) != len(self.tdnn_dim):
                needed = f"of the same length as tdnn_dim ({len(self.tdnn_dim)})"
                raise fail(name, getattr(self, name), needed)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            needed = "another type for one label: 'regression', or num_labels must be at least 2"
            raise fail("problem_type", self.problem_type, needed)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The older name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: torch.dtype | str | None) -> None:
        self.dtype = floating_dtype("torch_dtype", value)

    @property
    def use_return_dict(self) -> bool | None:
        """The older name of `return_dict`, read only."""
        return self.return_dict

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Product of `2 * feature_projection_input_dim` and the adapter's strides, if any.

        The reference's number, for code that divides sample counts by it. Output lengths in
        frames: `model.valid_lengths`.
        """
        ratio = 2 * self.feature_projection_input_dim
        return ratio * self.adapter_stride**self.num_adapter_layers if self.add_adapter else ratio

    @classmethod
    def _from_repository(
        cls: type[_Config], repository: Repository, overrides: dict[str, Any]
    ) -> _Config:
        """Of `config.json`.

        An override `return_unused_kwargs` returns the configuration and a dictionary of the
        overrides that are neither a field nor a key of the file, instead of raising for them.
        """
        return_unused_kwargs = overrides.pop("return_unused_kwargs", False)
        source = repository.name
        file = Path(source) if Path(source).is_file() else repository.find(CONFIG_NAME)
        if file is None:
            raise FileNotFoundError(f"{source!r} holds no {CONFIG_NAME}")
        entries = read_json(file)
        unused: dict[str, Any] = {}
        if return_unused_kwargs:
            unused = {k: v for k, v in overrides.items() if not cls._can_override(k, entries)}
        chosen = {name: value for name, value in overrides.items() if name not in unused}
        config = cls._from_entries(file, entries, chosen)
        config.name_or_path = source
        return (config, unused) if return_unused_kwargs else config  # type: ignore[return-value]

    @classmethod
    def for_model(cls: type[_Config], model_type: str, **fields: Any) -> _Config:
        """A configuration with these fields, as transformers' `AutoConfig.for_model`.

        Raises:
            ValueError: `model_type` is not `"wav2vec2-bert"`, or an impossible value.
        """
        return cls(**{"model_type": model_type, **fields})

    @classmethod
    def from_any(cls: type[_Config], config: object) -> _Config:
        """The configuration that an object stands for.

        Args:
            config: one of this class, which is returned as it is; one of transformers, whose
                values are taken over; or what `from_pretrained` reads.

        Raises:
            TypeError: it is something else.
            ValueError: it belongs to another kind of model, or holds an impossible value.
            OSError: it names no folder, repository or file that can be read.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, str | os.PathLike):
            return cls.from_pretrained(config)
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        to_dict = getattr(config, "to_dict", None)
        if not callable(to_dict) or isinstance(config, type):
            raise TypeError(
                f"config is {kind}; it must be a {cls.__name__}, here or of transformers"
            )
        entries = to_dict()
        if not isinstance(entries, Mapping) or entries.get("model_type") != cls.model_type:
            found = entries.get("model_type") if isinstance(entries, Mapping) else entries
            raise ValueError(
                f"config is {kind} with model_type {found!r}; it must be {cls.model_type!r}"
            )
        made = cls.from_dict(entries)
        made.name_or_path = str(getattr(config, "name_or_path", ""))
        return made

    @classmethod
    def from_json_file(cls: type[_Config], json_file: str | os.PathLike[str]) -> _Config:
        """Read a configuration from a JSON file, with the errors of `from_pretrained`."""
        file = Path(json_file)
        return cls._from_entries(file, read_json(file), {})

    @classmethod
    def _from_entries(
        cls: type[_Config], file: Path, entries: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> _Config:
        try:
            return cls.from_dict(entries, **overrides)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def _can_override(cls, name: str, entries: Mapping[str, Any]) -> bool:
        # A class that derives from this may have further fields.
        own = name in inspect.signature(cls).parameters
        return own or name in fields_of(cls) or name in _FURTHER_KEYS or name in entries

    @classmethod
    def from_dict(cls: type[_Config], config_dict: Mapping[str, Any], **overrides: Any) -> _Config:
        """Build a configuration from a dictionary such as `to_dict` returns.

        Args:
            config_dict: fields and further keys.
            **overrides: values that replace those of the dictionary. A `num_labels` that differs
                from the dictionary's labels replaces them by `LABEL_0`, `LABEL_1`, ...

        Raises:
            ValueError: an impossible value.
            TypeError: an override is neither a field nor a key of the dictionary.
        """
        entries = copy.deepcopy(dict(config_dict))
        for name in overrides:
            if not cls._can_override(name, entries):
                known = {*fields_of(cls), *_FURTHER_KEYS}
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{name!r} is no field of {cls.__name__}{hint}")
        labels = entries.get("id2label")
        label_count = len(labels) if isinstance(labels, Mapping) else 2
        if "id2label" in overrides or overrides.get("num_labels", label_count) != label_count:
            entries = {k: v for k, v in entries.items() if k not in ("id2label", "label2id")}
        if "id2label" in overrides or "num_labels" in overrides:
            entries.pop("num_labels", None)
        if "dtype" in overrides or "torch_dtype" in overrides:
            entries.pop("dtype", None)
            entries.pop("torch_dtype", None)
        return cls(**{**entries, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields and further keys, the dtype by name, as a new dictionary."""
        entries = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        del entries["name_or_path"]
        entries |= self._hidden_entries
        entries |= {
            "model_type": self.model_type,
            "id2label": self.id2label,
            "label2id": self.label2id,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }
        return copy.deepcopy(entries)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The configuration as JSON, keys sorted.

        Args:
            use_diff: leave out the fields common to all models of the reference while they hold
                their defaults, as the reference does.

        Raises:
            ValueError: an activation is a callable, which JSON cannot hold.
        """
        entries = self.to_dict()
        for name in ("hidden_act", "adapter_act"):
            if not isinstance(entries[name], str):
                needed = "the name of an activation to be written to a file"
                raise fail(name, entries[name], needed)
        if use_diff:
            unwritten = {
                name: row.default for name, row in fields_of(type(self)).items() if row.common
            }
            if {name: entries[name] for name in _USUAL_LABELS} == _USUAL_LABELS:
                unwritten |= _USUAL_LABELS
            for name, default in unwritten.items():
                if entries[name] == default:
                    del entries[name]
        return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    def to_diff_dict(self) -> dict[str, Any]:
        """The entries of `to_json_string`: without common fields that hold their defaults."""
        entries: dict[str, Any] = json.loads(self.to_json_string())
        return entries

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` to a file."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def _write_files(self, folder: Path) -> list[str]:
        """`config.json`. Raises `ValueError` where values exclude each other, or an activation is a
        callable."""
        self.validate()
        text = self.to_json_string()
        path = make_folder(folder) / CONFIG_NAME
        write_text(path, text)
        return [str(path)]

    def update(self, entries: Mapping[str, Any]) -> None:
        """Set several fields, then check them together."""
        for name, value in entries.items():
            setattr(self, name, value)
        self.validate()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Wav2Vec2BertConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        entries = json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)
        return f"{type(self).__name__} {entries}"
