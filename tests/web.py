"""``python -m sat.cli.web`` as a process of its own, and a browser to look at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.sampling import ROOT

TOKEN = "t0ken-of-the-test"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""A browser of the system; without one the tests of the page are skipped."""


class Server(NamedTuple):
    """A running server: its address, output folder, log file and process."""

    url: str
    out: Path
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serving(out: Path, *arguments: object) -> Iterator[Server]:
    """The command with ``arguments``, until its address is printed; ended with SIGTERM."""
    out.mkdir(parents=True)
    log = out / "log.txt"
    words = [
        sys.executable,
        "-m",
        "sat.cli.web",
        *map(str, arguments),
        "--port",
        "0",
        "--output-dir",
        str(out),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COGVIEW3_API_TOKEN": TOKEN,
        "OPENAI_API_KEY": "none",
        "XDG_CACHE_HOME": str(out / "cache"),
    }
    with log.open("wb") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode().strip()  # it ends when the process does
        assert line.startswith("http://127.0.0.1:"), log.read_text()
        yield Server(line.rstrip("/"), out, log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skipped test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield opened
        finally:
            opened.close()
