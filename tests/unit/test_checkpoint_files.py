"""Weight files: equal to what the libraries read and write, and one clear line for everything broken."""

import argparse
import json
import pickle
import random
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from sat.checkpoint.files import open_file, open_folder
from sat.checkpoint.format import CheckpointError, InMemory, SafetensorsFile, write_safetensors
from sat.checkpoint.torch_file import TorchFile, write_torch

TENSORS = {
    "float.weight": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "sixteen": torch.randn(2, 2, 2).half(),
    "scalar": torch.tensor(3.5),
    "index": torch.arange(4),
    "empty": torch.empty(0, 3),
    "mask": torch.tensor([True, False, True]),
    "double": torch.randn(2).double(),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def equal(found, wanted=TENSORS):
    return set(found) == set(wanted) and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t)
        for n, t in wanted.items()
    )


def memory():
    return InMemory(TENSORS)


# -- equal to the libraries


def test_what_we_write_safetensors_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    written = write_safetensors(path, memory().infos(), memory().__getitem__, {"format": "pt"})
    assert equal(safetensors.torch.load_file(path))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert written.nbytes == path.stat().st_size


def test_what_safetensors_writes_we_read(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"by": "library"})
    with SafetensorsFile(path) as file:
        assert equal(file)
        assert file.metadata == {"by": "library"}
        assert all(
            file.info(n).shape == t.shape and file.info(n).dtype == t.dtype for n, t in TENSORS.items()
        )


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, memory().infos(), memory().__getitem__)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        assert (8 + length + entry["data_offsets"][0]) % TENSORS[name].dtype.itemsize == 0


def test_misaligned_tensors_are_read(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b" "
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + np.array([1.5, -2], "<f4").tobytes())
    assert (8 + len(header)) % 4
    assert SafetensorsFile(path)["a"].tolist() == [1.5, -2]


def test_writing_to_a_tensor_that_was_read_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    with SafetensorsFile(path) as file:
        file["float.weight"].zero_()
        assert equal(file)


@pytest.mark.parametrize("how", [{}, {"mmap": True}, {"weights_only": False}])
def test_what_we_write_torch_reads(tmp_path, how):
    write_torch(tmp_path / "a.pt", memory().infos(), memory().__getitem__, "module")
    found = torch.load(tmp_path / "a.pt", **{"weights_only": True, **how})
    assert list(found) == ["module"]
    assert equal(found["module"])


@pytest.mark.parametrize("root", ["", "module", "state_dict", "model"])
def test_what_torch_writes_we_read(tmp_path, root):
    torch.save({root: TENSORS, "iteration": 7} if root else TENSORS, tmp_path / "a.pt")
    with TorchFile(tmp_path / "a.pt") as file:
        assert equal(file)
        for name in file:
            file.release(name)
        assert equal(file), "released pages must come back from the file"


def test_views_and_transposes_in_a_torch_file_are_read(tmp_path):
    base = torch.randn(6, 4)
    views = {"part": base[2:4], "turned": base.t(), "whole": base}
    torch.save(views, tmp_path / "a.pt")
    file = TorchFile(tmp_path / "a.pt")
    file.release("part")
    assert equal(file, views)


def test_torch_files_from_before_the_zip_format_are_read(tmp_path):
    torch.save({"module": TENSORS}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert equal(open_file(tmp_path / "a.pt"))


def test_random_states_beside_the_tensors_need_no_switch(tmp_path):
    """Official training files carry them."""
    states = {
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "iteration": 1,
    }
    torch.save({"module": TENSORS, **states}, tmp_path / "a.pt")
    assert equal(TorchFile(tmp_path / "a.pt"))


def test_the_content_decides_not_the_ending(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "a.pt")
    torch.save(TENSORS, tmp_path / "b.safetensors")
    assert equal(open_file(tmp_path / "a.pt"))
    assert equal(open_file(tmp_path / "b.safetensors"))


# -- one clear line for everything broken


def complaint(path, **options):
    """The message of the error that opening ``path`` and reading it all gives."""
    with pytest.raises(CheckpointError) as caught:
        file = open_file(path, **options)
        for name in file:
            file[name]
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_truncated_safetensors_file_says_so(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(500)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "truncated" in complaint(path)
    assert "copy or download it again" in complaint(path)


def test_a_safetensors_file_with_extra_bytes_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    path.write_bytes(path.read_bytes() + b"more")
    assert "longer than its header says" in complaint(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "X7", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": "2", "data_offsets": None},
        [],
    ],
)
def test_a_damaged_safetensors_header_is_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "header is damaged" in complaint(path)


def test_a_header_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 9) + b"{not json" + bytes(8))
    assert "header is damaged" in complaint(path)


@pytest.mark.parametrize("keep", [1, 10, 300, 0.5, -1, -30])
def test_a_truncated_torch_file_says_so(tmp_path, keep):
    path = tmp_path / "a.pt"
    torch.save({"module": TENSORS}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    text = complaint(path)
    assert "truncated or corrupt" in text
    assert "allow_pickle" not in text


@pytest.mark.parametrize("mark", [b"data.pkl", b"PK\x01\x02"])
def test_a_corrupt_torch_archive_says_so(tmp_path, mark):
    path = tmp_path / "a.pt"
    torch.save({"module": TENSORS}, path)
    raw = bytearray(path.read_bytes())
    at = raw.find(mark)
    raw[at + 60 : at + 90] = bytes(range(100, 130))
    path.write_bytes(raw)
    assert "truncated or corrupt" in complaint(path)


def test_a_truncated_old_torch_file_says_so(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"module": TENSORS}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated or corrupt" in complaint(path)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n<html lang=en>", "HTML"),
        (b"<?xml version='1.0'?><Error/>", "XML page"),
        (b"", "empty"),
        (bytes(1000), "all zeros"),
        (b'{"error": "not found"}', "JSON file"),
        (b"GGUF\3\0\0\0", "GGUF"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_what_is_not_weights_is_named(tmp_path, head, says, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(head)
    assert says in complaint(path)


def test_an_unknown_format_is_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"RIFFxxxxWAVE")
    assert "no known weight format (safetensors or PyTorch)" in complaint(tmp_path / "a.npz")
    (tmp_path / "a.bin").write_bytes(b"RIFFxxxxWAVE")
    assert "does not begin as a PyTorch file" in complaint(tmp_path / "a.bin")


def test_a_missing_file_is_named(tmp_path):
    assert "no such file" in complaint(tmp_path / "a.pt")


class Custom:
    """An object that only the full unpickler can make."""


@pytest.mark.parametrize("extra", [argparse.Namespace(a=1), Custom()])
def test_a_pickle_that_needs_more_names_the_switch(tmp_path, extra):
    path = tmp_path / "a.pt"
    torch.save({"module": TENSORS, "args": extra}, path)
    text = complaint(path)
    assert type(extra).__name__ in text
    assert "checkpoint.allow_pickle=true" in text
    assert equal(open_file(path, allow_pickle=True))


def test_a_malicious_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"module": TENSORS, "x": Evil()}, tmp_path / "a.pt")
    assert "checkpoint.allow_pickle=true" in complaint(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    complaint(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {"a": 1}}, "'a' under 'state_dict' is a int"),
        ({"epoch": 3}, "'epoch' is a int"),
    ],
)
def test_a_torch_file_without_tensors_by_name_is_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pt")
    assert says in complaint(tmp_path / "a.pt")


# -- folders of shards


def shards(folder, ending="safetensors", index=True):
    folder.mkdir(exist_ok=True)
    names = sorted(TENSORS)
    places = {}
    for number, group in enumerate((names[:4], names[4:]), 1):
        file = f"model-{number:05}-of-00002.{ending}"
        part = {n: TENSORS[n] for n in group}
        safetensors.torch.save_file(part, folder / file) if ending == "safetensors" else torch.save(
            part, folder / file
        )
        places.update(dict.fromkeys(group, file))
    if index:
        name = "model.safetensors.index.json" if ending == "safetensors" else "pytorch_model.bin.index.json"
        (folder / name).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_as_one(tmp_path, ending, index):
    assert equal(open_folder(shards(tmp_path, ending, index)))


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path, index):
    shards(tmp_path, index=index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "x").mkdir()
    if not index:  # one numbered shard alone must not pass for the whole
        (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00003.safetensors")
        safetensors.torch.save_file({"z": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 of \d shards missing: 'model-00002-of-0000\d\.safetensors'"
    ):
        open_folder(tmp_path)


def test_a_single_numbered_shard_is_not_the_whole(tmp_path):
    shards(tmp_path, index=False)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards missing"):
        open_folder(tmp_path)


def test_an_index_that_names_absent_tensors_is_refused(tmp_path):
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="names 1 tensors that the shards do not hold: 'ghost'"):
        open_folder(tmp_path)


def test_an_index_may_not_leave_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../a.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="plain file names"):
        open_folder(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for number in (1, 2):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / f"m-{number:05}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in more than one shard"):
        open_folder(tmp_path)


def test_plain_names_win_over_variants(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_folder(tmp_path)["a"].item() == 1


def test_several_weight_files_are_a_question(tmp_path):
    for name in ("a", "b"):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 weight files, name one of 'a.safetensors', 'b.safetensors'"):
        open_folder(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weight files"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_folder(tmp_path / "x")
