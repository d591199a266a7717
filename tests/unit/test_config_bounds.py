"""Configs from strangers: whatever expands, nests or counts ends, each mistake in one line with its place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sat.config.load import load
from sat.config.yaml_source import parse
from tests.configs import DEBUG, debug, refused

LITERAL = ["a sign that says ???", "it costs ${5}", "???", "${sampling.seed}", "\\${x}", "${oc.env:X}", "${"]


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "more.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(autouse=True)
def quick():
    """Nothing here may run away: the largest case takes a fraction of this."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 20


# -- prompts are text


@pytest.mark.parametrize("text", LITERAL)
def test_a_prompt_reaches_the_model_as_it_is_written(write, text):
    quoted = "'" + text + "'"
    more = write(
        f"sampling: {{prompt: {quoted}, negative_prompt: {quoted}}}\n"
        "train: {objective: {target: sat.train.objectives.first_stage.FirstStageObjective}, steps: 1, "
        f"sample_prompts: [{quoted}]}}"
    )
    found = load([DEBUG, more], ["conditioning.tokenizer=null"])
    assert (found.sampling.prompt, found.sampling.negative_prompt) == (text, text)
    assert found.train is not None and found.train.sample_prompts == [text]
    listed = load([DEBUG, write(f"sampling: {{prompt: [{quoted}, b]}}")], ["sampling.prompt.1=" + text])
    assert listed.sampling.prompt == [text, text]


@pytest.mark.parametrize("text", LITERAL)
def test_a_prompt_typed_or_given_by_a_flag_is_text(text):
    assert debug(f"sampling.prompt={text}", f"sampling.negative_prompt={text}").sampling.prompt == text
    assert debug(("sampling.prompt", [text]), ("sampling.negative_prompt", text)).sampling.prompt == [text]


def test_a_reference_to_a_prompt_takes_its_text(write):
    more = write("sampling: {prompt: 'it costs ${5}'}\noutput: {dir: 'out/${sampling.prompt}'}")
    assert str(load([DEBUG, more]).output.dir) == "out/it costs ${5}"


def test_three_question_marks_elsewhere_are_text_too(write):
    assert str(load([DEBUG, write("output:\n  dir: ???")]).output.dir) == "???"
    more = write("sampling:\n  steps: ???\n  guider:\n    target: ???")
    steps, guider = refused([DEBUG, more])
    assert steps == f"{more}:2: sampling.steps: expected int, got '???' (str)"
    assert guider.startswith(f"{more}:4: sampling.guider.target: expected a dotted name")


# -- references


def test_resolvers_are_refused_before_anything_could_call_them(write):
    called = []
    OmegaConf.register_resolver("told", lambda: called.append(1), replace=True)
    first = write("sampling:\n  guider: ${told:}\n  steps: ${env:HOME}\n")
    lines = refused([DEBUG, first, DEBUG], ["sampling.guider={target: sat.diffusion.guidance.Unguided}"])
    assert [line.partition(" is not")[0] for line in lines] == [
        f"{first}:2: sampling.guider: ${{told:}}",
        f"{first}:3: sampling.steps: ${{env:HOME}}",
    ]
    assert not called
    OmegaConf.clear_resolver("told")


def test_a_mapping_over_a_reference_replaces_it(write):
    more = write("sampling: {guider: '${sampling.sampler}'}")
    found = load([DEBUG, more], ["sampling.guider={target: sat.diffusion.guidance.Unguided}"])
    assert found.sampling.guider.target == "sat.diffusion.guidance.Unguided"


def test_references_that_multiply_end_in_one_line(write):
    chain = "".join(f"  x{i}: '{' '.join([f'${{sampling.x{i + 1}}}'] * 4)}'\n" for i in range(14))
    more = write(f"sampling:\n{chain}  x14: end\n")
    (line,) = refused([DEBUG, more])
    assert line == f"{more}:2: sampling.x0: references expand to more than 10000 values"


@pytest.mark.parametrize(
    ("refers", "over"),
    [
        ("output: {dir: '${x0}'}", "output: {dir: a}"),
        ("output: {dir: '${x0}'}", "output: {dir: {a: 1}}"),
        ("output: {dir: '${x0}'}", "output: {dir: [a]}"),
        ("output: {dir: '${x0}'}", "output.dir=a"),
        ("output: {dir: '${x0}'}", "output.dir.x=a"),
        ("output: '${x0}'", "output.dir=a"),
        ("sampling: {prompt_file: '${x0}'}", "sampling.prompt=a"),
        ("sampling: {prompt_file: '${x0}'}", "sampling: {prompt: a}"),
        ("sampling: {guider: {target: '${x0}'}}", "sampling.guider.target=a.b"),
        ("sampling: {guider: {target: '${x0}'}}", "sampling: {guider: {target: a.b, params: {}}}"),
        ("data: {sources: [{path: '${x0}'}]}", "data.sources.0.path=a"),
        ("model: {params: {more: [{target: '${x0}'}]}}", "model.params.more.0.target=a.b"),
        ("sampling: '${x0}'", "sampling: {prompt: a}"),
    ],
)  # fmt: skip
def test_laying_over_a_reference_follows_none(write, tmp_path, refers, over):
    chain = "".join(f"x{i}: '{' '.join([f'${{x{i + 1}}}'] * 4)}'\n" for i in range(14))
    more, later = write(f"{chain}x14: end\n{refers}\n"), tmp_path / "later.yaml"
    later.write_text(over if "=" not in over else "")
    lines = refused([DEBUG, more, later], [over] if "=" in over else [])
    told = [line for line in lines if line.endswith("references expand to more than 10000 values")]
    assert len(told) == 1 and told[0].startswith(f"{more}:")


def test_many_references_to_one_large_value_are_counted_together(write):
    large = "large: {" + ", ".join(f"k{i}: 1" for i in range(600)) + "}\n"
    more = write(large + "many: [" + ", ".join(["'${large}'"] * 20) + "]\n")
    (line,) = refused([DEBUG, more])
    assert "references expand to more than 10000 values" in line
    more = write(f"long: {'x' * 50_000}\nmany: [" + ", ".join(["'${long}${long}'"] * 11) + "]\n")
    (line,) = refused([DEBUG, more])
    assert "more than 10000 values" in line


@pytest.mark.parametrize("hops", [70, 5000])
def test_references_through_too_many_levels_end_in_one_line(write, hops):
    chain = "".join(f"x{i}: ${{x{i + 1}}}\n" for i in range(hops))
    more = write(f"{chain}x{hops}: end\n")
    (line,) = refused([DEBUG, more])
    assert line == f"{more}:1: x0: references go through more than 64 levels"


def test_a_chain_of_sixty_references_is_followed(write):
    chain = ", ".join(f"'${{checkpoint.allow_missing.{i + 1}}}'" for i in range(50))
    found = load([DEBUG, write(f"checkpoint: {{allow_missing: [{chain}, end]}}")])
    assert found.checkpoint.allow_missing == ["end"] * 51


# -- YAML


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (BOMB, None, "more than 20000 keys after aliases are written out"),
        (MERGES, None, "keys after aliases are written out"),
        ("a: {<<: {x: 1}, <<: {y: 1}}", 1, "a.<<: given twice in this file"),
        ("x: 1\ny: " + "[" * 65 + "]" * 65, 2, "nested deeper than 64 levels"),
        ("x: 1\ny: " + "[" * 50_000, 2, "nested deeper than 64 levels"),
        ("y: " + "{a: " * 65 + "1" + "}" * 65, 1, "nested deeper than 64 levels"),
        ("a: &a " + "[" * 40 + "]" * 40 + "\nb: &b " + "[" * 40 + "*a" + "]" * 40, 1, "nested deeper"),
        ("x: 1\na: &a [*a]", 2, "a.0: an alias that contains itself"),
        ("x: 1\na: &a {b: {c: *a}}", 2, "a.b.c: an alias that contains itself"),
        ("x: 1\na: !!python/object:os.system {}", 2, "python/object:os.system' is not possible here"),
        ("x: 1\n!!python/name:os.system a: 1", 2, "python/name:os.system' is not possible here"),
        ("x: 1\na: !!int abc", 2, "a: tag 'tag:yaml.org,2002:int' is not that of 'abc' (str)"),
        ("x: 1\na: !!bool maybe", 2, "a: tag 'tag:yaml.org,2002:bool' is not that of 'maybe' (str)"),
        ("x: 1\na: !!float [1]", 2, "a: tag 'tag:yaml.org,2002:float' is not that of"),
        ("x: 1\na: !strange 1", 2, "tag '!strange' is not possible here"),
        ("x: 1\na: !bad!tag 1", 2, "not valid YAML"),
        ("x: 1\nsampling: {steps: " + "9" * 5000 + "}", 2, "sampling.steps: a number of 5000 characters"),
        ("x: 1\nsampling: {steps: 0x" + "f" * 5000 + "}", 2, "sampling.steps: a number of 5002 characters"),
        ("x: 1\ny: 'a\x00b'", 2, "not valid YAML: character 0x0"),
        ("x: 1\n? [a]\n: 2", 2, "a key must be a single word"),
        ("x: 1\ny: *gone", 2, "not valid YAML: found undefined alias"),
    ],
)  # fmt: skip
def test_yaml_without_a_sensible_reading_is_one_line(write, text, line, what):
    more = write(text)
    (told,) = refused([DEBUG, more])
    assert told.startswith(f"{more}:{line or ''}")
    assert what in told


def test_what_is_within_the_bounds_is_read():
    assert parse("y: " + "[" * 60 + "]" * 60, "x")[0]
    assert parse("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: !!float 1\nd: !!str 1", "x")[0] == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": 1.0, "d": "1",
    }  # fmt: skip
    assert parse("n: " + "9" * 1000, "x")[0]["n"] == 10**1000 - 1


def test_an_override_with_no_end_is_taken_as_text():
    assert "expected int" in refused([DEBUG], ["sampling.steps=" + "9" * 5000])[0]
    assert "expected int" in refused([DEBUG], ["sampling.steps=" + "[" * 5000])[0]


@pytest.mark.parametrize("value", [10**5000, "\udce9"], ids=["digits", "surrogate"])
def test_values_from_python_that_no_config_can_hold_are_one_line(value):
    (line,) = refused([DEBUG], [("output.dir", value)])
    assert line.startswith("override: output.dir: ")
