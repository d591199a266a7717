"""``python -m sat.cli.web`` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sat.util.host import THREAD_SETTINGS
from tests.sampling import ROOT

GRACE = 3.0
"""Seconds in which the page of a test that is loaded anew finds its job again, in place of 15."""
START = f"""
import sys
import sat.apps.web.page
from sat.cli.web import main

sat.apps.web.page.GRACE = {GRACE}
sys.exit(main())
"""
TOKEN = "t0ken-of-the-test"


class Server(NamedTuple):
    """A running server: its address, output folder, log file and process."""

    url: str
    out: Path
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serving(out: Path, *arguments: object, **environment: str) -> Iterator[Server]:
    """The command with ``arguments`` and ``environment``, once its address is printed; ended with SIGTERM.

    Where it listens on all addresses, the one to use is the loopback's.
    """
    out.mkdir(parents=True)
    log = out / "log.txt"
    words = [sys.executable, "-c", START, *map(str, arguments), "--port", "0", "--output-dir", str(out)]
    env = {
        **THREAD_SETTINGS,  # which the command sets itself before it imports what the page needs
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "COGVIEW3_API_TOKEN": TOKEN,
        "OPENAI_API_KEY": "none",
        "XDG_CACHE_HOME": str(out / "cache"),
        **environment,
    }
    with log.open("wb") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode().strip()  # it ends when the process does
        assert re.match(r"http://(127\.0\.0\.1|0\.0\.0\.0):\d+/$", line), log.read_text()
        yield Server(line.rstrip("/").replace("0.0.0.0", "127.0.0.1"), out, log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()
