"""What all models share: loading, saving, and switches that reach every submodule."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._config_checks import floating_dtype
from ..checkpoint import find_checkpoint, write_checkpoint
from ..configuration import CONFIG_NAME, Wav2Vec2BertConfig
from ..hub import pinned_revision, resolve_file
from ..ops.dispatch import packed_kernels
from .checkpointing import Checkpointing, Policy
from .graphs import LayerGraphs
from .initialization import initialize_weights
from .loading import load_weights
from .packed_weights import pack_encoder
from .quantization import check_int8, dtype_beside_int8, keep_ctc_head, quantize_encoder

_Model = TypeVar("_Model", bound="Wav2Vec2BertPreTrainedModel")

# What torch's own modules call to draw initial weights, on the way to these two methods.
_DRAWS = (
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
    Tensor.uniform_,
    Tensor.normal_,
)


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


class Wav2Vec2BertPreTrainedModel(nn.Module):
    """Base of all models: configuration, checkpoints in and out, model-wide switches.

    Args:
        config: the model's configuration, kept as it is.

    Raises:
        TypeError: `config` is no `Wav2Vec2BertConfig`.
        ValueError: the configuration's values exclude each other.
    """

    config_class: ClassVar[type[Wav2Vec2BertConfig]] = Wav2Vec2BertConfig
    base_model_prefix: ClassVar[str] = "wav2vec2_bert"
    main_input_name: ClassVar[str] = "input_features"
    supports_gradient_checkpointing: ClassVar[bool] = True

    config: Wav2Vec2BertConfig

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        if not isinstance(config, Wav2Vec2BertConfig):
            raise TypeError(
                f"config is {type(config).__module__}.{type(config).__qualname__}; it must be "
                "w2vbert_fast.Wav2Vec2BertConfig (another library's: from_dict(config.to_dict()))"
            )
        config.validate()
        self.config = config
        self._use_fast_kernels = False

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
        drawn = tuple(
            f"{name}."
            for name, module in self.named_modules()
            if name and isinstance(module, Wav2Vec2BertPreTrainedModel)
        )
        initialize_weights(self, [name for name in parameters if not name.startswith(drawn)])

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        path_or_hub_id: str | os.PathLike[str],
        *,
        config: Wav2Vec2BertConfig | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        use_fast_kernels: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        **config_overrides: Any,
    ) -> _Model:
        """Load a model from a folder or the hub.

        Reads `config.json` and the weights (see `w2vbert_fast.checkpoint`). A checkpoint of the
        encoder alone can be loaded into a model with a head, which is newly initialised with a
        warning, and a checkpoint with a head into the encoder alone. Nothing is loaded unless
        everything fits; memory stays near the size of the weights.

        Args:
            path_or_hub_id: a folder, or a hub id such as `facebook/w2v-bert-2.0`.
            config: the configuration to use instead of the checkpoint's; it is copied.
            revision: branch, tag or commit on the hub.
            dtype: floating point dtype of the weights, or its name. None and `"auto"`: what the
                configuration says, else what the weights have. `"int8"`, on the CPU: the linear
                layers of the encoder are quantised, weights by output channel and activations by
                token, and the rest becomes bfloat16 where the CPU multiplies it (AVX512-BF16, AMX).
                An int8 model is for inference and cannot be saved.
            device: where the weights go; by default the CPU.
            use_fast_kernels: see the property of that name.
            cache_dir: the hub's cache folder, where it is not the usual one.
            local_files_only: never ask the hub, use its cache alone.
            token: the hub's access token.
            subfolder: folder within the checkpoint that holds the files.
            strict: whether missing or unexpected tensors are an error; else there is a warning,
                and what is missing is newly initialised.
            ignore_mismatched_sizes: newly initialise parameters whose stored shape differs, with
                a warning, instead of raising.
            torch_dtype: the older name of `dtype`.
            **config_overrides: values that replace those of the configuration.

        Returns:
            The model, in evaluation mode.

        Raises:
            OSError: no such folder or repository, or it has no `config.json`.
            CheckpointError: the weights are missing, damaged or do not fit. A `ValueError`.
            ValueError: the configuration or an argument has an impossible value, or int8 cannot
                run here.
            TypeError: a keyword argument is neither listed here nor a field of the configuration.
        """
        dtype = torch_dtype if dtype is None else dtype
        int8 = dtype == "int8"
        chosen = None if dtype == "auto" or int8 else floating_dtype("dtype", dtype)
        target = _as_device(device)
        if int8:
            check_int8(target)
        hub_arguments: dict[str, Any] = {
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
            "subfolder": subfolder,
        }
        if not os.path.isdir(path_or_hub_id):
            # The commit of the first file counts for all: a branch may move in the meantime.
            first = resolve_file(path_or_hub_id, CONFIG_NAME, revision=revision, **hub_arguments)
            revision = (None if first is None else pinned_revision(first)) or revision
        if config is None:
            config = cls.config_class.from_pretrained(
                path_or_hub_id, revision=revision, **hub_arguments, **config_overrides
            )
        elif config_overrides:
            config = type(config).from_dict(config.to_dict(), **config_overrides)
        else:
            config = copy.deepcopy(config)
        checkpoint = find_checkpoint(path_or_hub_id, revision=revision, **hub_arguments)
        config.dtype = chosen or config.dtype or checkpoint.dtype
        config.name_or_path = os.fspath(path_or_hub_id)

        with torch.device("meta"), _WithoutDrawing():
            model = cls(config)
        empty = load_weights(
            model,
            checkpoint,
            base_model_prefix=cls.base_model_prefix,
            dtype=config.dtype or torch.get_default_dtype(),
            device=target,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        _materialize_buffers(model, target)
        if empty:
            initialize_weights(model, empty)
        if int8:
            # Quantised before the rest is rounded.
            quantize_encoder(model)
            with keep_ctc_head(model):
                model.to(dtype_beside_int8(model.dtype))
            model.config.dtype = model.dtype
        model.use_fast_kernels = use_fast_kernels
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write `config.json` and the weights as safetensors into a folder.

        The files are those of transformers, which loads them. They are complete under temporary
        names before they get their own, and replace what an earlier save has left.

        Args:
            save_directory: the folder; made when it is not there.
            max_shard_size: most bytes in one file, as a number or such as `"5GB"`.
            state_dict: what to write instead of `self.state_dict()`, such as gathered shards.

        Raises:
            ValueError: the configuration cannot be written, `max_shard_size` is no size, or the
                model is quantised to int8.
            NotADirectoryError: the path is a file.
        """
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        for encoder in self._parts_with("layer_graphs"):
            config.num_hidden_layers = encoder.num_layers  # a caller may have cut them
        config.dtype = self.dtype
        config.to_json_string()  # raises before anything is written
        state_dict = self.state_dict() if state_dict is None else state_dict
        write_checkpoint(state_dict, save_directory, max_shard_size=max_shard_size)
        config.save_pretrained(save_directory)

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

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters' elements, of all or of those that need a gradient."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @property
    def use_fast_kernels(self) -> bool:
        """Whether the fast implementation of each operation runs where the device has one.

        Setting it sets the attribute of that name on every submodule that has it.
        """
        return self._use_fast_kernels

    @use_fast_kernels.setter
    def use_fast_kernels(self, value: bool) -> None:
        self._use_fast_kernels = bool(value)
        for module in self._parts_with("use_fast_kernels"):
            module.use_fast_kernels = bool(value)

    def pack_weights(self: _Model) -> _Model:
        """Store the encoder's matrices as the CPU multiplies them, in place of the parameters.

        oneDNN otherwise lays every weight out anew at each call. For inference: afterwards the
        encoder's linear layers and pointwise convolutions have no weight that could be trained,
        changed, saved or moved. Layers that hooks, LoRA or int8 changed stay as they are. The fast
        kernels are switched on.

        Returns:
            The model itself.

        Raises:
            ValueError: the model is in training mode, not on the CPU, in a dtype that oneDNN does
                not multiply here, or has no encoder layers.
        """
        encoders = self._parts_with("layer_graphs")
        if not encoders:
            raise ValueError(f"{type(self).__name__} has no encoder layers")
        if self.training:
            raise ValueError("the model is in training mode; weights are packed for inference")
        parameter = next(self.parameters())
        if parameter.device.type != "cpu":
            raise ValueError(f"the model is on {parameter.device}; weights are packed on the CPU")
        if not packed_kernels().onednn_linear(parameter.dtype):
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
        max_graphs: int = 16,
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
        and each further hidden state, and all share one pool of the activations of about one layer.

        Args:
            max_tokens: frames of all utterances of a batch; `None`: that of the largest bucket, or
                2048.
            buckets: rising token counts, the last at least `max_tokens`; `None`: every 64 up to
                512, then four to an octave.
            max_graphs: how many graphs are kept; the one not used for longest goes first.
            enabled: `False`: as if this had never been called, and the memory is freed.

        Returns:
            The model itself.

        Raises:
            ValueError: an argument is impossible, or the model has no encoder layers.
            TypeError: an argument is no integer.
        """
        encoders = self._parts_with("layer_graphs")
        if not encoders:
            raise ValueError(f"{type(self).__name__} has no encoder layers")
        settings = (max_tokens, buckets, max_graphs)
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
        LayerDrop too, unless checkpoints are reentrant, which may add up in another order.

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
        parts = self._checkpointed_parts()
        settings = [Checkpointing(*given) for _ in parts]
        for module, own in zip(parts, settings, strict=True):
            module.checkpointing = own
            module.gradient_checkpointing = own.policy != "none"

    def gradient_checkpointing_disable(self) -> None:
        """Keep the layers' activations for the backward pass."""
        for module in self._checkpointed_parts():
            module.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` by the name that transformers' `Trainer` calls."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by its newer name."""
        self.gradient_checkpointing_disable()

    def _checkpointed_parts(self) -> list[Any]:
        parts = self._parts_with("gradient_checkpointing")
        if not parts:
            raise ValueError(f"{type(self).__name__} has no layers that can be checkpointed")
        return parts

    def _parts_with(self, attribute: str) -> list[Any]:
        """The submodules that have an attribute."""
        return [part for part in self.modules() if part is not self and hasattr(part, attribute)]


def _as_device(device: torch.device | str | int | None) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}: {error}") from error


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
