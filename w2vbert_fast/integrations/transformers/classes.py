"""The subclasses that `accelerate` gives to transformers' modules, with another `forward`."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast.integrations.transformers import versions
from w2vbert_fast.integrations.transformers.conformer import (
    Run,
    adapter_layout,
    adapter_obstacle,
    are_watched,
    capturing,
    features_of,
    is_watched,
    layer_obstacle,
    remember_features,
    run_adapter,
    unpack_held,
)
from w2vbert_fast.integrations.transformers.families import FAMILIES, Family
from w2vbert_fast.integrations.transformers.search import modules_in
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.heads import BLANK_LOGIT
from w2vbert_fast.models.layers import has_global_hooks
from w2vbert_fast.models.optimized.sizes import in_few_sizes
from w2vbert_fast.models.tracing import recorder

logger = logging.getLogger(__package__)


def check_family(family: Family) -> None:
    def check() -> None:
        from w2vbert_fast.integrations.transformers.probe import check_models

        check_models(family, _fast_copy, encoder_layout)

    versions.require(f"{family.prefix} code", check)


def replacements(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """The fast classes of the modules that get one."""
    known = {kind._w2vbert_reference: kind for kind in fast_classes().values()}
    found = {
        path: known.get(type(module)) or _fast_ctc_subclass(type(module))
        for path, module in modules.items()
    }
    return {path: kind for path, kind in found.items() if kind is not None}


def _fast_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, with the fast classes."""
    fast = copy.deepcopy(model)
    modules = modules_in(fast)
    for path, kind in replacements(modules).items():
        modules[path].__class__ = kind
    return fast


class Fast:
    """Base of the subclasses that `accelerate` gives to modules.

    Attributes:
        _w2vbert_reference: transformers' class.
        _w2vbert_parts: transformers' classes of the parts, by the names of `layer_obstacle`.
        _w2vbert_family: where the classes come from.
        _w2vbert_legacy: whether encoder and layers take and return what transformers 4 does:
            tuples, with hidden states and attention maps by arguments.
        _w2vbert_output: transformers' `BaseModelOutput`.
    """

    _w2vbert_reference: type[Any]
    _w2vbert_parts: dict[str, type[nn.Module]]
    _w2vbert_family: Family
    _w2vbert_legacy: bool
    _w2vbert_output: type[Any]

    @property
    def _w2vbert_own(self) -> bool:
        """Whether the class is ours, and not made of it by somebody (FSDP)."""
        return "_w2vbert_reference" in type(self).__dict__


class _OfPaddedBatch(Fast):
    """What takes a padded batch and its mask.

    Attributes:
        _w2vbert_run: what `forward` runs.
        _w2vbert_uncompiled: the same, which a compiler leaves as it is.
    """

    _w2vbert_run: Any
    _w2vbert_uncompiled: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' class: `[batch, T, C]`, a mask `[batch, T]` -> `[batch, T', C']`."""
        if recorder() is not None:
            return self._w2vbert_reference.forward(
                self, hidden_states, attention_mask, *args, **kwargs
            )
        run = self._w2vbert_run
        if attention_mask is not None and torch.compiler.is_compiling():
            # The lengths decide how much is computed: this is no part of a compiled graph.
            run = self._w2vbert_uncompiled
        return run(self, hidden_states, attention_mask, args, kwargs)


class FastEncoder(_OfPaddedBatch):
    training: bool
    config: Any
    layers: Any


def _encode(
    encoder: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    options = dict(
        zip(("output_attentions", "output_hidden_states", "return_dict"), args, strict=False)
    )
    options.update(kwargs)
    layout, reason = encoder_layout(encoder, hidden_states, attention_mask, options)
    if layout is None:
        _say_once(encoder, reason)
        forward = partial(encoder._w2vbert_reference.forward, encoder)
        if torch.compiler.is_compiling():
            return forward(hidden_states, attention_mask, *args, **kwargs)
        _hand_on_features(hidden_states, attention_mask)
        token = _in_original_encoder.set(True)
        try:
            return forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            _in_original_encoder.reset(token)
    keep = bool(encoder._w2vbert_legacy and options.get("output_hidden_states"))
    output, kept = _run_layers(encoder, hidden_states, layout, keep)
    if "layer_norm" in encoder._modules:  # SeamlessM4T v2
        output = encoder.layer_norm(output)
        if not encoder._w2vbert_legacy:
            return output
    hidden = (*kept, output) if keep else None
    if encoder._w2vbert_legacy and not options.get("return_dict", True):
        return (output,) if hidden is None else (output, hidden)
    return encoder._w2vbert_output(last_hidden_state=output, hidden_states=hidden)


def encoder_layout(
    encoder: Any, x: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> tuple[PackedBatch | None, str]:
    """The utterances, or `None` and why transformers' own code has to run."""
    config = encoder.config
    if options.get("output_attentions"):
        return None, "attention maps are asked for"
    if has_global_hooks():
        return None, "there are hooks for all modules"
    chunk = getattr(config, "speech_encoder_chunk_size", None)
    if chunk is not None and x.shape[1] > chunk:
        return None, f"the input is longer than speech_encoder_chunk_size={chunk}"
    layer: Any
    for index, layer in enumerate(encoder.layers):
        if (
            not isinstance(layer, _FastLayer)
            or "forward" in layer.__dict__
            or getattr(layer, "_compiled_call_impl", None) is not None
        ):
            return None, f"layers.{index} was replaced"
        if (obstacle := layer_obstacle(layer, encoder._w2vbert_parts)) is not None:
            if "attentions" in capturing():
                return None, "attention maps are asked for"
            return None, f"layers.{index}.{obstacle} was replaced or is hooked"
    return _layout(x, attention_mask)


def _hand_on_features(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The features that `x` or the mask belong to, if they are known, also for the next module that
    gets the mask."""
    if attention_mask is None:
        return None
    features = features_of(x, attention_mask)
    if features is None or features.shape[:2] != x.shape[:2]:
        return None
    remember_features(attention_mask, features)
    return features


def _layout(
    x: Tensor, attention_mask: Tensor | None, features: Tensor | None = None
) -> tuple[PackedBatch | None, str]:
    if x.dim() != 3 or (attention_mask is not None and attention_mask.dim() != 2):
        return None, "the shapes of the input or of the mask are not the usual ones"
    batch, frames, _ = x.shape
    if features is None:
        features = _hand_on_features(x, attention_mask)
    try:
        layout = PackedBatch.from_attention_mask(attention_mask, batch, frames, x.device, features)
    except ValueError as error:
        return None, str(error)
    return layout, ""


def _run_layers(
    encoder: Any, hidden_states: Tensor, layout: PackedBatch, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The last layer's output `[batch, T, C]`, and with `keep` what enters each layer.

    Padded frames are as `accelerate` says.
    """
    layerdrop = getattr(encoder.config, encoder._w2vbert_family.layerdrop)
    drops = encoder.training and layerdrop > 0.0

    def watched_inside() -> bool:  # what is inside of layers: whole ones see padded tensors
        parts = (part for layer in encoder.layers for part in layer._modules.values())
        return are_watched(encoder.dropout, *parts)

    fast = not encoder.training and encoder.config.position_embeddings_type != "relative"
    filled = in_few_sizes(layout, hidden_states, watched_inside, fast=fast)
    x = encoder.dropout(filled.zero_half_frames(filled.pack(hidden_states)))
    run = Run(encoder, x, filled)
    layers: list[Any] = list(run.layers)
    recomputed = [encoder.training and _recomputes(encoder, layer) for layer in layers]
    watched = [is_watched(layer) for layer in layers]
    alone = [
        drops or is_recomputed or is_seen
        for is_recomputed, is_seen in zip(recomputed, watched, strict=True)
    ]
    kept: list[Tensor] = []
    normed: Tensor | None = None  # the next layer's normalised input, if the last one made it
    for index, layer in enumerate(layers):
        if keep:
            kept.append(layout.unpack(x))
        if drops and torch.rand(()).item() < layerdrop:
            continue
        if watched[index]:
            # Hooks see padded tensors, as they do in transformers.
            call: Any = partial(layer, w2vbert_run=(run, index))
            if recomputed[index] and not hasattr(layer, "gradient_checkpointing"):
                call = partial(encoder._gradient_checkpointing_func, call)
            output = call(layout.unpack(x))
            x = filled.pack(output[0] if isinstance(output, tuple) else output)
        elif recomputed[index]:
            owner = layer if hasattr(layer, "_gradient_checkpointing_func") else encoder
            x = owner._gradient_checkpointing_func(partial(_layer_output, run, index), x)
        else:
            last = index + 1 == len(layers)
            fuse = not (last or alone[index] or alone[index + 1])
            x, normed = run.layer(index, x, normed, fuse=fuse)
    return unpack_held(x, layout), kept


def _recomputes(encoder: Any, layer: Any) -> bool:
    own: bool = getattr(layer, "gradient_checkpointing", encoder.gradient_checkpointing)
    return own


def _layer_output(run: Run, index: int, x: Tensor) -> Tensor:
    return run.layer(index, x)[0]


_in_original_encoder: ContextVar[bool] = ContextVar("_in_original_encoder", default=False)


class _FastFeatureProjection(Fast):
    def forward(self, hidden_states: Tensor) -> Any:
        """As transformers' projection; the encoder behind it can look at the features."""
        output = self._w2vbert_reference.forward(self, hidden_states)
        if not torch.compiler.is_compiling() and recorder() is None:
            projected = output[0] if isinstance(output, tuple) else output
            remember_features(projected, hidden_states)
        return output


class _FastLayer(Fast):
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        w2vbert_run: tuple[Run, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' layer, or `[batch, T, C]` -> `[batch, T, C]` of an encoder's run."""
        if w2vbert_run is None:
            if not (
                torch.compiler.is_compiling()
                or _in_original_encoder.get()
                or recorder() is not None
                or torch._C._current_graph_task_id() != -1  # that encoder recomputes
            ):
                _say_once(self, _LAYER_BY_ITSELF)  # type: ignore[arg-type]
            return self._w2vbert_reference.forward(self, hidden_states, *args, **kwargs)
        run, index = w2vbert_run
        output = run.layout.unpack(_layer_output(run, index, run.layout.pack(hidden_states)))
        return (output, None) if self._w2vbert_legacy else output


class _FastAdapter(_OfPaddedBatch):
    """Its convolutions read zeros behind the end of an utterance, or behind its half frame."""


def _adapt(
    adapter: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    layout, reason = None, "there are hooks for all modules"
    if not has_global_hooks():
        obstacle = adapter_obstacle(adapter, adapter._w2vbert_parts)
        reason = f"{obstacle} was replaced or is hooked"
        if obstacle is None:
            layout, reason = _layout(hidden_states, attention_mask)
    if layout is None:
        _say_once(adapter, reason)
        return adapter._w2vbert_reference.forward(
            adapter, hidden_states, attention_mask, *args, **kwargs
        )
    x, shortened = run_adapter(adapter, layout.pack(hidden_states), layout)
    return unpack_held(x, shortened)


class _FastCTC(Fast):
    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not self._w2vbert_own or type(self) in fast_classes().values():
            return reduced
        return (_new_ctc, (self._w2vbert_reference,), *reduced[2:])


def _new_ctc(reference: Any) -> Any:
    """What a pickle of a user's CTC model begins with: its class has no name to be found by."""
    check_family(FAMILIES[0])
    kind = _fast_ctc(reference)
    return kind.__new__(kind)


def _fast_ctc_subclass(kind: Any) -> Any | None:
    """The fast class for a class that derives from transformers' CTC model; `None`: it does not,
    or its `forward` takes something else."""
    ctc = fast_classes().get(f"{FAMILIES[0].prefix}ForCTC")
    if ctc is None or issubclass(kind, Fast) or not issubclass(kind, ctc._w2vbert_reference):
        return None
    arguments = list(inspect.signature(kind.forward).parameters)[1:3]
    return _fast_ctc(kind) if arguments == ["input_features", "attention_mask"] else None


@functools.cache
def _fast_ctc(reference: Any) -> Any:
    """The class for transformers' CTC model, or for one that derives from it."""
    uncompiled = torch.compiler.disable(_blank_padding)  # type: ignore[no-untyped-call]

    # What passes arguments on by their names (Trainer, labels among them) reads the signature.
    @functools.wraps(reference.forward)
    def forward(
        self: Any,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = reference.forward(self, input_features, attention_mask, *args, **kwargs)
        if attention_mask is None or recorder() is not None:
            return output
        # By itself the wrapper takes 0.1 ms.
        blank_padding = uncompiled if torch.compiler.is_compiling() else _blank_padding
        return blank_padding(self, output, input_features, attention_mask)

    return type(
        reference.__name__,
        (_FastCTC, reference),
        {
            "__module__": __package__,
            "__doc__": reference.__doc__,
            "_w2vbert_reference": reference,
            "forward": forward,
        },
    )


def _blank_padding(model: Any, output: Any, features: Tensor, attention_mask: Tensor) -> Any:
    """A CTC model's output, a mapping or a tuple, with logits of a sure blank in padded frames.

    `BLANK_LOGIT` for the blank and 0 beside it, so that no decoder finds letters there, nor hears
    the last one for longer than it lasts.
    """
    if attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        return output
    is_tuple = isinstance(output, tuple)
    names = range(len(output)) if is_tuple else output.keys()
    # The one tensor of three dimensions, `[batch, T', vocab]`.
    name: Any = next(n for n in names if isinstance(output[n], Tensor) and output[n].dim() == 3)
    logits = output[name]
    layout, _ = _layout(features, attention_mask, features)
    adapter = model.wav2vec2_bert.adapter
    if layout is not None and adapter is not None:
        layout = adapter_layout(adapter, layout)
    blank = model.config.pad_token_id
    if layout is None or blank is None or not 0 <= blank < logits.shape[2]:
        return output
    is_frame = layout.unpack(logits.new_ones(layout.num_tokens, 1, dtype=torch.bool))
    sure = logits.new_zeros(logits.shape[2])
    sure[blank] = BLANK_LOGIT
    logits = torch.where(is_frame, logits, sure)
    if is_tuple:
        return (*output[:name], logits, *output[name + 1 :])
    output[name] = logits
    return output


_LAYER_BY_ITSELF = (
    "it is called by itself (its encoder runs the layers fast, and gives what each of them makes "
    "with output_hidden_states=True)"
)
_said: set[tuple[str, str]] = set()


def _say_once(module: nn.Module, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    name = type(module).__name__
    if (name, reason) not in _said:
        _said.add((name, reason))
        logger.warning("%s runs transformers' own code where %s; this is said once", name, reason)


@functools.cache
def fast_classes() -> dict[str, Any]:
    """The subclasses by name, made when transformers is there to derive them from."""
    made: dict[str, Any] = {}
    outputs = importlib.import_module("transformers.modeling_outputs")
    for family in FAMILIES:
        try:
            references: dict[str, Any] = {part: family.reference(part) for part in family.parts}
        except (ImportError, AttributeError):
            continue  # no such classes; `check_family` says so where they are looked for
        shared = {
            "_w2vbert_family": family,
            "_w2vbert_legacy": "output_hidden_states"
            in inspect.signature(references["Encoder"].forward).parameters,
            "_w2vbert_parts": {
                "feed_forward": references["FeedForward"],
                "attention": references["SelfAttention"],
                "convolution": references["ConvolutionModule"],
                "adapter_layer": references["AdapterLayer"],
            },
            "_w2vbert_output": outputs.BaseModelOutput,
            "__module__": __package__,
        }
        part: str
        mixin: type[Fast]
        run: Any
        for part, mixin, run in (
            ("FeatureProjection", _FastFeatureProjection, None),
            ("Encoder", FastEncoder, _encode),
            ("EncoderLayer", _FastLayer, None),
            ("Adapter", _FastAdapter, _adapt),
        ):
            reference = references[part]
            own = {**shared, "_w2vbert_reference": reference, "__doc__": reference.__doc__}
            if run is not None:
                own["_w2vbert_run"] = staticmethod(run)
                # Not at import: it imports the compiler.
                left = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
                own["_w2vbert_uncompiled"] = staticmethod(left)
            made[reference.__name__] = type(reference.__name__, (mixin, reference), own)
        if "ForCTC" in references:
            ctc = _fast_ctc(references["ForCTC"])
            made[ctc.__name__] = ctc
    return made
