"""Sweeps of ``train.py``: runs over values of config keys, one after the other or as a SLURM array.

Each run is a training of its own, in a folder below the sweep's; ``sweep.json`` there lists them.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from sat.cli.arguments import Setting
from sat.cli.main_guard import UsageError
from sat.util.ending import ENDED, INTERRUPTED, STOPPED_EARLY
from sat.util.host import write_text

SWEEP = "sweep.json"

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """One training of a sweep: its folder's name and the keys it sets."""

    name: str
    settings: dict[str, str]


def runs(asked: Sequence[str]) -> list[Run]:
    """Every combination of the values in ``key=a,b,c`` of ``asked``; commas in brackets part nothing."""
    axes: list[list[tuple[str, str]]] = []
    for text in asked:
        key, equals, values = text.partition("=")
        parts = re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+", values)
        if not equals or not re.fullmatch(r"[\w.]+", key) or len(parts) < 1:
            raise UsageError(f"--sweep {text!r}: expected section.key=a,b,c")
        if len(set(parts)) < len(parts):
            raise UsageError(f"--sweep {text!r}: a value is there twice")
        if any(key == axis[0][0] for axis in axes):
            raise UsageError(f"--sweep {text!r}: the key is swept already")
        axes.append([(key, part) for part in parts])
    ends = [axis[0][0].rpartition(".")[2] for axis in axes]
    short = [end if ends.count(end) == 1 else axis[0][0] for end, axis in zip(ends, axes, strict=True)]
    found: dict[str, Run] = {}
    for combination in itertools.product(*axes):
        words = [
            f"{name}={re.sub(r'[^A-Za-z0-9.+-]+', '_', value).strip('_')[:40]}"
            for name, (_, value) in zip(short, combination, strict=True)
        ]
        name = ",".join(words)
        number = 2
        while name in found:
            name, number = f"{','.join(words)}_{number}", number + 1
        found[name] = Run(name, dict(combination))
    return list(found.values())


def sweep(  # noqa: C901 - checked, listed, run
    bases: Sequence[str],
    overrides: Sequence[str],
    given: Sequence[Setting],
    asked: Sequence[str],
    *,
    root: Path | None,
    ranks: int = 1,
    script: Path | None = None,
    check: bool = False,
) -> int:
    """Check every run's config, then train them in turn, or write ``script`` for SLURM; the exit code.

    Done runs are left, begun ones resumed. A run that fails does not keep the next from starting; one that is
    stopped ends the sweep.
    """
    from sat.config.load import load_full
    from sat.config.yaml_source import ConfigError

    root = root or Path("runs") / f"{Path(bases[-1]).stem}_sweep"
    common = [*overrides, *(f"{key}={value}" for key, value in given if not key.startswith("output."))]
    every = runs(asked)
    for run in every:
        own = [f"{key}={value}" for key, value in run.settings.items()]
        loaded = load_full(bases, [*common, *own])
        if loaded.missing and not check:
            raise ConfigError(loaded.missing)
    commands = {
        run.name: [
            "--base", *bases, *common, *(f"{key}={value}" for key, value in run.settings.items()),
            "--output-dir", str(root / run.name),
        ]
        for run in every
    }  # fmt: skip
    if check:
        print(f"config ok: {len(every)} runs below {root}")
        print("\n".join(f"  {name}" for name in commands))
        return 0
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / SWEEP, json.dumps([run._asdict() for run in every], indent=1) + "\n")
    if script is not None:
        write_text(script, _slurm(list(commands.values()), root))
        print(f"{script}: {len(every)} runs; from the top of the checkout: sbatch --gpus=1 {script}")
        print(f"afterwards: python train.py --sweep-table {root}")
        return 0
    failed = 0
    for number, (name, words) in enumerate(commands.items(), 1):
        code = _end(root / name)
        if code == 0:
            print(f"sweep {number} of {len(every)}: {name} is done", flush=True)
            continue
        print(f"sweep {number} of {len(every)}: {name}", flush=True)
        resume = ["--resume"] if any((root / name).glob("**/checkpoints/*/COMPLETE")) else []
        code = _start([*words, *resume], ranks, root / name)
        if code in (STOPPED_EARLY, INTERRUPTED):
            print(f"stopped in {name}: the same command goes on")
            return code
        failed += code != 0
    print("\n".join(table(root)))
    return 1 if failed else 0


def _start(words: Sequence[str], ranks: int, folder: Path) -> int:
    """Train with the arguments ``words`` in a process of its own; its exit code. Signals are passed on."""
    launcher = (
        ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    )
    process = subprocess.Popen([sys.executable, "-m", *launcher, "sat.cli.train", *words])

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    old = {number: signal.signal(number, forward) for number in wanted}
    try:
        code = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    said = _end(folder)
    return code if said is None or code == 0 else said  # torchrun makes 1 of every code


def _end(folder: Path) -> int | None:
    """The exit code that the run in ``folder`` ended with; None while it has not."""
    try:
        return int(json.loads((folder / ENDED).read_text())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _slurm(commands: Sequence[Sequence[str]], root: Path) -> str:
    """A SLURM array with a task for each of ``commands``."""
    lines = "\n".join(f"    {shlex.quote(shlex.join(words))}" for words in commands)
    return f"""\
#!/bin/bash
#SBATCH --job-name={re.sub(r"[^A-Za-z0-9._-]+", "_", root.name)}
#SBATCH --array=0-{len(commands) - 1}
#SBATCH --nodes=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# The runs of a sweep, a task each. Results: python train.py --sweep-table {shlex.quote(str(root))}
source train_scripts/slurm.sh || exit
runs=(
{lines}
)
eval "run=(${{runs[$SLURM_ARRAY_TASK_ID]}})"
on_nodes train.py "${{run[@]}}" "$@"
"""


# -- results of finished folders


def table(root: Path) -> list[str]:
    """The runs below ``root`` with what they set and came to, the best first, as lines of a table.

    Runs of a sweep are those of its ``sweep.json``, else all folders with ``metrics.jsonl``.
    """
    try:
        listed = [Run(**one) for one in json.loads((root / SWEEP).read_text())]
    except FileNotFoundError:
        listed = [Run(file.parent.name, {}) for file in sorted(root.glob("*/metrics.jsonl"))]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{root / SWEEP}: is damaged: {error}") from error
    if not listed:
        raise UsageError(f"{root}: holds no {SWEEP} and no run with metrics.jsonl")
    keys = list(dict.fromkeys(key for run in listed for key in run.settings))
    head = ["run"] * (not keys) + keys
    rows = [(_result(root / run.name), run) for run in listed]
    rows.sort(key=lambda row: (row[0]["held-out"], row[0]["loss"]))
    cells = [[*head, "state", "step", "loss", "held-out", "at step", "images/s"]]
    for result, run in rows:
        own = [run.settings.get(key, "") for key in keys] or [run.name]
        numbers = [result["step"], result["loss"], result["held-out"], result["at step"], result["images/s"]]
        cells.append([*own, str(result["state"]), *(_shown(value) for value in numbers)])
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _result(folder: Path) -> dict[str, Any]:
    """End of a run: its last loss, its lowest held-out loss, its speed and its state."""
    code, nothing = _end(folder), float("inf")
    found: dict[str, Any] = {
        "step": nothing, "loss": nothing, "held-out": nothing, "at step": nothing, "images/s": nothing,
        "state": {0: "done", None: "not ended", STOPPED_EARLY: "stopped"}.get(code, f"failed ({code})"),
    }  # fmt: skip
    file = folder / "metrics.jsonl"
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row: Mapping[str, Any] = json.loads(text)
        except ValueError:  # cut off by a crash
            continue
        found["step"] = row.get("step", found["step"])
        if row.get("loss") is not None:
            found["loss"], found["images/s"] = row["loss"], row.get("images_per_second") or nothing
        held_out = row.get("validation/loss")
        if held_out is not None and held_out < found["held-out"]:
            found["held-out"], found["at step"] = held_out, row["step"]
    if found["state"] == "not ended" and not file.is_file():
        found["state"] = "not started"
    return found


def _shown(value: float) -> str:
    return "-" if value == float("inf") else f"{value:.5g}"
