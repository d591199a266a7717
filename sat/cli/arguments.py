"""Arguments that commands share: config files, overrides, and options that set config keys."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, get_args

from sat import __version__
from sat.cli.main_guard import UsageError
from sat.util.log import one_line

if TYPE_CHECKING:
    from typing_extensions import Self

    from sat.parallel.launch import DeviceKind

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)


_SCRIPT = re.compile(r"\b(?:python )?(sample|train|convert)\.py\b|\b(?:python )?(prompt)_optimize\.py\b")


def spoken(text: str) -> str:
    """``text`` with commands as the user types them: those of ``cogview3`` where that was started."""
    if not sys.argv[0].startswith("cogview3 "):
        return text
    text = re.sub(r"(torchrun .*?)(\w+)\.py\b", r"\1-m cogview3 \2", text)
    text = re.sub(r"python -m sat\.cli\.", "cogview3 ", text)
    return _SCRIPT.sub(lambda found: f"cogview3 {found[1] or found[2]}", text)


ORIGINAL_VALUES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Parser(argparse.ArgumentParser):
    """Parser of a command: texts that say it as it was started, errors in two lines with near names."""

    @classmethod
    def of(cls, program: str, description: str, epilog: str = "") -> Self:
        """A parser that takes no abbreviations and prints its texts as they are laid out."""
        form = argparse.RawDescriptionHelpFormatter
        return cls(program, None, description, epilog, formatter_class=form, allow_abbrev=False)

    def format_help(self) -> str:
        """Usage, examples, and the options in groups, those of every program last."""
        self._action_groups.sort(key=lambda group: group.title in ("config", "messages"))
        return spoken(super().format_help())

    others: Mapping[str, str] = {}
    """Options of the original's programs: our option, words of ours with their value as ``{}``, or advice."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, with ``_`` for ``-`` in options, and the options of :attr:`others`."""
        words, ours = list(sys.argv[1:] if args is None else args), list[str]()
        while words:
            name, equals, value = (word := words.pop(0)).partition("=")
            dashed = name.replace("_", "-")
            if name.startswith("--") and dashed in self._option_string_actions:
                ours.append(dashed + equals + value)
            elif name.startswith("--") and (meant := self.others.get(dashed)) is not None:
                if " " in meant and "{}" not in meant:
                    self.error(f"{name} is the original's: {meant}")
                if not equals and words and "{}" in meant:
                    value = words.pop(0)
                value = ORIGINAL_VALUES.get(value, value)
                new = [part.format(value) for part in meant.split(" ")]
                if "--base" in new and any(w == "--base" for w in [*ours, *words]):
                    del new[:2]
                print(f"{name} is the original's; here it is {' '.join(new) or 'needless'}", file=sys.stderr)
                ours += new if "{}" in meant or not equals else [meant + equals + value]
            else:
                ours.append(word)
        return super().parse_known_args(ours, namespace)

    def options(self) -> set[str]:
        """Every option of this parser and of the commands below it."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {name for parser in action.choices.values() for name in parser.options()}
        return found

    def error(self, message: str) -> NoReturn:
        """Print a short usage and ``message``, with names near the misspelt ones; exit with code 2."""
        from difflib import get_close_matches

        _, known, unknown = message.partition("unrecognized arguments: ")
        if known:
            flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("-")]
            near = [name for flag in flags for name in get_close_matches(flag, self.options(), 1)]
            message += f"; did you mean {' and '.join(near)}?" if near else ""
        text = f"usage: {self.prog} [options]; {self.prog} --help lists them\n{self.prog}: error: "
        self.exit(2, f"{spoken(text)}{one_line(message)}\n")


class Setting(tuple[str, object]):
    """One config key and the value that an option gave it; messages name the option, ``label``."""

    label: str

    def __new__(cls, key: str, value: object, label: str = "override") -> Self:
        """The pair, as an override of a config."""
        made = super().__new__(cls, (key, value))
        made.label = label
        return made


def reader(program: str, description: str, epilog: str, *, run_folder: bool = False) -> Parser:
    """A parser with the arguments of every command over configs, such as ``--base`` and overrides.

    Options get no defaults: those are the config's. ``run_folder``: there is one, and ``--check-inputs`` for
    job scripts.
    """
    out = Parser.of(program, description, epilog)
    files = "config files, laid over one another left to right"
    out.usage = "%(prog)s --base YAML [YAML ...] [options] [section.key=value ...]"
    add = out.add_argument_group("config").add_argument
    add("--base", nargs="+", action="extend", metavar="YAML", help=files)
    overrides = "config keys to set after the files"
    add("overrides", nargs="*", metavar="section.key=value", help=overrides)
    add("--check", action="store_true", help="check the config and exit")
    if run_folder:
        what = "as --check, with an error for files that are missing; its last line names the run folder"
        add("--check-inputs", action="store_true", help=what)
    add("--print-config", action="store_true", help="print the resolved config as YAML and exit")
    add_messages(out)
    return out


def add_messages(parser: argparse.ArgumentParser, *commands: argparse.ArgumentParser) -> None:
    """Give ``parser`` and its ``commands`` the options of every program: how much it says."""
    absent = argparse.SUPPRESS  # a command of the program must not undo what stands before it
    for each in (parser, *commands):
        add = each.add_argument_group("messages").add_argument
        quiet, more = "only warnings and results", "say more of what is done"
        add("-q", "--quiet", dest="verbosity", action="store_const", const=-1, default=absent, help=quiet)
        add("-v", "--verbose", dest="verbosity", action="store_const", const=1, default=absent, help=more)
        add("--debug", action="store_true", default=absent, help="debug log; tracebacks of errors")
        add("--version", action="version", version=f"cogview3 {__version__}")
    parser.set_defaults(verbosity=0, debug=False)


def parse(
    reader: argparse.ArgumentParser, argv: Sequence[str] | None, example: str, *, small: str | None = None
) -> argparse.Namespace:
    """``reader``'s arguments, with overrides separated from the files of ``--base`` wherever they stand.

    The reader has ``--base`` (a list) and the positional ``overrides``; ``example`` is a config to suggest,
    ``small`` the one of the small model that ships: it stands in, with a line, where there is no --base.
    """
    args = reader.parse_intermixed_args(argv)
    stands_in = args.base is None and small is not None
    if stands_in:
        args.base = [small]
    sort_overrides(args)
    for item in args.overrides:
        if not _OVERRIDE.match(item):
            if getattr(args, "prompt", None) and not item.endswith((".yaml", ".yml")):
                whole = " ".join([args.prompt[-1], *(i for i in args.overrides if not _OVERRIDE.match(i))])
                reader.error(f"unexpected argument {item!r}: put the prompt in quotes, --prompt {whole!r}")
            reader.error(f"unexpected argument {item!r}: expected section.key=value, or --base {item}")
    if not args.base:
        reader.error(f"--base is needed: config files, such as {example}")
    if stands_in and args.verbosity >= 0:
        print(f"no --base, so the small model of {small} draws", file=sys.stderr)
    return args


def output_file(path: Path, option: str, kinds: Collection[str] = ()) -> None:
    """Make the folder of a file that a command will write, before its work; UsageError where that cannot be.

    ``kinds``: endings of the formats it can have.
    """
    if kinds and path.suffix.lower() not in kinds:
        raise UsageError(f"{option} {path}: expected a file that ends in {', '.join(kinds)}")
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; name a file")
    output_folder(path.parent, option)


def output_folder(path: Path, option: str) -> None:
    """Make a folder that a command will write into; UsageError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: cannot make the folder {path}: {error.strerror or error}") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"{option}: cannot write to the folder {path}")


def sort_overrides(args: argparse.Namespace) -> None:
    """Move overrides out of the files of ``--base``, which takes all that follows it."""
    bases = list(args.base or [])
    args.base = [item for item in bases if not _OVERRIDE.match(item)]
    args.overrides = [item for item in bases if _OVERRIDE.match(item)] + list(args.overrides)


def settings(args: argparse.Namespace, options: Mapping[str, str]) -> list[Setting]:
    """The config keys that the given ``options`` (argument: key) set."""
    given = ((name, key, getattr(args, name)) for name, key in options.items())
    return [Setting(key, value, _flag(name)) for name, key, value in given if value is not None]


def _flag(name: str) -> str:
    """The option of an argument's name."""
    return f"--{name.replace('_', '-')}"


class Lora(NamedTuple):
    """An adapter's file or folder, and its strength."""

    path: Path
    strength: float


def lora(text: str) -> Lora:
    """``PATH[:STRENGTH]``; a colon that no number follows belongs to PATH."""
    path, colon, strength = text.rpartition(":")
    try:
        return Lora(Path(path), float(strength)) if colon and path else Lora(Path(text), 1.0)
    except ValueError:
        return Lora(Path(text), 1.0)


class Control(NamedTuple):
    """A trained control's file, its picture, its strength and the part of the noise range where it acts."""

    path: Path
    image: Path
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


def control(text: str) -> Control:
    """``FILE:IMAGE[:SCALE[:START-END]]``."""
    scale = r"[-+]?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf)"
    found = re.fullmatch(rf"(.+?):(.+?)(?::({scale})(?::([\d.]+)-([\d.]+))?)?", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"--control {text}: expected FILE:IMAGE[:SCALE[:START-END]]")
    path, image, *numbers = found.groups()
    try:
        return Control(Path(path), Path(image), *(float(n) for n in numbers if n is not None))
    except ValueError as error:
        raise UsageError(f"--control {text}: expected numbers behind the picture: {error}") from error


def checked_device(name: str) -> DeviceKind:
    """``name`` if it is one that ``parallel.device`` may have; for commands without a config."""
    from sat.parallel.launch import DeviceKind

    known: tuple[DeviceKind, ...] = get_args(DeviceKind)
    for device in known:
        if name == device:
            return device
    raise UsageError(f"--device {name}: expected {', '.join(known)}")
