"""The work of ``prepare``: emoji pictures, and the caches that a training config asks for."""

from __future__ import annotations

import argparse
import logging
import sys

from sat.cli.main_guard import UsageError

log = logging.getLogger(__name__)


def emoji(args: argparse.Namespace) -> int:
    """Draw emoji sets as image-caption pairs; the exit code."""
    from sat.apps.emoji.build import build, check_styles

    styles = [style.strip() for style in args.styles.split(",") if style.strip()]
    try:
        check_styles(styles)
    except ValueError as error:
        raise UsageError(str(error)) from error
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


def cache(args: argparse.Namespace) -> int:
    """Make, count (``--check``) or clear (``--prune``) the caches; the exit code."""
    from sat.config.load import load_full
    from sat.config.yaml_source import ConfigError
    from sat.parallel.launch import launch
    from sat.train.caches import Caches
    from sat.train.data import open_data
    from sat.util import log as logs

    logs.setup(debug=args.debug)
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
    logs.setup(runtime.rank, debug=args.debug)
    sets = open_data(data, runtime, held_out=bool(data.validation))
    caches = Caches(data.cache, experiment, train, train.init_from or experiment.checkpoint, runtime)
    views = [max(1, data.cache_views), 1]
    cached = [caches.over(dataset, count) for dataset, count in zip(sets.both(), views, strict=False)]
    count = caches.count(cached) if args.check else caches.fill(cached, args.batch_size or train.batch_size)
    if args.prune and not args.check:
        log.info("%d files deleted that this config does not use", caches.prune(cached))
    if runtime.is_main:
        print(f"{data.cache}: {count}" + ("" if args.check else "; all are there now"))
        print(f"training will not load: {', '.join(sorted(caches.spare)) or 'nothing left out'}")
    runtime.close()
    return 1 if args.check and (count.latents_missing or count.text_missing) else 0
