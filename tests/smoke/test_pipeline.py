"""The Python face: the same pictures as the command, its arguments, its refusals."""

from __future__ import annotations

import inspect
import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sat
from sat.config.yaml_source import ConfigError
from sat.sampling.generator import SamplingParams, image_noise
from sat.sampling.prompts import Prompt
from tests.checkpoints import tokenizer
from tests.sampling import DEBUG, Command, pixels

SHAPE = (4, 6, 8)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture(scope="module")
def pipe(spiece) -> sat.Pipeline:
    return sat.Pipeline.from_config([DEBUG], [f"conditioning.tokenizer={spiece}"], device="cpu", dtype="fp32")


def test_the_signature_is_the_documented_one() -> None:
    call = inspect.signature(sat.Pipeline.__call__).parameters
    assert list(call)[1:] == [
        "prompts", "seed", "height", "width", "steps", "guidance",
        "negative_prompt", "batch_size", "latents", "callback", "images",
        "controls", "image", "mask", "strength_map", "strength", "edits", "regions", "encoded",
    ]  # fmt: skip
    assert all(p.kind is p.KEYWORD_ONLY for name, p in call.items() if name not in ("self", "prompts"))
    assert list(inspect.signature(sat.Pipeline.from_config).parameters) == [
        "bases",
        "overrides",
        "device",
        "dtype",
    ]


def test_encoded_prompts_are_one_for_each_and_hold_the_negative_one(pipe: sat.Pipeline) -> None:
    words = ["a", "b"]
    held = pipe.encode(words, "c")
    drawn, plain = pipe(words, encoded=held, steps=1), pipe(words, negative_prompt="c", steps=1)
    assert [one.tobytes() for one in drawn.images] == [one.tobytes() for one in plain.images]
    with pytest.raises(ValueError, match="2 encoded prompts are given for 1 prompts"):
        pipe("a", encoded=held, steps=1)
    with pytest.raises(ValueError, match="beside `encoded`"):
        pipe(words, encoded=held, negative_prompt="c", steps=1)


def test_pictures_are_those_of_the_command(pipe, spiece, tmp_path, capsys) -> None:
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    words = ("--prompt", "a dog", "--prompt", "the sun", "--batch-size", 2, "--seed", 3, "--guidance", 2)
    done = Command(spiece, capsys)(*words, "--height", 32, "--steps", 3, "--output-dir", tmp_path)
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)
    assert done.code == 0, done.err
    out = pipe(["a dog", "the sun"], seed=3, batch_size=2, height=32, steps=3, guidance=2.0)
    assert out.latents.shape == (4, 4, 4, 8)
    assert out.latents.dtype == torch.float32
    for image, path in zip(out.images, sorted(tmp_path.rglob("0000*.png")), strict=True):
        assert image.size == (64, 32)
        assert (np.asarray(image) == pixels(path)).all()


def test_one_prompt_may_be_given_as_text(pipe) -> None:
    assert torch.equal(pipe("a dog").latents, pipe(["a dog"], seed=0, negative_prompt="").latents)


def test_image_i_is_that_of_the_seed_plus_i_to_the_last_bit(pipe) -> None:
    whole = pipe(["a dog", "the sun"], seed=3, batch_size=3).latents
    assert torch.equal(whole[5:6], pipe(["the sun"], seed=5).latents)
    assert not torch.equal(whole[4], whole[5])


def test_latents_replace_the_noise_and_are_not_written_to(pipe) -> None:
    noise = torch.stack([image_noise(3, i, SHAPE) for i in range(2)])
    before = noise.clone()
    assert torch.equal(
        pipe(["a dog"], batch_size=2, latents=noise).latents, pipe("a dog", seed=3, batch_size=2).latents
    )
    assert torch.equal(noise, before)
    each = pipe(["a dog", "the sun"], latents=noise).latents
    assert torch.equal(each[1:], pipe("the sun", seed=4).latents)


def test_the_callback_sees_every_step_of_every_image(pipe) -> None:
    seen = []
    pipe(
        ["a dog", "the sun"],
        batch_size=2,
        steps=3,
        callback=lambda i, n, z: seen.append((i, n, tuple(z.shape))),
    )
    assert seen == [(i, 12, (1, *SHAPE)) for i in range(1, 13)]


def test_pictures_come_one_by_one_as_they_are_drawn(pipe) -> None:
    steps: list[int] = []
    params = SamplingParams.of(pipe.experiment.sampling, pipe.guider)
    requests = [(Prompt(0, "a dog"), [0, 1]), (Prompt(1, "the sun"), [1])]
    drawn = pipe.generator.generate(requests, params, callback=lambda step, total, _: steps.append(total))
    first = next(drawn)
    assert (first.prompt.index, first.index) == (0, 0) and steps == [12] * 4  # of 3 pictures, 4 steps each
    assert [(picture.prompt.text, picture.index) for picture in drawn] == [("a dog", 1), ("the sun", 1)]
    assert first.image is not None and first.image.size == (64, 48) and first.latents.shape == SHAPE


def test_an_error_of_the_callback_ends_the_run(pipe) -> None:
    def cancel(step: int, total: int, preview: torch.Tensor) -> None:
        if step == 5:
            raise InterruptedError

    params = SamplingParams.of(pipe.experiment.sampling, pipe.guider)
    drawn = pipe.generator.generate([(Prompt(0, "a dog"), [0, 1])], params, callback=cancel)
    assert next(drawn).index == 0
    with pytest.raises(InterruptedError):
        next(drawn)


def test_pictures_to_enlarge_are_refused_by_a_model_that_starts_from_noise(pipe) -> None:
    with pytest.raises(ValueError, match="this model draws from noise alone"):
        pipe("a dog", images=[Image.new("RGB", (32, 24))])


def test_guidance_of_one_call_does_not_stay(pipe) -> None:
    before = pipe("a dog").latents
    other = pipe("a dog", guidance=1.0).latents
    assert not torch.equal(before, other)
    assert torch.equal(pipe("a dog").latents, before)


def test_a_negative_prompt_is_used(pipe) -> None:
    assert not torch.equal(pipe("a dog", negative_prompt="the sun").latents, pipe("a dog").latents)


def test_the_size_vector_is_that_of_an_uncropped_picture_height_first(pipe) -> None:
    (encoded,) = pipe.generator.encode(["a dog"])
    cond, uncond = pipe.generator.condition(encoded, 32, 64, batch=2)
    size, corner = torch.tensor([[32, 64]] * 2), torch.zeros(2, 2)
    assert torch.equal(cond.vector, pipe.generator.engine.conditioner.size(size, corner, size))
    assert torch.equal(uncond.vector, cond.vector)
    assert not uncond.text.any()
    assert cond.text.any()


def test_dtypes_may_be_named_or_given(spiece) -> None:
    for dtype in ("bf16", torch.bfloat16):
        pipe = sat.Pipeline.from_config(DEBUG, [("conditioning.tokenizer", str(spiece))], "cpu", dtype)
        assert next(pipe.generator.engine.network.parameters()).dtype == torch.bfloat16
        assert pipe.experiment.sampling.dtype == "bf16"
        assert pipe("a dog").latents.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 40}, "height 40 is not a multiple of 16.*nearest size is 48 x 64"),
        ({"steps": 0}, "expected 1 to 1000 steps, got 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32 - 1, "batch_size": 2}, r"image i uses seed \+ i"),
        ({"batch_size": 0}, "batch_size"),
        ({"latents": torch.zeros(1, 4, 8, 6)}, r"shape \(1, 4, 8, 6\): expected 1 images"),
        ({"prompts": []}, "no prompt: give at least one"),
        ({"prompts": "\udce9"}, "prompt 0 is not valid UTF-8"),
        ({"negative_prompt": "\udce9"}, "negative prompt is not valid UTF-8"),
    ],
)
def test_impossible_arguments_are_refused(pipe, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompts": "a dog"} | arguments))


def test_guidance_without_a_strength_to_set_is_refused(spiece) -> None:
    changes = [f"conditioning.tokenizer={spiece}", "sampling.guider.target=sat.diffusion.guidance.Unguided"]
    pipe = sat.Pipeline.from_config([DEBUG], changes, device="cpu")
    with pytest.raises(ValueError, match="guidance 3 is asked for, but Unguided has no strength to set"):
        pipe("a dog", guidance=3)


def test_an_unknown_dtype_or_config_is_refused(spiece) -> None:
    with pytest.raises(ValueError, match="dtype is 'float99': expected fp32, bf16, fp16"):
        sat.Pipeline.from_config([DEBUG], dtype="float99")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gone.yaml"):
        sat.Pipeline.from_config(["gone.yaml"])


def test_a_freed_encoder_says_so_at_the_second_call(spiece) -> None:
    changes = [f"conditioning.tokenizer={spiece}", "memory.text_encoder=free"]
    pipe = sat.Pipeline.from_config([DEBUG], changes, device="cpu")
    pipe("a dog")
    with pytest.raises(RuntimeError, match="memory.text_encoder"):
        pipe("the sun")
