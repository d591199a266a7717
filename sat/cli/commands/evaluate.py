"""The work behind ``evaluate``: check what is needed, draw as ``sample.py`` does, score, report."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

from sat.apps.evaluate.metrics import KINDS, Setting, lacking
from sat.apps.evaluate.pictures import PICTURES, PromptList, plain, read_list
from sat.apps.evaluate.report import html
from sat.apps.evaluate.scores import Results, as_dict, open_folders, table, take
from sat.cli import sample
from sat.cli.arguments import Setting as Key
from sat.cli.arguments import checked_device
from sat.cli.commands import sample as sample_work
from sat.cli.main_guard import FAILED, UsageError
from sat.parallel.launch import pick_device
from sat.sampling.prompts import check_text
from sat.util import log as logs
from sat.util.files import write_atomic, write_text

log = logging.getLogger(__name__)

SHIPPED = ("retrieval", "features", "detail")
"""Scores that are taken unless others are asked for, where they can be."""

SCORES, REPORT = "scores.json", "report.html"


def work(args: argparse.Namespace) -> int:
    """Draw and score; the exit code. Under torchrun all ranks draw and rank 0 scores."""
    is_main = os.environ.get("RANK", "0") == "0"
    logs.setup(0 if is_main else 1, debug=args.debug)
    prompts = _prompts(args)
    if bool(args.base) == (args.images is not None):
        raise UsageError("give --base to draw pictures, or --images for a folder of them that is there")
    if args.images is not None and args.overrides:
        raise UsageError(f"{args.overrides[0]}: nothing is drawn with --images, so no config key can be set")
    for name, value in (("--at-once", args.at_once), ("--report-prompts", args.report_prompts)):
        if value < 1:
            raise UsageError(f"{name} {value}: expected at least 1")
    setting = Setting(
        pick_device(checked_device(args.device)), args.judges, args.classifier, args.real, args.at_once
    )
    judges, missing = _judges(args.scores, setting, prompts)
    if missing and not args.check:
        raise UsageError("\n".join(missing))
    existing = [path for path in (args.images, *args.compare) if path is not None]
    open_folders(existing, prompts)  # what is missing there is told before anything is drawn
    if args.base and (code := sample_work.work(*_drawing(args, prompts))):
        return code
    if args.check:
        for line in missing:
            print(f"note: {line}")
        print(f"scores: {', '.join(judges)}")
        return 0
    if not is_main:
        return 0
    mine = [args.out] if args.base else []
    folders = open_folders([*mine, *existing], prompts)
    results = take(folders, prompts, judges, setting, lambda line: log.info("%s", line))
    return _tell(results, args.out, args.report_prompts)


def _prompts(args: argparse.Namespace) -> PromptList:
    if (args.prompts is None) == (args.prompt is None):
        raise UsageError("give the prompts: --prompts FILE, or --prompt TEXT once or several times")
    for index, text in enumerate(args.prompt or []):
        check_text(text, f"prompt {index}")
    return read_list(args.prompts) if args.prompt is None else plain(args.prompt)


def _judges(asked: str | None, setting: Setting, prompts: PromptList) -> tuple[list[str], list[str]]:
    """The scores to take, and what is missing for them, one line each."""
    captions = [prompt.text for prompt in prompts.prompts]
    if asked is not None:
        names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
        unknown = [name for name in names if name not in KINDS]
        if unknown or not names:
            raise UsageError(f"--scores {asked}: expected some of {', '.join(KINDS)}")
        return names, lacking(names, setting, captions)
    able = []
    for name in SHIPPED:
        lines = lacking([name], setting, captions)
        if lines:
            log.info("not scored: %s", lines[0])
        else:
            able.append(name)
    if not able:
        raise UsageError("none of the scores that ship can be taken; --scores names others")
    return able, []


def _drawing(args: argparse.Namespace, prompts: PromptList) -> tuple[argparse.Namespace, list[Key]]:
    """What ``sample.py`` would be called with: the prompts, into OUT/pictures, going on where it stopped."""
    words = ["--base", *args.base, *args.overrides, "--resume", "--output-dir", str(args.out / PICTURES)]
    words += ["--check"] if args.check else []
    words += ["--debug"] if args.debug else []
    for option, value in (("--batch-size", args.batch_size), ("--seed", args.seed)):
        words += [] if value is None else [option, str(value)]
    told = sample.arguments([str(word) for word in words])
    texts = [prompt.text for prompt in prompts.prompts]
    return told, [
        *sample.given(told),
        Key("sampling.prompt", texts),
        Key("sampling.prompt_file", None),
    ]


def _tell(results: Results, out: Path, shown: int) -> int:
    """Write the files, print the table; the exit code is that of failure when a judge failed."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / SCORES, json.dumps(as_dict(results), indent=1, ensure_ascii=False) + "\n")
    title = " and ".join(folder.name for folder in results.folders)
    pieces = html(results, f"Evaluation of {title}", shown)
    write_atomic(out / REPORT, lambda file: file.writelines(piece.encode() for piece in pieces))
    print("\n".join(table(results)))
    print(f"{out / SCORES}\n{out / REPORT}")
    for line in results.failed:
        log.error("not taken: %s", line)
    return FAILED if results.failed else 0
