"""Objects from components, the engine from an experiment, and the record a run leaves."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sat.checkpoint.save import save_native
from sat.config import check as component
from sat.config.build import build_empty, build_engine, components
from sat.config.check import TargetError, build, check_import, resolve, signature
from sat.config.load import load
from sat.config.record import commit, record
from sat.config.schema import CheckpointConfig, Component, plain
from sat.config.yaml_source import ConfigError
from tests.configs import Brush, Range, Wide, debug
from tests.vocabulary import write_vocabulary

IMPORTS = ["tests.configs"]


def engine(*overrides, dtype=torch.float32, **options):
    return build_engine(debug(*overrides), device="cpu", dtype=dtype, **options)


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_arguments_become_what_the_signature_asks_for():
    inner = {"target": "tests.configs.Brush"}
    params = {"ratio": 2, "pair": [3, 4], "span": {"low": 0}, "brush": inner, "brushes": {"a": inner},
              "several": [inner], "folder": "x/y", "names": ["n"]}  # fmt: skip
    made = build(Component("tests.configs.Wide", params), imports=IMPORTS, engine="E")
    assert isinstance(made, Wide)
    ratio, pair, names, mode, span, brush, brushes, several, folder, runtime = made.values
    assert (ratio, type(ratio), pair, mode) == (2.0, float, (3, 4), "a")
    assert span == Range(0.0, 1.0)
    assert isinstance(brush, Brush)
    assert isinstance(brushes["a"], Brush)
    assert isinstance(several[0], Brush)
    assert (folder, list(names), runtime) == (Path("x/y"), ["n"], "E")


def test_each_build_is_a_new_object():
    sgd = Component("torch.optim.SGD", {"lr": 0.1})
    parameter = nn.Parameter(torch.zeros(2))
    assert build(sgd, params=[parameter]) is not build(sgd, params=[parameter])


def test_light_components_become_objects_once(monkeypatch):
    made, plainly = [], component.build

    def counted(given, **options):
        made.append(given.target)
        return plainly(given, **options)

    monkeypatch.setattr(component, "build", counted)
    e = debug("diffusion.loss={target: sat.diffusion.loss.DenoisingLoss}")
    light = components(e)
    changed = components(replace(e, sampling=replace(e.sampling, steps=3)))
    assert all(one is other for one, other in zip(light, changed, strict=True))
    built = build_engine(e, device="cpu", dtype=torch.float32)
    assert (built.schedule, built.process, built.denoising_loss) == (
        light.schedule,
        light.process,
        light.loss,
    )
    assert len(made) == len(set(made)) == 6
    sampler = Component("sat.diffusion.samplers.Euler")
    other = components(replace(e, sampling=replace(e.sampling, sampler=sampler)))
    assert other.sampler is not light.sampler and other.guider is light.guider


def test_an_object_stays_with_its_component_in_this_process_alone():
    component = debug().diffusion.process
    assert "_built" in component.__dict__
    for copied in (copy.deepcopy(component), pickle.loads(pickle.dumps(component))):  # noqa: S301
        assert copied == component
        assert "_built" not in copied.__dict__


def test_engines_do_not_share_a_process_with_tensors():
    e = debug()
    components(e).process.register_buffer("table", torch.zeros(2))
    one, other = (build_engine(e, device="cpu", dtype=torch.float32).process for _ in range(2))
    assert one is not other


def test_runtime_arguments_are_neither_guessed_nor_given_twice():
    with pytest.raises(TypeError, match="Brush takes no engine"):
        build(Component("tests.configs.Brush"), imports=IMPORTS, engine=1)
    with pytest.raises(TypeError, match="lr given both in the config and at run time"):
        build(Component("torch.optim.SGD", {"lr": 0.1}), params=[nn.Parameter(torch.zeros(2))], lr=0.2)


def test_an_optimizer_takes_the_lists_of_yaml_as_tuples():
    made = build(Component("torch.optim.AdamW", {"betas": [0.8, 0.9]}), params=[nn.Parameter(torch.zeros(2))])
    assert made.defaults["betas"] == (0.8, 0.9)


def test_optimizers_of_other_packages_are_checked_and_built_like_torchs():
    target, groups = "tests.training.Blockwise", [{"params": [nn.Parameter(torch.zeros(2))]}]
    takes = signature(resolve(target, ["tests.training"]))
    assert (takes.runtime, set(takes.params)) == (("params",), {"lr", "block"})
    made = build(Component(target, {"block": 4}), imports=["tests.training"], params=groups, lr=0.5)
    assert made.param_groups[0]["block"] == 4
    with pytest.raises(TargetError, match=r"imports: \[tests.training\]"):
        build(Component(target), params=groups)


def test_a_package_of_optimizers_that_is_not_there_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TargetError, match="install it with `pip install bitsandbytes`"):
        check_import("bitsandbytes.optim")


def test_random_weights_come_from_their_seed_alone():
    one = engine()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert equal(one, engine())
    assert torch.equal(before, torch.get_rng_state())
    assert not equal(one.network, engine("checkpoint.random=1").network)


def test_without_weights_nothing_is_built_unless_asked_for():
    with pytest.raises(
        ConfigError, match=r"checkpoint: .*no weights are named: .*checkpoint\.random=SEED draws them"
    ):
        engine("checkpoint.random=null")
    assert engine("checkpoint.random=null", load_weights=False).network is not None


def test_a_missing_folder_is_one_line_with_what_to_do():
    with pytest.raises(
        ConfigError, match=r"^checkpoint: .*there is no 'weights/nowhere'; see docs/checkpoints\.md[^\n]*$"
    ):
        engine("checkpoint.path=weights/nowhere")


def test_weights_are_read_from_a_folder_part_by_part(tmp_path):
    whole, e = engine(), debug()
    parts = {"model": whole.network, "first_stage": whole.first_stage, "text": whole.conditioner.text}
    vocabulary = write_vocabulary(tmp_path)
    sections = {name: plain(e)[name] for name in ("model", "diffusion", "conditioning", "first_stage")}
    states = {name: part.state_dict() for name, part in parts.items()}
    folder = save_native(tmp_path / "w", states, sections, tokenizer=vocabulary)
    read = engine(f"checkpoint.path={folder}", "checkpoint.random=null")
    assert equal(read, whole)
    assert read.conditioner.tokenizer is not None  # found beside the weights
    mixed = engine(f"checkpoint.first_stage={folder}", "checkpoint.random=9")
    assert equal(mixed.first_stage, whole.first_stage)
    assert not equal(mixed.network, whole.network)
    other = build_engine(e, device="cpu", dtype=torch.float32, checkpoint=CheckpointConfig(path=folder))
    assert equal(other, whole)


def test_half_precision_reaches_the_weights_and_not_the_position_table():
    made = engine(dtype=torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.network.state_dict()["transformer.mixins.position.table"].dtype == torch.float32


def test_float16_keeps_what_would_overflow_wider():
    made = engine(dtype=torch.float16)
    assert {p.dtype for p in made.network.parameters()} == {torch.float16}
    assert {p.dtype for p in made.conditioner.text.parameters()} == {torch.float16}
    assert {p.dtype for p in made.first_stage.parameters()} == {torch.float32}


def test_the_full_model_is_built_without_memory():
    e = load([Path(__file__).parents[2] / "configs" / "plus.yaml"])
    sizes = [
        sum(p.numel() for p in build_empty(c).parameters())
        for c in (e.model, e.first_stage, e.conditioning.text)
    ]
    assert sizes == [2_890_779_712 - 41_943_040, 406_100_643, 4_762_310_656]


@pytest.mark.skipif(torch.__version__ < "2.6", reason="this torch imports them for any meta tensor")
def test_building_empty_does_not_import_the_symbolic_shapes():
    code = (
        "import sys; from sat.config.load import load_full; load_full(['configs/tiny.yaml']);"
        "sys.exit('sympy' in sys.modules)"
    )
    import sys

    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_run_can_be_repeated_from_its_record(tmp_path):
    e = debug("sampling.seed=7", ("sampling.prompt", "a ${b}"))
    record(tmp_path / "out", e, hooks="embed  patch_embed\nfinal  final_layer", world=2, weights={"model": "ab"},
           command=["sample.py", "--seed", "7"])  # fmt: skip
    assert load([tmp_path / "out" / "resolved.yaml"]) == e
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["command"] == ["sample.py", "--seed", "7"]
    assert facts["hooks"] == ["embed  patch_embed", "final  final_layer"]
    assert (facts["world"], facts["seeds"], facts["weights"]) == (2, {"sampling": 7}, {"model": "ab"})
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] or facts["versions"]["torch"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["resolved.yaml", "run.json"]


def test_a_later_start_keeps_the_first_in_the_record(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    e = debug()
    read = lambda: json.loads((tmp_path / "run.json").read_text())  # noqa: E731
    record(tmp_path, e, command=["train.py"])
    first = read()
    assert "starts" not in first and "slurm" not in first
    for name, value in {"JOB_ID": "9", "JOB_NODELIST": "n[1-2]", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    record(tmp_path, e, world=2, command=["train.py", "--resume"])
    second = read()
    assert second["slurm"] == {"job": "9", "nodes": "n[1-2]", "restarts": 1}
    assert second["starts"] == [
        {"written": first["written"], "command": ["train.py"], "world": 1, "slurm": None}
    ]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (tmp_path / "run.json").write_text('{"world": [')
    record(tmp_path, e)
    assert read()["slurm"]["job"] == "9_3" and "starts" not in read()


def test_the_record_names_the_commit_and_changes_of_a_checkout(tmp_path):
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "--allow-empty", "-m", "m"]):
        (tmp_path / "f").write_text("1")
        subprocess.run([*git, *words], check=True)
    found = commit(tmp_path)
    assert found is not None
    assert (len(found["commit"]), found["dirty"]) == (40, False)
    (tmp_path / "f").write_text("2")
    assert commit(tmp_path) == {**found, "dirty": True}


def test_experiments_change_in_python_under_their_rules():
    e = debug()
    assert replace(e.sampling, steps=9).steps == 9
    with pytest.raises(ValueError, match="height 50 is not a multiple of 16"):
        replace(e.sampling, height=50)
