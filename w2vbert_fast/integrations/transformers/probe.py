"""Checks of a transformers that nobody has tested yet: small models and signals, both ways.

Each check raises `Mismatch`, or whatever exception transformers or our code ends in. They take
fractions of a second, run on the CPU, and leave the state of random generators, and PyTorch's
defaults, as they were.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast.integrations.transformers.conformer import adapter_obstacle
from w2vbert_fast.integrations.transformers.families import Family
from w2vbert_fast.integrations.transformers.feature_extractor import fast_feature_extractor
from w2vbert_fast.integrations.transformers.versions import Mismatch
from w2vbert_fast.models import Wav2Vec2BertModel
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

_FEATURES = 12
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "feature_projection_input_dim": _FEATURES,
    "left_max_position_embeddings": 5,
    "right_max_position_embeddings": 3,
    "conv_depthwise_kernel_size": 5,
    "add_adapter": True,
    "num_adapter_layers": 1,
    "adapter_kernel_size": 3,
    "adapter_stride": 2,
    **dict.fromkeys(
        ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout"), 0.0
    ),
    **dict.fromkeys(("conformer_conv_dropout", "layerdrop"), 0.0),
    "apply_spec_augment": False,
    "vocab_size": 11,
}
"""Without randomness, so that training steps compare."""
_SEAMLESS_NAMES = {
    "num_hidden_layers": "speech_encoder_layers",
    "num_attention_heads": "speech_encoder_attention_heads",
    "intermediate_size": "speech_encoder_intermediate_size",
    "hidden_dropout": "speech_encoder_dropout",
    "layerdrop": "speech_encoder_layerdrop",
    "adapter_kernel_size": "adaptor_kernel_size",
    "adapter_stride": "adaptor_stride",
}
_LENGTHS = (13, 8)
_ERROR = 1e-4
"""Relative; float32 makes about 1e-6 of it."""
_FEATURE_ERROR = 1e-2
"""Absolute, of values with variance 1; float32 makes up to 1e-3 of it in quiet bins."""


def check_models(
    family: Family, fast_copy: Callable[[Any], Any], encoder_layout: Callable[..., Any]
) -> None:
    """Whether the encoders and adapters of one model of transformers are what ours stand in for.

    First the structure: the names and shapes of the parameters. Then the answers of a model with
    random weights, to single utterances and to a batch, and the gradients of a training step with
    checkpoints, accelerated and not.

    Args:
        family: the model.
        fast_copy: accelerates a copy of a model.
        encoder_layout: tells, as the last of two values, why an encoder would run transformers'
            own code.
    """
    for part in family.parts:
        family.reference(part)
    seamless = family.prefix.startswith("Seamless")
    for positions in ("relative_key",) if seamless else ("relative_key", "relative", "rotary"):
        values = {**_TINY, "position_embeddings_type": positions}
        with _own_defaults("meta"):
            theirs = _reference(family, values)
            ours = Wav2Vec2BertModel(Wav2Vec2BertConfig(**values))
            for part, name in (("encoder", "Encoder"), ("adapter", "Adapter")):
                _compare_structure(
                    f"{family.prefix}{name}", getattr(theirs, part), getattr(ours, part)
                )
        with _own_defaults("cpu"):
            name = f"{family.prefix} model, position embeddings {positions}"
            theirs = _randomised(_reference(family, values))
            fast = fast_copy(theirs)
            _compare_answers(name, fast, theirs)
            _check_coverage(name, fast, encoder_layout)
    if "ForCTC" in family.parts:
        with _own_defaults("cpu"):
            theirs = _randomised(_reference(family, values, True))
            _compare_logits(f"{family.prefix}ForCTC", fast_copy(theirs), theirs)


def check_feature_extractor() -> None:
    """Whether our features are those of transformers' `SeamlessM4TFeatureExtractor`."""
    kind = fast_feature_extractor()
    with _own_defaults("cpu"):
        fast, reference = kind(), kind._reference()
        if fast.to_dict() != reference.to_dict():
            raise Mismatch(f"its settings are {reference.to_dict()}, ours {fast.to_dict()}")
        generator = torch.Generator().manual_seed(0)
        signals = [torch.randn(n, generator=generator).mul_(0.1).numpy() for n in (4000, 3300)]
        options = {"sampling_rate": 16_000, "return_tensors": "pt"}
        ours, theirs = fast(signals, **options), reference(signals, **options)
    if list(ours) != list(theirs):
        raise Mismatch(f"it returns {', '.join(theirs)}, ours {', '.join(ours)}")
    for name, wanted in theirs.items():
        found = ours[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise Mismatch(
                f"its {name} is {wanted.dtype} {list(wanted.shape)}, ours {found.dtype} "
                f"{list(found.shape)}"
            )
        error = float((found.double() - wanted.double()).abs().max())
        if not error <= _FEATURE_ERROR:
            raise Mismatch(f"{name} of noise differ by {error:.2g}")


def _reference(family: Family, values: dict[str, Any], ctc: bool = False) -> Any:
    modeling = importlib.import_module(f"transformers.models.{family.module}")
    if family.prefix.startswith("Seamless"):
        values = {_SEAMLESS_NAMES.get(name, name): value for name, value in values.items()}
        values["adaptor_dropout"] = 0.0
        config, kind = "SeamlessM4Tv2Config", "SeamlessM4Tv2SpeechEncoder"
    else:
        config, kind = "Wav2Vec2BertConfig", "Wav2Vec2BertForCTC" if ctc else "Wav2Vec2BertModel"
    return getattr(modeling, kind)(getattr(modeling, config)(**values))


def _randomised(model: Any) -> Any:
    """Nothing is as it is initialised, or it would hide what depends on it."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        offset = 0.5 if parameter.dim() == 1 else 0.0
        parameter.data.normal_(offset, parameter[0].numel() ** -0.5 * 0.5)
    return model


def _inputs() -> tuple[list[Tensor], Tensor, Tensor]:
    """Utterances `[1, T, features]`, and the batch of them with its mask."""
    generator = torch.Generator().manual_seed(1)
    alone = [torch.randn(1, length, _FEATURES, generator=generator) for length in _LENGTHS]
    batch = nn.utils.rnn.pad_sequence([x[0] for x in alone], batch_first=True)
    mask = torch.arange(batch.shape[1])[None] < torch.tensor(_LENGTHS)[:, None]
    return alone, batch, mask.long()


def _compare_structure(name: str, theirs: Any, ours: Any) -> None:
    found, known = (
        {key: list(value.shape) for key, value in module.layers.named_parameters()}
        for module in (theirs, ours)
    )
    if found == known:
        return
    differences = {
        "lacks": sorted(known.keys() - found.keys()),
        "has besides": sorted(found.keys() - known.keys()),
        "has in other shapes": sorted(
            f"{key} {found[key]} for {known[key]}"
            for key in found.keys() & known.keys()
            if found[key] != known[key]
        ),
    }
    listed = (
        f"{what} {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for what, keys in differences.items()
        if keys
    )
    raise Mismatch(f"{name}.layers {'; '.join(listed)}")


def _compare_answers(name: str, fast: Any, reference: Any) -> None:
    alone, batch, mask = _inputs()
    reference.eval()
    fast.eval()
    with torch.no_grad():
        wanted = [reference(x, output_hidden_states=True) for x in alone]
        for x, theirs in zip(alone, wanted, strict=True):
            ours = fast(x, output_hidden_states=True)
            _compare(name, "last_hidden_state", ours[0], theirs[0])
            counts = len(theirs.hidden_states), len(ours.hidden_states)
            if counts[0] != counts[1]:
                raise Mismatch(f"{name}: it gives {counts[0]} hidden states, ours {counts[1]}")
            for index, pair in enumerate(
                zip(ours.hidden_states, theirs.hidden_states, strict=True)
            ):
                _compare(name, f"hidden_states[{index}]", *pair)
        together = fast(batch, attention_mask=mask)[0]
        for row, theirs in zip(together, wanted, strict=True):
            _compare(
                name, "a batch's last_hidden_state", row[None, : theirs[0].shape[1]], theirs[0]
            )

    # The method's name up to transformers 5, and the later one.
    (getattr(fast, "activation_checkpointing_enable", None) or fast.gradient_checkpointing_enable)()
    found, known = (_gradients(model, alone) for model in (fast, reference))
    if found.keys() != known.keys():
        differing = sorted(found.keys() ^ known.keys())
        raise Mismatch(f"{name}: only one of the two has a gradient of {', '.join(differing[:4])}")
    whole = torch.stack([gradient.norm() for gradient in known.values()]).norm()
    for key, gradient in known.items():
        # Some are zero but for rounding.
        _compare(name, f"the gradient of {key}", found[key], gradient, float(0.01 * whole))


def _check_coverage(name: str, fast: Any, encoder_layout: Callable[..., Any]) -> None:
    _, batch, mask = _inputs()
    layout, reason = encoder_layout(fast.encoder, batch, mask, {})
    if layout is None:
        raise Mismatch(f"{name}: only transformers' own code would run, since {reason}")
    if (obstacle := adapter_obstacle(fast.adapter, fast.adapter._w2vbert_parts)) is not None:
        raise Mismatch(f"{name}: only transformers' own code would run, since {obstacle} is new")


def _compare_logits(name: str, fast: Any, reference: Any) -> None:
    alone, batch, mask = _inputs()
    reference.eval()
    fast.eval()
    with torch.no_grad():
        wanted = [reference(x).logits for x in alone]
        for x, row, theirs in zip(
            alone, fast(batch, attention_mask=mask).logits, wanted, strict=True
        ):
            _compare(name, "logits", fast(x).logits, theirs)
            _compare(name, "a batch's logits", row[None, : theirs.shape[1]], theirs)


def _gradients(model: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Of a training step."""
    model.train()
    total = torch.zeros(())
    for x in inputs:
        total = total + model(x)[0].sin().sum()
    total.backward()  # type: ignore[no-untyped-call]
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _compare(name: str, what: str, ours: Tensor, theirs: Tensor, floor: float = 1e-30) -> None:
    if ours.shape != theirs.shape:
        raise Mismatch(f"{name}: {what} is {list(theirs.shape)}, ours {list(ours.shape)}")
    error = float((ours - theirs).norm() / theirs.norm().clamp_min(floor))
    if not error <= _ERROR:
        raise Mismatch(f"{name}: {what} differs by {error:.2g}, relative")


@contextlib.contextmanager
def _own_defaults(device: str) -> Iterator[None]:
    """PyTorch's usual settings, whatever the caller's are."""
    dtype = torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.device(device),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
