"""Commands written down for people: in Markdown, in the head of a YAML file, in shell scripts."""

from __future__ import annotations

import re
import shlex
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

from tests.architecture.tree import ROOT, files

_BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TEXT = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_STARTS = re.compile(r"(torchrun|python3?|cogview3|pip|pytest|mkdocs|bash|sh|sbatch) ")
_CONFIGS = re.compile(r"(torchrun|python|cogview3)\b")
_COMMENT = re.compile(r"^# ?", re.MULTILINE)
_SMALL = {"SIDE": "512", "N": "2", "W": "2"}
"""Numbers that a page leaves to the reader."""


class Command(NamedTuple):
    """A command of this project: where it stands, the script or module it runs, its arguments."""

    where: Path
    program: str  # sample.py, cogview3 sample, tests/golden/check.py, sat.cli.prepare
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where.relative_to(ROOT)}: {self.program} {shlex.join(self.arguments)}"


def commands(*patterns: str) -> list[Command]:
    """All commands in the checkout's files that match one of the patterns, in order."""
    found = []
    for path in files():
        if any(path.relative_to(ROOT).match(pattern) for pattern in patterns):
            found += [command for line in lines(path) for command in parsed(path, line)]
    return found


def lines(path: Path) -> list[str]:
    """Logical shell lines of a file."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join([*_BLOCK.findall(text), *_in_prose(text)])
    elif path.suffix == ".yaml":
        head = re.match(r"(?:#.*\n)*", text)
        assert head is not None, "an empty head matches too"
        text = _COMMENT.sub("", head.group())
        text = text.replace("\\\n", " ")  # prose stands between the commands: keep the lines that start one
        text = "\n".join(
            line for line in text.splitlines() if re.match(r"(torchrun|python|cogview3)\b", line)
        )
    elif path.suffix == ".sbatch":
        text = re.sub(r"^# (?=([A-Z_]+=\S+ )*sbatch )", "", text, flags=re.MULTILINE)  # how to submit it
    return text.replace("\\\n", " ").splitlines()


def _in_prose(text: str) -> list[str]:
    """Commands in blocks of plain text and within sentences, where other things stand too.

    A sentence may name a program, or a part of one, without saying what to do: as if it were asked for help.
    """
    found = [line for block in _TEXT.findall(text) for line in block.splitlines()]
    inline = [" ".join(code.split()) for code in _INLINE.findall(_FENCED.sub("", text))]
    inline = [
        f"{code} --help" if re.fullmatch(r"python (-m )?[\w./]+( [a-z]+)*", code) else code for code in inline
    ]
    return [line for line in [*found, *inline] if _STARTS.match(line)]


def parsed(path: Path, line: str) -> list[Command]:
    """The project's commands in one shell line."""
    line = re.sub(r"^\s*[$>] ", "", line)
    words = [word for word in _words(line) if word not in ("$@", "…")]  # what the user adds
    words = [re.sub(r"\b(SIDE|N|W)\b", lambda match: _SMALL[match[0]], word) for word in words]
    found: list[Command] = []
    for part in _split(words):
        while part and re.fullmatch(r"[A-Z_]+=.*", part[0]):
            part = part[1:]
        program, arguments = _program(part)
        if program:
            found.append(Command(path, program, tuple(arguments)))
    return found


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", "|", ";", "&"):
            parts.append([])
        elif word in (">", ">>", "<"):
            break
        else:
            parts[-1].append(word)
    return parts


def _program(words: list[str]) -> tuple[str, list[str]]:  # noqa: C901 - a launcher after the other
    """Program of a command, without its launcher; an empty name for programs that are not ours."""
    if not words:
        return "", []
    launcher, rest = words[0], words[1:]
    if launcher == "sbatch":
        return _submitted(list(dropwhile(lambda word: word.startswith("-"), rest)))  # each --name=value
    if launcher == "on_nodes":  # of train_scripts/slurm.sh
        launcher, rest = "torchrun", [word for word in rest if "$" not in word]
    if launcher in ("python", "python3", "torchrun"):
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            # torchrun takes --name=value, --name value and switches
            takes_value = "=" not in rest[0] and rest[0] not in ("--standalone", "-u", "-O")
            rest = rest[2 if takes_value else 1 :]
        if rest and rest[0] == "-m":
            rest = rest[1:]
            if rest[:1] == ["cogview3"]:
                return _program(rest)
            return (rest[0], rest[1:]) if rest and rest[0].startswith(("sat.", "tests.")) else ("", [])
        return (rest[0], rest[1:]) if rest and rest[0].endswith(".py") else ("", [])
    if launcher == "cogview3":
        return (
            ("cogview3", rest) if not rest or rest[0].startswith("-") else (f"cogview3 {rest[0]}", rest[1:])
        )
    if launcher in ("bash", "sh"):
        return (rest[0], rest[1:]) if rest else ("", [])
    if launcher in ("pytest", "mkdocs", "pip"):
        return launcher, rest
    if launcher.startswith("./") or launcher == ".ci/run":
        return launcher.removeprefix("./"), rest
    return "", []


def _submitted(words: list[str]) -> tuple[str, list[str]]:
    """Program that a SLURM script runs with the arguments that follow its name."""
    if not words:
        return "", []  # an option that a sentence is about
    script, arguments = words[0], words[1:]
    if not (ROOT / script).is_file():
        return script, arguments
    (runs,) = re.findall(r"^on_nodes .*$", (ROOT / script).read_text(), re.MULTILINE)
    place = _words(runs).index("$@")
    return _program([*_words(runs)[:place], *arguments, *_words(runs)[place + 1 :]])
