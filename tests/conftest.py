"""Settings every test runs under: one thread, fixed seeds, no compilation, nothing sent to a network."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

# Before torch is imported anywhere: the variables are read at its import, and subprocesses inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no warning from every process that imports deepspeed
os.environ.setdefault("SAT_MEASURE", "0")  # the usual ways on any CPU, not what it is fastest in
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # halves deepspeed.initialize on the CPU; no test compiles
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import hypothesis
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from sat.config.schema import Component

from tests.background import Runs, begin
from tests.checkpoints import tokenizer

torch.set_num_threads(1)

# Shared machines stall: a deadline would fail a test for the neighbour's load. Examples are derived from the
# test itself, so that a failure on one machine is a failure on all.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of the global generators and of the floating-point unit.

    A run in the test process flushes denormals, which hypothesis would notice in a test that comes later.
    """
    torch.set_flush_denormal(False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _alone_again() -> Iterator[None]:
    """The process group that a training in the test process left behind ends with the module."""
    yield
    if torch.distributed.is_initialized() and "deepspeed" in sys.modules:
        sys.modules["deepspeed"].comm.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def _empty_parts_once() -> Iterator[None]:
    """Parts of our own that a check of a config makes without weights are made once for all tests.

    The rules between sections only look at them.
    """
    from sat.config import constraints

    made: dict[str, torch.nn.Module] = {}
    make = constraints.build_empty

    def once(component: Component, imports: Collection[str] = ()) -> torch.nn.Module:
        key = repr(component)
        if imports:  # which a test may write anew
            return make(component, imports)
        if key not in made:
            made[key] = make(component)
        return made[key]

    constraints.build_empty = once
    yield
    constraints.build_empty = make


@pytest.fixture(scope="session", autouse=True)
def _runs_beside_the_tests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Begin the programs whose runs the tests read; workers of pytest-xdist begin theirs when it comes."""
    wanted = list(dict.fromkeys(filter(None, map(_runs_of, request.session.items))))
    base = tmp_path_factory.mktemp("background")
    for one in wanted:
        one.base = base / one.program
        one.base.mkdir()
    if any(one.spiece for one in wanted):
        tokenizer(base / "spiece.model")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        begin(wanted)
    yield
    for one in wanted:
        one.end()


def _runs_of(item: pytest.Item) -> Runs | None:
    """The program that the module of a test needs."""
    found = getattr(getattr(item, "module", None), "RUNS", None)
    return found if isinstance(found, Runs) else None


def pytest_collection_finish() -> None:
    """Leave what was imported to itself: a run in the test process collects garbage, which reads it all."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that wait for runs last, mark all by their folder, skip gpu ones without an accelerator.

    A name with an address of memory in it is another in every process: no such test can be asked for again,
    and pytest-xdist refuses the whole suite.
    """
    if unstable := [item.nodeid for item in items if " object at 0x" in item.nodeid]:
        raise pytest.UsageError(f"give the parameters of this test ids of their own: {unstable[0]}")
    items.sort(key=lambda item: _runs_of(item) is not None)  # they run meanwhile
    no_gpu = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        for tier in ("parity", "distributed", "golden"):
            if tier in item.path.parts:
                item.add_marker(tier)
        if _runs_of(item):
            item.add_marker(pytest.mark.timeout(1200))  # the first of a module waits for its runs
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
