"""Sweeps of train.py: the list of runs, what is started and left, the SLURM array, the table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from sat.cli.commands import sweep as module
from sat.cli.commands.sweep import Run, runs, table
from sat.cli.main_guard import UsageError
from sat.cli.train import main
from tests.configs import ROOT

BASE = ["--base", str(ROOT / "configs" / "tiny.yaml"), str(ROOT / "configs" / "tiny_train.yaml")]
DATA = ["data.sources.0.path=data/emoji_sample", "data.validation=[]", "train.validate_every=null"]


def test_every_combination_is_a_run_with_a_name_of_its_own() -> None:
    found = runs(["train.lr=1e-4,3e-4", "adapters.lora.targets=[attention, mlp],[attention]"])
    assert [run.settings["train.lr"] for run in found] == ["1e-4", "1e-4", "3e-4", "3e-4"]
    assert found[0] == Run(
        "lr=1e-4,targets=attention_mlp",
        {"train.lr": "1e-4", "adapters.lora.targets": "[attention, mlp]"},
    )
    assert len({run.name for run in found}) == 4
    assert [run.name for run in runs(["a.path=x/y,x:y"])] == ["path=x_y", "path=x_y_2"]
    assert [run.name for run in runs(["a.seed=1", "b.seed=2"])] == ["a.seed=1,b.seed=2"]


@pytest.mark.parametrize(("asked", "words"), [
    (["train.lr"], "expected section.key=a,b,c"), (["train.lr="], "expected section.key=a,b,c"),
    (["train.lr=1,1"], "a value is there twice"), (["a.b=1", "a.b=2"], "the key is swept already"),
])  # fmt: skip
def test_what_is_no_sweep_is_told(asked, words) -> None:
    with pytest.raises(UsageError, match=words):
        runs(asked)


def test_every_config_is_checked_before_the_first_run(tmp_path, capsys) -> None:
    words = [*BASE, *DATA, "--sweep", "train.lr=1e-4,-1", "--output-dir", str(tmp_path / "s")]
    assert main(words) == 2
    assert "train.lr: expected more than 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert main([*BASE, *DATA, "--sweep", "train.lr=1e-4,1e-3", "--check"]) == 0
    assert "config ok: 2 runs" in capsys.readouterr().out
    for more in (["--plan"], ["--resume"]):
        with pytest.raises(SystemExit):
            main([*words, *more])


class Started:
    """Commands started in place of trainings, each with the next loss and exit code."""

    def __init__(self, *ends: tuple[float, int]) -> None:
        self.ends, self.words = list(ends), list[Sequence[str]]()

    def __call__(self, words: Sequence[str], ranks: int, folder: Path) -> int:
        loss, code = self.ends.pop(0)
        self.words.append(words)
        (folder / "checkpoints" / "step_00000005").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "step_00000005" / "COMPLETE").touch()
        rows = [{"step": 5, "loss": loss, "images_per_second": 2.0}, {"step": 5, "validation/loss": loss / 2}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"st')
        (folder / "ended.json").write_text(json.dumps({"code": code}))
        return code


def test_runs_follow_one_another_and_a_stopped_sweep_goes_on(tmp_path, monkeypatch, capsys) -> None:
    words = [*BASE, *DATA, "--seed", "7", "--sweep", "train.lr=1e-4,1e-3,1e-2", "--output-dir", str(tmp_path)]
    first = Started((0.5, 0), (0.4, 75))
    monkeypatch.setattr(module, "_start", first)
    assert main(words) == 75
    assert "stopped in lr=1e-3: the same command goes on" in capsys.readouterr().out
    assert [list(one)[-3:] for one in first.words] == [
        [f"train.lr={lr}", "--output-dir", str(tmp_path / f"lr={lr}")] for lr in ("1e-4", "1e-3")
    ]
    assert "train.seed=7" in first.words[0]
    again = Started((0.3, 0), (0.9, 1))
    monkeypatch.setattr(module, "_start", again)
    assert main(words) == 1
    assert [one[-1] == "--resume" for one in again.words] == [True, False]
    out = capsys.readouterr().out
    assert "sweep 1 of 3: lr=1e-4 is done" in out
    assert out.splitlines()[-4:] == [
        "train.lr  state       step  loss  held-out  at step  images/s",
        "1e-3      done        5     0.3   0.15      5        2",
        "1e-4      done        5     0.5   0.25      5        2",
        "1e-2      failed (1)  5     0.9   0.45      5        2",
    ]
    assert main(["--sweep-table", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == out.splitlines()[-4:]


def test_the_array_of_slurm_starts_each_run_with_its_arguments(tmp_path) -> None:
    script = tmp_path / "sweep.sbatch"
    words = [*BASE, *DATA, "train.sample_prompts=[a 'red' apple]", "--output-dir", str(tmp_path / "my runs")]
    assert main([*words, "--sweep", "train.lr=1e-4,1e-3", "--sweep-script", str(script)]) == 0
    assert "#SBATCH --array=0-1\n" in script.read_text()
    (tmp_path / "train_scripts").mkdir()
    stub = "on_nodes() { printf '%s\\n' \"$@\"; }\n"
    (tmp_path / "train_scripts" / "slurm.sh").write_text(stub)
    for task, lr in enumerate(("1e-4", "1e-3")):
        out = subprocess.run(
            ["bash", str(script), "train.seed=3"], cwd=tmp_path, env={"SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        assert out[0] == "train.py"
        assert "train.sample_prompts=[a 'red' apple]" in out
        assert out[-4:] == [
            f"train.lr={lr}",
            "--output-dir",
            str(tmp_path / "my runs" / f"lr={lr}"),
            "train.seed=3",
        ]
    assert table(tmp_path / "my runs")[1].split() == ["1e-4", "not", "started", *"-----"]


def test_a_folder_of_plain_runs_has_a_table_too(tmp_path) -> None:
    Started((0.5, 0))([], 1, tmp_path / "one")
    assert [row.split()[0] for row in table(tmp_path)] == ["run", "one"]
    with pytest.raises(UsageError, match="holds no sweep.json and no run"):
        table(tmp_path / "none")
