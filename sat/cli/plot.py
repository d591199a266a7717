"""``python -m sat.cli.plot``: curves of training runs, and pictures of drawing, data and benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sat.cli.arguments import Parser, add_messages, output_file, sort_overrides
from sat.cli.main_guard import UsageError, guard
from sat.util import log as logs
from sat.util.host import install, prepare_threads

RUNS = "runs"
KINDS = (".png", ".svg", ".pdf", ".html")
DESCRIPTION = """\
Plot training runs; without a command the words are folders of runs.

  python -m sat.cli.plot runs/mylora runs/other
  python -m sat.cli.plot steps --base configs/tiny.yaml --prompt "a red apple" --out steps.png
  python -m sat.cli.plot attention --base configs/tiny.yaml --prompt "a red apple" --out words.png
  python -m sat.cli.plot data data/emoji_sample --out data.png
  python -m sat.cli.plot memory --base configs/plus.yaml --out memory.png
  python -m sat.cli.plot benchmarks benchmarks/results/amd-epyc/performance.json --out speed.png

FILE.html has the same as a page of its own, with a table of the last values.
"""


class _Parser(Parser):
    """Reads words without a command before them as those of ``runs``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        (commands,) = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        options = {word for word in words if word.startswith("-")}
        alone = RUNS in words and len(words) == 1 + len(options) and not options & {"-h", "--help"}
        folder = alone and Path(RUNS).is_dir()  # it is called as the command
        named = {*words[:2]} & {*commands.choices, "-h", "--help", "--version"}
        if folder or (words and not named):
            words.insert(0, RUNS)
        return super().parse_known_args(words, namespace)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser.of("python -m sat.cli.plot", DESCRIPTION)
    top.usage = "%(prog)s [COMMAND] [options]"
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser, prog=top.prog
    )
    add = commands.add_parser(
        RUNS, help="loss, held-out loss by noise level, rate, gradient, speed"
    ).add_argument
    what = "folders of one or several trainings, or metrics.jsonl files"
    add("runs", nargs="+", type=Path, metavar="RUN", help=what)
    add("--out", type=Path, metavar="FILE", help="png, svg, pdf or html (RUN/plot.png and RUN/plot.html)")
    add("--smooth", type=float, default=0.0, metavar="S", help="averaging of the loss, 0 to 1 (0, none)")

    model = "config files of the model"
    for name, what in (
        ("steps", "a strip of denoising: the prediction after some of the steps"),
        ("attention", "the places that the image looks at each word from"),
    ):
        add = commands.add_parser(name, help=what).add_argument
        add("--base", nargs="+", action="extend", required=True, metavar="YAML", help=model)
        add("--prompt", required=True, metavar="TEXT", help="text to draw")
        add("--seed", type=int, default=0)
        add("--steps", type=int, help="denoising steps (sampling.steps)")
        add("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
        add("overrides", nargs="*", metavar="section.key=value", help="config keys to set")
        if name == "steps":
            add("--count", type=int, default=8, metavar="N", help="pictures of the strip (8)")

    add = commands.add_parser(
        "data", help="sizes of a data set's pictures, and its first pictures"
    ).add_argument
    add("sources", nargs="+", type=Path, help="folders, tables or shards")
    add("--area", type=int, nargs="+", metavar="PIXELS", help="areas of aspect-ratio buckets (the median's)")
    add("--step", type=int, default=32, help="their sides are multiples of this (32)")
    add("--pictures", type=int, default=32, metavar="N", help="pictures on the contact sheet (32)")
    add("--out", type=Path, required=True, metavar="FILE", help="png, svg, pdf or html")

    add = commands.add_parser("memory", help="memory of sampling by resolution, estimated").add_argument
    add("--base", nargs="+", action="extend", required=True, metavar="YAML", help=model)
    add("--sides", type=int, nargs="+", metavar="PIXELS", help="sides of square pictures (those allowed)")
    add("--out", type=Path, required=True, metavar="FILE", help="png, svg, pdf or html")
    add("overrides", nargs="*", metavar="section.key=value", help="config keys to set")

    add = commands.add_parser("benchmarks", help="bars of the tables of a result file").add_argument
    add("files", nargs="+", type=Path, metavar="JSON", help="benchmarks/results/<machine>/performance.json")
    add("--out", type=Path, required=True, metavar="FILE", help="png, svg, pdf or html")
    add_messages(top, *commands.choices.values())
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Read, plot, write; the exit code."""
    args = parser().parse_args(argv)

    def work() -> int:
        logs.setup(debug=args.debug, verbosity=args.verbosity)
        if hasattr(args, "base"):
            sort_overrides(args)
            prepare_threads()
        if args.out is not None:
            strip = (".png", ".jpg", ".jpeg", ".webp")
            output_file(args.out, "--out", strip if args.command == "steps" else KINDS)
        if not getattr(args, "prompt", "x").strip():
            raise UsageError("--prompt: is empty; say what to draw")
        if getattr(args, "pictures", 1) < 1:
            raise UsageError(f"--pictures {args.pictures}: expected at least 1")
        if args.command != "steps" and find_spec("matplotlib") is None:
            raise UsageError(f"plots need matplotlib: {install('plot')}")
        from sat.cli.commands.plot import COMMANDS

        for path in COMMANDS[args.command](args):
            print(path)
        return 0

    return guard(work, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
