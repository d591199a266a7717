"""What the commands' arguments have in common: config files, overrides, and options that set config keys."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)


class Setting(NamedTuple):
    """One config key and the value that an option gave it."""

    key: str
    value: object


def parse(reader: argparse.ArgumentParser, argv: Sequence[str] | None, example: str) -> argparse.Namespace:
    """``reader``'s arguments, with overrides told apart from the files of ``--base`` wherever they stand.

    The reader has ``--base`` (a list) and the positional ``overrides``; ``example`` is a config to suggest.
    """
    args = reader.parse_intermixed_args(argv)
    bases = list(args.base or [])
    args.base = [item for item in bases if not _OVERRIDE.match(item)]
    args.overrides = [item for item in bases if _OVERRIDE.match(item)] + list(args.overrides)
    for item in args.overrides:
        if not _OVERRIDE.match(item):
            reader.error(f"unexpected argument {item!r}: expected section.key=value, or --base {item}")
    if not args.base:
        reader.error(f"--base is needed: config files, such as {example}")
    return args


def settings(args: argparse.Namespace, options: Mapping[str, str]) -> list[Setting]:
    """The config keys that the given ``options`` (argument: key) set."""
    pairs = ((key, getattr(args, name)) for name, key in options.items())
    return [Setting(key, value) for key, value in pairs if value is not None]
