"""``python -m sat.cli.web``: a web page and an HTTP API that draw with one loaded model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sat.cli.arguments import Setting, lora, parse, reader
from sat.cli.main_guard import UsageError, guard
from sat.util import log as logs
from sat.util import threads

if TYPE_CHECKING:
    from sat.apps.web.serve import Access

log = logging.getLogger(__name__)

PASSWORD, TOKEN = "COGVIEW3_WEB_PASSWORD", "COGVIEW3_API_TOKEN"
INSTALL = 'the web page needs Gradio: pip install "gradio>=6,<7"'
DESCRIPTION = """\
Draw in a browser, and over HTTP, with the model that --base describes.

  python -m sat.cli.web --base configs/tiny.yaml
  python -m sat.cli.web --base configs/tiny_cascade.yaml --api --port 8000
"""
EPILOG = f"""\
Only this machine can reach it. --host and --share open it to others and need a password, in {PASSWORD} or
--password-file; the API then needs a token too, in {TOKEN} or --token-file. Neither is taken from the command
line, which everyone on the machine can read.
Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = reader("python -m sat.cli.web", DESCRIPTION, EPILOG)
    add = out.add_argument
    add("--output-dir", type=Path, default=Path("outputs/web"), metavar="OUT", help="pictures (outputs/web)")
    add("--host", default="127.0.0.1", help="address to listen on; others need a password")
    add("--port", type=int, default=7860, help="port to listen on (7860); 0 picks a free one")
    add("--share", action="store_true", help="a public address through Gradio's relay; needs a password")
    add("--password-file", type=Path, metavar="FILE", help=f"file with the page's password (or {PASSWORD})")
    add("--user", default="user", metavar="NAME", help="name that goes with the password (user)")
    add("--api", action="store_true", help="also answer /v1/images/generations, as OpenAI does")
    add("--token-file", type=Path, metavar="FILE", help=f"file with the API's bearer token (or {TOKEN})")
    add("--queue", type=int, default=16, metavar="N", help="jobs that may wait (16)")
    add("--max-images", type=int, default=8, metavar="N", help="pictures of one job at most (8)")
    add("--lora", action="append", metavar="PATH[:STRENGTH]", help="offer an adapter; repeat for several")
    add("--lora-dir", type=Path, metavar="FOLDER", help="offer all adapters in a folder")
    add("--keep-loaded", action="store_true", help="keep all stages of a cascade in memory, not one")
    add("--optimizer-url", metavar="URL", help="server that enhances prompts (its key: OPENAI_API_KEY)")
    add("--optimizer-model", metavar="NAME", help="its language model")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, serve; the exit code."""
    args = parse(parser(), argv, "configs/tiny.yaml")

    def work() -> int:
        logs.setup(debug=args.debug)
        access = _access(args)
        if find_spec("gradio") is None:
            raise UsageError(INSTALL)
        threads.prepare()
        from sat.cli.commands import web as web_work  # torch and all: only once the arguments are good

        return web_work.work(args, _settings(args), access)

    return guard(work, debug=args.debug)


def _settings(args: argparse.Namespace) -> list[Setting]:
    """Config keys that the options set."""
    if not args.lora:
        return []
    found = [lora(text) for text in args.lora]
    return [Setting("adapters.load", [{"path": str(one.path), "strength": one.strength} for one in found])]


def _access(args: argparse.Namespace) -> Access:
    """Who may come in; refused where others could without a password."""
    from sat.apps.web.serve import Access

    if args.queue < 1 or args.max_images < 1:
        raise UsageError("--queue and --max-images: expected at least 1")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: expected 0 to 65535")
    access = Access(
        args.host,
        args.share,
        _secret(args.password_file, PASSWORD),
        _secret(args.token_file, TOKEN),
        args.user,
    )
    if not access.is_local and not access.password:
        how = "--share" if args.share else f"--host {args.host}"
        raise UsageError(f"{how} lets others in: set a password in {PASSWORD} or --password-file")
    if not access.is_local and args.api and not access.token:
        raise UsageError(f"--api is open to others here: set a token in {TOKEN} or --token-file")
    return access


def _secret(file: Path | None, name: str) -> str | None:
    """What ``file`` holds, or the environment; None for neither."""
    if file is None:
        return os.environ.get(name) or None
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if not text:
        raise UsageError(f"{file} is empty: expected a password or token")
    return text


if __name__ == "__main__":
    sys.exit(main())
