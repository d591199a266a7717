"""Official engine files of several model-parallel ranks: written, read, merged, and refused where torn."""

import shutil

import pytest
import torch

from sat.checkpoint import CheckpointError, Options, load, open_part, save_sat
from sat.checkpoint.convert import Sources, convert
from sat.cli.convert import main
from sat.config.check import build as build_component
from sat.models.cogview3_unet import CogView3UNet
from sat.parallel.launch import Axis
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding
from tests.checkpoints import CONFIG, build, same, tensors
from tests.small import fill
from tests.unit.test_checkpoint_convert import UNET_PARAMS

PREFIX = "model.diffusion_model."
LAYER = f"{PREFIX}transformer.layers.1."


def unet():
    """A small UNet of two levels, four heads of 8."""
    model = CogView3UNet(**UNET_PARAMS)
    fill(model)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of one, two and four ranks."""
    root = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2, 4):
        parts = tensors() if ranks < 4 else {"model": tensors()["model"]}
        save_sat(root / str(ranks), parts, CONFIG, options=Options(ranks=ranks))
    return root


def engine(folder, rank: int):
    return torch.load(folder / "1" / f"mp_rank_{rank:02d}_model_states.pt")["module"]


@pytest.mark.parametrize("ranks", (2, 4))
def test_each_rank_holds_its_heads_and_its_share_of_the_mlp(written, ranks) -> None:
    whole = engine(written / "1", 0)
    assert sorted(path.name for path in (written / str(ranks) / "1").glob("*.pt")) == [
        f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)
    ]
    heads = 4 // ranks
    for rank in range(ranks):
        own = engine(written / str(ranks), rank)
        assert own.keys() == whole.keys()
        qkv = whole[f"{LAYER}attention.query_key_value.weight"].view(3, 4, 8, 32)
        mine = qkv[:, heads * rank : heads * (rank + 1)].reshape(-1, 32)
        assert torch.equal(own[f"{LAYER}attention.query_key_value.weight"], mine)
        bias = whole[f"{LAYER}attention.query_key_value.bias"].view(3, 4, 8)
        mine = bias[:, heads * rank : heads * (rank + 1)].reshape(-1)
        assert torch.equal(own[f"{LAYER}attention.query_key_value.bias"], mine)
        columns = whole[f"{LAYER}attention.dense.weight"].view(32, 4, 8)
        mine = columns[:, heads * rank : heads * (rank + 1)].reshape(32, -1)
        assert torch.equal(own[f"{LAYER}attention.dense.weight"], mine)
        width = 128 // ranks
        up = whole[f"{LAYER}mlp.dense_h_to_4h.weight"][width * rank : width * (rank + 1)]
        assert torch.equal(own[f"{LAYER}mlp.dense_h_to_4h.weight"], up)
        for name in (f"{LAYER}attention.dense.bias", f"{PREFIX}mixins.adaln.adaln_modules.1.1.weight"):
            assert torch.equal(own[name], whole[name])


@pytest.mark.parametrize("ranks", (2, 4))
def test_there_and_back_is_exact(written, tmp_path, ranks) -> None:
    convert(Sources(written / "1"), tmp_path / "split", "sat", build_component, options=Options(ranks=ranks))
    convert(Sources(tmp_path / "split"), tmp_path / "whole", "sat", build_component)
    assert same(engine(tmp_path / "whole", 0), engine(written / "1", 0))
    for part in ("model", "first_stage", "text"):
        module = build(part, meta=True)
        load(module, tmp_path / "split", part)
        assert same(module.state_dict(), build(part).state_dict())


@pytest.mark.parametrize("ranks", (2, 4))
def test_a_unet_with_its_fused_gates_goes_there_and_back(tmp_path, ranks) -> None:
    config = {"model": {"target": "sat.models.cogview3_unet.CogView3UNet", "params": UNET_PARAMS}}
    state = unet().state_dict()
    save_sat(tmp_path / "split", {"model": state}, config, options=Options(ranks=ranks))
    cut = [name for name, t in engine(tmp_path / "split", 0).items() if "ff.net.0.proj.weight" in name]
    own = engine(tmp_path / "split", 1)[cut[0]]
    whole = open_part(save_sat(tmp_path / "one", {"model": state}, config), "model")[cut[0]]
    value, gate = whole.view(2, ranks, -1, whole.shape[1])[:, 1]  # value, then gate, each split
    assert torch.equal(own, torch.cat([value, gate]))
    with torch.device("meta"):
        module = CogView3UNet(**UNET_PARAMS)
    load(module, tmp_path / "split", "model")
    assert same(module.state_dict(), state)


def test_what_ranks_hold_whole_all_the_same_is_read(tmp_path) -> None:
    """The official UNet knows no split layers: with several ranks each file has everything."""
    config = {"model": {"target": "sat.models.cogview3_unet.CogView3UNet", "params": UNET_PARAMS}}
    folder = save_sat(tmp_path / "one", {"model": unet().state_dict()}, config) / "1"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    module = unet()
    fill(module, seed=1)
    load(module, tmp_path / "one", "model")
    assert same(module.state_dict(), unet().state_dict())


@pytest.mark.parametrize("layout", ("1", "2", "4"))
@pytest.mark.parametrize("size", (2, 4))
def test_any_layout_is_read_by_any_other(written, layout, size) -> None:
    for rank in range(size):
        wanted = apply_sharding(build("model"), family_sharding(type(build("model"))), Axis(size, rank))
        module = build("model", meta=True)
        apply_sharding(module, family_sharding(type(module)), Axis(size, rank))
        load(module, written / layout, "model")
        assert same(module.state_dict(), wanted.state_dict())


@pytest.fixture
def torn(written, tmp_path):
    shutil.copytree(written / "4", tmp_path / "torn")
    return tmp_path / "torn"


def test_a_missing_rank_is_named(torn) -> None:
    (torn / "1" / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="mp_rank_02_model_states.pt is missing, one of 4"):
        open_part(torn, "model")


def test_a_last_rank_that_is_missing_shows_in_the_shapes(torn) -> None:
    (torn / "1" / "mp_rank_03_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"misshapen: .*qkv.weight' is \[72, 32\], .* \[96, 32\]"):
        load(build("model", meta=True), torn, "model")


def change(torn, rank: int, name: str, value) -> None:
    path = torn / "1" / f"mp_rank_{rank:02d}_model_states.pt"
    state = torch.load(path)
    state["module"][name] = value
    torch.save(state, path)
    (path.parent / "digests.json").unlink(missing_ok=True)


def test_what_lies_beside_the_tensors_tells_files_that_are_swapped_or_of_other_steps(torn) -> None:
    """As DeepSpeed writes it: steps, ranks, and the state of each rank's own generator."""
    (torn / "1" / "digests.json").unlink()
    files = sorted((torn / "1").glob("*.pt"))

    def beside(**facts) -> None:
        for rank, file in enumerate(files):
            seed = (3952 + facts.get("order", range(4))[rank]).to_bytes(8, "little") + bytes(8)
            states = {"model-parallel-rng": torch.tensor(list(seed), dtype=torch.uint8)}
            step = facts.get("steps", (7,) * 4)[rank]
            state = {"module": torch.load(file)["module"], "global_steps": step, "rng_tracker_states": states}
            torch.save({**state, "mp_world_size": facts.get("ranks", 4)}, file)

    beside()
    load(build("model", meta=True), torn, "model")
    for facts, says in (
        (
            {"order": (0, 2, 1, 3)},
            r"mp_rank_01_model_states.pt: is the file of rank 2 by its random state: swapped",
        ),
        ({"steps": (7, 7, 9, 7)}, r"different moments: global_steps \[7, 9\]"),
        ({"ranks": 8}, "4 files are there of 8 model-parallel ranks"),
    ):
        beside(**facts)
        with pytest.raises(CheckpointError, match=says):
            load(build("model", meta=True), torn, "model")


def test_ranks_that_differ_in_what_each_holds_whole_are_refused(torn) -> None:
    change(torn, 1, f"{PREFIX}time_embed.0.bias", torch.zeros(20))
    with pytest.raises(CheckpointError, match=r"time_embed.0.bias', which every rank holds whole, is not"):
        load(build("model", meta=True), torn, "model")


def test_ranks_of_another_model_are_refused(torn) -> None:
    change(torn, 3, f"{LAYER}mlp.dense_h_to_4h.bias", torch.zeros(5))
    with pytest.raises(
        CheckpointError, match=r"dense_h_to_4h.bias' is \[32\] in .* and \[5\] in .*mp_rank_03"
    ):
        open_part(torn, "model")
    change(torn, 3, "stranger", torch.zeros(5))
    with pytest.raises(CheckpointError, match="'stranger' is not in the files of all ranks"):
        open_part(torn, "model")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "sat", "--tensor-parallel", "0"], "--tensor-parallel is 0, expected at least 1"),
        (["--to", "native", "--tensor-parallel", "2"], "--tensor-parallel is for --to sat"),
        (["--to", "sat", "--tensor-parallel", "3"], "the 4 heads of transformer.blocks.0.attn.qkv do not"),
        (["--to", "sat", "--tensor-parallel", "2", "--only", "text"], "splits the network, which is not"),
    ],
)
def test_the_command_refuses_what_cannot_be_split(written, tmp_path, capsys, words, says) -> None:
    assert main([str(written / "1"), str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_splits(written, tmp_path) -> None:
    out = tmp_path / "out"
    assert main([str(written / "1"), str(out), "--to", "sat", "--tensor-parallel", "2"]) == 0
    for rank in range(2):
        assert same(engine(out, rank), engine(written / "2", rank))
