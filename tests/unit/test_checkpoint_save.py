"""Written folders: whole or not at all, read back bit for bit, and found by their format."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sat.checkpoint import (
    WRITERS,
    CheckpointError,
    Options,
    detect,
    digest,
    find_part,
    find_tokenizer,
    load,
    open_part,
    save_native,
)
from sat.checkpoint.convert import Sources, convert
from sat.checkpoint.format import PARTS, InMemory
from sat.config.check import build as build_component
from tests.checkpoints import CONFIG, build, same, tensors, tokenizer

FORMATS = sorted(WRITERS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in each format, with all parts and a tokenizer; read only."""
    root = tmp_path_factory.mktemp("written")
    spiece = tokenizer(root / "spiece.model")
    for name, write in WRITERS.items():
        write(root / name, tensors(), CONFIG, tokenizer=spiece, options=Options(max_shard_bytes=30_000))
    return root


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", PARTS)
def test_what_is_written_loads_bit_for_bit(written, name, part):
    module = build(part, meta=True)
    report = load(module, written / name, part)
    assert same(module.state_dict(), build(part).state_dict())
    assert report.unexpected == report.ignored == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_is_recognised_and_lists_its_parts(written, name):
    found = detect(written / name)
    assert found.name == name
    assert found.parts(written / name) == list(PARTS)
    assert all(find_part(written / name, part).exists() for part in PARTS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_tokenizer_travels_with_the_text_encoder(written, name):
    found = find_tokenizer(written / name)
    assert found is not None
    assert found.read_bytes() == (written / "spiece.model").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_the_config_comes_back(written, name):
    found = detect(written / name).config(written / name)
    for section in ("model", "first_stage"):
        assert found[section]["target"] == CONFIG[section]["target"]
        assert CONFIG[section]["params"].items() <= found[section]["params"].items()
    assert found["conditioning"] == CONFIG["conditioning"]
    assert found["diffusion"]["schedule"]["params"]["shift"] == 2.5


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_are_cast_when_written(tmp_path, name, dtype):
    WRITERS[name](tmp_path / "out", tensors(), CONFIG, options=Options(dtype=dtype))
    for part in PARTS:
        found = open_part(tmp_path / "out", part)
        assert {found.info(key).dtype for key in found} == {dtype}
        module = build(part, meta=True)
        load(module, tmp_path / "out", part)
        wanted = build(part).state_dict()
        assert all(torch.equal(t, wanted[n].to(dtype).float()) for n, t in module.named_parameters())


def test_the_manifest_describes_the_files(written):
    manifest = json.loads((written / "native" / "manifest.json").read_text())
    assert manifest["config"] == CONFIG
    model = manifest["parts"]["model"]
    assert len(model["files"]) > 1
    assert model["tensors"] == len(build("model").state_dict())
    assert model["dtypes"] == ["float32"]
    for entry in model["files"]:
        content = (written / "native" / entry["name"]).read_bytes()
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_shards_stay_below_the_limit(written):
    for folder in ("native", "diffusers/transformer"):
        sizes = [file.stat().st_size for file in (written / folder).glob("*model*.safetensors")]
        assert len(sizes) > 1
        assert max(sizes) < 30_000 + 4096


# -- all or nothing


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save_native(tmp_path / "out", tensors(), CONFIG)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_file_in_the_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save_native(tmp_path / "out", tensors(), CONFIG)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert save_native(tmp_path / "out", tensors(), CONFIG) == tmp_path / "out"


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_leaves_nothing(tmp_path, name):
    class Reading(dict):
        """Fails when the last tensor is read, not when it is announced."""

        seen = 0

        def __getitem__(self, key):
            Reading.seen += 1
            if Reading.seen > 2 * len(self):
                raise KeyboardInterrupt
            return dict.__getitem__(self, key)

    parts = tensors() | {"model": Reading(tensors()["model"])}
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](tmp_path / "out", parts, CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
def test_values_beyond_fp16_are_refused_and_nothing_is_left(tmp_path, name):
    parts = tensors()
    parts["model"]["time.0.weight"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"1 tensors hold values beyond the range of float16.*1e\+06"):
        WRITERS[name](tmp_path / "out", parts, CONFIG, options=Options(dtype=torch.float16))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, only 0\.00 GB are free"):
        save_native(tmp_path / "out", tensors(), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_write_error_is_one_line(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match="out: cannot write: No space left on device"):
        save_native(tmp_path / "out", tensors(), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to write"):
        save_native(tmp_path / "out", {}, CONFIG)
    with pytest.raises(CheckpointError, match=r"unknown parts \['network'\]"):
        save_native(tmp_path / "out", {"network": {}}, CONFIG)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"mixins": {"position": {"target": "sat.mixins.rope.RoPE"}}},
            "no place for the mixins ['position']",
        ),
        ({"table_size": [9, 12]}, "position table is square"),
        ({"size_dim": 50}, "six equal parts"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path, change, says):
    config = {**CONFIG, "model": {**CONFIG["model"], "params": {**CONFIG["model"]["params"], **change}}}
    with pytest.raises(CheckpointError) as caught:
        WRITERS["diffusers"](tmp_path / "out", tensors(), config)
    assert says in str(caught.value)


def test_a_config_that_names_no_network_is_refused(tmp_path):
    for target, says in (
        ("sat.nowhere.Net", "cannot be imported"),
        ("sat.diffusion.schedule.ZeroSNR", "no network"),
    ):
        with pytest.raises(CheckpointError, match=says):
            WRITERS["sat"](tmp_path / "out", tensors(), {**CONFIG, "model": {"target": target}})


# -- reading broken folders


@pytest.fixture
def copy(written, tmp_path):
    """Copies one format's folder to break it."""

    def make(name):
        return Path(shutil.copytree(written / name, tmp_path / name))

    return make


def message(path, part="model", **options):
    with pytest.raises(CheckpointError) as caught:
        load(build(part, meta=True), path, part, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    assert "no such file or folder" in message(tmp_path / "x")


def test_a_folder_in_no_format_says_what_was_expected(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    text = message(tmp_path)
    assert "no known checkpoint format" in text
    assert "it holds 'readme.txt'" in text


def test_an_empty_folder_says_so(tmp_path):
    assert "it holds nothing" in message(tmp_path)


def test_a_checkpoint_one_folder_further_down_is_pointed_at(copy, tmp_path):
    """As in the checkpoints of a training run, which hold the engine's state beside native/."""
    folder = copy("native")
    assert f"did you mean '{folder}'" in message(tmp_path)


def test_a_part_that_is_not_there_is_named(tmp_path):
    save_native(tmp_path / "out", {"model": tensors()["model"]}, CONFIG)
    assert "holds no text weights, only ['model']" in message(tmp_path / "out", "text")


def test_an_unknown_part_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="part is one of"):
        open_part(tmp_path, "network")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"version": 2}, "version is 2; this code reads version 1"),
        ({"parts": []}, "must be objects"),
        ({"parts": {"model": {"files": [{"name": "a"}]}}}, "the list of files is damaged"),
        (
            {"parts": {"model": {"files": [{"name": "../a", "bytes": 1, "sha256": "0" * 64}]}}},
            "plain file names",
        ),
    ],
)
def test_a_wrong_manifest_is_told(copy, change, says):
    folder = copy("native")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert says in message(folder)


def test_a_missing_native_shard_is_named(copy):
    folder = copy("native")
    next(folder.glob("model-00002*")).unlink()
    assert "shards missing: 'model-00002-of-" in message(folder)


def test_a_truncated_native_shard_is_named(copy):
    folder = copy("native")
    file = next(folder.glob("model-00002*"))
    file.write_bytes(file.read_bytes()[:-8])
    assert f"{file}: truncated" in message(folder)


def test_a_native_file_that_was_exchanged_is_named(copy):
    folder = copy("native")
    file = next(folder.glob("text-00001*"))
    save_file({"other": torch.ones(30_000)}, file)
    assert f"{file}: not the file that was written" in message(folder, "text")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("abc", "holds 'abc', expected an iteration number"),
        ("0", "holds '0'"),
        ("-3", "holds '-3'"),
        ("", "holds ''"),
    ],
)
def test_a_wrong_latest_is_told(copy, word, says):
    folder = copy("sat")
    (folder / "latest").write_text(word)
    assert says in message(folder)


def test_a_latest_that_names_nothing_is_told(copy):
    folder = copy("sat")
    (folder / "latest").write_text("7\n")
    assert "no such file" in message(folder)
    assert "latest names it" in message(folder)


def test_a_missing_latest_names_what_it_could_hold(copy):
    folder = copy("sat")
    (folder / "latest").unlink()
    assert "has no `latest` file; it should hold the name of the folder to read, of ['1']" in message(folder)


def test_latest_may_say_release_and_an_iteration_folder_may_be_named(copy):
    folder = copy("sat")
    load(build("model", meta=True), folder / "1", "model")
    (folder / "1").rename(folder / "release")
    (folder / "latest").write_text("release\n")
    load(build("model", meta=True), folder, "model")


def test_the_official_archive_may_be_one_folder_down(copy, tmp_path):
    """As published: cogview3-plus-3b/{latest,1}, imagekl_ch16.pt and the T5 folder side by side."""
    folder = copy("sat")
    outer = tmp_path / "weights"
    (outer / "cogview3-plus-3b").mkdir(parents=True)
    for name in ("1", "latest"):
        (folder / name).rename(outer / "cogview3-plus-3b" / name)
    (folder / "vae" / "imagekl_ch4.pt").rename(outer / "imagekl_ch4.pt")
    (folder / "t5-v1_1-xxl").rename(outer / "t5-v1_1-xxl")
    for part in PARTS:
        module = build(part, meta=True)
        load(module, outer, part)
        assert same(module.state_dict(), build(part).state_dict())


def test_several_sat_checkpoints_are_a_question(copy, tmp_path):
    copy("sat").rename(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert "several SAT checkpoints, name one of 'a', 'b'" in message(tmp_path)


def test_a_sat_folder_without_an_autoencoder_says_where_it_looked(copy):
    folder = copy("sat")
    shutil.rmtree(folder / "vae")
    assert "holds no first_stage weights" in message(folder, "first_stage")


def test_parts_in_the_engine_file_win_over_files_of_their_own(copy):
    """As in the official loader, which reads the engine file last."""
    folder = copy("sat")
    path = folder / "1" / "mp_rank_00_model_states.pt"
    module = torch.load(path)["module"]
    vae = torch.load(folder / "vae" / "imagekl_ch4.pt")["state_dict"]
    module.update({f"first_stage_model.{name}": t + 1 for name, t in vae.items()})
    torch.save({"module": module}, path)
    (path.parent / "digests.json").unlink()
    found = build("first_stage", meta=True)
    load(found, folder, "first_stage")
    assert torch.equal(found.encoder.stem.bias, build("first_stage").encoder.stem.bias + 1)
    report = load(build("model", meta=True), folder, "model")
    assert len(report.ignored) == len(vae)


def test_a_missing_component_is_named(copy):
    folder = copy("diffusers")
    shutil.rmtree(folder / "vae")
    assert "vae/ is missing" in message(folder, "first_stage")


def test_another_pipeline_is_refused(copy):
    folder = copy("diffusers")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="is a diffusers FluxPipeline, only CogView3PlusPipeline"):
        detect(folder).config(folder)


@pytest.mark.parametrize("part", ["model", "first_stage"])
def test_a_component_folder_alone_is_read(written, part):
    folder = find_part(written / "diffusers", part)
    assert detect(folder).parts(folder) == [part]
    module = build(part, meta=True)
    load(module, folder, part)
    other = "first_stage" if part == "model" else "model"
    assert f"holds {part} weights, not {other}" in message(folder, other)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "is a SD3Transformer2DModel"),
        ("transformer/config.json", {"num_layers": "2"}, "num_layers is '2'"),
        ("transformer/config.json", {"out_channels": 8}, "out_channels 8 differs"),
        ("vae/config.json", {"block_out_channels": [8, 12]}, "expected whole multiples"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae/config.json", {"use_quant_conv": True}, "differ"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
    ],
)
def test_configs_that_ours_cannot_follow_are_refused(copy, file, change, says):
    folder = copy("diffusers")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError) as caught:
        detect(folder).config(folder)
    assert says in str(caught.value)


# -- digest


def test_a_digest_knows_content_and_not_place(written, copy):
    folder = copy("native")
    assert digest(folder) == digest(written / "native")
    file = next(folder.glob("model-00001*"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert digest(folder) != digest(written / "native")


def test_a_digest_of_a_large_file_reads_little(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    first = digest(path)
    with path.open("r+b") as file:
        file.seek((1 << 40) - 1)
        file.write(b"x")
    assert digest(path) != first


def test_a_digest_of_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        digest(tmp_path / "x")


def test_position_tables_are_not_narrowed_with_the_weights(tmp_path):
    """They are not weights: rounded to float16, the picture moves by 2.6e-3 of the range."""
    state = build("model").state_dict()
    table = "transformer.mixins.position.table"
    save_native(
        tmp_path / "out", {"model": InMemory(state, exact=[table])}, CONFIG, options=Options(torch.float16)
    )
    written = dict(open_part(tmp_path / "out", "model"))
    assert torch.equal(written.pop(table), state[table])
    assert {t.dtype for t in written.values()} == {torch.float16}
    convert(
        Sources(tmp_path / "out"),
        tmp_path / "again",
        "native",
        build_component,
        options=Options(torch.bfloat16),
    )
    assert torch.equal(open_part(tmp_path / "again", "model")[table], state[table])
