"""``python -m sat.cli.evaluate``: draw and score pictures of a prompt list, or ask people."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sat.cli.arguments import checked_device, sort_overrides
from sat.cli.main_guard import guard
from sat.util import threads

CLASSIFIER = Path("checkpoints/tiny_classifier")
JUDGES = Path("weights/judges")
VOTES = Path("preference.jsonl")
RUN = "run"
DESCRIPTION = """\
Draw the pictures of a prompt list and score them, or score folders of pictures that are there.

  python -m sat.cli.evaluate --base configs/tiny.yaml --prompts configs/tiny_prompts.txt --out OUT
  python -m sat.cli.evaluate --images A --compare B --prompts LIST --scores clip,hps --out OUT

Without a command the words are those of `run`. Scores: retrieval, features and detail ship; fid, clip,
aesthetic, hps and image_reward need weights in --judges (docs/evaluation.md).
"""


class _Parser(argparse.ArgumentParser):
    """Reads options without a command before them as those of ``run``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--debug"):
            words.insert(0, RUN)
        return super().parse_known_args(words, namespace)


def parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported to parse it."""
    top = _Parser(
        prog="python -m sat.cli.evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    _add_run(commands.add_parser(RUN, help="draw and score pictures (without a command)"))
    _add_preference(
        commands.add_parser("preference", help="ask people which of two models' pictures is better")
    )
    _add_small(commands)
    return top


def _add_run(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("--base", nargs="+", action="extend", metavar="YAML", help="config files of the model that draws")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one a line, or .csv, .tsv, .jsonl, .json with categories",
    )
    add("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for several")
    add(
        "--out", type=Path, required=True, metavar="DIR", help="folder for pictures, scores.json, report.html"
    )
    add("--images", type=Path, metavar="DIR", help="score the pictures in this folder instead of drawing")
    add(
        "--compare", type=Path, action="append", default=[], metavar="DIR", help="score another folder beside"
    )
    add("--real", type=Path, metavar="DIR", help="real pictures, for features, detail and fid")
    add("--scores", metavar="NAME,NAME", help="which scores (those that ship and can be taken)")
    add("--judges", type=Path, default=JUDGES, metavar="DIR", help=f"weights of judges ({JUDGES})")
    add("--classifier", type=Path, default=CLASSIFIER, help=f"folder of the small judge ({CLASSIFIER})")
    add("--batch-size", type=int, metavar="N", help="images per prompt (sampling.batch_size)")
    add("--seed", type=int, help="image i of a prompt uses SEED + i (sampling.seed)")
    add("--at-once", type=int, default=32, metavar="N", help="pictures a judge looks at together (32)")
    add("--device", default="auto", help="where judges run, as parallel.device (auto)")
    add("--report-prompts", type=int, default=100, metavar="N", help="prompts shown in the report (100)")
    add("--check", action="store_true", help="check config, prompts and what the scores need, and exit")
    add("overrides", nargs="*", metavar="section.key=value", help="config keys to set, for drawing")


def _add_preference(ask: argparse.ArgumentParser) -> None:
    add = ask.add_argument
    add("a", type=Path, metavar="A_DIR", help="pictures of one model, as sample.py or evaluate wrote them")
    add("b", type=Path, metavar="B_DIR", help="pictures of the other for the same prompts")
    add("--prompts", type=Path, metavar="FILE", help="texts to show (default: what the PNG files say)")
    add("--votes", type=Path, default=VOTES, metavar="FILE", help=f"file that votes are added to ({VOTES})")
    add(
        "--questions",
        default="alignment,quality",
        metavar="NAME,NAME",
        help="what to ask (alignment,quality)",
    )
    add("--seed", type=int, default=0, help="of orders and sides (0)")
    add("--port", type=int, default=8765, help="of the loopback address; 0 picks a free one (8765)")
    add("--summary", action="store_true", help="print what the votes say so far, and exit")


def _add_small(commands: Any) -> None:
    """The commands around the classifier that ships."""
    train = commands.add_parser("train-classifier", help="train the small classifier that judges")
    train.add_argument("--data", type=Path, required=True, help="folder whose table has concept and style")
    train.add_argument("--out", type=Path, default=CLASSIFIER, help=f"folder to write ({CLASSIFIER})")
    train.add_argument("--steps", type=int, default=3000)
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--lr", type=float, default=3e-3)
    train.add_argument("--width", type=int, default=112, help="number of features (112)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, help="CPU threads (all)")
    train.add_argument("--device", default="auto", help="as parallel.device (auto)")
    judge = commands.add_parser("retrieval", help="is it in the picture what the caption asks for?")
    judge.add_argument(
        "--images", type=Path, required=True, help="folder of images, e.g. what sample.py wrote"
    )
    judge.add_argument(
        "--captions", type=Path, help=".jsonl table, or prompts one a line (default: from the PNG files)"
    )
    judge.add_argument("--classifier", type=Path, default=CLASSIFIER, help=f"its folder ({CLASSIFIER})")
    judge.add_argument("--json", type=Path, help="file to write the scores to")
    judge.add_argument("--list", action="store_true", help="print what each picture was taken for")
    detail = commands.add_parser("detail", help="how near is fine detail to that of real pictures?")
    detail.add_argument(
        "--images", type=Path, required=True, help="folder of images, e.g. what sample.py wrote"
    )
    detail.add_argument("--real", type=Path, required=True, help="folder of real pictures of the same size")
    detail.add_argument("--classifier", type=Path, default=CLASSIFIER, help=f"its folder ({CLASSIFIER})")
    sheet = commands.add_parser("sheet", help="all pictures of a folder on one, in the order of the prompts")
    sheet.add_argument(
        "--images", type=Path, required=True, help="folder of images, e.g. what sample.py wrote"
    )
    sheet.add_argument("--captions", type=Path, help=".jsonl table, or prompts one a line")
    sheet.add_argument("--out", type=Path, required=True, help="PNG file to write")
    sheet.add_argument("--columns", type=int, default=8)
    sheet.add_argument("--scale", type=int, default=1, help="enlarge this many times")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    args = parser().parse_args(argv)
    if args.command != RUN:  # which has a log of its own, for several ranks
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = {
        RUN: _run, "preference": _preference, "train-classifier": _train,
        "retrieval": _retrieval, "detail": _detail, "sheet": _sheet,
    }[args.command]  # fmt: skip
    stopped = "run the same command again to go on" if args.command == RUN else ""
    return guard(lambda: command(args), debug=args.debug, on_stop=stopped)


def _run(args: argparse.Namespace) -> int:
    sort_overrides(args)
    threads.prepare()
    from sat.cli.commands import evaluate as evaluate_work  # torch and all: only once the arguments are good

    return evaluate_work.work(args)


def _preference(args: argparse.Namespace) -> int:
    from sat.cli.commands.preference import work

    return work(args)


def _train(args: argparse.Namespace) -> int:
    import torch

    from sat.apps.evaluate.training import BELIEVED, Recipe, train
    from sat.parallel.launch import keep_freed_memory, pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    recipe = Recipe(args.steps, args.batch_size, args.lr, width=args.width, seed=args.seed)

    def report(step: int, values: Mapping[str, float]) -> None:
        print(
            f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True
        )

    card = train(args.data, args.out, recipe, pick_device(checked_device(args.device)), report)
    print(
        f"{args.out}: {len(card.concepts)} concepts, {len(card.styles)} styles, {card.training['seconds']} s"
    )
    for name, value in card.scores.items():
        print(f"  {name.replace('_', ' ')}: {value:.1%}")
    if card.scores["augmented_top1"] < BELIEVED:
        print(f"too weak to judge: top-1 under {BELIEVED:.0%} on other augmentations of real pictures")
        return 1
    return 0


def _retrieval(args: argparse.Namespace) -> int:
    import json

    from sat.apps.evaluate.retrieval import ENOUGH, score_folder
    from sat.apps.evaluate.training import BELIEVED
    from sat.models.vision.classifier import Classifier

    classifier = Classifier.load(args.classifier)
    scores = score_folder(args.images, args.captions, classifier)
    if args.list:
        for one in scores.judged:
            mark = "+" if one.found else "5" if one.wanted.concept in one.best else "-"
            print(f"{mark} {one.where}: {one.wanted.caption!r} taken for {one.best[0]!r}, {one.style} style")
    print(f"images judged: {scores.images}")
    print(f"concept top-1: {scores.top1:.1%}, top-5: {scores.top5:.1%}")
    if scores.style is not None:
        print(f"style: {scores.style:.1%} of the {scores.styled} whose caption names one")
    if scores.distance is not None:
        few = "" if scores.images >= ENOUGH else f" (fewer than {ENOUGH} images: too few to compare)"
        print(f"Frechet distance of features: {scores.distance:.3f}{few}")
    if scores.unknown:
        print(f"not judged, no known concept in: {', '.join(map(repr, scores.unknown[:5]))}")
    own = classifier.card.scores.get("augmented_top1", 0.0)
    if own < BELIEVED:
        print(f"note: the classifier itself is right on only {own:.1%} of real pictures: do not believe it")
    if args.json is not None:
        args.json.write_text(json.dumps(scores.as_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def _detail(args: argparse.Namespace) -> int:
    from sat.apps.evaluate.detail import detail_of_folders
    from sat.apps.evaluate.retrieval import ENOUGH
    from sat.models.vision.classifier import Classifier

    found = detail_of_folders(args.images, args.real, Classifier.load(args.classifier))
    few = "" if found.images >= ENOUGH else f" (fewer than {ENOUGH} images: too few to compare)"
    name = "Frechet distance of the features of full-resolution crops"
    print(f"{name}, {found.images} images: {found.distance:.3f}{few}")
    if found.limit is not None:
        print(f"the same, extrapolated to many pictures: {found.limit:.3f}")
    print(f"kernel distance of the same, which does not depend on the number: {found.kernel:.3f}")
    print(f"fine detail: {found.energy:.2f} of the real pictures' energy above a quarter cycle a pixel")
    return 0


def _sheet(args: argparse.Namespace) -> int:
    from sat.apps.evaluate.pictures import Opened, collect
    from sat.util.images import grid, write_png

    pictures = list(Opened([path for path, _ in collect(args.images, args.captions)]))
    made = grid(pictures, columns=args.columns)
    write_png(
        args.out, made.resize((made.width * args.scale, made.height * args.scale), resample=1)
    )  # Lanczos
    print(f"{args.out}: {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
