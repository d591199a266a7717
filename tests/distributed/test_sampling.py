"""sample.py on two ranks: the same files as on one, and an end with a reason when a rank is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from sat.sampling.output import read_png_text
from tests.checkpoints import tokenizer
from tests.sampling import DEBUG, ROOT, files
from tests.unit.test_control_files import written


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "prompts.txt").write_text("a red apple\na blue car\nthe sun\n")
    return [
        "sample.py", "--base", str(DEBUG), f"conditioning.tokenizer={tokenizer(folder / 'spiece.model')}",
        "parallel.device=cpu", "--prompt-file", str(folder / "prompts.txt"), "--batch-size", "2",
    ]  # fmt: skip


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _start(words: list[str], code: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A process of sample.py, after running ``code`` in it."""
    program = (
        f"import runpy, sys\n{code}\nsys.argv = {words!r}\nrunpy.run_path('sample.py', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ranks(words: list[str], codes: tuple[str, ...], world: int = 2) -> list[tuple[int, str]]:
    """Exit code and standard error of each rank, started without torchrun: nobody cleans up after them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(), "WORLD_SIZE": str(world)}
    processes = [
        _start(words, code, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, code in enumerate(codes)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, end[1]) for process, end in zip(processes, ends, strict=True)]


_AT_SECOND_WRITE = """
from sat.sampling.output import OutputFolder
write, count = OutputFolder.write_image, []
def act(self, *given):
    count.append(1)
    if len(count) == 2:
        {act}
    return write(self, *given)
OutputFolder.write_image = act
"""


def _same_on_two_ranks(words: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What torchrun said on two ranks; their nine files are those of one process."""
    single = _start([*words, "--output-dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    both = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    _, err = single.communicate(timeout=180)
    assert single.returncode == 0, err
    assert both.returncode == 0, both.stderr
    assert len(files(tmp_path / "one")) == 9  # two pictures and a grid for each of three prompts
    assert files(tmp_path / "two") == files(tmp_path / "one")
    return both


def test_two_ranks_under_torchrun_write_the_files_of_one_process(words, tmp_path) -> None:
    """Of a list whose rows have controls of their own; the ranks share it out."""
    control = written(tmp_path)
    Image.linear_gradient("L").save(tmp_path / "a.png")
    own = {"path": control.name, "image": "a.png"}
    rows = [{"prompt": "a red apple"}, {"prompt": "a blue car", "controls": [own]},
            {"prompt": "the sun", "controls": [{**own, "scale": 0.5, "end": 0.5}]}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = _same_on_two_ranks([*words, "--prompt-file", str(tmp_path / "rows.jsonl")], tmp_path)
    told = [read_png_text(path) or {} for path in sorted((tmp_path / "two").rglob("000000000.png"))]
    assert ["controls" in one for one in told] == [False, True, True]
    assert both.stdout.strip() == str(tmp_path / "two")  # rank 0 speaks alone
    assert both.stderr.count("loaded in") == 1


def test_a_killed_rank_ends_the_other_with_a_message(words, tmp_path) -> None:
    out = ["--output-dir", str(tmp_path), "parallel.timeout=3"]
    killed = _AT_SECOND_WRITE.format(act="import os; os.kill(os.getpid(), 9)")
    start = time.monotonic()
    (code, err), (dead, _) = _ranks([*words, *out], ("", killed))
    assert dead == -9
    assert code == 1
    assert "error: rank 1 of 2 has ended (last: " in err
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert (ended["code"], "rank 1 of 2 has ended" in ended["reason"]) == (1, True)
    assert time.monotonic() - start < 90
    assert not list(tmp_path.rglob("*.partial")) or all(
        p.name.startswith(".") for p in tmp_path.rglob("*.partial")
    )


def test_a_failing_rank_ends_all_and_both_say_why(words, tmp_path) -> None:
    failing = _AT_SECOND_WRITE.format(act="raise OSError(28, 'No space left on device', 'disk')")
    out = ["--output-dir", str(tmp_path), "parallel.timeout=60"]
    start = time.monotonic()
    (first, err), (second, why) = _ranks([*words, *out], ("", failing))
    assert (first, second) == (1, 1)
    assert "error: rank 1 failed: disk: No space left on device; this rank stops too" in err
    assert "[rank 1] error: disk: No space left on device" in why
    assert time.monotonic() - start < 50


_AT_SECOND_PICTURE = """
import time
from sat.sampling.generator import Generator
latents, count = Generator.latents, []
def act(self, *given):
    count.append(1)
    if len(count) == 2:
        {act}
    return latents(self, *given)
Generator.latents = act
"""


@pytest.mark.parametrize(("act", "says"), [
    ("import os; os.kill(os.getpid(), 9)", "error: rank 1 of 2 has ended (last: "),
    ("raise OSError(28, 'No space left on device', 'disk')",
     "error: rank 1 failed: disk: No space left on device; this rank stops too"),
])  # fmt: skip
def test_a_rank_that_is_lost_in_the_middle_of_a_picture_ends_its_team(words, tmp_path, act, says) -> None:
    out = ["--output-dir", str(tmp_path), "parallel.timeout=600", "parallel.sequence=2"]
    (code, err), (dead, _) = _ranks([*words, *out], ("", _AT_SECOND_PICTURE.format(act=act)))
    assert (code, dead) == (1, -9 if "kill" in act else 1)
    assert says in err
    assert err.count("error:") == 1
    assert len(list(tmp_path.rglob("*.png"))) == 1  # the first rank's; none is left half


def test_a_rank_that_hangs_is_given_up_and_torchrun_leaves_nobody_behind(words, tmp_path) -> None:
    words = [*words, "--output-dir", str(tmp_path / "out"), "parallel.stall=4", "parallel.guidance=2"]
    hang = "os.environ['RANK'] == '0' or time.sleep(1000)"
    script = tmp_path / "hanging.py"
    script.write_text(
        f"import os, runpy, sys\n{_AT_SECOND_PICTURE.format(act=hang)}\nsys.argv = {words!r}\n"
        "runpy.run_path('sample.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert (
        " of 2 made no progress for 4 s (parallel.stall; last: picture 0 of prompt 0 is done)" in done.stderr
    )
    assert time.monotonic() - start < 90
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(script) in _read(p)]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def test_a_missing_rank_ends_the_run_with_a_message(words, tmp_path) -> None:
    out = ["--output-dir", str(tmp_path), "parallel.timeout=3"]
    ((code, err),) = _ranks([*words, *out], ("",))
    assert code == 1
    assert "error: rank 0 of 2 could not join the process group within 3 s (parallel.timeout)" in err


def test_a_cascade_on_two_ranks_writes_the_files_of_one_process(words, tmp_path) -> None:
    """Each rank enlarges the pictures it drew; what lies between the stages is gone afterwards."""
    cascade = str(ROOT / "tests" / "assets" / "toy" / "cascade.yaml")
    _same_on_two_ranks([cascade if word == str(DEBUG) else word for word in words], tmp_path)


def test_an_evaluation_is_drawn_by_two_ranks_and_told_by_the_first(words, tmp_path) -> None:
    place = words.index("--prompt-file")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        "-m",
        "sat.cli.evaluate",
        *words[1:place],
        "--prompts",
        words[place + 1],
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--batch-size", "2", "sampling.steps=2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert len(files(tmp_path / "pictures")) == 9
    assert done.stdout.count("retrieval top-1 (higher is better)") == 1  # one rank speaks
    told = json.loads((tmp_path / "scores.json").read_text())["folders"][tmp_path.name]
    assert len(told["pictures"]) == 6
