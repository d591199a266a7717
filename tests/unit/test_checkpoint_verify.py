"""Damage of files that are read is told: by digests, the zip's CRC-32, values that are not finite."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile

import pytest
import torch

from sat.checkpoint import CheckpointError, digest, load, open_part, save_diffusers, save_native, save_sat
from sat.checkpoint.audit import audit
from sat.checkpoint.convert import Sources, convert
from sat.checkpoint.verify import CHUNK, Digester, Verify, digest_file, record_of, verify_file
from sat.config.check import build as build_component
from tests.checkpoints import CONFIG, build, tensors, tokenizer

WRITERS = {"native": save_native, "diffusers": save_diffusers, "sat": save_sat}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    for name, save in WRITERS.items():
        save(root / name, tensors(), CONFIG, tokenizer=tokenizer(root / "spiece.model"))
    return root


@pytest.fixture
def copy(written, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda name: shutil.copytree(written / name, tmp_path / name)


def flip(path, place=0.7, bit=0x40):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * place)] ^= bit
    path.write_bytes(raw)


def refused(folder, part, **how):
    with pytest.raises(CheckpointError) as error:
        load(build(part, meta=True), folder, part, **how)
    return str(error.value)


WEIGHTS = {
    "native": "first_stage.safetensors",
    "diffusers": "vae/diffusion_pytorch_model.safetensors",
    "sat": "vae/imagekl_ch4.pt",
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("place", [0.3, 0.7, 0.999])
def test_a_flipped_bit_is_refused_in_every_format_and_not_laundered(copy, name, place, tmp_path):
    folder = copy(name)
    flip(folder / WEIGHTS[name], place)
    assert "damaged" in refused(folder, "first_stage")
    with pytest.raises(CheckpointError, match="damaged"):
        convert(Sources(folder), tmp_path / "out", "native", build_component)
    assert not (tmp_path / "out").exists()
    assert any(not verdict.good for verdict in audit(folder, write=True))


def test_zeros_in_a_sat_file_without_digests_are_refused_by_its_crc(copy):
    folder = copy("sat")
    (folder / "vae" / "digests.json").unlink()
    flip(folder / "vae" / "imagekl_ch4.pt")
    assert "damaged" in refused(folder, "first_stage")
    load(build("first_stage", meta=True), folder, "first_stage", verify=Verify("manifest"))


@pytest.mark.parametrize("name", ["native", "diffusers", "sat"])
def test_nan_in_files_without_digests_is_refused_and_not_converted(copy, tmp_path, name):
    folder = copy(name)
    weights = tensors()
    next(iter(weights["first_stage"].values())).view(-1)[0] = float("nan")
    shutil.rmtree(folder)
    WRITERS[name](folder, weights, CONFIG)
    for file in folder.rglob("digests.json"):
        file.unlink()
    if name != "native":  # whose digests say that this was written
        assert "not finite" in refused(folder, "first_stage")
    with pytest.raises(CheckpointError, match="not finite"):
        convert(Sources(folder), tmp_path / "out", "native", build_component, config=CONFIG)


@pytest.mark.parametrize("value", ["0" * 64, None, 3, "x"])
def test_a_wrong_sha256_in_the_manifest_is_refused(copy, value):
    folder = copy("native")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["model"]["files"][0]["sha256"] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in refused(folder, "model")


@pytest.mark.parametrize(("key", "value"), [("tensors", 3), ("elements", 7), ("dtypes", ["float16"])])
def test_counts_of_the_manifest_are_compared(copy, key, value):
    folder = copy("native")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["model"][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"{key} of model is" in refused(folder, "model", verify=Verify("manifest"))


def old(folder):
    """``folder`` with the manifest of before there were chunks."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in manifest["parts"].values():
        part["files"] = [{k: f[k] for k in ("name", "bytes", "sha256")} for f in part["files"]]
    manifest.pop("tokenizer", None)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def test_an_old_manifest_is_checked_once_and_remembered(copy, caplog):
    caplog.set_level(logging.DEBUG, "sat.checkpoint.verify")
    folder = copy("native")
    old(folder)
    for said in ("remembered in", "was right before"):
        caplog.clear()
        load(build("text", meta=True), folder, "text")
        assert said in caplog.text
    flip(folder / "text.safetensors")
    assert "SHA-256 is not the one" in refused(folder, "text")


def test_verify_writes_chunk_digests_that_leave_the_fingerprint(copy):
    folder = copy("native")
    whole = (folder / "manifest.json").read_text()
    old(folder)
    before = digest(folder)
    assert all(verdict.good for verdict in audit(folder, write=True))
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(whole)
    assert digest(folder) == before


def test_a_flipped_vocabulary_is_refused(copy):
    vocabulary = copy("native") / "tokenizer" / "spiece.model"
    assert verify_file(vocabulary)
    flip(vocabulary)
    with pytest.raises(CheckpointError, match="damaged"):
        verify_file(vocabulary)


def test_ranks_share_the_chunks_and_agree(tmp_path):
    from sat.checkpoint.format import SafetensorsFile, TensorInfo, write_safetensors
    from sat.checkpoint.save import write_digests
    from sat.checkpoint.verify import check_file

    path = tmp_path / "a.safetensors"
    values = torch.arange(3 * CHUNK // 4, dtype=torch.float32)
    write_safetensors(path, {"x": TensorInfo(tuple(values.shape), values.dtype)}, lambda name: values)
    write_digests(tmp_path)
    flip(path, 0.4)  # in the second chunk of four
    found = []
    for rank in range(2):
        file = SafetensorsFile(path, check_file(path, Verify("full", rank, 2)))
        assert len(file["x"])  # nobody waits: the end tells
        try:
            file.verified()
        except CheckpointError:
            found.append(rank)
        file.close()
    assert found == [1]
    with (
        pytest.raises(CheckpointError, match="theirs"),
        Verify("full", 0, 2, lambda own: [own, "theirs"]).together(),
    ):
        pass


def test_records_of_pieces_and_of_a_whole_file_are_equal(tmp_path):
    content = bytes(range(256)) * (CHUNK // 256) + b"end"
    (tmp_path / "f").write_bytes(content)
    digester = Digester()
    for begin in range(0, len(content), 1_000_003):
        digester.update(content[begin : begin + 1_000_003])
    assert digester.written() == digest_file(tmp_path / "f")
    assert len(digester.written().chunks) == 2
    assert record_of(tmp_path / "f") is None


def test_compressed_or_oversized_records_are_refused_before_unpacking(tmp_path):
    path, packed = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"x": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        open_part(packed, "model")
    raw = bytearray(path.read_bytes())
    at = raw.find(b"PK\1\2")
    raw[at + 20 : at + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="refused|corrupt|damaged"):
        open_part(path, "model")


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(kind):
    weights = tensors()["first_stage"]
    first = next(iter(weights))
    weights[first] = weights[first].to(kind)
    assert "another kind of number" in refused(weights, "first_stage")


def test_a_copied_rank_file_is_refused(tmp_path):
    from sat.checkpoint.save import Options

    save_sat(tmp_path / "sat", {"model": tensors()["model"]}, CONFIG, options=Options(ranks=2))
    first, second = sorted((tmp_path / "sat" / "1").glob("*.pt"))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert "not the file" in refused(tmp_path / "sat", "model") or "damaged" in refused(
        tmp_path / "sat", "model"
    )
    first.write_bytes(whole)
    (first.parent / "digests.json").unlink()
    second.write_bytes(first.read_bytes())
    assert "copy of the other" in refused(tmp_path / "sat", "model")


def test_the_command_says_what_is_good_and_exits_1_for_damage(copy, capsys):
    from sat.cli.convert import main

    folder = copy("diffusers")
    assert main(["verify", str(folder)]) == 0
    assert "chunk digests right" in capsys.readouterr().out
    flip(folder / WEIGHTS["diffusers"])
    assert main(["verify", str(folder), "--write"]) == 1
    assert "DAMAGED" in capsys.readouterr().out
