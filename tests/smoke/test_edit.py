"""Changing pictures through sample.py and Python on toy models: identities, masks, rows, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import sat
from benchmarks import bench_edit
from sat.apps.evaluate.classifier import Classifier
from sat.config.schema import RegionConfig, RegionsConfig
from sat.control_input import ControlInput
from sat.pipeline import Pipeline
from sat.sampling.edit import inner_ramp
from sat.sampling.generator import ImageRng, SamplingParams
from sat.sampling.output import from_pil, read_png_text
from tests.adapters import trained
from tests.checkpoints import tokenizer
from tests.sampling import DEBUG, ROOT, Command, files, pixels
from tests.unit.test_control_files import written

TOY = ROOT / "tests" / "assets" / "toy"
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> Pipeline:
    return sat.Pipeline.from_config([DEBUG], [f"conditioning.tokenizer={spiece}"], device="cpu", dtype="fp32")


@pytest.fixture
def sample(spiece: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(spiece, capsys)


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def box(height: int = HEIGHT, width: int = WIDTH, value: int = 255) -> Image.Image:
    """A mask: the middle of the picture."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = value
    return Image.fromarray(mask)


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., Path]:
    def write(image: Image.Image, name: str = "init.png") -> Path:
        image.save(tmp_path / name)
        return tmp_path / name

    return write


def outside(drawn: NDArray[np.int64], mask: Image.Image) -> NDArray[np.int64]:
    return drawn[np.asarray(mask) == 0]


# -- identities


def test_strength_1_is_text_to_image_to_the_last_byte(sample: Command, given, tmp_path: Path) -> None:
    words = ("--prompt", "a cat", "--batch-size", 2, "--seed", 3)
    assert sample(*words, "--output-dir", tmp_path / "plain").code == 0
    done = sample(*words, "--init-image", given(picture()), "--strength", 1, "--output-dir", tmp_path / "one")
    assert done.code == 0 and "init_image has no effect" in done.err
    assert files(tmp_path / "one") == files(tmp_path / "plain")


def test_strength_1_is_text_to_image_where_the_first_level_has_signal_and_noise_is_drawn_anew(
    spiece: Path,
) -> None:
    ancestral = "sampling.sampler={target: sat.diffusion.samplers.EulerAncestral}"
    pipe = sat.Pipeline.from_config(
        [DEBUG, TOY / "base.yaml"],
        [f"conditioning.tokenizer={spiece}", ancestral],
        device="cpu",
        dtype="fp32",
    )
    h, w = pipe.experiment.sampling.height, pipe.experiment.sampling.width
    plain = pipe("a cat", seed=5, batch_size=2)
    whole = Image.new("L", (w, h), 255)
    for mask in (None, whole):
        out = pipe("a cat", seed=5, batch_size=2, image=picture(1, h, w), mask=mask, strength=1)
        assert torch.equal(out.latents, plain.latents)


def test_strength_0_is_the_autoencoders_round_trip_and_says_so(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        out = pipe("a cat", image=picture(), strength=0)
    assert "the autoencoder's round trip" in caplog.text
    engine = pipe.generator.engine
    zeros = torch.zeros(1, *engine.latent_shape(HEIGHT, WIDTH))
    z0 = engine.encode(from_pil(picture())[None], zeros)
    assert torch.equal(out.latents, z0)
    assert out.images[0].tobytes() == pipe.generator.images(z0)[0].tobytes()


def test_python_draws_what_the_command_draws(pipe: Pipeline, sample: Command, given, tmp_path: Path) -> None:
    image, mask = given(picture()), given(box(), "mask.png")
    words = ("--init-image", image, "--mask", mask, "--strength", 0.8, "--output-dir", tmp_path / "out")
    assert sample("--prompt", "a cat", "--batch-size", 2, *words).code == 0
    out = pipe("a cat", batch_size=2, image=picture(), mask=box(), strength=0.8)
    for path, drawn in zip(sorted((tmp_path / "out").rglob("0000*.png")), out.images, strict=True):
        assert (pixels(path) == np.asarray(drawn)).all()
    told = read_png_text(path)
    assert (
        told is not None and told["strength"] == "0.8 by noise" and told["init_image"].startswith("init.png ")
    )


def test_an_image_does_not_depend_on_how_many_are_asked_for(pipe: Pipeline) -> None:
    both = pipe("a cat", batch_size=2, image=[picture(1), picture(2)], strength=0.5)
    alone = pipe("a cat", seed=1, image=picture(2), strength=0.5)
    assert torch.equal(both.latents[1:], alone.latents)


def test_steps_are_counted_as_they_are_taken(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe("a cat", steps=10, image=picture(), strength=0.5, callback=lambda i, n, x: seen.append((i, n)))
    assert len(seen) < 10 and seen[-1] == (len(seen), len(seen))


# -- masks


def test_pixels_outside_the_mask_are_the_pictures_own(pipe: Pipeline) -> None:
    drawn = np.asarray(pipe("a cat", image=picture(), mask=box()).images[0]).astype(np.int64)
    assert (outside(drawn, box()) == outside(np.asarray(picture()), box())).all()
    assert (drawn != np.asarray(picture()))[20:28, 28:36].any()


def test_an_alpha_channel_is_a_mask_of_what_is_transparent(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    cut = picture().convert("RGBA")
    cut.putalpha(Image.fromarray(255 - np.asarray(box())))
    with caplog.at_level("INFO"):
        by_alpha = pipe("a cat", image=cut)
    assert "its transparent parts are the mask" in caplog.text
    on_white = Image.composite(Image.new("RGB", picture().size, "white"), picture(), box())
    assert torch.equal(by_alpha.latents, pipe("a cat", image=on_white, mask=box()).latents)


def test_a_map_of_one_grey_is_that_strength_and_black_stays(pipe: Pipeline) -> None:
    grey = Image.new("L", (WIDTH, HEIGHT), 255)
    even = pipe("a cat", image=picture(), strength_map=grey, strength=0.5).latents
    assert torch.equal(even, pipe("a cat", image=picture(), strength=0.5).latents)
    half = Image.fromarray(np.repeat([[0, 255]], HEIGHT, 0).repeat(WIDTH // 2, 1).astype(np.uint8))
    drawn = np.asarray(pipe("a cat", image=picture(), strength_map=half).images[0])
    assert (drawn[:, : WIDTH // 2] == np.asarray(picture())[:, : WIDTH // 2]).all()


def test_outpainting_keeps_the_picture_where_it_was_put(sample: Command, given, tmp_path: Path) -> None:
    words = ("--init-image", given(picture(0, 32, 40)), "--outpaint", "left=8,right=16,top=16")
    done = sample("--prompt", "a cat", *words, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    drawn = pixels(next((tmp_path / "out").rglob("000000000.png")))
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    assert (drawn[16:, 8:48] == np.asarray(picture(0, 32, 40))).all()


def test_a_cut_out_is_drawn_at_full_size_and_put_back(pipe: Pipeline, spiece: Path) -> None:
    large, mask = picture(3, 120, 200), np.zeros((120, 200), np.uint8)
    mask[50:70, 90:120] = 255
    close = sat.Pipeline(pipe.generator, pipe.guider, pipe.experiment)
    sampling = pipe.experiment.sampling
    inpaint = replace(sampling.inpaint, padding=6)
    close.experiment = replace(pipe.experiment, sampling=replace(sampling, inpaint=inpaint))
    out = close("a cat", image=large, mask=Image.fromarray(mask)).images[0]
    assert out.size == large.size
    changed = (np.asarray(out) != np.asarray(large)).any(-1)
    assert changed[55:65, 95:115].any() and not changed[mask == 0].any()


def test_a_ramp_rises_inside_the_mask_alone_and_reaches_1_in_a_narrow_one() -> None:
    wide, narrow = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    wide[2:18, 2:18], narrow[:, 9:11] = True, True
    ramp = inner_ramp(wide, 3)
    assert ramp[~wide].max() == 0 and ramp[10, 2:7].tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert inner_ramp(narrow, 4)[narrow].min() == 1
    assert inner_ramp(np.ones((5, 5), bool), 3).min() == 1


# -- regions


def halves(share: float = 0.8, **more: Any) -> RegionsConfig:
    sides = ([0.0, 0.0, 0.5, 1.0], "a dog"), ([0.5, 0.0, 1.0, 1.0], "the sun")
    return RegionsConfig([RegionConfig(text, None, box) for box, text in sides], share, **more)


def test_regions_change_their_part_and_a_share_of_0_or_an_empty_range_nothing(pipe: Pipeline) -> None:
    plain, drawn = pipe("a cat", batch_size=2), pipe("a cat", batch_size=2, regions=halves())
    assert not torch.equal(plain.latents, drawn.latents)
    none = pipe("a cat", batch_size=2, regions=halves(0.0)).latents
    assert (none - plain.latents).abs().max() < 1e-4 * plain.latents.abs().max()
    never = pipe("a cat", batch_size=2, regions=halves(start=0.999, end=0.999)).latents
    assert torch.equal(never, plain.latents)
    part = pipe("a cat", regions=halves(end=0.01)).latents  # the first step alone
    assert not torch.equal(part, drawn.latents[:1]) and not torch.equal(part, plain.latents[:1])


def test_regions_by_steps_act_in_the_steps_whose_middle_lies_in_the_range(pipe: Pipeline) -> None:
    def drawn(steps: int, **more: Any) -> torch.Tensor:
        return pipe("a cat", steps=steps, regions=halves(**more)).latents

    one = drawn(4, end=0.001)  # of noise: the first step alone
    assert torch.equal(drawn(4, end=0.2, by="steps"), one) and not torch.equal(drawn(4), one)
    assert torch.equal(drawn(4, by="steps"), drawn(4))
    assert torch.equal(drawn(1, end=0.8, by="steps"), drawn(1)), "not off where there is one step"
    assert torch.equal(drawn(4, end=0.1, by="steps"), pipe("a cat", steps=4).latents)


def test_the_command_takes_regions_by_masks(pipe: Pipeline, sample: Command, given, tmp_path: Path) -> None:
    left = np.zeros((HEIGHT, WIDTH), np.uint8)
    left[:, : WIDTH // 2] = 255
    a, b = given(Image.fromarray(left), "a.png"), given(Image.fromarray(255 - left), "b.png")
    words = ("--prompt", "a cat", "--region", f"{a}=a dog", "--region", f"{b}=the sun", "--output-dir")
    done = sample(*words, tmp_path / "out")
    assert done.code == 0, done.err
    path = next((tmp_path / "out").rglob("000000000.png"))
    assert (pixels(path) == np.asarray(pipe("a cat", regions=halves()).images[0])).all()
    assert "a dog; the sun" in (read_png_text(path) or {})["regions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--region", "a cat"], "expected MASK=TEXT"),
        (["--region", "black.png=a cat"], "no pixel is in the region"),
        (["--region", "gone.png=a cat"], "there is no"),
        (["sampling.regions={areas: [{prompt: a}]}"], "needs `mask` or `box`"),
        (["sampling.regions={areas: [{prompt: a, box: [0, 0, 2, 1]}]}"], "as shares of the picture"),
        (["sampling.regions={areas: []}"], "at least one region"),
        (["sampling.regions={areas: [{prompt: a, box: [0, 0, 1, 1]}], share: 2}"], "expected 0 (no regions)"),
        (["sampling.regions={areas: [{prompt: a, box: [0, 0, 1, 1]}]}", "sampling.tile=8"], "parts of the"),
    ],
)  # fmt: skip
def test_wrong_regions_are_refused_before_weights_are_read(
    sample: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(Pipeline, "open", lambda *a, **k: pytest.fail("weights are read"))
    monkeypatch.chdir(tmp_path)
    box(value=0).save("black.png")
    done = sample("--prompt", "a cat", *words, "--output-dir", tmp_path / "out")
    assert done.code == 2 and message in done.err, done.err


# -- with what else is put on a model


TINY = ROOT / "configs" / "tiny.yaml"
LARGE = ["sampling.height=96", "sampling.width=80", "sampling.sizes.max=96", "sampling.sizes.max_area=9216"]
SPEEDS = {
    "step cache": ["sampling.cache={target: sat.diffusion.step_cache.FirstBlock, params: {threshold: 0.3}}"],
    "int8": ["memory.quantize.network=int8"],
    "tiles": ["sampling.tile=8", *LARGE],
    "decoder tiles": ["memory.decode_tile=8", *LARGE],
    "at once": ["sampling.at_once=2"],
    "interval": ["sampling.guider={target: sat.diffusion.guidance.IntervalLimited, params: {highest: 600}}"],
}  # fmt: skip


@pytest.mark.parametrize("settings", SPEEDS.values(), ids=SPEEDS.keys())
def test_masks_hold_with_everything_that_makes_drawing_fast_or_small(settings: list[str]) -> None:
    pipe = sat.Pipeline.from_config(
        [TINY], ["sampling.steps=6", "sampling.fold=false", *settings], device="cpu"
    )
    h, w = pipe.experiment.sampling.height, pipe.experiment.sampling.width
    given, mask = picture(0, h, w), box(h, w)
    out = pipe("a red apple", batch_size=2, image=given, mask=mask)
    for image in out.images:
        drawn = np.asarray(image).astype(np.int64)
        assert (outside(drawn, mask) == outside(np.asarray(given), mask)).all()
    assert not torch.equal(out.latents[0], out.latents[1])
    z0 = pipe("a red apple", image=given, strength=0).latents
    assert (out.latents[0] == z0[0])[:, 0].all()  # the first row of cells is outside of the grown mask
    assert (out.latents[0] != z0[0])[:, h // 16, w // 16].any()


def test_adapters_act_in_the_mask_alone() -> None:
    pipe = sat.Pipeline.from_config([TINY], ["sampling.steps=3", "sampling.pack=false"], device="cpu")
    given, mask = picture(0, 64, 64), box(64, 64)
    before = pipe("a red apple", image=given, mask=mask).latents
    trained(pipe.generator.engine.network, ["attention"])
    after = pipe("a red apple", image=given, mask=mask).latents
    assert torch.equal(before[..., 0, :], after[..., 0, :]) and not torch.equal(before, after)


# -- cascades


def test_a_cascade_keeps_what_is_outside_the_mask_at_the_last_size(spiece: Path) -> None:
    pipe = sat.CascadePipeline.from_config(
        TOY / "cascade.yaml", [f"conditioning.tokenizer={spiece}"], device="cpu"
    )
    h, w = (getattr(pipe.cascade.stages[-1].experiment.sampling, key) for key in ("height", "width"))
    out = pipe("a cat", image=picture(0, h, w), mask=box(h, w))
    drawn = np.asarray(out.images[0]).astype(np.int64)
    assert drawn.shape == (h, w, 3)
    assert (outside(drawn, box(h, w)) == outside(np.asarray(picture(0, h, w)), box(h, w))).all()
    plain = pipe("a cat").images[0]
    assert pipe("a cat", image=picture(0, h, w), strength=1).images[0].tobytes() == plain.tobytes()


def test_a_cascades_command_draws_the_same(spiece: Path, capsys, given, tmp_path: Path) -> None:
    from tests.smoke.test_cascade import Command as Cascade

    pipe = sat.CascadePipeline.from_config(
        TOY / "cascade.yaml", [f"conditioning.tokenizer={spiece}"], device="cpu"
    )
    h, w = (getattr(pipe.cascade.stages[-1].experiment.sampling, key) for key in ("height", "width"))
    words = ("--init-image", given(picture(0, h, w)), "--mask", given(box(h, w), "mask.png"))
    done = Cascade(spiece, capsys)(
        [TOY / "cascade.yaml"], "--prompt", "a cat", *words, "--output-dir", tmp_path / "out"
    )
    assert done.code == 0, done.err
    out = pipe("a cat", image=picture(0, h, w), mask=box(h, w))
    assert (pixels(next((tmp_path / "out").glob("0_*/000000000.png"))) == np.asarray(out.images[0])).all()


# -- folders and rows


def test_a_folder_of_pictures_takes_one_prompt_for_all(
    sample: Command, tmp_path: Path, pipe: Pipeline
) -> None:
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / "in" / name)
    words = ("--init-image", tmp_path / "in", "--strength", 0.5, "--output-dir", tmp_path / "out")
    done = sample("--prompt", "a cat", *words)
    assert done.code == 0 and "one prompt for each of the 2 pictures" in done.err
    drawn = sorted((tmp_path / "out").rglob("000000000.png"))
    assert [path.parent.name for path in drawn] == ["0_a_cat", "1_a_cat"]
    assert (pixels(drawn[1]) == np.asarray(pipe("a cat", image=picture(1), strength=0.5).images[0])).all()


ROWS = [
    {"prompt": "a cat"},
    {"prompt": "a dog", "negative": "grey", "seed": 7, "size": "32x48"},
    {"prompt": "the sun", "init_image": "init.png", "mask": "mask.png", "strength": 0.7, "note": "mine"},
]


def rows(path: Path, values: list[object] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values or ROWS))
    return path


def test_rows_of_a_prompt_file_have_their_own_settings(
    pipe: Pipeline, sample: Command, given, tmp_path: Path
) -> None:
    given(picture()), given(box(), "mask.png")
    done = sample("--prompt-file", rows(tmp_path / "x.jsonl"), "--output-dir", tmp_path / "out")
    assert done.code == 0 and "keys without a meaning here: note" in done.err, done.err
    drawn = sorted((tmp_path / "out").rglob("000000000.png"))
    alone = [
        pipe("a cat"),
        pipe("a dog", negative_prompt="grey", seed=7, height=32, width=48),
        pipe("the sun", image=picture(), mask=box(), strength=0.7),
    ]
    for path, one in zip(drawn, alone, strict=True):
        assert (pixels(path) == np.asarray(one.images[0])).all(), path
    told = read_png_text(drawn[1])
    assert told is not None and (told["seed"], told["size"], told["negative_prompt"]) == (
        "7",
        "32x48",
        "grey",
    )


def test_array_jobs_share_the_rows_and_a_changed_picture_is_drawn_again(
    sample: Command, given, tmp_path: Path
) -> None:
    given(picture()), given(box(), "mask.png")
    words = ("--prompt-file", rows(tmp_path / "x.jsonl"), "--output-dir")
    assert sample(*words, tmp_path / "whole").code == 0
    for part in (0, 1):
        assert sample(*words, tmp_path / "out", f"sampling.share={part}/2", "--resume").code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("000000000.png")}
    given(picture(9))
    assert sample(*words, tmp_path / "out", "--resume").code == 0
    again = [path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert again == ["2_the_sun"]


def test_rows_have_controls_of_their_own_in_place_of_the_runs(
    pipe: Pipeline, sample: Command, given, tmp_path: Path
) -> None:
    control = written(tmp_path)
    for name, one in (("a.png", picture(1)), ("b.png", picture(2)), ("c.png", picture(3, 32, 48))):
        given(one, name)
    own = {"path": control.name, "image": "b.png", "scale": 0.5, "start": 0.1, "layers": [1, 0.5]}
    large = {"path": control.name, "image": "c.png"}
    values: list[object] = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "controls": [own, {**own, "image": "a.png", "preprocess": True}]},
        {"prompt": "the sun", "controls": []},
        {"prompt": "a lion", "controls": [large], "size": [32, 48]},
    ]
    shared = f"sampling.controls=[{{path: {control}, image: {tmp_path / 'a.png'}}}]"
    words = (shared, "--prompt-file", rows(tmp_path / "x.jsonl", values), "--output-dir")
    assert sample(*words, tmp_path / "whole").code == 0
    drawn = sorted((tmp_path / "whole").rglob("000000000.png"))

    def steered(**more: object) -> dict[str, object]:
        return {"control": control, **more}

    two = {"scale": 0.5, "start": 0.1, "layers": [1.0, 0.5]}
    both = [steered(image=picture(2), **two), steered(image=picture(1), preprocess=True, **two)]
    alone = [
        pipe("a cat", controls=[steered(image=picture(1))]),
        pipe("a dog", controls=both),
        pipe("the sun"),
        pipe("a lion", controls=[steered(image=picture(3, 32, 48))], height=32, width=48),
    ]
    for path, one in zip(drawn, alone, strict=True):
        assert (pixels(path) == np.asarray(one.images[0])).all(), path
    told = read_png_text(drawn[1])
    assert told is not None and "scale 0.5" in told["controls"] and "b.png" in told["controls"]
    for part in (0, 1):  # array jobs, and a changed picture
        assert sample(*words, tmp_path / "out", f"sampling.share={part}/2", "--resume").code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("000000000.png")}
    given(picture(9), "b.png")
    assert sample(*words, tmp_path / "out", "--resume").code == 0
    again = [path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert again == ["1_a_dog"]


def test_tiles_see_their_part_of_the_controls_picture(tmp_path: Path, spiece: Path) -> None:
    """Values that differ on the right give latents that differ there alone: no tile in between sees it."""
    wide = ["model.params.table_size=[12,12]"]
    wide += ["sampling.sizes={min: 16, max: 128, multiple: 16, max_area: 16384}"]
    words = [f"conditioning.tokenizer={spiece}", "sampling.tile=8", "sampling.steps=1", *wide]
    words += ["sampling.height=48", "sampling.width=128"]
    tiled = Pipeline.from_config([DEBUG], words, device="cpu", dtype="fp32")
    name, generator = tiled.controls.load(written(tmp_path, *wide)), tiled.generator
    params = SamplingParams.of(tiled.experiment.sampling, tiled.guider)
    (encoded,), shape = generator.encode(["a cat"]), generator.engine.latent_shape(48, 128)
    one = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    two = one.clone()
    two[..., 13:] = 0

    def drawn(*values: torch.Tensor) -> torch.Tensor:
        controls = tuple(ControlInput(name, value, (1.0,)) for value in values)
        return generator.latents(encoded, ImageRng.of(7, [0], shape), params, controls=controls)

    moved = (drawn(one) - drawn(two)).abs().amax((0, 1, 2))
    assert moved[-1] > 1e-3 and moved[:8].max() == 0
    assert (drawn() - drawn(one)).abs().amax((0, 1, 2)).min() > 1e-3, "it acts everywhere"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"path": "no.safetensors", "image": "a.png"}, "no.safetensors: no such control"),
        ({"path": "CONTROL", "image": "no.png"}, "prompt 0: controls.0.image: "),
        ({"path": "CONTROL"}, "prompt 0: controls.0.image: needs a picture"),
        ({"path": "CONTROL", "image": "bad.png"}, "bad.png"),
        (
            {"path": "CONTROL", "image": "a.png", "layers": [1]},
            "1 weights in `layers`, expected one for each",
        ),
        ({"path": "CONTROL", "image": "a.png", "scal": 1}, "prompt 0: controls.0.scal: "),
        ({"path": "CONTROL", "image": "a.png", "scale": "1"}, "prompt 0: controls.0.scale: expected float"),
        ({"path": "CONTROL", "image": "a.png", "start": 0.9, "end": 0.1}, "0 <= `start` <= `end` <= 1"),
        ({"path": "a.png", "image": "a.png"}, "a.png"),
    ],
)
def test_a_wrong_control_of_a_row_is_named_before_weights_are_read(
    sample: Command,
    given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, object],
    message: str,
) -> None:
    control = written(tmp_path)
    monkeypatch.setattr("sat.pipeline.build_engine", lambda *a, **k: pytest.fail("weights are read"))
    given(picture(1), "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    values = {**own, "path": str(own["path"]).replace("CONTROL", control.name)}
    file = rows(tmp_path / "x.jsonl", [{"prompt": "a", "controls": [values]}])
    done = sample("--prompt-file", file, "--output-dir", tmp_path / "out")
    assert done.code in (1, 2) and message in done.err and "Traceback" not in done.err, done.err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "line 1: expected an object with `prompt`, got list"),
        ("{", "line 1: not JSON"),
        ('{"seed": 1}', "line 1: no prompt"),
        ('{"prompt": "a", "seed": "1"}', 'line 1: seed: expected a whole number, got "1"'),
        ('{"prompt": "a", "seed": -1}', "seed: expected 0 to 2^32"),
        ('{"prompt": "a", "height": 32}', "line 1: height and width come together"),
        ('{"prompt": "a", "size": "33x48"}', "not a multiple of 16"),
        ('{"prompt": "a", "strength": 2}', "line 1: strength: expected 0 to 1"),
        ('{"prompt": "a", "init_image": "no.png"}', "no.png: No such file"),
        ('{"prompt": "a", "mask": "no.png"}', "has a mask, but no init_image"),
        ('{"prompt": "a", "controls": {}}', "line 1: controls: expected a list"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_before_weights_are_read(
    sample: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, message: str
) -> None:
    monkeypatch.setattr(Pipeline, "open", lambda *a, **k: pytest.fail("weights are read"))
    (tmp_path / "x.jsonl").write_text(row)
    done = sample("--prompt-file", tmp_path / "x.jsonl", "--output-dir", tmp_path / "out")
    assert done.code == 2 and message in done.err, done.err


# -- refusals: one line, before weights are read


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "box.png"], "has a mask, but no init_image"),
        (["--strength", "0.5"], "sampling.strength is for a picture to change"),
        (["--init-image", "init.png", "--mask", "small.png"], "small.png: is 24 x 32 (height x width), but"),
        (["--init-image", "init.png", "--mask", "black.png"], "black.png: no part is to be drawn anew"),
        (["--init-image", "init.png", "--strength-map", "black.png"], "black.png: no part is to be drawn"),
        (["--init-image", "cut.png"], "cut.png: cannot be read"),
        (["--init-image", "init.png", "--mask", "cut.png"], "cut.png: cannot be read"),
        (["--init-image", "gone.png"], "there is no"),
        (["--init-image", "init.png", "--strength", "1.5"], "expected 0 (the picture as it is) to 1"),
        (["--init-image", "init.png", "--outpaint", "left=40,right=24"], "leaves 48 x 0 pixels"),
        (["--init-image", "init.png", "--outpaint", "left=0"], "adds nothing"),
        (["--init-image", "init.png", "--outpaint", "top=8", "sampling.inpaint.padding=4"], "one to null"),
        (["--init-image", "init.png", "--mask", "box.png", "--strength-map", "box.png"], "set one to null"),
        (["--init-image", "wide.png", "--mask", "side.png"], "nothing of its mask is left by fit crop"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_weights_are_read(
    sample: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(Pipeline, "open", lambda *a, **k: pytest.fail("weights are read"))
    picture().save(tmp_path / "init.png")
    box().save(tmp_path / "box.png")
    box(24, 32).save(tmp_path / "small.png")
    box(value=0).save(tmp_path / "black.png")
    picture(0, 48, 160).save(tmp_path / "wide.png")
    side = np.zeros((48, 160), np.uint8)
    side[:, :10] = 255
    Image.fromarray(side).save(tmp_path / "side.png")
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    words = [str(tmp_path / word) if word.endswith(".png") else word for word in words]
    done = sample("--prompt", "a cat", *words, "--output-dir", tmp_path / "out")
    assert done.code == 2 and message in done.err, done.err
    assert "Traceback" not in done.err


def test_a_malformed_margin_is_refused(sample: Command) -> None:
    for text in ("left", "left=-4", "up=3", "left=1,left=2", "left=1.5"):
        done = sample("--prompt", "a", "--init-image", "a.png", "--outpaint", text)
        assert done.code == 2 and "expected left=64,top=0" in done.err


def test_a_picture_that_is_fitted_is_told(sample: Command, given, tmp_path: Path) -> None:
    for fit, message in (("crop", "of it cut off"), ("pad", "of the frame padded"), ("stretch", "times")):
        done = sample(
            "--prompt",
            "a",
            "--init-image",
            given(picture(0, 60, 200)),
            "--fit",
            fit,
            "--output-dir",
            tmp_path,
        )
        assert done.code == 0 and f"by fit {fit}" in done.err and message in done.err, done.err


# -- the benchmark's statements, with few pictures


def test_changed_pictures_meet_what_the_benchmark_states() -> None:
    """Its figures with more of them are on docs/edit.md."""
    pipe = sat.Pipeline.from_config([TINY], ["sampling.steps=12", "sampling.fold=false"], device="cpu")
    classifier = Classifier.load(ROOT / "checkpoints" / "tiny_classifier")
    prompts = ["a red apple", "a banana", "a strawberry"]
    box = bench_edit.inpainting(pipe, prompts, classifier)
    assert box.changed_outside == 0 and box.of_text_to_image >= 0.9
    assert box.border <= 1.3 * box.border_unedited
    follow = bench_edit.strengths(pipe, prompts, classifier, [0.0, 0.3, 0.6, 0.9])
    assert follow.spearman == pytest.approx(1) and follow.kept >= 0.9


def test_the_energy_of_a_border_is_that_of_neighbours_across_it() -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[2:6, 3:9] = 40
    pixels[2:6, 3:9:2] = 50
    mask = np.zeros((8, 12), np.uint8)
    mask[2:6, 3:9] = 255
    across = (2 * 4 * 3 * 0 + 4 * 50**2 + 4 * 40**2 + 2 * (3 * 50**2 + 3 * 40**2)) / 20
    inside = 4 * 5 * 10**2 / (4 * 5 + 3 * 6)
    found = bench_edit.border_energy([Image.fromarray(pixels)], Image.fromarray(mask))
    assert found == pytest.approx(across / inside)


def test_a_plain_picture_imports_nothing_of_edits_and_regions() -> None:
    names = "{'sat.sampling.edit', 'sat.mixins.edit', 'sat.mixins.regions'}"
    code = (
        "import sys; from sat import Pipeline; "
        "Pipeline.from_config('configs/debug.yaml', ['sampling.steps=1'], device='cpu')('a cat'); "
        f"sys.exit(bool({names} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
