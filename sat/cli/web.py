"""``python -m sat.cli.web``: a web page and an HTTP API that draw with one loaded model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sat.cli.arguments import parse, reader
from sat.cli.main_guard import UsageError, guard
from sat.util import log as logs
from sat.util.host import install, prepare_threads

PASSWORD, TOKEN = "COGVIEW3_WEB_PASSWORD", "COGVIEW3_API_TOKEN"
INSTALL = f"the web page needs Gradio: {install('web')}"
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
    add("--control", action="append", type=Path, metavar="PATH", help="offer a trained control; repeat")
    add(
        "--grace", type=float, default=60.0, metavar="S", help="seconds that jobs of a closed page go on (60)"
    )
    add("--keep-loaded", action="store_true", help="keep all stages of a cascade in memory, not one")
    add("--optimizer-url", metavar="URL", help="server that enhances prompts (its key: OPENAI_API_KEY)")
    add("--optimizer-model", metavar="NAME", help="its language model")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, serve; the exit code."""
    args = parse(parser(), argv, "configs/tiny.yaml", small="configs/tiny_cascade.yaml")

    def work() -> int:
        logs.setup(debug=args.debug, verbosity=args.verbosity)
        from sat.cli.commands import web

        access = web.access(args)
        if find_spec("gradio") is None:
            raise UsageError(INSTALL)
        prepare_threads()
        return web.work(args, access)

    return guard(work, debug=args.debug)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch and Gradio apart would cost seconds, and everything is on disk
