"""The arguments of sample.py: what they set, what they refuse, how fast they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sat.cli.sample import arguments, given
from sat.config.load import load_full

ROOT = Path(__file__).parents[2]


def test_options_only_set_config_keys() -> None:
    args = arguments(
        ["--base", "a.yaml", "b.yaml", "--prompt-file", "p.txt", "--negative-prompt", "blurry", "--resume"]
        + ["--output-dir", "OUT", "--seed", "3", "--height", "64", "--width", "96", "--steps", "5"]
        + ["--guidance", "2", "--batch-size", "4"]
    )
    assert args.base == ["a.yaml", "b.yaml"]
    assert dict(given(args)) == {
        "sampling.prompt": None,
        "sampling.prompt_file": "p.txt",
        "sampling.negative_prompt": "blurry",
        "output.dir": "OUT",
        "sampling.seed": 3,
        "sampling.height": 64,
        "sampling.width": 96,
        "sampling.steps": 5,
        "sampling.guider.params.scale": 2.0,
        "sampling.batch_size": 4,
        "output.resume": True,
    }


def test_nothing_is_set_that_was_not_asked_for() -> None:
    assert given(arguments(["--base", "a.yaml"])) == []


def test_prompts_add_up_and_replace_a_prompt_file_of_the_config() -> None:
    args = arguments(["--base", "a.yaml", "--prompt", "a cat", "--prompt", "${x}: 'y'\n🍎"])
    assert dict(given(args)) == {
        "sampling.prompt": ["a cat", "${x}: 'y'\n🍎"],
        "sampling.prompt_file": None,
    }


def test_zero_and_empty_values_are_values() -> None:
    args = arguments(["--base", "a.yaml", "--seed", "0", "--negative-prompt", "", "--guidance", "0"])
    assert dict(given(args)) == {
        "sampling.seed": 0,
        "sampling.negative_prompt": "",
        "sampling.guider.params.scale": 0.0,
    }


@pytest.mark.parametrize(
    "line",
    [
        "--base a.yaml sampling.steps=3 model.params.dim=8 --seed 1",
        "--base a.yaml --seed 1 sampling.steps=3 model.params.dim=8",
        "sampling.steps=3 --base a.yaml --seed 1 model.params.dim=8",
        "sampling.steps=3 --seed 1 --base a.yaml model.params.dim=8",
    ],
)
def test_overrides_may_stand_anywhere(line: str) -> None:
    args = arguments(line.split())
    assert args.base == ["a.yaml"]
    assert sorted(args.overrides) == ["model.params.dim=8", "sampling.steps=3"]


def test_resume_leaves_the_folder_to_the_config() -> None:
    assert dict(given(arguments(["--base", "a.yaml", "--resume"]))) == {"output.resume": True}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x --base a.yaml --seed 1", "unexpected argument 'x': expected section.key=value, or --base x"),
        ("--base a.yaml --prompt x --prompt-file y", "exclude each other"),
        ("--base a.yaml --seed x", "invalid int value: 'x'"),
        ("--base a.yaml --see 1", "unrecognized arguments: --see; did you mean --seed?"),
        ("--base a.yaml --prompts x --step 2", "did you mean --prompt and --steps?"),
        ("--base a.yaml --prompt a red apple", "put the prompt in quotes, --prompt 'a red apple'"),
        ("--base sampling.steps=3", "--base is needed"),
    ],
)
def test_wrong_arguments_are_refused_with_code_2(capsys, line: str, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments(line.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 2, "a short usage, and the reason"


def test_without_a_config_the_small_model_draws_and_a_line_says_so(capsys) -> None:
    assert arguments(["--prompt", "x"]).base == ["configs/tiny.yaml"]
    assert "the small model of configs/tiny.yaml draws" in capsys.readouterr().err


def test_an_option_is_named_in_the_message_about_its_value() -> None:
    args = arguments(["--base", "x", "--prompt-file", "no.txt"])
    missing = [str(one) for one in load_full([ROOT / "configs/debug.yaml"], given(args)).missing]
    assert any(one.startswith("--prompt-file: sampling.prompt_file: there is no 'no.txt'") for one in missing)


@pytest.mark.parametrize("joined", [" ", "="])
def test_the_options_of_the_original_are_understood(joined: str, capsys) -> None:
    line = "--prompt x --model_path M --num_inference_steps 7 --guidance_scale=3 --dtype bfloat16"
    words = (line + " --num-images-per-prompt 2").replace("--model_path ", f"--model_path{joined}").split()
    args = arguments(words)
    assert args.base == ["configs/plus.yaml"]
    assert args.overrides == ["checkpoint.path=M", "sampling.dtype=bf16"]
    assert (args.steps, args.guidance, args.batch_size) == (7, 3.0, 2)
    err = capsys.readouterr().err
    assert "--num_inference_steps is the original's; here it is --steps" in err and "small model" not in err
    assert arguments(["--base", "a.yaml", "--model-path", "M"]).base == ["a.yaml"]
    assert arguments(["--base", "a.yaml", "--batch_size", "3", "--output_dir=O"]).output_dir == "O"


@pytest.mark.parametrize(
    ("words", "advice"), [("--output_path a.png", "--output-dir OUT"), ("--input-type txt", "leave it out")]
)
def test_an_option_of_the_original_without_our_like_has_advice(words: str, advice: str, capsys) -> None:
    with pytest.raises(SystemExit):
        arguments(["--base", "a.yaml", *words.split()])
    assert advice in capsys.readouterr().err


def test_help_stands_in_groups_with_examples(capsys) -> None:
    with pytest.raises(SystemExit):
        arguments(["--help"])
    out = capsys.readouterr().out
    heads = [line for line in out.splitlines() if re.fullmatch(r"[a-z ]+:", line)]
    groups = [
        "pictures:",
        "pictures to start from:",
        "several at once:",
        "output folder:",
        "prompts written by a language model:",
        "config:",
        "messages:",
    ]
    assert heads[1:] == groups
    assert out.index('python sample.py --prompt "a red apple"') < out.index(heads[0])


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = """
import atexit, runpy, sys, time
heavy = ("torch", "pydantic", "omegaconf", "yaml")
atexit.register(lambda: print([name in sys.modules for name in heavy], time.process_time()))
sys.argv = ["sample.py", "--help"]
runpy.run_path("sample.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported, _, seconds = done.stdout.rstrip().rpartition(" ")
    assert imported.endswith("[False, False, False, False]")
    assert (
        float(seconds) < 0.5
    )  # of the processor, so that a neighbour does not count; 0.05 on a quiet machine


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, sat; assert 'torch' not in sys.modules; print(sat.__version__, 'Pipeline' in dir(sat))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("True\n")


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import sat

    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        sat.Pipelin  # noqa: B018


def test_options_of_controls_go_into_each_and_not_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", "configs/tiny.yaml", "--prompt", "x", "--control-guess"]
    controls = dict(given(arguments([*words, "--control", "a:b:0.5", "--control", "c:d"])))[
        "sampling.controls"
    ]
    assert [(one["path"], one["scale"], one["guess"]) for one in controls] == [
        ("a", 0.5, True),
        ("c", 1.0, True),
    ]
    assert all("preprocess" not in one for one in controls)
    with pytest.raises(SystemExit):
        arguments(words)
    assert "--control-guess goes with --control" in capsys.readouterr().err
