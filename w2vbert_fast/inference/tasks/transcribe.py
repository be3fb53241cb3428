"""The tasks of offline inference: transcribing, embedding, classifying."""

from __future__ import annotations

import abc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from w2vbert_fast import models
from w2vbert_fast.inference.ctc.chunks import Chunk, merge
from w2vbert_fast.inference.ctc.language_model import FOLDER as LANGUAGE_MODEL_FOLDER
from w2vbert_fast.inference.ctc.language_model import LanguageModel, find_language_model
from w2vbert_fast.inference.ctc.pauses import split_at_pauses
from w2vbert_fast.inference.pipeline import DEMO_MODEL, Pipeline, find_device, load_pipeline
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.rows import Classification, Embedding, Segment, Transcription
from w2vbert_fast.inference.tasks.base import Piece, Task, file_digest, head_of, identity, source_of
from w2vbert_fast.models.model import hidden_state_index
from w2vbert_fast.ops import greedy_decode
from w2vbert_fast.ops.dispatch import packed_kernels
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.scripts import is_unspaced

if TYPE_CHECKING:
    from w2vbert_fast.inference.ctc.beam import BeamDecoder
    from w2vbert_fast.inference.ctc.timestamps import Delay

_log = logging.getLogger(__name__)

# Of a recording that is not computed whole. Nearer to what models are trained on than
# `max_seconds`, and what is cut out of it changes no more than a minute of its text.
_CHUNK_SECONDS = 60.0

NO_LANGUAGE_MODEL = "none"
_OF_LANGUAGE_MODELS = ("lm_weight", "word_bonus", "unigrams")

TIMESTAMPS = ("none", "word", "character")
CLASSIFIERS = (
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForXVector",
)


@dataclass
class Transcribe(Task):
    """Speech to text.

    Attributes:
        timestamps: "none", "word" or "character". Times are corrected by the model's emission
            delay, which is measured on the samples that ship with the package (`measure_delay`).
        beam: hypotheses kept by the beam search; 0 decodes greedily.
        lm: n-gram language model of the beam search, ARPA or KenLM; None: that in the checkpoint's
            folder `language_model`, if it has one, with the weights there; "none": no language
            model.
        lm_weight: weight of its score; None: the checkpoint's, or the decoder's own.
        word_bonus: added to the score for every word; None: as `lm_weight`.
        unigrams: file of the words that the language model knows, one a line; None: as its file or
            the checkpoint says.
        hotwords: words and phrases that are more probable than usual.
        hotword_weight: how much; None: the decoder's own.
    """

    timestamps: str = "none"
    beam: int = 0
    lm: str | os.PathLike[str] | None = None
    lm_weight: float | None = None
    word_bonus: float | None = None
    unigrams: str | os.PathLike[str] | None = None
    hotwords: Sequence[str] = ()
    hotword_weight: float | None = None

    name = "transcribe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestamps not in TIMESTAMPS:
            raise ValueError(f"timestamps must be {', '.join(TIMESTAMPS)}, got {self.timestamps!r}")
        if self.beam < 0:
            raise ValueError(f"beam must be at least 0, got {self.beam}")
        if isinstance(self.hotwords, str):
            raise TypeError("hotwords must be several words, got a single string")
        self.hotwords = tuple(self.hotwords)
        for name in (*_OF_LANGUAGE_MODELS, "lm", "hotwords", "hotword_weight"):
            given = getattr(self, name) not in (None, ())
            if given and self.beam == 0:
                raise ValueError(f"{name} needs a beam search; set beam, for example to 100")
            if given and self.lm == NO_LANGUAGE_MODEL and name in _OF_LANGUAGE_MODELS:
                raise ValueError(f"{name} needs a language model, and lm is {self.lm!r}")
        if self.hotword_weight is not None and not self.hotwords:
            raise ValueError("hotword_weight needs hotwords")
        self._forget()

    def _forget(self) -> None:
        self._pipeline: Pipeline | None = None
        self._decoder: BeamDecoder | None = None
        self._delay: Delay | None = None
        self._language_model: LanguageModel | None = None
        self._searched = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def language_model(self) -> LanguageModel | None:
        """The language model of the beam search: `lm`, or that of the checkpoint.

        Raises:
            OSError: the checkpoint is not to be had.
            ValueError: its folder of a language model is damaged; or there is none and an option
                is for one.
        """
        if self._searched or self.beam == 0 or self.lm == NO_LANGUAGE_MODEL:
            return self._language_model
        if self.lm is not None:
            found: LanguageModel | None = LanguageModel(Path(self.lm))
        else:
            found = find_language_model(source_of(self.model), revision=self.revision)
        if found is None:
            for name in _OF_LANGUAGE_MODELS:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} needs a language model; set lm, since "
                        f"{os.fspath(self.model)!r} has no folder {LANGUAGE_MODEL_FOLDER}"
                    )
        else:
            given = {name: getattr(self, name) for name in ("lm_weight", "word_bonus")}
            given["unigrams"] = None if self.unigrams is None else Path(self.unigrams)
            found = replace(found, **{k: v for k, v in given.items() if v is not None})
        self._language_model, self._searched = found, True
        return found

    @property
    def delay(self) -> Delay:
        """How late the model emits characters; measured when times are first asked for."""
        if self._delay is None:
            from w2vbert_fast.inference.ctc.timestamps import Delay, measure_delay

            try:
                self._delay = measure_delay(self.network, self.pipeline.processor)
            except (ImportError, ValueError) as error:
                _log.warning("times are as the model emits, its delay is unknown: %s", error)
                self._delay = Delay()
        return self._delay

    @classmethod
    def of_pipeline(cls, pipeline: Pipeline, **options: Any) -> Transcribe:
        """The task for a model that is loaded, which stays as it is: its weights are not packed.

        It is for this process: a pickle of the task loads the model by the pipeline's source.

        Args:
            pipeline: the model.
            **options: as the class takes them.
        """
        if pipeline.source is None:
            options.setdefault("lm", NO_LANGUAGE_MODEL if options.get("beam") else None)
        task = cls(pipeline.source or DEMO_MODEL, pipeline.revision, **options)
        task._use(pipeline)
        return task

    def load(self) -> None:
        if self._pipeline is not None:
            return
        pipeline = load_pipeline(
            self.model, revision=self.revision, device=self.device, dtype=self.dtype
        )
        _pack(pipeline.model)
        self._use(pipeline)

    def _use(self, pipeline: Pipeline) -> None:
        if self.beam > 0:
            self._decoder = self._decoder_of(pipeline)
        elif (Path(source_of(self.model)) / LANGUAGE_MODEL_FOLDER).is_dir():
            _log.info(
                "%s has a language model that greedy decoding does not use; a beam search does "
                "(beam=100)",
                os.fspath(self.model),
            )
        self._pipeline = pipeline

    def _decoder_of(self, pipeline: Pipeline) -> BeamDecoder:
        from w2vbert_fast.inference.ctc.beam import BeamDecoder
        from w2vbert_fast.inference.ctc.timestamps import frame_seconds

        model = self.language_model
        decoder = BeamDecoder(
            pipeline.processor.tokenizer,
            None if model is None else model.path,
            beam_width=self.beam,
            hotwords=self.hotwords,
            hotword_weight=self.hotword_weight,
            frame_seconds=frame_seconds(pipeline.model.config),
            **({} if model is None else model.arguments()),
        )
        if model is not None:
            _log.info(
                "language model %s: %s words, weight %g, word bonus %g",
                model.path,
                "unknown" if decoder.unigrams is None else len(decoder.unigrams),
                decoder.lm_weight,
                decoder.word_bonus,
            )
        return decoder

    @property
    def decoder(self) -> BeamDecoder:
        """The beam search; `beam` must be above 0."""
        self.load()
        assert self._decoder is not None
        return self._decoder

    @property
    def pipeline(self) -> Pipeline:
        """Model and processor, loaded."""
        self.load()
        assert self._pipeline is not None
        return self._pipeline

    @property
    def extractor(self) -> SeamlessM4TFeatureExtractor:
        return self.pipeline.processor.feature_extractor

    @property
    def network(self) -> models.Wav2Vec2BertForCTC:
        return self.pipeline.model

    def chunks(self, samples: Tensor) -> list[Chunk]:
        """Up to `max_seconds` one chunk; else chunks of a minute at most, around pauses."""
        rate = self.extractor.sampling_rate
        if self.vad or samples.numel() <= self.max_seconds * rate:
            return super().chunks(samples)
        longest = min(self.max_seconds, max(_CHUNK_SECONDS, 2 * self.overlap))
        return split_at_pauses(samples, longest, self.overlap, rate)

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """Token ids of pieces that need no more, else log-probabilities `[frames, vocab]`."""
        logits, lengths = self.pipeline.logits([piece.samples for piece in pieces])
        frames_wanted = self.beam > 0 or self.timestamps != "none"
        if not frames_wanted and all(piece.whole for piece in pieces):
            return greedy_decode(logits, lengths, blank=self.pipeline.blank)
        with torch.inference_mode():
            log_probs = logits.log_softmax(-1, dtype=torch.float32)
        counts = lengths.tolist()
        # Copies, because a view would keep the batch's padding in memory.
        return [row[:n].cpu().clone() for row, n in zip(log_probs, counts, strict=True)]

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Transcription:
        tokenizer = self.pipeline.processor.tokenizer
        if not isinstance(outputs[0], Tensor):
            spoken = str(tokenizer.decode(outputs[0], group_tokens=False))
            return Transcription(**identity(loaded), text=spoken)
        from w2vbert_fast.inference.ctc.timestamps import frame_seconds, word_timestamps

        seconds = frame_seconds(self.network.config)
        log_probs = outputs[0]
        if len(outputs) > 1:
            log_probs = merge(
                outputs,
                chunks,
                seconds,
                blank=self.pipeline.blank,
                delimiter=tokenizer.word_delimiter_token_id,
                unspaced=[
                    index
                    for token, index in tokenizer.get_vocab().items()
                    if any(map(is_unspaced, token))
                ],
            )
        text: str | None = None
        words = None
        offset = loaded.row.offset
        if self.beam > 0:
            text, _ = self.decoder.search(log_probs)
        if self.timestamps != "none":
            if text is None:
                found = word_timestamps(log_probs, tokenizer, seconds, offset, delay=self.delay)
            else:
                found = self.decoder.align(log_probs, text, offset=offset, delay=self.delay)
            words = tuple(found)
        if text is None:
            text = str(tokenizer.decode(log_probs.argmax(-1).tolist()))
        if len(outputs) > 1:
            # Where chunks meet, both may end or begin with a word delimiter.
            text = " ".join(text.split())
        characters = self.timestamps == "character"
        return Transcription(**identity(loaded), text=text, words=words, characters=characters)

    def failed(self, loaded: Loaded, error_type: str, error: str) -> Transcription:
        return Transcription(**identity(loaded), error_type=error_type, error=error)

    def options(self) -> dict[str, Any]:
        model = self.language_model
        # Only where they are given, so that folders of before know themselves.
        more: dict[str, Any] = {
            "hotwords": list(self.hotwords),
            "hotword_weight": self.hotword_weight,
        }
        if model is not None:
            more["unigrams"] = None if model.unigrams is None else file_digest(model.unigrams)
            more["unknown_word_penalty"] = model.unknown_word_penalty
            more["labels"] = None if model.labels is None else list(model.labels)
            more["no_score_boundary"] = not model.score_boundary
        return {
            **self.common_options(),
            "timestamps": self.timestamps,
            "beam": self.beam,
            "lm": None if model is None else file_digest(model.path),
            "lm_weight": None if model is None else model.lm_weight,
            "word_bonus": None if model is None else model.word_bonus,
            **{name: value for name, value in more.items() if value},
        }


@dataclass
class _Encoding(Task):
    """A model that is no CTC model, with its feature extractor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._network: models.Wav2Vec2BertPreTrainedModel | None = None
        self._extractor: SeamlessM4TFeatureExtractor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _network=None, _extractor=None)

    @abc.abstractmethod
    def class_name(self) -> str:
        """The class to load."""

    def load(self) -> None:
        if self._network is not None:
            return
        source = source_of(self.model)
        device = find_device(self.device)
        dtype = self.dtype or ("float32" if device.type == "cpu" else None)
        self._extractor = SeamlessM4TFeatureExtractor.from_pretrained(
            source, revision=self.revision
        )
        network: models.Wav2Vec2BertPreTrainedModel = getattr(
            models, self.class_name()
        ).from_pretrained(
            source, revision=self.revision, dtype=dtype, device=device, use_fast_kernels=True
        )
        self.check(network)
        _pack(network)
        self._network = network

    def check(self, network: models.Wav2Vec2BertPreTrainedModel) -> None:
        """Raise ValueError for options that do not fit the model."""

    @property
    def extractor(self) -> SeamlessM4TFeatureExtractor:
        self.load()
        assert self._extractor is not None
        return self._extractor

    @property
    def network(self) -> models.Wav2Vec2BertPreTrainedModel:
        self.load()
        assert self._network is not None
        return self._network


def _pack(network: models.Wav2Vec2BertPreTrainedModel) -> None:
    """Weights as a CPU multiplies them, where it can: nobody else has a task's model."""
    parameter = next(network.parameters())
    if parameter.device.type == "cpu" and packed_kernels().onednn_linear(parameter.dtype):
        network.pack_weights()


@dataclass
class Embed(_Encoding):
    """Hidden states.

    Attributes:
        layer: index into `hidden_states`; -1: the last.
        stats: file of mean and variance, such as `wav2vec2bert_stats.pt`, or a mapping.
        pool: "mean" or "none".
        embedding_dtype: "float32" or "float16", of the result.
    """

    layer: int = -1
    stats: str | os.PathLike[str] | dict[str, Tensor] | None = None
    pool: str = "none"
    embedding_dtype: str = "float32"

    name = "embed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("mean", "none"):
            raise ValueError(f"pool must be 'mean' or 'none', got {self.pool!r}")
        if self.embedding_dtype not in ("float32", "float16"):
            raise ValueError(
                f"embedding_dtype must be 'float32' or 'float16', got {self.embedding_dtype!r}"
            )
        self._stats: dict[str, Tensor] | None = None

    @property
    def width(self) -> int:
        """Numbers in a frame's hidden state."""
        width: int = self.network.config.hidden_size
        return width

    def class_name(self) -> str:
        return "Wav2Vec2BertModel"

    def check(self, network: models.Wav2Vec2BertPreTrainedModel) -> None:
        encoder = network.base_model
        assert isinstance(encoder, models.Wav2Vec2BertModel)
        hidden_state_index(self.layer, encoder.encoder.num_layers)
        self._stats = None
        if self.stats is not None:
            from w2vbert_fast.models.pooling import checked_statistics

            found = self.stats
            if not isinstance(found, dict):
                found = torch.load(found, map_location="cpu", weights_only=True)
            mean, variance = checked_statistics(found, network.config.hidden_size)
            device = next(network.parameters()).device
            self._stats = {"mean": mean.to(device), "var": variance.to(device)}

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """`[frames, hidden_size]` each; pooled already where a piece is the whole recording."""
        features, mask = self.features(pieces)
        pooled = self.pool == "mean" and all(piece.whole for piece in pieces)
        network = self.network
        assert isinstance(network, models.Wav2Vec2BertModel)
        with torch.inference_mode():
            states = network.encode(
                features,
                mask,
                layer=self.layer,
                stats=self._stats,
                pool="mean" if pooled else None,
            )
        kind = getattr(torch, self.embedding_dtype)
        if pooled:
            return list(states.to(kind).cpu().clone().unbind(0))
        if self.pool == "none":
            states = states.to(kind)
        counts = mask.sum(1).tolist()
        return [row[:n].cpu().clone() for row, n in zip(states, counts, strict=True)]

    def finish(self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]) -> Embedding:
        embedding = outputs[0]
        if embedding.dim() == 2:
            parts = [self.kept_frames(c, x) for c, x in zip(chunks, outputs, strict=True)]
            embedding = torch.cat(parts) if len(parts) > 1 else parts[0]
            if self.pool == "mean":
                embedding = embedding.float().mean(0).to(getattr(torch, self.embedding_dtype))
        return Embedding(**identity(loaded), embedding=embedding)

    def failed(self, loaded: Loaded, error_type: str, error: str) -> Embedding:
        return Embedding(**identity(loaded), error_type=error_type, error=error)

    def options(self) -> dict[str, Any]:
        stats: Any = self.stats
        if isinstance(stats, dict):
            stats = {name: value.tolist() for name, value in stats.items()}
        elif stats is not None:
            stats = file_digest(Path(stats))
        return {
            **self.common_options(),
            "layer": self.layer,
            "stats": stats,
            "pool": self.pool,
            "embedding_dtype": self.embedding_dtype,
        }


@dataclass
class Classify(_Encoding):
    """The classes of a recording or of its frames, or a speaker's x-vector, by the model's head.

    Of a recording in chunks, a sequence classifier's logits are the mean over all frames, as they
    would be for the whole; x-vectors are averaged by the chunks' lengths.
    """

    name = "classify"

    def class_name(self) -> str:
        head = head_of(self.model, self.revision)
        if head not in CLASSIFIERS:
            raise ValueError(
                f"model {os.fspath(self.model)!r} is a checkpoint of {head}; classifying needs "
                f"one of {', '.join(CLASSIFIERS)}"
            )
        return head

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """Logits `[num_labels]` or `[frames, num_labels]`, or embeddings, float32."""
        features, mask = self.features(pieces)
        network = self.network
        with torch.inference_mode():
            output = network(features, attention_mask=mask)
        if isinstance(network, models.Wav2Vec2BertForXVector):
            return list(output.embeddings.float().cpu().clone().unbind(0))
        logits = output.logits.float().cpu()
        if logits.dim() == 2:
            return list(logits.clone().unbind(0))
        counts = mask.sum(1).tolist()
        return [row[:n].clone() for row, n in zip(logits, counts, strict=True)]

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Classification:
        network = self.network
        labels: dict[int, str] = network.config.id2label
        if isinstance(network, models.Wav2Vec2BertForAudioFrameClassification):
            kept = [self.kept_frames(c, x) for c, x in zip(chunks, outputs, strict=True)]
            segments = self._segments(torch.cat(kept).softmax(-1), labels, loaded.row.offset)
            return Classification(**identity(loaded), segments=segments)
        weights = torch.tensor([float(chunk.keep_end - chunk.keep_start) for chunk in chunks])
        mean = (torch.stack(list(outputs)) * (weights / weights.sum())[:, None]).sum(0)
        if isinstance(network, models.Wav2Vec2BertForXVector):
            return Classification(**identity(loaded), embedding=mean)
        scores = {labels[i]: round(p, 6) for i, p in enumerate(mean.softmax(0).tolist())}
        label = labels[int(mean.argmax())]
        return Classification(**identity(loaded), label=label, scores=scores)

    def _segments(
        self, scores: Tensor, labels: dict[int, str], offset: float
    ) -> tuple[Segment, ...]:
        step = self.samples_per_frame / self.extractor.sampling_rate
        best = scores.argmax(1).tolist()
        found: list[Segment] = []
        for _, group in groupby(range(len(best)), key=best.__getitem__):
            frames = list(group)
            first, last, label = frames[0], frames[-1], best[frames[0]]
            score = float(scores[first : last + 1, label].mean())
            start, end = offset + first * step, offset + (last + 1) * step
            found.append(Segment(round(start, 4), round(end, 4), labels[label], round(score, 6)))
        return tuple(found)

    def failed(self, loaded: Loaded, error_type: str, error: str) -> Classification:
        return Classification(**identity(loaded), error_type=error_type, error=error)

    def options(self) -> dict[str, Any]:
        return self.common_options()
