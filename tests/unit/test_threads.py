"""Threads of a CPU run: what is set, what is left alone, and that results do not depend on their number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sat.util import host
from sat.util.host import THREAD_SETTINGS, prepare_threads

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(monkeypatch) -> None:
    """No settings, and restored afterwards whatever the test does."""
    for name in (*THREAD_SETTINGS, "GOMP_SPINCOUNT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_threads_sleep_while_they_wait_and_products_are_reproducible(environment, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    prepare_threads()
    assert {name: os.environ.get(name) for name in THREAD_SETTINGS} == THREAD_SETTINGS


def test_a_setting_of_the_user_stays(environment, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    prepare_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("quiet", [True, False])
def test_threads_spin_a_while_where_nothing_else_runs(environment, monkeypatch, quiet: bool) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(host, "idle", lambda: quiet)
    prepare_threads()
    assert os.environ.get("GOMP_SPINCOUNT") == (host.SPIN if quiet else None)


@pytest.mark.parametrize(
    "given", [("WORLD_SIZE", "2"), ("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0")]
)
def test_threads_of_ranks_and_of_the_users_own_settings_do_not_spin(environment, monkeypatch, given) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(host, "idle", lambda: True)
    monkeypatch.setenv(*given)
    prepare_threads()
    assert os.environ.get("GOMP_SPINCOUNT") in (None, "0")


@pytest.mark.parametrize(("told", "found"), [("1/99", True), ("2/99", False)])
def test_a_machine_is_idle_where_nothing_else_runs(monkeypatch, told: str, found: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"0.10 0.20 0.30 {told} 4321")
    assert host.idle() is found


def test_nothing_is_claimed_once_torch_is_there(environment) -> None:
    assert "torch" in sys.modules
    prepare_threads()
    assert not set(THREAD_SETTINGS) & set(os.environ)


def test_float32_results_do_not_depend_on_the_number_of_threads() -> None:
    """Shapes at which MKL's products and oneDNN's 1x1 convolutions did depend on it."""
    code = """
from sat.util.host import prepare_threads
prepare_threads()
import torch
from sat.first_stage.model import ResBlock, Upsample
from sat.kernels.convolutions import PackedConv, PackedUpsample, RowsNorm, convolvable
from sat.kernels.packed import PackedLinear, packable
torch.manual_seed(0)
time, image = torch.randn(6, 256), torch.randn(1, 128, 16, 16)
linear, block = torch.nn.Linear(256, 64), ResBlock(128, 64, 8)
up, wide = Upsample(128), torch.randn(97, 256)
packed = PackedLinear(linear) if packable(torch.float32) else linear
tall = torch.randn(1, 64, 48, 80).to(memory_format=torch.channels_last)
layers = [RowsNorm(torch.nn.GroupNorm(8, 64))]
if convolvable():
    convs = torch.nn.Conv2d(64, 24, 3, padding=1), torch.nn.Conv2d(64, 64, 3, stride=2)
    layers += [PackedUpsample(Upsample(64)), *map(PackedConv, convs)]
found = []
with torch.inference_mode():
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        rows = image.to(memory_format=torch.channels_last)
        found.append((linear(time), block(image), block(rows), up(image), packed(time), packed(wide),
                      *(layer(tall) for layer in layers)))
print(all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)))
"""
    env = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
