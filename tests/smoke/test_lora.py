"""LoRA from train.py to sample.py: what is trained and written, exact resumption, strengths, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sat.adapters.files import NATIVE_FILE, locate
from sat.apps.web.request import GenerationRequest
from sat.apps.web.service import GenerationService
from sat.cli.convert import main as convert
from sat.cli.sample import main as sample
from sat.config.cascade import load_cascade
from sat.config.load import load
from sat.pipeline import Pipeline
from tests.background import Runs
from tests.configs import DEBUG
from tests.smoke.test_training import Ran, good, rows
from tests.training import same
from tests.training import state as whole_state

RUNS = Runs("tests.smoke.lora_runs", spiece=True)


@pytest.fixture(scope="module")
def ran() -> Ran:
    folder = RUNS()
    return Ran(folder, json.loads((folder / "ends.json").read_text()))


SHARD = "shard_000_00000.safetensors"


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return whole_state(run / "checkpoints" / f"step_{step:08d}")


def header(path: Path) -> dict[str, str]:
    with safe_open(locate(path)[0], "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------- training


def test_only_factors_are_trained_and_written(ran) -> None:
    good(ran, "whole")
    found = state(ran.folder / "whole", 4)
    trained = [name for name in found if name.startswith(f"{SHARD} weight/")]
    assert trained and all(".factors." in name for name in trained)
    assert any(name.startswith(f"{SHARD} weight/text.") for name in trained)
    place = ran.folder / "whole" / "checkpoints" / "step_00000004" / "native"
    assert [file.name for file in place.iterdir()] == [NATIVE_FILE]
    moved = [v for n, v in found.items() if n.startswith(NATIVE_FILE) and ".lora_B." in n]
    assert moved and all(value.abs().max() > 0 for value in moved)


def test_the_log_says_how_attention_is_computed(ran) -> None:
    assert re.search("attention: (torch's choice|exp per head)", ran.ends["whole"]["err"])
    assert "attention: torch's choice" in ran.ends["plain"]["err"]
    written = load([ran.folder / "whole" / "resolved.yaml"]).train
    assert written.pack is True and written.attention in ("torch", "exp")


def test_the_averages_are_what_is_written(ran) -> None:
    found = state(ran.folder / "whole", 4)
    name = "transformer.blocks.1.attn.proj"
    average = found[f"{SHARD} average/network.{name}.factors.trained.up.0.weight"]
    assert torch.equal(found[f"{NATIVE_FILE} model.{name}.lora_B.0.weight"].flatten(), average)
    assert not torch.equal(found[f"{SHARD} weight/network.{name}.factors.trained.up.0.weight"], average)


def test_the_adapter_says_what_it_is(ran) -> None:
    about = header(ran.folder / "whole")
    assert (about["rank"], about["alpha"], about["layout"]) == ("4", "8.0", "native")
    layers = json.loads(about["layers"])
    assert layers["model.transformer.blocks.0.mlp.up#0"] == {"rank": 2, "alpha": 4.0, "parts": 1}
    base = json.loads(about["base"])
    assert base["model"]["component"]["params"]["dim"] == 32
    assert set(base) == {"model", "text"}
    assert all(len(one["norms"]) == 4 for one in base.values())
    assert json.loads(header(ran.folder / "bf16")["base"])["model"]["norms"]
    assert set(json.loads(header(ran.folder / "unet")["base"])) == {"model"}


def test_a_run_cut_in_two_is_the_uninterrupted_one_bit_for_bit(ran) -> None:
    """Dropout included: it is drawn anew for each step from the step's own seed."""
    good(ran, "half")
    good(ran, "rest")
    assert same(state(ran.folder / "half", 4), state(ran.folder / "whole", 4))
    good(ran, "bf16_rest")
    assert "saving at step 1 of 3" in good(ran, "bf16_half")
    assert same(state(ran.folder / "bf16_half", 3), state(ran.folder / "bf16", 3))


def test_recomputing_activations_changes_nothing(ran) -> None:
    """configs/lora.yaml asks for it; with dropout the same masks must come again."""
    good(ran, "plain")
    losses = [[r["loss"] for r in rows(ran.folder / name) if "lr" in r] for name in ("whole", "plain")]
    assert losses[0] == losses[1]
    assert same(state(ran.folder / "plain", 4), state(ran.folder / "whole", 4))


def test_compiled_blocks_train_to_the_same_factors(ran) -> None:
    if "compiled" not in ran.ends:
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    good(ran, "bare")
    assert "frozen weights are not packed: train.compile" in good(ran, "compiled")
    expected, found = (state(ran.folder / name, 4) for name in ("bare", "compiled"))
    for name in [name for name in expected if name.startswith(f"{SHARD} weight/")]:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5), name


def test_bf16_weights_train_dora_with_sharded_masters(ran) -> None:
    good(ran, "bf16")
    found = load_file(locate(ran.folder / "bf16")[0])
    kinds = {name.rpartition("attn.qkv.")[2]: tensor.dtype for name, tensor in found.items() if "qkv" in name}
    assert kinds["lora_A.0.weight"] == torch.bfloat16
    assert kinds["magnitude"] == torch.float32
    assert json.loads(header(ran.folder / "bf16")["dora"]) is True


def test_unets_train_too(ran) -> None:
    good(ran, "unet")
    names = set(load_file(locate(ran.folder / "unet")[0]))
    assert any(".mixins.cross.layers.0.kv.lora_B.1." in name for name in names)
    assert any(".emb.lora_B.0." in name for name in names)


def test_training_goes_on_from_an_adapter(ran) -> None:
    assert "training goes on from the adapter" in good(ran, "again")
    before, after = (load_file(locate(ran.folder / name)[0]) for name in ("whole", "again"))
    assert before.keys() == after.keys()
    assert (header(ran.folder / "again")["rank"], header(ran.folder / "again")["alpha"]) == ("4", "8.0")
    assert all((after[n] - before[n]).abs().max() < 1e-6 for n in before)  # the rate is 1e-12


def test_factors_are_trained_over_a_loaded_adapter(ran) -> None:
    said = good(ran, "over")
    assert "at strength 0.5 (native)" in said
    assert not any(".magnitude" in name for name in load_file(locate(ran.folder / "over")[0]))


def test_caches_go_with_loaded_adapters(ran) -> None:
    """Embeddings may be kept, and the parts that are left out take no adapter."""
    assert "text embeddings" in good(ran, "cached")
    files = [load_file(locate(ran.folder / name)[0]) for name in ("over", "cached")]
    assert files[0].keys() == files[1].keys()


def test_what_cannot_be_trained_is_refused_in_one_line(ran) -> None:
    start = ran.ends["wrong_start"]
    assert start["code"] == 2
    assert "is a LoRA of CogView3UNet, this model is CogView3Plus: another model" in start["err"]
    first = ran.ends["first_stage"]
    assert first["code"] == 2
    assert "FirstStageObjective trains no part that LoRA adapts: set adapters.lora to null" in first["err"]


# ---------------------------------------------------------------------- use


def draw(out: Path, *arguments: str) -> np.ndarray:
    """The pixels of one picture of the toy."""
    words = ["--base", str(DEBUG), "--prompt", "a dog", "--output-dir", str(out), "parallel.device=cpu"]
    assert sample([*words, *arguments]) == 0
    (file,) = out.glob("*/*.png")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_strength_weighs_an_adapter_in_a_picture(ran, tmp_path) -> None:
    run = ran.folder / "whole"
    plain, none, half, full = (
        draw(tmp_path / name, *arguments)
        for name, arguments in {
            "plain": (),
            "none": ("--lora", f"{run}:0"),
            "half": ("--lora", f"{run}:0.5"),
            "full": ("--lora", str(run)),
        }.items()
    )
    assert (plain == none).all()
    assert (half != plain).any() and (full != half).any()
    assert abs(half - plain).sum() < abs(full - plain).sum()


def test_the_page_draws_as_sample_py_with_a_lora_of_a_run(ran, tmp_path) -> None:
    """Switched on, weakened, and off again, on weights that the page has packed."""
    words = [
        "parallel.device=cpu",
        "sampling.pack=true",
        ("adapters.load", [{"path": str(ran.folder / "whole")}]),
    ]
    service = GenerationService(load_cascade([DEBUG], words), tmp_path / "web", "debug").open()
    sizes = service.first.sampling
    for strength in (0.0, 1.0, 0.5, 0.0):
        request = GenerationRequest(
            "a dog", sizes.height, sizes.width, sizes.steps, service.guidance, sizes.seed,
            adapters={"whole": strength},
        )  # fmt: skip
        job = service.job(request)
        (file,) = job.work(job)
        with Image.open(file) as image:
            found = np.asarray(image.convert("RGB")).astype(int)
        named = ("--lora", f"{ran.folder / 'whole'}:{strength}") if strength else ()
        wanted = draw(tmp_path / f"at_{strength}", *named, "sampling.pack=true", "--overwrite")
        assert (found == wanted).all(), strength


def test_merged_and_converted_adapters_draw_the_same(ran, tmp_path) -> None:
    run = str(ran.folder / "whole")
    wanted = draw(tmp_path / "lora", "--lora", run)
    for to in ("peft", "diffusers"):
        assert convert([run, str(tmp_path / to), "--to", to]) == 0
        assert abs(draw(tmp_path / f"by_{to}", "--lora", str(tmp_path / to)) - wanted).max() <= 1
    assert abs(draw(tmp_path / "merged", "--lora", run, "adapters.merge=true") - wanted).max() <= 1


def test_two_adapters_and_strengths_from_python(ran) -> None:
    load = [{"path": str(ran.folder / "whole")}, {"path": str(ran.folder / "bf16"), "strength": 0.5}]
    alike = ("sampling.pack", False)  # adapted linears are not packed, and packed products round otherwise
    pipe = Pipeline.from_config(DEBUG, [("adapters.load", load), alike], device="cpu")
    assert pipe.adapters == {"whole": 1.0, "bf16": 0.5}
    both = pipe("a dog", seed=0).latents
    pipe.set_strength("bf16", 0.0)
    one = pipe("a dog", seed=0).latents
    pipe.set_strength("whole", 0.0)
    plain = Pipeline.from_config(DEBUG, [alike], device="cpu")
    assert torch.equal(pipe("a dog", seed=0).latents, plain("a dog", seed=0).latents)
    assert not torch.equal(both, one)
    with pytest.raises(ValueError, match="no adapter 'hole' is loaded; there are whole, bf16"):
        pipe.set_strength("hole", 1.0)


def test_pictures_of_another_strength_are_drawn_anew(ran, tmp_path, capsys) -> None:
    """--resume skips only what was drawn with the same adapters."""
    run = ran.folder / "whole"
    first = draw(tmp_path / "out", "--lora", str(run))
    second = draw(tmp_path / "out", "--lora", f"{run}:0.1", "--resume")
    assert (first != second).any()
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    ((digest, strength),) = facts["weights"]["adapters"]
    assert (len(digest), strength) == (16, 0.1)


def test_a_lora_of_another_model_is_refused_by_sample(ran, tmp_path, capsys) -> None:
    words = ["--base", str(DEBUG), "--prompt", "a dog", "--output-dir", str(tmp_path), "parallel.device=cpu"]
    assert sample([*words, "--lora", str(ran.folder / "unet")]) == 2
    assert "is a LoRA of CogView3UNet, this model is CogView3Plus: another model" in capsys.readouterr().err
    assert sample([*words, "--lora", str(tmp_path / "nothing")]) == 2
    assert "there is no" in capsys.readouterr().err


# -- new words (textual inversion)


def words_of(run: Path, step: int = 4) -> torch.Tensor:
    found = load_file(run / "checkpoints" / f"step_{step:08d}" / "native" / "embeddings.safetensors")
    assert list(found) == ["<it>"]
    return found["<it>"]


def test_a_training_of_a_word_learns_its_embeddings_alone(ran) -> None:
    good(ran, "words")
    run = ran.folder / "words"
    assert words_of(run).shape[0] == 2
    native = run / "checkpoints" / "step_00000004" / "native"
    assert [file.name for file in native.iterdir()] == ["embeddings.safetensors"]
    assert "0.00 M trained parameters" in ran.ends["words"]["err"]
    assert not torch.equal(words_of(run, 2), words_of(run, 4))


def test_a_resumed_training_of_a_word_is_the_uninterrupted_one(ran) -> None:
    good(ran, "words_rest")
    assert torch.equal(words_of(ran.folder / "words_half"), words_of(ran.folder / "words"))


def test_words_are_learned_beside_factors(ran) -> None:
    good(ran, "words_lora")
    native = ran.folder / "words_lora" / "checkpoints" / "step_00000002" / "native"
    assert sorted(file.name for file in native.iterdir()) == [NATIVE_FILE, "embeddings.safetensors"]


def test_a_word_that_no_caption_has_is_told(ran) -> None:
    assert ran.ends["no_word"]["code"] == 2
    assert "no caption has the new word '<that>' (adapters.tokens)" in ran.ends["no_word"]["err"]


def test_sample_draws_a_learned_word(ran, tmp_path: Path) -> None:
    """The word changes the picture; a prompt without it is drawn as before."""
    spiece = load([ran.folder / "words" / "resolved.yaml"]).conditioning.tokenizer
    pictures = {}
    for name, extra in (("with", ["--embedding", str(ran.folder / "words")]), ("without", [])):
        command = [
            "--base", str(DEBUG), f"conditioning.tokenizer={spiece}", "--steps", "2", *extra,
            "--prompt", "a red <it>", "--prompt", "a dog", "--output-dir", str(tmp_path / name),
            "sampling.height=32", "sampling.width=48",
        ]  # fmt: skip
        assert sample(command) == 0
        files = sorted((tmp_path / name).glob("*/*.png"))
        pictures[name] = [np.asarray(Image.open(file)) for file in files]
    assert not np.array_equal(pictures["with"][0], pictures["without"][0])
    assert np.array_equal(pictures["with"][1], pictures["without"][1])
