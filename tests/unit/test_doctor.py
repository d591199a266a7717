"""``python -m sat.cli.doctor``: what is well is ok, what is broken a problem with what to do, and code 1."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from sat.checkpoint.verify import digest_file
from sat.cli import doctor
from sat.cli.sample import main as sample
from sat.train.resume import MARKER, RunFolder
from sat.util.lock import Lock
from tests.attack.runs import World
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT
from tests.unit.test_lock import dead_pid
from tests.unit.test_train_resume import PROGRESS


class Seen(NamedTuple):
    """The exit code and the checks, by name; the last of a name counts."""

    code: int
    checks: dict[str, dict[str, Any]]

    def problems(self) -> list[str]:
        return [name for name, check in self.checks.items() if check["state"] == "problem"]


@pytest.fixture
def look(capsys, monkeypatch):
    """Runs the command; without paths of its own it looks at ``paths`` alone, which is quick."""
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)

    def run(*paths: Path, whole: bool = False) -> Seen:
        if not whole:
            for name in ("_package", "_packages", "_environment", "_cpu", "_memory", "_accelerator"):
                monkeypatch.setattr(doctor, name, lambda: iter(()))
            monkeypatch.setattr(doctor, "_shipped", lambda: iter(()))
        capsys.readouterr()
        code = doctor.main([*map(str, paths), "--json"])
        found = json.loads(capsys.readouterr().out)
        checks = {check["name"]: check for check in found["checks"]}
        assert sum(found["count"].values()) == len(found["checks"])
        return Seen(code, checks)

    yield run
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """Weights in every format, and a training with one checkpoint."""
    root = tmp_path_factory.mktemp("healthy")
    World(root).write()
    run = RunFolder(root / "state")
    path = run.begin(3)
    (path / "state").mkdir()
    shard = path / "state" / "shard_000_00000.safetensors"
    shutil.copyfile(root / "native" / "model.safetensors", shard)
    run.commit(path, replace(PROGRESS, step=3), {f"state/{shard.name}": digest_file(shard)})
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Pictures of two shares of three prompts."""
    root = tmp_path_factory.mktemp("drawn")
    (root / "prompts.txt").write_text("red apple\ndog\nsun\n")
    spiece = tokenizer(root / "spiece.model")
    words = ["--base", str(DEBUG), f"conditioning.tokenizer={spiece}", "parallel.device=cpu", "--steps", "1"]
    words += ["--prompt-file", str(root / "prompts.txt"), "--output-dir", str(root / "out")]
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    assert [sample([*words, f"sampling.share={part}/2"]) for part in (0, 1)] == [0, 0]
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)
    return root / "out"


def test_this_machine_is_told_in_lines_and_as_json(look, capsys, monkeypatch) -> None:
    seen = look(whole=True)
    assert seen.checks["python"]["facts"]["version"] in sys.version
    assert seen.checks["packages"]["facts"]["torch"]["required"].startswith("<2")
    assert seen.checks["cpu"]["facts"]["usable"] >= 1
    assert "checkpoints/tiny/model.safetensors" in str(seen.checks["shipped weights"]["facts"]["files"])
    assert seen.checks["shipped weights"]["state"] == "ok"
    monkeypatch.setattr(doctor, "_accelerator", lambda: 1 / 0)  # whatever breaks, the rest is looked at
    monkeypatch.setattr(doctor, "_shipped", lambda: iter(()))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"(ok|note|problem) +\S.*: ", line) for line in lines[:-1])
    assert any(line.startswith("problem ") and "division by zero" in line for line in lines)
    assert lines[-1].startswith(f"{len(lines) - 1} checks: ")


def test_another_package_called_sat_is_told(look, tmp_path, monkeypatch) -> None:
    (tmp_path / "sat").mkdir()
    (tmp_path / "sat" / "__init__.py").touch()
    info = tmp_path / "SwissArmyTransformer-0.4.12.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: SwissArmyTransformer\nVersion: 0.4.12\n")
    (info / "top_level.txt").write_text("sat\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (check,) = doctor._package()
    assert check.state == "note" and f"SwissArmyTransformer and {tmp_path / 'sat'}" in check.text
    assert check.do.startswith("pip uninstall SwissArmyTransformer")
    (info / "RECORD").write_text(f"{ROOT / 'sat/engine.py'},,\n")  # one over the other
    (check,) = doctor._package()
    assert check.state == "problem" and "in the same folder as this one" in check.text


@pytest.mark.parametrize(
    ("values", "name", "words"),
    [
        ({"RANK": "0"}, "_environment", "RANK without LOCAL_RANK, WORLD_SIZE"),
        ({"SAT_SITE": "/none"}, "_slurm", "SAT_SITE names /none"),
    ],
)
def test_what_stops_every_run_is_a_problem(values, name, words, monkeypatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    (check,) = getattr(doctor, name)()
    assert (check.state, bool(check.do)) == ("problem", True) and words in check.text


def test_a_package_out_of_its_bounds_is_a_problem(monkeypatch) -> None:
    version = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "einops" else version(name))
    (check,) = [check for check in doctor._packages() if check.name == "packages"]
    assert check.state == "problem" and check.text == "einops 0.1 (required <1,>=0.8)"
    assert "pip install -r" in check.do


def test_an_extra_is_there_when_all_its_packages_are(monkeypatch) -> None:
    required = [("web", "einops"), ("web", "no-such-package"), ("plot", "einops"), ("", "torch")]
    monkeypatch.setattr(doctor, "_requirements", lambda: required)
    (check,) = [check for check in doctor._packages() if check.name == "extras"]
    assert check.facts == {"there": ["plot"], "absent": ["web"]}


@pytest.mark.parametrize("kind", ["native", "sat", "diffusers"])
def test_weights_are_whole_or_named(look, healthy, tmp_path, kind) -> None:
    folder = tmp_path / kind
    shutil.copytree(healthy / kind, folder)
    assert look(folder).code == 0
    file = max(folder.rglob("*.*"), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    file.write_bytes(raw)
    seen = look(folder)
    assert seen.code == 1 and seen.problems() == [str(folder)]
    assert str(file) in seen.checks[str(folder)]["text"]


@pytest.mark.parametrize(
    ("change", "code", "state", "words"),
    [
        (lambda path: None, 0, "ok", "1 whole (1 files), the newest of step 3"),
        (lambda path: (path / MARKER).unlink(), 0, "note", "none whole: --resume starts at step 0"),
        (lambda path: next(path.glob("state/*")).unlink(), 1, "problem", "is missing"),
        (lambda path: (path / MARKER).write_text("{"), 1, "problem", "not readable"),
        (
            lambda path: _flip(next(path.glob("state/*"))),
            1,
            "problem",
            "shard_000_00000.safetensors: damaged",
        ),
    ],
    ids=range(5),
)
def test_a_run_is_whole_or_says_what_is_broken(look, healthy, tmp_path, change, code, state, words) -> None:
    root = tmp_path / "run"
    shutil.copytree(healthy / "state", root)
    change(RunFolder(root).path(3))
    assert look(root).code == code
    assert re.search(rf"^{state} +{root}: checkpoints: .*{re.escape(words)}", look_all(root), re.MULTILINE)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


def look_all(root: Path) -> str:
    return "\n".join(map(str, doctor._folder(root)))


def test_locks_and_reasons_of_a_run_are_told(look, healthy, tmp_path) -> None:
    root = tmp_path / "run"
    shutil.copytree(healthy / "state", root)
    (root / "ended.json").write_text('{"code": 1, "reason": "disk full", "step": 7}')
    with Lock(root / ".writer.lock", "RUN") as lock:
        assert look(root).checks[f"{root}: .writer.lock"]["text"].startswith(f"written now by {lock.owner}")
    (root / ".writer.lock").write_text(json.dumps(asdict(replace(lock.owner, pid=dead_pid()))))
    seen = look(root)
    assert seen.checks[f"{root}: .writer.lock"]["state"] == "note"
    assert "which is gone" in seen.checks[f"{root}: .writer.lock"]["text"]
    assert seen.checks[f"{root}: ended.json"]["text"] == "code 1: disk full (step 7)"


def test_rounds_and_stages_of_a_run_are_looked_at_too(look, healthy, drawn, tmp_path) -> None:
    root = tmp_path / "run"
    shutil.copytree(healthy / "state", root / "steps8")
    (root / "ended.json").write_text('{"code": 0, "reason": "done", "step": 3}')
    (root / "stages" / "base").mkdir(parents=True)
    shutil.copy(drawn / "run.json", root / "stages" / "base" / "run.json")
    seen = look(root)
    assert (seen.code, seen.checks[f"{root}/steps8: checkpoints"]["state"]) == (0, "ok")
    assert seen.checks[f"{root}/stages/base/run.json"]["text"] == "2 start(s), 1 rank(s); versions as here"
    record = json.loads((drawn / "run.json").read_text())
    record["versions"]["torch"] = "2.0"
    (root / "stages" / "base" / "run.json").write_text(json.dumps(record))
    assert "other versions, so numbers may differ: torch 2.0, here" in look_all(root)
    (root / "stages" / "base" / "run.json").write_text("{")
    assert look(root).problems() == [f"{root}/stages/base/run.json"]


def test_pictures_are_counted_by_share(look, drawn, tmp_path) -> None:
    seen = look(drawn)
    assert seen.code == 0, seen
    assert "1 of 1 prompts of share 1/2 whole" in look_all(drawn)
    root = tmp_path / "out"
    shutil.copytree(drawn, root)
    shutil.rmtree(next(root.glob("2_*")))
    assert "problem " in look_all(root) and "1 of 2 prompts of share 0/2 whole" in look_all(root)
    assert "not: numbers 2" in look_all(root)
    (root / "ended-0-of-2.json").write_text('{"code": 130, "reason": "stopped by SIGTERM"}')
    assert look(root).code == 0, "it has said so itself"
    _flip(next(root.glob("1_*/*.png")))
    seen = look(root)
    assert seen.code == 1 and "is damaged" in look_all(root)


def test_a_path_that_is_not_there_is_a_mistake(look, capsys, tmp_path) -> None:
    assert doctor.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such file or folder\n"
    (tmp_path / "empty").mkdir()
    seen = look(tmp_path / "empty")
    assert seen.code == 1 and "holds no weight files" in seen.checks[str(tmp_path / "empty")]["text"]


def test_bf16_that_a_gpu_only_emulates_is_said_of_that_gpu(monkeypatch) -> None:
    generations, current = [7, 9], [0]
    abouts = [SimpleNamespace(major=major) for major in generations]

    @contextmanager
    def device(place: torch.device) -> Iterator[None]:
        current[0] = place.index
        yield

    gpus = {
        "is_available": lambda: True, "device_count": lambda: 2, "device": device,
        "current_device": lambda: current[0], "get_device_properties": lambda index: abouts[index],
        "mem_get_info": lambda index: (10**10, 10**10),
        "get_device_name": lambda index: ("T4", "H100")[index],
    }  # fmt: skip
    for name, value in gpus.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (check,) = doctor._accelerator()
    assert "T4, 10 of 10 GB, bf16 is emulated; H100, 10 of 10 GB, bf16 in hardware" in check.text
