"""Programs of runs that a module's tests read: begun before the tests come, beside those of other modules."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock, Thread

from tests.configs import ROOT

_ENVIRONMENT = dict(os.environ)  # before any test changes it
_Popen = subprocess.Popen


class Runs:
    """``python -m PROGRAM FOLDER [SPIECE]``, once, in a new folder; with a tokenizer if ``spiece``.

    A module of tests that names it ``RUNS`` comes after those without; the processes run meanwhile, one
    after the other, on a second core. Their output goes to files: a test that forks holds pipes open.
    """

    def __init__(
        self, program: str, *, spiece: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        self.program, self.spiece = program, spiece
        self.environment = _ENVIRONMENT | dict(environment or {})
        self.base = Path()
        self.code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended, self._lock = False, Lock()

    def __call__(self) -> Path:
        """The folder, once the program is through; its output if it failed."""
        self.run()
        assert self.code == 0, (self.base / "said.txt").read_text()
        return self.base / "runs"

    @property
    def tokenizer(self) -> Path:
        """The file that SPIECE is, shared by all programs."""
        return self.base.parent / "spiece.model"

    def run(self) -> None:
        """Run the program, or wait for it; nothing after the first time."""
        with self._lock:
            if self.code is not None or self._ended:
                return
            folder = self.base / "runs"
            folder.mkdir()
            words = [sys.executable, "-m", self.program, str(folder)]
            words += [str(self.tokenizer)] if self.spiece else []
            with (self.base / "said.txt").open("wb") as said:
                self._process = _Popen(words, cwd=ROOT, env=self.environment, stdout=said, stderr=said)
                try:
                    self.code = self._process.wait(timeout=1100)
                except subprocess.TimeoutExpired:
                    self.code = -1
                finally:
                    self._process.kill()

    def end(self) -> None:
        """Begin it no more, and kill it if it runs."""
        self._ended = True
        if self._process is not None:
            self._process.kill()


def begin(runs: list[Runs]) -> None:
    """Run them one after the other beside the tests."""
    Thread(target=lambda: [one.run() for one in runs], daemon=True).start()
