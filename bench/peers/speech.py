"""Candidates of the workloads that begin with a waveform: features, and transcription."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.context import Context, require
from bench.measure import Candidate, Prepared
from bench.workloads import SAMPLING_RATE, batches


def feature_candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """Waveforms to normalised, stacked log-mels `[T, 160]`."""
    del dtypes  # features are fp32 in every library
    yield Candidate("w2vbert_fast", "", "fp32", partial(_our_features, context))
    yield Candidate("transformers", "", "fp32", partial(_transformers_features, context))
    if context.device.type == "cpu":
        counts = sorted({1, context.threads})
        for count in counts:
            name = f"{count} thread{'s' * (count > 1)}"
            build = partial(_kaldi_features, context, count)
            yield Candidate("kaldi-native-fbank", name, "fp32", build)


def _valid(batch: dict[str, Any]) -> list[Tensor]:
    features, mask = (
        torch.as_tensor(batch["input_features"]),
        torch.as_tensor(batch["attention_mask"]),
    )
    return [x[: int(m.sum())].float().cpu() for x, m in zip(features, mask, strict=True)]


def _our_features(context: Context) -> Prepared:
    import w2vbert_fast

    extractor = w2vbert_fast.SeamlessM4TFeatureExtractor()
    options: dict[str, Any] = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
    if context.device.type == "cuda":
        options["device"] = context.device
    return Prepared(lambda: extractor(context.waveforms, **options), _valid)


def _transformers_features(context: Context) -> Prepared:
    require("transformers")
    import transformers

    extractor = transformers.SeamlessM4TFeatureExtractor()
    options = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
    return Prepared(lambda: extractor(context.waveforms, **options), _valid)


def _kaldi_features(context: Context, threads: int) -> Prepared:
    """kaldi-native-fbank for the log-mels; its users normalise and stack in NumPy."""
    require("kaldi_native_fbank")
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLING_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "povey"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 80
    options.mel_opts.low_freq = 20.0
    options.energy_floor = 0.0

    def extract(waveform: np.ndarray) -> np.ndarray:
        bank = kaldi_native_fbank.OnlineFbank(options)
        # Its binding converts a list of floats in 60 % of the time that an array takes.
        bank.accept_waveform(SAMPLING_RATE, (waveform * 32768.0).tolist())
        bank.input_finished()
        mels = np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])
        mels = (mels - mels.mean(0)) / np.sqrt(mels.var(0, ddof=1) + 1e-7)
        return mels[: len(mels) // 2 * 2].reshape(-1, 160).astype(np.float32)

    pool = ThreadPoolExecutor(threads)

    def run() -> list[np.ndarray]:
        if threads == 1:
            return [extract(w) for w in context.waveforms]
        return list(pool.map(extract, context.waveforms))

    return Prepared(run, lambda outputs: [torch.from_numpy(x) for x in outputs], pool.shutdown)


def text_candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """Waveforms to text with the checkpoint that ships with the package."""
    for dtype in dtypes:
        if dtype != "fp32":
            continue
        yield Candidate("w2vbert_fast", "padded batch", dtype, partial(_our_text, context))
        for batching in ("one by one", "sorted batches of 4", "padded batch"):
            build = partial(_transformers_text, context, batching)
            yield Candidate("transformers", f"sdpa, {batching}", dtype, build)


def _our_text(context: Context) -> Prepared:
    from w2vbert_fast.inference import load_pipeline

    pipeline = load_pipeline(device=context.device, dtype="float32", use_fast_kernels=True)
    waveforms = [torch.from_numpy(w) for w in context.waveforms]
    return Prepared(lambda: pipeline.recognize(waveforms), lambda texts: texts)


def _transformers_text(context: Context, batching: str) -> Prepared:
    require("transformers")
    import transformers

    from w2vbert_fast.inference.pipeline import DEMO_FOLDER

    transformers.utils.logging.disable_progress_bar()
    model = transformers.Wav2Vec2BertForCTC.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    model = model.eval().to(context.device)
    extractor = transformers.SeamlessM4TFeatureExtractor.from_pretrained(DEMO_FOLDER)
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(DEMO_FOLDER)
    groups = batches(context.features, batching)

    def run() -> list[str]:
        texts: list[Any] = [None] * len(context.waveforms)
        for rows in groups:
            waveforms = [context.waveforms[i] for i in rows]
            inputs = extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt")
            inputs = inputs.to(context.device)
            ids = model(**inputs).logits.argmax(-1)
            # The demo has an adapter or not; padding behind an utterance's own frames is cut off.
            valid = inputs["attention_mask"].sum(-1)
            if model.config.add_adapter:
                valid = model._get_feat_extract_output_lengths(valid)
            for row, tokens, count in zip(rows, ids.cpu(), valid.tolist(), strict=True):
                texts[row] = tokenizer.decode(tokens[: int(count)])
        return texts

    return Prepared(run, lambda texts: texts)
