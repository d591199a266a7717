"""Distilled weights bring steps, sampler, guidance and levels; what they are not for is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sat.adapters.files import Distilled, distilled, read
from sat.adapters.write import write, write_native
from sat.apps.evaluate.classifier import Classifier, score
from sat.cli.convert import main as convert
from sat.config import schema
from sat.config.build import build_empty, components
from sat.config.few_steps import FewStepError, predicted, settle_few_steps
from sat.config.load import load, load_full
from sat.config.schema import Experiment, LoadConfig, RuleError
from sat.config.yaml_source import ConfigError
from sat.diffusion.distillation import few_levels
from sat.diffusion.process import Process
from sat.diffusion.schedule import Discrete, FlowMatching
from sat.pipeline import Pipeline
from tests.adapters import about, adapter, noisy, start
from tests.configs import ROOT

TINY = "configs/tiny.yaml"
TURBO_FILE = "checkpoints/tiny_turbo"
EDGES = ROOT / "checkpoints/tiny_control/edges.safetensors"
LEVELS = {"1": [999.0], "2": [999.0, 499.0], "4": [999.0, 749.0, 499.0, 249.0]}
TURBO = Distilled(method="dmd2", steps=[1, 2, 4], levels=LEVELS, guidance=3.0)
TURBO_V = TURBO.model_copy(update={"prediction": "v"})
GUIDED = Distilled(method="rcm", steps=[2, 1], levels={}, guidance=[1.0, 5.0])
LEADING = Distilled(method="dmd2", steps=[4], levels={"4": [750.0, 500.0, 250.0, 0.0]}, guidance=3.0)


@pytest.fixture(scope="module")
def plain() -> Experiment:
    return load([TINY])


@pytest.fixture(scope="module")
def files(plain: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the small model by their names, with what they were distilled to."""
    folder = tmp_path_factory.mktemp("adapters")
    network = build_empty(plain.model, plain.imports).to_empty(device="cpu")
    layers = {f"model.{name}": layer for name, layer in noisy(start(network, ["attention"])).items()}
    for name, few in {"turbo": TURBO, "guided": GUIDED, "leading": LEADING, "style": None}.items():
        write_native(folder / f"{name}.safetensors", layers, replace(about(), distilled=few))
    return folder


def using(plain: Experiment, files: Path, *names: str, strength: float = 1.0, **sampling: Any) -> Experiment:
    loaded = [LoadConfig(files / f"{name}.safetensors", strength) for name in names]
    adapters = replace(plain.adapters, load=loaded)
    return replace(plain, adapters=adapters, sampling=replace(plain.sampling, **sampling))


def test_a_turbo_file_beside_a_style_sets_steps_sampler_and_guidance(plain: Experiment, files: Path) -> None:
    made, told = settle_few_steps(using(plain, files, "style", "turbo"))
    s = made.sampling
    assert (s.steps, s.trained_steps) == (1, [1, 2, 4])
    assert s.sampler.target.endswith("Renoise") and s.guider.target.endswith("Unguided")
    (line,) = told
    said = "was distilled (dmd2) to 1, 2 or 4 steps: 1 step with Renoise, guidance 3 is in its weights"
    assert line == f"turbo.safetensors {said}"


def test_without_a_distilled_file_nothing_changes(plain: Experiment, files: Path) -> None:
    given = using(plain, files, "style")
    assert settle_few_steps(given) == (given, [])
    off = using(plain, files, "turbo", strength=0.0)
    assert settle_few_steps(off) == (off, [])


def test_a_number_of_steps_in_the_list_wins(plain: Experiment, files: Path) -> None:
    turbo = f"adapters.load=[{{path: {files / 'turbo.safetensors'}}}]"
    assert load([TINY], [turbo, "sampling.steps=2"]).sampling.steps == 2
    assert load([TINY], [turbo]).sampling.steps == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampling.steps=3", "3: turbo.safetensors was distilled (dmd2) to 1, 2 or 4 steps"),
        ("sampling.steps=50", "was distilled (dmd2) to 1, 2 or 4 steps"),
        (
            "sampling.guider.params.scale=5",
            "5: guidance 3 is in the weights of turbo.safetensors",
        ),
    ],
)
def test_what_a_turbo_file_was_not_trained_for_is_refused(setting: str, message: str, files: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load([TINY], [f"adapters.load=[{{path: {files / 'turbo.safetensors'}}}]", setting])
    assert message in str(error.value)


def test_later_changes_are_held_against_the_list(plain: Experiment, files: Path) -> None:
    made = settle_few_steps(using(plain, files, "turbo"))[0].sampling
    assert replace(made, steps=4).steps == 4  # as a call of a pipeline, or a request
    with pytest.raises(RuleError, match="distilled to 1, 2, 4 steps, got 8"):
        replace(made, steps=8)


def test_two_turbo_files_contradict_each_other(plain: Experiment, files: Path) -> None:
    with pytest.raises(FewStepError, match=r"\(dmd2\) and .*guided.safetensors \(rcm\) are both"):
        settle_few_steps(using(plain, files, "turbo", "guided"))


def test_a_learned_range_of_guidance_is_an_input(plain: Experiment, files: Path) -> None:
    guided = using(plain, files, "guided")
    made, (line,) = settle_few_steps(guided)
    assert made.sampling.guider.target.endswith("Embedded") and made.sampling.guider.params == {"scale": 3.0}
    assert "2 steps with Renoise, guidance 3 is an input" in line
    wide = replace(guided.sampling, guider=replace(guided.sampling.guider, params={"scale": 9.0}))
    with pytest.raises(FewStepError, match="learned strengths of 1 to 5"):
        settle_few_steps(replace(guided, sampling=wide), lambda key: key[-1] == "scale")


def test_the_file_that_ships_draws_what_is_asked_for_in_one_step(plain: Experiment) -> None:
    """Five captions; docs/distill.md has the scores of all lists."""
    captions = ["a red apple", "a blue heart", "lion, noto style", "a pizza", "rocket, twemoji style"]
    pipe = Pipeline.from_config(ROOT / TINY, [f"adapters.load=[{{path: {ROOT / TURBO_FILE}}}]"], device="cpu")
    assert pipe.experiment.sampling.steps == 1
    sizes = [p.numel() for p in pipe.generator.engine.network.parameters()]
    found = read(ROOT / TURBO_FILE, {"model": build_empty(plain.model, plain.imports)})
    factors = sum(p.down.numel() + p.up.numel() for layer in found.layers.values() for p in layer.parts if p)
    assert factors <= 0.05 * (sum(sizes) - factors)
    judge = Classifier.load(ROOT / "checkpoints/tiny_classifier")
    assert score(pipe(captions, seed=0).images, captions, judge).top1 >= 0.8
    with pytest.raises(RuleError, match="distilled to 1, 2, 3, 4 steps, got 8"):
        pipe("a red apple", steps=8)


def picture(*settings: str) -> torch.Tensor:
    """A latent of "a red apple" of the small model, in float32."""
    pipe = Pipeline.from_config(ROOT / TINY, list(settings), device="cpu", dtype="fp32")
    return torch.from_numpy(np.asarray(pipe("a red apple", seed=1).images[0], dtype=np.float32))


def test_a_turbo_file_and_a_style_at_its_strength_act_together(files: Path, plain: Experiment) -> None:
    """As the network with both changes in its weights; alone, each gives another picture."""
    style, turbo = f"{{path: {files / 'style.safetensors'}, strength: 0.8}}", f"{{path: {ROOT / TURBO_FILE}}}"
    both = picture(f"adapters.load=[{style}, {turbo}]")
    alone = picture(f"adapters.load=[{turbo}]")
    merged = picture(f"adapters.load=[{style}, {turbo}]", "adapters.merge=true")
    assert (both - alone).abs().mean() > 1 and (both - merged).abs().mean() < 0.1


@pytest.mark.parametrize("own", [None, "v"])
def test_a_merged_turbo_file_says_in_the_folder_what_it_is_for(
    own: str | None, files: Path, plain: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turbo, style = ROOT / TURBO_FILE, files / "style.safetensors"
    if own is not None:
        found = read(turbo, {"model": build_empty(plain.model, plain.imports)})
        few = found.info.distilled.model_copy(update={"prediction": own})  # type: ignore[union-attr]
        turbo = files / "own.safetensors"
        write_native(turbo, found.layers, replace(found.info, distilled=few))
    words = [str(ROOT / "checkpoints/tiny"), str(tmp_path / "out"), "--to", "native", "--only", "model"]
    assert convert([*words, "--merge-lora", str(turbo), "--merge-lora", f"{style}:0.8"]) == 0
    merged = [f"checkpoint.model={tmp_path / 'out'}"]
    loaded = load_full([ROOT / TINY], merged)
    assert loaded.experiment.sampling.trained_steps == [1, 2, 3, 4]
    assert (loaded.experiment.diffusion.prediction.target[-14:] == "Preconditioned") == (own is not None)
    both = f"adapters.load=[{{path: {style}, strength: 0.8}}, {{path: {turbo}}}]"
    assert (picture(*merged) - picture(both)).abs().mean() < 0.1
    again = [str(tmp_path / "out"), str(tmp_path / "twice"), "--to", "native", "--merge-lora", str(turbo)]
    assert convert(again) == 2
    assert "the checkpoint is distilled already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def turbo() -> Pipeline:
    """The small model in one step, with the small control beside it."""
    settings = [f"adapters.load=[{{path: {ROOT / TURBO_FILE}}}]"]
    return Pipeline.from_config(ROOT / TINY, settings, device="cpu", dtype="fp32")


def pixels(pipe: Pipeline, **given: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pipe("a lion", seed=1, **given).images[0], dtype=np.float32))


def test_a_control_acts_on_one_step_by_the_noise_that_the_step_looks_at(
    turbo: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranges of steps would leave the only one out wherever they end before 1."""
    edges = {"control": EDGES, "image": Image.new("RGB", (64, 64), "white"), "scale": 2.0}
    with caplog.at_level("WARNING"):
        plain, early = pixels(turbo), pixels(turbo, controls=[{**edges, "end": 0.8}])
        assert (early - plain).abs().mean() > 0.5 and not caplog.messages
        assert torch.equal(pixels(turbo, controls=[{**edges, "start": 0.3}]), plain)
    assert "acts from 0.3 to 1 of the noise range and changes nothing: this run looks at 0" in caplog.text
    late = pixels(turbo, controls=[{**edges, "start": 0.3}], steps=4)
    assert (late - pixels(turbo, steps=4)).abs().mean() > 0.1


def test_a_picture_is_changed_in_one_step_as_far_as_its_noise_says(turbo: Pipeline) -> None:
    """Counted in steps, any strength is the whole of one step."""
    given = turbo("a red apple", seed=3).images[0]
    kept = torch.from_numpy(np.asarray(given, dtype=np.float32))
    away = [
        float((pixels(turbo, image=given, strength=strength) - kept).abs().mean())
        for strength in (0.2, 0.5, 0.9, 1.0)
    ]
    assert away == sorted(away) and away[0] < 0.5 * away[-1], away
    assert torch.equal(pixels(turbo, image=given, strength=1.0), pixels(turbo))


def test_the_spacing_follows_the_levels_of_training(plain: Experiment, files: Path) -> None:
    made, _ = settle_few_steps(using(plain, files, "leading"))
    assert made.diffusion.schedule.params["spacing"] == "leading"


def test_few_steps_trail_where_the_schedules_own_last_step_is_a_sliver() -> None:
    """CogView4's linspace visits timesteps 1000 and 1 in two steps; a student's file has 1000 and 500."""
    flow, process = FlowMatching(), Process()
    assert [level.timestep for level in flow.levels(2)[:-1]] == [1000, 1]
    assert [level.timestep for level in few_levels(process, flow, 2)[:-1]] == [1000, 500]
    assert few_levels(process, flow, 1)[:-1] == flow.levels(1)[:-1]
    assert flow.spacing == "linspace"
    assert few_levels(process, Discrete(), 4) == Discrete().levels(4)


def test_a_distilled_folder_says_it_in_its_manifest(plain: Experiment, tmp_path: Path) -> None:
    manifest = json.loads(Path("checkpoints/tiny/manifest.json").read_text())
    manifest["config"]["distilled"] = TURBO.model_dump()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    loaded = load_full([TINY], [f"checkpoint.model={tmp_path}"])
    assert loaded.experiment.sampling.steps == 1
    assert any("distilled (dmd2) to 1, 2 or 4 steps" in line for line in loaded.notices)
    with pytest.raises(ConfigError, match="to 1, 2 or 4 steps"):
        load([TINY], [f"checkpoint.model={tmp_path}", "sampling.steps=8"])


def test_a_students_own_prediction_comes_from_its_file_for_pictures_and_trainings(
    plain: Experiment, files: Path
) -> None:
    name = "turbo_v.safetensors"
    found = read(files / "turbo.safetensors", {"model": build_empty(plain.model, plain.imports)})
    write_native(files / name, found.layers, replace(found.info, distilled=TURBO_V))
    assert distilled(files / name) == TURBO_V
    turbo = [f"adapters.load=[{{path: {files / name}}}]"]
    for loaded in (load_full([TINY], turbo), load_full([TINY], turbo, samples=False)):
        made = loaded.experiment.diffusion.prediction
        assert (made.target, made.params["to"]) == ("sat.diffusion.prediction.Preconditioned", "v")
        assert made.params["base"] == schema.plain(plain.diffusion.prediction)
        again = settle_few_steps(loaded.experiment)[0]  # as a recorded config is read once more
        assert again.diffusion.prediction == made
        assert type(components(again).prediction.base).__name__ == "V"  # type: ignore[attr-defined]


def test_a_folder_of_another_prediction_is_drawn_and_trained_in_it(tmp_path: Path) -> None:
    manifest = json.loads(Path("checkpoints/tiny/manifest.json").read_text())
    manifest["config"]["distilled"] = TURBO_V.model_dump()
    before = load([TINY])
    after = predicted(before, TURBO_V)
    manifest["config"]["diffusion"] = schema.plain(after.diffusion)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for samples in (True, False):
        loaded = load_full([TINY], [f"checkpoint.model={tmp_path}"], samples=samples)
        assert loaded.experiment.diffusion.prediction == after.diffusion.prediction


@pytest.mark.parametrize(("name", "steps"), [("tiny_base_distill", 4), ("tiny_relay_distill", 1)])
def test_the_distilled_folders_that_ship_refuse_other_steps(name: str, steps: int) -> None:
    config = ROOT / "configs" / f"{name}.yaml"
    loaded = load_full([config])
    assert loaded.experiment.sampling.trained_steps == [steps] and not loaded.notices
    with pytest.raises(ConfigError, match=f"distilled .progressive. to {steps} step"):
        load([config], ["sampling.steps=8"])


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_other_layouts_carry_it(layout: str, plain: Experiment, files: Path, tmp_path: Path) -> None:
    network = build_empty(plain.model, plain.imports)
    found = read(files / "turbo.safetensors", {"model": network})
    assert found.info.distilled == TURBO
    write(tmp_path / "out", found, layout, {"model": network})
    assert distilled(tmp_path / "out") == TURBO
    assert adapter({}).info.distilled is None
