"""Words of earlier versions in configs: read as today's, with a notice that names the line and both words."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat import compat
from sat.config.load import dump, load, load_full
from tests.configs import DEBUG, refused

PREDICTION = "diffusion:\n  parameterisation: {target: sat.diffusion.prediction.Eps}\n"
SAMPLER = "sampling:\n  sampler: {target: sat.diffusion.samplers.Euler, params: {old_churn: 1.5}}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "more.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def words(monkeypatch):
    parameters = {"sat.diffusion.samplers.Euler": {"old_churn": "churn"}}
    monkeypatch.setattr(compat, "PARAMETERS", parameters)


def test_an_earlier_key_is_read_with_a_notice(write):
    more = write(PREDICTION)
    loaded = load_full([DEBUG, more], ["conditioning.tokenizer=null"])
    assert loaded.experiment.diffusion.prediction.target == "sat.diffusion.prediction.Eps"
    assert loaded.notices == [f"{more}:2: diffusion.parameterisation is now called diffusion.prediction"]
    assert "parameterisation" not in dump(loaded.experiment)


def test_an_earlier_key_keeps_its_line_in_messages(write):
    more = write("diffusion:\n  parameterisation:\n    target: sat.diffusion.prediction.Epss\n")
    (line,) = refused([DEBUG, more])
    assert line.startswith(f"{more}:3: diffusion.prediction.target: module 'sat.diffusion.prediction' has no")


def test_an_earlier_key_beside_its_new_one_is_an_error(write):
    more = write(PREDICTION + "  prediction: {target: sat.diffusion.prediction.Eps}\n")
    (line,) = refused([DEBUG, more])
    assert line == (
        f"{more}:2: diffusion.parameterisation: is now called diffusion.prediction, which is given too: "
        "keep only that"
    )
    both = [
        f"diffusion.{name}.target=sat.diffusion.prediction.Eps" for name in ("parameterisation", "prediction")
    ]
    for order in (both, both[::-1]):
        (line,) = refused([DEBUG], order)
        assert line.startswith(
            "override: diffusion.parameterisation.target: is now called diffusion.prediction"
        )


def test_an_earlier_key_may_be_laid_over_its_new_one_and_the_reverse(write):
    eps, v = (f"{{target: sat.diffusion.prediction.{name}}}" for name in ("Eps", "V"))
    early = write(f"diffusion: {{parameterisation: {eps}}}", "a.yaml")
    late = write(f"diffusion: {{prediction: {v}}}", "b.yaml")
    assert load([DEBUG, early, late]).diffusion.prediction.target.endswith("V")
    assert load([DEBUG, late, early]).diffusion.prediction.target.endswith("Eps")


def test_an_earlier_key_is_an_override_too():
    loaded = load_full([DEBUG], ["diffusion.parameterisation.target=sat.diffusion.prediction.Eps"])
    assert loaded.experiment.diffusion.prediction.target == "sat.diffusion.prediction.Eps"
    assert loaded.notices == ["override: diffusion.parameterisation is now called diffusion.prediction"]


def test_an_earlier_target_is_read_with_a_notice(write):
    more = write(
        "diffusion:\n"
        "  prediction:\n"
        "    target: sat.diffusion.denoiser.Eps\n"
        "model:\n"
        "  params: {mixins: {position: {target: sat.mixins.rope.Rope, "
        "params: {head_dim: 8, height: 4, width: 6}}}}\n"
    )
    loaded = load_full([DEBUG, more])
    assert loaded.experiment.diffusion.prediction.target == "sat.diffusion.prediction.Eps"
    assert loaded.experiment.model.params["mixins"]["position"]["target"] == "sat.mixins.rope.RoPE"
    assert loaded.notices == [
        f"{more}:3: sat.diffusion.denoiser.Eps is now called sat.diffusion.prediction.Eps",
        f"{more}:5: sat.mixins.rope.Rope is now called sat.mixins.rope.RoPE",
    ]


def test_an_earlier_name_of_the_same_target_keeps_its_params(write):
    first = write(
        "sampling: {sampler: {target: sat.diffusion.samplers.Euler, params: {churn: 2.0}}}", "a.yaml"
    )
    second = write("sampling: {sampler: {target: sat.diffusion.sampler.Euler}}", "b.yaml")
    assert load([DEBUG, first, second]).sampling.sampler.params == {"churn": 2.0}


def test_an_earlier_parameter_is_read_with_a_notice(write, words):
    more = write(SAMPLER)
    loaded = load_full([DEBUG, more], ["sampling.sampler.params.old_churn=2"])
    assert loaded.experiment.sampling.sampler.params == {"churn": 2}
    inside = "sampling.sampler.params"
    assert loaded.notices == [
        f"{more}:2: {inside}.old_churn is now called {inside}.churn",
        f"override: {inside}.old_churn is now called {inside}.churn",
    ]


def test_an_earlier_parameter_is_known_by_the_target_of_an_earlier_file(write, words):
    first = write("sampling: {sampler: {target: sat.diffusion.sampler.Euler}}", "a.yaml")
    second = write("sampling: {sampler: {params: {old_churn: 1.5}}}", "b.yaml")
    assert load([DEBUG, first, second]).sampling.sampler.params == {"churn": 1.5}


def test_an_earlier_parameter_beside_its_new_one_is_an_error(write, words):
    more = write(SAMPLER.replace("old_churn: 1.5", "old_churn: 1.5, churn: 2.0"))
    (line,) = refused([DEBUG, more])
    assert line.startswith(f"{more}:2: sampling.sampler.params.old_churn: is now called")


def test_other_targets_have_no_such_parameter(write, words):
    more = write(SAMPLER.replace("Euler", "DDIM"))
    (line,) = refused([DEBUG, more])
    assert "DDIM has no parameter 'old_churn'" in line
