"""The encoder with a head: CTC, sequence, frame and speaker (x-vector) classification.

Reference: the classes of the same names in transformers 5.23. In padded batches every utterance
gets the answer that the reference gives for it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.layers import Initial
from w2vbert_fast.models.model import HiddenStatesRequest, PackedEncoding, Wav2Vec2BertModel
from w2vbert_fast.models.optimized.sizes import are_watched
from w2vbert_fast.models.outputs import HiddenStates, ModelOutput, as_requested
from w2vbert_fast.models.pooling import Statistics, left_aligned, mean_over_frames, without_padding
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel
from w2vbert_fast.ops.ctc import IGNORED_LABEL

__all__ = [
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForCTC",
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForXVector",
]

BLANK_LOGIT = 100.0
"""Logit of the blank in padded frames, beside 0 for every other token."""

Output = TypeVar("Output", bound=ModelOutput)


@dataclass(eq=False)
class HeadOutput(ModelOutput):
    """What most heads return; `hidden_states` and `attentions` as `Wav2Vec2BaseModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: HiddenStates | None = None
    attentions: HiddenStates | None = None


class Wav2Vec2BertHead(Wav2Vec2BertPreTrainedModel, Generic[Output]):
    """The encoder with a head: what all heads share. A head of its own is a class of these members.

    Attributes:
        OUTPUT: the class of what `forward` returns, a dataclass of `ModelOutput`.
        HEAD: names of the modules that are not the encoder.
        MAY_MIX_LAYERS: it reads a learned average of all layers if the configuration says so
            (`use_weighted_layer_sum`).
        MAY_HAVE_ADAPTER: an adapter may stand between encoder and head.
    """

    OUTPUT: ClassVar[type[ModelOutput]]
    MAY_MIX_LAYERS: ClassVar[bool] = True
    MAY_HAVE_ADAPTER: ClassVar[bool] = True
    INITIAL: ClassVar[Initial] = {
        "layer_weights": lambda weights: weights.fill_(1.0 / weights.numel())
    }

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        config = self.config
        if config.add_adapter and not self.MAY_HAVE_ADAPTER:
            name = type(self).__name__
            raise ValueError(f"config.add_adapter is True; {name} works without an adapter only")
        self.wav2vec2_bert = Wav2Vec2BertModel(config)
        if self.MAY_MIX_LAYERS and config.use_weighted_layer_sum:
            num_states = config.num_hidden_layers + 1
            self.layer_weights = nn.Parameter(torch.full((num_states,), 1.0 / num_states))

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        """The tensors of `OUTPUT`, from what the encoder gives: `[N, C]`, packed.

        Classes of this file may be given rows behind those of `layout`, which are nobody's.
        """
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        """The scalar loss of a batch, as the reference computes it for utterances alone.

        Args:
            logits: as `forward` returns them.
            labels: as the class says.
            layout: of what `compute` was given.
        """
        raise NotImplementedError

    def utterance_losses(
        self, logits: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A loss for each utterance, so that a bad one can be told and dropped.

        Args:
            logits: as `forward` returns them, valid frames first.
            lengths: int64 `[batch]`, valid frames.
            labels: class ids; -100 is ignored.

        Returns:
            fp32 `[batch]` each: losses, and weights. The loss of a batch is the ratio of the sums.
        """
        raise NotImplementedError

    def class_scores(self, logits: Tensor) -> Tensor:
        """fp32 scores of the same shape; the decision is the class with the highest."""
        return logits.float()

    def check_labels(self, labels: Tensor) -> None:
        """Look at labels before anything is computed. Raises `ValueError` for impossible ones."""

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
        return_dict: bool | None = None,
    ) -> Output | tuple[Any, ...]:
        """What the head makes of a padded batch, and with labels its loss; see the class for both.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; `None`: all are.
            labels: the targets.
            output_attentions: also return attention maps.
            output_hidden_states: `True`, or the indices to keep.
            return_dict: `False` for a plain tuple.

        Raises:
            ValueError: a shape or a label does not fit, or an utterance is too short for the head.
        """
        if labels is not None:
            self.check_labels(labels)
        x, encoding = self._encode(
            input_features, attention_mask, output_attentions, output_hidden_states
        )
        tensors = self.compute(self._own_rows(x, encoding.layout), encoding.layout)
        loss = None
        if labels is not None:
            logits = tensors["logits"]
            loss = self.loss(logits, labels.to(logits.device), encoding.layout)
        base = self.wav2vec2_bert
        output: Any = self.OUTPUT(
            loss=loss,
            **tensors,
            hidden_states=base.unpack_hidden_states(encoding, output_hidden_states),
            attentions=base.unpack_attentions(encoding, output_attentions),
        )
        return as_requested(output, return_dict, self.config.return_dict)

    def _encode(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStatesRequest,
    ) -> tuple[Tensor, PackedEncoding]:
        mixes = self.MAY_MIX_LAYERS and self.config.use_weighted_layer_sum
        encoding = self.wav2vec2_bert.encode_packed(
            input_features,
            attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=True if mixes else output_hidden_states,
        )
        if not mixes:
            return encoding.hidden_state, encoding
        if self.wav2vec2_bert.adapter is not None:
            # hidden_states are the encoder's; the adapter's output has another length.
            encoding.layout = encoding.input_layout
        weights = torch.softmax(self.layer_weights, dim=-1)
        states = [state for _, state in sorted(encoding.hidden_states.items())]
        if len(states) != len(weights):
            raise ValueError(
                f"layer_weights has {len(weights)} weights; an encoder of {len(states) - 1} layers "
                f"has {len(states)} hidden states. Whoever cuts encoder.layers cuts layer_weights "
                "with them"
            )
        mixed = torch.einsum("l,lbtc->btc", weights, torch.stack(states))
        return encoding.input_layout.pack(mixed), encoding

    def _own_rows(self, x: Tensor, layout: PackedBatch) -> Tensor:
        """Without the rows that fill a batch up, where a caller's own head or a hook would meet
        them."""
        if torch.compiler.is_compiling() or x.shape[0] == layout.num_tokens:
            return x
        parts = (part for part in self._modules.values() if part is not self.wav2vec2_bert)
        knows = type(self).compute.__module__ == __name__
        return x if knows and not are_watched(parts) else x[: layout.num_tokens]

    def freeze_base_model(self) -> None:
        """Exclude the encoder's parameters from training."""
        for parameter in self.wav2vec2_bert.parameters():
            parameter.requires_grad = False

    def valid_lengths(self, attention_mask: Tensor) -> Tensor:
        """Output frames of each utterance; see `Wav2Vec2BertModel.valid_lengths`."""
        return self.wav2vec2_bert.valid_lengths(attention_mask)

    def encode(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        *,
        layer: int = -1,
        stats: Statistics | None = None,
        pool: str | None = None,
    ) -> Tensor:
        """One hidden state of the encoder; see `Wav2Vec2BertModel.encode`."""
        return self.wav2vec2_bert.encode(
            input_features, attention_mask, layer=layer, stats=stats, pool=pool
        )


@dataclass(eq=False)
class CausalLMOutput(HeadOutput):
    """Output of `Wav2Vec2BertForCTC`: `loss` (scalar), `logits` `[batch, T', vocab_size]`."""


class Wav2Vec2BertForCTC(Wav2Vec2BertHead[CausalLMOutput]):
    """The encoder with a linear layer over the vocabulary, trained with CTC.

    It returns `logits` `[batch, T', vocab_size]`. In padded frames the blank stands out
    (`BLANK_LOGIT`, 0 elsewhere), so that a plain argmax over a padded batch decodes to the right
    text. Labels are int64 `[batch, U]`, each below `vocab_size`; -100 is ignored.
    """

    OUTPUT = CausalLMOutput
    HEAD = ("lm_head",)
    EXPORTED = ("logits", "lengths")
    MAY_MIX_LAYERS = False

    def __init__(self, config: Wav2Vec2BertConfig, target_lang: str | None = None) -> None:
        super().__init__(config)
        config = self.config
        if config.vocab_size is None:
            raise ValueError(
                "config.vocab_size is None; Wav2Vec2BertForCTC needs the size of the vocabulary, "
                "for example from_pretrained(..., vocab_size=len(tokenizer))"
            )
        self.target_lang = target_lang
        self.dropout = nn.Dropout(config.final_dropout)
        width = config.output_hidden_size if config.add_adapter else config.hidden_size
        assert width is not None
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()

    @property
    def _vocab_size(self) -> int:
        size = self.config.vocab_size
        assert size is not None
        return size

    def check_labels(self, labels: Tensor) -> None:
        """They are below `vocab_size`, and there is a blank."""
        largest = int(labels.max()) if labels.numel() > 0 else -1
        if largest >= self._vocab_size:
            raise ValueError(
                f"labels holds {largest}; every label must be below vocab_size, {self._vocab_size}"
            )

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        """`logits`."""
        token_logits = self.lm_head(self.dropout(x))
        logits = layout.unpack(token_logits)
        if layout.token_positions is not None:
            padding = layout.unpack(token_logits.new_ones(layout.num_tokens, 1)) == 0
            logits = self._with_blanks(logits, padding)
        return {"logits": logits}

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """`logits` and `lengths`."""
        logits = without_padding(self.lm_head(x), tokens)
        return self._with_blanks(logits, ~tokens[..., None]), mask.sum(1)

    def _with_blanks(self, logits: Tensor, padding: Tensor) -> Tensor:
        blank = self.config.pad_token_id
        if blank is None or not 0 <= blank < logits.shape[-1]:
            return logits
        column = torch.arange(logits.shape[-1], device=logits.device) == blank
        return logits.masked_fill(padding & column, BLANK_LOGIT)

    def loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        """CTC's, with the reduction of the configuration."""
        # The loss reads every utterance from its row's first frame; padding may be in front.
        from_first = (
            logits[:, : layout.max_seqlen]
            if layout.is_right_padded
            else layout.right_padded().unpack(layout.pack(logits))
        )
        return ops.ctc_loss(
            from_first,
            torch.tensor(layout.valid_lengths, device=logits.device),
            labels,
            blank=self._blank,
            reduction=self.config.ctc_loss_reduction,
            zero_infinity=self.config.ctc_zero_infinity,
        )

    def utterance_losses(
        self, logits: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood over the number of tokens; each counts the same."""
        losses = ops.ctc_loss(logits, lengths, labels, blank=self._blank, reduction="none")
        losses = losses / (labels != IGNORED_LABEL).sum(-1).clamp(min=1)
        return losses, torch.ones_like(losses)

    @property
    def _blank(self) -> int:
        blank, size = self.config.pad_token_id, self._vocab_size
        if blank is None or not 0 <= blank < size:
            raise ValueError(
                f"config.pad_token_id is {blank}; the CTC loss needs the id of the blank, "
                f"0 to {size - 1}"
            )
        return blank


@dataclass(eq=False)
class SequenceClassifierOutput(HeadOutput):
    """Output of `Wav2Vec2BertForSequenceClassification`: `logits` `[batch, num_labels]`."""


class Wav2Vec2BertForSequenceClassification(Wav2Vec2BertHead[SequenceClassifierOutput]):
    """The encoder, a projection, the mean over an utterance's frames, a linear classifier.

    It returns `logits` `[batch, num_labels]`. Labels are `[batch]`: class ids (cross-entropy), or
    with `num_labels == 1` targets of a regression (mean squared error).
    """

    OUTPUT = SequenceClassifierOutput
    HEAD = ("projector", "classifier")
    EXPORTED = ("logits",)
    MAY_HAVE_ADAPTER = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        config = self.config
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        """`logits`."""
        return {"logits": self.classifier(mean_over_frames(self.projector(x), layout))}

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """`logits`."""
        projected = without_padding(self.projector(x), mask)
        mean = projected.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return (self.classifier(mean),)

    def loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        """Cross-entropy or mean squared error."""
        labels = labels.flatten()
        if self.config.num_labels == 1:
            return F.mse_loss(logits.flatten(), labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def utterance_losses(
        self, logits: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy; each counts the same."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return losses, torch.ones_like(losses)


@dataclass(eq=False)
class TokenClassifierOutput(HeadOutput):
    """Output of `Wav2Vec2BertForAudioFrameClassification`: `logits` `[batch, T, num_labels]`."""


class Wav2Vec2BertForAudioFrameClassification(Wav2Vec2BertHead[TokenClassifierOutput]):
    """The encoder with a linear classifier on every frame (diarisation).

    It returns `logits` `[batch, T, num_labels]`, zero in padding. Labels are one-hot
    `[batch, T, num_labels]`, or class ids `[batch, T]` with -100 ignored; with `num_labels == 1`
    targets of a regression. The loss is a mean over valid frames; the reference averages over
    padding too.
    """

    OUTPUT = TokenClassifierOutput
    HEAD = ("classifier",)
    EXPORTED = ("logits", "lengths")
    MAY_HAVE_ADAPTER = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        """`logits`."""
        return {"logits": layout.unpack(self.classifier(x))}

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """`logits` and `lengths`."""
        return without_padding(self.classifier(x), tokens), mask.sum(1)

    def loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        """Mean over the valid frames."""
        frames = (layout.batch_size, layout.padded_length)
        if tuple(labels.shape) not in (frames, (*frames, self.num_labels)):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; it must be {frames} class ids or "
                f"{(*frames, self.num_labels)} one-hot"
            )
        # Of the logits that are returned, which the loss's gradient has to reach.
        logits, targets = (layout.valid_part(layout.pack(y))[0] for y in (logits, labels))
        if self.num_labels == 1:
            return F.mse_loss(logits.flatten(), targets.flatten().to(logits.dtype))
        targets = targets if labels.dim() == 2 else targets.argmax(-1)
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL)

    def utterance_losses(
        self, logits: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the frames' cross-entropies; it counts as many times as frames are labelled."""
        scores = logits.float().transpose(1, 2)
        per_frame = F.cross_entropy(scores, labels, ignore_index=IGNORED_LABEL, reduction="none")
        return per_frame.sum(-1), (labels != IGNORED_LABEL).sum(-1).float()


class AMSoftmaxLoss(nn.Module):
    """Additive-margin softmax over cosine similarities (Wang et al. 2018)."""

    INITIAL: ClassVar[Initial] = {"weight": nn.init.normal_}

    def __init__(
        self, input_dim: int, num_labels: int, scale: float = 30.0, margin: float = 0.4
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.num_labels = num_labels
        self.weight = nn.Parameter(torch.empty(input_dim, num_labels))

    def cosines(self, embeddings: Tensor) -> Tensor:
        """`[batch, input_dim]` -> the cosine to each class's direction, `[batch, num_labels]`."""
        return F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=0)

    def forward(self, embeddings: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """`[batch, input_dim]`, int64 `[batch]` -> scalar; reduction "none": `[batch]`."""
        cosine = self.cosines(embeddings)
        target = F.one_hot(labels.flatten(), self.num_labels).bool()
        return F.cross_entropy(
            self.scale * torch.where(target, cosine - self.margin, cosine),
            labels.flatten(),
            reduction=reduction,
        )


class TDNNLayer(nn.Module):
    """Dilated time-delay layer without padding, then ReLU (Snyder et al. 2018)."""

    def __init__(self, config: Wav2Vec2BertConfig, layer_id: int = 0) -> None:
        super().__init__()
        self.in_channels = config.tdnn_dim[max(layer_id - 1, 0)]
        self.out_channels = config.tdnn_dim[layer_id]
        self.kernel_size = config.tdnn_kernel[layer_id]
        self.dilation = config.tdnn_dilation[layer_id]
        self.kernel = nn.Linear(self.in_channels * self.kernel_size, self.out_channels)

    @property
    def context(self) -> int:
        """Frames by which the output is shorter than the input."""
        return (self.kernel_size - 1) * self.dilation

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, T, in_channels]` -> `[batch, T - context, out_channels]`."""
        # The weight of the linear layer lies tap by tap: [out, tap, in].
        weight = self.kernel.weight.view(self.out_channels, self.kernel_size, self.in_channels)
        y = F.conv1d(
            x.transpose(1, 2), weight.transpose(1, 2), self.kernel.bias, dilation=self.dilation
        )
        return F.relu(y.transpose(1, 2))


@dataclass(eq=False)
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


class Wav2Vec2BertForXVector(Wav2Vec2BertHead[XVectorOutput]):
    """The encoder with a TDNN and statistics pooling: speaker embeddings (Snyder et al. 2018).

    It returns `embeddings` and `logits`, `[batch, xvector_output_dim]` each. Labels are int64
    `[batch]`, speaker ids. An utterance that the TDNN leaves fewer than two frames of is an error.
    """

    OUTPUT = XVectorOutput
    HEAD = ("projector", "tdnn", "feature_extractor", "classifier", "objective")
    EXPORTED = ("logits", "embeddings")

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        config = self.config
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = nn.ModuleList(TDNNLayer(config, i) for i in range(len(config.tdnn_dim)))
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = AMSoftmaxLoss(config.xvector_output_dim, config.num_labels)
        self.post_init()

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        """`logits` and `embeddings`."""
        embeddings = self.feature_extractor(self._statistics(self.projector(x), layout))
        return {"logits": self.classifier(embeddings), "embeddings": embeddings}

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """`logits` and `embeddings`; NaN where a row is too short: a program cannot raise."""
        x, lengths = left_aligned(self.projector(x), tokens)
        for layer in self.tdnn:
            x = layer(x)
        # As `pooled_frames`.
        valid = mask.sum(1) - self.undilated_context
        lengths = torch.minimum(lengths - self.context, valid)
        frames = torch.arange(x.shape[1], device=x.device)
        padding = (frames >= lengths[:, None])[..., None]
        count = lengths[:, None].to(x.dtype)
        mean = x.masked_fill(padding, 0.0).sum(1) / count
        centred = (x - mean[:, None]).masked_fill(padding, 0.0)
        std = torch.sqrt((centred * centred).sum(1) / (count - 1.0))
        embeddings = self.feature_extractor(torch.cat((mean, std), dim=-1))
        return self.classifier(embeddings), embeddings

    def loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        """Additive-margin softmax."""
        loss: Tensor = self.objective(logits, labels)
        return loss

    def utterance_losses(
        self, logits: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Additive-margin softmax; each counts the same."""
        losses = self.objective(logits.float(), labels, reduction="none")
        return losses, torch.ones_like(losses)

    def class_scores(self, logits: Tensor) -> Tensor:
        """The cosine to each speaker's direction, `[batch, num_labels]`."""
        scores: Tensor = self.objective.cosines(logits.float())
        return scores

    @property
    def fewest_frames(self) -> int:
        """Two more than the TDNN takes: one frame has no deviation."""
        return 2 + self.context

    @property
    def context(self) -> int:
        """Frames by which the TDNN shortens an utterance."""
        return sum(layer.context for layer in self.tdnn)  # type: ignore[misc]

    @property
    def undilated_context(self) -> int:
        """`context` as the reference counts it for its pooling: without the dilations."""
        return sum(layer.kernel_size - 1 for layer in self.tdnn)  # type: ignore[misc, operator]

    def pooled_frames(self, tokens: int, valid: int) -> int:
        """Frames behind the TDNN that the reference pools over, for an utterance by itself.

        Those that read a half frame are among them as far as the dilations reach.
        """
        return min(tokens - self.context, valid - self.undilated_context)

    def _statistics(self, hidden_state: Tensor, layout: PackedBatch) -> Tensor:
        """Mean and deviation over the TDNN's frames: `[N, C]` -> `[batch, 2 * channels]`."""
        lengths = [
            self.pooled_frames(tokens, valid)
            for tokens, valid in zip(layout.lengths, layout.valid_lengths, strict=True)
        ]
        short = [i for i, n in enumerate(lengths) if n < 2]
        if short:
            raise ValueError(
                f"input_features has {layout.valid_lengths[short[0]]} valid frames in row "
                f"{short[0]}; statistics pooling behind this TDNN needs at least "
                f"{self.context + 2}"
            )
        right_padded = layout.right_padded()
        x = right_padded.unpack(hidden_state)
        for layer in self.tdnn:
            x = layer(x)
        frames = torch.split(layout.with_lengths(lengths, x.shape[1]).pack(x), lengths)
        mean = torch.stack([utterance.mean(0) for utterance in frames])
        std = torch.stack([utterance.std(0) for utterance in frames])
        return torch.cat((mean, std), dim=-1)
