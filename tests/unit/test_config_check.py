"""What a config may not say, each with the line that tells it."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from sat.config.check import (
    INVALID,
    Checker,
    Context,
    TargetError,
    allowed,
    check_import,
    convert,
    field_hints,
    fits,
    produces,
    record_of,
    resolve,
    show,
    signature,
)
from sat.config.schema import (
    Component,
    DataConfig,
    Experiment,
    Makes,
    ParallelConfig,
    Section,
    SourceConfig,
    TrainConfig,
)
from sat.diffusion.guidance import ClassifierFree, Guider
from sat.diffusion.schedule import ZeroSNR
from tests.configs import DEBUG, Brush, Greedy, Range, Wide, debug, helper, refused

BRUSH = Annotated[Component, Makes("tests.configs.Brush")]

BAD_YAML = """\
modle: {target: x}
sampling:
  steps: "50"
  heigth: 64
  height: 30
  dtype: fp33
  seed: true
  guider: {target: sat.diffusion.guidance.ClassiferFree}
  sampler: {target: sat.diffusion.schedule.ZeroSNR}
  prompt: [a, 3]
diffusion:
  schedule: {target: sat.diffusion.schedule.ZeroSNR, params: {shift: "4", spacing: trailling, rescal: x}}
  prediction: {target: os.system, params: {command: ls}}
first_stage: {target: sat.first_stage.model.AutoencoderKL, prams: {}}
conditioning:
  text: {target: sat.models.t5.T5Encoder, params: {dim: 3.5}}
  size: {params: 3}
model:
  params: {mixins: {position: {target: sat.mixins.rope.RoP}, x: 5}, depth: yes}
parallel: {tensor: 0, device: gpu}
train: {optimizer: {params: {foo: 1, params: 3}}}
data: {sources: [{path: /nope, repeat: 3}], height: 64, augment: {scale: [1, 2, 3]}}
imports: [os, no_such_module]
"""

LINES = """\
1: modle: no such section; did you mean 'model'?
3: sampling.steps: expected int, got '50' (str); remove the quotes
4: sampling.heigth: no such key; did you mean 'height'?
5: sampling.height: height x width 30 x 64 is not possible: height 30 is not a multiple of 16. The nearest size is
6: sampling.dtype: expected one of 'fp32', 'bf16', 'fp16', 'auto', got 'fp33' (str); did you mean 'fp32'?
7: sampling.seed: expected int, got True (bool)
8: sampling.guider.target: module 'sat.diffusion.guidance' has no 'ClassiferFree'; did you mean 'ClassifierFree'?
9: sampling.sampler.target: expected Sampler, got sat.diffusion.schedule.ZeroSNR
10: sampling.prompt: expected str or a list of str or null, got ['a', 3] (list)
12: diffusion.schedule.params.shift: expected float, got '4' (str); remove the quotes
12: diffusion.schedule.params.spacing: expected one of 'trailing', 'leading', 'karras', got 'trailling' (str); did you mean
12: diffusion.schedule.params.rescal: ZeroSNR has no parameter 'rescal'; did you mean 'rescale'? (it takes shift,
13: diffusion.prediction.target: 'os.system' is outside sat and torch.optim; list its module in `imports`
14: first_stage.prams: a component has only `target` and `params`; did you mean 'params'?
16: conditioning.text.params.dim: expected int, got 3.5 (float)
17: conditioning.size.params: expected a mapping of parameters, got 3 (int)
19: model.params.mixins.position.target: module 'sat.mixins.rope' has no 'RoP'; did you mean 'RoPE'?
19: model.params.mixins.x: expected Mixin or null, got 5 (int)
19: model.params.depth: expected int, got 'yes' (str)
20: parallel.tensor: expected at least 1, got 0
20: parallel.device: expected one of 'auto', 'cpu', 'cuda', got 'gpu' (str)
21: train: needs `objective`
21: train: needs `steps`
21: train.optimizer.params.foo: AdamW has no parameter 'foo' (it takes lr, betas,
21: train.optimizer.params.params: 'params' is given to AdamW at run time; it cannot come from a config
22: data.sources.0.repeat: no such key; did you mean 'repeats'?
22: data: needs `width`
22: data.augment.scale: expected a list of 2: float, float, got [1, 2, 3] (list)
23: imports.0: 'os' belongs to Python itself
23: imports.1: cannot import 'no_such_module': No module named 'no_such_module'; is its folder on PYTHONPATH?
""".splitlines()


def test_every_problem_is_told_at_once_with_its_line(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD_YAML)
    told = refused([DEBUG, bad])
    for line in LINES:
        assert [t for t in told if t.startswith(f"{bad}:{line}")], line
    assert len(told) == len(LINES), [
        t for t in told if not any(t.startswith(f"{bad}:{line}") for line in LINES)
    ]


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["sampling=null"], "sampling: expected a mapping of prompt, prompt_file"),
        (["sampling.guider=null"], "sampling.guider: expected a component (`target` and `params`), got null"),
        (["sampling.guider={params: {}}", "sampling.guider.target=3"], "expected a dotted name such as sat."),
        (["model.target=CogView3Plus"], "expected a dotted name such as sat.package.module.Class"),
        (["model.target=sat.models.cogview3_plis.CogView3Plus"], "did you mean sat.models.cogview3_plus?"),
        (["model.target=sgm.modules.diffusionmodules.dit.DiffusionTransformer"], "is a class of the official code"),
        (["model.target=sat.diffusion.schedule.ZeroSNR"], "expected Module, got sat.diffusion.schedule.ZeroSNR"),
        (["model.target=sat.config.schema.base.Path"], "'sat.config.schema.base.Path' is defined in 'pathlib"),
        (["model.target=sat.config.record.subprocess"], "'sat.config.record.subprocess' is not a class or function"),
        (["model.target=sat.config.yaml_source._int"], "module 'sat.config.yaml_source' has no '_int'"),
        (["diffusion.loss={target: sat.diffusion.loss.DenoisingLoss, params: {weighting: 3}}"],
         "diffusion.loss.params.weighting: expected Weighting or null, got 3 (int)"),
        (["diffusion.process={target: sat.diffusion.process.Process, params: {mixins: [a]}}"],
         "diffusion.process.params.mixins: expected a mapping of Mixin or null, got ['a'] (list)"),
        (["train={objective: {target: sat.train.objectives.first_stage.FirstStageObjective, params: {engine: 1}},"
          " steps: 2}"], "'engine' is given to FirstStageObjective at run time"),
        (["train={objective: {target: sat.diffusion.schedule.ZeroSNR}, steps: 2}"], "expected Objective, got"),
        (["sampling.sizes.multiple=24", "sampling.width=48"], "not a multiple of 16, the pixels of the network's smallest unit (8 x 2 latent cells)"),
        (["sampling.sizes={min: 16, max: 128, multiple: 16, max_area: 16384}"],
         "128 pixels are 8 patches, more than the position table [4, 6]"),
        (["model.params.text_len=9"], "text_len 9 of the model does not fit conditioning.max_length 8"),
        (["conditioning.text.params.dim=32"], "text_dim 24 of the model does not fit conditioning.text.params.dim 32"),
        (["conditioning.size.params.dim=4"], "size_dim 48 of the model does not fit 6 x conditioning.size.params.dim 24"),
        (["first_stage.params.latent_channels=8"], "channels 4 of the model does not fit first_stage.params"),
        (["model.params.heads=5"], "model: sat.models.cogview3_plus.CogView3Plus refuses these parameters: dim 32"),
        (["diffusion.schedule.params.shift=-1"], "diffusion.schedule: sat.diffusion.schedule.ZeroSNR refuses"),
        (["sampling.sizes={min: 64, max: 32}"], "sampling.sizes: "),
        (["data={sources: [{path: tests}], height: 64, width: 60}"],
         "data.width: 60 is not a multiple of 8, the pixels of one latent cell"),
        (["data={sources: [{path: tests}], buckets: {area: 4096, step: 24}}"],
         "data.buckets.step: 24 is not a multiple of 16, the pixels of the network's smallest unit"),
        (["data={sources: [{path: tests}], buckets: {area: [1024, 8192], step: 16}}"],
         "data.buckets: the longest side of a bucket, 128 pixels, is 8 patches, more than the position table [4, 6]"),
    ],
)  # fmt: skip
def test_one_problem(overrides, what):
    lines = refused([DEBUG], ["conditioning.tokenizer=null", *overrides])
    assert len(lines) == 1, lines
    assert what in lines[0]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("sampling.steps=0", "expected 1 to 1000 steps, got 0"),
        ("sampling.seed=-1", "image i uses seed + i), got -1"),
        ("sampling.batch_size=0", "expected at least 1, got 0"),
        ("conditioning.max_length=0", "expected at least 1 token, got 0"),
        ("checkpoint.random=-3", "expected a seed of at least 0, got -3"),
        ("memory.decode_batch=0", "expected at least 1 image, got 0"),
        ("memory.decode_tile=2", "expected at least 8 latent cells, got 2"),
        ("parallel.sequence=0", "expected at least 1, got 0"),
        ("parallel.guidance=3", "expected 1 or 2 (guidance has two halves), got 3"),
        ("parallel.timeout=0", "expected more than 0 seconds, got 0.0"),
    ],
)
def test_rules_of_a_section(override, what):
    (line,) = refused([DEBUG], ["conditioning.tokenizer=null", override])
    assert line.startswith(f"override: {override.partition('=')[0]}: ")
    assert what in line


@pytest.mark.parametrize(
    ("guider", "who"),
    [
        ("{target: sat.diffusion.guidance.Unguided}", "Unguided looks once"),
        (
            "{target: sat.diffusion.guidance.ClassifierFree, params: {scale: 1.0}}",
            "ClassifierFree at scale 1 looks",
        ),
    ],
)
def test_one_look_has_no_halves_to_share(guider, who):
    (line,) = refused(
        [DEBUG], ["conditioning.tokenizer=null", "parallel.guidance=2", f"sampling.guider={guider}"]
    )
    assert line.startswith(f"override: parallel.guidance: {who}")
    assert debug("parallel.guidance=2").parallel.guidance == 2


STEP = {"target": "torch.optim.lr_scheduler.StepLR", "params": {"step_size": 3}}
TRAIN = {"objective": {"target": "sat.train.objectives.first_stage.FirstStageObjective"}, "steps": 10}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"warmup": 11}, "warmup"),
        ({"lr": 0}, "lr"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"schedule": "step"}, "schedule"),
        ({"schedule": "wsd"}, "decay_steps"),
        ({"schedule": "wsd", "warmup": 4, "decay_steps": 7}, "decay_steps"),
        ({"schedule": "linear", "decay_steps": 3}, "decay_steps"),
        ({"schedule": STEP, "warmup": 1}, "warmup"),
        ({"schedule": STEP, "prolong": "rewarm"}, "prolong"),
        ({"schedule": {**STEP, "params": {"stepsize": 3}}}, "schedule.params.stepsize"),
        ({"schedule": {**STEP, "params": {"step_size": 3, "last_epoch": 2}}}, "schedule.params.last_epoch"),
        ({"schedule": {"target": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}, "schedule"),
        ({"schedule": {"target": "torch.optim.AdamW"}}, "schedule.target"),
        ({"groups": [{"targets": ["text.*"]}]}, "groups.0"),
        ({"groups": [{"targets": [], "lr": 1e-5}]}, "groups.0.targets"),
        ({"groups": [{"targets": ["*"], "lr": -1.0}]}, "groups.0.lr"),
        ({"groups": [{"targets": ["*"], "weight_decay": -1.0}]}, "groups.0.weight_decay"),
        ({"clip": 0}, "clip"),
        ({"ema": 1.0}, "ema"),
        ({"sample_every": 5}, "sample_prompts"),
        ({"batch_size": 0, "accumulate": 0}, "accumulate"),
        ({"dtype": "bf16", "zero": 0}, "zero"),
        ({"steps": 0}, "steps"),
        ({"zero": 4}, "zero"),
        ({"offload": {"optimizer": True}}, "offload"),
        ({"zero": 2, "offload": {"parameters": True}}, "offload"),
    ],
)
def test_rules_of_training(values, key):
    checker = Checker({})
    assert checker.check(TrainConfig, {**TRAIN, **values}, ("train",)) is INVALID
    assert f"train.{key}" in [p.key for p in checker.problems]


@pytest.mark.parametrize(
    "values",
    [{"sources": []}, {"height": 0}, {"max_bad_share": 2}, {"workers": -1}, {"cache_views": -1},
     {"sources": [{"path": ".", "repeats": 0}]}, {"width": None}, {"buckets": {"area": 64, "step": 8}},
     {"sources": [{"path": ".", "repeats": 2, "weight": 1.0}]}, {"sources": [{"path": ".", "weight": 0.0}]},
     {"sources": [{"path": ".", "weight": 1.0}, {"path": "."}]}, {"augment": {"shift": 0.9}},
     {"augment": {"scale": [1.0, 0.5]}}],
)  # fmt: skip
def test_rules_of_data(values):
    checker = Checker({})
    good = {"sources": [{"path": "."}], "height": 8, "width": 8}
    assert checker.check(DataConfig, good, ()) is not INVALID
    assert checker.check(DataConfig, {**good, **values}, ()) is INVALID


@pytest.mark.parametrize(
    ("values", "words"),
    [({"area": 63}, "data.buckets.area: expected one or several areas of at least `step` x `step` (64) pixels"),
     ({"area": []}, "data.buckets.area"), ({"step": 0}, "data.buckets.step: expected at least 1"),
     ({"max_ratio": 0.5}, "data.buckets.max_ratio: expected at least 1, got 0.5"),
     ({"min_images": 0}, "data.buckets.min_images: expected at least 1, got 0")],
)  # fmt: skip
def test_rules_of_buckets(values, words):
    checker = Checker({})
    data = {"sources": [{"path": "."}], "buckets": {"area": [64, 256], "step": 8}}
    assert checker.check(DataConfig, data, ("data",)) is not INVALID
    data["buckets"] |= values
    assert checker.check(DataConfig, data, ("data",)) is INVALID
    assert words in "\n".join(str(problem) for problem in checker.problems)


def test_a_range_of_shards_is_looked_up_by_its_first(tmp_path):
    checker = Checker({})
    (tmp_path / "a-08.tar").touch()
    section = {"path": str(tmp_path / "a-{08..10}.tar")}
    assert checker.check(SourceConfig, section, ("data",)).path == tmp_path / "a-{08..10}.tar"
    assert not checker.missing
    checker.check(SourceConfig, {"path": str(tmp_path / "b-{08..10}.tar")}, ("data",))
    assert f"there is no '{tmp_path}/b-08.tar'" in str(checker.missing[0])


def test_a_section_made_in_python_keeps_its_rules():
    with pytest.raises(
        ValueError, match=r"parallel\.tensor: expected at least 1, got 0; .*parallel\.timeout"
    ):
        ParallelConfig(tensor=0, timeout=-1)


@pytest.mark.parametrize(
    ("wanted", "value", "made"),
    [
        (float, 3, 3.0),
        (float, True, INVALID),
        (float, "3", INVALID),
        (int, True, INVALID),
        (int, 3.0, INVALID),
        (int, 2**70, 2**70),
        (bool, 1, INVALID),
        (str, 1, INVALID),
        (tuple[int, int], [1, 2], (1, 2)),
        (tuple[int, int], [1], INVALID),
        (list[str], ["a"], ["a"]),
        (list[str], "ab", INVALID),
        (int | None, None, None),
        (Path | None, "a/b", Path("a/b")),
        (float, float("inf"), float("inf")),
    ],
)
def test_plain_values_are_taken_strictly(wanted, value, made):
    got, faults = convert(wanted, value, Context())
    assert faults if made is INVALID else (got == made and type(got) is type(made) and not faults)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"pair": [1, 2], "span": {"low": 0}, "folder": "x", "brush": None, "names": ["a"]}, None),
        ({"brush": {"target": "tests.configs.Wide", "params": {"ratio": 2}}}, None),
        ({"brushes": {"a": {"target": "tests.configs.Brush"}}, "several": [{"target": "tests.configs.Brush"}]}, None),
        ({"engine": 1}, "params.engine: 'engine' is given to Wide at run time"),
        ({"span": {"low": 2}}, "params.span: low 2.0 is above high 1.0"),
        ({"span": {}}, "params.span: needs `low`"),
        ({"span": {"low": 0, "hihg": 1}}, "params.span.hihg: no such key; did you mean 'high'?"),
        ({"span": 3}, "params.span: expected a mapping of low, high or null, got 3 (int)"),
        ({"pair": [1, 2, 3]}, "params.pair: expected a list of 2: int, int"),
        ({"names": "abc"}, "params.names: expected a list of str, got 'abc' (str)"),
        ({"brush": {"target": "tests.configs.Range", "params": {"low": 0}}}, "expected Brush or null, got tests"),
        ({"brush": {"target": "tests.configs.Greedy"}}, "Greedy takes **options"),
        ({"brush": {"target": "tests.configs.helper"}}, "expected Brush or null, got tests.configs.helper"),
        ({"brushes": {"a": {"target": "tests.configs.Wide", "params": {"ratio": "x"}}}},
         "params.brushes.a.params.ratio: expected float, got 'x' (str)"),
        ({"several": [{"target": "tests.configs.Brush", "params": {"x": 1}}]},
         "params.several.0.params.x: Brush has no parameter 'x' (it takes none)"),
        ({"mode": "c"}, "params.mode: expected one of 'a', 'b', got 'c' (str)"),
    ],
)  # fmt: skip
def test_parameters_are_checked_against_the_signature(params, problem):
    checker = Checker({})
    checker.allow(["tests.configs"])
    made = checker.check(BRUSH, {"target": "tests.configs.Wide", "params": params}, ("c",))
    told = [str(p) for p in checker.problems]
    assert (made is INVALID) == (problem is not None), told
    assert (not told) if problem is None else (len(told) == 1 and problem in told[0]), told


def test_a_target_outside_needs_its_module_among_the_imports():
    with pytest.raises(
        TargetError, match=re.escape("list its module in `imports` to allow it: imports: [tests.configs]")
    ):
        resolve("tests.configs.Wide")
    assert resolve("tests.configs.Wide", ["tests.configs"]) is Wide
    assert allowed("torch.optim.adamw", [])
    assert not allowed("torch.optimum", [])
    assert not allowed("satellite", [])


def test_a_module_that_is_not_installed_is_told_once():
    checker = Checker({})
    checker.allow(["no_such_module.optim"])
    assert checker.check(BRUSH, {"target": "no_such_module.optim.Adam8bit"}, ("c",)) is INVALID
    assert ["cannot import" in str(problem) for problem in checker.problems] == [True]


@pytest.mark.parametrize("name", ["os", "subprocess", "builtins", "importlib.util", "sys"])
def test_python_itself_cannot_be_imported_by_a_config(name):
    with pytest.raises(TargetError, match="belongs to Python itself"):
        check_import(name)


def test_what_a_signature_says():
    takes = signature(Wide)
    assert takes.runtime == ("engine",)
    assert "engine" not in takes.params
    assert takes.defaults["ratio"] == 1.0
    with pytest.raises(TargetError, match=r"Greedy takes \*\*options, whose names cannot be checked"):
        signature(Greedy)


def test_what_a_target_makes():
    assert produces(ClassifierFree, Guider)  # a Protocol is met by its members
    assert not produces(ZeroSNR, Guider)
    assert produces(Wide, Brush | None)
    assert not produces(helper, Brush)
    assert produces(helper, str)
    assert produces(helper, Any)


def test_names_of_types_in_messages():
    assert show(Annotated[int, "note"] | None) == "int or null"
    assert show(dict[str, Brush]) == "a mapping of Brush"
    assert show(Range) == "a mapping of low, high"


def test_imports_of_a_config_open_its_modules():
    e = debug("imports=[tests.configs]")
    assert e.imports == ["tests.configs"]


def _leaves(section: type) -> Iterator[tuple[str, Any]]:
    """Every key of a section and of those within it, with its annotation."""
    for name, annotation in field_hints(section).items():
        inner = next(
            (r for a in (annotation, *get_args(annotation)) if (r := record_of(a)) is not None), None
        )
        yield f"{section.__name__}.{name}", annotation
        yield from _leaves(inner) if inner is not None and issubclass(inner, Section) else ()


def test_true_and_1_0_are_no_numbers_of_anything() -> None:
    """A switch where a count is meant, a part of one, and a quoted number."""
    checked = 0
    for name, annotation in _leaves(Experiment):
        union = get_origin(annotation) in (Union, UnionType)
        kinds = set(get_args(annotation)) if union else {annotation}
        assert not any(get_origin(a) is Literal and not isinstance(get_args(a)[0], str) for a in kinds), name
        if not kinds & {int, float} or str in kinds:
            continue
        checked += 1
        assert not fits(annotation, True) and not fits(annotation, "1"), name
        assert fits(annotation, 1.0) == (float in kinds), name
    assert checked > 50
    for value in (True, False, 1.0, "1", 4):
        assert not fits(Literal[0, 1, 2, 3], value)
    assert fits(Literal[0, 1, 2, 3], 1) and fits(Literal["a", True], True) and not fits(Literal["a", True], 1)
