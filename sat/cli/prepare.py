"""``python -m sat.cli.prepare``: make and look at training data."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported to parse it."""
    top = argparse.ArgumentParser(
        prog="python -m sat.cli.prepare", description="Make and look at training data."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    emoji = commands.add_parser(
        "emoji", help="draw emoji sets as image-caption pairs (the small model's data)"
    )
    emoji.add_argument("--out", type=Path, required=True, help="folder to write")
    emoji.add_argument(
        "--packages", type=Path, help="folder of npm tarballs; missing ones are fetched (OUT/packages)"
    )
    emoji.add_argument("--size", type=int, choices=(64, 128), default=64, help="pixels a side (64)")
    emoji.add_argument(
        "--styles",
        default="noto,twemoji,flat,blob,emojitwo",
        help="comma-separated; '3d' only by itself (all but 3d)",
    )
    emoji.add_argument(
        "--concepts", default="all", help="'all', 'core' or a file with one label per line (all)"
    )

    tokenizer = commands.add_parser(
        "tokenizer", help="train a sentencepiece vocabulary that T5 tokenizers read"
    )
    tokenizer.add_argument(
        "--captions", type=Path, nargs="+", required=True, help="data folders to read captions from"
    )
    tokenizer.add_argument("--vocab", type=int, default=2048, help="pieces at most (2048)")
    tokenizer.add_argument("--out", type=Path, required=True, help="file to write, e.g. spiece.model")
    tokenizer.add_argument(
        "--words", nargs="*", default=[], help="further words to see, e.g. of a style added later"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = {"emoji": _emoji, "tokenizer": _tokenizer}[args.command]
    try:
        return command(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _emoji(args: argparse.Namespace) -> int:
    from sat.data.emoji.build import build

    styles = [style.strip() for style in args.styles.split(",") if style.strip()]
    packages = args.packages if args.packages is not None else args.out / "packages"
    written = build(args.out, packages, styles, args.concepts, args.size)
    for failure in written.failed:
        print(f"not drawn: {failure}", file=sys.stderr)
    print(
        f"{args.out}: {written.trained.total()} images to train on (metadata.jsonl), "
        f"{written.held_out.total()} held out (heldout.jsonl), "
        f"{written.missing.total()} pairs without a drawing"
    )
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from sat.data.vocabulary import captions_of, train_vocabulary

    pieces = train_vocabulary(captions_of(args.captions), args.out, args.vocab, args.words)
    print(f"{args.out}: {pieces} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
