"""What every candidate shares: one set of random weights, and the float64 truth.

Weights are random, with every part of the model large enough to matter to the answer, and equal in
every candidate; those that PyTorch runs share one copy in memory.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.flops import encoder_flops
from bench.machine import DTYPES
from bench.measure import Unavailable
from bench.workloads import Workload, batches, encoder_inputs, padded, speech


@dataclass
class Context:
    """What the candidates of one workload are made from.

    Attributes:
        workload: the workload.
        device: where it runs.
        threads: CPU threads of every library.
        layers: encoder layers.
        features: `[T, 160]` float32 of each utterance.
        waveforms: float32 `[samples]` of each utterance.
        folder: a temporary folder for exported models.
        truths: of training steps, once they were computed.
    """

    workload: Workload
    device: torch.device
    threads: int
    layers: int
    features: list[Tensor]
    waveforms: list[Any]
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    truths: dict[str, Any] = field(default_factory=dict)
    _weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def config_values(self) -> dict[str, Any]:
        """Real width, `facebook/w2v-bert-2.0`'s; what trains but is not there in inference, off."""
        return {
            "num_hidden_layers": self.layers,
            "add_adapter": self.workload.adapter,
            "num_adapter_layers": 1,
            "mask_time_prob": 0.0,
            "apply_spec_augment": False,
            "layerdrop": 0.0,
            "vocab_size": 34,
        }

    def weights(self, dtype: str) -> dict[str, Tensor]:
        """The state dict in "fp32" or "bf16", on the device; made once."""
        if dtype not in self._weights:
            if dtype == "fp32":
                self._weights[dtype] = random_weights(self.our_config(), self.device)
            else:
                self._weights[dtype] = {
                    name: w.to(DTYPES[dtype]) for name, w in self.weights("fp32").items()
                }
        return self._weights[dtype]

    @property
    def lengths(self) -> list[int]:
        """Frames of each utterance."""
        return [len(features) for features in self.features]

    def batch(self, rows: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Some utterances as a model takes them, on the device: `input_features` of a dtype, and
        `attention_mask`, None where nothing is padded."""
        x, mask = padded([self.features[i] for i in rows])
        on_device = None if mask is None else mask.to(self.device)
        return {"input_features": x.to(self.device, dtype), "attention_mask": on_device}

    def largest(self, batching: str, size_of: Callable[[list[int]], int]) -> int:
        """The most that `size_of` gives for the lengths of one batch."""
        groups = batches(self.features, batching)
        return max(size_of([self.lengths[i] for i in rows]) for rows in groups)

    def drop_weights(self) -> None:
        """Forget the shared weights; models that were built keep theirs."""
        self._weights.clear()

    def drop_other_weights(self, dtype: str) -> None:
        """Forget those of other dtypes."""
        self._weights = {k: v for k, v in self._weights.items() if k == dtype}

    def our_config(self) -> Any:
        import w2vbert_fast

        return w2vbert_fast.Wav2Vec2BertConfig(**self.config_values())

    def reference(self, dtype: str, attention: str = "sdpa") -> nn.Module:
        """transformers' model over the shared weights.

        Raises:
            Unavailable: transformers is not installed, or has no such attention.
        """
        values, weights = self.config_values(), self.weights(dtype)
        model = self.reference_of("Wav2Vec2BertModel", values, weights, attention)
        return model.eval().requires_grad_(False)

    def reference_of(
        self, class_name: str, values: dict[str, Any], weights: dict[str, Tensor], attention: str
    ) -> nn.Module:
        """A model of transformers with this configuration over these weights.

        Raises:
            Unavailable: transformers is not installed, or has no such attention.
        """
        require("transformers")
        import transformers

        config = transformers.Wav2Vec2BertConfig(**values)
        try:
            config._attn_implementation = attention
            with torch.device("meta"):
                model: nn.Module = getattr(transformers, class_name)(config)
            model.set_attn_implementation(attention)
        except (ValueError, ImportError, AttributeError) as error:
            raise Unavailable(f"{attention} attention: {str(error).splitlines()[0]}") from error
        model.load_state_dict(weights, assign=True)
        return model


@contextmanager
def open_context(
    workload: Workload,
    device: torch.device,
    threads: int,
    layers: int | None,
    folder: Path | None = None,
) -> Iterator[Context]:
    """Inputs of a workload, and a folder for exported models that goes away afterwards."""
    waveforms, _ = speech(workload.seconds)
    with tempfile.TemporaryDirectory(prefix="w2vbert-bench-") as temporary:
        yield Context(
            workload=workload,
            device=device,
            threads=threads,
            layers=workload.depth(device.type, layers),
            features=encoder_inputs(waveforms),
            waveforms=waveforms,
            folder=folder or Path(temporary),
        )


def random_weights(config: Any, device: torch.device) -> dict[str, Tensor]:
    """A state dict, float32, equal on every machine.

    The feed-forward block of the adapter gets a norm of zero weight: CTranslate2 4.8 leaves that
    block's output out of its adapter (it adds the block's input), so only models in which the block
    adds nothing give the same answer there. It still runs, at full cost, in every library.
    """
    import w2vbert_fast

    with torch.device("meta"):
        shapes = w2vbert_fast.Wav2Vec2BertModel(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, meta in shapes.items():
        value = torch.empty(meta.shape)
        if "norm" in name:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)
        elif meta.dim() <= 1 or "embedding" in name:
            value.normal_(0.0, 0.5, generator=generator)
        else:
            value.normal_(0.0, meta[0].numel() ** -0.5, generator=generator)
        is_adapter_ffn = name.startswith("adapter.") and ".ffn" in name
        if is_adapter_ffn and ("norm" in name or name.endswith("bias")):
            value.zero_()
        weights[name] = value.to(device)
    return weights


def require(*modules: str) -> None:
    """Raises `Unavailable` where a module is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)}")


def oracle(context: Context, dtype: str) -> list[Tensor]:
    """What is right: the reference on each utterance alone, in float64, from weights and inputs
    rounded to `dtype` ("fp32" or "bf16").

    A run of more than 1 TFLOP on a CPU is done in float32.

    Returns:
        `[T, C]` of each utterance on the CPU.
    """
    heavy = encoder_flops(context.our_config(), context.lengths) > 1e12
    precision = torch.float32 if heavy and context.device.type == "cpu" else torch.float64
    model = exact(context.reference(dtype, "eager"), precision)
    results = []
    with torch.inference_mode():
        for row in range(len(context.features)):
            x = context.batch([row], DTYPES[dtype])["input_features"]
            results.append(model(x.to(precision)).last_hidden_state[0].cpu())
    return results


def exact(model: nn.Module, precision: torch.dtype = torch.float64) -> nn.Module:
    """A copy in another precision. Attention is computed in blocks of queries, or five minutes of
    audio would need 115 GB."""
    model = copy.deepcopy(model).to(precision)
    for module in model.modules():
        if type(module).__name__ == "Wav2Vec2BertSelfAttention":
            module.forward = types.MethodType(attention_by_blocks, module)
    return model


def attention_by_blocks(
    module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """`Wav2Vec2BertSelfAttention.forward` for one utterance, 256 queries at a time."""
    frames = hidden_states.shape[1]
    shape = (frames, module.num_heads, module.head_size)

    def heads(linear: nn.Module) -> Tensor:
        return linear(hidden_states[0]).view(shape).transpose(0, 1)  # [H, T, D]

    query, key, value = (heads(m) for m in (module.linear_q, module.linear_k, module.linear_v))
    keys = torch.arange(frames, device=query.device)
    blocks = []
    for start in range(0, frames, 256):
        block = query[:, start : start + 256]
        scores = block @ key.transpose(1, 2)  # [H, 256, T]
        if module.position_embeddings_type == "relative_key":
            left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
            distance = (keys[None, :] - keys[start : start + 256, None]).clamp(-left, right) + left
            by_distance = block @ module.distance_embedding.weight.t()
            scores += by_distance.gather(-1, distance.expand(scores.shape))
        blocks.append(torch.softmax(scores * module.head_size**-0.5, -1) @ value)
    output = torch.cat(blocks, 1).transpose(0, 1).reshape(1, frames, -1)
    return module.linear_out(output), None


def limit_threads(threads: int) -> None:
    """The same number of threads for every library; call it before any of them is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch.set_num_threads(threads)


def gather(batches: list[list[int]], lengths: list[int], outputs: list[Tensor]) -> list[Tensor]:
    """Outputs of the batches `[batch, T, C]` -> each utterance's valid frames, in order."""
    result: list[Any] = [None] * len(lengths)
    for rows, output in zip(batches, outputs, strict=True):
        for place, row in enumerate(rows):
            result[row] = output[place, : lengths[row]]
    return result
