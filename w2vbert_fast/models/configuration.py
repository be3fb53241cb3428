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
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from w2vbert_fast.checkpoints.files import make_folder, write_text
from w2vbert_fast.checkpoints.hub import HubMixin, upload_arguments, upload_folder
from w2vbert_fast.checkpoints.keywords import LOADING, take
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.models import config_checks as checks

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"

_Config = TypeVar("_Config", bound="Wav2Vec2BertConfig")

# Besides the fields with a check of their own: other names, and fields of all models of the
# reference, which are kept.
_FURTHER_FIELDS = (
    "torch_dtype",
    "num_labels",
    "id2label",
    "label2id",
    "name_or_path",
    "finetuning_task",
    "gradient_checkpointing",
    "task_specific_params",
    "tokenizer_class",
    "use_cache",
)


class Wav2Vec2BertConfig(HubMixin):
    """All that determines a Wav2Vec2-BERT model besides its weights.

    Values are checked when they are set, here and later (`config.layerdrop = 2` raises), and the
    values together by `validate`, which every constructor, loader and writer calls. Keyword
    arguments that are not listed, such as the keys of the pre-training heads in published files,
    become attributes and survive a round trip through `to_dict` or a file.

    Args:
        vocab_size: number of CTC classes, blank included; needed by `Wav2Vec2BertForCTC` only.
        hidden_size: width of the encoder; a multiple of `num_attention_heads`.
        num_hidden_layers: number of Conformer layers.
        num_attention_heads: attention heads of every layer, the adapter's too.
        intermediate_size: inner width of the feed-forward blocks.
        feature_projection_input_dim: width of `input_features`: mel bins times stacked frames.
        hidden_act: activation of the feed-forward and convolution blocks: a name or a callable
            from tensor to tensor. A configuration with a callable cannot be written to a file.
        hidden_dropout: dropout after each block.
        activation_dropout: dropout inside the feed-forward blocks.
        attention_dropout: dropout of the attention probabilities.
        feat_proj_dropout: dropout after the feature projection.
        final_dropout: dropout before the CTC head.
        layerdrop: probability that training skips a layer.
        initializer_range: standard deviation of newly initialised linear layers.
        layer_norm_eps: epsilon of every LayerNorm.
        apply_spec_augment: whether training masks its inputs (SpecAugment).
        mask_time_prob: share of the frames to mask, before overlaps.
        mask_time_length: frames in one span.
        mask_time_min_masks: least number of spans for one utterance.
        mask_feature_prob: share of the hidden channels to mask, before overlaps.
        mask_feature_length: channels in one span.
        mask_feature_min_masks: least number of channel spans for one utterance.
        ctc_loss_reduction: `"sum"`, `"mean"` or `"none"`.
        ctc_zero_infinity: whether an infinite CTC loss and its gradient count as zero.
        use_weighted_layer_sum: whether classifiers read a learned average of all layers.
        classifier_proj_size: width of the classifiers' projection.
        tdnn_dim: output channels of the TDNN layers of `Wav2Vec2BertForXVector`.
        tdnn_kernel: their kernel sizes in frames.
        tdnn_dilation: their dilations in frames.
        xvector_output_dim: width of the speaker embedding.
        pad_token_id: id of the padding token, which is the CTC blank.
        bos_token_id: id of the beginning-of-sequence token.
        eos_token_id: id (or ids) of the end-of-sequence token.
        add_adapter: whether a downsampling adapter follows the encoder.
        adapter_kernel_size: kernel of the adapter's convolutions in frames.
        adapter_stride: frames that one adapter layer turns into one.
        num_adapter_layers: number of adapter layers.
        adapter_act: activation of the adapter's feed-forward blocks, as `hidden_act`.
        use_intermediate_ffn_before_adapter: whether a feed-forward block stands before the
            adapter; needs `add_adapter`.
        output_hidden_size: width of the adapter's output; None for `hidden_size`.
        position_embeddings_type: `"relative_key"` (Shaw et al. 2018), `"relative"`
            (Transformer-XL), `"rotary"`, or None for no position embeddings.
        rotary_embedding_base: base of the rotary frequencies.
        max_source_positions: frames for which the `"relative"` table is made beforehand.
        left_max_position_embeddings: farthest distinct distance to the left, in frames
            (`"relative_key"`).
        right_max_position_embeddings: farthest distinct distance to the right, in frames
            (`"relative_key"`).
        conv_depthwise_kernel_size: taps of the causal depthwise convolution; odd.
        conformer_conv_dropout: dropout of the convolution blocks.
        output_hidden_states: whether models return all hidden states unless told otherwise.
        output_attentions: whether models return attention probabilities unless told otherwise.
        return_dict: whether models return named outputs (True or None) or tuples (False) unless
            told otherwise.
        dtype: dtype of the weights: a `torch.dtype` or its name.
        num_labels: number of classes of a classifier; makes the names `LABEL_0`, `LABEL_1`, ...
        id2label: names of the classes by index; the indices may be strings, as in JSON.
        label2id: indices of the classes by name; by default the inverse of `id2label`.
        problem_type: `"regression"`, `"single_label_classification"`,
            `"multi_label_classification"`, or None to infer it from `num_labels` and the labels.
        architectures: class names of the models that the weights are for.
        name_or_path: where the configuration was loaded from; not written to files.
        **kwargs: further keys, kept as they are; `torch_dtype` is the older name of `dtype`.

    Raises:
        ValueError: a value that no model can have; the message names the field.
    """

    model_type: ClassVar[str] = "wav2vec2-bert"
    # Two configurations are equal by value, and values can be changed.
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        vocab_size: int | None = None,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        feature_projection_input_dim: int = 160,
        hidden_act: str | Callable[[torch.Tensor], torch.Tensor] = "swish",
        hidden_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        feat_proj_dropout: float = 0.0,
        final_dropout: float = 0.1,
        layerdrop: float = 0.1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        apply_spec_augment: bool = True,
        mask_time_prob: float = 0.05,
        mask_time_length: int = 10,
        mask_time_min_masks: int = 2,
        mask_feature_prob: float = 0.0,
        mask_feature_length: int = 10,
        mask_feature_min_masks: int = 0,
        ctc_loss_reduction: str = "sum",
        ctc_zero_infinity: bool = False,
        use_weighted_layer_sum: bool = False,
        classifier_proj_size: int = 768,
        tdnn_dim: Sequence[int] = (512, 512, 512, 512, 1500),
        tdnn_kernel: Sequence[int] = (5, 3, 3, 1, 1),
        tdnn_dilation: Sequence[int] = (1, 2, 3, 1, 1),
        xvector_output_dim: int = 512,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        add_adapter: bool = False,
        adapter_kernel_size: int = 3,
        adapter_stride: int = 2,
        num_adapter_layers: int = 1,
        adapter_act: str | Callable[[torch.Tensor], torch.Tensor] = "relu",
        use_intermediate_ffn_before_adapter: bool = False,
        output_hidden_size: int | None = None,
        position_embeddings_type: str | None = "relative_key",
        rotary_embedding_base: int = 10000,
        max_source_positions: int = 5000,
        left_max_position_embeddings: int = 64,
        right_max_position_embeddings: int = 8,
        conv_depthwise_kernel_size: int = 31,
        conformer_conv_dropout: float = 0.1,
        *,
        output_hidden_states: bool | None = False,
        output_attentions: bool | None = False,
        return_dict: bool | None = True,
        dtype: torch.dtype | str | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | Mapping[str, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        architectures: Sequence[str] | None = None,
        name_or_path: str = "",
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.feature_projection_input_dim = feature_projection_input_dim
        self.hidden_act = hidden_act
        self.hidden_dropout = hidden_dropout
        self.activation_dropout = activation_dropout
        self.attention_dropout = attention_dropout
        self.feat_proj_dropout = feat_proj_dropout
        self.final_dropout = final_dropout
        self.layerdrop = layerdrop
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.apply_spec_augment = apply_spec_augment
        self.mask_time_prob = mask_time_prob
        self.mask_time_length = mask_time_length
        self.mask_time_min_masks = mask_time_min_masks
        self.mask_feature_prob = mask_feature_prob
        self.mask_feature_length = mask_feature_length
        self.mask_feature_min_masks = mask_feature_min_masks
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.classifier_proj_size = classifier_proj_size
        self.tdnn_dim: list[int] = checks.FIELD_CHECKS["tdnn_dim"]("tdnn_dim", tdnn_dim)
        self.tdnn_kernel: list[int] = checks.FIELD_CHECKS["tdnn_kernel"]("tdnn_kernel", tdnn_kernel)
        self.tdnn_dilation: list[int] = checks.FIELD_CHECKS["tdnn_dilation"](
            "tdnn_dilation", tdnn_dilation
        )
        self.xvector_output_dim = xvector_output_dim
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.add_adapter = add_adapter
        self.adapter_kernel_size = adapter_kernel_size
        self.adapter_stride = adapter_stride
        self.num_adapter_layers = num_adapter_layers
        self.adapter_act = adapter_act
        self.use_intermediate_ffn_before_adapter = use_intermediate_ffn_before_adapter
        self.output_hidden_size = hidden_size if output_hidden_size is None else output_hidden_size
        self.position_embeddings_type = position_embeddings_type
        self.rotary_embedding_base = rotary_embedding_base
        self.max_source_positions = max_source_positions
        self.left_max_position_embeddings = left_max_position_embeddings
        self.right_max_position_embeddings = right_max_position_embeddings
        self.conv_depthwise_kernel_size = conv_depthwise_kernel_size
        self.conformer_conv_dropout = conformer_conv_dropout
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.return_dict = return_dict
        older_dtype = kwargs.pop("torch_dtype", None)
        self.dtype: torch.dtype | None = checks.floating_dtype(
            "dtype", older_dtype if dtype is None else dtype
        )
        self.problem_type = problem_type
        self.architectures: list[str] | None = checks.strings("architectures", architectures)
        self.is_encoder_decoder: bool = kwargs.pop("is_encoder_decoder", False)
        self.chunk_size_feed_forward: int = kwargs.pop("chunk_size_feed_forward", 0)
        self.name_or_path = str(name_or_path or kwargs.pop("_name_or_path", None) or "")
        self._set_labels(num_labels, id2label, label2id)
        self._set_unknown(kwargs)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        check = checks.FIELD_CHECKS.get(name)
        object.__setattr__(self, name, value if check is None else check(name, value))

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
        checks.check_together(self)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by index. Setting it sets `label2id` to its inverse."""
        return self._id2label

    @id2label.setter
    def id2label(self, value: Mapping[int, str] | Mapping[str, str]) -> None:
        self._id2label = checks.label_names("id2label", value)
        self._label2id = {label: index for index, label in self._id2label.items()}

    @property
    def label2id(self) -> dict[str, int]:
        """Indices of the classes by name."""
        return self._label2id

    @label2id.setter
    def label2id(self, value: Mapping[str, int]) -> None:
        self._label2id = checks.label_indices("label2id", value)

    @property
    def num_labels(self) -> int:
        """Number of classes. Setting another number makes the names `LABEL_0`, `LABEL_1`, ..."""
        return len(self._id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        count: int = checks.integer(1)("num_labels", value)
        if count != len(self.__dict__.get("_id2label", ())):
            self.id2label = {index: f"LABEL_{index}" for index in range(count)}

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The older name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: torch.dtype | str | None) -> None:
        self.dtype = checks.floating_dtype("torch_dtype", value)

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
    def from_pretrained(
        cls: type[_Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> _Config:
        """Read `config.json` of a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder, a hub id such as `facebook/w2v-bert-2.0`, or
                the path of a JSON file.
            revision: branch, tag or commit on the hub.
            cache_dir: the hub's cache folder, where it is not the usual one.
            force_download: download the file though it is in the cache.
            local_files_only: never ask the hub, use its cache alone.
            token: the hub's access token.
            subfolder: folder within the checkpoint that holds the file.
            return_unused_kwargs: return the configuration and a dictionary of the overrides that
                are neither a field nor a key of the file, instead of raising for them.
            **overrides: values that replace those of the file. Arguments of transformers that say
                how a model is loaded (`trust_remote_code`, `attn_implementation`, ...) have no
                effect.

        Raises:
            OSError: no such folder, repository or file.
            ValueError: the file is no JSON object, or holds an impossible value, `model_type` is
                another one, or a loading argument cannot be followed.
            TypeError: an override is neither a field nor a key of the file.
        """
        source = os.fspath(pretrained_model_name_or_path)
        repository = Repository(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            subfolder=subfolder,
            force_download=force_download,
        )
        overrides = take(repository.take(overrides), LOADING)
        file = Path(source) if Path(source).is_file() else repository.find(CONFIG_NAME)
        if file is None:
            raise FileNotFoundError(f"{source!r} holds no {CONFIG_NAME}")
        entries = cls._read(file)
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
        return cls(model_type=model_type, **fields)

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
        return cls._from_entries(file, cls._read(file), {})

    @classmethod
    def _read(cls, file: Path) -> dict[str, Any]:
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not a JSON file in UTF-8: {error}") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{file} holds a JSON {type(entries).__name__}; an object is needed")
        return entries

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
        return own or name in checks.FIELD_CHECKS or name in _FURTHER_FIELDS or name in entries

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
                known = {*checks.FIELD_CHECKS, *_FURTHER_FIELDS}
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
                raise checks.fail(name, entries[name], needed)
        if use_diff:
            labels = ("id2label", "label2id")
            common = [name for name in labels if entries[name] != checks.UNWRITTEN_DEFAULTS[name]]
            entries = {
                name: value
                for name, value in entries.items()
                if (name in labels and common)
                or name not in checks.UNWRITTEN_DEFAULTS
                or value != checks.UNWRITTEN_DEFAULTS[name]
            }
        return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    def to_diff_dict(self) -> dict[str, Any]:
        """The entries of `to_json_string`: without common fields that hold their defaults."""
        entries: dict[str, Any] = json.loads(self.to_json_string())
        return entries

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` to a file."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json` into a folder, which is made when it is not there.

        Args:
            save_directory: the folder.
            push_to_hub: also upload the file.
            **kwargs: for the upload, `repo_id` (by default the folder's name) and the arguments of
                `push_to_hub`.

        Raises:
            ValueError: the values exclude each other, or an activation is a callable.
            NotADirectoryError: the path is a file.
            TypeError: an unknown argument.
        """
        upload = upload_arguments(save_directory, push_to_hub, kwargs)
        self.validate()
        text = self.to_json_string()
        write_text(make_folder(save_directory) / CONFIG_NAME, text)
        if upload is not None:
            upload_folder(save_directory, [CONFIG_NAME], **upload)

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
