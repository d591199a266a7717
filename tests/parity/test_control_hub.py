"""Controls of CogView3-Plus as folders for diffusers: opened where our code is not, the same pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from sat.cli.convert import main as convert
from sat.config.schema import Component
from sat.control.base import BaseModel
from sat.control.controlnet import controlnet
from sat.control.files import ControlInfo, fingerprint, write
from sat.control.light import Blockwise, concat
from sat.control.reference import Reference
from sat.pipeline import Pipeline
from tests.parity.test_end_to_end import GUIDANCE, HEIGHT, PROMPT, STEPS, WIDTH, our_pipeline
from tests.small import fill

KINDS: dict[str, tuple[str, dict[str, object], Callable[..., torch.nn.Module]]] = {
    "controlnet": ("sat.control.controlnet.controlnet", {"blocks": 1}, controlnet),
    "shared": ("sat.control.controlnet.controlnet", {"blocks": 2, "share_adaln": True}, controlnet),
    "blockwise": ("sat.control.light.Blockwise", {"hidden": 12}, Blockwise),
    "pixels": ("sat.control.light.Blockwise", {"hidden": 12, "input": "pixels", "cell": 4}, Blockwise),
    "concat": ("sat.control.light.concat", {}, concat),
    "net-pixels": (
        "sat.control.controlnet.controlnet",
        {"blocks": 1, "input": "pixels", "cell": 4},
        controlnet,
    ),
    "concat-pixels": ("sat.control.light.concat", {"input": "pixels", "cell": 4}, concat),
}
CALLS: list[dict[str, float | bool]] = [
    {"scale": 0.8},
    {"scale": 0.8, "start": 0.1, "end": 0.6},
    {"scale": 0.5, "guess": True},
    {"scale": 0.0},
]
PEER = """
import json, sys
sys.modules["sat"] = None  # importing it is an error
import torch
from PIL import Image
from diffusers import DiffusionPipeline

given = json.load(open("given.json"))
noise, out = torch.load("noise.pt"), {}
for kind in given["kinds"]:
    for place in (kind, kind + "-copy"):
        pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        if place == kind:
            pipe.save_pretrained(kind + "-copy")
        for number, call in enumerate(given["calls"] if place == kind else given["calls"][:1]):
            names = {"scale": "controlnet_conditioning_scale", "start": "control_guidance_start",
                     "end": "control_guidance_end", "guess": "guess_mode"}
            own = {names[key]: value for key, value in call.items()}
            out[f"{place} {number}"] = pipe(
                **given["common"], latents=noise.clone(), output_type="pt",
                control_image=Image.open("picture.png"), **own
            ).images
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    out[f"{kind}-offload 0"] = pipe(
        **given["common"], latents=noise.clone(), output_type="pt", control_image=Image.open("picture.png"),
        controlnet_conditioning_scale=given["calls"][0]["scale"]
    ).images
try:
    DiffusionPipeline.from_pretrained(given["kinds"][0])
except ValueError as error:
    out["refused"] = str(error)
torch.save(out, "out.pt")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def ours(root: Path) -> Pipeline:
    return our_pipeline(root)


def control(folder: Path, ours: Pipeline, kind: str) -> Path:
    target, params, make = KINDS[kind]
    network, model = ours.generator.engine.network, ours.experiment.model
    made = make(**params, base=BaseModel(network, model))
    fill(made, 0.1, seed=len(kind))
    info = ControlInfo(Component(target, params), model, norms=fingerprint(network))
    write(folder / f"{kind}.safetensors", made.state_dict(), info)
    return folder / f"{kind}.safetensors"


@pytest.fixture(scope="module")
def theirs(root: Path, ours: Pipeline) -> dict[str, Tensor]:
    """Pictures that a process without our code draws."""
    for kind in KINDS:
        words = [str(control(root, ours, kind)), str(root / kind), "--to", "diffusers", "--model"]
        assert convert([*words, str(root / "ours")]) == 0
    Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB").save(root / "picture.png")
    shape = ours.generator.engine.latent_shape(HEIGHT, WIDTH)
    torch.save(torch.randn(1, *shape, generator=torch.Generator().manual_seed(3)), root / "noise.pt")
    common = {
        "prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE, "max_sequence_length": ours.experiment.conditioning.max_length,
    }  # fmt: skip
    (root / "given.json").write_text(json.dumps({"kinds": list(KINDS), "calls": CALLS, "common": common}))
    (root / "peer.py").write_text(PEER)
    env = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "peer.py"], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Tensor] = torch.load(root / "out.pt")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_draws_our_pictures_without_our_code(
    root: Path, ours: Pipeline, theirs: dict[str, Tensor], kind: str
) -> None:
    noise, picture = torch.load(root / "noise.pt"), Image.open(root / "picture.png")
    plain = ours([PROMPT], steps=STEPS, guidance=GUIDANCE, latents=noise, controls=[])
    seen = []
    for number, call in enumerate(CALLS):
        own = {"control": root / f"{kind}.safetensors", "image": picture, **call}
        drawn = ours([PROMPT], steps=STEPS, guidance=GUIDANCE, latents=noise, controls=[own])
        mine = ours.generator.engine.decode(drawn.latents)
        assert (theirs[f"{kind} {number}"] - mine).abs().max() < 1e-3, call
        seen.append(float((drawn.latents - plain.latents).abs().max()))
    assert min(seen[:3]) > 0.01 and seen[3] == 0, "each call but the last steers"
    assert len({round(one, 5) for one in seen}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_opens_again(theirs: dict[str, Tensor], kind: str) -> None:
    """Trap: diffusers' save_pretrained leaves a folder's own code files out."""
    assert torch.equal(theirs[f"{kind}-copy 0"], theirs[f"{kind} 0"])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_offloaded_draw_the_same(theirs: dict[str, Tensor], kind: str) -> None:
    """Trap: hooks on a block have to stay with it when diffusers brings it in for its turn."""
    assert torch.equal(theirs[f"{kind}-offload 0"], theirs[f"{kind} 0"])


def test_diffusers_asks_for_trust(theirs: dict[str, Tensor]) -> None:
    assert "trust_remote_code=True" in str(theirs["refused"])


def test_what_has_no_place_in_such_a_folder_is_refused(
    root: Path, ours: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Reference(base=BaseModel(ours.generator.engine.network, ours.experiment.model))
    file, model = root / "reference.safetensors", ours.experiment.model
    write(file, made.state_dict(), ControlInfo(Component("sat.control.reference.Reference"), model))
    inpaint, design = root / "inpaint.safetensors", Component("sat.control.light.concat", {"inpaint": True})
    made = concat(inpaint=True, base=BaseModel(ours.generator.engine.network, ours.experiment.model))
    write(inpaint, made.state_dict(), ControlInfo(design, model))
    concatenated = control(root, ours, "concat")
    words = [str(root / "no"), "--to", "diffusers"]
    for source, more, message in (
        (file, ["--model", str(root / "ours")], "is a Reference that takes latent"),
        (inpaint, ["--model", str(root / "ours")], "is a TransformerConcat that takes inpaint"),
        (concatenated, [], "name the model that it is written with, --model PATH"),
        (concatenated, ["--model", "checkpoints/tiny"], "another model"),
        (root / "ours", ["--model", "checkpoints/tiny"], "--model is for controls"),
    ):
        assert convert([str(source), *words, *more]) == 2
        assert message in capsys.readouterr().err
        assert not (root / "no").exists()
