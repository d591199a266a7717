"""The Fréchet distance that many pictures would have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sat.apps.evaluate.distances import (
    FEWEST,
    frechet,
    frechet_of_many,
    kernel_distance,
    precision_recall,
    statistics,
)
from sat.cli.evaluate import main
from sat.sampling.output import write_png
from tests.configs import ROOT


def names(count: int, kind: str = "") -> list[str]:
    return [f"{kind}{i}" for i in range(count)]


def test_what_few_pictures_add_is_taken_off_again() -> None:
    """Two Gaussians 2 apart, and one against itself, in 60 dimensions, by 150 draws of each."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randn(8, 2, 150, 60, generator=noise)
    for apart in (0.0, 2.0):
        shift = apart / 60**0.5
        raw = [frechet(*statistics(a), *statistics(b + shift)) for a, b in draws]
        many = [frechet_of_many(a, b + shift, names(150, "a"), names(150, "b")) for a, b in draws]
        assert np.mean(raw) > apart**2 + 10
        assert np.mean([one for one in many if one is not None]) == pytest.approx(apart**2, abs=2)


def test_pictures_of_one_thing_stay_together() -> None:
    """Pairs that differ by the same shift are that far apart in every part; torn apart they are not."""
    noise = torch.Generator().manual_seed(0)
    real = torch.randn(FEWEST, 60, generator=noise)
    order = torch.randperm(2 * FEWEST, generator=noise)  # two of each, in any order
    made = torch.cat([real, real])[order] + 0.5
    said = [names(FEWEST)[i % FEWEST] for i in order.tolist()]
    together = frechet_of_many(made.double(), real.double(), said, names(FEWEST))
    assert together == pytest.approx(60 * 0.25, abs=0.3)  # one of two alike counts as a draw less
    torn = frechet_of_many(made.double(), real.double(), said, names(FEWEST, "other"))
    assert torn is not None and together is not None and torn < together - 3


def test_fewer_things_than_the_line_needs_have_no_value() -> None:
    features = torch.randn(4 * FEWEST, 3)
    few = [name for name in names(FEWEST - 1) for _ in range(4)] + ["0"] * 4
    assert frechet_of_many(features, features, few, names(4 * FEWEST)) is None
    assert frechet_of_many(features, features, names(4 * FEWEST), few) is None


def test_the_command_matches_pictures_by_the_first_caption_of_the_table(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "made").mkdir()
    (tmp_path / "real").mkdir()
    rows = []
    for i in range(FEWEST):
        picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        write_png(tmp_path / "made" / f"{i:03d}.png", picture, {"prompt": f"thing {i}, 3d style"})
        picture.save(tmp_path / "real" / f"{FEWEST - i:03d}.png")
        rows.append(f'{{"file_name": "{FEWEST - i:03d}.png", "text": ["thing {i}, 3d style", "other"]}}\n')
    words = ["detail", "--images", str(tmp_path / "made"), "--real", str(tmp_path / "real")]
    words += ["--classifier", str(ROOT / "checkpoints" / "tiny_classifier")]
    (tmp_path / "real" / "metadata.jsonl").write_text("".join(rows[:90]))
    (tmp_path / "real" / "heldout.jsonl").write_text("".join(rows[90:]))
    assert main(words) == 0
    assert "extrapolated to many pictures: 0.000" in capsys.readouterr().out.replace("-0.000", "0.000")


@pytest.mark.parity
def test_distances_are_those_of_torch_fidelity() -> None:
    """Numbers of torch-fidelity 0.4.0 (FID, KID of one subset, precision, recall); it needs torchvision."""
    rng = np.random.default_rng(7)
    cases = (
        ((60, 80, 12, 0.3, 1.2), (4.99089640792943, 0.7834196090698242, 0.9166666865, 0.4749999940)),
        ((40, 40, 64, 0.0, 1.0), (50.38833406659637, -0.011559724807739258, 0.8249999881, 0.875)),
        ((200, 150, 5, 1.0, 0.7), (6.374480721204186, 9.427562713623047, 0.1599999964, 0.9066666961)),
    )
    for (count, real, width, apart, scale), theirs in cases:
        a, b = rng.normal(size=(count, width)), rng.normal(size=(real, width)) * scale + apart
        made, them = (torch.from_numpy(x.astype(np.float32)) for x in (a, b))
        few = min(count, real)
        shares = precision_recall(made, them)
        fid = frechet(*statistics(made), *statistics(them))
        ours = (fid, kernel_distance(made[:few], them[:few]), shares.precision, shares.recall)
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
