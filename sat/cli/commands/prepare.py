"""The commands of ``prepare``: emoji pictures, a vocabulary, a look at data, and the caches of a training."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Callable, Mapping

from sat.cli.arguments import output_file, output_folder, sort_overrides
from sat.cli.main_guard import UsageError

log = logging.getLogger(__name__)


def emoji(args: argparse.Namespace) -> int:
    """Draw emoji sets as image-caption pairs; the exit code."""
    from sat.apps.emoji.build import build

    styles = [style.strip() for style in args.styles.split(",") if style.strip()]
    output_folder(args.out, "--out")
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


def tokenizer(args: argparse.Namespace) -> int:
    """Train a sentencepiece vocabulary; the exit code."""
    from sat.data.sources import captions_of, train_vocabulary

    output_file(args.out, "--out")
    try:
        pieces = train_vocabulary(captions_of(args.captions), args.out, args.vocab, args.words)
    except RuntimeError as error:
        smaller = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if smaller is None:
            raise
        raise UsageError(f"--vocab {args.vocab}: the captions need at least {smaller[1]}") from error
    print(f"{args.out}: {pieces} pieces")
    return 0


def inspect(args: argparse.Namespace) -> int:  # noqa: C901 - options, then the config where they are silent
    """Count the pictures of data sources, list what is wrong; the exit code is 1 where something is.

    A source without any pair is an error.
    """
    from sat.config.yaml_source import ConfigError
    from sat.data.buckets import BucketRule, Buckets
    from sat.data.records import LISTED, DataError, DataPathError
    from sat.data.sources import Source
    from sat.data.survey import bucket_table, contact_sheet, duplicates, survey

    for name in ("height", "width", "batch", "max_length", "sheet_limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.sheet is not None:
        output_file(args.sheet, "--sheet", (".png", ".jpg", ".jpeg", ".webp"))
    sources = [Source(path, caption=args.caption) for path in args.sources]
    vocabulary, limit, batch = args.tokenizer, args.max_length, args.batch
    height = args.height if args.height is not None else args.width
    width = args.width if args.width is not None else args.height
    try:
        rule = None if args.area is None else BucketRule(tuple(args.area), args.step, args.max_ratio)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.base:
        from sat.config.build import find_vocabulary
        from sat.config.load import load
        from sat.train.data import bucket_rule, source_of

        experiment = load(args.base)
        data, train, conditioning = experiment.data, experiment.train, experiment.conditioning
        if data is None:
            raise UsageError("the config of --base has no `data` section")
        sources = sources or [
            source_of(one)._replace(caption=args.caption or one.caption)
            for one in (*data.sources, *data.validation)
        ]
        height, width, rule = height or data.height, width or data.width, rule or bucket_rule(data)
        batch = batch or (None if train is None else train.batch_size)
        with contextlib.suppress(ConfigError):  # the training's own, unless its weights are not at hand
            vocabulary = vocabulary or find_vocabulary(conditioning, experiment.checkpoint)
        limit = limit or conditioning.max_length
    elif not sources:
        raise UsageError("nothing to look at: name folders, tables or shards, or --base with a config")

    too_long: Callable[[str], bool] | None = None
    if vocabulary is not None:
        import sentencepiece

        if not vocabulary.is_file():
            raise UsageError(f"--tokenizer {vocabulary}: no such file")
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
        except RuntimeError as error:
            raise UsageError(f"{vocabulary}: is no sentencepiece model (spiece.model)") from error
        most = limit or 224

        def too_long(caption: str) -> bool:  # with its end token
            return len(pieces.encode(caption)) + 1 > most

    elif args.base:
        print("captions over the token limit are not counted: no spiece.model is at hand (--tokenizer)")
    surveys = []
    for source in sources:
        surveys.append(survey(source.path, too_long, caption=source.caption, extras=source.extras))
        print("\n".join(surveys[-1].lines(height, width, None if args.all else LISTED)))
    print("\n".join(duplicates(surveys) or ["no duplicates"]))
    if rule is not None:
        sizes = [picture.size for one in surveys for picture in one.pictures]
        found = bucket_table(Buckets.of(sizes, rule), batch or 1, sizes) if sizes else ["no buckets"]
        print("\n".join(found))
    shown = [record for one in surveys for record in one.readable][: args.sheet_limit]
    if args.sheet is not None and shown:
        contact_sheet(shown, min(16, len(shown)), height or 64, width or 64).save(args.sheet)
        print(f"{args.sheet}: {len(shown)} pictures")
    for one in surveys:
        if not one.readable:
            kind = DataError if one.bad else DataPathError
            raise kind(f"{one.source}: no pair of picture and caption that can be used")
    return 1 if any(one.bad for one in surveys) else 0


def cache(args: argparse.Namespace) -> int:
    """Make, count (``--check``) or clear (``--prune``) the caches; the exit code."""
    from sat.config.load import load_full
    from sat.config.yaml_source import ConfigError
    from sat.parallel.launch import launch, ranks_together
    from sat.train.data import Caches, open_data
    from sat.util import log as logs

    sort_overrides(args)
    if not args.base:
        raise UsageError("--base is needed: the config files of the training, such as configs/sft.yaml")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size}: expected at least 1")
    logs.setup(debug=args.debug, verbosity=args.verbosity)
    if args.cache is not None:
        output_folder(args.cache, "--cache")
    settings = [] if args.cache is None else [("data.cache", str(args.cache))]
    loaded = load_full(args.base, [*args.overrides, *settings])
    experiment = loaded.experiment
    train, data = experiment.train, experiment.data
    if train is None or data is None:
        raise UsageError("the config has no `train` and `data` section: lay a training config over it")
    if data.cache is None:
        raise UsageError("no folder for the cache: give --cache DIR or data.cache=DIR")
    if loaded.missing:
        raise ConfigError(loaded.missing)
    runtime = launch(experiment.parallel.device, experiment.parallel.timeout)
    logs.setup(runtime.rank, debug=args.debug, verbosity=args.verbosity)
    with ranks_together(runtime):
        sets = open_data(data, runtime, held_out=bool(data.validation))
        caches = Caches(data.cache, experiment, train, train.init_from or experiment.checkpoint, runtime)
        views = [max(1, data.cache_views), 1]
        cached = [caches.over(dataset, count) for dataset, count in zip(sets.both(), views, strict=False)]
        batch = args.batch_size or train.batch_size
        count = caches.count(cached) if args.check else caches.fill(cached, batch)
        if args.prune and not args.check:
            log.info("%d files deleted that this config does not use", caches.prune(cached))
        if runtime.is_main:
            print(f"{data.cache}: {count}" + ("" if args.check else "; all are there now"))
            print(f"training will not load: {', '.join(sorted(caches.spare)) or 'nothing left out'}")
        runtime.finish()
    return 1 if args.check and (count.latents_missing or count.text_missing) else 0


def prior(args: argparse.Namespace) -> int:
    """Draw the class pictures that are missing in a folder, with the model itself; the exit code."""
    from sat.config.load import load_full
    from sat.config.yaml_source import ConfigError
    from sat.data.records import DataPathError
    from sat.pipeline import Pipeline

    sort_overrides(args)
    if not args.base:
        raise UsageError("--base is needed: the config files of the model, such as configs/plus.yaml")
    if args.count < 1:
        raise UsageError(f"--count {args.count}: expected at least 1")
    if empty := [text for text in args.prompt if not text.strip()]:
        raise UsageError(f"--prompt {empty[0]!r}: is empty; name the class, such as 'a fox'")
    output_folder(args.out, "--out")
    loaded = load_full(args.base, args.overrides)
    if missing := [one for one in loaded.missing if not one.key.startswith("data.")]:
        raise ConfigError(missing)
    experiment, out = loaded.experiment, args.out
    data = experiment.data
    size = (data.height, data.width) if data is not None else (None, None)
    wanted = {out / f"{number:05d}.png": number for number in range(args.count)}
    there = [file for file in wanted if file.is_file() and file.with_suffix(".txt").is_file()]
    others = sorted({*out.glob("*.png")} - {*wanted})
    if others and not there:
        raise DataPathError(f"{out}: holds other pictures ({others[0].name}, …): name a new folder by --out")
    todo = [file for file in wanted if file not in there]
    print(f"{out}: {len(there)} of {args.count} class pictures are there, {len(todo)} to draw")
    pipeline = Pipeline.open(experiment) if todo else None
    out.mkdir(parents=True, exist_ok=True)
    for file in todo:
        prompt = args.prompt[wanted[file] % len(args.prompt)]
        seed = experiment.sampling.seed + wanted[file]
        assert pipeline is not None, "opened if there is anything to draw"
        (image,) = pipeline([prompt], seed=seed, height=size[0], width=size[1]).images
        partial = file.with_suffix(".tmp")
        image.save(partial, "PNG")
        file.with_suffix(".txt").write_text(f"{prompt}\n", encoding="utf-8")
        partial.replace(file)
    print(f"as a source: {{path: {out}, loss_weight: 1.0}}")
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "emoji": emoji,
    "tokenizer": tokenizer,
    "inspect": inspect,
    "cache": cache,
    "prior": prior,
}
