"""The work behind ``python -m sat.cli.web``: check the config, load the model, serve until a signal."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from sat.apps.prompts.optimizer import Cache, Endpoint, PromptOptimizer
from sat.apps.web.job_queue import JobQueue
from sat.apps.web.request import Limits
from sat.apps.web.serve import Access, application, bind, run, share
from sat.apps.web.service import GenerationService
from sat.config.cascade import load_cascade
from sat.config.load import dump
from sat.config.parts import find_tokenizer
from sat.config.yaml_source import ConfigError
from sat.sampling.output import prove_writable

log = logging.getLogger(__name__)


def work(args: argparse.Namespace, settings: Sequence[tuple[str, object]], access: Access) -> int:
    """What the command does with parsed arguments; the exit code."""
    cascade = load_cascade(args.base, [*args.overrides, *settings])
    if args.print_config:
        for stage in cascade.stages:
            print(dump(stage.experiment), end="")
        return 0
    missing = [problem for stage in cascade.stages for problem in stage.loaded.missing]
    if missing and not args.check:
        raise ConfigError(missing)
    if args.check:
        print("config ok")
        return 0
    listening = bind(access.host, args.port)  # before the model is loaded
    name = "+".join(Path(base).stem for base in args.base)
    limits = Limits(count=args.max_images)
    service = GenerationService(
        cascade, args.output_dir, name, adapters=args.lora_dir, limits=limits, keep=args.keep_loaded
    )
    prove_writable(service.pictures.root)
    first = service.first
    optimizer = PromptOptimizer(
        Endpoint.found(args.optimizer_url, args.optimizer_model),
        find_tokenizer(first.conditioning, first.checkpoint),
        Cache.of_user(),
    )
    queue: JobQueue = JobQueue(service.open, args.queue)
    queue.open()
    host, port = listening.getsockname()[:2]
    app = application(service, queue, access, api=args.api, optimizer=optimizer)
    shared = share(host, port) if access.share else None

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/" + (f"  {shared}" if shared else ""), flush=True)

    try:
        run(app, listening, ready)
    finally:
        queue.close()
    return 0
