"""Diffusion-DPO: closed forms at the start, a toy of two Gaussians, pairs from votes, resuming."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sat.adapters.lora import strengths
from sat.apps.preference.study import Pair, preferred, write_pairs
from sat.apps.preference.votes import Vote
from sat.cli.train import main
from sat.conditioning.conditioner import Condition
from sat.config.build import build_engine
from sat.config.load import load
from sat.config.schema import LoraConfig
from sat.data.batch import Batch
from sat.data.records import DataError, ExtraRule
from sat.data.sources import read_source
from sat.diffusion.draws import GeneratorDraws
from sat.sampling.prompts import Prompt
from sat.train.lora import NAME, add_lora
from sat.train.objectives.preference import Preference
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT, refused
from tests.tolerances import F32
from tests.training import rows

FLOW = (
    "diffusion.schedule={target: sat.diffusion.schedule.FlowMatching}",
    "diffusion.prediction={target: sat.diffusion.prediction.Flow}",
)


def objective(lora: bool = True, beta: float = 3.0, *settings: str) -> Preference:
    """As ``train.py`` makes it, over the toy Plus."""
    torch.manual_seed(0)
    settings = ("conditioning.tokenizer=null", "model.params.zero_init=false", *settings)
    engine = build_engine(load([DEBUG], list(settings)), device="cpu", dtype=torch.float32)
    made = Preference(beta=beta, engine=engine)
    if lora:
        add_lora(made, LoraConfig(rank=3, targets=["attention", "mlp"]), 0)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if ".up." in name and parameter.requires_grad:
                    parameter.normal_(0, 0.5)
    made.begin(NAME if lora else None)
    return made.train()


def pairs(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([[48, 64]]).expand(count, 2)
    moments = [torch.randn(count, 8, 6, 8, generator=generator) for _ in range(2)]
    return Batch(
        ["a red apple"] * count, size, torch.zeros_like(size), size,
        text=torch.randn(count, 8, 24, generator=generator),
        latent_moments=moments[0], extras={"loser": moments[1]},
    )  # fmt: skip


def gradient(made: Preference, loss: Tensor) -> Tensor:
    parameters = [p for p in made.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def errors(made: Preference, batch: Batch, drawn: dict[str, Tensor]) -> Tensor:
    """Mean err(winner) - err(loser), by the objective of plain training on each with the same ``drawn``."""
    apart = []
    for moments in (batch.latent_moments, batch.extras["loser"]):
        one = replace(batch, latent_moments=moments, extras={}, draws=drawn)
        apart.append(super(Preference, made).forward(one)["loss"])
    return apart[0] - apart[1]


@pytest.mark.parametrize("settings", [(), FLOW])
@pytest.mark.parametrize("beta", [3.0, 2500.0])
def test_at_the_start_its_gradient_is_half_beta_that_of_the_errors_difference(
    beta: float, settings: tuple[str, ...]
) -> None:
    """And its loss log 2. Whole weights: policy and reference are equal, whatever they are."""
    made = objective(False, beta, *settings)
    found = made(pairs(), torch.Generator().manual_seed(7))
    assert float(found["loss"].detach()) == pytest.approx(math.log(2), abs=beta * F32)
    assert abs(float(found["margin"])) < F32  # kernels with and without gradients may differ
    drawn = made.draws(pairs(), GeneratorDraws(3, torch.Generator().manual_seed(7)))
    ours, wanted = gradient(made, found["loss"]), beta / 2 * gradient(made, errors(made, pairs(), drawn))
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-3  # kernels differ by rows in a pass


def test_the_reference_is_the_network_without_its_factors() -> None:
    """Loss and margin are those written out by plain losses with the factors on and off."""
    made, batch = objective(beta=40.0), pairs(1)
    found = made(batch, torch.Generator().manual_seed(7))
    drawn = made.draws(batch, GeneratorDraws(1, torch.Generator().manual_seed(7)))
    with torch.no_grad():
        own = float(errors(made, batch, drawn))
    with torch.no_grad(), strengths(made.network, {NAME: 0.0}):
        before = float(errors(made, batch, drawn))
    assert abs(before - own) > 1e-4
    assert float(found["margin"]) == pytest.approx(before - own, rel=1e-3)
    assert float(found["loss"].detach()) == pytest.approx(
        math.log1p(math.exp(-40 * (before - own))), rel=1e-3
    )
    assert float(found["implicit_accuracy"]) == float(before > own)
    assert made.beside() == () and len(objective(False).beside()) == 1


def test_pictures_and_their_cached_moments_are_compared_alike() -> None:
    made, batch = objective(), pairs()
    images = [torch.rand(3, 3, 48, 64) * 2 - 1 for _ in range(2)]
    moments = [made.engine.first_stage.encode(one).moments.float() for one in images]
    fresh = replace(batch, latent_moments=None, image=images[0], extras={"loser": images[1]})
    kept = replace(batch, latent_moments=moments[0], extras={"loser": moments[1]})
    ours, theirs = (made(one, torch.Generator().manual_seed(3)) for one in (fresh, kept))
    assert float(ours["margin"]) != 0
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name


class Mean(nn.Module):
    """A network of x0 that gives one number everywhere: the mean of what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))

    def prepare(self, cond: Condition, size: tuple[int, int]) -> None:
        return None

    def forward(self, x: Tensor, timestep: Tensor, prepared: None) -> Tensor:
        return self.mean.expand_as(x)


def test_of_two_gaussians_the_preferred_mean_wins() -> None:
    """Pictures around 1 are preferred to those around -1; the margin is 2 m (winner - loser) for a mean m."""
    made = objective(False, 5.0, "diffusion.prediction={target: sat.diffusion.prediction.X0}")
    made.network = toy = Mean()
    made._reference = (copy.deepcopy(toy),)
    optimizer = torch.optim.Adam(toy.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    scale = made.engine.first_stage.scale_factor
    for _ in range(60):
        around = [torch.randn(16, 8, 6, 8, generator=generator) * 0.3 + mean for mean in (1, -1)]
        for one in around:
            one[:, 4:] = -30.0  # log variance of the posterior
        batch = replace(pairs(16), latent_moments=around[0], extras={"loser": around[1]})
        optimizer.zero_grad()
        found = made(batch, generator)
        found["loss"].backward()
        winner, loser = (scale * one[:, :4].mean() for one in around)
        with torch.no_grad():
            assert float(found["margin"]) == pytest.approx(
                float(2 * toy.mean * (winner - loser)), rel=1e-3, abs=1e-6
            )
        optimizer.step()
    assert float(toy.mean.detach()) > 0.5 * scale and float(found["implicit_accuracy"]) == 1
    assert float(found["winner"]) < float(found["loser"])


def picture(path: Path, colour: str, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def study(folder: Path, count: int = 6) -> list[Pair]:
    """Pairs of a red and a blue picture."""
    return [
        Pair(
            f"{i}_0", Prompt(i, f"text {i}"), *(picture(folder / f"{c}/{i}.png", c) for c in ("red", "blue"))
        )
        for i in range(count)
    ]


def votes(*rows: tuple[str, str, str]) -> list[Vote]:
    """Votes of (rater, pair, choice)."""
    return [Vote(rater, f"{pair}_0", "quality", choice, "a", 1.0) for rater, pair, choice in rows]


def test_pairs_are_what_most_votes_are_for_and_the_rest_is_told(tmp_path: Path) -> None:
    """Of six: two for a, one for b; a tie, an even count and one without votes are left out."""
    given = votes(
        ("x", "0", "a"), ("y", "0", "a"), ("z", "0", "b"), ("x", "1", "b"), ("x", "2", "tie"),
        ("x", "3", "a"), ("y", "3", "b"), ("x", "4", "a"), ("y", "4", "tie"),
    )  # fmt: skip
    found = preferred(study(tmp_path), given)
    assert [(pair.name, side) for pair, side in found.rows] == [("0_0", "a"), ("1_0", "b"), ("4_0", "a")]
    said = write_pairs(tmp_path / "pairs", found, 0.0)
    assert said[1:] == ["left out: 2 pairs with ties or even votes", "left out: 1 pairs without votes"]
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert rows[1] == {"file_name": "../blue/1.png", "loser": "../red/1.png", "text": "text 1"}
    records = read_source(tmp_path / "pairs", None, {"loser": ExtraRule("loser")}).records
    assert [record.extras["loser"].path.name for record in records] == ["0.png", "1.png", "4.png"]


def test_pairs_of_other_sizes_are_left_out_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    made = study(tmp_path)
    picture(made[0].b, "blue", (64, 64))
    everyone = preferred(made, votes(*(("x", str(i), "a") for i in range(6))))
    assert (
        "1 pairs of other sizes, such as 0_0 (48 x 64 and 64 x 64)"
        in write_pairs(tmp_path / "p", everyone, 0.0)[-1]
    )
    with pytest.raises(DataError, match="no pair to train on: 6 are even"):
        write_pairs(tmp_path / "q", preferred(made, votes(*(("x", str(i), "tie") for i in range(6)))), 0.0)
    with pytest.raises(DataError, match="holds metadata.jsonl already: name another folder"):
        write_pairs(tmp_path / "p", everyone, 0.0)
    said = write_pairs(tmp_path / "r", everyone, 0.6)[0]
    held = (tmp_path / "r" / "heldout.jsonl").read_text().splitlines()
    kept = (tmp_path / "r" / "metadata.jsonl").read_text().splitlines()
    assert len(held) + len(kept) == 5 and held and kept and f"{len(held)} held out" in said


def test_what_the_training_cannot_use_is_told_with_the_config(tmp_path: Path) -> None:
    base = ["configs/tiny.yaml", "configs/preference.yaml"]
    there = [
        f"data.sources=[{{path: {ROOT}/data/emoji_sample}}]",
        "data.validation=[]",
        "train.validate_every=null",
    ]
    assert any("needs a loser of every picture" in line for line in refused(base, there))
    plain = ["configs/tiny.yaml", "configs/lora.yaml"]
    loser = [f"data.sources=[{{path: {ROOT}/data/emoji_sample, loser: {{column: loser}}}}]"]
    assert any("makes no use of a loser" in line for line in refused(plain, loser))


def test_a_damaged_picture_of_a_pair_is_named(tmp_path: Path) -> None:
    made = study(tmp_path)
    made[1].b.write_bytes(made[1].b.read_bytes()[:20])
    everyone = preferred(made, votes(*(("x", str(i), "a") for i in range(6))))
    with pytest.raises(DataError, match=made[1].b.name):
        write_pairs(tmp_path / "p", everyone, 0.0)
    assert not (tmp_path / "p").exists()


def test_pairs_of_a_table_train_a_file_that_goes_on_exactly_where_it_was_cut(tmp_path: Path) -> None:
    """With latents of both pictures in a cache; held-out pairs are scored."""
    made = study(tmp_path, 8)
    write_pairs(tmp_path / "pairs", preferred(made, votes(*(("x", str(i), "a") for i in range(8)))), 0.4)
    words = tokenizer(tmp_path / "spiece.model")
    place = f"{{path: {tmp_path}/pairs/metadata.jsonl, loser: {{column: loser}}}}"
    settings = [
        "parallel.device=cpu", f"data.sources=[{place}]",
        f"data.validation=[{place.replace('metadata', 'heldout')}]", f"data.cache={tmp_path / 'cache'}",
        "data.height=48", "data.width=64", "data.workers=0", "train.backend=plain", "train.zero=0",
        "train.dtype=fp32", "train.steps=4", "train.warmup=0", "train.batch_size=2", "train.accumulate=1",
        "train.lr=0.01", "adapters.lora.rank=2", "train.validate_every=4", "train.log_every=1",
        "train.activation_checkpointing=false", "train.wandb=disabled",
        f"conditioning.tokenizer={words}", "model.params.zero_init=false",
    ]  # fmt: skip
    base = ["--base", str(DEBUG), f"{ROOT}/configs/preference.yaml"]
    stop: list[tuple[str, str]] = [
        ("whole", "train.seed=0"),
        ("cut", "train.max_minutes=1e-9"),
        ("cut", "--resume"),
    ]
    ends = [main([*base, "--output-dir", str(tmp_path / name), *settings, more]) for name, more in stop]
    assert ends == [0, 75, 0]
    whole, cut = (
        next((tmp_path / name).rglob("step_00000004/**/adapter*.safetensors")) for name in ("whole", "cut")
    )
    assert whole.read_bytes() == cut.read_bytes()
    steps = [row for row in rows(tmp_path / "whole") if "lr" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and steps[-1]["loss"] < steps[0]["loss"]
    scored = [row for row in rows(tmp_path / "whole") if "validation/implicit_accuracy" in row]
    assert scored and scored[-1]["validation/margin"] > 0
    assert list((tmp_path / "cache").glob("extra-*"))
