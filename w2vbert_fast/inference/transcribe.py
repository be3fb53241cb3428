"""Speech to text with a CTC checkpoint: audio files in, transcripts out, one after another."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from w2vbert_fast.configuration import Wav2Vec2BertConfig
from w2vbert_fast.inference.audio import AudioError, load_audio
from w2vbert_fast.models import Wav2Vec2BertForCTC
from w2vbert_fast.ops import greedy_decode
from w2vbert_fast.processing import Wav2Vec2BertProcessor

DEMO_MODEL = "demo"
"""The name of the checkpoint that ships with the package; a folder of that name is `./demo`."""

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"


@dataclass(frozen=True)
class Transcript:
    """What came of one file.

    Attributes:
        file: the file, as the caller named it.
        text: what was said; None when the file failed.
        audio_seconds: length of the recording in seconds; None when it could not be read.
        processing_seconds: time from opening the file to its text, in seconds; None when it failed.
        error: what is wrong with the file, None when nothing is.
    """

    file: str
    text: str | None = None
    audio_seconds: float | None = None
    processing_seconds: float | None = None
    error: str | None = None

    @property
    def real_time_factor(self) -> float | None:
        """Processing seconds per second of audio (below 1: faster than it was spoken)."""
        if self.audio_seconds is None or self.processing_seconds is None:
            return None
        return self.processing_seconds / self.audio_seconds


@dataclass(frozen=True)
class Pipeline:
    """A CTC model with the feature extractor and the tokenizer of its checkpoint.

    Attributes:
        model: in eval mode, on its device.
        processor: feature extractor and tokenizer.

    Raises:
        ValueError: the tokenizer has no padding token, which is CTC's blank.
    """

    model: Wav2Vec2BertForCTC
    processor: Wav2Vec2BertProcessor

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the model reads."""
        return self.processor.feature_extractor.sampling_rate

    def __post_init__(self) -> None:
        if self.processor.tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad_token, which CTC decoding needs as its blank"
            )

    @property
    def blank(self) -> int:
        """Id of CTC's blank, the tokenizer's padding token."""
        blank: int | None = self.processor.tokenizer.pad_token_id
        assert blank is not None
        return blank

    def recognize(self, waveforms: Sequence[Tensor]) -> list[str]:
        """Transcribe waveforms as one batch, greedily: the best token of every valid frame.

        What is in the batch beside it does not change an utterance's text.

        Args:
            waveforms: each float ``[num_samples]`` at `sampling_rate`.

        Returns:
            A text for every waveform.

        Raises:
            ValueError: the batch is empty, or a waveform is too short or not finite.
        """
        parameter = next(self.model.parameters())
        features = self.processor.feature_extractor(
            list(waveforms),
            sampling_rate=self.sampling_rate,
            return_tensors="pt",
            return_attention_mask=True,
            device=parameter.device,
        )
        mask: Tensor = features["attention_mask"]
        with torch.inference_mode():
            logits = self.model(
                features["input_features"].to(parameter.dtype), attention_mask=mask
            ).logits
        # Repeats and blanks are dropped on the device: only token ids come back.
        tokens = greedy_decode(logits, self.model.valid_lengths(mask), blank=self.blank)
        texts: list[str] = self.processor.batch_decode(tokens, group_tokens=False)
        return texts


def load_pipeline(
    model: str | os.PathLike[str] = DEMO_MODEL,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    use_fast_kernels: bool = True,
) -> Pipeline:
    """Load a CTC checkpoint with its feature extractor and tokenizer.

    Args:
        model: ``"demo"`` (the checkpoint that ships with the package: English telephone prompts), a
            folder, or a Hugging Face hub id.
        revision: branch, tag or commit on the hub.
        device: where to run; None: the first CUDA device if there is one, else the CPU.
        dtype: type of the weights and activations, such as ``"bfloat16"``, or ``"int8"`` on the CPU
            (`Wav2Vec2BertModel.from_pretrained` says of what); None: the checkpoint's own on a GPU,
            float32 on the CPU.
        use_fast_kernels: run the fast implementation of each operation for the device.

    Returns:
        The pipeline, ready to run.

    Raises:
        OSError: the checkpoint or one of its files is not to be had.
        ValueError: the checkpoint is damaged or has no CTC head; or ``device`` or ``dtype`` is
            unknown or not there.
    """
    source = DEMO_FOLDER if model == DEMO_MODEL else model
    where = find_device(device)
    config = Wav2Vec2BertConfig.from_pretrained(source, revision=revision)
    if config.architectures and Wav2Vec2BertForCTC.__name__ not in config.architectures:
        raise ValueError(
            f"model {os.fspath(model)!r} is a checkpoint of {', '.join(config.architectures)}; "
            f"transcribing needs {Wav2Vec2BertForCTC.__name__}"
        )
    processor = Wav2Vec2BertProcessor.from_pretrained(source, revision=revision)
    if dtype is None and where.type == "cpu":
        dtype = torch.float32
    network = Wav2Vec2BertForCTC.from_pretrained(
        source,
        revision=revision,
        dtype=dtype,
        device=where,
        use_fast_kernels=use_fast_kernels,
    )
    return Pipeline(network, processor)


def transcribe(
    paths: Iterable[str | os.PathLike[str]], pipeline: Pipeline | None = None
) -> Generator[Transcript, None, None]:
    """Transcribe audio files, lazily and in order.

    A file that cannot be read, or does not fit into memory, yields a transcript with `error` set,
    and the next one follows.

    Args:
        paths: audio files of any format, sampling rate and number of channels.
        pipeline: from `load_pipeline`; None: the demo checkpoint.

    Yields:
        A transcript for every path.

    Raises:
        ImportError: a package of the ``audio`` extra is needed and not installed.
    """
    if pipeline is None:
        pipeline = load_pipeline()
    for path in paths:
        yield _transcribe_file(os.fspath(path), pipeline)


def _transcribe_file(path: str, pipeline: Pipeline) -> Transcript:
    start = time.perf_counter()
    seconds = None
    try:
        audio = load_audio(path, sampling_rate=pipeline.sampling_rate)
        seconds = audio.seconds
        (text,) = pipeline.recognize([audio.samples])
    except AudioError as error:
        return Transcript(path, error=error.reason)
    except ValueError as error:
        return Transcript(path, audio_seconds=seconds, error=str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        length = "" if seconds is None else f" for {seconds:.0f} seconds of audio"
        return Transcript(path, audio_seconds=seconds, error=f"not enough memory{length}")
    return Transcript(path, text, seconds, time.perf_counter() - start)


def is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator raises a bare RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )


def find_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; expected cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device {str(found)!r} is not there: PyTorch sees {count} CUDA devices")
    return found
