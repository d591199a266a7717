"""The training in one file: runs without DeepSpeed and YAML, and learns what the loop of train.py learns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    import train_minimal

    yield train_minimal
    sys.path.remove(str(ROOT / "examples"))


def test_the_example_runs_as_its_first_lines_say_and_draws(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv[1:] = ['--steps', '2', '--batch', '2', '--output', 'apple.png']; "
        f"runpy.run_path({str(ROOT / 'examples' / 'train_minimal.py')!r}, run_name='__main__'); "
        "assert not {'deepspeed', 'yaml', 'sat.train', 'sat.config'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    assert Image.open(tmp_path / "apple.png").size == (256, 256)


def test_the_example_learns(example) -> None:
    torch.manual_seed(0)
    engine = example.build()
    before = {name: p.clone() for name, p in engine.first_stage.named_parameters()}
    losses = example.train(engine, 15, 6, 0.01)
    (again,) = example.train(engine, 1, 6, 0.0)  # the draws of the first step
    assert again < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in engine.first_stage.named_parameters())
