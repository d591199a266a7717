"""The package ``cogview3``: its command, its names, what it ships, and another ``sat`` in its place."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import cogview3
import sat
from cogview3 import __main__ as command
from sat.util import host
from tests.architecture.tree import ROOT, files

PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def found(monkeypatch):
    """Lets Python find ``origin`` (or a bare folder) as the package ``sat``."""

    def find(origin: Path | None, folder: Path | None = None) -> None:
        spec = None
        if origin is not None or folder is not None:
            spec = ModuleSpec("sat", None, origin=None if origin is None else str(origin), is_package=True)
            spec.submodule_search_locations = [str(folder or origin.parent)]
        monkeypatch.setattr(cogview3, "find_spec", lambda name: spec)

    return find


def test_the_public_names_are_those_of_sat() -> None:
    assert sorted(cogview3.__all__) == sorted(sat.__all__)
    assert cogview3.Pipeline is sat.Pipeline and cogview3.__version__ == sat.__version__
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        cogview3.Pipelin  # noqa: B018


def test_our_own_sat_bears_the_mark() -> None:
    assert cogview3.overwritten() is None


def test_another_file_in_our_place_is_told_with_what_to_do(found, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cogview3, "__file__", str(tmp_path / "cogview3" / "__init__.py"))
    theirs = tmp_path / "sat" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text('__version__ = "0.4.12"\n')
    found(theirs)
    with pytest.raises(ImportError, match=r"overwritten or removed .*pip uninstall -y SwissArmyTransformer"):
        cogview3.Pipeline  # noqa: B018
    assert command.main(["sample", "--help"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    theirs.unlink()
    found(None, theirs.parent)  # after `pip uninstall SwissArmyTransformer`, a folder without __init__.py
    assert "overwritten or removed" in str(cogview3.overwritten())
    found(None)
    assert "there is none" in str(cogview3.overwritten())


def test_another_sat_that_is_found_first_is_told(found, tmp_path) -> None:
    theirs = tmp_path / "elsewhere" / "sat" / "__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    found(theirs)
    assert f"take {tmp_path / 'elsewhere'} off PYTHONPATH" in str(cogview3.overwritten())


def test_swissarmytransformer_in_our_folder_is_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "__file__", str(tmp_path / "cogview3" / "__main__.py"))
    command._tell_neighbour()
    assert capsys.readouterr().err == ""
    (tmp_path / "sat" / "mpu").mkdir(parents=True)
    command._tell_neighbour()
    assert "SwissArmyTransformer was installed into" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_says_the_command_as_it_was_typed(name, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["cogview3", name, "--help"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(f"usage: cogview3 {name} ")
    with pytest.raises(SystemExit):
        command.main(["help", name])
    assert capsys.readouterr().out == out
    assert not re.search(r"python |\w+\.py\b", out)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("", 2, "cogview3 COMMAND"),
        ("--help", 0, "draw pictures"),
        ("--version", 0, f"cogview3 {sat.__version__}"),
        ("sampel --prompt x", 2, "did you mean 'sample'?"),
        ("--prompt x", 2, "its options follow it"),
    ],
)
def test_the_first_word_is_a_command(line: str, code: int, words: str, capsys) -> None:
    assert command.main(line.split()) == code
    assert words in "".join(capsys.readouterr())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_shell_completes_commands_and_options(capsys) -> None:
    assert command.completion(["bash"]) == 0
    script = (
        capsys.readouterr().out
        + """
    typed() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _cogview3; echo "${COMPREPLY[@]}"; }
    typed cogview3 tr; typed cogview3 sample --prom; typed cogview3 web --max; typed cogview3 sample a
    """
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train", "--prompt --prompt-file", "--max-images", ""]
    assert command.completion(["tcsh"]) == 2
    assert command.completion(["fish"]) == command.completion(["zsh"]) == 0
    out = capsys.readouterr().out
    assert "-n '__fish_seen_subcommand_from sample' -l prompt-file" in out and "bashcompinit" in out


def test_requirements_are_the_dependencies_and_wandb() -> None:
    block = PROJECT.partition("\ndependencies = [")[2].partition("]")[0]
    own, extra = re.findall(r'"([^"]+)"', block), re.findall(r'^wandb = \["(.+)"\]', PROJECT, re.MULTILINE)
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    assert own and extra and sorted(lines) == sorted(own + extra)


def test_the_extra_all_is_all_extras() -> None:
    section = PROJECT.partition("optional-dependencies]")[2].partition("\n[")[0]
    names = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    assert f'all = ["cogview3[{",".join(names[:-1])}]"]' in section and names[-1] == "all"


def test_what_is_needed_is_said_for_checkout_and_package(monkeypatch, tmp_path) -> None:
    assert host.install("web") == "pip install -e '.[web]'"
    monkeypatch.setattr(host, "HOME", tmp_path)
    assert host.install("web") == "pip install 'cogview3[web]'"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel holds, as pip would unpack it."""
    root = tmp_path_factory.mktemp("wheel")
    words = ["-q", "egg_info", "--egg-base", root, "build_py", "--build-lib", root / "site"]
    subprocess.run([sys.executable, "setup.py", *words], cwd=ROOT, check=True, capture_output=True)
    (points,) = root.glob("*.egg-info/entry_points.txt")
    assert "cogview3 = cogview3.__main__:run" in points.read_text()
    return root / "site"


@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="a wheel is built with setuptools")
def test_the_wheel_holds_all_that_ships_and_draws_anywhere(installed: Path, tmp_path: Path) -> None:
    for path in files():
        part = path.relative_to(ROOT)
        if part.parts[0] in ("sat", "cogview3"):
            assert (installed / part).is_file(), part
        if part.parts[0] in ("configs", "checkpoints") or part.parts[:2] == ("data", "emoji_sample"):
            assert (installed / "cogview3/_data" / part).read_bytes() == path.read_bytes()
    words = ["sample", "--prompt", "a red apple", "--steps", "2", "parallel.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "cogview3", *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no --base, so the small model of configs/tiny.yaml draws" in done.stderr
    assert f"the one that ships: {installed / 'cogview3/_data/configs/tiny.yaml'}" in done.stderr
    assert (tmp_path / done.stdout.strip()).is_file()
