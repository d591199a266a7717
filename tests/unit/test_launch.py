"""Starting a process: who it is, where it computes, and clear refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from sat.parallel.collectives import agree, from_main, gather, mean
from sat.parallel.launch import (
    LayoutError,
    Mesh,
    Runtime,
    data_ranks,
    exact,
    keep_freed_memory,
    launch,
    lost_rank_message,
    pick_device,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def environment(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_plain_python_is_one_process_without_a_group() -> None:
    runtime = launch("cpu")
    assert (runtime.rank, runtime.world, runtime.device.type) == (0, 1, "cpu")
    assert runtime.is_main
    assert not runtime.grouped
    assert not runtime.pins


def test_a_group_of_one_is_made_when_asked_for() -> None:
    runtime = launch("cpu", group=True)
    try:
        assert runtime.grouped
        mesh = Mesh(runtime)
        assert (mesh.data_rank, mesh.data_ranks) == (0, 1)
        assert mesh.get_data_parallel_world_size() == mesh.get_model_parallel_world_size() == 1
        with pytest.raises(ValueError, match="parallel.tensor 2 .* has 1: start 2, 4, 6 or"):
            Mesh(runtime, tensor=2)
    finally:
        runtime.close()
    assert not dist.is_initialized()


@pytest.mark.parametrize(("world", "sizes"), [(6, {"tensor": 2, "guidance": 2}), (3, {"sequence": 2})])
def test_a_world_that_does_not_fit_is_refused_with_those_that_do(world, sizes) -> None:
    inner = math.prod(sizes.values())
    with pytest.raises(
        LayoutError, match=rf"this run has {world}: start {inner}, {2 * inner}, {3 * inner} or"
    ):
        data_ranks(world, **sizes)
    assert data_ranks(3 * inner, **sizes) == 3


@pytest.mark.parametrize(("given", "words"), [
    ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK missing"),
    ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be whole numbers"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "expected 0 <= RANK < WORLD_SIZE"),
])  # fmt: skip
def test_a_half_set_environment_is_refused(monkeypatch, given, words) -> None:
    environment(monkeypatch, **given)
    with pytest.raises(RuntimeError, match=words):
        launch("cpu")


def test_missing_ranks_end_the_wait_with_a_reason(monkeypatch) -> None:
    environment(
        monkeypatch, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 could not join .* within 1 s \(parallel.timeout\)"):
        launch("cpu", timeout=1)


def test_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="parallel.timeout is 0"):
        launch("cpu", timeout=0)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu': expected auto, cpu or cuda"):
        pick_device("tpu")  # type: ignore[arg-type]


def test_a_process_that_sees_one_gpu_of_its_own_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(RuntimeError, match="local rank 3 has no GPU: torch sees 1"):
        pick_device("auto", 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as srun --gpus-per-task=1 sets it
    assert pick_device("auto", 3).index == 0
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert exact("cpu").type == "cpu" and exact(pick_device("auto").type).index == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="torch sees no GPU: use parallel.device=cpu"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_glibc_gives_back_what_is_free_and_keeps_what_is_freed() -> None:
    code = (
        "import resource, torch\n"
        "from sat.parallel.launch import keep_freed_memory\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20\n"
        "kept = [torch.ones(1 << 18) for _ in range(100)]\n"
        "del kept[::2]\n"  # 50 holes of 1 MiB
        "before = held(); keep_freed_memory(); print(before - held())\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "work = lambda: [torch.ones(1 << 24).sum() for _ in range(4)]\n"
        "for _ in range(4): work()\nbefore = faults(); work(); print(faults() - before)\n"
    )
    if not keep_freed_memory():
        pytest.skip("another C library")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}  # all of it in the heap
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    given_back, faults = map(int, done.stdout.split())
    assert given_back > 40
    assert faults < 1000  # 64 MiB four times: 65,000 faults of 4 KiB otherwise


def test_one_process_agrees_with_itself() -> None:
    assert agree([True, False]) == [True, False]
    assert gather("a") == ["a"]
    assert from_main("b") == "b"
    assert mean(torch.tensor([2.0])).tolist() == [2.0]


def test_an_error_that_is_not_about_ranks_is_not_explained() -> None:
    assert lost_rank_message(RuntimeError("shapes differ")) is None
    assert lost_rank_message(RuntimeError("request timed out")) is None  # one process has no others


def test_peak_memory_is_in_gigabytes() -> None:
    assert 0.05 < Runtime(0, 1, 0, torch.device("cpu")).peak_memory() < 500
