"""The work of ``python -m sat.cli.web``: who may come in, the model, the server."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sat.cli.arguments import lora
from sat.cli.main_guard import UsageError
from sat.cli.web import PASSWORD, TOKEN

if TYPE_CHECKING:
    from sat.apps.web import Access


def access(args: argparse.Namespace) -> Access:
    """The rights that the arguments give; refused where others could come in without a password."""
    from sat.apps.web import Access

    if args.queue < 1 or args.max_images < 1:
        raise UsageError("--queue and --max-images: expected at least 1")
    if not 0 <= args.grace <= 86400:
        raise UsageError(f"--grace {args.grace:g}: expected 0 to 86400 seconds")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: expected 0 to 65535")
    password, token = _secret(args.password_file, PASSWORD), _secret(args.token_file, TOKEN)
    access = Access(args.host, args.share, password, token, args.user)
    if not access.is_local and not access.password:
        how = "--share" if args.share else f"--host {args.host}"
        raise UsageError(f"{how} lets others in: set a password in {PASSWORD} or --password-file")
    if not access.is_local and args.api and not access.token:
        raise UsageError(f"--api is open to others here: set a token in {TOKEN} or --token-file")
    return access


def _secret(file: Path | None, name: str) -> str | None:
    """The text of ``file``, or of the environment variable ``name``; None without both."""
    if file is None:
        return os.environ.get(name) or None
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if not text:
        raise UsageError(f"{file} is empty: expected a password or token")
    return text


def work(args: argparse.Namespace, access: Access) -> int:
    """Check the config, load the model, serve until a signal; the exit code."""
    from sat.apps.prompts.optimizer import Cache, Endpoint, PromptOptimizer
    from sat.apps.web.job_queue import JobQueue
    from sat.apps.web.request import Limits
    from sat.apps.web.serve import application, bind, server, share
    from sat.apps.web.service import GenerationService
    from sat.config.build import find_tokenizer
    from sat.config.cascade import load_cascade
    from sat.config.load import dump
    from sat.config.yaml_source import ConfigError
    from sat.sampling.output import prove_writable

    adapters = [{"path": str(one.path), "strength": one.strength} for one in map(lora, args.lora or [])]
    settings = [("adapters.load", adapters)] if adapters else []
    cascade = load_cascade(args.base, [*args.overrides, *settings])
    if args.print_config:
        for stage in cascade.stages:
            print(dump(stage.experiment), end="")
        return 0
    missing = [problem for stage in cascade.stages for problem in stage.missing]
    if missing and not args.check:
        raise ConfigError(missing)
    if args.check:
        print("config ok")
        return 0
    listening = bind(access.host, args.port)  # before the model is loaded
    name = "+".join(Path(base).stem for base in args.base)
    limits = Limits(count=args.max_images)
    service = GenerationService(
        cascade, args.output_dir, name, adapters=args.lora_dir, controls=args.control or (), limits=limits,
        keep=args.keep_loaded,
    )  # fmt: skip
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
    app = application(service, queue, access, api=args.api, optimizer=optimizer, grace=args.grace)
    shared = share(host, port) if access.share else None

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/" + (f"  {shared}" if shared else ""), flush=True)

    try:
        server(app, ready, lambda: queue.close(0)).run(sockets=[listening])
    finally:
        queue.close()
    return 0
