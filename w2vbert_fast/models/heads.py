"""The encoder with a head: CTC, sequence, frame and speaker (x-vector) classification.

Reference: the classes of the same names in transformers 5.23. In padded batches every utterance
gets the answer that the reference gives for it alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.encoder import HiddenStatesRequest, PackedEncoding, Wav2Vec2BertModel
from w2vbert_fast.models.outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    XVectorOutput,
    as_requested,
)
from w2vbert_fast.models.pooling import Statistics, mean_over_frames
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel

BLANK_LOGIT = 100.0
"""Logit of the blank in padded frames, beside 0 for every other token."""

HeadOutput = TypeVar(
    "HeadOutput", CausalLMOutput, SequenceClassifierOutput, TokenClassifierOutput, XVectorOutput
)


class _WithEncoder(Wav2Vec2BertPreTrainedModel):
    """What the four heads share."""

    wav2vec2_bert: Wav2Vec2BertModel

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

    def _finish(
        self,
        output: HeadOutput,
        encoding: PackedEncoding,
        output_attentions: bool | None,
        output_hidden_states: HiddenStatesRequest,
        return_dict: bool | None,
    ) -> HeadOutput | tuple[Any, ...]:
        base = self.wav2vec2_bert
        hidden_states = base.unpack_hidden_states(encoding, output_hidden_states)
        attentions = base.unpack_attentions(encoding, output_attentions)
        output.hidden_states, output.attentions = hidden_states, attentions
        return as_requested(output, return_dict, self.config.return_dict)


class _Classifier(_WithEncoder):
    """Heads that may read a learned mix of all layers."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        self.wav2vec2_bert = Wav2Vec2BertModel(config)
        if config.use_weighted_layer_sum:
            num_states = config.num_hidden_layers + 1
            self.layer_weights = nn.Parameter(torch.full((num_states,), 1.0 / num_states))

    def _encode(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStatesRequest,
    ) -> tuple[Tensor, PackedEncoding]:
        mixes = self.config.use_weighted_layer_sum
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


class Wav2Vec2BertForCTC(_WithEncoder):
    """The encoder with a linear layer over the vocabulary, trained with CTC."""

    def __init__(self, config: Wav2Vec2BertConfig, target_lang: str | None = None) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError(
                "config.vocab_size is None; Wav2Vec2BertForCTC needs the size of the vocabulary, "
                "for example from_pretrained(..., vocab_size=len(tokenizer))"
            )
        self.target_lang = target_lang
        self.wav2vec2_bert = Wav2Vec2BertModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        width = config.output_hidden_size if config.add_adapter else config.hidden_size
        assert width is not None
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Token logits and, with labels, the CTC loss.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; `None`: all are.
            labels: int64 `[batch, U]`; -100 is ignored.
            output_attentions: also return attention maps.
            output_hidden_states: `True`, or the indices to keep.
            return_dict: `False` for a plain tuple.

        Returns:
            `logits` `[batch, T', vocab_size]`. In padded frames the blank stands out
            (`BLANK_LOGIT`, 0 elsewhere), so that a plain argmax over a padded batch decodes to the
            right text.

        Raises:
            ValueError: a label is not below `vocab_size`, or a shape does not fit.
        """
        vocab_size = self.config.vocab_size
        assert vocab_size is not None
        largest = int(labels.max()) if labels is not None and labels.numel() > 0 else -1
        if largest >= vocab_size:
            raise ValueError(
                f"labels holds {largest}; every label must be below vocab_size, {vocab_size}"
            )
        encoding = self.wav2vec2_bert.encode_packed(
            input_features,
            attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden_state, layout = self.dropout(encoding.hidden_state), encoding.layout
        token_logits = self.lm_head(hidden_state)
        logits = layout.unpack(token_logits)
        blank = self.config.pad_token_id
        if blank is not None and 0 <= blank < vocab_size and layout.token_positions is not None:
            padding = layout.unpack(token_logits.new_ones(layout.num_tokens, 1)) == 0
            column = torch.arange(vocab_size, device=logits.device) == blank
            logits = logits.masked_fill(padding & column, BLANK_LOGIT)
        loss = None
        if labels is not None:
            # The loss reads every utterance from its row's first frame; padding may be in front.
            from_first = (
                logits[:, : layout.max_seqlen]
                if layout.is_right_padded
                else layout.right_padded().unpack(layout.pack(logits))
            )
            loss = ops.ctc_loss(
                from_first,
                torch.tensor(layout.valid_lengths, device=logits.device),
                labels,
                blank=_checked_blank(blank, vocab_size),
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )
        output = CausalLMOutput(loss=loss, logits=logits)
        return self._finish(output, encoding, output_attentions, output_hidden_states, return_dict)


def _checked_blank(blank: int | None, vocab_size: int) -> int:
    if blank is None or not 0 <= blank < vocab_size:
        raise ValueError(
            f"config.pad_token_id is {blank}; the CTC loss needs the id of the blank, "
            f"0 to {vocab_size - 1}"
        )
    return blank


class Wav2Vec2BertForSequenceClassification(_Classifier):
    """The encoder, a projection, the mean over an utterance's frames, a linear classifier."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        _reject_adapter(config, "Wav2Vec2BertForSequenceClassification")
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """One row of logits per utterance.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; `None`: all are.
            labels: `[batch]`; class ids (cross-entropy), or with `num_labels == 1` targets of a
                regression (mean squared error).
            output_attentions: also return attention maps.
            output_hidden_states: `True`, or the indices to keep.
            return_dict: `False` for a plain tuple.

        Returns:
            `logits` `[batch, num_labels]`.
        """
        hidden_state, encoding = self._encode(
            input_features, attention_mask, output_attentions, output_hidden_states
        )
        pooled = mean_over_frames(self.projector(hidden_state), encoding.layout)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device).flatten()
            if self.config.num_labels == 1:
                loss = F.mse_loss(logits.flatten(), labels.to(logits.dtype))
            else:
                loss = F.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return self._finish(output, encoding, output_attentions, output_hidden_states, return_dict)


class Wav2Vec2BertForAudioFrameClassification(_Classifier):
    """The encoder with a linear classifier on every frame (diarisation)."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        _reject_adapter(config, "Wav2Vec2BertForAudioFrameClassification")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """One row of logits per frame.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; `None`: all are.
            labels: one-hot `[batch, T, num_labels]`, or class ids `[batch, T]` with -100 ignored;
                with `num_labels == 1` targets of a regression. The loss is a mean over valid
                frames; the reference averages over padding too.
            output_attentions: also return attention maps.
            output_hidden_states: `True`, or the indices to keep.
            return_dict: `False` for a plain tuple.

        Returns:
            `logits` `[batch, T, num_labels]`, zero in padding.
        """
        hidden_state, encoding = self._encode(
            input_features, attention_mask, output_attentions, output_hidden_states
        )
        layout = encoding.layout
        logits = layout.unpack(self.classifier(hidden_state))
        loss = None
        if labels is not None:
            # Of the logits that are returned, which the loss's gradient has to reach.
            loss = self._loss(layout.pack(logits), labels.to(logits.device), layout)
        output = TokenClassifierOutput(loss=loss, logits=logits)
        return self._finish(output, encoding, output_attentions, output_hidden_states, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        frames = (layout.batch_size, layout.padded_length)
        if tuple(labels.shape) not in (frames, (*frames, self.num_labels)):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; it must be {frames} class ids or "
                f"{(*frames, self.num_labels)} one-hot"
            )
        packed, logits = (layout.valid_part(x)[0] for x in (layout.pack(labels), logits))
        if self.num_labels == 1:
            return F.mse_loss(logits.flatten(), packed.flatten().to(logits.dtype))
        targets = packed if labels.dim() == 2 else packed.argmax(-1)
        return F.cross_entropy(logits, targets, ignore_index=ops.ctc.IGNORED_LABEL)


class AMSoftmaxLoss(nn.Module):
    """Additive-margin softmax over cosine similarities (Wang et al. 2018)."""

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


class Wav2Vec2BertForXVector(_Classifier):
    """The encoder with a TDNN and statistics pooling: speaker embeddings (Snyder et al. 2018)."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = nn.ModuleList(TDNNLayer(config, i) for i in range(len(config.tdnn_dim)))
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = AMSoftmaxLoss(config.xvector_output_dim, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
        return_dict: bool | None = None,
    ) -> XVectorOutput | tuple[Any, ...]:
        """A speaker embedding per utterance.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; `None`: all are.
            labels: int64 `[batch]`, speaker ids.
            output_attentions: also return attention maps.
            output_hidden_states: `True`, or the indices to keep.
            return_dict: `False` for a plain tuple.

        Returns:
            `embeddings` and `logits`, `[batch, xvector_output_dim]` each.

        Raises:
            ValueError: an utterance is too short for the TDNN to leave two frames.
        """
        hidden_state, encoding = self._encode(
            input_features, attention_mask, output_attentions, output_hidden_states
        )
        pooled = self._statistics(self.projector(hidden_state), encoding.layout)
        embeddings = self.feature_extractor(pooled)
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.objective(logits, labels.to(logits.device))
        output = XVectorOutput(loss=loss, logits=logits, embeddings=embeddings)
        return self._finish(output, encoding, output_attentions, output_hidden_states, return_dict)

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


def _reject_adapter(config: Wav2Vec2BertConfig, name: str) -> None:
    if getattr(config, "add_adapter", False):
        raise ValueError(f"config.add_adapter is True; {name} works without an adapter only")
