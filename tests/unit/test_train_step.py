"""The noise and precision of a step, and asking to stop."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from sat.config.load import load
from sat.config.schema.base import RuleError
from sat.config.yaml_source import ConfigError
from sat.parallel.launch import Runtime
from sat.train.backend import BackendError, check_backend
from sat.train.deepspeed import check_dtype, settings
from sat.train.loop import step_generator, stop_signals
from sat.train.optim import autocast
from tests.training import CONFIG, changed

ROOT = Path(__file__).parents[2]


def draw(*place: int) -> tuple[float, float]:
    generator = step_generator(*place)
    return torch.rand((), generator=generator).item(), torch.rand(()).item()


def test_noise_depends_on_seed_step_and_place_alone() -> None:
    first = draw(0, 5, 2)
    torch.rand(7)
    assert draw(0, 5, 2) == first
    others = [draw(1, 5, 2), draw(0, 6, 2), draw(0, 5, 3), draw(0, 52, 0), draw(5, 0, 2)]
    assert len({first, *others}) == 6


def test_autocast_computes_in_bf16_with_float32_weights() -> None:
    layer = torch.nn.Linear(2, 2)
    with autocast(changed(CONFIG, autocast="bf16"), "cpu"):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    with autocast(CONFIG, "cpu"):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_sets_the_event_and_handlers_come_back(number, capfd) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)  # to this thread; one sent to the process may reach another, and later
        assert stop.wait(10)
        signal.raise_signal(number)  # torchrun's echo of it
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_later_second_signal_acts_as_before(monkeypatch, capfd) -> None:
    monkeypatch.setattr("sat.train.loop._ECHO", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt), stop_signals() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.wait(10)
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)
    signal.signal(signal.SIGINT, before)


def test_half_precision_weights_without_masters_are_refused() -> None:
    config = changed(CONFIG, zero=1, dtype="bf16")
    object.__setattr__(config, "zero", 0)  # as if the config's own rule were not there
    with pytest.raises(ValueError, match="train.dtype bf16 needs train.zero 1, 2 or 3"):
        settings(config, 1)


@pytest.mark.parametrize(("given", "words"), [
    ({"zero": 2}, "`backend` plain keeps whole weights in one process: set it to 0, got 2"),
    ({"dtype": "bf16"}, "`backend` plain trains in fp32"),
])  # fmt: skip
def test_torch_alone_refuses_what_needs_shares(given: dict[str, object], words: str) -> None:
    with pytest.raises(RuleError, match=words):
        changed(CONFIG, backend="plain", **given)


def test_torch_alone_refuses_ranks_by_their_number() -> None:
    check_backend(CONFIG, 2)
    with pytest.raises(BackendError, match="train.backend plain trains in one process, not in 2"):
        check_backend(changed(CONFIG, backend="plain"), 2)


def test_a_backend_that_is_not_installed_is_told_with_the_other(monkeypatch) -> None:
    monkeypatch.setattr("sat.train.backend.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install deepspeed, or set train.backend to plain"):
        check_backend(CONFIG, 1)
    check_backend(changed(CONFIG, backend="plain"), 1)


def test_torch_alone_refuses_teams_in_the_config() -> None:
    base = [str(ROOT / "configs" / f"{name}.yaml") for name in ("tiny", "tiny_train")]
    own = ["train.backend=plain", "train.zero=0", "train.dtype=fp32", "parallel.sequence=2"]
    with pytest.raises(ConfigError, match=r"parallel.sequence: is 2, and train.backend plain is one process"):
        load(base, own)


@pytest.mark.slow
def test_fp16_where_it_cannot_be_trained_is_told_by_its_key(monkeypatch) -> None:
    from deepspeed.accelerator import get_accelerator

    runtime = Runtime(0, 1, 0, torch.device("cpu"))
    fp16 = changed(CONFIG, zero=1, dtype="fp16")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False, raising=False)
    with pytest.raises(ValueError, match="train.dtype fp16 cannot be trained on cpu: set it to bf16 or fp32"):
        check_dtype(fp16, runtime)
    check_dtype(changed(CONFIG, zero=1, dtype="bf16"), runtime)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True, raising=False)
    check_dtype(fp16, runtime)


def test_the_batch_arithmetic_counts_ranks_and_accumulation() -> None:
    made = settings(changed(CONFIG, batch_size=3, accumulate=4, zero=2), 5)
    assert made["train_batch_size"] == 60
    assert made["zero_optimization"] == {"stage": 2}


@pytest.mark.slow
def test_deepspeed_still_has_the_switch_that_stops_its_build() -> None:
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
