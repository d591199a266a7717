"""Prompt to picture through diffusers' own pipeline and through ours: the same weights, latents and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CogView3PlusPipeline
from torch import Tensor

from sat.checkpoint import save_diffusers, save_native
from sat.cli.convert import main as convert_main
from sat.pipeline import Pipeline
from tests.checkpoints import CONFIG, tensors, tokenizer

ROOT = Path(__file__).parents[2]
PROMPT = "a red apple"
HEIGHT, WIDTH, GUIDANCE = 32, 48, 3.0
STEPS = 10  # the peer rounds timesteps where the original truncates: equal for counts that divide 1000


def our_pipeline(root: Path) -> Pipeline:
    """The toy Plus, saved in ``root`` and opened with diffusers' norms and schedule."""
    save_native(root / "ours", tensors(), CONFIG, tokenizer=tokenizer(root / "spiece.model"))
    base = root / "base.yaml"
    base.write_text(yaml.safe_dump(CONFIG))
    extra = [
        "model.params.double_norm=false",
        "checkpoint.allow_config=[model.params.double_norm]",
        "diffusion.schedule.params.rescale=before_spacing",
        "diffusion.schedule.params.quantise=false",
        "sampling.sizes={min: 16, max: 64, multiple: 16, max_area: 4096}",
        f"sampling.height={HEIGHT}",
        f"sampling.width={WIDTH}",
        f"checkpoint.path={root / 'ours'}",
    ]
    return Pipeline.from_config([base], extra, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[CogView3PlusPipeline, Pipeline]:
    """The same random weights as a diffusers folder in their pipeline and as a native one in ours.

    Theirs rescales the schedule before it picks the steps and normalises once before the head: so does ours.
    """
    root = tmp_path_factory.mktemp("pair")
    spiece, weights = tokenizer(root / "spiece.model"), tensors()
    theirs = CogView3PlusPipeline.from_pretrained(
        save_diffusers(root / "theirs", weights, CONFIG, tokenizer=spiece)
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs, our_pipeline(root)


def both(pair: tuple[CogView3PlusPipeline, Pipeline], negative: str | None) -> tuple[Tensor, Tensor]:
    """Pictures (1, 3, H, W) in [0, 1] of the same latents, theirs and ours."""
    theirs, ours = pair
    shape = ours.generator.engine.latent_shape(HEIGHT, WIDTH)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    their_image = theirs(
        PROMPT, negative, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=noise.clone(), max_sequence_length=ours.experiment.conditioning.max_length, output_type="pt",
    ).images  # fmt: skip
    out = ours([PROMPT], steps=STEPS, guidance=GUIDANCE, latents=noise, negative_prompt=negative)
    return their_image, ours.generator.engine.decode(out.latents)


@pytest.mark.parametrize("negative", [None, "a blue box"])
def test_the_picture_is_the_same(pair: tuple[CogView3PlusPipeline, Pipeline], negative: str | None) -> None:
    theirs, ours = both(pair, negative)
    assert theirs.shape == ours.shape == (1, 3, HEIGHT, WIDTH)
    assert theirs.std() > 0.02  # not flat, not saturated
    assert (theirs - ours).abs().max() < 1e-3


def test_the_negative_prompt_counts(pair: tuple[CogView3PlusPipeline, Pipeline]) -> None:
    _, plain = both(pair, None)
    _, against = both(pair, "a blue box")
    assert (plain - against).abs().max() > 1e-2


def test_the_small_model_that_ships_draws_the_same_through_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert convert_main(["checkpoints/tiny", str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    theirs = CogView3PlusPipeline.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    extra = [
        "model.params.double_norm=false",
        "checkpoint.allow_config=[model.params.double_norm]",
        "diffusion.schedule.params.rescale=before_spacing",
        "diffusion.schedule.params.quantise=false",
    ]
    ours = Pipeline.from_config(["configs/tiny.yaml"], extra, device="cpu", dtype="fp32")
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    their_image = theirs(
        "rocket, noto style",
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=GUIDANCE,
        latents=noise.clone(),
        max_sequence_length=16,
        output_type="pt",
    ).images
    out = ours(["rocket, noto style"], steps=20, guidance=GUIDANCE, latents=noise)
    assert their_image.std() > 0.1
    assert (their_image - ours.generator.engine.decode(out.latents)).abs().max() < 1e-3
