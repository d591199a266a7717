"""Relay and the cascade through sample.py on toy models: stages, folders, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sat import CascadePipeline, Pipeline
from sat.cli.sample import main
from sat.sampling.output import read_png_text
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT
from tests.sampling import Done, files, pixels

TOY = ROOT / "tests" / "assets" / "toy"
BASE, RELAY, CASCADE = TOY / "base.yaml", TOY / "relay.yaml", TOY / "cascade.yaml"


class Command:
    """sample.py with the toy's tokenizer."""

    def __init__(self, spiece: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.words, self.capsys = [f"conditioning.tokenizer={spiece}", "parallel.device=cpu"], capsys

    def __call__(self, bases: list[Path], *more: object) -> Done:
        self.capsys.readouterr()
        try:
            code = main(["--base", *map(str, bases), *self.words, *map(str, more)])
        except SystemExit as stop:
            code = int(str(stop.code))
        captured = self.capsys.readouterr()
        return Done(code, captured.out, captured.err)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture
def sample(spiece: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(spiece, capsys)


def test_the_cascade_is_its_stages_run_by_hand(sample: Command, tmp_path: Path) -> None:
    prompts = ("--prompt", "a cat", "--prompt", "a dog", "--batch-size", 2, "--seed", 3)
    done = sample([CASCADE], *prompts, "--output-dir", tmp_path / "whole", "cascade.keep=true")
    assert done.code == 0, done.err
    assert sample([DEBUG, BASE], *prompts, "--output-dir", tmp_path / "base").code == 0
    by_hand = sample(
        [DEBUG, BASE, RELAY], *prompts, "--output-dir", tmp_path / "relay",
        f"sampling.input_dir={tmp_path / 'base'}",
    )  # fmt: skip
    assert by_hand.code == 0, by_hand.err
    whole = files(tmp_path / "whole")
    base = {f"stages/base/{name}": data for name, data in files(tmp_path / "base").items()}
    assert whole == base | files(tmp_path / "relay")
    assert pixels(tmp_path / "whole" / "0_a_cat" / "000000001.png").shape == (64, 96, 3)


def test_pictures_between_the_stages_go_unless_they_are_asked_for(sample: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample([CASCADE], "--prompt", "a cat", "--output-dir", out).code == 0
    assert set(files(out)) == {"0_a_cat/000000000.png"}
    assert {p.name for p in (out / "stages" / "base").iterdir()} == {"resolved.yaml", "run.json"}
    assert json.loads((out / "stages" / "relay" / "run.json").read_text())["hooks"]


def test_a_cascade_repeats_from_what_it_wrote_and_resumes(sample: Command, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    prompts = ("--prompt", "a cat", "--prompt", "a dog")
    assert sample([CASCADE], *prompts, "--output-dir", out).code == 0
    assert sample([out / "resolved.yaml"], "--output-dir", again).code == 0
    assert files(out) == files(again)
    (out / "1_a_dog" / "000000000.png").unlink()
    kept = (out / "0_a_cat" / "000000000.png").stat().st_mtime_ns
    done = sample([CASCADE], *prompts, "--output-dir", out, "--resume")
    assert done.code == 0 and "1 file written" in done.err, done.err
    assert files(out) == files(again)
    assert (out / "0_a_cat" / "000000000.png").stat().st_mtime_ns == kept


def test_relay_takes_its_prompts_from_the_pictures(sample: Command, tmp_path: Path) -> None:
    assert sample([DEBUG, BASE], "--prompt", "a cat", "--output-dir", tmp_path / "base").code == 0
    done = sample(
        [DEBUG, BASE, RELAY], f"sampling.input_dir={tmp_path / 'base'}", "--output-dir", tmp_path / "r"
    )
    assert done.code == 0, done.err
    text = read_png_text(tmp_path / "r" / "0_a_cat" / "000000000.png")
    assert text is not None and text["prompt"] == "a cat" and text["size"] == "64x96"


def test_relay_starts_from_the_picture(sample: Command, tmp_path: Path) -> None:
    """With little noise left, the result is near the enlarged input; with another input it is another."""
    made = []
    for value in (30, 220):
        folder = tmp_path / f"in{value}" / "0_x"
        folder.mkdir(parents=True)
        Image.new("RGB", (48, 32), (value,) * 3).save(folder / "000000000.png")
        done = sample(
            [DEBUG, BASE, RELAY], "--prompt", "x", "--output-dir", tmp_path / f"out{value}",
            f"sampling.input_dir={tmp_path / f'in{value}'}",
        )  # fmt: skip
        assert done.code == 0, done.err
        made.append(pixels(tmp_path / f"out{value}" / "0_x" / "000000000.png"))
    assert np.abs(made[0] - made[1]).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "0_x" / "000000000.png").unlink(), "000000000.png is missing"),
        (
            lambda root: Image.new("RGB", (48, 48)).save(root / "0_x" / "000000000.png"),
            "is 48 x 48 (height x width), expected 32 x 48",
        ),
        (lambda root: (root / "0_x").rename(root / "x"), "holds no folder named INDEX_NAME"),
        (lambda root: (root / "0_x").rename(root / "4_x"), "no folder for prompt 0 (expected 0_NAME"),
    ],
)
def test_pictures_that_do_not_fit_end_the_run_before_a_weight_is_read(
    sample: Command, tmp_path: Path, change: object, message: str
) -> None:
    folder = tmp_path / "in" / "0_x"
    folder.mkdir(parents=True)
    Image.new("RGB", (48, 32)).save(folder / "000000000.png")
    change(tmp_path / "in")  # type: ignore[operator]
    done = sample(
        [DEBUG, BASE, RELAY], "--prompt", "x", "--output-dir", tmp_path / "out",
        f"sampling.input_dir={tmp_path / 'in'}",
    )  # fmt: skip
    assert done.code != 0 and message in done.err, done.err
    assert "loaded" not in done.err and len(done.err.strip().splitlines()) <= 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["began.json", "ended.json"]


def test_a_relay_without_pictures_and_pictures_without_relay_are_refused(
    sample: Command, tmp_path: Path
) -> None:
    done = sample([DEBUG, BASE, RELAY], "--prompt", "x", "--output-dir", tmp_path / "out")
    assert done.code == 2 and "sampling.input_dir: this model enlarges pictures: name the" in done.err
    done = sample(
        [DEBUG, BASE], "--prompt", "x", f"sampling.input_dir={tmp_path}", "--output-dir", tmp_path / "o"
    )
    assert done.code == 2 and "only a relay model enlarges pictures" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sampling.steps=501",), "501 steps do not fit the 500 of 1000 timesteps that relay covers"),
        (
            ("diffusion.process.params.mixins.relay.params.partial=300", "sampling.steps=1"),
            "1 steps do not fit the 300 of 1000 timesteps that relay covers",
        ),
        (("sampling.guider.target=sat.diffusion.guidance.Embedded",), "guidance_dim is null"),
        (("model.params.guidance_dim=16",), "takes the guidance strength as an input (guidance_dim)"),
        (("diffusion.schedule.params.spacing=karras",), "relay takes trailing or leading spacing"),
        (("sampling.tile=9",), "9 is not a multiple of 2 latent cells"),
    ],
)
def test_a_config_that_cannot_work_is_one_line(sample: Command, words: tuple[str, ...], message: str) -> None:
    done = sample([DEBUG, BASE, RELAY], "--prompt", "x", "--check", *words)
    assert done.code == 2 and message in done.err, done.err


def test_tiles_draw_what_is_larger_than_the_model_sees(sample: Command, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "0_x"
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "000000000.png")
    words = ("--prompt", "x", "--height", 128, "--width", 192, f"sampling.input_dir={tmp_path / 'in'}")
    whole = sample([DEBUG, BASE, RELAY], *words, "--output-dir", tmp_path / "a")
    tiled = sample(
        [DEBUG, BASE, RELAY],
        *words,
        "--output-dir",
        tmp_path / "b",
        "sampling.tile=8",
        "memory.decode_tile=8",
    )
    assert whole.code == tiled.code == 0, whole.err + tiled.err
    a, b = (pixels(tmp_path / name / "0_x" / "000000000.png") for name in "ab")
    assert a.shape == b.shape == (128, 192, 3) and (a != b).any()


def test_a_cascade_does_not_ask_for_prompts(sample: Command, tmp_path: Path) -> None:
    done = sample([CASCADE], "--output-dir", tmp_path / "out")
    assert done.code == 2 and "a cascade loads its stages one after the other: give --prompt" in done.err


def test_check_and_print_config_show_every_stage(sample: Command) -> None:
    done = sample([CASCADE], "--prompt", "x", "--check")
    assert done.code == 0 and "base: 1 prompt" in done.out and "relay: 1 prompt, 1 x 64 x 96" in done.out
    printed = list(yaml.safe_load_all(sample([CASCADE], "--prompt", "x", "--print-config").out))
    assert [document["sampling"]["height"] for document in printed] == [32, 64]


def test_the_python_face_draws_what_the_command_draws(sample: Command, spiece: Path, tmp_path: Path) -> None:
    assert sample([CASCADE], "--prompt", "a cat", "--seed", 2, "--output-dir", tmp_path / "out").code == 0
    draw = CascadePipeline.from_config(str(CASCADE), [f"conditioning.tokenizer={spiece}"], device="cpu")
    out = draw(["a cat"], seed=2)
    assert list(out.stages) == ["base", "relay"] and len(out.images) == 1
    # The command hands 8-bit pictures on, and so does this.
    assert np.array_equal(np.asarray(out.images[0]), pixels(tmp_path / "out" / "0_a_cat" / "000000000.png"))


def test_the_python_face_refuses_pictures_that_do_not_fit(spiece: Path) -> None:
    pipe = Pipeline.from_config([DEBUG, BASE, RELAY], [f"conditioning.tokenizer={spiece}"], device="cpu")
    small = Image.new("RGB", (48, 32))
    with pytest.raises(ValueError, match="1 images are given to enlarge, expected one for each of 2"):
        pipe(["a cat", "a dog"], images=[small])
    with pytest.raises(ValueError, match=r"an input picture is 48 x 32 .*, expected 32 x 48"):
        pipe("a cat", images=[small.rotate(90, expand=True)])
    with pytest.raises(ValueError, match="starts from low-resolution images: none are given"):
        pipe("a cat")


def test_relay_samples_over_the_plus_transformer(sample: Command, tmp_path: Path) -> None:
    """Zero-SNR schedule and v prediction under the same mixin; no original has it."""
    folder = tmp_path / "in" / "0_x"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 24), (200, 40, 40)).save(folder / "000000000.png")
    done = sample(
        [DEBUG], "--prompt", "x", f"sampling.input_dir={tmp_path / 'in'}", "--output-dir", tmp_path / "out",
        "diffusion.process.params.mixins={relay: {target: sat.mixins.relay.RelayNoise}}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert pixels(tmp_path / "out" / "0_x" / "000000000.png").shape == (48, 64, 3)
