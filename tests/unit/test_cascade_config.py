"""Cascade files: their stages, where overrides go, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat.config.build import components
from sat.config.cascade import Cascade, dump_cascade, load_cascade
from sat.config.yaml_source import ConfigError
from sat.diffusion.process import ProcessInput
from tests.configs import DEBUG, ROOT

TOY = ROOT / "tests" / "assets" / "toy"
CASCADE = TOY / "cascade.yaml"


def refused(*bases: object, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        load_cascade([str(base) for base in bases], list(overrides))
    return str(error.value)


def test_each_stage_is_its_own_files_and_later_ones_draw_the_enlarged_size() -> None:
    cascade = load_cascade([CASCADE])
    assert [stage.name for stage in cascade.stages] == ["base", "relay"] and not cascade.keep
    sizes = [(s.experiment.sampling.height, s.experiment.sampling.width) for s in cascade.stages]
    assert sizes == [(32, 48), (64, 96)]
    assert [components(stage.experiment).process.input for stage in cascade.stages] == [
        None,
        ProcessInput("low_res", 2),
    ]


def test_the_size_of_the_first_stage_decides_those_of_the_others() -> None:
    cascade = load_cascade([CASCADE], ["sampling.height=16", "sampling.width=32"])
    assert (cascade.stages[1].experiment.sampling.height, cascade.stages[1].experiment.sampling.width) == (
        32,
        64,
    )


def test_what_makes_one_picture_is_set_for_the_first_stage_alone_all_else_for_every_stage() -> None:
    cascade = load_cascade(
        [CASCADE],
        ["sampling.steps=7", "sampling.guider.params.scale=9", "sampling.seed=5", ("sampling.prompt", "x")],
    )
    base, relay = (stage.experiment.sampling for stage in cascade.stages)
    assert (base.steps, relay.steps) == (7, 3)
    assert (base.guider.params["scale"], relay.guider.params["scale"]) == (9, 2.0)
    assert (base.seed, relay.seed, base.prompt, relay.prompt) == (5, 5, "x", "x")


def test_one_stage_is_set_by_its_name_and_files_over_the_cascade_are_laid_over_all(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("sampling: {seed: 3}\n")
    cascade = load_cascade([CASCADE, over], ["cascade.relay.sampling.steps=5", "cascade.keep=true"])
    assert [s.experiment.sampling.steps for s in cascade.stages] == [4, 5]
    assert [s.experiment.sampling.seed for s in cascade.stages] == [3, 3] and cascade.keep


def test_a_file_of_one_model_is_a_run_of_one_nameless_stage() -> None:
    cascade = load_cascade([DEBUG])
    assert [stage.name for stage in cascade.stages] == [""]


def test_a_written_cascade_reads_back(tmp_path: Path) -> None:
    from sat.config.load import dump

    cascade = load_cascade([CASCADE])
    files = {}
    for stage in cascade.stages:
        files[stage.name] = tmp_path / f"{stage.name}.yaml"
        files[stage.name].write_text(dump(stage.experiment))
    (tmp_path / "whole.yaml").write_text(dump_cascade(files, keep=True))
    again: Cascade = load_cascade([tmp_path / "whole.yaml"])
    assert [s.experiment for s in again.stages] == [s.experiment for s in cascade.stages] and again.keep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cascade: {stages: [{name: a, base: [configs/debug.yaml]}]}", "expected at least two stages, got 1"),
        (
            "cascade: {stages: [{name: a b, base: [x.yaml]}, {name: c, base: [x.yaml]}]}",
            "letters, digits and _",
        ),
        ("cascade: {stages: [{name: a, base: []}, {name: c, base: [x.yaml]}]}", "at least one config file"),
        ("cascade: {stags: []}", "did you mean 'stages'"),
        ("cascade: {stages: [{name: a, base: [x.yaml]}, {name: a, base: [x.yaml]}]}", "different names"),
        (
            "cascade: {stages: [{name: a, base: [configs/debug.yaml]}, "
            "{name: b, base: [configs/debug.yaml]}]}",
            "a later stage of a cascade needs a relay, this has none",
        ),
        (
            "cascade: {stages: [{name: a, base: [gone.yaml]}, {name: b, base: [gone.yaml]}]}",
            "gone.yaml: there is no such config",
        ),
    ],
)
def test_a_bad_cascade_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert message in refused(tmp_path / "c.yaml")


def test_other_sections_in_a_cascade_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CASCADE.read_text() + "sampling: {seed: 1}\n")
    assert "a cascade file holds only `cascade`" in refused(tmp_path / "c.yaml")


def test_a_cascade_after_another_file_is_refused() -> None:
    assert "comes first in --base" in refused(DEBUG, CASCADE)


def test_an_override_of_no_stage_names_the_nearest() -> None:
    message = refused(CASCADE, overrides=("cascade.rely.sampling.steps=2",))
    assert "no stage or setting of this name; did you mean 'relay'?" in message


def test_keep_is_true_or_false() -> None:
    assert "expected true or false, got 'maybe'" in refused(CASCADE, overrides=("cascade.keep=maybe",))
