"""``python -m sat.cli.doctor``: the environment, and whether folders of runs and weights are whole."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sat.cli.arguments import Parser, add_messages
from sat.cli.main_guard import UsageError, guard
from sat.errors import UserError
from sat.util.ending import ENDED
from sat.util.host import HOME, THREAD_SETTINGS, file_clock, install, prepare_threads
from sat.util.lock import STALE, read
from sat.util.log import describe, one_line

DESCRIPTION = """\
Look at this machine and environment, at the weights that ship, and at folders of runs, pictures or weights.

  python -m sat.cli.doctor
  python -m sat.cli.doctor runs/sft outputs/plus weights/plus --json

One line a check: ok, note (works, but know it) or problem, with what to do. Nothing is changed.
"""
EPILOG = "Exit codes: 0 all well (notes included), 1 something is broken, 2 wrong arguments."
SHIPPED = HOME / "cogview3" / "_data"
CHECKOUT = (HOME / "requirements.txt").is_file()
INSTALL = (
    f"pip install -r {HOME / 'requirements.txt'}" if CHECKOUT else "install cogview3 again (docs/install.md)"
)
AGAIN = "the same command with --resume"
FLAGS = re.compile(r"\b(avx2|avx512(?:f|_vnni|_bf16)|amx_(?:int8|bf16)|asimd|sve|i8mm|bf16)\b")
"""Instruction sets that make a difference, as /proc/cpuinfo has them."""
VARIABLES = re.compile(
    r"(OMP|MKL|KMP|NCCL|GLOO|SLURM_JOB|SAT|DS|TORCH|WANDB|HF|CUDA|ROCR|HIP|ATEN)_(?!.*(KEY|TOKEN|SECRET|PASS))"
    r"|PYTHONPATH$|PYTHONSAFEPATH$|TMPDIR$|LD_PRELOAD$"
)
RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
RUN = ("resolved.yaml", "run.json", "ended*.json", "checkpoints", ".writer*.lock")
"""Any of them makes a folder a run's."""
State = Literal["ok", "note", "problem"]


class Check(NamedTuple):
    """One thing that was looked at, in words and as ``facts``; ``do``: what to do about it."""

    name: str
    state: State
    text: str
    do: str = ""
    facts: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return one_line(f"{self.state:8}{self.name}: {self.text}" + (f". Do: {self.do}" if self.do else ""))


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = Parser.of("python -m sat.cli.doctor", DESCRIPTION, EPILOG)
    out.add_argument("folders", nargs="*", type=Path, metavar="RUN_OR_FOLDER", help="folders to look at, too")
    out.add_argument("--json", action="store_true", help="print the same facts as JSON")
    add_messages(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Look at everything; the exit code."""
    args = parser().parse_args(argv)

    def work() -> int:
        if absent := [folder for folder in args.folders if not folder.exists()]:
            raise UsageError(f"{absent[0]}: no such file or folder")
        prepare_threads()
        found: list[Check] = []
        for check in _all(args.folders, debug=args.debug):
            found.append(check)
            if not args.json:
                print(check, flush=True)
        count = {state: sum(check.state == state for check in found) for state in ("ok", "note", "problem")}
        if args.json:
            checks = [check._asdict() for check in found]
            print(json.dumps({"count": count, "checks": checks}, indent=1, ensure_ascii=False, default=str))
        else:
            print(f"{len(found)} checks: {', '.join(f'{number} {state}' for state, number in count.items())}")
        return int(count["problem"] > 0)

    return guard(work, debug=args.debug)


def _all(folders: Sequence[Path], *, debug: bool) -> Iterator[Check]:
    """Every check; one that breaks is a problem, and the rest is looked at."""
    here = (_package, _packages, _environment, _cpu, _memory, _accelerator, _shipped, _slurm)
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [(look.__name__[1:], look) for look in here]
    looks += [(f"{path}: disk", partial(_disk, path)) for path in (Path.cwd(), *folders)]
    looks += [(str(path), partial(_folder, path)) for path in folders]
    for name, look in looks:
        try:
            yield from look()
        except (Exception, SystemExit) as error:
            if debug:
                raise
            what = "" if isinstance(error, UserError) else "look at --debug"
            what = INSTALL if isinstance(error, ImportError) else what
            yield Check(name, "problem", describe(error), what)


# -- this machine and environment


def _package() -> Iterator[Check]:
    """This package, and others of its name that may be in the way."""
    from sat import __version__
    from sat.config.record import commit

    ours, code = HOME / "sat", commit()
    text = f"{__version__} in {ours}"
    if code is not None:
        text += f", commit {code['commit'][:10]}{' with changes' * bool(code['dirty'])}"
    owners = [name for name in packages_distributions().get("sat", []) if name.lower() != "cogview3"]
    specs = [PathFinder.find_spec("sat", [entry or os.getcwd()]) for entry in sys.path]
    origins = [Path(spec.origin).resolve() for spec in specs if spec is not None and spec.origin is not None]
    others = list(dict.fromkeys(path.parent for path in origins if ours not in path.parents))
    facts = {"version": __version__, "path": ours, "code": code, "others": [*owners, *others]}
    if not owners and not others:
        yield Check("sat", "ok", f"{text}; no other package of this name", facts=facts)
        return
    made = [Path(str(file.locate())) for name in owners for file in distribution(name).files or []]
    mixed = any(ours in file.resolve().parents and file.is_file() for file in made)
    text += f"; another package called `sat` is here: {' and '.join(map(str, [*owners, *others]))}"
    text += ", in the same folder as this one" if mixed else f"; programs outside of {HOME} may import it"
    what = f"pip uninstall {owners[0]}" if owners else f"take {others[0].parent} off PYTHONPATH"
    what += ", and install this one again" if mixed else ", or use an environment without it"
    yield Check("sat", "problem" if mixed else "note", text, what, facts)


def _packages() -> Iterator[Check]:
    """Python and packages, required against installed; extras."""
    python = platform.python_version()
    yield Check("python", "ok", f"{python} ({sys.executable})", facts={"version": python})
    from packaging.requirements import Requirement

    facts: dict[str, Any] = {}
    whole: dict[str, bool] = {}  # by extra: all its packages are there
    for extra, line in _requirements():
        wanted = Requirement(line)
        try:
            have = version(wanted.name)
            good = wanted.specifier.contains(have.partition("+")[0], prereleases=True)
        except PackageNotFoundError:
            have, good = "missing", False
        fact = {"required": str(wanted.specifier), "installed": have, "extra": extra, "good": good}
        facts[wanted.name] = fact
        whole[extra] = whole.get(extra, True) and good
    bad = [
        f"{name} {fact['installed']} (required {fact['required']})" for name, fact in facts.items()
        if not fact["good"] and (not fact["extra"] or fact["installed"] != "missing")
    ]  # fmt: skip
    told = [f"{name} {fact['installed']}" for name, fact in facts.items() if not fact["extra"]]
    text = ", ".join(bad or told)
    yield Check("packages", "problem" if bad else "ok", text, INSTALL if bad else "", facts)
    there, absent = ([extra for extra in whole if extra and whole[extra] is good] for good in (True, False))
    what = f"where you need one: {install(','.join(absent))} (docs/install.md)" if absent else ""
    text = f"there: {', '.join(there) or 'none'}; not there: {', '.join(absent) or 'none'}"
    yield Check("extras", "ok", text, what, {"there": there, "absent": absent})


def _requirements() -> list[tuple[str, str]]:
    """(extra, requirement) of this package, from the checkout or from what pip installed; "" is no extra."""
    if CHECKOUT:
        project = (HOME / "pyproject.toml").read_text()
        needed = project.partition("\ndependencies = [")[2].partition("]")[0]
        extras = project.partition("optional-dependencies]")[2].partition("\n[")[0]
        listed = re.findall(r"^(\w+) = \[(.+)\]$", extras, re.MULTILINE)
        found = [(extra, line) for extra, lines in listed for line in re.findall(r'"([^"]+)"', lines)]
        return [*(("", line) for line in re.findall(r'"([^"]+)"', needed)), *found[:-1]]  # the last is all
    split = [line.partition("; extra == ") for line in distribution("cogview3").requires or []]
    return [(extra.strip("\"'"), line) for line, _, extra in split if not line.startswith("cogview3")]


def _environment() -> Iterator[Check]:
    """Environment variables that change runs."""
    told = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}
    told = {name: value for name, value in told.items() if THREAD_SETTINGS.get(name) != value}  # ours
    text = ", ".join(f"{name}={value}" for name, value in told.items()) or "nothing set that changes runs"
    left = RANKS & {*os.environ}
    if 0 < len(left) < len(RANKS):
        text = f"{', '.join(sorted(left))} without {', '.join(sorted(RANKS - left))}: no run starts; {text}"
        yield Check("environment", "problem", text, f"unset {' '.join(sorted(left))}", told)
    else:
        yield Check("environment", "ok", text, facts=told)


def _cpu() -> Iterator[Check]:
    """Cores that this process may use, instruction sets, threads."""
    import torch

    info = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE))
    flags = list(dict.fromkeys(FLAGS.findall(f"{info.get('flags', '')} {info.get('Features', '')}")))
    threads = torch.get_num_threads()
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")  # of a container
    if quota.isdigit():
        usable = min(usable, math.ceil(int(quota) / int(period)))
    bf16, used = any("bf16" in flag for flag in flags), torch.backends.cpu.get_cpu_capability()
    text = (
        f"{info.get('model name', platform.machine())}, {usable} of {every} cores usable, {threads} "
        f"thread(s); {' '.join(flags) or 'no known instruction sets'} (torch uses {used}); "
        f"bf16 {'in hardware' if bf16 else 'is emulated, fp32 is faster'}"
    )
    facts = {"usable": usable, "cores": every, "threads": threads, "flags": flags, "bf16": bf16}
    what = f"OMP_NUM_THREADS={usable} for one process" if threads != usable else ""
    yield Check("cpu", "note" if what else "ok", text, what, facts)


def _memory() -> Iterator[Check]:
    """Memory that there is, a container's limit, and what data workers share."""
    kib = {name: int(number) for name, number in re.findall(r"(\w+): +(\d+) kB", _read("/proc/meminfo"))}
    if not kib:
        yield Check("memory", "note", "not known on this system")
        return
    total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    limit, shared = _read("/sys/fs/cgroup/memory.max"), shutil.disk_usage("/dev/shm").free
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available, /dev/shm {shared / 1e9:.1f} GB"
    if limit.isdigit():
        text += f", the container's limit is {int(limit) / 1e9:.1f} GB"
    what = "stop other programs" if free < 2e9 else ""
    what = "docker run --shm-size=8g, or data.workers=0" if shared < 1e9 else what
    facts = {"total": total, "available": free, "limit": limit, "shared": shared}
    yield Check("memory", "note" if what else "ok", text, what, facts)


def _read(path: str) -> str:
    """Text of one of the kernel's files, empty without it."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _accelerator() -> Iterator[Check]:
    """Accelerators that torch sees."""
    from sat.parallel.launch import accelerators

    build, devices = accelerators()
    driver = bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").is_dir()
    facts, what = {"build": build, "devices": devices, "driver": driver}, ""
    if devices:
        text = "; ".join(
            f"{one['name']}, {one['free'] / 1e9:.0f} of {one['total'] / 1e9:.0f} GB, "
            f"bf16 {'in hardware' if one['bf16'] else 'is emulated'}" for one in devices
        )  # fmt: skip
    elif driver:
        text = "a GPU's driver is here, and torch sees no GPU"
        what = "look at CUDA_VISIBLE_DEVICES, or install torch's build for it (docs/install.md)"
    else:
        text = "none, so everything runs on the CPU"
    yield Check("accelerator", "problem" if what else "ok", f"{text} (torch {build})", what, facts)


def _shipped() -> Iterator[Check]:
    """Weights in this repository."""
    name, place = "shipped weights", (HOME if CHECKOUT else SHIPPED) / "checkpoints"
    if folders := sorted({path.parent for path in place.glob("*/*.json")}):
        yield from _weights(name, folders, "git checkout -- checkpoints" if CHECKOUT else INSTALL)
    else:
        yield Check(name, "note", f"none in {place}", INSTALL)


def _slurm() -> Iterator[Check]:
    """SLURM and its site file."""
    named, there = os.environ.get("SAT_SITE"), shutil.which("sbatch")
    site = Path(named) if named else HOME / "train_scripts" / "site.sh"
    facts = {"sbatch": there, "site": site, "there": site.is_file()}
    if site.is_file():
        yield Check("slurm", "ok", f"site file {site}", facts=facts)
    elif named:
        text = f"SAT_SITE names {named}, which is not there"
        yield Check("slurm", "problem", text, "unset SAT_SITE, or write the file", facts)
    elif there:
        yield Check("slurm", "note", f"{there}, and no site file", f"write {site} (docs/slurm.md)", facts)
    else:
        yield Check("slurm", "ok", "none here", facts=facts)


def _disk(path: Path) -> Iterator[Check]:
    """Room where ``path`` is."""
    folder = path if path.is_dir() else path.parent
    free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    text = f"{free / 1e9:.1f} GB free" + ("" if writable else ", and it cannot be written to")
    state: State = "problem" if free < 1e8 else "note" if free < 5e9 or not writable else "ok"
    what = "make room" if free < 5e9 else "" if writable else "--output-dir elsewhere"
    yield Check(f"{path}: disk", state, text, what, {"free": free, "writable": writable})


# -- folders of weights, trainings and pictures


def _weights(name: str, folders: Sequence[Path], what: str) -> Iterator[Check]:
    """Verdicts on all weights in ``folders``: one line if they are good."""
    from sat.checkpoint.audit import audit

    verdicts = [verdict for folder in folders for verdict in audit(folder)]
    for file, good, text in verdicts:
        if not good:
            yield Check(name, "problem", f"{file}: {text}", what, {"file": file})
    if all(verdict.good for verdict in verdicts):
        bare = [verdict.file for verdict in verdicts if "no digests" in verdict.text]
        text = f"{len(verdicts)} files whole"
        text += f", {len(bare)} without digests, such as {bare[0]}" if bare else ""
        what = f"python convert.py verify {bare[0].parent} --write" if bare else ""
        yield Check(name, "note" if bare else "ok", text, what, {"files": [v.file for v in verdicts]})


def _folder(root: Path) -> Iterator[Check]:
    """A run's folder, or weights."""
    from sat.config.cascade import load_cascade

    if root.is_file() or not any(any(root.glob(pattern)) for pattern in RUN):
        yield from _weights(str(root), [root], "copy it again from where it is whole")
        return
    yield from (locks := list(_locks(root)))
    yield from (ends := list(_ends(root)))
    busy = any(lock.facts["alive"] for lock in locks)
    if not ends and not busy:
        text = "not there: killed, or of an older version"
        yield Check(f"{root}: {ENDED}", "note", text, f"{AGAIN} goes on")
    places = [root, *sorted(root.glob("stages/*")), *sorted(root.iterdir())]  # of cascades; of distillations
    for place in places:
        if (place / "run.json").is_file():
            yield from _record(place)
        if (place / "checkpoints").is_dir():
            yield from _checkpoints(place, busy=busy)
    configs = [place / "resolved.yaml" for place in places if (place / "resolved.yaml").is_file()]
    if not configs:
        text = "no resolved.yaml: the run ended before it began"
        yield Check(str(root), "note", text, "start it again")
    for config in configs:
        cascade = load_cascade([config])
        absent = [str(problem) for stage in cascade.stages for problem in stage.missing]
        text = f"{len(absent)} inputs are not there any more: {absent[0]}" if absent else "readable"
        yield Check(str(config), "note" if absent else "ok", text, facts={"missing": absent})
        experiment = cascade.stages[-1].experiment
        if experiment.train is None and config.parent == root:
            codes = {end.facts["file"]: end.facts["code"] for end in ends}
            yield from _pictures(root, experiment, codes, busy=busy)


def _locks(root: Path) -> Iterator[Check]:
    """Owners of the folder's locks: alive or stale."""
    for path in sorted(root.glob(".writer*.lock")):
        if (owner := read(path)) is None:
            continue
        alive = owner.state
        if alive is None:  # on another machine
            alive = file_clock(root) - path.stat().st_mtime < STALE
        gone = f"left by {owner}, which is gone; the next start takes it over"
        text = f"written now by {owner}" if alive else gone
        yield Check(f"{root}: {path.name}", "ok" if alive else "note", text, facts={"alive": alive})


def _ends(root: Path) -> Iterator[Check]:
    """The reason why the run, or each share of it, ended."""
    for path in sorted(root.glob("ended*.json")):
        try:
            end = json.loads(path.read_text("utf-8"))
            code, text = int(end["code"]), f"code {end['code']}: {end['reason']}"
            text += "" if end.get("step") is None else f" (step {end['step']})"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            code, text = -1, f"not readable ({describe(error)}); the next start writes it anew"
        facts = {"file": path.name, "code": code}
        yield Check(f"{root}: {path.name}", "note" if code else "ok", text, facts=facts)


def _record(root: Path) -> Iterator[Check]:
    """Versions of ``run.json`` beside those of here."""
    from sat.config.record import versions

    name, path, now = str(root / "run.json"), root / "run.json", versions()
    try:
        facts = json.loads(path.read_text("utf-8"))
        was = {name: [of, now.get(name)] for name, of in facts["versions"].items() if of != now.get(name)}
        text = f"{1 + len(facts.get('starts', []))} start(s), {facts['world']} rank(s)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Check(
            name, "problem", f"not readable: {describe(error)}", f"rm {path}; the next start writes it"
        )
    else:
        other = "; ".join(f"{name} {there}, here {here}" for name, (there, here) in was.items())
        text += f"; other versions, so numbers may differ: {other}" if other else "; versions as here"
        yield Check(name, "note" if other else "ok", text, facts={"versions": facts["versions"]})


def _checkpoints(root: Path, *, busy: bool) -> Iterator[Check]:
    """Every checkpoint of a training, and which one ``--resume`` goes on from."""
    from sat.checkpoint.audit import audit
    from sat.train.resume import MARKER, NATIVE, ResumeError, RunFolder, Saved, torn

    name, whole, files = f"{root}: checkpoints", list[int](), 0
    bad: list[tuple[Path, str]] = []
    for path, step in RunFolder(root).folders():
        reason = torn(path)
        try:
            if reason is None:
                Saved(step, path).progress()
                files += Saved(step, path).verify(0, 1, lambda own: [own])
                verdicts = [v for part in sorted(path.glob(f"{NATIVE}*")) for v in audit(part)]
                files += len(verdicts)
                reason = next((f"{v.file.relative_to(path)}: {v.text}" for v in verdicts if not v.good), None)
        except ResumeError as error:
            reason = str(error)
        if reason is None:
            whole.append(step)
        else:
            bad.append((path, reason))
    for path, reason in bad:
        begun = not (path / MARKER).exists()  # whoever was killed while writing leaves that
        what = f"rm -r {path}; --resume goes on from step {whole[-1]}" if whole else f"rm -r {path}"
        if not (begun and busy):
            yield Check(name, "note" if begun else "problem", f"{path.name}: {reason}", "" if begun else what)
    if whole:
        text = f"{len(whole)} whole ({files} files), the newest of step {whole[-1]}"
        yield Check(name, "ok", text, facts={"whole": whole, "bad": [path for path, _ in bad]})
    else:
        yield Check(name, "note", "none whole: --resume starts at step 0", facts={"whole": []})


def _pictures(root: Path, experiment: Any, codes: Mapping[str, int], *, busy: bool) -> Iterator[Check]:
    """Pictures that are damaged, and those that are missing, by share."""
    from sat.cli.commands.sample import given_prompts
    from sat.config.record import label
    from sat.errors import UserError
    from sat.sampling.output import OutputFolder, numbered, read_png_text

    names = [name for names in numbered(root).values() for name in names]
    files = [file for name in names for file in sorted((root / name).glob("*.png"))]
    name, redraw = f"{root}: pictures", f"{AGAIN} draws them again"
    broken = [file for file in files if read_png_text(file) is None]
    for file in broken:
        yield Check(name, "problem", f"{file} is damaged", redraw, {"file": file})
    text = f"{len(files) - len(broken)} files whole"
    try:
        prompts = given_prompts(experiment)
        if prompts is None or experiment.sampling.latents is not None:
            yield Check(name, "ok", text)
            return
        folder = OutputFolder(root, label(experiment), experiment.sampling.batch_size)
        missing = [place for place, prompt in enumerate(prompts) if folder.missing(prompt)]
    except (UserError, OSError) as error:
        yield Check(name, "note", f"{text}; which ones are missing is not known: {describe(error)}")
        return
    shares = [found for end in codes if (found := re.fullmatch(r"ended-(\d+)-of-(\d+)\.json", end))]
    parts = [(f" of share {s[1]}/{s[2]}", int(s[1]), int(s[2]), codes[s[0]]) for s in shares]
    parts += [] if shares and ENDED not in codes else [("", 0, 1, codes.get(ENDED, -1))]
    for words, part, of, code in parts:
        wanted = range(part, len(prompts), of)
        absent = [place for place in missing if place in wanted]
        text = f"{len(wanted) - len(absent)} of {len(wanted)} prompts{words} whole, as resolved.yaml says"
        if absent:
            text += f"; not: numbers {', '.join(map(str, absent[:8]))}{' …' * (len(absent) > 8)}"
        state: State = "problem" if absent and not code and not busy else "note" if absent else "ok"
        yield Check(name, state, text, redraw if absent and not busy else "", {"missing": absent})
    rest = [place for place in missing if all(place % of != part for _, part, of, _ in parts)]
    if rest:
        text = f"shares that have not ended: {len(rest)} prompts are missing, such as number {rest[0]}"
        yield Check(name, "ok" if busy else "note", text, "" if busy else redraw, {"missing": rest})


if __name__ == "__main__":
    sys.exit(main())
