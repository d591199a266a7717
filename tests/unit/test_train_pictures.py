"""Pictures drawn while a training runs: how often prompts are encoded, and where the encoder is meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sat.config.build import build_engine
from sat.config.load import load
from sat.parallel.launch import Mesh, launch
from sat.sampling.generator import Generator
from sat.train.pictures import Pictures
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT

SETTINGS = (
    f"data.sources=[{{path: {ROOT}/data/emoji_sample}}]", "data.validation=[]",
    "train.sample_prompts=[red, dog]",
    "sampling={height: 16, width: 32, steps: 1}", "checkpoint.first_stage=null", "parallel.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


def events(
    spiece: Path, monkeypatch: pytest.MonkeyPatch, out: Path, *overrides: str, learns: bool
) -> list[Any]:
    """What happens when two pictures are made ready, drawn, and drawn again."""
    experiment = load(
        [DEBUG, ROOT / "configs" / "tiny_train.yaml"],
        [*SETTINGS, f"conditioning.tokenizer={spiece}", *overrides],
    )
    runtime = launch("cpu")
    engine = build_engine(experiment, device="cpu", dtype=torch.float32, load_weights=False)
    happened: list[Any] = []
    encode, latents = Generator.encode, Generator.latents

    def watched(self: Generator, texts: Any, negative: str = "") -> Any:
        happened.append(("encode", list(texts)))
        return encode(self, texts, negative)

    monkeypatch.setattr(Generator, "encode", watched)
    monkeypatch.setattr(
        Generator, "latents", lambda self, *a, **k: (happened.append("draw"), latents(self, *a, **k))[1]
    )
    monkeypatch.setattr(
        engine.conditioner, "text_encoder_to", lambda device: happened.append(("text to", device.type))
    )
    pictures = Pictures(experiment, engine, runtime, Mesh(runtime), learns=learns)
    for step in ("1", "2"):
        pictures(out / step)
    assert len(list((out / "2").glob("0*.png"))) == 2
    return happened


ENCODE, AWAY = ("encode", ["red", "dog"]), ("text to", "cpu")


@pytest.mark.parametrize("kept", ["free", "cpu", "blocks"])
def test_a_text_encoder_that_is_not_kept_has_gone_before_pictures_are_drawn(
    spiece, monkeypatch, tmp_path, kept
) -> None:
    found = events(spiece, monkeypatch, tmp_path, f"memory.text_encoder={kept}", learns=False)
    assert found == [ENCODE, AWAY, "draw", "draw", AWAY, "draw", "draw"]


def test_prompts_are_encoded_once(spiece, monkeypatch, tmp_path) -> None:
    assert events(spiece, monkeypatch, tmp_path, learns=False) == [ENCODE, *["draw"] * 4]


def test_a_text_encoder_that_learns_encodes_each_time_and_stays(spiece, monkeypatch, tmp_path) -> None:
    found = events(spiece, monkeypatch, tmp_path, "memory.text_encoder=free", learns=True)
    assert found == [ENCODE, "draw", "draw"] * 2
