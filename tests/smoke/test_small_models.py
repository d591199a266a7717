"""The small models that ship: what they draw is what was asked for, and they stay small."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from benchmarks.control_scores import f1
from sat import CascadePipeline, Pipeline
from sat.apps.evaluate.classifier import Classifier, score
from sat.config.load import load
from sat.data.preprocess import Edges
from sat.pipeline import same_text
from sat.sampling.generator import EncodedPrompt, Generator
from sat.sampling.output import from_pil
from tests.configs import ROOT
from tests.training import rows

WEIGHTS = ROOT / "checkpoints"
PROMPTS = ["red apple", "lion", "rocket", "star"]


@pytest.mark.parametrize("config", ["tiny_cascade.yaml", "tiny_cascade_distill.yaml"])
def test_the_classifier_finds_in_the_cascades_pictures_what_was_asked_for(config: str) -> None:
    draw = CascadePipeline.from_config(ROOT / "configs" / config, device="cpu", keep_loaded=True)
    out = draw(PROMPTS, seed=0)
    assert {image.size for image in out.images} == {(128, 128)}
    found = score(out.images, PROMPTS, Classifier.load(WEIGHTS / "tiny_classifier"))
    assert not found.unknown and found.top1 >= 3 / 4, found.as_dict()


def test_stages_of_one_text_encoder_ask_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ROOT / "configs" / "tiny_cascade_distill.yaml"
    draw = CascadePipeline.from_config(config, device="cpu", keep_loaded=True)
    encode, asked = Generator.encode, list[list[str]]()

    def counted(self: Generator, texts: Sequence[str], negative: str = "") -> list[EncodedPrompt]:
        asked.append([*texts])
        return encode(self, texts, negative)

    monkeypatch.setattr(Generator, "encode", counted)
    once = draw(PROMPTS[:2], seed=0)
    assert asked == [PROMPTS[:2]]
    monkeypatch.setattr("sat.pipeline.same_text", lambda one, other: False)
    twice = draw(PROMPTS[:2], seed=0)
    assert asked == [PROMPTS[:2]] * 3
    assert all(a.tobytes() == b.tobytes() for a, b in zip(once.images, twice.images, strict=True))


def test_text_encoders_are_the_same_where_all_that_makes_them_is() -> None:
    base, relay = (load([ROOT / "configs" / f"tiny_{name}.yaml"]) for name in ("base", "relay_distill"))
    assert same_text(base, relay)
    for words in (
        ["checkpoint.text=checkpoints/tiny/text.safetensors"],
        ["checkpoint.random=0"],
        ["sampling.dtype=bf16"],
        ["sampling.negative_prompt=grey"],
        ["conditioning.size.params.dim=32", "conditioning.tokenizer=checkpoints/tiny/tokenizer"],
        ["memory.text_encoder=cpu"],
    ):
        assert not same_text(base, load([ROOT / "configs" / "tiny_relay_distill.yaml"], words)), words


def test_the_classifier_finds_in_cogview4s_pictures_what_was_asked_for() -> None:
    """Its network and causal text encoder, with the autoencoder and the vocabulary of the small Plus."""
    draw = Pipeline.from_config(ROOT / "configs" / "tiny_cogview4.yaml", device="cpu")
    out = draw(PROMPTS, seed=0, steps=12)
    found = score(out.images, PROMPTS, Classifier.load(WEIGHTS / "tiny_classifier"))
    assert not found.unknown and found.top1 >= 3 / 4, found.as_dict()


def test_a_lora_of_convolutions_draws_the_small_base_in_one_step() -> None:
    words = [f"adapters.load=[{{path: {WEIGHTS / 'tiny_base_turbo'}}}]"]
    draw = Pipeline.from_config(ROOT / "configs" / "tiny_base.yaml", words, device="cpu")
    found = score(draw(PROMPTS, seed=0).images, PROMPTS, Classifier.load(WEIGHTS / "tiny_judge"))
    assert draw.experiment.sampling.steps == 1
    assert not found.unknown and found.top1 == 1, found.as_dict()


def test_a_budget_makes_its_weights_integers_and_it_draws_the_same_thing() -> None:
    words = ["memory.budget=19MB", "sampling.dtype=fp32"]
    draw = Pipeline.from_config(ROOT / "configs" / "tiny_cogview4.yaml", words, device="cpu")
    assert draw.experiment.memory.quantize.network == "int8"
    found = score(
        draw(["star"], seed=0, steps=12).images, ["star"], Classifier.load(WEIGHTS / "tiny_classifier")
    )
    assert found.top1 == 1


@pytest.mark.slow
def test_two_processes_train_from_a_cache_as_one_does(tmp_path: Path) -> None:
    """Text frozen and cached, the encoded empty prompt of dropped captions with it."""
    train = [
        "train.py", "--base", "configs/tiny_cogview4.yaml", "configs/sft.yaml", "parallel.device=cpu",
        "data.sources.0.path=data/emoji_sample", "data.height=64", "data.width=64", "data.workers=0",
        f"data.cache={tmp_path}/cache", "train.steps=2", "train.accumulate=1", "train.dtype=fp32",
        "train.objective.params.caption_dropout=0.5", "train.lr=1e-3", "train.warmup=0", "train.zero=1",
        "train.wandb=disabled", "train.activation_checkpointing=false", "train.log_every=1",
    ]  # fmt: skip
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        words = ["--standalone", f"--nproc_per_node={ranks}", *train, f"train.batch_size={4 // ranks}"]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words, "--output-dir", str(out)],
            cwd=ROOT, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in rows(out) if "loss" in row])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def size(*folders: Path) -> int:
    """Bytes of all files in ``folders``."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("model", "file"), [("tiny", "edges"), ("tiny_base", "base_edges")])
def test_the_controls_that_ship_draw_the_outlines_that_are_asked_for(
    model: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = Pipeline.from_config([ROOT / f"configs/{model}.yaml"], ["sampling.steps=10"], device="cpu")
    names = ("lion", "red-apple", "rocket", "automobile")
    files = [ROOT / f"data/emoji_sample/noto/{name}.png" for name in names]
    images = [ImageOps.mirror(Image.open(one).convert("RGB")) for one in files]  # as they never were seen
    prompts, edges = [name.replace("-", " ") for name in names], Edges()
    control = {"control": WEIGHTS / f"tiny_control/{file}.safetensors", "image": images, "preprocess": True}
    asked = [edges.edges(from_pil(image)) for image in images]

    def found(**more: object) -> float:
        drawn = [edges.edges(from_pil(image)) for image in pipe(prompts, seed=1, **more).images]
        return sum(f1(one, want) for one, want in zip(drawn, asked, strict=True)) / len(names)

    assert found(controls=[control]) > found() + 0.15
    assert "was trained on other weights" not in caplog.text


def test_weights_that_ship_stay_small() -> None:
    assert size(WEIGHTS) < 48e6
    assert size(WEIGHTS / "tiny_control") < 3e6
    assert size(WEIGHTS / "tiny_cogview4") < 5e6
