"""Prompt to picture through CogView4Pipeline and through ours, folders written and read both ways."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogView4ControlPipeline, CogView4Pipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sat.checkpoint import CheckpointError, detect, open_part, save_diffusers, save_native
from sat.checkpoint.format import Part
from sat.checkpoint.save import Options, save_sat
from sat.cli.convert import main as convert_main
from sat.config.check import build
from sat.config.schema import Component
from sat.control.files import read_info
from sat.pipeline import Pipeline
from tests.checkpoints import CONFIG, tokenizer
from tests.small import fill

PROMPT = "a red apple with the green car and a blue tree " * 2
HEIGHT, WIDTH, GUIDANCE, STEPS = 32, 48, 3.0, 7
MODEL: dict[str, Any] = {
    "dim": 32, "heads": 4, "depth": 2, "channels": 4, "text_dim": 24, "emb_dim": 20, "size_dim": 48,
    "rope_size": [16, 16],
}  # fmt: skip
TEXT: dict[str, Any] = {
    "dim": 24, "heads": 6, "kv_heads": 2, "head_dim": 8, "mlp_dim": 40, "depth": 2, "vocab": 400,
    "rotary": 0.5,
}  # fmt: skip
FOURTH: dict[str, Any] = {
    "model": {"target": "sat.models.cogview4.CogView4", "params": MODEL},
    "first_stage": CONFIG["first_stage"],
    "conditioning": {
        "text": {"target": "sat.models.glm.GLMEncoder", "params": TEXT},
        "size": CONFIG["conditioning"]["size"],
        "max_length": 64,
        "empty_prompt": "encoded",
    },
    "diffusion": {
        "schedule": {"target": "sat.diffusion.schedule.FlowMatching", "params": {"base_shift": 0.5}},
        "prediction": {"target": "sat.diffusion.prediction.Flow", "params": {}},
    },
}


def tensors() -> dict[Part, dict[str, Tensor]]:
    found: dict[Part, dict[str, Tensor]] = {}
    sections = {
        "text": FOURTH["conditioning"]["text"],
        "model": FOURTH["model"],
        "first_stage": FOURTH["first_stage"],
    }
    for part, section in sections.items():
        module: nn.Module = build(Component(section["target"], section["params"]))
        fill(module, std=0.3 if part != "text" else 0.5, seed=len(part))
        found[part] = module.state_dict()  # type: ignore[index]
    return found


def glm_json(path: Path) -> Path:
    """A byte-level vocabulary with GLM's special tokens in front of every text."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [PROMPT], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    ids = [(name, made.token_to_id(name)) for name in special[1:]]
    made.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=ids)
    made.save(str(path))
    return path


@pytest.fixture(scope="module", params=["spiece.model", "tokenizer.json"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same random weights as a diffusers folder and as a native one."""
    root = tmp_path_factory.mktemp("pair")
    make = tokenizer if request.param == "spiece.model" else glm_json
    vocabulary, weights = make(root / request.param), tensors()
    save_diffusers(root / "theirs", weights, FOURTH, tokenizer=vocabulary)
    save_native(root / "ours", weights, FOURTH, tokenizer=vocabulary)
    return root / "theirs", root / "ours"


def opened(path: Path) -> Pipeline:
    sections = {**FOURTH, "sampling": {"sampler": {"target": "sat.diffusion.samplers.Euler"}}}
    base = path.parent / "base.yaml"
    base.write_text(yaml.safe_dump(sections))
    extra = [
        "sampling.sizes={min: 16, max: 64, multiple: 16, max_area: 4096}", f"sampling.height={HEIGHT}",
        f"sampling.width={WIDTH}", f"checkpoint.path={path}",
    ]  # fmt: skip
    return Pipeline.from_config([base], extra, device="cpu", dtype="fp32")


@pytest.mark.parametrize("negative", [None, "a blue box"])
def test_the_picture_is_the_same(folders: tuple[Path, Path], negative: str | None) -> None:
    theirs = CogView4Pipeline.from_pretrained(folders[0])
    theirs.set_progress_bar_config(disable=True)
    ours = opened(folders[1])
    shape = ours.generator.engine.latent_shape(HEIGHT, WIDTH)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    picture = theirs(
        PROMPT, negative, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=noise.clone(), max_sequence_length=64, output_type="pt",
    ).images  # fmt: skip
    out = ours([PROMPT], steps=STEPS, guidance=GUIDANCE, latents=noise, negative_prompt=negative)
    assert picture.std() > 0.02  # not flat, not saturated
    assert (picture - ours.generator.engine.decode(out.latents)).abs().max() < 1e-3


def test_prompt_and_negative_differ_in_length_here(folders: tuple[Path, Path]) -> None:
    """So that the test above covers two passes of different text in one of ours."""
    conditioner = opened(folders[1]).generator.engine.conditioner
    assert conditioner.encode([PROMPT]).text.shape[1] > conditioner.encode([""]).text.shape[1] == 16


def test_a_diffusers_folder_is_read_with_its_settings(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sections = detect(folders[0]).config(folders[0])
    assert sections["model"]["params"] == {**MODEL, "patch": 2}
    assert sections["conditioning"]["text"]["params"] == TEXT
    assert (
        sections["conditioning"]["max_length"] == 64 and sections["conditioning"]["empty_prompt"] == "encoded"
    )
    schedule = sections["diffusion"]["schedule"]["params"]
    assert (schedule["base_shift"], schedule["max_shift"]) == (0.5, 0.75)
    assert convert_main([str(folders[0]), str(tmp_path / "back"), "--to", "native"]) == 0
    for part in ("model", "first_stage", "text"):
        with open_part(tmp_path / "back", part) as back, open_part(folders[1], part) as before:
            assert set(back) == set(before)
            assert all(torch.equal(back[name], before[name]) for name in before), part


def test_the_text_encoder_has_one_layer_more_in_diffusers(folders: tuple[Path, Path]) -> None:
    config = json.loads((folders[0] / "text_encoder" / "config.json").read_text())
    assert config["num_hidden_layers"] == TEXT["depth"] + 1
    with open_part(folders[0], "text") as theirs:
        last = {name: theirs[name] for name in theirs if name.startswith("layers.2.")}
    assert last and all(bool((value == ("norm" in name)).all()) for name, value in last.items())


def test_sat_and_megatron_names_are_read_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights = tensors()
    save_sat(tmp_path / "sat", weights, FOURTH)
    for part in ("model", "text"):
        assert (
            convert_main([str(tmp_path / "sat"), str(tmp_path / part), "--to", "native", "--only", part]) == 0
        )
        with open_part(tmp_path / part, part) as back:
            assert all(torch.equal(back[name], weights[part][name]) for name in back)
            assert len(back) == len(weights[part])


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("transformer/config.json", "out_channels", 3, "neither out_channels 3 nor twice as many"),
        ("scheduler/scheduler_config.json", "time_shift_type", "exponential", "only 'linear' is supported"),
        ("transformer/config.json", "rope_axes_dim", [4], "expected two positive whole numbers"),
        ("model_index.json", "_class_name", "FluxPipeline", "CogView4Pipeline can be read"),
    ],
)
def test_other_folders_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, place: str, key: str, value: object, message: str
) -> None:
    for file in folders[0].rglob("*.json"):
        copy = tmp_path / file.relative_to(folders[0])
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    content = json.loads((tmp_path / place).read_text())
    (tmp_path / place).write_text(json.dumps({**content, key: value}))
    with pytest.raises(CheckpointError, match=message):
        detect(tmp_path).config(tmp_path)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogView4-Control of random weights, whose autoencoder has next to no randomness, as ours has none."""
    folder, weights = tmp_path_factory.mktemp("control"), tensors()
    weights["first_stage"] = {name: value.clone() for name, value in weights["first_stage"].items()}
    rows = slice(MODEL["channels"], None)  # the posterior's logarithm of the variance
    weights["first_stage"]["encoder.head.weight"][rows] = 0
    weights["first_stage"]["encoder.head.bias"][rows] = -30
    g = torch.Generator().manual_seed(5)
    weight = 0.3 * torch.randn(MODEL["dim"], 4 * MODEL["channels"], generator=g)
    options = Options(control=weight)
    return save_diffusers(
        folder / "theirs", weights, FOURTH, tokenizer=tokenizer(folder / "s.model"), options=options
    )


def test_a_control_pipelines_picture_is_the_same(control: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = CogView4ControlPipeline.from_pretrained(control)
    assert theirs.transformer.config.in_channels == 2 * MODEL["channels"]
    theirs.set_progress_bar_config(disable=True)
    ours = opened(control)
    noise = torch.randn(1, *ours.generator.engine.latent_shape(HEIGHT, WIDTH), generator=torch.manual_seed(3))
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.manual_seed(4), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    picture = theirs(
        PROMPT, control_image=image, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
        max_sequence_length=64, guidance_scale=GUIDANCE, latents=noise.clone(), output_type="pt",
    ).images  # fmt: skip
    drawn = {"steps": STEPS, "guidance": GUIDANCE, "latents": noise}
    with caplog.at_level("WARNING"):
        out = ours([PROMPT], controls=[{"control": control, "image": image}], **drawn)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    without = ours([PROMPT], **drawn)
    decode = ours.generator.engine.decode
    assert (picture - decode(out.latents)).abs().max() < 1e-3
    assert (picture - decode(without.latents)).abs().max() > 0.05


def test_a_control_of_another_network_is_told(
    control: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tensors()
    weights["model"]["transformer.mixins.patch_embed.proj.weight"] *= 1.1
    other = opened(
        save_native(tmp_path / "other", weights, FOURTH, tokenizer=tokenizer(tmp_path / "s.model"))
    )
    other.controls.load(control)
    assert "was trained on other weights of the same shapes" in caplog.text


def test_a_control_folder_goes_to_native_and_back(control: Path, tmp_path: Path) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    assert convert_main([str(control), str(native), "--to", "native"]) == 0
    assert read_info(native / "control").base.params["channels"] == MODEL["channels"]
    words = ["--to", "diffusers", "--model", str(native)]
    assert convert_main([str(native / "control"), str(back), *words]) == 0
    assert convert_main([str(control), str(tmp_path / "again"), "--to", "diffusers"]) == 0
    for made in (back, tmp_path / "again"):
        for part in ("transformer", "vae"):
            name = f"{part}/diffusion_pytorch_model.safetensors"
            before, after = (load_file(folder / name) for folder in (control, made))
            assert set(before) == set(after)
            assert all(torch.equal(before[key], after[key]) for key in before), part
        for name in ("model_index.json", "transformer/config.json"):
            assert json.loads((made / name).read_text()) == json.loads((control / name).read_text())


def test_a_control_is_not_written_where_it_has_no_place(
    control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_main([str(control), str(tmp_path / "a"), "--to", "sat"]) == 2
    assert "no place for its control's picture" in capsys.readouterr().err
    assert convert_main([str(control), str(tmp_path / "n"), "--to", "native"]) == 0
    words = ["--to", "diffusers"]
    assert convert_main([str(tmp_path / "n" / "control"), str(tmp_path / "b"), *words]) == 2
    assert "is a control of CogView4: name the model" in capsys.readouterr().err


def test_what_diffusers_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    flow = {"target": "sat.diffusion.prediction.FlowFromV"}
    other = {**FOURTH, "diffusion": {**FOURTH["diffusion"], "prediction": flow}}
    with pytest.raises(CheckpointError, match="needs FlowMatching and Flow"):
        save_diffusers(tmp_path / "a", tensors(), other)
    model = {**FOURTH["model"], "params": {**MODEL, "guidance_dim": 8}}
    with pytest.raises(CheckpointError, match="no place for a guidance strength"):
        save_diffusers(tmp_path / "b", tensors(), {**FOURTH, "model": model})
