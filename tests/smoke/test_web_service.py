"""The service behind page and API, on toy models: the same pictures as sample.py's, LoRA, relay, previews."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sat import Pipeline
from sat.adapters.write import write
from sat.apps.web.job_queue import Job
from sat.apps.web.preview import LatentPreview
from sat.apps.web.request import ControlUse, GenerationRequest, RequestError, Settings, settings_of
from sat.apps.web.service import GenerationService, fitted
from sat.cli.sample import main
from sat.config.build import adaptable
from sat.config.cascade import load_cascade
from sat.config.schema.base import SizeError
from sat.control.base import ControlError
from sat.sampling.output import GridAxis
from tests.adapters import adapter, noisy, start
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT

pytest.importorskip("gradio", reason="the web page is an extra")

TOY = ROOT / "tests" / "assets" / "toy"
REQUEST = GenerationRequest("a cat", 32, 48, 3, 2.5, 5, 2)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    spiece = tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")
    return [f"conditioning.tokenizer={spiece}", "parallel.device=cpu", "sampling.pack=true"]


@pytest.fixture(scope="module")
def style(words, tmp_path_factory) -> Path:
    """A folder with an adapter for the toy base model, and something else."""
    folder = tmp_path_factory.mktemp("lora")
    whole = [*words, "sampling.pack=false"]  # as in training: packed layers take no adapter
    pipe = Pipeline.from_config([DEBUG, TOY / "base.yaml"], whole, device="cpu")
    model = adaptable(pipe.generator.engine)["model"]
    layers = noisy(start(model, ["attention"]), std=1.0)
    write(folder / "fur", adapter(layers), "native", {"model": model})
    (folder / "notes.txt").write_text("not an adapter")
    return folder


@pytest.fixture
def service(words, style, tmp_path) -> GenerationService:
    cascade = load_cascade([TOY / "cascade.yaml"], words)
    return GenerationService(cascade, tmp_path / "web", "toy", adapters=style).open()


def drawn(service: GenerationService, job: Job) -> list[Path]:
    return job.work(job)


def sample(words: list[str], *more: object) -> None:
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    try:
        assert main([*words, *map(str, more)]) == 0
    finally:
        logging.getLogger().handlers[:] = handlers
        signal.signal(signal.SIGTERM, term)


def test_pictures_are_the_files_that_sample_py_writes(service, words, tmp_path) -> None:
    """Pixels and text fields: through all stages at once, and one picture enlarged by hand."""
    asked = ("--prompt", "a cat", "--steps", 3, "--guidance", 2.5, "--seed", 5, "--batch-size", 2)
    sample(
        words, "--base", TOY / "cascade.yaml", *asked, "--output-dir", tmp_path / "cli", "cascade.keep=true"
    )
    job = service.job(REQUEST, whole=True)
    large = drawn(service, job)
    assert [path.name for path in large] == ["000000000.png", "000000001.png"]
    theirs = [tmp_path / "cli" / "0_a_cat" / path.name for path in large]
    assert [path.read_bytes() for path in large] == [path.read_bytes() for path in theirs]
    assert job.view().step == job.view().steps == 2 * (3 + 3)
    small = drawn(service, service.job(REQUEST))
    before = [tmp_path / "cli" / "stages" / "base" / "0_a_cat" / path.name for path in small]
    assert [path.read_bytes() for path in small] == [path.read_bytes() for path in before]
    (again,) = drawn(service, service.enlarging([service.pictures.name(small[1])]))
    assert again.read_bytes() == large[1].read_bytes()
    assert [p.split("_")[0] for p in service.pictures.newest(9)] == ["3", "2", "2", "1", "1", "0", "0"]


def test_requests_that_are_alike_are_drawn_together_and_stay_what_they_are(words, style, tmp_path) -> None:
    """Base and relay, several prompts, seeds and numbers in one pass: pictures and texts of each alone."""
    cascade = load_cascade([TOY / "cascade.yaml"], [*words, "sampling.at_once=4"])
    service = GenerationService(cascade, tmp_path / "web", "toy", adapters=style).open()
    asked = [
        GenerationRequest("a cat", 32, 48, 3, 2.5, 5, 2),
        GenerationRequest("a red dog", 32, 48, 3, 2.5, 9),
        GenerationRequest("a cat", 32, 48, 3, 2.5, 2**32 - 1),
    ]
    jobs = [service.job(request, whole=True) for request in asked]
    assert len({job.batch.key for job in jobs}) == 1 and [job.batch.most for job in jobs] == [4] * 3
    passes = []
    network = service._open(0).pipeline.generator.engine.network
    handle = network.register_forward_hook(lambda *_: passes.append(1))
    jobs[0].batch.draw(jobs)
    handle.remove()
    assert len(passes) == 3, "one pass a step for all"
    assert [job.view().step for job in jobs] == [6, 6, 6]
    for job, request in zip(jobs, asked, strict=True):
        alone = drawn(service, service.job(request, whole=True))
        assert len(job.pictures) == len(alone) == request.count
        for one, other in zip(job.pictures, alone, strict=True):
            assert settings_of(one) == settings_of(other)
            ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (one, other))
            assert abs(ours - theirs).max() <= 1, "products of other shapes round differently"
    differing = [
        service.job(GenerationRequest("a cat", 32, 48, 4, 2.5, 5), whole=True),
        service.job(GenerationRequest("a cat", 32, 48, 3, 2.5, 5, negative_prompt="x"), whole=True),
        service.job(GenerationRequest("a cat", 32, 48, 3, 2.5, 5)),
        service.job(GenerationRequest("a cat", 32, 48, 3, 2.5, 5, adapters={"fur": 0.5}), whole=True),
    ]
    assert jobs[0].batch.key not in {job.batch.key for job in differing}


def test_a_lora_counts_as_much_as_its_strength(service, words, style, tmp_path) -> None:
    def with_fur(**strengths: float) -> Path:
        request = GenerationRequest("a cat", 32, 48, 3, 2.5, 5, adapters=strengths)
        return drawn(service, service.job(request))[0]

    plain, half, none = with_fur(), with_fur(fur=0.5), with_fur(fur=0.0)
    assert _pixels(plain) == _pixels(none) != _pixels(half)
    assert plain.read_bytes() == none.read_bytes()
    base = (
        "--base",
        DEBUG,
        TOY / "base.yaml",
        "--lora",
        f"{style / 'fur'}:0.5",
        "--output-dir",
        tmp_path / "cli",
    )
    sample(words, *base, "--prompt", "a cat", "--steps", 3, "--guidance", 2.5, "--seed", 5)
    assert half.read_bytes() == (tmp_path / "cli" / "0_a_cat" / "000000000.png").read_bytes()
    again, notes = fitted(settings_of(half), service)
    assert (again, notes) == (GenerationRequest("a cat", 32, 48, 3, 2.5, 5, adapters={"fur": 0.5}), [])
    assert fitted(settings_of(plain), service)[0].adapters == {}
    with pytest.raises(RequestError, match="there is no LoRA 'silk'; there are fur"):
        service.job(GenerationRequest("a cat", 32, 48, 3, 2.5, 5, adapters={"silk": 1.0}))


def _pixels(path: Path) -> bytes:
    return np.asarray(Image.open(path)).tobytes()


def test_what_cannot_be_drawn_is_refused_before_it_waits(service) -> None:
    with pytest.raises(SizeError, match="The nearest size is 32 x 48"):
        service.job(GenerationRequest("a cat", 33, 48, 3, 2.5, 5))
    assert service.enlarger((32, 48)) == 1 and service.enlarger((33, 48)) is None
    with pytest.raises(RequestError, match="no such picture"):
        service.enlarging(["../x/000000000.png"])


def test_settings_of_another_model_are_fitted_and_told(service) -> None:
    said = Settings("a cat", "rain", 1024, 1000, 500, 7.0, 3, "CogView3Plus big", {"silk": 1.0, "fur": 9.0})
    request, notes = fitted(said, service)
    assert (request.prompt, request.negative_prompt, request.seed, request.guidance) == (
        "a cat",
        "rain",
        3,
        7.0,
    )
    assert service.sizes.allows(request.height, request.width) and request.steps == 200
    assert "1024 x 1000 is not possible" in notes[0] and "CogView3Plus big" in notes[1]
    assert notes[2] == "It was drawn with the LoRA silk, which is not offered here."
    assert request.adapters == {"fur": service.limits.strength}
    service.check(request)
    (path,) = drawn(service, service.job(GenerationRequest("a cat", 32, 48, 3, 2.5, 5)))
    assert fitted(settings_of(path), service) == (GenerationRequest("a cat", 32, 48, 3, 2.5, 5), [])


def test_the_preview_is_near_what_is_decoded() -> None:
    """Of the small model that ships: the colour of every cell of a real drawing, half-way and at its end."""
    pipe = Pipeline.from_config(ROOT / "configs" / "tiny.yaml", device="cpu")
    preview = LatentPreview.fit(pipe.generator.engine)
    seen: list[torch.Tensor] = []
    out = pipe("a red apple", seed=0, steps=10, callback=lambda i, n, z: seen.append(z.clone()))
    factor = pipe.generator.engine.first_stage.factor
    for latents in (seen[5], out.latents):
        true = F.avg_pool2d(pipe.generator.engine.decode(latents), factor)
        near = preview.colours(latents)
        assert near.shape == true.shape
        assert torch.corrcoef(torch.stack([near.flatten(), true.flatten()]))[0, 1] > 0.85
        assert (near - true).abs().mean() < 0.12
    assert preview.images(out.latents)[0].size == (8, 8)


def test_a_sampler_of_the_page_is_the_one_of_the_config(service, words, tmp_path) -> None:
    assert service.sampler in service.samplers and len(service.samplers) >= 7
    request = replace(REQUEST, count=1, sampler="Heun")
    (drawn_here,) = drawn(service, service.job(request))
    base = ("--base", DEBUG, TOY / "base.yaml", "--output-dir", tmp_path / "cli")
    asked = ("--prompt", "a cat", "--steps", 3, "--guidance", 2.5, "--seed", 5)
    sample(words, *base, *asked, "sampling.sampler={target: sat.diffusion.samplers.Heun}")
    assert _pixels(drawn_here) == _pixels(tmp_path / "cli" / "0_a_cat" / "000000000.png")
    known = settings_of(drawn_here)
    assert known.more["sampler"] == "Heun" and fitted(known, service)[0].sampler == "Heun"
    (usual,) = drawn(service, service.job(replace(request, sampler="")))
    assert "sampler" not in settings_of(usual).more and _pixels(usual) != _pixels(drawn_here)
    with pytest.raises(RequestError, match="there is no sampler 'Magic'; there are DDIM, Euler"):
        service.job(replace(request, sampler="Magic"))


def test_a_grid_is_a_sheet_of_pictures_that_are_drawn_alone_too(service) -> None:
    axes = [GridAxis("seed", [5, 6]), GridAxis("steps", [2, 3])]
    job = service.grid(replace(REQUEST, count=4), axes, whole=True)
    sheet, *cells = drawn(service, job)
    assert job.view().step == job.view().steps == 2 * (2 + 3) + 4 * 3
    assert [(settings_of(p).seed, settings_of(p).more.get("grid")) for p in cells] == [
        (5, None), (5, None), (6, None), (6, None)
    ]  # fmt: skip
    assert settings_of(sheet).more["grid"] == "seed=5,6 steps=2,3" and sheet.parent.name.endswith("_grid")
    alone = drawn(service, service.job(replace(REQUEST, count=1, seed=6), whole=True))
    assert _pixels(cells[3]) == _pixels(alone[0])
    assert set(job.origins) == set(cells)
    with pytest.raises(RequestError, match="the grid has 64 pictures, more than 36"):
        service.grid(REQUEST, [GridAxis("seed", list(range(8))), GridAxis("steps", list(range(1, 9)))])


def test_a_few_step_lora_sets_steps_and_refuses_others(tmp_path) -> None:
    shutil.copytree(ROOT / "checkpoints" / "tiny_turbo", tmp_path / "loras" / "turbo")
    cascade = load_cascade([ROOT / "configs" / "tiny.yaml"], ["parallel.device=cpu"])
    service = GenerationService(cascade, tmp_path / "web", "tiny", adapters=tmp_path / "loras").open()
    usual = GenerationRequest("a red apple", 64, 64, 50, 3.0, 0, adapters={"turbo": 1.0})
    for steps, made in ((50, 1), (2, 2)):  # what nobody chose, and a choice
        (path,) = drawn(service, service.job(replace(usual, steps=steps)))
        assert settings_of(path).steps == made
    with pytest.raises(RequestError, match=r"was distilled \(consistency\) to 1, 2, 3 or 4 steps"):
        service.job(replace(usual, steps=8))
    with pytest.raises(RequestError, match="guidance 3 is in the weights"):
        service.job(replace(usual, guidance=5.0))


def test_the_control_that_ships_is_offered_and_draws_as_from_python(tmp_path) -> None:
    bases = [ROOT / "configs" / "tiny.yaml"]
    settings = [
        "parallel.device=cpu",
        "sampling.attention=torch",
        "sampling.pack=false",
        "sampling.fold=false",
    ]
    service = GenerationService(load_cascade(bases, settings), tmp_path / "web", "tiny").open()
    assert list(service.controls) == ["edges"]
    lion = Image.open(ROOT / "data" / "emoji_sample" / "noto" / "lion.png")
    request = GenerationRequest(
        "a lion", 64, 64, 2, 3.0, 5, control=ControlUse("edges", lion, preprocess=True)
    )
    (steered,) = drawn(service, service.job(request))
    pipe = Pipeline.from_config(bases, settings, device="cpu")
    control = {
        "control": ROOT / "checkpoints/tiny_control/edges.safetensors",
        "image": lion,
        "preprocess": True,
    }
    theirs = pipe("a lion", seed=5, steps=2, controls=[control]).images[0]
    assert _pixels(steered) == theirs.tobytes()
    (plain,) = drawn(service, service.job(replace(request, control=None)))
    assert _pixels(plain) == pipe("a lion", seed=5, steps=2).images[0].tobytes() != theirs.tobytes()
    assert "edges at 1" in settings_of(steered).more["control"]
    outlines = service.control_picture("edges", lion, 64, 64)
    assert outlines is not None and {colour for _, colour in outlines.getcolors()} == {(0,) * 3, (255,) * 3}
    for use in (ControlUse("depth", lion), ControlUse("", lion)):
        with pytest.raises(RequestError, match="there is no control '.*'; there are edges"):
            service.job(replace(request, control=use))
    other = load_cascade([DEBUG, TOY / "base.yaml"], ["parallel.device=cpu"])
    with pytest.raises(ControlError, match="another model"):
        GenerationService(
            other, tmp_path / "o", "o", controls=[ROOT / "checkpoints/tiny_control/edges.safetensors"]
        )
