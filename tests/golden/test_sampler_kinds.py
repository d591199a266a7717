"""Sampler files of the kinds that no stored file covers, written by textbook formulas and checked like the others.

The formulas are those of the papers in terms of sigma (arXiv:2206.00364, 2211.01095, 2010.02502, 2403.05121),
with the official tables of schedule and network levels and the official toy network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.embeddings import guidance_sinusoid
from tests.golden.check import check_file

DATA = Path(__file__).parent / "data"
MODEL = "sampler_euler_edm_10"
STRENGTH = 16
"""Features of a guidance strength."""


@dataclass
class Textbook:
    """x -> predicted image by the toy network, and the samplers over it."""

    stored: dict[str, Tensor]
    table: np.ndarray
    cfg: float | None
    told: float | None  # guidance strength as an input
    draws: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def draw(self) -> Tensor:
        """Unit noise, kept."""
        self.draws.append(torch.randn(self.stored["in.noise"].shape))
        return self.draws[-1]

    def one(self, x: Tensor, sigma: float, name: str) -> Tensor:
        """The prediction under one condition, at the nearest of the network's levels."""
        index = int(np.abs(self.table - sigma).argmin())
        level = float(self.table[index])
        text, vector = self.stored[f"in.{name}.crossattn"], self.stored[f"in.{name}.vector"]
        add = 0.7 * text.mean((1, 2)) + 0.2 * vector.mean(1)
        if self.told is not None:
            add = add + 0.3 * guidance_sinusoid(torch.full((len(x),), self.told), STRENGTH).mean(1)
        shown = x / math.sqrt(1 + level**2)
        return x - level * torch.tanh(0.9 * shown + 0.5 * index / 1000 + add[:, None, None, None])

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        if self.cfg is None:
            return self.one(x, sigma, "cond")
        uncond = self.one(x, sigma, "uncond")
        return uncond + self.cfg * (self.one(x, sigma, "cond") - uncond)


Walk = Callable[[Textbook, Tensor, list[float]], Iterator[Tensor]]


def pairs(sigmas: list[float]) -> Iterator[tuple[float, float]]:
    return iter(zip(sigmas[:-1], sigmas[1:], strict=True))


def edm(
    churn: float = 0.0, lowest: float = 0.0, highest: float = 1e9, noise: float = 1.0, heun: bool = False
) -> Walk:
    def walk(d: Textbook, x: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
        for s, t in pairs(sigmas):
            if lowest <= s <= highest and churn:
                up = s * (1 + min(churn / (len(sigmas) - 1), math.sqrt(2) - 1))
                x, s = x + math.sqrt(up**2 - s**2) * noise * d.draw(), up
            slope = (x - d(x, s)) / s
            end = x + (t - s) * slope
            if heun and t:
                slope = (slope + (end - d(end, t)) / t) / 2
                end = x + (t - s) * slope
            x = end
            yield x

    return walk


def up_down(s: float, t: float, eta: float) -> tuple[float, float]:
    up = min(t, eta * t * math.sqrt(1 - (t / s) ** 2))
    return up, math.sqrt(t**2 - up**2)


def ancestral(eta: float, noise: float, second: bool = False) -> Walk:
    def walk(d: Textbook, x: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
        for s, t in pairs(sigmas):
            up, down = up_down(s, t, eta)
            image = d(x, s)
            if second and down:
                middle = math.sqrt(s * down)
                image = d(middle / s * x + (1 - middle / s) * image, middle)
            x = down / s * x + (1 - down / s) * image + up * noise * d.draw()
            yield x

    return walk


def ddim(share: float) -> Walk:
    def walk(d: Textbook, x: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
        for s, t in pairs(sigmas):
            image = d(x, s)
            x = image + t * (math.sqrt(1 - share**2) * (x - image) / s + share * d.draw())
            yield x

    return walk


def multistep(order: int) -> Walk:
    """Each past slope's share is an integral of its Lagrange polynomial, by quadrature that is exact for it."""
    nodes, weights = np.polynomial.legendre.leggauss(8)

    def walk(d: Textbook, x: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
        slopes: list[Tensor] = []
        for i, (s, t) in enumerate(pairs(sigmas)):
            slopes.append((x - d(x, s)) / s)
            known = list(range(max(0, i + 1 - order), i + 1))
            at = (t - s) / 2 * nodes + (t + s) / 2
            for j in known:
                basis = np.prod(
                    [(at - sigmas[k]) / (sigmas[j] - sigmas[k]) for k in known if k != j] + [at**0], 0
                )
                x = x + float((t - s) / 2 * (weights * basis).sum()) * slopes[j]
            yield x

    return walk


def relay(partial: int, churn: float = 0.0) -> Walk:
    """The last ``partial`` steps, over which the low-resolution latent gives way to the image evenly."""

    def walk(d: Textbook, x: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
        low, whole = d.stored["in.image"], len(sigmas) - 1
        sigmas = sigmas[-partial - 1 :]
        x = low + sigmas[0] * d.stored["in.noise"]
        for left, (s, t) in zip(range(partial, 0, -1), pairs(sigmas), strict=True):
            if churn:
                up = s * (1 + min(churn / whole, math.sqrt(2) - 1))
                x, s = x + math.sqrt(up**2 - s**2) * d.draw(), up
            image = d(x, s)
            now, then = (image + share * (low - image) for share in (left / partial, (left - 1) / partial))
            x = then + t / s * (x - now)
            yield x

    return walk


def written(folder: Path, name: str, walk: Walk, metadata: dict[str, object], cfg: bool, steps: int) -> Path:
    """A golden file of ``walk``."""
    torch.manual_seed(5)
    stored = {k: v for k, v in load_file(DATA / f"{MODEL}.safetensors").items() if k.startswith("in.")}
    stored["in.image"] = load_file(DATA / "sampler_relay_12of24.safetensors")["in.image"]
    tables = load_file(DATA / "tables_discretization.safetensors")
    sigmas = tables[f"out.legacy_ddpm.sigmas_append0.n{steps}"].double().tolist()
    told = metadata.get("cfg_cond_scale")
    ignores = str(metadata["sampler"]).endswith("LinearMultistepSampler")
    book = Textbook(
        stored,
        tables["out.denoiser_table.eps_legacy"].double().numpy(),
        7.5 if cfg else None,
        float(str(told)) if told is not None and not ignores else None,
    )
    seen = list(walk(book, stored["in.noise"] * math.sqrt(1 + sigmas[0] ** 2), sigmas))
    stored |= {"out.x": seen[-1].contiguous()}
    if not ignores:
        stored["mid.x_after_step"] = torch.stack(seen)
    if book.draws:
        stored["in.randn_like_draws"] = torch.stack(book.draws)
    with safe_open(DATA / f"{MODEL}.safetensors", "pt") as opened:
        formula = opened.metadata()["toy_network"]
    entries = {**metadata, "num_steps": steps, **({"cfg_scale": 7.5} if cfg else {})}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
    save_file(stored, folder / f"{name}.safetensors", {"toy_network": formula, **texts})
    return folder / f"{name}.safetensors"


EDM, HEUN, RELAY = "EulerEDMSampler", "HeunEDMSampler", "LinearRelayEDMSampler"
TOLD = {"cfg_cond_scale": 7.5, "cfg_cond_embed_dim": STRENGTH}
KINDS = {
    "sampler_euler_churn_10": (edm(3, 0.1, 10, 1.003), {"sampler": EDM, "s_churn": 3, "s_tmin": 0.1, "s_tmax": 10, "s_noise": 1.003}, True, 10),
    "sampler_euler_much_churn_10": (edm(40), {"sampler": EDM, "sampler_kwargs": '{"s_churn": 40, "s_tmax": Infinity}'}, False, 10),
    "sampler_heun_churn_10": (edm(3, heun=True), {"sampler": HEUN, "s_churn": 3}, True, 10),
    "sampler_heun_distill_4": (edm(heun=True), {"sampler": HEUN, **TOLD}, False, 4),
    "sampler_euler_ancestral_10": (ancestral(1, 1), {"sampler": "EulerAncestralSampler"}, True, 10),
    "sampler_euler_ancestral_eta_10": (ancestral(0.5, 1.1), {"sampler": "EulerAncestralSampler", "eta": 0.5, "s_noise": 1.1}, True, 10),
    "sampler_dpmpp2s_10": (ancestral(1, 1, second=True), {"sampler": "DPMPP2SAncestralSampler"}, True, 10),
    "sampler_dpmpp2s_eta0_10": (ancestral(0, 1, second=True), {"sampler": "DPMPP2SAncestralSampler", "eta": 0}, True, 10),
    "sampler_ddim_10_patched": (ddim(0.1), {"sampler": "DDIMSampler (hook patched)"}, True, 10),
    "sampler_ddim_0_10_patched": (ddim(0.0), {"sampler": "DDIMSampler", "s_noise": 0.0}, True, 10),
    "sampler_linear_multistep_10": (multistep(4), {"sampler": "LinearMultistepSampler"}, True, 10),
    "sampler_linear_multistep_2_10": (multistep(2), {"sampler": "sgm.x.LinearMultistepSampler", "order": 2, **TOLD}, False, 10),
    "sampler_relay_distill_1of5": (relay(1), {"sampler": RELAY, "partial_num_steps": 1, **TOLD}, False, 5),
    "sampler_relay_all_10": (relay(10), {"sampler": RELAY, "partial_num_steps": 10}, True, 10),
    "sampler_relay_churn_12of24": (relay(12, 4), {"sampler": RELAY, "partial_num_steps": 12, "s_churn": 4}, True, 24),
}  # fmt: skip
# ruff: noqa: E501 (table of cases)


@pytest.mark.parametrize("name", KINDS)
def test_every_official_sampler_is_checked_by_its_formula(name: str, tmp_path: Path) -> None:
    walk, metadata, cfg, steps = KINDS[name]
    report = check_file(written(tmp_path, name, walk, metadata, cfg, steps), echo=False)
    assert report.passed, "\n".join(map(str, report.lines))
    assert "out.x" in report.names()


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("sampler_euler_churn_10", {"s_churn": 3.5}),
        ("sampler_euler_churn_10", {"s_tmin": 1.0}),
        ("sampler_euler_churn_10", {"s_noise": 1.0}),
        ("sampler_euler_ancestral_eta_10", {"eta": 0.6}),
        ("sampler_ddim_10_patched", {"s_noise": 0.2}),
        ("sampler_linear_multistep_10", {"order": 3}),
        ("sampler_relay_distill_1of5", {"cfg_cond_scale": 5}),
    ],
)
def test_an_option_that_is_not_that_of_the_run_fails(
    name: str, entry: dict[str, float], tmp_path: Path
) -> None:
    walk, metadata, cfg, steps = KINDS[name]
    path = written(tmp_path, name, walk, metadata, cfg, steps)
    with safe_open(path, "pt") as opened:
        texts = {**opened.metadata(), **{key: json.dumps(value) for key, value in entry.items()}}
    save_file(load_file(path), path, texts)
    assert not check_file(path, echo=False).passed
