"""``python -m sat.cli.evaluate``: draw and score pictures of a prompt list, or ask people."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat.cli.arguments import Parser, add_messages, sort_overrides
from sat.cli.main_guard import guard, refuse_tasks
from sat.util import log as logs
from sat.util.host import prepare_threads

CLASSIFIER = Path("checkpoints/tiny_judge")
WEIGHTS = Path("weights/judges")
VOTES = Path("preference.jsonl")
RUN = "run"
DESCRIPTION = """\
Draw the pictures of a prompt list and score them, or score folders of pictures that are there.

  python -m sat.cli.evaluate --base configs/tiny.yaml --prompts configs/tiny_prompts.txt --out OUT
  python -m sat.cli.evaluate --images A --compare B --prompts LIST --scores clip,hps --out OUT

Without a command the words are those of `run`. Scores: retrieval, features and detail ship; fid, clip,
aesthetic, hps and image_reward need weights in --metric-weights (docs/evaluation.md).
"""


class _Parser(Parser):
    """Reads options without a command before them as those of ``run``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        rest = [word for word in words if word not in ("--debug", "-q", "--quiet", "-v", "--verbose")]
        if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help", "--version")):
            words.insert(0, RUN)
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        """The commands, and the options of ``run``, which needs no command."""
        (commands,) = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        options = commands.choices[RUN].format_help().partition("\n\n")[2]
        return f"{super().format_help()}\nwithout a command, as of {RUN}:\n\n{options}"


def parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported to parse it."""
    top = _Parser.of("python -m sat.cli.evaluate", DESCRIPTION)
    top.usage = "%(prog)s [COMMAND] [options]"
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser, prog=top.prog
    )
    add = commands.add_parser(RUN, help="draw and score pictures (without a command)").add_argument
    add("--base", nargs="+", action="extend", metavar="YAML", help="config files of the model that draws")
    prompts = "one a line, or .csv, .tsv, .jsonl, .json with categories, or DPG-Bench's folder of .txt"
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    add("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for several")
    out = "folder for pictures, scores.json, report.html"
    add("--out", type=Path, required=True, metavar="DIR", help=out)
    add("--images", type=Path, metavar="DIR", help="score the pictures in this folder instead of drawing")
    compare = "score another folder beside"
    add("--compare", type=Path, action="append", default=[], metavar="DIR", help=compare)
    add("--real", type=Path, metavar="DIR", help="real pictures, for features, detail and fid")
    add("--scores", metavar="NAME,NAME", help="which scores (those that ship and can be taken)")
    weights = f"networks of the metrics that do not ship ({WEIGHTS})"
    add("--metric-weights", "--judges", type=Path, default=WEIGHTS, metavar="DIR", help=weights)
    add("--classifier", type=Path, default=CLASSIFIER, help=f"folder of the small classifier ({CLASSIFIER})")
    add("--batch-size", type=int, metavar="N", help="images per prompt (sampling.batch_size)")
    add("--seed", type=int, help="image i of a prompt uses SEED + i (sampling.seed)")
    add("--at-once", type=int, default=32, metavar="N", help="pictures a metric takes together (32)")
    add("--device", default="auto", help="device of the metrics, as parallel.device (auto)")
    add("--report-prompts", type=int, default=100, metavar="N", help="prompts shown in the report (100)")
    add("--check", action="store_true", help="check config, prompts and what the scores need, and exit")
    add("overrides", nargs="*", metavar="section.key=value", help="config keys to set, for drawing")

    ask = "ask people which of two models' pictures is better"
    add = commands.add_parser("preference", help=ask).add_argument
    add("a", type=Path, metavar="A_DIR", help="pictures of one model, as sample.py or evaluate wrote them")
    add("b", type=Path, metavar="B_DIR", help="pictures of the other for the same prompts")
    add("--prompts", type=Path, metavar="FILE", help="texts to show (default: what the PNG files say)")
    add("--votes", type=Path, default=VOTES, metavar="FILE", help=f"file that votes are added to ({VOTES})")
    questions = "questions to ask (alignment,quality)"
    add("--questions", default="alignment,quality", metavar="NAME,NAME", help=questions)
    add("--seed", type=int, default=0, help="of orders and sides (0)")
    add("--port", type=int, default=8765, help="of the loopback address; 0 picks a free one (8765)")
    add("--summary", action="store_true", help="print the statistics of the votes so far, and exit")
    pairs = "write the votes' pairs there to train on (configs/preference.yaml), and exit"
    add("--pairs", type=Path, metavar="DIR", help=pairs)
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of --pairs' prompts (0.1)")
    export = "lay pictures out as the program of GenEval, DPG-Bench or T2I-CompBench reads them"
    add = commands.add_parser("export", help=export).add_argument
    add("--layout", required=True, metavar="NAME", help="geneval, dpg or t2i_compbench")
    add(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="pictures as sample.py or evaluate wrote them",
    )
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="the benchmark's own list they were drawn from",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    _add_small(commands)
    add_messages(top, *commands.choices.values())
    return top


def _add_small(commands: Any) -> None:
    """The commands around the classifier that ships."""
    images = "folder of images, e.g. what sample.py wrote"
    classifier = f"its folder ({CLASSIFIER})"
    add = commands.add_parser("train-classifier", help="train the small classifier").add_argument
    many = "folders whose tables have concept and style; scores and style names are of the first"
    add("--data", type=Path, required=True, nargs="+", metavar="DIR", help=many)
    add("--out", type=Path, default=CLASSIFIER, help=f"folder to write ({CLASSIFIER})")
    add("--concepts", default="all", help="judge these, trained on all: all, core or a file of labels (all)")
    add("--often", type=float, default=1.0, help="draw those as many times as often as others (1)")
    add(
        "--augment",
        default="plain",
        choices=("plain", "strong", "hard"),
        help="strength of augmentation (plain)",
    )
    add("--steps", type=int, default=3000)
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=3e-3)
    add("--width", type=int, default=112, help="number of features (112)")
    add("--stages", type=int, nargs=3, metavar="N", help="channels of the stages before (by --width)")
    add("--start", type=Path, metavar="DIR", help="go on from this classifier, of the same widths")
    add(
        "--average",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="keep a moving average of the weights (0: none)",
    )
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--int8", action="store_true", help="write weights of 8 bits instead of 16")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads (all)")
    add("--device", default="auto", help="as parallel.device (auto)")

    add = commands.add_parser(
        "retrieval", help="is it in the picture what the caption asks for?"
    ).add_argument
    add("--images", type=Path, required=True, help=images)
    add("--captions", type=Path, help=".jsonl table, or prompts one a line (default: from the PNG files)")
    add("--classifier", type=Path, default=CLASSIFIER, help=classifier)
    add("--json", type=Path, help="file to write the scores to")
    add("--list", action="store_true", help="print what each picture was taken for")

    add = commands.add_parser("detail", help="how near is fine detail to that of real pictures?").add_argument
    add("--images", type=Path, required=True, help=images)
    add("--real", type=Path, required=True, help="folder of real pictures of the same size")
    add("--classifier", type=Path, default=CLASSIFIER, help=classifier)

    sheet = "all pictures of a folder on one, in the order of the prompts"
    add = commands.add_parser("sheet", help=sheet).add_argument
    add("--images", type=Path, required=True, help=images)
    add("--captions", type=Path, help=".jsonl table, or prompts one a line")
    add("--out", type=Path, required=True, help="PNG file to write")
    add("--columns", type=int, default=8)
    add("--scale", type=int, default=1, help="enlarge this many times")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = parser().parse_args(argv)

    def work() -> int:
        refuse_tasks("-m sat.cli.evaluate", argv)
        if args.command == RUN:  # it has a log of its own, for several ranks
            sort_overrides(args)
            prepare_threads()
        else:
            logs.setup(debug=args.debug, verbosity=args.verbosity)
        from sat.cli.commands.evaluate import COMMANDS
        from sat.config.yaml_source import find

        for name in ("classifier", "prompts"):  # what ships is found from everywhere
            if (path := getattr(args, name, None)) is not None:
                setattr(args, name, find(path) or path)
        return COMMANDS[args.command](args)

    draws = args.command == RUN and args.base and not args.check
    return guard(work, debug=args.debug, on_stop="run the same command again to go on" if draws else "")


if __name__ == "__main__":
    sys.exit(main())
