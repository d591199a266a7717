"""Configs that must be refused in a line, or be meant: shipped ones, changed by a seeded hand.

``python -m tests.attack.configs --count 500 --seed 0`` checks each with ``sample.py --check`` or ``train.py
--check`` in this process, prints a line for each failure, and totals. Right is code 0, or code 2 with short
lines that each name a file and a line, an override, or a key; wrong are other codes, tracebacks, inner
errors, long echoes and anything that takes longer than the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

from sat.cli import sample, train
from tests.sampling import ROOT

SHIPPED = (
    ("sample", ("tiny.yaml",)),
    ("sample", ("debug.yaml",)),
    ("sample", ("tiny_cascade.yaml",)),
    ("train", ("tiny.yaml", "tiny_train.yaml")),
    ("train", ("tiny_base.yaml", "tiny_base_train.yaml")),
    ("sample", ("debug_rope.yaml",)),
    ("sample", ("plus.yaml",)),
    ("train", ("plus.yaml", "lora.yaml")),
)
VALUES = (
    "null",
    "true",
    "-1",
    "0",
    "1",
    "3",
    "1000000",
    "1000000000000",
    "1" + "0" * 30,
    "-" + "9" * 900,
    "9" * 4000,
    "0x" + "f" * 9000,
    "1.5",
    "1e400",
    ".nan",
    "-.inf",
    '""',
    "x" * 5000,
    '"' + "y " * 3000 + '"',
    "[]",
    "{}",
    "[[]]",
    "[1, two, {}]",
    "{a: 1}",
    "{target: os.system, params: {command: ls}}",
    "{target: sat.nothing.Here}",
    "{target: sat.engine.DiffusionEngine}",
    "{target: sat.diffusion.prediction.V, params: {x: 1}}",
    "{params: {}}",
    "{target: 3}",
    "${model}",
    "${oc.env:HOME}",
    "${a.b}",
    "${",
    "???",
    "'1'",
    "yes",
    "!!bool 12",
    "!!int abc",
    "!!int ''",
    "!!float ''",
    "!!float x",
    "!!null 3",
    "!!python/object/apply:os.system [ls]",
    "!!binary aGk=",
    '"a\\0b"',
    '"\\ud800"',
    "*none",
    "&a [*a]",
    "[" * 200,
    "{a: " * 80 + "1" + "}" * 80,
    "'../x'",
    "['']",
    "['../x']",
    "[sat.cli]",
    "[os]",
    "[antigravity]",
    "/dev/zero",
    "/etc/passwd",
    "2026-01-01",
    "12:30",
    "- a",
    "a: b: c",
    "<<: 3",
    "@x",
    "%x",
)
MALFORMED = {
    "0x" + "f" * 9000,
    "9" * 4000,
    "${oc.env:HOME}",
    "!!bool 12",
    "!!int abc",
    "!!int ''",
    "!!float ''",
    "!!float x",
    "!!null 3",
    "!!python/object/apply:os.system [ls]",
    "!!binary aGk=",
    '"a\\0b"',
    '"\\ud800"',
    "*none",
    "&a [*a]",
    "[" * 200,
    "{a: " * 80 + "1" + "}" * 80,
    "a: b: c",
    "@x",
    "%x",
}
PIECES = (
    "\0",
    "\t",
    "\x1b[31m",
    "\u2028",
    "\ufeff",
    ": ",
    "- ",
    "[",
    "}",
    "!!bool ",
    "&a ",
    "*a",
    "<<: ",
    '"',
    "'",
    "#",
    "|\n",
    "\r",
    "%",
    "\x85",
    "é",
    "  ",
    "---\n",
    "...\n",
    "? ",
    "key: 1\n",
)


class Case(NamedTuple):
    """A command with its config files and overrides; ``malformed`` ones have to be refused."""

    command: str
    bases: tuple[str, ...]
    text: str | None  # of the file that is laid over, or that takes the last one's place
    instead: bool
    overrides: tuple[str, ...]
    malformed: bool

    def __str__(self) -> str:
        over = "" if self.text is None else f" {'as' if self.instead else 'with'} {self.text[-300:]!r}"
        return (
            f"{self.command} {' '.join(self.bases)}{over} {' '.join(o[:120] for o in self.overrides)}".strip()
        )


def keys(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a tree of mappings and lists."""
    for name, child in tree.items() if isinstance(tree, dict) else ():
        yield (*above, str(name))
        yield from keys(child, (*above, str(name)))


def nested(key: tuple[str, ...], value: str) -> str:
    """YAML of ``value``, as it is written, at ``key``."""
    lines = [f"{'  ' * level}{name}:" for level, name in enumerate(key)]
    return "\n".join(lines) + f" {value}\n"


def cases(seed: int) -> Iterator[Case]:
    """Changed configs without end, the same for the same seed."""
    pick = random.Random(seed)
    while True:
        command, names = pick.choice(SHIPPED)
        bases = tuple(f"configs/{name}" for name in names)
        text = (ROOT / bases[-1]).read_text("utf-8")
        known = [key for base in bases for key in keys(yaml.safe_load((ROOT / base).read_text("utf-8")))]
        key = pick.choice(
            [*known, ("imports",), ("sampling", "prompt"), ("parallel", "tensor"), ("memory", "budget")]
        )
        value = pick.choice(VALUES)
        kind = pick.randrange(8)
        if kind < 3:  # a value
            yield Case(command, bases, nested(key, value), False, (), value in MALFORMED)
        elif kind == 3:  # an override
            yield Case(command, bases, None, False, (f"{'.'.join(key)}={value}",), value == '"\\ud800"')
        elif kind == 4:  # another key
            other = (
                *key[:-1],
                pick.choice((key[-1] + "x", key[-1][:-1] or "q", "x" * 3000, "0", "é", "target", '"a b"')),
            )
            yield Case(
                command, bases, nested(other, pick.choice(("1", "null", "{}", value))), False, (), False
            )
        elif kind == 5:  # a piece of text somewhere
            at = pick.randrange(len(text))
            yield Case(command, bases, text[:at] + pick.choice(PIECES) + text[at:], True, (), False)
        elif kind == 6:  # lines lost, doubled or moved
            lines = text.splitlines(keepends=True)
            at = pick.randrange(len(lines))
            change = pick.randrange(4)
            lines[at : at + 1] = [[], [lines[at]] * 2, [" " + lines[at]], [lines[at].lstrip()]][change]
            yield Case(command, bases, "".join(lines), True, (), False)
        else:  # bytes, or the end
            raw = bytearray(text.encode())
            if pick.random() < 0.5:
                raw = raw[: pick.randrange(len(raw))]
            else:
                raw[pick.randrange(len(raw))] = pick.randrange(256)
            yield Case(command, bases, raw.decode("utf-8", "surrogateescape"), True, (), False)


class SlowError(BaseException):
    """A check that took too long; no ``except Exception`` may hear of it."""


def _slow(number: int, frame: FrameType | None) -> None:
    raise SlowError


def run(case: Case, folder: Path, seconds: int) -> tuple[int, str]:
    """Exit code and standard error of the check of ``case``."""
    bases = [str(ROOT / base) for base in case.bases]
    if case.text is not None:
        path = folder / "changed.yaml"
        path.write_bytes(case.text.encode("utf-8", "surrogateescape"))
        bases = [*(bases[:-1] if case.instead else bases), str(path)]
    words = ["--base", *bases, *case.overrides, "--check"]
    said, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGALRM, _slow)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = (sample if case.command == "sample" else train).main(words)
            except SystemExit as stop:  # argparse's
                code = stop.code if isinstance(stop.code, int) else 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)
    return code, said.getvalue()


def fault(case: Case, code: int, said: str) -> str | None:
    """Why this is no right end of ``case``; None where it is one."""
    if "Traceback" in said:
        return "a traceback"
    if code == 0:
        return "a malformed config was taken" if case.malformed else None
    if code != 2:
        return f"code {code}: {said[-300:]!r}"
    lines = [line for line in said.splitlines() if not line.startswith(("usage:", "warning:", " "))]
    if not lines or len(lines) > 120:
        return f"{len(lines)} lines"
    if long := [line for line in lines if len(line) > 2000 or re.search(r"\S{300}", line)]:
        return f"a line of {len(long[0])} characters: {long[0][:100]!r}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said):
        return f"control characters: {said[:200]!r}"
    place = re.compile(r"(error: )?(.*\.yaml(:\d+)?: |.*override: |\d+ problems:|.*\.py: error: |[\w.]+: )")
    if bare := [line for line in lines if not place.match(line)]:
        return f"names no place: {bare[0][:200]!r}"
    return None


def attack(count: int, seed: int, *, seconds: int = 20) -> tuple[list[str], Counter[str], list[Case]]:
    """Check ``count`` changed configs: failures, how many ended in which way, and those that were taken."""
    failures, ends, taken = list[str](), Counter[str](), list[Case]()
    made = cases(seed)
    with tempfile.TemporaryDirectory() as folder:
        for command, names in SHIPPED[:4]:  # imports take their time, and must not be cut short
            whole = Case(command, tuple(f"configs/{name}" for name in names), None, False, (), False)
            assert run(whole, Path(folder), 0)[0] == 0
        for _ in range(count):
            case = next(made)
            try:
                code, said = run(case, Path(folder), seconds)
                why = fault(case, code, said)
            except SlowError:
                code, why = -1, f"not over after {seconds} s"
            except BaseException as error:
                code, why = -2, f"{type(error).__name__} escaped: {str(error)[:200]}"
            ends[{0: "taken", 2: "refused"}.get(code, "failed")] += 1
            if code == 0:
                taken.append(case)
            if why is not None:
                failures.append(f"FAIL {case}: {why}")
    return failures, ends, taken


def main() -> int:
    """Attack; 1 if anything failed."""
    reader = argparse.ArgumentParser(prog="python -m tests.attack.configs", description=__doc__)
    reader.add_argument("--count", type=int, default=500)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--taken", action="store_true", help="list the configs that were taken, too")
    args = reader.parse_args()
    started = time.monotonic()
    failures, ends, taken = attack(args.count, args.seed)
    for line in (*failures, *(f"taken {case}" for case in taken if args.taken)):
        print(line.encode("utf-8", "backslashreplace").decode())
    kinds = ", ".join(f"{name}: {number}" for name, number in sorted(ends.items()))
    print(f"{args.count} configs in {time.monotonic() - started:.0f} s ({kinds}); {len(failures)} failed")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
