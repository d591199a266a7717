"""Composition of configs: files left to right, overrides, references, paths, and what YAML values mean."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sat.config.load import dump, load, load_full
from sat.config.yaml_source import ConfigError, parse
from tests.configs import DEBUG, ROOT, debug, refused


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "more.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_later_files_win_and_keep_what_they_do_not_name(write):
    more = write("sampling: {steps: 7}\nmodel: {params: {depth: 1}}")
    e = load([DEBUG, more])
    assert (e.sampling.steps, e.sampling.height) == (7, debug().sampling.height)
    assert (e.model.params["depth"], e.model.params["dim"]) == (1, 32)


def test_another_target_drops_the_params_of_the_old_one(write):
    more = write("diffusion: {schedule: {target: sat.diffusion.schedule.Discrete}}")
    assert load([DEBUG, more]).diffusion.schedule.params == {}
    assert debug("diffusion.schedule.target=sat.diffusion.schedule.Discrete").diffusion.schedule.params == {}


def test_the_same_target_keeps_the_params(write):
    more = write("diffusion: {schedule: {target: sat.diffusion.schedule.ZeroSNR, params: {total: 500}}}")
    assert load([DEBUG, more]).diffusion.schedule.params == {"shift": 4.0, "total": 500}


def test_params_of_a_default_component_can_be_set_without_its_target(write):
    more = write("sampling: {guider: {params: {scale: 3}}}")
    guider = load([DEBUG, more]).sampling.guider
    assert (guider.target, guider.params) == ("sat.diffusion.guidance.ClassifierFree", {"scale": 3})


def test_a_section_that_is_null_by_default_starts_from_its_defaults(write):
    more = write(
        "train:\n  objective: {target: sat.train.objectives.first_stage.FirstStageObjective}\n  steps: 3\n"
        "  optimizer: {params: {betas: [0.9, 0.99]}}"
    )
    train = load([DEBUG, more]).train
    assert train is not None
    assert (train.steps, train.optimizer.target) == (3, "torch.optim.AdamW")


def test_overrides_follow_the_files_in_order():
    assert debug("sampling.steps=5", "sampling.steps=6").sampling.steps == 6


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("sampling.prompt=a red fox", "a red fox"),
        ("sampling.prompt=5", "5"),
        ("sampling.prompt=yes", "yes"),
        ("sampling.prompt=a cat: on a mat", "a cat: on a mat"),
        ("sampling.prompt=number # 5", "number # 5"),
        ("sampling.prompt=[a, b]", ["a", "b"]),
        ("sampling.prompt=[a", "[a"),
        ("sampling.prompt='a = b'", "a = b"),
        ("sampling.prompt=null", None),
        ("sampling.prompt=", None),
        (("sampling.prompt", ["${x} \\${y} # no", "12"]), ["${x} \\${y} # no", "12"]),
    ],
)
def test_prompts_as_overrides(override, value):
    assert debug(override).sampling.prompt == value


def test_overrides_of_new_parameters_list_items_and_dates():
    assert debug("diffusion.schedule.params.total=500").diffusion.schedule.params["total"] == 500
    rope = "model.params.mixins.position"
    e = debug(f"{rope}.target=sat.mixins.rope.RoPE", f"{rope}.params={{head_dim: 8, height: 4, width: 6}}")
    assert e.model.params["mixins"]["position"]["target"] == "sat.mixins.rope.RoPE"
    e = debug("sampling.prompt=[a, b]", "sampling.prompt.1=c")
    assert e.sampling.prompt == ["a", "c"]
    assert debug("sampling.prompt=2026-01-01").sampling.prompt == "2026-01-01"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("smpling.steps=3", "did you mean 'sampling.steps'?"),
        ("sampling.step=3", "did you mean 'sampling.steps'?"),
        ("sampling.guider.param.scale=3", "did you mean 'sampling.guider.params.scale'?"),
        ("sampling.steps.x=3", "'sampling.steps.x' names no key"),
        ("sampling.prompt.0=c", "'sampling.prompt.0' names no key"),
        ("sampling.steps", "'sampling.steps' is not of the form section.key=value"),
        ("sampling.guider.params.scal=3", "has no parameter 'scal'; did you mean 'scale'?"),
        ("sampling.steps=fast", "override: sampling.steps: expected int, got 'fast' (str)"),
    ],
)
def test_an_override_of_nothing_is_refused(override, line):
    assert line in " ".join(refused([DEBUG], [override]))


def test_all_wrong_overrides_are_told():
    assert len(refused([DEBUG], ["a=1", "b", "sampling.steps=x", "sampling.hight=3"])) == 4


def test_the_later_of_prompt_and_prompt_file_wins(write):
    prompts = write("one", "p.txt")
    file = write(f"sampling: {{prompt_file: {prompts}}}", "a.yaml")
    text = write("sampling: {prompt: a dog}", "b.yaml")
    assert load([DEBUG, file, text]).sampling.prompt_file is None
    assert load([DEBUG, text, file]).sampling.prompt is None
    assert load([DEBUG, file], ["sampling.prompt=a dog"]).sampling.prompt_file is None
    assert load([DEBUG, text], [f"sampling.prompt_file={prompts}"]).sampling.prompt is None


def test_prompt_and_prompt_file_of_one_layer_are_refused(write):
    both = write("sampling: {prompt: a dog, prompt_file: p.txt}")
    line = "sampling.prompt: `prompt` and `prompt_file` are both given; set one of them to null"
    assert refused([DEBUG, both]) == [f"{both}:1: {line}"]
    assert refused([DEBUG], ["sampling.prompt=x", "sampling.prompt_file=y"]) == [f"override: {line}"]


def test_references_take_the_value_with_its_type(write):
    more = write("sampling: {width: '${sampling.height}'}\noutput: {dir: 'seed ${sampling.seed}, \\${x}'}")
    e = load([DEBUG, more], ["sampling.seed=7", "sampling.height=32"])
    assert (e.sampling.width, str(e.output.dir)) == (32, "seed 7, ${x}")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("${oc.env:HOME}", "only ${section.key} is"),
        ("${env:HOME}", "only ${section.key} is"),
        ("${sampling.nothing}", "${sampling.nothing} names no key"),
        ("${output.dir}", "refers to itself: output.dir -> output.dir"),
        ("${.resume}", "only ${section.key} is"),
        ("${a.${output.resume}}", "only ${section.key} is"),
        ("x ${sampling.seed} ${oc.env:HOME}", "${oc.env:HOME} is not possible"),
        ("a ${sampling.sizes}", "is not a single value"),
        ("a ${sampling", "no closing brace"),
    ],
)
def test_references_that_lead_nowhere(text, what):
    (line,) = refused([DEBUG], [f"output.dir={text}"])
    assert line.startswith("override: output.dir: ")
    assert what in line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1_0", "1_0"),
        ("010", 10),
        ("0x1f", 31),
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("-.inf", float("-inf")),
        ("'1'", "1"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    read = parse(f"a: {text}", "x")[0]["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("sampling: {steps: 1, steps: 2}", ":1: sampling.steps: given twice in this file"),
        ("a: [1\nb: 2", ":2: not valid YAML"),
        ("sampling: !!python/object/apply:os.system [ls]", "tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("sampling: {prompt: !!binary aGk=}", "tag 'tag:yaml.org,2002:binary' is not possible"),
        ("sampling: &x {prompt: *x}", "an alias that contains itself"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
        ), "more than 20000 keys"),
        ("- 1", ":1: expected sections, got [1] (list)"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(write, text, what):
    (line,) = refused([DEBUG, write(text)])
    assert what in line


def test_every_unreadable_file_is_told(write):
    lines = refused(["configs/debgu.yaml", write("a: ["), "nowhere.yaml"])
    assert "configs/debgu.yaml: there is no such config; did you mean 'configs/debug.yaml'?" in lines
    assert len(lines) == 3


def test_no_config_at_all():
    assert refused([]) == ["no config is named; give at least one: --base configs/tiny.yaml"]


def test_an_empty_file_changes_nothing(write):
    assert load([DEBUG, write("")]) == load([DEBUG])


def test_inputs_are_found_from_here_then_from_the_project_of_the_file(write, tmp_path, monkeypatch):
    write("", "project/pyproject.toml")
    inside = write("one", "project/prompts.txt")
    config = write("sampling: {prompt_file: prompts.txt}", "project/configs/deep/c.yaml")
    assert load([DEBUG, config]).sampling.prompt_file == inside
    monkeypatch.chdir(tmp_path)
    here = write("two", "prompts.txt")
    assert load([DEBUG, config]).sampling.prompt_file == here


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(["configs/debug.yaml"]) == load([DEBUG])


def test_missing_inputs_are_listed_with_what_to_do_and_no_error(write):
    more = write("checkpoint: {path: weights/nowhere}\nsampling:\n  prompt_file: nothing.txt")
    first, second = sorted(str(m) for m in load_full([DEBUG, more], ["conditioning.tokenizer=null"]).missing)
    assert first.startswith(
        f"{more}:1: checkpoint.path: there is no 'weights/nowhere'; see docs/checkpoints.md"
    )
    assert second.startswith(f"{more}:3: sampling.prompt_file: there is no 'nothing.txt'; name a text file")


def test_a_folder_of_all_parts_may_be_absent_where_each_part_has_a_path_of_its_own(write, tmp_path):
    own = [f"checkpoint.{part}={tmp_path}" for part in ("model", "first_stage", "text")]
    config = write("checkpoint: {path: weights/nowhere}")
    assert load_full([DEBUG, config], own).missing == []
    assert [problem.key for problem in load_full([DEBUG, config], own[:2]).missing] == ["checkpoint.path"]


def test_a_name_too_long_for_the_file_system_is_just_missing():
    loaded = load_full([DEBUG], [("sampling.prompt_file", "x" * 5000), "conditioning.tokenizer=null"])
    assert len(loaded.missing) == 1


def test_the_dump_reads_back_equal_even_with_odd_texts(tmp_path):
    odd = [
        "${a.b}",
        "\\${x",
        "yes",
        "1e-4",
        "null",
        "",
        " # ",
        "a: b",
        "- x",
        "é 中 🙂",
        "line\nbreak",
        "\\\\${z}",
    ]
    e = debug(("sampling.prompt", odd), "train.objective={target: sat.train.objectives.first_stage.FirstStageObjective}",
              "train.steps=3", "data={sources: [{path: ../x}], height: 8, width: 8, augment: {scale: [0.5, 1]}}")  # fmt: skip
    assert e.sampling.prompt == odd
    path = tmp_path / "resolved.yaml"
    path.write_text(dump(e))
    assert load([path]) == e


def test_the_loader_imports_torch_only_when_a_target_is_looked_up():
    code = "import sys, sat.config.load, sat.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_error_counts_its_lines():
    with pytest.raises(ConfigError, match=r"^2 problems:\nnowhere\.yaml: .*\nnothing\.yaml: "):
        load(["nowhere.yaml", "nothing.yaml"])
