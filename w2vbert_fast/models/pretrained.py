"""What all models share: loading, saving, and switches that reach every submodule."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from w2vbert_fast.checkpoints.hub import HubMixin, upload_arguments, upload_folder
from w2vbert_fast.checkpoints.keywords import LOADING, SAVING, take
from w2vbert_fast.checkpoints.loading import load_weights, place
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.checkpoints.weights import find_checkpoint, write_checkpoint
from w2vbert_fast.models.adapter import conv_output_length
from w2vbert_fast.models.beside_transformers import join_transformers
from w2vbert_fast.models.configuration import CONFIG_NAME, Wav2Vec2BertConfig
from w2vbert_fast.models.fields import floating_dtype
from w2vbert_fast.models.initialization import initialize_weights
from w2vbert_fast.models.layers import Wav2Vec2BertFeatureProjection, Wav2Vec2BertSelfAttention
from w2vbert_fast.models.optimized.graphs import (
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_GRAPHS,
    LayerGraphs,
)
from w2vbert_fast.models.optimized.int8 import (
    check_int8,
    dtype_beside_int8,
    keep_ctc_head,
    quantize_encoder,
)
from w2vbert_fast.models.optimized.packed import pack_encoder
from w2vbert_fast.models.optimized.stacked import stack
from w2vbert_fast.models.outputs import ModelOutput
from w2vbert_fast.models.recompute import Policy, Recompute
from w2vbert_fast.models.tracing import recorder
from w2vbert_fast.ops import tuned
from w2vbert_fast.ops.cpu.capability import onednn_linear

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound="Wav2Vec2BertPreTrainedModel")

# What torch's own modules call to draw initial weights, on the way to these two methods.
_DRAWS = (
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
    Tensor.uniform_,
    Tensor.normal_,
)


_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GUARDED = (
    "torch.export",
    "make_fx",
)  # of a call without a mask they record what depends on shapes
_NOT_RECORDED = (
    "cannot record this model: which frames are computed depends on attention_mask, and the record "
    "would be right for that of the example alone. `w2vbert-fast export` "
    "(w2vbert_fast.export.export) writes ONNX, an AOTInductor package or a torch.export program "
    "that takes any mask"
)
_said: list[bool] = []


class _WithoutDrawing(TorchFunctionMode):
    """Leave out random initial values.

    On the meta device they would draw nothing, and yet make torch import its compiler: 150 MB and
    more than a second.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Wav2Vec2BertPreTrainedModel(HubMixin, nn.Module):
    """Base of all models: configuration, checkpoints in and out, model-wide switches.

    Args:
        config: the model's configuration, kept as it is; or one of transformers, whose values are
            taken over.

    Raises:
        TypeError: `config` is neither.
        ValueError: the configuration's values exclude each other, or it is of another model.
    """

    # Transformers' `Trainer` and Accelerate read these.
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _no_split_modules: ClassVar[list[str]] = ["Wav2Vec2BertEncoderLayer"]

    config_class: ClassVar[type[Wav2Vec2BertConfig]] = Wav2Vec2BertConfig
    base_model_prefix: ClassVar[str] = "wav2vec2_bert"
    main_input_name: ClassVar[str] = "input_features"
    input_modalities: ClassVar[str] = "audio"
    supports_gradient_checkpointing: ClassVar[bool] = True

    config: Wav2Vec2BertConfig

    HEAD: ClassVar[tuple[str, ...]] = ()
    """Names of the modules that are not the encoder."""
    EXPORTED: ClassVar[tuple[str, ...]] = ()
    """Names of what `padded_outputs` returns; none where a class cannot be exported."""
    _heads: ClassVar[set[str]] = {"layer_weights"}
    """What the heads of all classes keep their weights in."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._heads.update(cls.HEAD)

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        config = self.config_class.from_any(config)
        config.validate()
        self.config = config
        self._use_fast_kernels: bool | None = None  # None: nobody has chosen
        self._require_grads_hooks: list[RemovableHandle] = []

    def post_init(self) -> None:
        """Draw the initial weights. Every model calls this at the end of its `__init__`.

        Nothing is drawn on the meta device, where there is no memory to draw into, and parts that
        are models themselves keep the weights that they have drawn. An entry
        `gradient_checkpointing` of older configurations is carried out and taken out.
        """
        if getattr(self.config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()
            vars(self.config).pop("gradient_checkpointing")
        parameters = dict(self.named_parameters())
        if any(parameter.is_meta for parameter in parameters.values()):
            return
        self._draw(parameters)

    def _draw(self, names: Collection[str]) -> None:
        """Draw the named parameters' initial values, but for those of parts that are models."""
        parts = tuple(
            f"{name}."
            for name, module in self.named_modules()
            if name and isinstance(module, Wav2Vec2BertPreTrainedModel)
        )
        initialize_weights(self, [name for name in names if not name.startswith(parts)])
        if type(self)._init_weights is not Wav2Vec2BertPreTrainedModel._init_weights:
            with torch.no_grad():
                # A module after what it holds, so that it has the last word.
                for name, module in reversed(list(self.named_modules())):
                    if not f"{name}.".startswith(parts):
                        self._init_weights(module)

    def init_weights(self) -> None:
        """`post_init` by its older name, which models that derive from these still call."""
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that a module itself holds, its children's not.

        As in transformers, a class that derives from these may say here how its own modules begin:
        `post_init` calls it for each.
        """
        names = list(module._parameters)
        if isinstance(module, Wav2Vec2BertFeatureProjection):  # whose projection begins otherwise
            names = ["projection.weight", "projection.bias"]
        initialize_weights(module, names, self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: Wav2Vec2BertConfig | str | os.PathLike[str] | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: torch.device | str | int | Mapping[str, Any] | None = None,
        use_fast_kernels: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        variant: str | None = None,
        use_safetensors: bool | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        **config_overrides: Any,
    ) -> _Model:
        """Load a model from a folder or the hub.

        Reads `config.json` and the weights (see `checkpoints.weights`). A checkpoint of the
        encoder alone, or with another kind of head, can be loaded into a model with a head, which
        is newly initialised with a warning, and a checkpoint with a head into the encoder alone.
        The same goes for what the caller's `config` or overrides add or take away, such as
        `add_adapter=True` or `num_hidden_layers=12`. Nothing is loaded unless everything else fits;
        memory stays near the size of the weights.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id such as `facebook/w2v-bert-2.0`.
            *model_args: what the class's constructor takes behind `config`.
            config: the configuration to use instead of the checkpoint's; it is copied. One of
                transformers, or what `Wav2Vec2BertConfig.from_pretrained` reads, will do.
            revision: as `Wav2Vec2BertConfig.from_pretrained`; likewise `cache_dir`,
                `force_download`, `local_files_only`, `token` and `subfolder`.
            dtype: floating point dtype of the weights, or its name. None and `"auto"`: what the
                configuration says, else what the weights have. `"int8"`, on the CPU: the linear
                layers of the encoder are quantised, weights by output channel and activations by
                token, and the rest becomes bfloat16 where the CPU multiplies it (AVX512-BF16, AMX).
                An int8 model is for inference and cannot be saved.
            device: where the weights go; by default the CPU.
            device_map: the same, as transformers has it: a device, a map of all modules to one, or
                `"auto"`, which is the accelerator where there is one.
            use_fast_kernels: see the property of that name; None: off, which the log says at the
                first call.
            variant: the weights of that variant, such as `"fp16"` for `model.fp16.safetensors`.
            use_safetensors: True: safetensors or nothing. False: `.bin` files or nothing.
            strict: whether missing or unexpected tensors are an error; else there is a warning,
                and what is missing is newly initialised.
            ignore_mismatched_sizes: newly initialise parameters whose stored shape differs, with
                a warning, instead of raising.
            output_loading_info: return the model and a dictionary of `missing_keys`,
                `unexpected_keys`, `mismatched_keys` (name, stored shape, shape here) and
                `error_msgs` (none), as transformers does.
            torch_dtype: the older name of `dtype`.
            **config_overrides: arguments of the class's own constructor, and values that replace
                those of the configuration. Further arguments of transformers have no effect here
                (`attn_implementation`, `low_cpu_mem_usage`, `trust_remote_code`, `weights_only`,
                ...), or are refused where they would change an answer (`quantization_config`,
                `from_tf`, ...).

        Returns:
            The model, in evaluation mode.

        Raises:
            OSError: no such folder or repository, or it has no `config.json`.
            CheckpointError: the weights are missing, damaged or do not fit. A `ValueError`.
            ValueError: the configuration or an argument has an impossible value, int8 cannot
                run here, or an argument of transformers cannot be followed.
            TypeError: a keyword argument is neither listed here nor a field of the configuration.
        """
        dtype = torch_dtype if dtype is None else dtype
        int8 = dtype == "int8"
        chosen = None if dtype == "auto" or int8 else floating_dtype("dtype", dtype)
        target = _one_device(device, device_map)
        if int8:
            check_int8(target)
        where = (revision, cache_dir, local_files_only, token, subfolder, force_download)
        repository = Repository(pretrained_model_name_or_path, *where)
        overrides = take(repository.take(config_overrides), LOADING)
        arguments = {name: overrides.pop(name) for name in _own_arguments(cls) & overrides.keys()}

        def make(settings: Wav2Vec2BertConfig) -> _Model:
            return cls(settings, *model_args, **arguments)

        # Also for the commit of the first file, which counts for all: a branch may move meanwhile.
        config_file = repository.find(CONFIG_NAME)
        if config is not None:
            config = cls.config_class.from_any(config)
            config = copy.deepcopy(config)
            if overrides:
                config = type(config).from_dict(config.to_dict(), **overrides)
        elif config_file is not None:
            config = cls.config_class.from_pretrained(config_file, **overrides)
        else:
            raise FileNotFoundError(f"{repository.name!r} holds no {CONFIG_NAME}")
        checkpoint = find_checkpoint(repository, variant=variant, use_safetensors=use_safetensors)
        config.dtype = chosen or config.dtype or checkpoint.dtype
        config.name_or_path = repository.name

        info = load_weights(
            model := _on_meta(make, config),
            checkpoint,
            base_model_prefix=cls.base_model_prefix,
            heads=cls._heads,
            dtype=config.dtype or torch.get_default_dtype(),
            device=target,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            names_as_stored=lambda: _names_as_stored(cls, make, config_file, config),
        )
        if _is_of_a_caller(cls):
            _take_from(lambda: make(copy.deepcopy(config)), model, info.empty)
        elif info.empty:
            initialize_weights(model, info.empty)
        _materialize_buffers(model, target)
        if int8:
            # Quantised before the rest is rounded.
            quantize_encoder(model)
            with keep_ctc_head(model):
                model.to(dtype_beside_int8(model.dtype))
            model.config.dtype = model.dtype
        if use_fast_kernels is not None:
            model.use_fast_kernels = use_fast_kernels
        model.eval()
        if not output_loading_info:
            return model
        report = {
            "missing_keys": set(info.missing),
            "unexpected_keys": set(info.unexpected),
            "mismatched_keys": set(info.mismatched),
            "error_msgs": [],
        }
        return model, report  # type: ignore[return-value]

    @classmethod
    def from_config(
        cls: type[_Model],
        config: Wav2Vec2BertConfig,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> _Model:
        """A model with newly drawn weights, as transformers' `AutoModel.from_config` makes it.

        Args:
            config: as the constructor takes it; it is copied.
            dtype: floating point dtype of the weights, or its name; by default float32.
            torch_dtype: the older name of `dtype`.
            **kwargs: further arguments of transformers, as in `from_pretrained`.

        Raises:
            ValueError: an argument has an impossible value or cannot be followed.
            TypeError: `config` is no configuration, or an unknown argument.
        """
        unknown = take(kwargs, LOADING)
        if unknown:
            raise TypeError(f"{', '.join(sorted(unknown))}: no argument of from_config")
        model = cls(copy.deepcopy(config))
        chosen = floating_dtype("dtype", torch_dtype if dtype is None else dtype)
        return model if chosen is None else model.to(chosen)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and the weights as safetensors into a folder.

        The files are those of transformers, which loads them. They are complete under temporary
        names before they get their own, and replace what an earlier save has left.

        Args:
            save_directory: the folder; made when it is not there.
            is_main_process: `False`: nothing is written. For scripts that call this in every
                process.
            state_dict: what to write instead of `self.state_dict()`, such as gathered shards.
            push_to_hub: also upload the files that were written.
            max_shard_size: most bytes in one file, as a number or such as `"5GB"`.
            **kwargs: for the upload, `repo_id` (by default the folder's name) and the arguments of
                `push_to_hub`. Of transformers, `save_function` and `safe_serialization` have no
                effect: weights are written as safetensors.

        Raises:
            ValueError: the configuration cannot be written, `max_shard_size` is no size, the
                model is quantised to int8, or an argument of transformers cannot be followed.
            NotADirectoryError: the path is a file.
            TypeError: an unknown argument.
        """
        upload = upload_arguments(save_directory, push_to_hub, take(kwargs, SAVING))
        if not is_main_process:
            return
        config = self.config_to_save()
        config.to_json_string()  # raises before anything is written
        state_dict = self.state_dict() if state_dict is None else state_dict
        files = write_checkpoint(state_dict, save_directory, max_shard_size=max_shard_size)
        config.save_pretrained(save_directory)
        if upload is not None:
            upload_folder(save_directory, [CONFIG_NAME, *(file.name for file in files)], **upload)

    def config_to_save(self) -> Wav2Vec2BertConfig:
        """The configuration with the model's class and dtype, as `config.json` has it."""
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__.removeprefix("FSDP")]
        for encoder in self._parts_with("layer_graphs"):
            config.num_hidden_layers = encoder.num_layers  # a caller may have cut them
        config.dtype = self.dtype
        return config

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """What an exported program computes of the encoder's output, on padded tensors.

        Args:
            x: `[batch, T', C']`; padding may hold anything.
            mask: bool `[batch, T']`, valid frames, contiguous in a row.
            tokens: `mask` with the half frames (`layout`).

        Returns:
            The outputs that `EXPORTED` names; `lengths` are int64 `[batch]`.
        """
        raise NotImplementedError

    @property
    def fewest_frames(self) -> int:
        """Output frames that an utterance must have at least."""
        return 1

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(f"torch.jit.script {_NOT_RECORDED}")

    @property
    def base_model(self) -> nn.Module:
        """The encoder: a part of a model with a head, else the model itself."""
        module: nn.Module = getattr(self, self.base_model_prefix, self)
        return module

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters' elements.

        Args:
            only_trainable: count those that need a gradient.
            exclude_embeddings: leave out the tables of relative positions, as transformers does.
        """
        tables = {
            id(module.weight)
            for module in self.modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in tables and (p.requires_grad or not only_trainable)
        )

    def _get_feat_extract_output_lengths(
        self, input_lengths: Tensor | int, add_adapter: bool | None = None
    ) -> Tensor:
        """Output frames for numbers of input frames, int64 of the same shape.

        Code that was written for transformers' models calls this; `valid_lengths` is ours.
        """
        config = self.config
        given = input_lengths
        if not isinstance(given, Tensor):  # which the default device would be asked for
            given = torch.as_tensor(given)
        lengths = given.flatten().tolist()
        shortens = config.add_adapter if add_adapter is None else add_adapter
        for _ in range(config.num_adapter_layers if shortens else 0):
            lengths = [
                conv_output_length(n, config.adapter_kernel_size, config.adapter_stride)
                for n in lengths
            ]
        return torch.tensor(lengths, dtype=torch.int64, device=given.device).view(given.shape)

    def _get_feature_vector_attention_mask(
        self,
        feature_vector_length: int,
        attention_mask: Tensor,
        add_adapter: bool | None = None,
    ) -> Tensor:
        """The mask of the output's frames, bool `[batch, feature_vector_length]`, as transformers
        makes it."""
        lengths = (attention_mask != 0).sum(-1)
        lengths = self._get_feat_extract_output_lengths(lengths, add_adapter)
        frames = torch.arange(feature_vector_length, device=attention_mask.device)
        return frames < lengths[:, None]

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers with `return_buffers`."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str]) -> None:
        """Takes the names that transformers takes; all give the same answer here.

        Raises:
            ValueError: it is none of them.
        """
        take({"attn_implementation": attn_implementation}, LOADING)

    def floating_point_ops(
        self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True
    ) -> int:
        """Rough FLOPs of a training step, as transformers' `Trainer` counts them.

        Six for each parameter and each element of the input: a number to compare runs by, far above
        what is computed. `python -m bench.ledger --training` counts the real one.
        """
        elements: int = input_dict[self.main_input_name].numel()
        return 6 * elements * self.num_parameters(exclude_embeddings=exclude_embeddings)

    def to(self: _Model, *args: Any, **kwargs: Any) -> _Model:
        """As `torch.nn.Module.to`."""
        join_transformers(ModelOutput)
        return super().to(*args, **kwargs)

    @classmethod
    def can_generate(cls) -> bool:
        """`False`: no model here writes its output token by token, as a decoder does."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """Raises `NotImplementedError`, as transformers' models that read features do."""
        raise NotImplementedError(f"{type(self).__name__} reads features; it embeds no tokens")

    def get_output_embeddings(self) -> None:
        """`None`: no layer shares its weights with an embedding of tokens."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: no weights are shared. Accelerate and transformers call it."""

    def enable_input_require_grads(self) -> None:
        """Let the encoder's input need a gradient, though no parameter before it does.

        Layers with frozen weights, as under LoRA, have none otherwise where they are recomputed
        reentrantly.
        """
        self.disable_input_require_grads()

        def require(module: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
            if torch.is_grad_enabled():
                output[0].requires_grad_(True)

        self._require_grads_hooks = [
            module.register_forward_hook(require)
            for module in self.modules()
            if isinstance(module, Wav2Vec2BertFeatureProjection)
        ]

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for hook in self._require_grads_hooks:
            hook.remove()
        self._require_grads_hooks = []

    @property
    def use_fast_kernels(self) -> bool:
        """Whether the fast implementation of each operation runs where the device has one.

        Setting it sets the attribute of that name on every submodule that has it.
        """
        return bool(self._use_fast_kernels)

    @use_fast_kernels.setter
    def use_fast_kernels(self, value: bool) -> None:
        self._use_fast_kernels = bool(value)
        for module in self._parts_with("use_fast_kernels"):
            module.use_fast_kernels = bool(value)
            if value and isinstance(module, Wav2Vec2BertSelfAttention):
                stack(module)

    def _check_call(self, input_features: Any, attention_mask: Tensor | None) -> None:
        """What every call of a model looks at first.

        Raises:
            RuntimeError: the call is recorded, in a way that makes the utterances' lengths
                constants of the record.
        """
        how = "torch.fx" if isinstance(input_features, torch.fx.Proxy) else recorder()
        if how is not None and (attention_mask is not None or not how.startswith(_GUARDED)):
            raise RuntimeError(f"{how} {_NOT_RECORDED}")
        chosen = self._use_fast_kernels is not None or torch.compiler.is_compiling()
        if not (chosen or _said) and (
            input_features.device.type in ("cpu", "cuda") and input_features.dtype in _FAST_DTYPES
        ):
            _said.append(True)
            logger.warning(
                "%s runs in plain PyTorch: use_fast_kernels is off. from_pretrained(..., "
                "use_fast_kernels=True), or model.use_fast_kernels = True later, runs the same "
                "model faster; False says that this is meant. This is said once",
                type(self).__name__,
            )

    def pack_weights(self: _Model) -> _Model:
        """Store the encoder's matrices as the CPU multiplies them, in place of the parameters.

        oneDNN otherwise lays every weight out anew at each call. For inference: afterwards the
        encoder's linear layers and pointwise convolutions have no weight that could be trained,
        changed, saved or moved, and take activations of their dtype alone: `torch.autocast` to
        another one is a ValueError. Layers that hooks, LoRA or int8 changed stay as they are. The
        fast kernels are switched on.

        Returns:
            The model itself.

        Raises:
            ValueError: the model is in training mode, not on the CPU, in a dtype that oneDNN does
                not multiply here, or has no encoder layers.
        """
        encoders = self._parts_with("layer_graphs", "encoder layers")
        if self.training:
            raise ValueError("the model is in training mode; weights are packed for inference")
        parameter = next(self.parameters())
        if parameter.device.type != "cpu":
            raise ValueError(f"the model is on {parameter.device}; weights are packed on the CPU")
        if not onednn_linear(parameter.dtype):
            raise ValueError(f"the model is {parameter.dtype}, which oneDNN does not multiply here")
        for encoder in encoders:
            pack_encoder(encoder)
        self.use_fast_kernels = True
        return self

    def compile_for_inference(
        self: _Model,
        max_tokens: int | None = None,
        buckets: Sequence[int] | None = None,
        *,
        max_graphs: int = DEFAULT_MAX_GRAPHS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        enabled: bool = True,
    ) -> _Model:
        """Run the encoder's layers as CUDA graphs where a batch is small.

        In evaluation mode with `use_fast_kernels`, without gradients, a packed batch of at most
        `max_tokens` tokens is copied into the next larger bucket, filled up with utterances of
        zeros, and answered by one launch instead of 14 a layer. A graph is captured the first time
        that its bucket, number of utterances (16, 64, 256, ...), dtype, choice of hidden states or
        number of layers comes, which takes as long as a few forward passes. Everything else runs
        as before, as do the adapter and the head: larger batches, other devices than CUDA and
        ROCm, training, gradients, autocast, attention maps, hooks, replaced submodules (LoRA),
        "relative" positions, `torch.compile`, and a size whose capture failed (logged once).

        Parameters may change in place; when they are moved or replaced, graphs are captured anew.
        After changing an attribute that is no parameter, such as a norm's `eps`, call this again.
        Memory: each graph keeps its input and outputs, `[bucket, hidden_size]` for the last layer
        and each further hidden state, within `max_bytes`; all share one pool of the activations of
        about one layer of the largest bucket, which comes on top. What they take is logged at each
        capture.

        Args:
            max_tokens: frames of all utterances of a batch; `None`: that of the largest bucket,
                else what `w2vbert-fast tune` measured on the model's GPU, else 8192.
            buckets: rising token counts, the last at least `max_tokens`; `None`: every 64 up to
                512, then four to an octave.
            max_graphs: how many graphs are kept; the one not used for longest goes first.
            max_bytes: memory of all graphs' inputs and outputs together, kept likewise; a size that
                alone would take more has no graph.
            enabled: `False`: as if this had never been called, and the memory is freed.

        Returns:
            The model itself.

        Raises:
            ValueError: an argument is impossible, or the model has no encoder layers.
            TypeError: an argument is no integer.
        """
        encoders = self._parts_with("layer_graphs", "encoder layers")
        parameter = next(self.parameters())
        if max_tokens is None and buckets is None and parameter.is_cuda:
            case = tuned.model_case(tuned.GRAPH_LIMIT, self.config, parameter.dtype)
            max_tokens = tuned.number(parameter.device, case)
        settings = (max_tokens, buckets, max_graphs, max_bytes)
        fresh = [LayerGraphs(*settings) if enabled else None for _ in encoders]
        for encoder, graphs in zip(encoders, fresh, strict=True):
            if encoder.layer_graphs is not None:
                encoder.layer_graphs.clear()
            encoder.layer_graphs = graphs
        return self

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part recomputes its activations in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    is_activation_checkpointing = is_gradient_checkpointing  # its newer name

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        policy: Policy = "layer",
        budget_bytes: int | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training, compute activations again in the backward pass instead of keeping them.

        The gradients of one path (fast or plain) are the same to the last bit, with dropout and
        LayerDrop too, unless it is done reentrantly, which may add up in another order.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`;
                `use_reentrant` is `False` unless it is among them.
            policy: what is computed again. "layer": each layer, from its input. "attention": each
                layer's attention module. "auto": nothing, the attention of as few layers as will
                do, or as few whole layers as will do, so that what the layers keep fits into
                `budget_bytes`; what a layer keeps is counted in each step, at its first layer.
                "none": nothing.
            budget_bytes: for "auto". `None`: nine tenths of what the device has free, less what
                gradients and Adam's moments will take where they are not there yet.
            every_n_layers: "layer" and "attention" concern the first of so many layers.
            offload: must be `False`; it is there because transformers' `Trainer` passes it.

        Raises:
            ValueError: an unknown policy or argument, a number that is not positive, a budget
                without "auto", offloading, or the model has no layers.
            TypeError: a number is no integer.
        """
        if offload:
            raise ValueError(
                f"offload is {offload!r}; it must be False (PyTorch offloads saved tensors under "
                "torch.autograd.graph.save_on_cpu)"
            )
        given = (policy, budget_bytes, gradient_checkpointing_kwargs or {}, every_n_layers)
        parts = self._parts_with("gradient_checkpointing", "layers that can be recomputed")
        settings = [Recompute(*given) for _ in parts]
        for module, own in zip(parts, settings, strict=True):
            module.recompute = own
            module.gradient_checkpointing = own.policy != "none"

    def gradient_checkpointing_disable(self) -> None:
        """Keep the layers' activations for the backward pass."""
        what = "layers that can be recomputed"
        for module in self._parts_with("gradient_checkpointing", what):
            module.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` by the name that transformers' `Trainer` calls."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    activation_checkpointing_disable = gradient_checkpointing_disable  # its newer name

    def _parts_with(self, attribute: str, what: str | None = None) -> list[Any]:
        """The submodules that have an attribute; it is an error when `what` they are is not there.

        Raises:
            ValueError: there is none.
        """
        parts = [part for part in self.modules() if part is not self and hasattr(part, attribute)]
        if not parts and what is not None:
            raise ValueError(f"{type(self).__name__} has no {what}")
        return parts


def _on_meta(make: Callable[[Wav2Vec2BertConfig], _Model], config: Wav2Vec2BertConfig) -> _Model:
    with torch.device("meta"), _WithoutDrawing():
        return make(config)


def _is_of_a_caller(cls: type[Wav2Vec2BertPreTrainedModel]) -> bool:
    """Whether a model's class is none of this package's."""
    return not cls.__module__.startswith(__name__.partition(".")[0] + ".")


def _own_arguments(cls: type[Wav2Vec2BertPreTrainedModel]) -> set[str]:
    """What a model's constructor takes by name beside the configuration and its fields."""
    taken = list(inspect.signature(cls).parameters.values())[1:]
    by_name = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return by_name - inspect.signature(cls.config_class).parameters.keys()


def _take_from(
    make: Callable[[], Wav2Vec2BertPreTrainedModel], model: nn.Module, empty: Sequence[str]
) -> None:
    """Give a model of a caller's class the values that its constructor alone knows.

    Those of the parameters that no checkpoint gave, and of buffers that none holds.
    """
    buffers = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta and not hasattr(module, "reset_buffers")
    ]
    if not empty and not buffers:
        return
    made = make()
    made._draw(empty)  # also what came behind its `post_init`
    values = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    device = next(model.parameters()).device
    for name in buffers:
        place(model, name, values[name].to(device))
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in empty:
            own[name].copy_(values[name])


def _names_as_stored(
    cls: type[_Model],
    make: Callable[[Wav2Vec2BertConfig], _Model],
    config_file: Path | None,
    config: Wav2Vec2BertConfig,
) -> set[str] | None:
    """Names of the tensors of a model by the checkpoint's own configuration, where it has one.

    What a caller's class adds to one of this package counts when the checkpoint is of that class.
    """
    if config_file is None:
        return None
    try:
        stored = cls.config_class.from_json_file(config_file)
        if stored.vocab_size is None:  # as an encoder has none
            stored.vocab_size = config.vocab_size
        own = next(kind for kind in cls.__mro__ if not _is_of_a_caller(kind))
        derives = own not in (cls, Wav2Vec2BertPreTrainedModel)
        if derives and cls.__name__ not in (stored.architectures or ()):
            return set(_on_meta(own, stored).state_dict())
        return set(_on_meta(make, stored).state_dict())
    except ValueError:
        return None


_ANYWHERE = ("auto", "balanced", "balanced_low_0", "sequential")


def _one_device(
    device: torch.device | str | int | None,
    device_map: torch.device | str | int | Mapping[str, Any] | None,
) -> torch.device:
    """The device that `device` or `device_map` names."""
    if device_map is None:
        return _as_device("device", "cpu" if device is None else device)
    if isinstance(device_map, Mapping):
        devices = {str(_as_device("device_map", place)) for place in device_map.values()}
        if len(devices) != 1:
            raise ValueError(
                f"device_map names {', '.join(sorted(devices)) or 'no device'}; a model is loaded "
                "whole, onto one device"
            )
        mapped = torch.device(devices.pop())
    elif isinstance(device_map, str) and device_map in _ANYWHERE:
        has_mps = torch.backends.mps.is_available()
        mapped = torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    else:
        mapped = _as_device("device_map", device_map)
    if device is not None and _as_device("device", device) != mapped:
        raise ValueError(f"device is {device!r} and device_map {device_map!r}; pass one of them")
    return mapped


def _as_device(name: str, device: torch.device | str | int) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} is {device!r}: {error}") from error


def _materialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Allocate the buffers that no checkpoint holds and let their modules compute them."""
    for path, module in model.named_modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()
        elif meta:
            raise RuntimeError(f"{path}: nothing computes the buffers {', '.join(meta)}")
