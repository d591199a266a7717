"""Arguments that commands share: config files, overrides, and options that set config keys."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, get_args

from sat.cli.main_guard import UsageError
from sat.util.log import one_line

if TYPE_CHECKING:
    from sat.parallel.launch import DeviceKind

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)


class Parser(argparse.ArgumentParser):
    """A parser whose errors cut what they echo."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message``; exit with code 2."""
        super().error(one_line(message))


class Setting(NamedTuple):
    """One config key and the value that an option gave it."""

    key: str
    value: object


def reader(program: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every command over configs, such as ``--base`` and overrides.

    Options get no defaults: those are the config's.
    """
    out = Parser(
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = "config files, laid over one another left to right"
    out.add_argument("--base", nargs="+", action="extend", metavar="YAML", help=files)
    overrides = "config keys to set after the files"
    out.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
    out.add_argument("--check", action="store_true", help="check the config and exit")
    out.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and exit")
    out.add_argument("--debug", action="store_true", help="debug log; tracebacks of errors")
    return out


def add_check_inputs(reader: argparse.ArgumentParser) -> None:
    """Give ``reader`` the option ``--check-inputs`` of commands with a run folder; job scripts use it."""
    what = "as --check, with an error for files that are missing; its last line names the run folder"
    reader.add_argument("--check-inputs", action="store_true", help=what)


def parse(reader: argparse.ArgumentParser, argv: Sequence[str] | None, example: str) -> argparse.Namespace:
    """``reader``'s arguments, with overrides separated from the files of ``--base`` wherever they stand.

    The reader has ``--base`` (a list) and the positional ``overrides``; ``example`` is a config to suggest.
    """
    args = reader.parse_intermixed_args(argv)
    sort_overrides(args)
    for item in args.overrides:
        if not _OVERRIDE.match(item):
            reader.error(f"unexpected argument {item!r}: expected section.key=value, or --base {item}")
    if not args.base:
        reader.error(f"--base is needed: config files, such as {example}")
    return args


def sort_overrides(args: argparse.Namespace) -> None:
    """Move overrides out of the files of ``--base``, which takes all that follows it."""
    bases = list(args.base or [])
    args.base = [item for item in bases if not _OVERRIDE.match(item)]
    args.overrides = [item for item in bases if _OVERRIDE.match(item)] + list(args.overrides)


def settings(args: argparse.Namespace, options: Mapping[str, str]) -> list[Setting]:
    """The config keys that the given ``options`` (argument: key) set."""
    pairs = ((key, getattr(args, name)) for name, key in options.items())
    return [Setting(key, value) for key, value in pairs if value is not None]


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


def checked_device(name: str) -> DeviceKind:
    """``name`` if it is one that ``parallel.device`` may have; for commands without a config."""
    from sat.parallel.launch import DeviceKind

    known: tuple[DeviceKind, ...] = get_args(DeviceKind)
    for device in known:
        if name == device:
            return device
    raise UsageError(f"--device {name}: expected {', '.join(known)}")
