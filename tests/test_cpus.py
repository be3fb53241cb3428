"""CPUs of a process by its control groups, from files as Docker and Kubernetes have them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from w2vbert_fast import cpus
from w2vbert_fast.ops.cpu import threads

POD = "/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope"
V1 = "5:cpu,cpuacct:{path}\n4:cpuset:{path}\n1:name=systemd:{path}\n"
RECORDED = [
    pytest.param({}, "", None, id="no control groups"),
    pytest.param({"cpu.max": "max 100000"}, "0::/", None, id="version 2, no limit"),
    pytest.param({"cpu.max": "150000 100000"}, "0::/", 1.5, id="version 2, docker --cpus 1.5"),
    pytest.param(
        {f"{POD}/cpu.max": "max 100000", f"{Path(POD).parent}/cpu.max": "400000 100000"},
        f"0::{POD}",
        4.0,
        id="version 2, the pod's limit",
    ),
    pytest.param({"cpu.max": "50000 100000"}, f"0::{POD}", 0.5, id="version 2, path of the host"),
    pytest.param(
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        V1.format(path="/"),
        None,
        id="version 1, no limit",
    ),
    pytest.param(
        {
            "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
        },
        V1.format(path="/docker/a"),
        3.0,
        id="version 1, on the host",
    ),
    pytest.param(
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "50000"},
        V1.format(path="/docker/a") + "0::/docker/a\n",
        4.0,
        id="version 1 and 2, in the container",
    ),
]


@pytest.mark.parametrize(("files", "groups", "expected"), RECORDED)
def test_quota_of_recorded_control_groups(
    files: dict[str, str], groups: str, expected: float | None, tmp_path: Path
) -> None:
    written = {"proc/self/cgroup": groups}
    written |= {f"sys/fs/cgroup/{name.lstrip('/')}": text for name, text in files.items()}
    for name, text in written.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    found = cpus.of_process(tmp_path)
    assert found.quota == expected
    assert found.machine == os.cpu_count()


@pytest.mark.parametrize(
    ("allowed", "limit", "usable"), [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (2, 4, 2)]
)
def test_usable_cpus(allowed: int, limit: float | None, usable: int) -> None:
    assert cpus.Cpus(16, allowed, limit).usable == usable


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux sets the affinity")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpus.of_process().allowed == 1
    finally:
        os.sched_setaffinity(0, before)


def test_more_threads_than_the_quota_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpus, "of_process", lambda: cpus.Cpus(64, 64, 1.5))
    monkeypatch.setattr(threads, "_warned", set())
    before = torch.get_num_threads()
    with caplog.at_level(logging.WARNING):
        for number in (2, 3, 4):
            torch.set_num_threads(number)
            monkeypatch.setattr(threads, "_threads", threads._Threads())
            threads.run(lambda index: index, range(number))
    torch.set_num_threads(before)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "PyTorch computes on 3 threads, but this process may use 2 CPUs (64 there, 64 allowed, "
        "quota 1.5): call torch.set_num_threads(2)"
    ]
