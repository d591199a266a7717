"""Trainings by torch alone against the same written out: rates, groups, averages, Muon; what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sat.config.load import load
from sat.config.schema import Component, GroupConfig, TrainConfig
from sat.config.yaml_source import ConfigError
from sat.diffusion.draws import keyed
from sat.parallel.launch import Runtime
from sat.train.measure import check_groups, optimizer_state
from sat.train.optim import Muon, RateError, groups
from tests.tolerances import F32
from tests.training import CONFIG, Numbers, Toy, averages, changed, rows, trainer, weights

STEPS = 200
HERE = Runtime(0, 1, 0, torch.device("cpu"))
MUON = Component("sat.train.optim.Muon", {"momentum": 0.9, "betas": [0.9, 0.99], "eps": 1e-4})
ROOT = Path(__file__).parents[2]
PLAIN = changed(
    CONFIG, backend="plain", steps=STEPS, accumulate=2, lr=3e-3, save_every=100, warmup=5, log_every=STEPS,
    schedule="constant", ema=None, optimizer=Component("torch.optim.AdamW", {"eps": 1e-4, "foreach": False}),
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": "cosine", "min_lr_ratio": 0.1},
    "linear": {"schedule": "linear", "min_lr_ratio": 0.1},
    "inverse_sqrt": {"schedule": "inverse_sqrt"},
    "wsd": {"schedule": "wsd", "decay_steps": 60},
    "torch": {"warmup": 0, "schedule": Component("torch.optim.lr_scheduler.StepLR", {"step_size": 50})},
    "groups": {"groups": [GroupConfig(["model.0.*"], lr=1e-3), GroupConfig(["*.weight"], weight_decay=0.4)]},
    "averages": {"ema": [0.98, 0.5, 0.0]},
    "muon": {"optimizer": MUON},
}


def rate(step: int, config: TrainConfig) -> float:
    """The rates of the settings, each by its formula."""
    if isinstance(config.schedule, Component):
        return config.lr * 0.1 ** (step // 50)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share, floor = (step - config.warmup) / (STEPS - config.warmup), config.min_lr_ratio
    fall = {
        "constant": 1.0,
        "cosine": floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2,
        "linear": 1 - (1 - floor) * share,
        "inverse_sqrt": (5 / step) ** 0.5 if step else 1.0,
        "wsd": min(1.0, (STEPS - step) / 60),
    }
    return config.lr * fall[config.schedule]


def orthogonal(x: Tensor) -> Tensor:
    """Five steps of Newton and Schulz in bfloat16, as Muon's author wrote them down."""
    x = x.bfloat16().T if x.shape[0] > x.shape[1] else x.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        even = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)  # rounded once, as there
        x = torch.addmm(x, even, x, beta=3.4445)
    return x


def written_out(config: TrainConfig) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The weights and averages of a training of the toy, from first to last."""
    toy = Toy()
    params = {name: p for name, p in toy.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    kept = [{name: p.detach().clone() for name, p in params.items()} for _ in config.decays]
    batches = iter(Numbers(3))
    muon = config.optimizer is MUON
    for step in range(STEPS):
        for micro in range(2):
            x = next(batches).latent_moments.flatten(1)
            keys = [keyed(config.seed, step, 3 * micro + i, "noise") for i in range(3)]
            noise = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(k)) for k in keys])
            error = toy.norm(toy.net(toy.frozen(x + noise))) - x
            (error.square().mean() / 3 / 2).backward()
        norm = torch.stack([p.grad.norm() for p in params.values()]).norm()
        for name, p in params.items():
            g = p.grad * min(1.0, config.clip / float(norm + 1e-6))
            p.grad, lr, decay = None, rate(step, config), config.weight_decay
            if config.groups:
                decay = 0.4 if name == "net.2.weight" else decay
                lr *= 1 / 3 if name.startswith("net.0") else 1
            decay = decay if name in ("net.0.weight", "net.2.weight") else 0.0
            with torch.no_grad():
                p.mul_(1 - lr * decay)
                if muon and p.ndim == 2:
                    first[name].lerp_(g, 1 - 0.9)
                    update = orthogonal(g.lerp(first[name], 0.9))
                    update = (update.T if p.shape[0] > p.shape[1] else update).float()
                    p.sub_(0.2 * max(p.shape) ** 0.5 * lr * update)
                    continue
                beta = 0.99 if muon else 0.999
                first[name].lerp_(g, 0.1)
                second[name].mul_(beta).addcmul_(g, g, value=1 - beta)
                root = (second[name] / (1 - beta ** (step + 1))).sqrt() + 1e-4
                p.sub_(lr * first[name] / (1 - 0.9 ** (step + 1)) / root)
        for decay, average in zip(config.decays, kept, strict=True):
            for name, p in params.items():
                average[name].lerp_(p.detach(), 1 - min(decay, (step + 1) / (10 + step)))
    return {name: p.detach() for name, p in params.items()}, kept


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_is_that_of_a_loop_written_out(name: str, tmp_path: Path) -> None:
    config = changed(PLAIN, **SETTINGS[name])
    run = trainer(tmp_path, config, HERE)
    run.fit()
    wanted, kept = written_out(config)
    ended = weights(run)
    # Sums of 200 steps in another order, which Muon's products in bfloat16 may round to the other side.
    close = 5e-3 if name == "muon" else 10 * F32
    for parameter, value in wanted.items():
        torch.testing.assert_close(ended[parameter], value, rtol=0, atol=close)
        for place, average in enumerate(kept):
            found = dict(run.ema.gather(place))[parameter]  # type: ignore[union-attr]
            torch.testing.assert_close(found, average[parameter], rtol=0, atol=close)
    if name == "averages":
        assert all(
            torch.equal(a, wanted_) for a, wanted_ in zip(kept[2].values(), wanted.values(), strict=True)
        )
    assert rows(tmp_path)[-1]["loss"] < 1.0


@pytest.mark.parametrize("name", ["averages", "muon", "torch"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = changed(PLAIN, **SETTINGS[name])
    run = trainer(tmp_path, config, HERE)
    run.fit()
    again = trainer(tmp_path, config, HERE)
    again.resume(again.folder.saved()[0])
    assert again.step == 100
    again.fit()
    one, other = weights(run), weights(again)
    assert all(torch.equal(one[key], other[key]) for key in one)
    for place in range(len(config.decays)):
        pairs = zip(run.ema.averages[place].items(), again.ema.averages[place].values(), strict=True)  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for (_, a), b in pairs)


# -- averages


def saved(folder: Path, ema: Any) -> Any:
    """A run of two steps, and its checkpoint."""
    config = changed(PLAIN, steps=2, warmup=0, ema=ema)
    run = trainer(folder, config, HERE, export=Exported(run_weights := {}))
    run.fit()
    return run, run_weights


class Exported:
    """Notes what is exported, by folder."""

    def __init__(self, seen: dict[str, dict[str, Tensor]]) -> None:
        self.seen = seen

    def frozen(self) -> dict[str, Tensor]:
        return {}

    def __call__(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.seen[folder.name] = dict(weights)


def test_every_average_is_exported_by_its_decay_and_the_first_as_before(tmp_path: Path) -> None:
    run, seen = saved(tmp_path, [0.1, 0.05, 0.0])
    assert list(seen) == ["native", "native_0.05", "native_0"]
    for place, exported in enumerate(seen.values()):
        for name, value in run.ema.gather(place):
            assert torch.equal(exported[name], value)
    assert not torch.equal(seen["native"]["net.0.weight"], seen["native_0.05"]["net.0.weight"])
    assert torch.equal(seen["native_0"]["net.0.weight"], run.engine.parameters["net.0.weight"])
    assert saved(tmp_path / "one", 0.1)[1].keys() == {"native"}


@pytest.mark.parametrize(("before", "after", "told"), [
    ([0.1, 0.05], [0.05, 0.1], ""),
    ([0.1, 0.05], [0.05, 0.07], "0.07"),
    (0.1, [0.05, 0.1], "0.05"),
    (0.1, 0.07, ""),  # one average goes on with another decay
    (None, [0.1, 0.05], "0.1, 0.05"),
])  # fmt: skip
def test_averages_are_found_again_by_their_decay(before, after, told, tmp_path: Path, caplog) -> None:
    old, _ = saved(tmp_path, before)
    run = trainer(tmp_path, changed(PLAIN, steps=2, warmup=0, ema=after), HERE)
    run.resume(run.folder.saved()[-1])
    said = [message for message in caplog.messages if "holds no average" in message]
    assert bool(said) == bool(told) and all(f"of decay {told}:" in message for message in said)
    for place, decay in enumerate(run.ema.decays):  # type: ignore[union-attr]
        ours = run.ema.averages[place]["net.0.weight"]  # type: ignore[union-attr]
        known = [] if old.ema is None else old.ema.decays
        theirs = old.engine.parameters["net.0.weight"].detach().view(-1)
        if decay in known or told == "":
            theirs = old.ema.averages[known.index(decay) if decay in known else 0]["net.0.weight"]
        assert torch.equal(ours, theirs)


def test_an_average_of_an_older_checkpoint_is_the_first(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    old, _ = saved(tmp_path, 0.1)
    file = tmp_path / "checkpoints" / "step_00000002" / "state" / "shard_000_00000.safetensors"
    kept = averages(file.parents[1])
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        notes = {key: value for key, value in opened.metadata().items() if key != "decays"}
    save_file(load_file(file), file, notes)
    run = trainer(tmp_path, changed(PLAIN, steps=2, warmup=0, ema=[0.1, 0.05]), HERE)
    from sat.train.shards import restore

    assert restore(run.engine, run.ema, file.parent, cut=True) == [1]
    assert all(torch.equal(run.ema.shards[name], value.view(-1)) for name, value in kept.items())  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [[], [0.9, 0.9], [0.9, 1.0], -0.1])
def test_decays_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a decay of at least 0 and below 1, several different"):
        changed(CONFIG, ema=wrong)


# -- Muon, and patterns that fit nothing


def test_muon_takes_matrices_of_layers_and_leaves_the_rest_to_adamw() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = torch.nn.Embedding(5, 4), torch.nn.Conv2d(2, 3, 3)
            self.linear, self.norm = torch.nn.Linear(4, 6), torch.nn.LayerNorm(6)

    network = Mixed()
    made = Muon(groups(network, 0.1), lr=0.01)
    names = {id(p): name for name, p in network.named_parameters()}
    inner = {type(one).__name__: one for one in made._inner}
    assert [names[id(p)] for g in inner["Muon"].param_groups for p in g["params"]] == ["linear.weight"]
    assert len([p for g in made.param_groups for p in g["params"]]) == 7
    decays = {names[id(p)]: g["weight_decay"] for g in made.param_groups for p in g["params"]}
    assert {name for name, decay in decays.items() if decay} == {"linear.weight", "conv.weight"}
    state = optimizer_state(changed(PLAIN, optimizer=MUON), ())
    assert 4 <= state.kept < 5 < optimizer_state(PLAIN, ()).kept  # one float32 for each weight, not two


def test_muon_steps_a_kernel_as_the_matrix_of_its_outputs() -> None:
    torch.manual_seed(0)
    conv, same = torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(18, 3)
    with torch.no_grad():
        same.weight.copy_(conv.weight.flatten(1))
        same.bias.copy_(conv.bias)
    made = [Muon(groups(one, 0.1), lr=0.01, kernels=True) for one in (conv, same)]
    for _ in range(3):
        for one in (conv, same):
            one.weight.grad = torch.linspace(-1, 2, 54).sin().reshape(one.weight.shape)
            one.bias.grad = torch.ones(3)
        before, grad = conv.weight, conv.weight.grad
        for optimizer in made:
            optimizer.step()
        assert conv.weight is before and conv.weight.grad is grad and conv.weight.shape == (3, 2, 3, 3)
        assert torch.equal(conv.weight.flatten(1), same.weight)
    again = Muon(groups(conv, 0.1), lr=0.01, kernels=True)
    again.load_state_dict(made[0].state_dict())
    again.step()
    made[1].step()
    assert torch.equal(conv.weight.flatten(1), same.weight) and torch.equal(conv.bias, same.bias)


@pytest.mark.parametrize(("optimizer", "words"), [
    ("sat.train.optim.Muon", "Muon steps matrices, and DeepSpeed may give it flat vectors: set train"),
    ("torch.optim.Muon", "torch's Muon takes matrices alone: write sat.train.optim.Muon"),
])  # fmt: skip
def test_muon_is_refused_where_it_cannot_step(optimizer: str, words: str) -> None:
    base = [str(ROOT / "configs" / f"{name}.yaml") for name in ("tiny", "tiny_train")]
    with pytest.raises(ConfigError, match=words):
        load(base, [f"train.optimizer={{target: {optimizer}}}"])


def test_patterns_that_fit_nothing_are_told_before_weights_are_read() -> None:
    base = [str(ROOT / "configs" / f"{name}.yaml") for name in ("tiny", "tiny_train")]
    given = "train.groups=[{targets: ['%s'], lr: 1.0e-4}]"
    check_groups(load(base, [given % "text.*.attn.*"]))
    with pytest.raises(RateError, match=r"'model.\*atn\*' matches no trained parameter"):
        check_groups(load(base, [given % "model.*atn*"]))
    with pytest.raises(RateError, match=r"'first_stage.\*' matches no trained parameter"):
        check_groups(load(base, [given % "first_stage.*"]))
