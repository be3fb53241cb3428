"""A CTC checkpoint: model, feature extractor and tokenizer, loaded and ready to run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from w2vbert_fast.models import Wav2Vec2BertForCTC
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.ops import greedy_decode
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.processor import Wav2Vec2BertProcessor

DEMO_MODEL = "demo"
"""The name of the checkpoint that ships with the package; a folder of that name is `./demo`."""

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"


@dataclass(frozen=True)
class Pipeline:
    """A CTC model with the feature extractor and the tokenizer of its checkpoint.

    Attributes:
        model: in eval mode, on its device.
        processor: feature extractor and tokenizer.
        source: the folder or hub id that it was loaded from; None: it was put together.
        revision: branch, tag or commit of it on the hub.

    Raises:
        ValueError: the tokenizer has no padding token, which is CTC's blank.
    """

    model: Wav2Vec2BertForCTC
    processor: Wav2Vec2BertProcessor
    source: str | os.PathLike[str] | None = None
    revision: str | None = None

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

    def logits(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the model on waveforms as one batch.

        What is in the batch beside it does not change an utterance's logits.

        Args:
            waveforms: each float ``[num_samples]`` at `sampling_rate`.

        Returns:
            CTC logits ``[batch, num_frames, vocab]`` and how many frames of each are valid, int64
            ``[batch]``; on the model's device.

        Raises:
            ValueError: the batch is empty, or a waveform is too short or not finite.
        """
        features, mask = features_of(self.model, self.processor.feature_extractor, waveforms)
        with torch.inference_mode():
            logits = self.model(features, attention_mask=mask).logits
            return logits, self.model.valid_lengths(mask)

    def recognize(self, waveforms: Sequence[Tensor]) -> list[str]:
        """Transcribe waveforms as one batch, greedily: the best token of every valid frame.

        Args:
            waveforms: as for `logits`.

        Returns:
            A text for every waveform.

        Raises:
            ValueError: as `logits`.
        """
        # Repeats and blanks are dropped on the device: only token ids come back.
        tokens = greedy_decode(*self.logits(waveforms), blank=self.blank)
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
    return Pipeline(network, processor, source, revision)


def features_of(
    model: nn.Module, extractor: SeamlessM4TFeatureExtractor, waveforms: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What a model reads of waveforms, on its device and in its dtype.

    Args:
        model: the model.
        extractor: of its checkpoint.
        waveforms: each float ``[num_samples]`` at the extractor's sampling rate.

    Returns:
        `input_features` ``[batch, T, 160]`` and `attention_mask` ``[batch, T]``.

    Raises:
        ValueError: there are no waveforms, or one is too short or not finite.
    """
    parameter = next(model.parameters())
    found = extractor(
        list(waveforms),
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        return_attention_mask=True,
        device=parameter.device,
    )
    return found["input_features"].to(parameter.dtype), found["attention_mask"]


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
