"""`accelerate` in what people run: SeamlessM4T v2, codecs, pipelines, Trainer, PEFT; features."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.reference import TINY, padded_batch, pair, relative_error
from tests.integrations.test_integration_transformers import (
    FEATURES,
    NO_DROPOUT,
    always_fast,
    assert_equal,
    assert_same_step,
    both,
    encoder_of,
    flat,
    said,
    training_step,
)
from w2vbert_fast.integrations import transformers as integration
from w2vbert_fast.integrations.transformers import FastSeamlessM4TFeatureExtractor, accelerate

__all__ = ["always_fast", "said"]

OLD = transformers.__version__.startswith("4.")

SEAMLESS = {
    "hidden_size": 48,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 64,
    "speech_encoder_layerdrop": 0.0,
    "adaptor_dropout": 0.0,
    "feature_projection_input_dim": FEATURES,
    "left_max_position_embeddings": 5,
    "right_max_position_embeddings": 3,
    "conv_depthwise_kernel_size": 7,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 4,
}


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, max(parameter[0].numel(), 4) ** -0.5)
    return model.eval()


def seamless(**config: Any) -> tuple[Any, Any]:
    """(reference, accelerated) speech encoder of SeamlessM4T v2."""
    from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as modeling

    torch.manual_seed(0)
    values = transformers.SeamlessM4Tv2Config(**{**SEAMLESS, **config})
    reference = randomised(modeling.SeamlessM4Tv2SpeechEncoder(values))
    return reference, accelerate(copy.deepcopy(reference))


@pytest.mark.parametrize("add_adapter", [True, False])
@torch.no_grad()
def test_seamless_speech_encoder(add_adapter: bool, always_fast: None) -> None:
    reference, fast = seamless(add_adapter=add_adapter)
    lengths = (37, 22, 9)
    x, mask = padded_batch(lengths, FEATURES)
    for options in ({}, {"output_hidden_states": True}, {"return_dict": False}, {}):
        assert_equal(fast(x, **options), reference(x, **options))
    mine = fast(x, attention_mask=mask, output_hidden_states=True)
    theirs = reference(x, attention_mask=mask, output_hidden_states=True)
    assert mine[0].shape == theirs[0].shape
    assert len(mine.hidden_states) == len(theirs.hidden_states)
    valid = mask.bool()
    # The last one of transformers 5 is the output of the adapter.
    for a, b in zip(mine.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        assert relative_error(a[valid], b[valid]) <= 1e-5
    for row, length in enumerate(lengths):
        alone = reference(x[row : row + 1, :length])[0][0]
        assert relative_error(mine[0][row, : len(alone)], alone) <= 1e-5


def test_seamless_gradients(always_fast: None) -> None:
    reference, fast = seamless()
    x, _ = padded_batch((29, 29), FEATURES)
    assert_same_step(training_step(fast, x), training_step(reference, x))


@torch.no_grad()
def test_seamless_chunked_attention_runs_the_original(said: list[str]) -> None:
    chunks = {"speech_encoder_chunk_size": 16, "speech_encoder_left_chunk_num": 0}
    reference, fast = seamless(**chunks, add_adapter=False)
    x, _ = padded_batch((29,), FEATURES)
    assert all(map(torch.equal, flat(fast(x)), flat(reference(x))))
    assert said == ["the input is longer than speech_encoder_chunk_size=16"]
    assert_equal(fast(x[:, :16]), reference(x[:, :16]))
    assert len(said) == 1


@torch.no_grad()
def test_encoders_inside_other_models(always_fast: None) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleDict({"a": both("Wav2Vec2BertModel")[0], "b": seamless()[0]})

        def forward(self, x: Tensor) -> list[Tensor]:
            return [encoder(x)[0] for encoder in self.stack.values()]

    mine = Mine()
    x, _ = padded_batch((29,), FEATURES)
    before = mine(x)
    assert_equal(accelerate(mine)(x), before)
    fast = [m for m in mine.modules() if type(m).__module__ == integration.__name__]
    ours, theirs = TINY["num_hidden_layers"], SEAMLESS["speech_encoder_layers"]
    assert len(fast) == 2 + ours + 2 + theirs + 1  # projection, encoder, layers; an adapter


@torch.no_grad()
def test_semantic_encoder_of_xcodec2(always_fast: None) -> None:
    if not hasattr(transformers, "Xcodec2Model"):
        pytest.skip(f"transformers {transformers.__version__} has no X-Codec-2")
    config = transformers.Xcodec2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        encoder_hidden_size=4,
        quantization_dim=80,
        semantic_model_config=transformers.Wav2Vec2BertConfig(**TINY),
    )
    torch.manual_seed(0)
    model = transformers.Xcodec2Model(config)
    model.semantic_encoder = randomised(model.semantic_encoder)
    model.eval()
    x, _ = padded_batch((8,), FEATURES)
    audio = torch.randn(1, 1, 8 * config.hop_length)
    before = model.encode(audio, x, output_latents=True)
    accelerate(model)
    assert type(encoder_of(model.semantic_encoder)).__module__ == integration.__name__
    after = model.encode(audio, x, output_latents=True)
    assert torch.equal(after.audio_codes, before.audio_codes)
    assert relative_error(after.latents, before.latents) <= 1e-5


LINEARS = ["linear_q", "linear_v", "linear_pos", "intermediate_dense", "output_dense"]


@pytest.mark.parametrize("accelerate_first", [True, False])
@pytest.mark.parametrize("targets", [LINEARS, ["linear_k", "pointwise_conv1"]])
def test_lora(accelerate_first: bool, targets: list[str], said: list[str]) -> None:
    model, _ = pair("Wav2Vec2BertModel", position_embeddings_type="relative_key", **NO_DROPOUT)
    plain = copy.deepcopy(model)
    adapted = []
    for fast in (False, True):
        twin = copy.deepcopy(model)
        if fast and accelerate_first:
            accelerate(twin)
        torch.manual_seed(2)
        lora = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        try:
            twin = peft.get_peft_model(twin, lora)
        except ValueError as error:
            assert OLD and "Conv1d" in str(error)
            pytest.skip(f"peft {peft.__version__} has no LoRA on nn.Conv1d")
        adapted.append(accelerate(twin) if fast and not accelerate_first else twin)
    x, mask = padded_batch((20, 12), FEATURES)
    theirs = training_step(adapted[0], x, attention_mask=mask)
    mine = training_step(adapted[1], x, attention_mask=mask)
    assert all("lora_" in name for name in mine if name.startswith("base_model"))
    assert_same_step(mine, theirs)
    # LoRA on convolutions is beyond the fast path, which asks them for their weights.
    assert len(said) == (0 if targets is LINEARS else 1)
    with torch.no_grad():
        assert relative_error(adapted[1](x)[0], plain(x)[0]) > 1e-3
        merged = adapted[1].eval().merge_and_unload()
        said.clear()
        assert_equal(merged(x), adapted[0].eval()(x), 3e-5)
        assert said == []


def pipelines(checkpoint: Path) -> tuple[Any, Any]:
    """(transformers' own, accelerated) speech recognition."""
    model = transformers.Wav2Vec2BertForCTC.from_pretrained(checkpoint)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    theirs, mine = (
        transformers.pipeline(
            "automatic-speech-recognition",
            model=network,
            tokenizer=processor.tokenizer,
            feature_extractor=extractor,
        )
        for network, extractor in (
            (model, processor.feature_extractor),
            (
                accelerate(copy.deepcopy(model)),
                FastSeamlessM4TFeatureExtractor.from_extractor(processor.feature_extractor),
            ),
        )
    )
    return theirs, mine


def sweeps(*lengths: int) -> list[np.ndarray[Any, Any]]:
    """Sounds of which a model makes ever other letters."""
    generator = np.random.default_rng(3)
    time = np.arange(70_000) / 16_000
    return [
        (
            np.sin(2 * np.pi * (200 + 300 * time) * time) * 0.3
            + 0.05 * generator.standard_normal(time.size)
        ).astype(np.float32)[:length]
        for length in lengths
    ]


PIPELINE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"return_timestamps": "char"},
    {"return_timestamps": "word", "chunk_length_s": 2.0, "stride_length_s": 0.5},
    {"chunk_length_s": 1.5},
]


def supported(pipe: Any, options: dict[str, Any]) -> bool:
    """The oldest transformers has neither chunks nor timestamps for these models."""
    return not options or not OLD or hasattr(pipe.model.config, "inputs_to_logits_ratio")


@pytest.mark.parametrize("options", PIPELINE_OPTIONS)
@torch.no_grad()
def test_asr_pipeline(options: dict[str, Any], tiny_checkpoint: Path, always_fast: None) -> None:
    theirs, mine = pipelines(tiny_checkpoint)
    if not supported(theirs, options):
        pytest.skip(f"the pipeline of transformers {transformers.__version__} cannot do that")
    # No chunk ends in half a frame of padding.
    expected = theirs(sweeps(70_000, 31_000, 50_240), **options)
    assert mine(sweeps(70_000, 31_000, 50_240), **options) == expected
    assert all(len(result["text"]) > 3 for result in expected)
    # Batches without padding: two recordings of three chunks of 2 s, or whole.
    if options.get("chunk_length_s", 2.0) == 2.0:
        results = [pipe(sweeps(64_000, 64_000), batch_size=2, **options) for pipe in (theirs, mine)]
        assert results[0] == results[1]


@pytest.mark.parametrize("options", PIPELINE_OPTIONS)
@torch.no_grad()
def test_asr_pipeline_finds_no_letters_in_the_padding_of_batches(
    options: dict[str, Any], tiny_checkpoint: Path, always_fast: None
) -> None:
    theirs, mine = pipelines(tiny_checkpoint)
    if not supported(theirs, options):
        pytest.skip(f"the pipeline of transformers {transformers.__version__} cannot do that")
    # 436, 193, 313 and 124 mel frames: two of the recordings end in half a frame.
    lengths = (70_000, 31_160, 50_400, 20_080)
    alone = theirs(sweeps(*lengths), **options)
    batched = mine(sweeps(*lengths), batch_size=2, **options)
    assert [result["text"] for result in batched] == [result["text"] for result in alone]
    # Words and letters end with their utterance, not with the padding.
    assert [result.get("chunks") for result in batched] == [r.get("chunks") for r in alone]
    found = theirs(sweeps(*lengths), batch_size=2, **options)
    assert [result["text"] for result in found] != [result["text"] for result in alone]


@pytest.mark.parametrize("padded", [False, True])
def test_compiled(padded: bool, always_fast: None) -> None:
    torch._dynamo.reset()
    reference, fast = both("Wav2Vec2BertModel", **NO_DROPOUT)
    compiled = torch.compile(fast, backend="eager", fullgraph=not padded, dynamic=True)
    for lengths in ((30, 20), (31, 24)):
        x, mask = padded_batch(lengths, FEATURES)
        options = {"attention_mask": mask} if padded else {}
        valid = mask.bool() if padded else slice(None)
        with torch.no_grad():
            assert (
                relative_error(compiled(x, **options)[0][valid], reference(x, **options)[0][valid])
                <= 1e-5
            )
    torch._dynamo.reset()


class Clips(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.features, _ = padded_batch((30, 30, 30, 30), FEATURES)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_features": self.features[index], "labels": torch.tensor([1, 2, 3 + index])}


def test_trainer(tmp_path: Path, always_fast: None) -> None:
    trained = []
    start, _ = pair("Wav2Vec2BertForCTC", **NO_DROPOUT, pad_token_id=0)
    for name, model in (
        ("reference", copy.deepcopy(start)),
        ("fast", accelerate(copy.deepcopy(start))),
    ):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=2,  # one epoch: transformers 4 draws random numbers, which order the next
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            learning_rate=1e-2,
            optim="sgd",
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=Clips()).train()
        trained.append(model)
        loaded = type(start).from_pretrained(tmp_path / name / "checkpoint-2")
        assert type(encoder_of(loaded)) is type(encoder_of(start))
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])
    moved = 0.0
    for old, theirs, mine in zip(
        start.parameters(), trained[0].parameters(), trained[1].parameters(), strict=True
    ):
        step = float((theirs - old).detach().norm())
        assert float((mine - theirs).detach().norm()) <= 1e-3 * step + 1e-6
        moved += step
    assert moved > 0.01


def waveforms() -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return [
        (0.1 * generator.standard_normal(n)).astype(np.float32) for n in (16_000, 9_000, 24_123)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_tensors": "pt"},
        {"padding": "max_length", "max_length": 120, "truncation": True, "return_tensors": "np"},
        {
            "padding": transformers.utils.PaddingStrategy.LONGEST,
            "return_tensors": transformers.TensorType.PYTORCH,
            "unknown_option": 1,
        },
        {"return_attention_mask": False},
        {"do_normalize_per_mel_bins": False, "pad_to_multiple_of": None},
    ],
)
def test_fast_feature_extractor(options: dict[str, Any]) -> None:
    reference = transformers.SeamlessM4TFeatureExtractor(padding_value=1, stride=2)
    fast = FastSeamlessM4TFeatureExtractor.from_extractor(reference)
    for speech in (waveforms(), waveforms()[0], waveforms()[0].tolist()):
        mine = fast(speech, sampling_rate=16_000, **options)
        try:
            theirs = reference(speech, sampling_rate=16_000, **options)
        except ValueError:  # an odd number of frames, in the oldest transformers
            assert options.get("pad_to_multiple_of", 2) is None and OLD
            continue
        assert type(mine) is type(theirs) and list(mine) == list(theirs)
        for name in theirs:
            a, b = mine[name], theirs[name]
            assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
            assert relative_error(torch.as_tensor(a).double(), torch.as_tensor(b).double()) < 1e-5
    with pytest.raises(ValueError, match="8000"):
        fast(waveforms(), sampling_rate=8_000)


def test_fast_feature_extractor_in_files_and_processors(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    reference = transformers.SeamlessM4TFeatureExtractor
    processor = transformers.AutoProcessor.from_pretrained(tiny_checkpoint)
    fast = FastSeamlessM4TFeatureExtractor.from_pretrained(tiny_checkpoint)
    assert isinstance(fast, reference) and fast.padding_value == 1
    fast_processor = transformers.Wav2Vec2BertProcessor(fast, processor.tokenizer)
    theirs = processor(waveforms(), sampling_rate=16_000, padding=True, return_tensors="pt")
    mine = fast_processor(waveforms(), sampling_rate=16_000, padding=True, return_tensors="pt")
    assert relative_error(mine["input_features"], theirs["input_features"]) < 1e-5
    padded = fast.pad([{"input_features": row} for row in mine["input_features"].numpy()])
    assert padded["input_features"].shape == mine["input_features"].shape

    fast_processor.save_pretrained(tmp_path / "processor")
    fast.save_pretrained(tmp_path / "extractor")
    written = json.loads((tmp_path / "extractor" / "preprocessor_config.json").read_text())
    assert written["feature_extractor_type"] == reference.__name__
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "processor")
    assert type(loaded.feature_extractor) is reference
    assert type(transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "extractor")) is (
        reference
    )
    assert type(FastSeamlessM4TFeatureExtractor.from_pretrained(tmp_path / "extractor")) is (
        FastSeamlessM4TFeatureExtractor
    )
    twin = pickle.loads(pickle.dumps(fast))
    assert type(twin) is FastSeamlessM4TFeatureExtractor and twin.to_dict() == fast.to_dict()
    with pytest.raises(TypeError, match=r"extractor is .*Wav2Vec2FeatureExtractor; it must be"):
        FastSeamlessM4TFeatureExtractor.from_extractor(transformers.Wav2Vec2FeatureExtractor())
