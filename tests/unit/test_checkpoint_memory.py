"""Peak host memory: loading takes the model and a margin, writing a few of the largest tensors.

Resident memory counts mapped file pages too, so a reader that maps a whole file and never lets go would fail.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sat.checkpoint.format import TensorInfo, write_safetensors
from sat.checkpoint.torch_file import write_torch

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH = 50, 1024  # 50 tensors of 4 MB in float32: 200 MB
FILES = ["a.safetensors", "a.pt"]

# One process for all cases (starting one takes seconds); the kernel's peak is reset before each.
CODE = """
import gc, json, sys, torch
from pathlib import Path
from torch import nn
from sat.checkpoint import load, open_part, Options
from sat.checkpoint.save import write_shards, write_torch_file
from sat.kernels.quantize import Quantizer, Scheme
from sat.parallel.tensor import apply_sharding
from sat.parallel.launch import Axis
from sat.sharding import Column, Row

folder = Path(sys.argv[1])

def status(field):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024  # kB -> MB

def growth(work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

def read(file, dtype):
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(50)))
    load(module, folder / file, "model", dtype=getattr(torch, dtype))
    assert [float(module[i].weight[0, 0]) for i in range(50)] == list(range(50))

def read_quantised(file):
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(50)))
    load(module, folder / file, "model", replacing=Quantizer("model", Scheme("int8"), ["*"]))
    assert all(module[i].codes.dtype == torch.int8 for i in range(50))

def read_share(file, rank):
    # this rank's half: rows of every other layer, columns of the others
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(50)))
    apply_sharding(module, {"*[02468]": Column(), "*[13579]": Row()}, Axis(2, rank))
    load(module, folder / file, "model")
    assert [float(module[i].weight[0, 0]) for i in range(50)] == list(range(50))
    assert sum(p.numel() for p in module.parameters()) == 25 << 20

def write(file, to):
    options = Options(dtype=torch.bfloat16)
    with open_part(folder / file, "model") as tensors:
        if to == "pt":
            write_torch_file(folder / "out.pt", tensors, "module", "", options)
        else:
            write_shards(folder, "out", tensors, options, index=False)

# costs of the first use
load(nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2)}, "model", dtype=torch.bfloat16)
found = {}
for file in sys.argv[2:]:
    for dtype in ("float32", "bfloat16"):
        found[f"read {file} {dtype}"] = growth(lambda: read(file, dtype))
    found[f"int8 {file}"] = growth(lambda: read_quantised(file))
    found[f"share {file}"] = growth(lambda: read_share(file, 1))
    for to in ("safetensors", "pt"):
        found[f"write {file} {to}"] = growth(lambda: write(file, to))
print(json.dumps(found))
"""

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks can be measured on Linux only"
)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """By how many MB resident memory grew in each case; files of 200 MB, made without holding them."""
    folder = tmp_path_factory.mktemp("large")
    infos = {f"{i}.weight": TensorInfo((WIDTH, WIDTH), torch.float32) for i in range(LAYERS)}

    def read(name):
        return torch.full((WIDTH, WIDTH), float(name.partition(".")[0]))

    write_safetensors(folder / FILES[0], infos, read)
    write_torch(folder / FILES[1], infos, read, "module")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # large blocks go back when freed
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), *FILES],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for file in folder.iterdir():
        file.unlink()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("dtype", "model"), [("float32", 200), ("bfloat16", 100)])
def test_loading_takes_the_model_and_little_more(peaks, file, dtype, model):
    assert model - 10 < peaks[f"read {file} {dtype}"] < model + 40


@pytest.mark.parametrize("file", FILES)
def test_a_quantised_model_is_never_there_in_full(peaks, file):
    assert 40 < peaks[f"int8 {file}"] < 50 + 40


@pytest.mark.parametrize("file", FILES)
def test_a_tensor_rank_of_two_never_holds_more_than_its_half_and_a_tensor(peaks, file):
    assert 90 < peaks[f"share {file}"] < 0.55 * 200


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("to", ["safetensors", "pt"])
def test_writing_takes_a_few_tensors_whatever_the_model(peaks, file, to):
    assert peaks[f"write {file} {to}"] < 40
