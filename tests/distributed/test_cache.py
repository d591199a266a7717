"""``prepare cache`` on two ranks: the same files as on one, shared out, and whole after a kill."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat.data.cache import Store
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT
from tests.smoke.cache_runs import CONFIG, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and the config of a training on them."""
    root = tmp_path_factory.mktemp("cache")
    pictures(root / "data")
    spiece = tokenizer(root / "spiece.model")
    (root / "train.yaml").write_text(CONFIG.format(folder=root, spiece=spiece))
    return root


def start(
    folder: Path, cache: str, code: str = "", rank: int = 0, world: int = 1, port: int = 0
) -> subprocess.Popen:
    """A rank of ``prepare cache``, after running ``code`` in it."""
    words = ["cache", "--base", str(DEBUG), str(folder / "train.yaml"), "--cache", str(folder / cache)]
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
    program = f"import sys\n{code}\nfrom sat.cli.prepare import main\nsys.exit(main({words!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ
        | place
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def two(folder: Path, cache: str, code: str = "") -> list[str]:
    """What two ranks say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [end(p) for p in [start(folder, cache, code, rank, 2, port) for rank in range(2)]]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


COUNTING = """
from sat.data.cache import Store
real, Store.made = Store.write, 0
def write(self, key, tensors):
    Store.made += 1
    real(self, key, tensors)
Store.write = write
import atexit
atexit.register(lambda: print("wrote", Store.made))
"""


@pytest.fixture(scope="module")
def by_two(folder: Path) -> list[str]:
    return two(folder, "two", COUNTING)


def test_two_ranks_make_the_files_that_one_makes(folder, by_two) -> None:
    said = end(start(folder, "one"))
    assert "15 latents, 15 of them to make; 15 text embeddings, 15 of them to make" in said
    one, both = files(folder / "one"), files(folder / "two")
    assert one.keys() == both.keys()
    assert len([name for name in one if name.endswith(".safetensors")]) == 30
    for name, data in one.items():
        assert len(data) == len(both[name])  # the values may differ in the last bit: other batches


def test_ranks_share_the_work_and_count_it_together(folder, by_two) -> None:
    assert "15 latents, 15 of them to make; 15 text embeddings, 15 of them to make" in by_two[0]
    assert sorted(line for said in by_two for line in said.splitlines() if line.startswith("wrote")) == [
        "wrote 14", "wrote 16",
    ]  # fmt: skip


SLOW = """
import time
from sat.data.cache import Store
real = Store.write
def write(self, key, tensors):
    real(self, key, tensors)
    time.sleep(0.3)
Store.write = write
"""


def test_after_a_kill_only_what_is_missing_is_made(folder) -> None:
    process = start(folder, "killed", SLOW)
    for _ in range(2000):
        made = list((folder / "killed").glob("*/*/*.safetensors"))
        if len(made) >= 3:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.03)
    process.kill()
    process.communicate()
    made = [path for path in (folder / "killed").glob("*/*/*.safetensors") if not path.name.startswith(".")]
    assert 3 <= len(made) < 30
    for path in made:
        store = Store(folder, "latents", {})
        store.folder = path.parents[1]
        assert store.complete(path.stem)
    said = two(folder, "killed")[0]
    assert f"15 latents, {15 - len(made)} of them to make; 15 text embeddings, 15 of them to make" in said
    assert "15 latents, 0 of them to make; 15 text embeddings, 0 of them" in end(start(folder, "killed"))
    assert files(folder / "killed").keys() == files(folder / "one").keys()


def test_two_ranks_train_from_one_cache(folder, by_two) -> None:
    words = [
        "train.py", "--base", str(DEBUG), str(folder / "train.yaml"), "--output-dir", str(folder / "run"),
        f"data.cache={folder}/two", "--steps", "2", "train.validate_every=null",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "15 latents, 0 of them to make; 15 text embeddings, 0 of them to make" in done.stderr + done.stdout
