"""`FinetuneConfig`: everything that decides how a model is fine-tuned.

Importing this module takes the standard library only, so that the command line can offer the
options without loading PyTorch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from w2vbert_fast.training.tasks import TASKS

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Decay = Literal["linear", "cosine", "constant"]
RecomputePolicy = Literal["none", "layer", "attention", "auto"]
Metric = Literal["auto", "wer", "cer"]
VocabularyChoice = Literal["auto", "keep", "new"]

LORA_TARGETS = (
    "linear_q",
    "linear_k",
    "linear_v",
    "linear_out",
    "intermediate_dense",
    "output_dense",
)
"""The linear layers of a Conformer layer: attention and both feed-forward blocks."""

# What may differ between a run and the one that resumes it: none of these changes a weight.
_FREE_TO_CHANGE = (
    *("hub_private", "log_every", "num_workers", "out", "push_to_hub", "save_every", "tensorboard"),
)


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        model: a folder or hub id to start from: an encoder such as `facebook/w2v-bert-2.0`, or a
            model with the head of the task.
        train: data set of the recordings to train on; see `docs/use/datasets.md`.
        eval: data set of the recordings to score. It is never trained on.
        out: folder for checkpoints, logs and the state of a run. When it holds the state of a run
            with the same configuration, that run goes on.
        columns: columns of the data sets by what they mean, such as `{"text": "sentence"}`, where
            their names do not say so.
        eval_columns: those of `eval`; None: as `columns`.
        task: "ctc" (speech recognition), "classification" (one class an utterance), "frames" (one
            class a 20 ms frame) or "xvector" (speakers).
        steps: optimiser steps; `epochs` replaces it.
        epochs: passes over the training data instead of `steps`.
        frame_budget: encoder frames (20 ms each) in a batch of one process, over all its
            utterances. Padding is not computed and does not count.
        accumulate: batches of each process in one optimiser step.
        max_seconds: longer training recordings are left out, which the log says.
        learning_rate: peak of the schedule.
        warmup: steps of linear warm-up from 0; None: a tenth of all steps.
        decay: how the rate falls after it: "linear" or "cosine" to 0, or "constant".
        weight_decay: AdamW's, for matrices; biases, norms and other vectors have none.
        betas: AdamW's.
        adam_epsilon: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        precision: "bf16" runs the model under autocast with fp32 weights, and so does "fp16", with
            a loss that is scaled up as far as gradients stay finite (Micikevicius et al. 2018), for
            GPUs without bf16 such as T4 and V100; "fp32" does not; "auto" takes bf16 on a GPU that
            has it.
        speeds: playback speeds drawn from for each training utterance (Ko et al. 2015); `(1.0,)`
            for none.
        model_overrides: entries of the model's configuration to change, such as SpecAugment's
            `mask_time_prob` or `layerdrop`.
        average: decay of an exponential moving average of the weights, which is then what is
            scored and saved; None for none.
        gradient_checkpointing: what is recomputed in the backward pass: "none", "layer",
            "attention" or "auto", see the model's `gradient_checkpointing_enable`; True is "layer",
            False "none".
        use_fast_kernels: see the model's property of that name.
        freeze: how many of the encoder's first layers stay as they are, with the feature projection
            in front of them; "encoder": all, so that an adapter and the head are trained; 0: none.
        vocabulary: "new" builds it from the training transcripts and starts a new CTC head; "keep"
            takes the tokenizer of the checkpoint; "auto" keeps it where there is one.
        lower_case: lower the case of transcripts.
        min_character_count: rarer characters of the training transcripts become unknown.
        lora: rank of low-rank adapters (Hu et al. 2022); 0 trains all weights.
        lora_alpha: their scale times the rank; None: twice the rank.
        lora_dropout: dropout in front of them.
        lora_targets: names of the layers that get one.
        metric: which score chooses the best checkpoint of "ctc": "wer", "cer", or "auto", the word
            error rate where the vocabulary has a word separator and transcripts have spaces.
        evaluate_every: steps between two evaluations.
        save_every: steps between two saved states, from which a killed run resumes; None: as
            `evaluate_every`.
        log_every: steps between two rows of `metrics.jsonl`.
        tensorboard: also write TensorBoard events.
        push_to_hub: repository of the Hugging Face hub that the best checkpoint is uploaded to at
            the end; it is made at the start, where there is none. None: no upload.
        hub_private: whether a repository that is made is private.
        device: "cpu" keeps a process off the GPU; None: a GPU if there is one.
        num_workers: processes that read audio ahead; 0: the training process itself.
        seed: of everything that is random.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value; the message names it.
    """

    model: str | os.PathLike[str]
    train: str | os.PathLike[str]
    eval: str | os.PathLike[str]
    out: str | os.PathLike[str]
    columns: Mapping[str, str] = field(default_factory=dict)
    eval_columns: Mapping[str, str] | None = None
    task: str = "ctc"
    steps: int = 5000
    epochs: int | None = None
    frame_budget: int = 6000
    accumulate: int = 1
    max_seconds: float = 40.0
    learning_rate: float = 5e-5
    warmup: int | None = None
    decay: Decay = "linear"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    average: float | None = None
    gradient_checkpointing: bool | RecomputePolicy = False
    use_fast_kernels: bool = True
    freeze: int | Literal["encoder"] = 0
    vocabulary: VocabularyChoice = "auto"
    lower_case: bool = False
    min_character_count: int = 1
    lora: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    metric: Metric = "auto"
    evaluate_every: int = 500
    save_every: int | None = None
    log_every: int = 20
    tensorboard: bool = True
    push_to_hub: str | None = None
    hub_private: bool = False
    device: str | None = None
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "train", "eval", "out"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike):
                raise TypeError(f"{name} must be a path, got a {type(value).__name__}")
            object.__setattr__(self, name, os.fspath(value))
        for name in ("betas", "speeds", "lora_targets"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, list | tuple):
                raise TypeError(f"{name} must be a tuple, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("columns", "eval_columns", "model_overrides"):
            if name == "eval_columns" and self.eval_columns is None:
                continue
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} must be a mapping, got {getattr(self, name)!r}")
            object.__setattr__(self, name, dict(getattr(self, name)))
        self._check_choices()
        self._check_counts()
        self._check_numbers()

    def _check_choices(self) -> None:
        for name, choices in (
            ("task", tuple(TASKS)),
            ("precision", get_args(Precision)),
            ("decay", get_args(Decay)),
            ("vocabulary", get_args(VocabularyChoice)),
            ("metric", get_args(Metric)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.metric != "auto" and not TASKS[self.task].transcribes:
            raise ValueError(f"metric {self.metric!r} is for the task 'ctc', got {self.task!r}")
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"device must be None or 'cpu', got {self.device!r}; which GPU a process takes is "
                "for accelerate launch or CUDA_VISIBLE_DEVICES to say"
            )
        recompute = self.gradient_checkpointing
        if not isinstance(recompute, bool) and recompute not in get_args(RecomputePolicy):
            policies = ", ".join(get_args(RecomputePolicy))
            raise ValueError(
                "gradient_checkpointing must be True, False or one of "
                f"{policies}, got {recompute!r}"
            )
        if self.freeze != "encoder" and (
            isinstance(self.freeze, bool) or not isinstance(self.freeze, int) or self.freeze < 0
        ):
            raise ValueError(f"freeze must be a number of layers or 'encoder', got {self.freeze!r}")
        if self.freeze and self.lora:
            raise ValueError("freeze has no effect with lora, which trains no layer but adapters")
        for name in ("lower_case", "use_fast_kernels", "tensorboard", "hub_private"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_counts(self) -> None:
        for name, least, optional in (
            ("steps", 1, False),
            ("epochs", 1, True),
            ("frame_budget", 1, False),
            ("accumulate", 1, False),
            ("warmup", 0, True),
            ("min_character_count", 1, False),
            ("lora", 0, False),
            ("evaluate_every", 1, False),
            ("save_every", 1, True),
            ("log_every", 1, False),
            ("num_workers", 0, False),
            ("seed", 0, False),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def _check_numbers(self) -> None:
        for name, low, high, optional in (
            ("max_seconds", 0.0, math.inf, False),
            ("learning_rate", 0.0, math.inf, False),
            ("max_grad_norm", 0.0, math.inf, False),
            ("adam_epsilon", 0.0, math.inf, False),
            ("average", 0.0, 1.0, True),
            ("lora_alpha", 0.0, math.inf, True),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not low < _number(name, value) < high:
                above = f"between {low:g} and {high:g}" if high < math.inf else f"above {low:g}"
                raise ValueError(f"{name} must be {above}, got {value}")
        if not 0 <= _number("weight_decay", self.weight_decay) < math.inf:
            raise ValueError(f"weight_decay must be 0 or above, got {self.weight_decay}")
        if not 0 <= _number("lora_dropout", self.lora_dropout) < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if len(self.betas) != 2 or not all(0 <= _number("betas", b) < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas}")
        if not self.speeds or not all(0.25 <= _number("speeds", s) <= 4 for s in self.speeds):
            raise ValueError(f"speeds must be numbers from 0.25 to 4, got {self.speeds}")
        for name, needs, has in (
            ("lora_alpha", "lora", self.lora > 0),
            ("lora_dropout", "lora", self.lora > 0),
            ("hub_private", "push_to_hub", self.push_to_hub is not None),
            *(
                (name, "the task 'ctc'", TASKS[self.task].transcribes)
                for name in ("lower_case", "vocabulary", "min_character_count")
            ),
        ):
            default = next(entry.default for entry in fields(self) if entry.name == name)
            if not has and getattr(self, name) != default:
                raise ValueError(f"{name} needs {needs}: it would have no effect")
        if self.lora and not self.lora_targets:
            raise ValueError("lora_targets is empty; name the layers that get an adapter")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What keeps this run from going on with the state of another.

        Args:
            other: `to_dict` of the configuration of that run.

        Returns:
            For each field that differs its name, the other value and this one.
        """
        mine = self.to_dict()
        # What that run could not choose yet was as it is by default.
        usual = FinetuneConfig(**{name: mine[name] for name in ("model", "train", "eval", "out")})
        theirs = {**usual.to_dict(), **other}
        names = [entry.name for entry in fields(self) if entry.name not in _FREE_TO_CHANGE]
        return [
            f"{name}: {theirs.get(name)!r}, now {mine[name]!r}"
            for name in names
            if theirs.get(name) != mine[name]
        ]

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of an optimiser step.

        Args:
            step: the step, from 0.
            steps: steps of the whole run.
        """
        warmup = min(steps, -(-steps // 10) if self.warmup is None else self.warmup)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.decay == "constant":
            return self.learning_rate
        remaining = 1.0 - (step - warmup) / max(1, steps - warmup)
        if self.decay == "cosine":
            remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
        return self.learning_rate * remaining


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value
