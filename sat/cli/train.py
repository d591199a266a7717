"""``train.py``: train what the config's objective says. Nothing heavy is imported to read the arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sat.cli.arguments import Setting, parse, reader, settings
from sat.cli.main_guard import guard, refuse_tasks
from sat.util.host import parse_size

DESCRIPTION = """\
Train the model that --base describes; a later file is laid over the earlier ones.

  python train.py --base configs/tiny.yaml configs/lora.yaml configs/tiny_lora.yaml --output-dir runs/mylora
  python train.py --base configs/tiny.yaml configs/tiny_train.yaml --output-dir runs/tiny
  torchrun --standalone --nproc_per_node 8 train.py --base configs/plus.yaml configs/sft.yaml
"""
EPILOG = """\
section.key=value sets any key of the config, for example train.dtype=bf16 or data.workers=2; the options
above only set such keys. --plan --fit 24GB says what a run takes, and what makes it fit. A run folder holds
resolved.yaml, run.json, metrics.jsonl, samples/ and checkpoints/. Ctrl-C, SIGTERM and SIGUSR1 save and
exit; the same command with --resume goes on exactly.
Exit codes: 0 done, 1 failed, 2 wrong arguments or config, 75 saved and stopped early, 130 interrupted
without saving. RUN/ended.json has code and reason, also under torchrun, which makes 1 of every code.
"""
_OPTIONS = {
    "output_dir": "output.dir",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "dtype": "train.dtype",
    "seed": "train.seed",
    "max_minutes": "train.max_minutes",
}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = reader("train.py", DESCRIPTION, EPILOG, run_folder=True)
    add = out.add_argument_group("training").add_argument
    add("--steps", type=int, help="optimizer steps in all")
    add("--batch-size", type=int, metavar="N", help="images per rank and step of accumulation")
    add("--lr", type=float, metavar="RATE", help="highest learning rate")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="precision of the weights")
    add("--seed", type=int, help="of the order of the data, its augmentation and the noise")

    add = out.add_argument_group("run folder").add_argument
    folder = "the run folder (default: output.dir, or runs/<the last file of --base>)"
    add("--output-dir", metavar="RUN", help=folder)
    add("--resume", action="store_true", help="go on from the newest whole checkpoint of the run folder")
    add("--max-minutes", type=float, metavar="M", help="save and stop after so long")

    add = out.add_argument_group("several runs").add_argument
    what = "train once for every value, below the run folder; repeat for all combinations"
    add("--sweep", action="append", metavar="KEY=A,B,C", help=what)
    add("--sweep-script", type=Path, metavar="FILE", help="write a SLURM array of the runs and start none")
    add(
        "--sweep-table", type=Path, metavar="FOLDER", help="print what the runs in a folder came to, and exit"
    )

    add = out.add_argument_group("memory and time, without training").add_argument
    add("--plan", action="store_true", help="print the memory, tokens and FLOPs that it will take, and exit")
    add("--ranks", type=int, metavar="N", help="with --plan or --sweep: as if, or, started on N ranks")
    add("--fit", type=size, metavar="SIZE", help="with --plan: what to change to fit, for example 24GB")
    return out


def size(text: str) -> int:
    """Bytes of ``24GB`` (1e9 each) or ``24GiB``."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rank_count() -> int:
    """Ranks that torchrun started this one among."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--sweep-table" for word in words):
        args = parser().parse_intermixed_args(words)

        def show() -> int:
            from sat.cli.commands.sweep import table

            print("\n".join([] if args.check else table(args.sweep_table)))
            return 0

        return guard(show, debug=args.debug)
    args = parse(parser(), argv, "configs/tiny.yaml configs/tiny_train.yaml")
    if not (args.plan or args.sweep) and args.ranks is not None or not args.plan and args.fit is not None:
        parser().error("--ranks goes with --plan or --sweep, --fit with --plan")
    if args.sweep_script is not None and not args.sweep:
        parser().error("--sweep-script goes with --sweep")
    if args.sweep and (args.plan or args.print_config or args.resume or rank_count() > 1):
        parser().error(
            "--sweep starts its runs itself, on --ranks N each, and resumes them: leave out --plan, "
            "--print-config, --resume and torchrun"
        )
    if args.ranks is not None and args.ranks < 1:
        parser().error(f"--ranks: expected at least 1, got {args.ranks}")
    given = settings(args, _OPTIONS)
    if args.resume:
        given.append(Setting("output.resume", True))

    def run() -> int:
        refuse_tasks("train.py", argv)
        if args.sweep:
            from sat.cli.commands.sweep import sweep

            root = None if args.output_dir is None else Path(args.output_dir)
            return sweep(
                args.base, args.overrides, given, args.sweep, root=root, ranks=args.ranks or 1,
                script=args.sweep_script, check=args.check or args.check_inputs,
            )  # fmt: skip
        from sat.cli.commands.train import work

        return work(args, given)

    return guard(run, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
