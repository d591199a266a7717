"""The commands of ``evaluate``: draw and score pictures, ask people, train and use the small classifier."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sat.cli import sample
from sat.cli.arguments import Setting, checked_device, output_file, output_folder
from sat.cli.main_guard import UsageError
from sat.util import log as logs
from sat.util.ending import FAILED
from sat.util.host import write_atomic, write_text

if TYPE_CHECKING:
    from sat.apps.evaluate.metrics import MetricConfig
    from sat.apps.evaluate.pictures import PromptList
    from sat.apps.evaluate.report import Results

log = logging.getLogger(__name__)

SHIPPED = ("retrieval", "features", "detail")
"""Scores that are taken unless others are requested, where they can be."""

SCORES, REPORT = "scores.json", "report.html"


def run(args: argparse.Namespace) -> int:  # noqa: C901 - the checks in the order in which they are cheap
    """Draw as ``sample.py`` does, score, report; the exit code. All ranks draw and rank 0 scores."""
    from sat.apps.evaluate.metrics import MetricConfig
    from sat.apps.evaluate.pictures import PICTURES, plain, read_list
    from sat.apps.evaluate.report import compute_scores, open_folders
    from sat.cli.commands import sample as drawing
    from sat.parallel.launch import pick_device
    from sat.sampling.prompts import NO_ROW, check_text, read_prompt_rows

    is_main = os.environ.get("RANK", "0") == "0"
    logs.setup(0 if is_main else 1, debug=args.debug, verbosity=args.verbosity)
    for path in (args.images, args.real, *args.compare):
        if path is not None and not path.is_dir():
            raise UsageError(f"{path}: no such folder of images")
    if (args.prompts is None) == (args.prompt is None):
        raise UsageError("give the prompts: --prompts FILE, or --prompt TEXT once or several times")
    for index, text in enumerate(args.prompt or []):
        check_text(text, f"prompt {index}")
    prompts = read_list(args.prompts) if args.prompt is None else plain(args.prompt)
    if bool(args.base) == (args.images is not None):
        raise UsageError("give --base to draw pictures, or --images for a folder of them that is there")
    if args.images is not None and args.overrides:
        raise UsageError(f"{args.overrides[0]}: nothing is drawn with --images, so no config key can be set")
    for name, value in (("--at-once", args.at_once), ("--report-prompts", args.report_prompts)):
        if value < 1:
            raise UsageError(f"{name} {value}: expected at least 1")
    device = pick_device(checked_device(args.device))
    config = MetricConfig(device, args.metric_weights, args.classifier, args.real, args.at_once)
    metrics, lacking = _metrics(args.scores, config, prompts)
    if lacking and not args.check:
        raise UsageError("\n".join(lacking))
    existing = [path for path in (args.images, *args.compare) if path is not None]
    open_folders(existing, prompts)  # pictures that are missing there are reported before anything is drawn
    if not (args.base or args.check):  # drawing checks its own
        output_folder(args.out, "--out")
    if args.base:
        words = ["--base", *args.base, *args.overrides, "--resume", "--output-dir", args.out / PICTURES]
        words += ["--check"] * args.check + ["--debug"] * args.debug
        words += {-1: ["--quiet"], 1: ["--verbose"]}.get(args.verbosity, [])
        for option, value in (("--batch-size", args.batch_size), ("--seed", args.seed)):
            words += [] if value is None else [option, value]
        options = sample.arguments([str(word) for word in words])
        texts = [prompt.text for prompt in prompts.prompts]
        keys = [Setting("sampling.prompt", texts), Setting("sampling.prompt_file", None)]
        own = args.prompts is not None and args.prompts.suffix.lower() == ".jsonl"
        if own and any(prompt.row != NO_ROW for prompt in read_prompt_rows(args.prompts)[0]):
            keys = [Setting("sampling.prompt", None), Setting("sampling.prompt_file", str(args.prompts))]
        if code := drawing.work(options, [*sample.given(options), *keys]):
            return code
    if args.check:
        for line in lacking:
            print(f"note: {line}")
        print(f"scores: {', '.join(metrics)}")
        return 0
    if not is_main:
        return 0
    folders = open_folders([*([args.out] if args.base else []), *existing], prompts)
    results = compute_scores(folders, prompts, metrics, config, lambda line: log.info("%s", line))
    return _write(results, args)


def _metrics(requested: str | None, config: MetricConfig, prompts: PromptList) -> tuple[list[str], list[str]]:
    """The scores to take, and a line for each thing that is missing for them."""
    from sat.apps.evaluate.metrics import METRICS, missing

    captions = [prompt.text for prompt in prompts.prompts]
    if requested is not None:
        names = list(dict.fromkeys(name.strip() for name in requested.split(",") if name.strip()))
        if not names or not set(names) <= set(METRICS):
            raise UsageError(f"--scores {requested}: expected some of {', '.join(METRICS)}")
        return names, missing(names, config, captions)
    able = []
    for name in SHIPPED:
        if lines := missing([name], config, captions):
            log.info("not scored: %s", lines[0])
        else:
            able.append(name)
    if not able:
        raise UsageError("none of the scores that ship can be taken; --scores names others")
    return able, []


def _write(results: Results, args: argparse.Namespace) -> int:
    """Write the files, print the table; the exit code is that of failure when a metric failed."""
    from sat.apps.evaluate.report import as_dict, html, table

    args.out.mkdir(parents=True, exist_ok=True)
    scores, report = args.out / SCORES, args.out / REPORT
    write_text(scores, json.dumps(as_dict(results), indent=1, ensure_ascii=False) + "\n")
    title = " and ".join(folder.name for folder in results.folders)
    pieces = html(results, f"Evaluation of {title}", args.report_prompts)
    write_atomic(report, lambda file: file.writelines(piece.encode() for piece in pieces))
    print("\n".join(table(results)))
    print(f"{scores}\n{report}")
    for line in results.failed:
        log.error("not taken: %s", line)
    return FAILED if results.failed else 0


# -- human preference


def preference(args: argparse.Namespace) -> int:  # noqa: C901 - what can be wrong, in order
    """Pair the pictures, serve the page until Ctrl-C or SIGTERM, print the summary; the exit code."""
    from sat.apps.evaluate.pictures import read_list
    from sat.apps.preference.server import Server
    from sat.apps.preference.study import QUESTIONS, Study, fingerprint, pairs_of, preferred, write_pairs
    from sat.apps.preference.votes import VoteFile, read, summary

    questions = list(dict.fromkeys(name.strip() for name in args.questions.split(",") if name.strip()))
    if not questions or not set(questions) <= set(QUESTIONS):
        raise UsageError(f"--questions {args.questions}: expected some of {', '.join(QUESTIONS)}")
    if not 0 <= args.held_out < 1:
        raise UsageError(f"--held-out {args.held_out}: expected a share of 0 to below 1")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: expected 0 to 65535")
    if args.a.resolve() == args.b.resolve():
        raise UsageError(f"{args.a} is compared with itself: name two folders")
    pairs, notes = pairs_of(args.a, args.b, None if args.prompts is None else read_list(args.prompts))
    for note in notes:
        log.warning("%s", note)
    a, b = (path.resolve().name for path in (args.a, args.b))
    a, b = (a, b) if a != b else (str(args.a), str(args.b))
    about = {"a": a, "b": b, "pairs": fingerprint(pairs), "questions": questions, "seed": args.seed}
    if args.pairs is not None and not args.votes.is_file():
        raise UsageError(f"--votes {args.votes}: no such file of votes")
    if args.pairs is not None:
        print("\n".join(write_pairs(args.pairs, preferred(pairs, read(args.votes, about)), args.held_out)))
        return 0
    if args.summary:
        print("\n".join(summary(read(args.votes, about), a, b)))
        return 0
    with VoteFile(args.votes, about) as votes:
        try:
            server = Server(Study(pairs, questions, args.seed, votes), args.port)
        except OSError as error:
            raise UsageError(
                f"--port {args.port}: {error.strerror}; it may be in use, 0 picks a free one"
            ) from error
        with server:
            count = len(pairs) * len(questions)
            print(f"{server.address} asks {count} questions of each rater; Ctrl-C ends", flush=True)
            print(f"votes go to {votes.path}", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
        print("\n".join(summary(list(votes.votes.values()), a, b)))
    return 0


# -- the small classifier


def train_classifier(args: argparse.Namespace) -> int:
    """Train it; the exit code is 1 where it is too weak."""
    import torch

    from sat.apps.emoji.concepts import chosen_labels
    from sat.apps.evaluate.training import BELIEVED, STRENGTHS, Recipe, train
    from sat.parallel.launch import keep_freed_memory, pick_device

    for name in ("steps", "batch_size", "width"):
        if (value := getattr(args, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= args.average < 1:
        raise UsageError(f"--average {args.average:g}: expected a decay of at least 0 and below 1")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise UsageError(f"--lr {args.lr:g}: expected a number above 0")
    output_folder(args.out, "--out")
    if args.threads:
        torch.set_num_threads(max(1, args.threads))
    keep_freed_memory()
    recipe = Recipe(
        args.steps,
        args.batch_size,
        args.lr,
        width=args.width,
        seed=args.seed,
        strength=STRENGTHS[args.augment],
        stages=tuple(args.stages or ()),
        judged=tuple(chosen_labels(args.concepts)),
        often=args.often,
        average=args.average,
        bf16=args.bf16,
        eight_bits=args.int8,
        start=args.start,
    )

    def report(step: int, values: Mapping[str, float]) -> None:
        means = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {step}: {means}", flush=True)

    card = train(args.data, args.out, recipe, pick_device(checked_device(args.device)), report)
    seconds = card.training["seconds"]
    print(f"{args.out}: {len(card.concepts)} concepts, {len(card.styles)} styles, {seconds} s")
    for name, value in card.scores.items():
        print(f"  {name.replace('_', ' ')}: {value:.1%}")
    if card.scores["augmented_top1"] < BELIEVED:
        print(f"too weak to judge: top-1 under {BELIEVED:.0%} on other augmentations of real pictures")
        return FAILED
    return 0


def retrieval(args: argparse.Namespace) -> int:
    """Print the retrieval score of a folder."""
    from sat.apps.evaluate.classifier import Classifier, score_folder
    from sat.apps.evaluate.training import BELIEVED

    if args.json is not None:
        output_file(args.json, "--json")
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
        print(f"Frechet distance of features: {scores.distance:.3f}{_too_few(scores.images)}")
    if scores.unknown:
        print(f"not judged, no known concept in: {', '.join(map(repr, scores.unknown[:5]))}")
    own = classifier.card.scores.get("augmented_top1", 0.0)
    if own < BELIEVED:
        print(f"note: the classifier itself is right on only {own:.1%} of real pictures: do not believe it")
    if args.json is not None:
        args.json.write_text(json.dumps(scores.as_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def detail(args: argparse.Namespace) -> int:
    """Print the fine detail of a folder against that of real pictures."""
    from sat.apps.evaluate.classifier import Classifier
    from sat.apps.evaluate.classifier import detail as measure
    from sat.apps.evaluate.pictures import Opened, collect

    classifier = Classifier.load(args.classifier)
    made = collect(args.images)
    opened, captions = Opened([path for path, _ in made]), [text for _, text in made]
    found = measure(opened, captions, args.real, classifier)
    name = "Frechet distance of the features of full-resolution crops"
    print(f"{name}, {found.images} images: {found.distance:.3f}{_too_few(found.images)}")
    if found.limit is not None:
        print(f"the same, extrapolated to many pictures: {found.limit:.3f}")
    print(f"kernel distance of the same, which does not depend on the number: {found.kernel:.3f}")
    print(f"fine detail: {found.energy:.2f} of the real pictures' energy above a quarter cycle a pixel")
    return 0


def _too_few(images: int) -> str:
    from sat.apps.evaluate.classifier import ENOUGH

    return "" if images >= ENOUGH else f" (fewer than {ENOUGH} images: too few to compare)"


def sheet(args: argparse.Namespace) -> int:
    """Write all pictures of a folder on one."""
    from PIL.Image import Resampling

    from sat.apps.evaluate.pictures import Opened, collect
    from sat.sampling.output import grid, write_png

    output_file(args.out, "--out", (".png",))
    for name, most in (("columns", 1000), ("scale", 64)):
        if not 1 <= (value := getattr(args, name)) <= most:
            raise UsageError(f"--{name} {value}: expected 1 to {most}")
    pictures = list(Opened([path for path, _ in collect(args.images, args.captions)]))
    made = grid(pictures, columns=args.columns)
    size = (made.width * args.scale, made.height * args.scale)
    write_png(args.out, made.resize(size, resample=Resampling.LANCZOS))
    print(f"{args.out}: {len(pictures)} pictures")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write pictures as a benchmark's own program reads them."""
    from sat.apps.evaluate.benchmarks import LAYOUTS, write_layout

    if args.layout not in LAYOUTS:
        raise UsageError(f"--layout {args.layout}: expected one of {', '.join(LAYOUTS)}")
    print(f"{args.out}: {write_layout(args.layout, args.images, args.prompts, args.out)} pictures")
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "preference": preference,
    "train-classifier": train_classifier,
    "retrieval": retrieval,
    "detail": detail,
    "sheet": sheet,
    "export": export,
}
