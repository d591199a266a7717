"""``python -m sat.cli.prepare``: make and look at training data.

Nothing heavy is imported to parse the arguments.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sat.cli.main_guard import UsageError, guard

if TYPE_CHECKING:
    from sat.config.schema import Experiment
    from sat.data.buckets import BucketRule


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m sat.cli.prepare", description="Make and look at training data.", allow_abbrev=False
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_emoji(commands.add_parser("emoji", help="draw emoji sets as image-caption pairs"))
    _add_tokenizer(
        commands.add_parser("tokenizer", help="train a sentencepiece vocabulary for T5 tokenizers")
    )
    _add_inspect(commands.add_parser("inspect", help="count what data sources hold, list what is wrong"))
    _add_cache(commands.add_parser("cache", help="keep latents and text embeddings on disk for training"))
    return top


def _add_emoji(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument(
        "--packages",
        type=Path,
        help="folder of npm tarballs, missing ones are fetched into it (OUT/packages)",
    )
    command.add_argument("--size", type=int, choices=(64, 128), default=64, help="pixels a side (64)")
    command.add_argument(
        "--styles",
        default="noto,twemoji,flat,blob,emojitwo",
        help="comma-separated (all but 3d, which is held out and only drawn by itself)",
    )
    command.add_argument(
        "--concepts", default="all", help="'all', 'core' or a file of labels, one a line (all)"
    )


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--captions", type=Path, nargs="+", required=True, help="data folders to read from")
    command.add_argument("--vocab", type=int, default=2048, help="pieces at most (2048)")
    command.add_argument("--out", type=Path, required=True, help="file to write, e.g. spiece.model")
    command.add_argument("--words", nargs="*", default=[], help="further words, e.g. of a style added later")


def _add_inspect(command: argparse.ArgumentParser) -> None:
    sources = "folders, tables (.jsonl, .csv) or shards (.tar, .parquet)"
    command.add_argument("sources", type=Path, nargs="*", help=sources)
    files = "config files of a training, whose data, sizes, buckets, tokenizer and batch are looked at"
    command.add_argument("--base", nargs="+", action="extend", metavar="YAML", help=files)
    command.add_argument("--height", type=int, default=None, help="training height in pixels")
    command.add_argument("--width", type=int, default=None, help="training width in pixels (height)")
    command.add_argument(
        "--area", type=int, nargs="+", metavar="PIXELS", help="areas of aspect-ratio buckets"
    )
    command.add_argument("--step", type=int, default=32, help="their sides are multiples of this (32)")
    command.add_argument("--max-ratio", type=float, default=2.0, help="longer to shorter side (2)")
    command.add_argument("--batch", type=int, help="images of a batch over all ranks, for the table (1)")
    command.add_argument("--tokenizer", type=Path, help="spiece.model, to count captions over the limit")
    command.add_argument("--max-length", type=int, help="token limit (224)")
    command.add_argument("--sheet", type=Path, help="PNG to write the first pictures to")
    command.add_argument("--sheet-limit", type=int, default=256, help="pictures on the sheet (256)")


def _add_cache(command: argparse.ArgumentParser) -> None:
    files = "config files of the training, laid over one another left to right"
    command.add_argument("--base", nargs="+", action="extend", metavar="YAML", help=files)
    command.add_argument("--cache", type=Path, metavar="DIR", help="folder of the cache (data.cache)")
    command.add_argument("--batch-size", type=int, metavar="N", help="pictures at a time (train.batch_size)")
    command.add_argument("--check", action="store_true", help="only count; code 1 if anything is missing")
    command.add_argument("--prune", action="store_true", help="delete what this config does not use")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="config keys to set")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    args = parser().parse_args(argv)
    if args.command != "cache":  # which has a log of its own, for several ranks
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands = {"emoji": _emoji, "tokenizer": _tokenizer, "inspect": _inspect, "cache": _cache}
    command = commands[args.command]
    return guard(lambda: command(args), debug=args.debug)


def _emoji(args: argparse.Namespace) -> int:
    from sat.cli.commands.prepare import emoji

    return emoji(args)


def _tokenizer(args: argparse.Namespace) -> int:
    from sat.data.sources import captions_of, train_vocabulary

    pieces = train_vocabulary(captions_of(args.captions), args.out, args.vocab, args.words)
    print(f"{args.out}: {pieces} pieces")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from sat.data.buckets import Buckets
    from sat.data.records import Record
    from sat.data.survey import bucket_table, duplicates, sheet, survey

    requested = _requested(args)
    too_long = None if requested.tokenizer is None else _over_limit(requested.tokenizer, requested.max_length)
    if args.base and requested.tokenizer is None:
        print("captions over the token limit are not counted: no spiece.model is at hand (--tokenizer)")
    surveys = []
    for source in requested.sources:
        surveys.append(survey(source, too_long))
        print("\n".join(surveys[-1].lines(requested.height, requested.width)))
    print("\n".join(duplicates(surveys) or ["no duplicates"]))
    if requested.rule is not None:
        sizes = [picture.size for one in surveys for picture in one.pictures]
        print(
            "\n".join(bucket_table(Buckets.of(sizes, requested.rule), requested.batch))
            if sizes
            else "no buckets"
        )
    shown: list[Record] = [record for one in surveys for record in one.readable][: args.sheet_limit]
    if args.sheet is not None and shown:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(shown, min(16, len(shown)), requested.height or 64, requested.width or 64).save(args.sheet)
        print(f"{args.sheet}: {len(shown)} pictures")
    return 1 if any(one.bad for one in surveys) else 0


class _Requested(NamedTuple):
    """What ``inspect`` looks at: the options, and what a config says where they are silent."""

    sources: list[Path]
    height: int | None
    width: int | None
    rule: BucketRule | None
    batch: int
    tokenizer: Path | None
    max_length: int


def _requested(args: argparse.Namespace) -> _Requested:
    from sat.data.buckets import BucketRule

    height = args.height if args.height is not None else args.width
    width = args.width if args.width is not None else args.height
    try:
        rule = None if args.area is None else BucketRule(tuple(args.area), args.step, args.max_ratio)
    except ValueError as error:
        raise UsageError(str(error)) from error
    given = _Requested(
        args.sources, height, width, rule, args.batch or 1, args.tokenizer, args.max_length or 224
    )
    if not args.base:
        if not args.sources:
            raise UsageError("nothing to look at: name folders, tables or shards, or --base with a config")
        return given
    from sat.config.load import load
    from sat.train.data import bucket_rule

    experiment = load(args.base)
    data, train = experiment.data, experiment.train
    if data is None:
        raise UsageError("the config of --base has no `data` section")
    return _Requested(
        args.sources or [source.path for source in (*data.sources, *data.validation)],
        height or data.height,
        width or data.width,
        rule or bucket_rule(data),
        args.batch or (1 if train is None else train.batch_size),
        args.tokenizer or _vocabulary(experiment),
        args.max_length or experiment.conditioning.max_length,
    )


def _vocabulary(experiment: Experiment) -> Path | None:
    """The tokenizer that the training would use, or None where its weights are not at hand."""
    from sat.config.parts import find_vocabulary
    from sat.config.yaml_source import ConfigError

    try:
        return find_vocabulary(experiment.conditioning, experiment.checkpoint)
    except ConfigError:
        return None


def _cache(args: argparse.Namespace) -> int:
    from sat.cli.arguments import sort_overrides
    from sat.cli.commands.prepare import cache

    sort_overrides(args)
    if not args.base:
        raise UsageError("--base is needed: the config files of the training, such as configs/sft.yaml")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size}: expected at least 1")
    return cache(args)


def _over_limit(model: Path, limit: int) -> Callable[[str], bool]:
    """Whether a caption and its end token need more than ``limit`` tokens."""
    import sentencepiece

    if not model.is_file():
        raise UsageError(f"--tokenizer {model}: no such file")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return lambda caption: len(pieces.encode(caption)) + 1 > limit


if __name__ == "__main__":
    sys.exit(main())
