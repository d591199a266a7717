"""A budget picks what is needed, says it, and refuses what nothing brings into it."""

from __future__ import annotations

import pytest
import torch

from sat.config.build import build_engine
from sat.config.schema import Experiment
from sat.estimate import budget
from sat.estimate.budget import SPARE, BudgetError, SamplingEstimator, _option, apply_budget
from sat.parallel.launch import fake_group
from sat.util.host import parse_size
from tests.configs import DEBUG, debug, refused

HOST, DEVICE = torch.device("cpu"), torch.device("meta")


def asked(budget: str | None, *overrides: str) -> Experiment:
    return debug(
        "sampling.at_once=4", "sampling.batch_size=4", f"memory.budget={budget or 'null'}", *overrides
    )


@pytest.fixture(scope="module")
def estimator() -> SamplingEstimator:
    return SamplingEstimator(host=False)


def test_weights_are_those_of_the_engine_that_draws(estimator: SamplingEstimator) -> None:
    peaks = estimator.peaks(asked(None))
    engine = build_engine(debug("checkpoint.random=0"), device="cpu", dtype=torch.float32)
    parts = (engine.network, engine.conditioner.text, engine.first_stage)
    weights = sum(t.numel() * t.element_size() for m in parts for t in (*m.parameters(), *m.buffers()))
    for stage in (peaks.text, peaks.denoising, peaks.decoding):
        assert weights < stage < 40 * weights


def test_of_ranks_that_share_the_weights_a_ranks_share_counts() -> None:
    even, estimator = "conditioning.text.params.heads=4", SamplingEstimator(host=False)
    whole, shared = (estimator.peaks(asked(None, even, f"parallel.tensor={ranks}")) for ranks in (1, 2))
    config, sizes = debug("checkpoint.random=0", even), []
    for ranks in (1, 2):
        with fake_group(tensor=ranks) as mesh:
            engine = build_engine(config, device="cpu", dtype=torch.float32, mesh=mesh)
        sizes.append(sum(p.numel() * p.element_size() for p in engine.parameters()))
    for stage in ("text", "denoising", "decoding"):
        assert getattr(whole, stage) - getattr(shared, stage) == sizes[0] - sizes[1] > 0.1 * sizes[0]


def test_without_a_budget_nothing_is_estimated() -> None:
    assert apply_budget(debug(), HOST) is None


def test_what_fits_needs_no_change(estimator: SamplingEstimator) -> None:
    picked = apply_budget(asked("1GB"), DEVICE, estimator)
    assert picked is not None and not picked.options and picked.experiment == asked("1GB")
    assert "nothing needs to change" in str(picked)


def test_page_locked_host_memory_is_counted_and_said(estimator: SamplingEstimator, monkeypatch) -> None:
    plain, blocks = (estimator.locked(asked(None, *more)) for more in ([], ["memory.network=blocks"]))
    assert plain == 0 and blocks == 1 << 20  # the smallest block
    peak = estimator.peaks(asked(None)).total
    monkeypatch.setattr(estimator, "options", lambda e: [_option(network="blocks")])
    least = estimator.peaks(asked(None, "memory.network=blocks")).total
    picked = apply_budget(asked(f"{(peak + least) / 2e6 / (1 - SPARE):.4f}MB"), DEVICE, estimator)
    assert picked is not None and "; 1.0 MB of page-locked host memory" in str(picked)
    monkeypatch.setattr(budget, "available_memory", lambda: 1000)
    assert "but only 0.0 MB are free here" in str(picked)


def test_the_cheapest_options_that_are_enough_are_picked(estimator: SamplingEstimator) -> None:
    plain = estimator.peaks(asked(None)).total
    budgets = [int(plain * share / (1 - SPARE)) for share in (0.9, 0.6, 0.4)]
    counts = []
    for limit in budgets:
        try:
            picked = apply_budget(asked(f"{limit / 1e6:.4f}MB"), DEVICE, estimator)
        except BudgetError:
            counts.append(99)
            continue
        assert picked is not None and picked.options
        assert estimator.peaks(picked.experiment).total == picked.peaks.total <= limit * (1 - SPARE)
        for option in picked.options:  # each is needed
            fewer = asked(None)
            for other in picked.options:
                fewer = fewer if other is option else other.apply(fewer)
            assert estimator.peaks(fewer).total > limit * (1 - SPARE)
            assert option.setting in str(picked)
        counts.append(len(picked.options))
    assert counts == sorted(counts) and counts[0] <= 2


@pytest.mark.parametrize("device", [HOST, DEVICE])
def test_what_nothing_brings_into_the_budget_is_refused(device: torch.device) -> None:
    """On the host nothing can wait on the host."""
    with pytest.raises(BudgetError, match=r"memory.budget is 0.02MB.*sampling takes .* while") as caught:
        apply_budget(asked("0.02MB"), device)
    said = str(caught.value)
    assert ("memory.network=cpu" in said) == (device is DEVICE) and "quantize" in said
    assert said.count("memory.decode_tile=") <= 1
    assert ("draw smaller pictures" in said) == ("while encoding text" not in said)


def test_a_size_that_is_none_is_named() -> None:
    assert "expected a size such as 24GB" in "\n".join(refused([DEBUG], ["memory.budget=8 pounds"]))
    assert parse_size("6GB") == 6_000_000_000


def test_a_stage_is_run_again_only_for_settings_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the 3 B models takes seconds: nothing is quantised, and each stage is run once a setting."""
    monkeypatch.setattr("sat.kernels.quantize._rows", lambda *_: pytest.fail("quantised without data"))
    estimator = SamplingEstimator(host=True)
    for network, text in ((None, None), ("int8", None), (None, "int8"), ("int8", "int8")):
        chosen = (
            f"memory.quantize.network={network or 'null'}",
            f"memory.quantize.text_encoder={text or 'null'}",
        )
        estimator.peaks(asked(None, *chosen))
    stages = [key.split("'")[1] for key in estimator._activations]
    assert sorted(stages) == ["decoding", "denoising", "denoising", "text", "text"]
