"""One variant in a process of its own: makes its work, then takes a sample for every line it is sent.

Started by :mod:`benchmarks.run`; ``python -m benchmarks.worker CASE`` with the case as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Sample

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("diffusers", "cache-dit", "peft", "transformers")
"""How sides that run as their own users run them begin."""

NO_TIME = "no time left"
"""Reason of a worker that was not ready by its deadline."""


class Worker:
    """The parent's end: ``sample`` runs the work once over there."""

    def __init__(self, case: Any, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(case)), str(threads)]
        pipe = subprocess.PIPE
        quiet = subprocess.DEVNULL  # the peers' advice; what fails comes back as an answer
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
        self.peak = 0.0
        self.facts: dict[str, float] = {}
        self.device = ""

    def ready(self, deadline: float | None = None) -> Sample:
        """Wait until the work is made and has been done once, which is when a compiler runs: that sample.

        Raises ``RuntimeError`` with the child's reason, or after the ``deadline``, of ``time.monotonic``.
        """
        with self._until(deadline):
            self.device = self._answer()["device"]
            return self.sample()

    @contextmanager
    def _until(self, deadline: float | None) -> Iterator[None]:
        if deadline is None:
            yield
            return
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), self.process.kill)
        timer.start()
        try:
            yield
        except RuntimeError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(NO_TIME) from error
            raise
        finally:
            timer.cancel()

    def sample(self) -> Sample:
        """One sample of the work."""
        assert self.process.stdin is not None, "made with a pipe"
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak, self.facts = answer["peak_mb"], answer["facts"]
        return Sample(answer["seconds"], answer["cpu"], answer["clean"])

    def close(self) -> None:
        """End the child."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "made with a pipe"
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError(f"the benchmark's process ended with code {self.process.wait()}")


def main() -> int:
    """Make the work, answer lines until there are none."""
    sys.path.insert(0, str(ROOT))
    from sat.util.host import SPIN, prepare_threads

    asked = json.loads(sys.argv[1])
    if not asked["side"].startswith(PEERS):
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # as on an idle machine, while others are being made
        prepare_threads()  # as our commands do
    import torch

    from benchmarks import measure
    from benchmarks.cases import Case, make

    torch.set_num_threads(int(sys.argv[2]))
    case = Case(**asked)
    on_gpu = case.device != "cpu"
    try:
        work = make(case)
    except Exception as error:  # whatever a peer raises is the answer
        print(json.dumps({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}), flush=True)
        return 1
    print(json.dumps({"device": torch.cuda.get_device_name() if on_gpu else "cpu"}), flush=True)
    calls = 1
    for _ in sys.stdin:
        time.sleep(0.05)  # until threads of the one before sleep: torch's own spin for some milliseconds
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            taken = measure.sample(work, torch.cuda.synchronize if on_gpu else lambda: None, calls)
            calls = measure.calls_for(taken)
        except Exception as error:  # too little memory, a compiler that fails
            print(json.dumps({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}), flush=True)
            return 1
        peak = measure.peak_rss(children=case.kind == "command")
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e6
        facts = getattr(work, "facts", dict)()  # what the work found besides
        print(json.dumps({**taken._asdict(), "peak_mb": peak, "facts": facts}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
