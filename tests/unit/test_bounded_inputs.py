"""Files beside and as weights are regular ones of bounded size and depth, and named where they are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sat.adapters.files import NATIVE_FILE, read
from sat.adapters.write import write
from sat.checkpoint import CheckpointError, open_part, save_diffusers, save_native, save_sat
from sat.checkpoint.audit import audit
from sat.checkpoint.files import open_file, open_folder
from sat.checkpoint.formats import detect
from sat.sampling.inputs import read_latents
from sat.tokenizers import T5Tokenizer
from tests.adapters import adapter, noisy, start
from tests.checkpoints import CONFIG, tensors, tokenizer
from tests.small import plus

pytestmark = pytest.mark.timeout(60)  # one that waits for a pipe or reads /dev/zero never ends


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in every format, an adapter in two, a vocabulary and latents."""
    root = tmp_path_factory.mktemp("world")
    vocabulary = tokenizer(root / "spiece.model")
    save_native(root / "native", tensors(), CONFIG, tokenizer=vocabulary)
    save_sat(root / "sat", tensors(), CONFIG)
    save_diffusers(root / "diffusers", tensors(), CONFIG)
    layers = adapter(noisy(start(plus())))
    for layout in ("native", "peft"):
        write(root / f"lora_{layout}", layers, layout, {"model": plus()})
    shards = root / "shards"
    shards.mkdir()
    save_file({"x": torch.ones(2)}, shards / "a.safetensors")
    (shards / "a.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    save_file({"latents": torch.ones(1, 4, 8, 8)}, root / "latents.safetensors")
    return root


def lora(path: Path) -> Any:
    return read(path, {"model": plus()})


def everything(path: Path) -> Any:
    found = detect(path)
    found.config(path)
    return open_part(path, "model")


OPENERS: dict[str, Callable[[Path], Any]] = {
    f"lora_native/{NATIVE_FILE}": lambda root: lora(root / "lora_native"),
    "lora_peft/adapter_model.safetensors": lambda root: lora(root / "lora_peft/adapter_model.safetensors"),
    "lora_peft/adapter_config.json": lambda root: lora(root / "lora_peft"),
    "native/manifest.json": lambda root: everything(root / "native"),
    "native/model.safetensors": lambda root: everything(root / "native"),
    "sat/latest": lambda root: everything(root / "sat"),
    "sat/config_sections.json": lambda root: everything(root / "sat"),
    "sat/1/mp_rank_00_model_states.pt": lambda root: everything(root / "sat"),
    "sat/1/digests.json": lambda root: everything(root / "sat"),
    "diffusers/model_index.json": lambda root: everything(root / "diffusers"),
    "diffusers/transformer/config.json": lambda root: everything(root / "diffusers"),
    "diffusers/scheduler/scheduler_config.json": lambda root: everything(root / "diffusers"),
    "shards/a.safetensors.index.json": lambda root: open_folder(root / "shards"),
    "spiece.model": lambda root: T5Tokenizer(root / "spiece.model", 8),
    "latents.safetensors": lambda root: read_latents(root / "latents.safetensors"),
}


@pytest.mark.parametrize("name", OPENERS)
def test_a_pipe_a_device_and_a_deep_or_endless_file_end_at_once(
    name: str, world: Path, tmp_path: Path
) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    OPENERS[name](root)
    file = root / name

    def sparse() -> None:
        with file.open("wb") as opened:
            opened.truncate(1 << 36)

    changes: list[Callable[[], Any]] = [
        lambda: os.mkfifo(file),
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.write_bytes(b"[" * 100_000),
        sparse,
    ]
    for change in changes:
        file.unlink()
        change()
        if not file.is_file() and name.endswith((".json", "latest")):
            continue  # as if it were not there: what is looked for is a file
        with pytest.raises(Exception) as error:  # noqa: PT011 - of several kinds
            OPENERS[name](root)
        assert file.name in str(error.value) and "\n" not in str(error.value)
        assert not isinstance(error.value, RecursionError | MemoryError)


def test_values_that_are_not_in_a_pytorch_file_are_refused(tmp_path: Path) -> None:
    for value in (
        torch.ones(1).expand(1000, 1000),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
    ):
        torch.save({"x": value}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="'x' is not a plain tensor"):
            open_file(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "entry",
    [{"shape": [2.0]}, {"shape": [True]}, {"shape": [-1]}, {"shape": [1 << 70]}, {"data_offsets": [0.0, 4]},
     {"dtype": []}, {"dtype": "F31"}, {"data_offsets": [0]}, []],
)  # fmt: skip
def test_a_header_of_other_things_is_damaged(entry: Any, tmp_path: Path) -> None:
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header in ({"x": {**good, **entry} if entry else entry}, {"x": good, "__metadata__": {"a": 1}}):
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(CheckpointError, match="header is damaged"):
            open_file(tmp_path / "a.safetensors")


def test_verify_tells_good_and_damaged_adapters(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "lora_peft", tmp_path / "lora")
    (verdict,) = audit(tmp_path / "lora")
    assert verdict.good and verdict.text == "the digests in its header right"
    file = tmp_path / "lora" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    (verdict,) = audit(tmp_path / "lora")
    assert not verdict.good and "is not what was written" in verdict.text
