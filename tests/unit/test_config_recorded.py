"""The config that comes with weights is compared with the YAML: contradictions are refused by key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sat.adapters.factors import LayerFactors, Pair
from sat.adapters.files import Adapter, AdapterInfo
from sat.adapters.write import write
from sat.checkpoint.convert import Sources, convert
from sat.checkpoint.format import CheckpointError
from sat.config.check import build as build_component
from sat.config.load import load_full
from sat.config.record import amend, record
from sat.config.schema import plain
from sat.config.yaml_source import ConfigError

TINY = Path("checkpoints/tiny")
BASE = ["configs/tiny.yaml"]


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "diffusers"
    convert(Sources(TINY), folder, "diffusers", build_component)
    return folder


def refused(*overrides: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_full(BASE, list(overrides))
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.params.heads", 4),
        ("diffusion.schedule.params.shift", 4.0),
        ("diffusion.prediction", {"target": "sat.diffusion.prediction.Eps"}),
        ("first_stage.params.scale_factor", 1.0),
        ("first_stage.params.groups", 4),
        ("conditioning.text.params.heads", 12),
    ],
)
def test_what_contradicts_a_manifest_is_refused_by_key_unless_allowed(key, value):
    says = refused((key, value))
    assert key in says
    assert "checkpoint.allow_config" in says
    load_full(BASE, [(key, value), ("checkpoint.allow_config", [f"{key}*"])])


def test_a_sampling_setting_that_differs_is_a_notice():
    loaded = load_full(BASE, ["diffusion.schedule.params.spacing=leading"])
    assert any("diffusion.schedule.params.spacing" in notice for notice in loaded.notices)
    assert load_full(BASE).notices == []


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("model", "heads", 4, "is a LoRA of a model with model.params.heads 4, here it is"),
        ("model", "depth", 3, "is a LoRA of a model with model.params.depth 3, here it is"),
        ("text", "depth", 9, "is a LoRA of a model with conditioning.text.params.depth 9, here it is"),
        (
            "model",
            None,
            "sat.models.cogview3_unet.CogView3UNet",
            "is a LoRA of CogView3UNet, this model is Cog",
        ),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(tmp_path, part, key, value, says):
    experiment = load_full(BASE).experiment
    base = {"model": plain(experiment.model), "text": plain(experiment.conditioning.text)}
    pair = Pair(torch.ones(1, 8), torch.ones(8, 1), 1.0)
    for name in ("good", "bad"):
        info = AdapterInfo(1, 1.0, base=base)
        write(
            tmp_path / name, Adapter({f"{part}.x": LayerFactors((pair,))}, info, "native", ""), "native", {}
        )
        one = {**base[part], "params": {**base[part]["params"], key: value}} if key else {"target": value}
        base = base | {part: one}
    load_full(BASE, [("adapters.load", [{"path": str(tmp_path / "good")}])])
    bad = ("adapters.load", [{"path": str(tmp_path / "bad")}])
    assert says in (line := refused(bad)) and "adapters.load.0.path" in line
    if key:
        allowed = "model.*" if part == "model" else "conditioning.text.*"
        load_full(BASE, [bad, ("checkpoint.allow_config", [allowed])])


def test_a_damaged_run_json_is_told_by_its_name(tmp_path, caplog):
    experiment = load_full(BASE).experiment
    for text in ("{", "[1]", '{"starts": 3}', "[" * 10**5):
        (tmp_path / "run.json").write_text(text)
        if text[-1] != "}":
            with pytest.raises(CheckpointError, match=r"run\.json: "):
                amend(tmp_path, {})
        caplog.clear()
        record(tmp_path, experiment)
        assert "the record of earlier starts is damaged and is written anew" in caplog.text
        assert "starts" not in json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize("change", [{"params": {"heads": 7}}, {"params": {"dim": 7}}, {"target": 7}, 7])
def test_a_manifest_with_another_config_is_refused(tmp_path, change):
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    model = manifest["config"]["model"]
    if isinstance(change, int):
        manifest["config"]["model"] = change
    else:
        model |= {**change, "params": {**model["params"], **change.get("params", {})}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "model" in refused(f"checkpoint.path={folder}")


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        ("transformer/config.json", "num_attention_heads", 4, "model.params"),
        ("transformer/config.json", None, {}, "model.params"),
        ("vae/config.json", "scaling_factor", 1.0, "first_stage.params.scale_factor"),
        ("scheduler/scheduler_config.json", "prediction_type", "epsilon", "prediction_type"),
        ("scheduler/scheduler_config.json", "snr_shift_scale", 4.0, "diffusion.schedule.params.shift"),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", False, "rescale_betas_zero_snr"),
    ],
)
def test_configs_of_a_diffusers_folder_are_compared(diffusers, tmp_path, file, key, value, says):
    folder = tmp_path / "d"
    shutil.copytree(diffusers, folder)
    load_full(BASE, [f"checkpoint.path={folder}"])
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(value if key is None else {**content, key: value}))
    assert says in refused(f"checkpoint.path={folder}")
    (folder / file).unlink()
    notices = load_full(BASE, [f"checkpoint.path={folder}"]).notices
    assert any(f"cannot be compared with this config: {folder / file} is not there" in n for n in notices)
