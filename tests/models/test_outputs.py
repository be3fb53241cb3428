"""Output objects in the hands of code that knows mappings: PyTorch, Accelerate, transformers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import concatenate, convert_outputs_to_fp32, send_to_device
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree as pytree
from transformers import modeling_outputs as reference

import w2vbert_fast
from w2vbert_fast.models import heads, outputs
from w2vbert_fast.models.heads import CausalLMOutput

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 8,
    "pad_token_id": 0,
}
CLASSES = [
    "CausalLMOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "Wav2Vec2BaseModelOutput",
    "XVectorOutput",
]
LOGITS = torch.arange(12.0).reshape(2, 3, 2)
STATES = (torch.ones(2, 3), torch.zeros(2, 3))
FIELDS = {"logits": LOGITS, "hidden_states": STATES}

Classes = tuple[Any, Any]


@pytest.fixture(params=CLASSES)
def classes(request: pytest.FixtureRequest) -> Classes:
    ours = getattr(heads, request.param, None) or getattr(outputs, request.param)
    return ours, getattr(reference, request.param)


def _model(kind: str = "CTC") -> Any:
    torch.manual_seed(0)
    model = getattr(w2vbert_fast, f"Wav2Vec2BertFor{kind}")
    return model(w2vbert_fast.Wav2Vec2BertConfig(**TINY)).eval()


def _same(ours: Any, theirs: Any) -> None:
    """The same content in the same structure, whatever the class of the outputs."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            _same(ours[name], theirs[name])
            if isinstance(theirs, reference.ModelOutput):
                _same(getattr(ours, name), getattr(theirs, name))
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _same(a, b)
    else:
        assert ours == theirs


def test_fields_and_their_order_are_those_of_the_reference(classes: Classes) -> None:
    ours, theirs = ([field.name for field in dataclasses.fields(c)] for c in classes)
    assert ours == theirs


def test_an_output_of_all_fields_is_the_same_mapping(classes: Classes) -> None:
    values = {f.name: torch.tensor(i) for i, f in enumerate(dataclasses.fields(classes[1]))}
    ours, theirs = (c(**values) for c in classes)
    _same(ours, theirs)
    assert ours.to_tuple() == theirs.to_tuple() == ours[:]
    assert tuple(ours) == tuple(theirs)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "keys": lambda o: list(o.keys()),
    "values": lambda o: list(o.values()),
    "items": lambda o: dict(o.items()),
    "iterated over": tuple,
    "length": len,
    "dict": dict,
    "unpacked": lambda o: {**o},
    "first": lambda o: o[0],
    "last": lambda o: o[-1],
    "slice": lambda o: o[1:],
    "name": lambda o: o["logits"],
    "get": lambda o: (o.get("loss", 5), o.get("logits")),
    "in": lambda o: ("loss" in o, "logits" in o),
    "unset": lambda o: o.loss,
    "tuple": lambda o: o.to_tuple(),
    "pickled": lambda o: pickle.loads(pickle.dumps(o)),
    "copied": copy.copy,
    "deep copy": copy.deepcopy,
    "replaced": lambda o: dataclasses.replace(o, loss=torch.tensor(1.0)),
    "rebuilt from a mapping": lambda o: type(o)({name: value for name, value in o.items()}),
    "rebuilt from pairs": lambda o: type(o)((name, value) for name, value in o.items()),
    "rebuilt from itself": lambda o: type(o)(o),
    "of nothing": lambda o: type(o)({}),
    "leaves": pytree.tree_leaves,
    "mapped": lambda o: pytree.tree_map(lambda tensor: tensor + 1, o),
    "FSDP": lambda o: _apply_to_tensors(torch.Tensor.double, o),
    "fp32": lambda o: convert_outputs_to_fp32(lambda: o)(),
    "concatenated": lambda o: concatenate([o, o]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_the_reference_gives(name: str) -> None:
    half = {**FIELDS, "logits": LOGITS.bfloat16()} if name == "fp32" else FIELDS
    ours = OPERATIONS[name](CausalLMOutput(**half))
    theirs = OPERATIONS[name](reference.CausalLMOutput(**half))
    _same(ours, theirs)
    if isinstance(theirs, reference.CausalLMOutput):
        assert type(ours) is CausalLMOutput


@pytest.mark.parametrize("as_item", [False, True])
def test_entries_are_added_and_replaced_by_name_and_by_attribute(as_item: bool) -> None:
    pair = CausalLMOutput(**FIELDS), reference.CausalLMOutput(**FIELDS)
    for output in pair:
        for name, value in (("loss", torch.tensor(2.0)), ("logits", -LOGITS)):
            if as_item:
                output[name] = value
            else:
                setattr(output, name, value)
    _same(*pair)


def test_a_field_set_to_none_is_no_entry() -> None:
    output = CausalLMOutput(**FIELDS)
    output.logits = None
    assert list(output) == ["hidden_states"]
    assert output[0] is STATES
    with pytest.raises(KeyError, match=r"'logits' is not set in CausalLMOutput.*hidden_states"):
        output["logits"]


def test_the_first_field_may_be_a_sequence_of_tensors() -> None:
    output = outputs.Wav2Vec2BaseModelOutput(STATES)  # type: ignore[arg-type]
    _same(output, reference.Wav2Vec2BaseModelOutput(STATES))
    with pytest.raises(TypeError, match=r"CausalLMOutput is built from .*got int among the pairs"):
        CausalLMOutput([("logits", LOGITS), 3])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["pop", "popitem", "clear", "__delitem__"])
def test_entries_stay(method: str) -> None:
    output = CausalLMOutput(**FIELDS)
    with pytest.raises(TypeError, match="entries of CausalLMOutput cannot be taken away"):
        getattr(output, method)(*["logits"] * (method in ("pop", "__delitem__")))
    assert list(output) == list(FIELDS)


def test_data_parallel_gathers_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnOneDevice:
        """`torch.nn.parallel`'s `Gather`, which wants GPUs, without them."""

        @staticmethod
        def apply(device: object, dim: int, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat(tensors, dim)

    monkeypatch.setattr(scatter_gather, "Gather", OnOneDevice)
    output = CausalLMOutput(**FIELDS)
    gathered = scatter_gather.gather([output, output], 0)
    assert type(gathered) is CausalLMOutput
    assert torch.equal(gathered.logits, LOGITS.repeat(2, 1, 1))
    assert torch.equal(gathered["hidden_states"][0], STATES[0].repeat(2, 1))


def test_accelerate_moves_outputs() -> None:
    moved = send_to_device(CausalLMOutput(**FIELDS), "meta")
    assert moved.logits.is_meta
    assert moved.hidden_states[1].is_meta


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    # Of a process, and made by whoever comes first.
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def test_mixed_precision_gives_fp32_logits(bf16: Accelerator) -> None:
    output = bf16.prepare(_model())(input_features=torch.randn(2, 9, 160))
    assert output.logits.dtype == output[0].dtype == torch.float32
    assert output.logits.detach().numpy().shape == (2, 9, 8)


def test_audio_classification_pipeline_in_batches() -> None:
    model = _model("SequenceClassification")
    extractor = w2vbert_fast.SeamlessM4TFeatureExtractor()
    pipe = transformers.pipeline("audio-classification", model=model, feature_extractor=extractor)
    clips = [np.random.default_rng(i).standard_normal(4000).astype("float32") for i in range(3)]
    answers = pipe(clips, batch_size=2)
    with torch.no_grad():
        inputs = [extractor(clip, sampling_rate=16000, return_tensors="pt") for clip in clips]
        scores = torch.cat([model(**entry).logits for entry in inputs]).softmax(-1)
    for answer, row in zip(answers, scores, strict=True):
        for entry in answer:
            assert entry["score"] == pytest.approx(
                row[model.config.label2id[entry["label"]]].item(), rel=1e-4
            )


def test_outputs_are_instances_of_the_reference_class() -> None:
    output = _model()(torch.randn(1, 9, 160))
    assert isinstance(output, transformers.utils.ModelOutput)
    assert isinstance(output, outputs.ModelOutput)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_return_outputs(fullgraph: bool) -> None:
    model, features = _model(), torch.randn(2, 9, 160)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    with torch.no_grad():
        ours, plain = compiled(features, output_hidden_states=True), model(features)
    assert list(ours) == ["logits", "hidden_states"]
    assert ours["logits"] is ours.logits is ours[0]
    torch.testing.assert_close(ours.logits, plain.logits)
