"""`python -m bench.cores`: counts against definitions, and the time that is made of them."""

from __future__ import annotations

import pytest
import torch

import w2vbert_fast
from bench import cores
from bench.cores import Rates, Region, Work
from bench.flops import encoder_flops
from w2vbert_fast.ops.cpu import gemm, threads
from w2vbert_fast.ops.cpu.capability import onednn_linear

RATES = Rates(flops=10.0, bytes=5.0, call=0.5)


def test_a_share_goes_to_the_core_that_is_free_first() -> None:
    region = Region("a", [Work(flops=10.0 * seconds) for seconds in (3.0, 1.0, 1.0, 2.0)])
    assert region.seconds(2, RATES, barrier=0.25) == 4.25  # 3, and 1 + 1 + 2
    assert region.seconds(1, RATES, 0.25) == 7.25
    assert region.seconds(8, RATES, 0.25) == 3.25


def test_bytes_take_time_too_and_calls_wait_for_the_lock() -> None:
    shares = [Work(flops=10.0, bytes=5.0, calls=3) for _ in range(4)]
    assert Region("a", shares).seconds(4, Rates(10.0, 5.0), 0.0) == 2.0
    assert Region("a", shares).seconds(4, RATES, 0.0) == 6.0  # 12 calls
    assert Region("a", shares[:1]).seconds(4, RATES, 1.0) == 2.0  # nobody waits for anybody
    assert Region("a", shares[:1], even=True).seconds(4, RATES, 1.0) == 1.5


def test_the_share_of_the_rate_of_all_cores() -> None:
    regions = [Region("a", [Work(flops=10.0)] * 2), Region("b", [Work(flops=20.0)])]
    # 1 and 2 s on two cores, which could do 60 FLOPs in that time.
    assert cores.share_of_gemm(regions, 40.0, 2, RATES, 0.0) == pytest.approx(40 / 60)
    # What keeps cores waiting comes first.
    (_, *first), *_ = cores.by_operation(regions, 2, RATES, 0.0).rows
    assert first == ["1", "1", "0", "2000.00", "1000.00"]


@pytest.fixture(scope="module")
def layer() -> tuple[w2vbert_fast.Wav2Vec2BertModel, torch.Tensor]:
    if not onednn_linear(torch.float32):
        pytest.skip("oneDNN multiplies no float32 here")
    sizes = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    config = w2vbert_fast.Wav2Vec2BertConfig(num_hidden_layers=1, **sizes)
    model = w2vbert_fast.Wav2Vec2BertModel(config).eval()
    model.use_fast_kernels = True
    return model, torch.randn(1, 450, 160)


def test_flops_are_those_of_the_layer(
    layer: tuple[w2vbert_fast.Wav2Vec2BertModel, torch.Tensor],
) -> None:
    """However it is cut; positions are counted here and not there."""
    model, x = layer
    expected = encoder_flops(model.config, [x.shape[1]])
    for number in (1, 4):
        regions = cores.count(model, x, number)
        flops = sum(share.flops for region in regions for share in region.shares)
        assert 0.99 * expected < flops < 1.1 * expected


def test_operations_are_cut_as_on_so_many_cores(
    layer: tuple[w2vbert_fast.Wav2Vec2BertModel, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = layer
    monkeypatch.setattr(gemm, "_SHARE", 1 << 22)  # each product is worth several
    monkeypatch.setattr(threads, "_LEAST_WORK", 1 << 21)
    for number in (1, 3):
        found = {
            region.operation: len(region.shares)
            for region in cores.count(model, x, number)
            if len(region.shares) > 1
        }
        assert found == ({} if number == 1 else {"linear": 12, "linear_glu": 12})
    assert torch.get_num_threads() == threads.count()  # nothing stays in place


def test_the_command_prints_a_row_for_each_number_of_cores(
    layer: tuple[w2vbert_fast.Wav2Vec2BertModel, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, _ = layer
    monkeypatch.setattr(cores.w2vbert_fast, "Wav2Vec2BertModel", lambda config: model)
    monkeypatch.setattr(cores.w2vbert_fast, "Wav2Vec2BertConfig", lambda **_: model.config)
    monkeypatch.setattr(cores, "limit_threads", lambda number: None)
    monkeypatch.setattr(cores, "measured_rates", lambda dtype: Rates(1e11, 5e10, 2e-6))
    cores.main(["--seconds", "2", "--cores", "2", "--cores", "16", "--operations"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["2", "16"]
    for line in lines[3:5]:
        _, _, _, short, long, locked = line.split()
        assert 1.0 > float(short) >= float(long) >= float(locked) > 0.0
    assert any(line.startswith("16 cores, barrier 10 us") for line in lines)
