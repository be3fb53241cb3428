"""Transcribing: recordings to text, with times where they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.inference.ctc.chunks import Chunk, merge
from w2vbert_fast.inference.ctc.language_model import (
    FOLDER as LANGUAGE_MODEL_FOLDER,
    LanguageModel,
    find_language_model,
)
from w2vbert_fast.inference.ctc.pauses import split_at_pauses
from w2vbert_fast.inference.ctc.turns import in_turns
from w2vbert_fast.inference.pipeline import DEMO_MODEL, Pipeline, load_pipeline
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.tasks.base import (
    Piece,
    Task,
    file_digest,
    identity,
    pack_weights,
    source_of,
)
from w2vbert_fast.models import Wav2Vec2BertForCTC
from w2vbert_fast.ops import greedy_decode
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.scripts import is_unspaced
from w2vbert_fast.recordings.audio import MIX, SPLIT

if TYPE_CHECKING:
    from w2vbert_fast.inference.ctc.beam import BeamDecoder
    from w2vbert_fast.inference.ctc.known_text import Stretch
    from w2vbert_fast.inference.ctc.timestamps import Delay, Word

_log = logging.getLogger(__name__)

# Of a recording that is not computed whole. Nearer to what models are trained on than
# `max_seconds`, and what is cut out of it changes no more than a minute of its text.
_CHUNK_SECONDS = 60.0

NO_LANGUAGE_MODEL = "none"
_OF_LANGUAGE_MODELS = ("lm_weight", "word_bonus", "unigrams")

TIMESTAMPS = ("none", "word", "character")


class ChannelText(NamedTuple):
    """What was said on a channel.

    Attributes:
        channel: its number, from 0, or the name that was given to it.
        text: what was said.
    """

    channel: int | str
    text: str


@dataclass(frozen=True)
class Transcription(Result):
    """A recording's text.

    Attributes:
        text: what was said; None after an error.
        words: words with their characters, where timestamps were asked for.
        characters: whether tables have the characters too.
        channels: what was said on each channel, where each was transcribed by itself, or one of
            them alone; `text` and `words` are then those of all, in order of time.
        unwritten: speech that a known transcript lacks; None: `text` is what the model hears.
        unsaid: places in `words` of those that are probably not said, of a known transcript.
    """

    text: str | None = None
    words: tuple[Word, ...] | None = None
    characters: bool = True
    channels: tuple[ChannelText, ...] | None = None
    unwritten: tuple[Stretch, ...] | None = None
    unsaid: tuple[int, ...] | None = None

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {"text": self.text}
        if self.channels is not None:
            found["channels"] = [channel._asdict() for channel in self.channels]
        if self.words is not None:
            found["words"] = [word_fields(word, self.characters) for word in self.words]
        found.update(difference_fields(self.unwritten, self.unsaid))
        return found


def difference_fields(
    unwritten: Sequence[Stretch] | None, unsaid: Sequence[int] | None
) -> dict[str, Any]:
    """Where a known transcript and a recording differ, as tables hold it; nothing for others."""
    if unwritten is None or unsaid is None:
        return {}
    stretches = [
        {"start": round(one.start, 3), "end": round(one.end, 3), "text": one.text}
        for one in unwritten
    ]
    return {"unwritten": stretches, "unsaid": list(unsaid)}


def word_fields(word: Word, characters: bool) -> dict[str, Any]:
    """A word as tables hold it: times to a millisecond."""
    entry: dict[str, Any] = {
        "word": word.text,
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "confidence": round(word.confidence, 4),
    }
    if word.channel is not None:
        entry["channel"] = word.channel
    if characters and word.characters:
        entry["characters"] = [
            {
                "character": character.text,
                "start": round(character.start, 3),
                "end": round(character.end, 3),
                "confidence": round(character.confidence, 4),
            }
            for character in word.characters
        ]
    return entry


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
        speakers: names of the channels, as many as there are, where each is transcribed by itself
            (`channels="split"`); none: their numbers.
    """

    timestamps: str = "none"
    beam: int = 0
    lm: str | os.PathLike[str] | None = None
    lm_weight: float | None = None
    word_bonus: float | None = None
    unigrams: str | os.PathLike[str] | None = None
    hotwords: Sequence[str] = ()
    hotword_weight: float | None = None
    speakers: Sequence[str] = ()

    name = "transcribe"
    result = Transcription
    column_names: ClassVar[tuple[str, ...]] = ("text", "channels", "words")
    splits = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestamps not in TIMESTAMPS:
            raise ValueError(f"timestamps must be {', '.join(TIMESTAMPS)}, got {self.timestamps!r}")
        if self.beam < 0:
            raise ValueError(f"beam must be at least 0, got {self.beam}")
        if isinstance(self.hotwords, str):
            raise TypeError("hotwords must be several words, got a single string")
        self.hotwords = tuple(self.hotwords)
        if isinstance(self.speakers, str):
            raise TypeError("speakers must be several names, got a single string")
        self.speakers = tuple(self.speakers)
        if self.speakers and self.channels != SPLIT:
            raise ValueError(f"speakers are names of channels; set channels to {SPLIT!r}")
        if len(set(self.speakers)) < len(self.speakers) or "" in self.speakers:
            raise ValueError(f"speakers must be different names, got {list(self.speakers)}")
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
        pack_weights(pipeline.model)
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
    def network(self) -> Wav2Vec2BertForCTC:
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
        frames_wanted = self.beam > 0 or self._needs_words
        if not frames_wanted and all(piece.whole for piece in pieces):
            return greedy_decode(logits, lengths, blank=self.pipeline.blank)
        with torch.inference_mode():
            log_probs = logits.log_softmax(-1, dtype=torch.float32)
        counts = lengths.tolist()
        # Copies, because a view would keep the batch's padding in memory.
        return [row[:n].cpu().clone() for row, n in zip(log_probs, counts, strict=True)]

    def merged(self, chunks: Sequence[Chunk], outputs: Sequence[Tensor]) -> Tensor:
        """Log-probabilities of a recording ``[frames, vocab]``, of those of its chunks."""
        if len(outputs) == 1:
            return outputs[0]
        from w2vbert_fast.inference.ctc.timestamps import frame_seconds

        tokenizer = self.pipeline.processor.tokenizer
        return merge(
            outputs,
            chunks,
            frame_seconds(self.network.config),
            blank=self.pipeline.blank,
            delimiter=tokenizer.word_delimiter_token_id,
            unspaced=[
                index
                for token, index in tokenizer.get_vocab().items()
                if any(map(is_unspaced, token))
            ],
        )

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Transcription:
        tokenizer = self.pipeline.processor.tokenizer
        if not isinstance(outputs[0], Tensor):
            spoken = str(tokenizer.decode(outputs[0], group_tokens=False))
            return Transcription(**identity(loaded), text=spoken)
        from w2vbert_fast.inference.ctc.timestamps import frame_seconds, word_timestamps

        log_probs = self.merged(chunks, outputs)
        text: str | None = None
        words = None
        offset = loaded.row.offset
        if self.beam > 0:
            text, _ = self.decoder.search(log_probs)
        if self._needs_words:
            if text is None:
                seconds = frame_seconds(self.network.config)
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

    @property
    def _needs_words(self) -> bool:
        """Whether times of words are computed: channels are merged by them."""
        return self.timestamps != "none" or self.channels == SPLIT

    def join(self, results: Sequence[Result]) -> Transcription:
        """The channels of a recording in order of time; what is wrong is a ValueError."""
        found = [result for result in results if isinstance(result, Transcription)]
        if self.channels == MIX:
            return found[0]
        if self.channels != SPLIT:
            names: Sequence[int | str] = [int(self.channels)]
        else:
            names = self.speakers or range(len(found))
        if len(names) != len(found):
            raise ValueError(
                f"it has {len(found)} channel{'s' if len(found) > 1 else ''}, and speakers names "
                f"{len(names)}: {', '.join(map(str, names))}"
            )
        channels = tuple(
            ChannelText(name, result.text or "") for name, result in zip(names, found, strict=True)
        )
        if self.channels != SPLIT:
            words = found[0].words
            text = found[0].text
        else:
            spoken = [result.words or () for result in found]
            words, text = in_turns(dict(zip(names, spoken, strict=True)))
        if self.timestamps == "none":
            words = None
        elif words is not None and self.channels != SPLIT:
            words = tuple(replace(word, channel=names[0]) for word in words)
        return replace(found[0], text=text, words=words, channels=channels)

    def columns(self) -> list[tuple[str, Any]]:
        arrow = require("pyarrow", "offline")
        string, number = arrow.string(), arrow.float64()
        columns = [("text", string)]
        channel = [("channel", string if self.speakers else arrow.int64())]
        if self.channels == MIX:
            channel = []
        else:
            columns.append(("channels", arrow.list_(arrow.struct([*channel, ("text", string)]))))
        if self.timestamps == "none":
            return columns
        times = [("start", number), ("end", number), ("confidence", number)]
        word = [("word", string), *times, *channel]
        if self.timestamps == "character":
            characters = arrow.struct([("character", string), *times])
            word.append(("characters", arrow.list_(characters)))
        return [*columns, ("words", arrow.list_(arrow.struct(word)))]

    def options(self) -> dict[str, Any]:
        model = self.language_model
        # Only where they are given, so that folders of before know themselves.
        more: dict[str, Any] = {
            "hotwords": list(self.hotwords),
            "hotword_weight": self.hotword_weight,
            "speakers": list(self.speakers),
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
