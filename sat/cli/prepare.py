"""``python -m sat.cli.prepare``: make and look at training data.

Nothing heavy is imported to parse the arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sat.cli.arguments import Parser, add_messages
from sat.cli.main_guard import guard, refuse_tasks
from sat.util import log as logs

DESCRIPTION = """\
Make training data, look at it, and keep its latents.

  python -m sat.cli.prepare inspect data/emoji_sample --sheet sheet.png
  python -m sat.cli.prepare inspect --base configs/tiny.yaml configs/lora.yaml configs/tiny_lora.yaml
  python -m sat.cli.prepare cache --base configs/plus.yaml configs/sft.yaml --cache data/cache
  python -m sat.cli.prepare emoji --out data/emoji
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser.of("python -m sat.cli.prepare", DESCRIPTION)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser("emoji", help="draw emoji sets as image-caption pairs").add_argument
    add("--out", type=Path, required=True, help="folder to write")
    packages = "folder of npm tarballs, missing ones are fetched into it (OUT/packages)"
    add("--packages", type=Path, help=packages)
    add("--size", type=int, choices=(64, 128), default=64, help="pixels a side (64)")
    styles = "comma-separated (all but 3d, which is held out and only drawn by itself)"
    add("--styles", default="noto,twemoji,flat,blob,emojitwo", help=styles)
    add("--concepts", default="all", help="'all', 'core' or a file of labels, one a line (all)")

    add = commands.add_parser(
        "tokenizer", help="train a sentencepiece vocabulary for T5 tokenizers"
    ).add_argument
    add("--captions", type=Path, nargs="+", required=True, help="data folders to read from")
    add("--vocab", type=int, default=2048, help="pieces at most (2048)")
    add("--out", type=Path, required=True, help="file to write, e.g. spiece.model")
    add("--words", nargs="*", default=[], help="further words, e.g. of a style added later")

    add = commands.add_parser(
        "inspect", help="count the pictures of data sources, list what is wrong"
    ).add_argument
    sources = "folders, tables (.jsonl, .csv) or shards (.tar, .parquet)"
    add("sources", type=Path, nargs="*", help=sources)
    files = "config files of a training, whose data, sizes, buckets, tokenizer and batch are looked at"
    add("--base", nargs="+", action="extend", metavar="YAML", help=files)
    add("--height", type=int, default=None, help="training height in pixels")
    add("--width", type=int, default=None, help="training width in pixels (height)")
    add("--area", type=int, nargs="+", metavar="PIXELS", help="areas of aspect-ratio buckets")
    add("--step", type=int, default=32, help="their sides are multiples of this (32)")
    add("--max-ratio", type=float, default=2.0, help="longer to shorter side (2)")
    add("--batch", type=int, help="images of a batch over all ranks, for the table (1)")
    add("--tokenizer", type=Path, help="spiece.model, to count captions over the limit")
    add("--max-length", type=int, help="token limit (224)")
    add("--caption", metavar="NAME", help="name of the captions in rows (text, prompt, caption …)")
    add("--all", action="store_true", help="list all that is skipped, not the first 20 of a source")
    add("--sheet", type=Path, help="PNG to write the first pictures to")
    add("--sheet-limit", type=int, default=256, help="pictures on the sheet (256)")

    add = commands.add_parser(
        "cache", help="keep latents and text embeddings on disk for training"
    ).add_argument
    files = "config files of the training, laid over one another left to right"
    add("--base", nargs="+", action="extend", metavar="YAML", help=files)
    add("--cache", type=Path, metavar="DIR", help="folder of the cache (data.cache)")
    add("--batch-size", type=int, metavar="N", help="pictures at a time (train.batch_size)")
    add("--check", action="store_true", help="only count; code 1 if anything is missing")
    add("--prune", action="store_true", help="delete what this config does not use")
    add("overrides", nargs="*", metavar="section.key=value", help="config keys to set")

    add = commands.add_parser("prior", help="draw class pictures for prior preservation").add_argument
    files = "config files of the model, or of the training, whose picture size is then used"
    add("--base", nargs="+", action="extend", metavar="YAML", help=files)
    add("--prompt", action="append", required=True, help="class prompt, such as 'a fox'; several in turn")
    add("--count", type=int, default=100, metavar="N", help="pictures in all (100); missing ones are drawn")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures and captions")
    add("overrides", nargs="*", metavar="section.key=value", help="config keys to set")
    add_messages(top, *commands.choices.values())
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = parser().parse_args(argv)
    if args.command != "cache":  # which has a log of its own, for several ranks
        logs.setup(debug=args.debug, verbosity=args.verbosity)

    def work() -> int:
        refuse_tasks("-m sat.cli.prepare", argv)
        from sat.cli.commands.prepare import COMMANDS

        return COMMANDS[args.command](args)

    return guard(work, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
