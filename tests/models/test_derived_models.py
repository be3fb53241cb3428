"""Classes of a caller's own that derive from the models, as scripts for transformers write them."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import w2vbert_fast
from tests.helpers.reference import TINY, padded_batch
from w2vbert_fast.checkpoints.weights import CheckpointError

WIDTH = TINY["hidden_size"]
LIBRARIES = (transformers, w2vbert_fast)


def classifier(library: Any) -> Any:
    """A classifier around the encoder, with a bare parameter, a GRU and its own initial values."""

    class Emotions(library.Wav2Vec2BertPreTrainedModel):  # type: ignore[misc]
        def __init__(self, config: Any, scale: float = 2.0) -> None:
            super().__init__(config)
            self.scale = scale
            self.wav2vec2_bert = library.Wav2Vec2BertModel(config)
            self.frame = nn.Linear(WIDTH, 8)
            self.batch_norm = nn.BatchNorm1d(8)
            self.gru = nn.GRU(8, 4, batch_first=True)
            self.temperature = nn.Parameter(torch.empty(1))
            self.head = nn.Linear(4, config.num_labels)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if module is self.head:
                nn.init.constant_(self.head.weight, 0.25)
            if module is self:
                nn.init.constant_(self.temperature, 3.0)

        def forward(self, input_features: Tensor, attention_mask: Tensor) -> Tensor:
            states = self.wav2vec2_bert(input_features, attention_mask=attention_mask)[0]
            mask = self._get_feature_vector_attention_mask(states.shape[1], attention_mask)
            states = self.batch_norm(self.frame(states).transpose(1, 2)).transpose(1, 2)
            states = self.gru(states)[0].masked_fill(~mask[..., None], 0.0)
            mean = states.sum(1) / mask.sum(1, keepdim=True)
            logits: Tensor = self.scale * self.head(mean) / self.temperature
            return logits

    return Emotions


def with_more(library: Any, name: str) -> Any:
    """A model of the library with a part more, which comes behind the parent's `post_init`."""

    class WithMore(getattr(library, name)):  # type: ignore[misc]
        def __init__(self, config: Any, width: int = 5) -> None:
            super().__init__(config)
            self.more = nn.Linear(WIDTH, width)

    return WithMore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the encoder, written by transformers."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(**TINY)
    transformers.Wav2Vec2BertModel(config).save_pretrained(folder)
    return folder


def missing(cls: Any, folder: Path, **arguments: Any) -> tuple[Any, set[str]]:
    model, report = cls.from_pretrained(folder, output_loading_info=True, **arguments)
    return model, set(report["missing_keys"])


def test_a_head_of_the_callers(folder: Path, tmp_path: Path) -> None:
    models = {}
    for library in LIBRARIES:
        model, names = missing(classifier(library), folder, num_labels=4, scale=3.0)
        assert {name.partition(".")[0] for name in names} == {
            "frame", "batch_norm", "gru", "temperature", "head"
        }  # fmt: skip
        assert model.scale == 3.0
        assert model.head.weight.unique().tolist() == [0.25]
        assert model.temperature.tolist() == [3.0]
        assert 0.01 < model.frame.weight.std() < 0.03
        assert not model.frame.bias.any()
        models[library] = model
    theirs, ours = models.values()
    # What the constructor alone knows.
    assert ours.batch_norm.weight.unique().tolist() == [1.0]
    assert ours.batch_norm.running_var.unique().tolist() == [1.0]
    assert float(ours.gru.weight_hh_l0.detach().abs().max()) <= 4**-0.5

    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path, scale=3.0)
    theirs.load_state_dict(ours.state_dict())
    batch = padded_batch((20, 20), TINY["feature_projection_input_dim"])
    torch.testing.assert_close(again(*batch), theirs.eval()(*batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Wav2Vec2BertModel", "Wav2Vec2BertForCTC"])
def test_a_part_more(folder: Path, tmp_path: Path, name: str) -> None:
    theirs, names = missing(with_more(transformers, name), folder, width=3)
    cls = with_more(w2vbert_fast, name)
    ours, own_names = missing(cls, folder, width=3)
    assert own_names - {"wav2vec2_bert.masked_spec_embed", "masked_spec_embed"} == names
    for model in (theirs, ours):
        assert model.more.weight.shape == (3, WIDTH)
        assert 0.01 < model.more.weight.std() < 0.03
        assert not model.more.bias.any()
    positional = cls.from_pretrained(folder, 7)
    assert positional.more.out_features == 7
    # A checkpoint of that class has to have the part.
    ours.save_pretrained(tmp_path)
    state = {key: value for key, value in ours.state_dict().items() if key != "more.bias"}
    ours.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing \(1\): more.bias"):
        cls.from_pretrained(tmp_path, width=3)


def test_the_constructor_of_a_model_of_this_package(folder: Path) -> None:
    for library in LIBRARIES:
        model = library.Wav2Vec2BertForCTC.from_pretrained(folder, target_lang="fin")
        assert model.target_lang == "fin"
    with pytest.raises(TypeError, match="'target_language' is no field"):
        w2vbert_fast.Wav2Vec2BertForCTC.from_pretrained(folder, target_language="fin")


@pytest.mark.parametrize("library", LIBRARIES)
def test_parameters_that_nobody_draws_stay_as_they_were_made(library: ModuleType) -> None:
    class Scaled(library.Wav2Vec2BertModel):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.factor = nn.Parameter(torch.full((2,), 7.0))
            self.norm = nn.BatchNorm1d(3)
            self.post_init()
            self.init_weights()

    model = Scaled(library.Wav2Vec2BertConfig(**TINY))
    assert model.factor.tolist() == [7.0, 7.0]
    assert model.norm.weight.tolist() == [1.0, 1.0, 1.0]


def test_buffers_that_no_checkpoint_holds(folder: Path) -> None:
    class Windowed(w2vbert_fast.Wav2Vec2BertModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("window", torch.arange(3.0), persistent=False)

    assert Windowed.from_pretrained(folder).get_buffer("window").tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("adapter_layers", [0, 2])
def test_lengths_and_masks_of_outputs(adapter_layers: int) -> None:
    config = {**TINY, "add_adapter": adapter_layers > 0, "num_adapter_layers": adapter_layers or 1}
    lengths = torch.arange(5, 40)
    mask = (torch.arange(40) < lengths[:, None]).long()
    answers = []
    for library in LIBRARIES:
        model: Any = library.Wav2Vec2BertForCTC(library.Wav2Vec2BertConfig(**config))
        counts = model._get_feat_extract_output_lengths(lengths)
        frames = int(counts.max())
        answers.append((counts, model._get_feature_vector_attention_mask(frames, mask)))
    for ours, expected in zip(answers[1], answers[0], strict=True):
        assert torch.equal(ours, expected)


def test_what_scripts_ask_a_model_and_a_configuration(tmp_path: Path) -> None:
    theirs, ours = (
        library.Wav2Vec2BertForCTC(library.Wav2Vec2BertConfig(**TINY)) for library in LIBRARIES
    )
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    ours.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'spda'"):
        ours.set_attn_implementation("spda")
    ours.config.to_json_file(tmp_path / "config.json")
    read = w2vbert_fast.Wav2Vec2BertConfig.from_json_file(tmp_path / "config.json")
    assert read == ours.config
    assert w2vbert_fast.Wav2Vec2BertConfig(**ours.config.to_diff_dict()) == ours.config
    expected = theirs.config.to_diff_dict()
    expected.pop("transformers_version")
    assert expected.items() <= {**ours.config.to_dict()}.items()
    assert pickle.loads(pickle.dumps(ours.config)) == ours.config


def test_a_configuration_of_the_callers(folder: Path, tmp_path: Path) -> None:
    class Pooled(w2vbert_fast.Wav2Vec2BertConfig):
        def __init__(self, pooling: str = "mean", **fields: Any) -> None:
            super().__init__(**fields)
            self.pooling = pooling

    class WithPooling(w2vbert_fast.Wav2Vec2BertModel):
        config_class = Pooled

    model = WithPooling.from_pretrained(folder, pooling="max")
    assert isinstance(model.config, Pooled)
    model.save_pretrained(tmp_path)
    assert WithPooling.from_pretrained(tmp_path).config.pooling == "max"  # type: ignore[attr-defined]


def test_a_tokenizer_is_printed_like_transformers(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text('{"|": 0, "a": 1, "<unk>": 2, "<pad>": 3}', encoding="utf-8")
    theirs, ours = (library.Wav2Vec2CTCTokenizer(vocabulary) for library in LIBRARIES)
    assert ours.is_fast == theirs.is_fast
    expected = repr(theirs).partition(", added_tokens_decoder")[0].replace("name_or_path='', ", "")
    assert repr(ours) == f"{expected})"
