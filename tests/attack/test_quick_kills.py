"""Five of the kills of :mod:`tests.attack.kills`, in a process of their own that forks."""

import subprocess
import sys

from tests.configs import ROOT


def test_what_is_killed_and_started_again_ends_with_the_same_bits():
    words = [sys.executable, "-m", "tests.attack.kills", "--count", "5", "--seed", "2"]
    words += ["--kinds", "train", "sample"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("5 kills in ") and done.stdout.strip().endswith("; 0 failed")
