"""sample.py on the toy model: what it writes, independence of pictures, resuming, refusals."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sat.cli.sample import main
from sat.config.load import load
from sat.pipeline import Pipeline
from sat.sampling.generator import image_noise
from sat.sampling.output import OutputFolder, read_png_text
from tests.checkpoints import tokenizer
from tests.sampling import ROOT, Command, files, pixels

PROMPTS = ("a red apple", "a blue car", "the sun")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture
def sample(spiece, capsys):
    root, term = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers = list(root.handlers)
    yield Command(spiece, capsys)
    root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


@pytest.fixture
def three(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_a_run_writes_pictures_grid_config_and_record(sample, tmp_path) -> None:
    out = tmp_path / "out"
    done = sample(
        "--prompt", PROMPTS[0], "--batch-size", 2, "--output-dir", out, "--guidance", 3, "--seed", 5
    )
    assert done.code == 0, done.err
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "0_a_red_apple/000000000.png",
        "0_a_red_apple/000000001.png",
        "0_a_red_apple/grid.png",
        "began.json",
        "ended.json",
        "resolved.yaml",
        "run.json",
    ]
    assert done.out.splitlines()[0] == str(out / "0_a_red_apple" / "000000000.png")
    text = read_png_text(out / "0_a_red_apple" / "000000001.png")
    assert text is not None
    assert {k: text[k] for k in ("prompt", "seed", "size", "steps", "guidance", "model")} == {
        "prompt": PROMPTS[0],
        "seed": "6",
        "size": "48x64",
        "steps": "4",
        "guidance": "3",
        "model": "CogView3Plus",
    }
    record = json.loads((out / "run.json").read_text())
    assert record["seeds"] == {"sampling": 5}
    assert record["world"] == 1


def test_the_toy_model_with_rotary_positions_draws_another_picture(sample, tmp_path) -> None:
    for name, more in (("table", []), ("rope", ["--base", ROOT / "configs" / "debug_rope.yaml"])):
        done = sample(*more, "--prompt", "a dog", "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
    table, rope = (pixels(tmp_path / name / "0_a_dog" / "000000000.png") for name in ("table", "rope"))
    assert abs(table - rope).max() > 0


def test_height_and_width_mean_what_they_say(sample, tmp_path) -> None:
    done = sample("--prompt", "a dog", "--height", 32, "--width", 64, "--output-dir", tmp_path)
    assert done.code == 0, done.err
    with Image.open(tmp_path / "0_a_dog" / "000000000.png") as image:
        assert (image.height, image.width) == (32, 64)


def test_a_picture_does_not_depend_on_the_other_pictures_of_the_run(sample, tmp_path, three) -> None:
    assert sample("--prompt-file", three, "--batch-size", 3, "--output-dir", tmp_path / "all").code == 0
    backwards = [word for prompt in reversed(PROMPTS) for word in ("--prompt", prompt)]
    assert sample(*backwards, "--output-dir", tmp_path / "back").code == 0
    assert sample("--prompt", PROMPTS[1], "--seed", 2, "--output-dir", tmp_path / "one").code == 0
    whole, back, one = (tmp_path / name for name in ("all", "back", "one"))
    for i, name in enumerate(("a_red_apple", "a_blue_car", "the_sun")):
        first = (whole / f"{i}_{name}" / "000000000.png").read_bytes()
        assert (back / f"{2 - i}_{name}" / "000000000.png").read_bytes() == first
    third = whole / "1_a_blue_car" / "000000002.png"
    assert (pixels(one / "0_a_blue_car" / "000000000.png") == pixels(third)).all()
    assert (pixels(whole / "1_a_blue_car" / "000000000.png") != pixels(third)).any()
    assert (pixels(whole / "0_a_red_apple" / "000000002.png") != pixels(third)).any()


def test_images_drawn_together_differ_by_rounding_only(sample, tmp_path) -> None:
    assert sample("--prompt", "a dog", "--batch-size", 3, "--output-dir", tmp_path / "a").code == 0
    assert (
        sample(
            "--prompt", "a dog", "--batch-size", 3, "sampling.at_once=2", "--output-dir", tmp_path / "b"
        ).code
        == 0
    )
    for i in range(3):
        name = f"0_a_dog/{i:09d}.png"
        assert abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "b" / name)).max() <= 1


def test_the_resolved_config_repeats_the_run(sample, tmp_path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    prompt = "costs ${5}: 'q' # no comment\n🍎"
    assert (
        sample("--prompt", prompt, "--negative-prompt", "a: [b]", "--output-dir", first, "--resume").code == 0
    )
    assert load([first / "resolved.yaml"]).output.resume is False
    assert main(["--base", str(first / "resolved.yaml"), "--output-dir", str(again)]) == 0
    assert files(first) == files(again) != {}
    assert read_png_text(next(again.rglob("0*.png")))["prompt"] == prompt


def test_resume_draws_only_what_is_not_there(sample, tmp_path, three) -> None:
    arguments = ("--prompt-file", three, "--batch-size", 2, "--output-dir", tmp_path / "out")
    assert sample(*arguments).code == 0
    whole = files(tmp_path / "out")
    damaged = tmp_path / "out" / "1_a_blue_car" / "000000001.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "out" / "2_the_sun" / "grid.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("0*.png")}
    done = sample(*arguments, "--resume")
    assert done.code == 0
    assert "1 of 3 prompts are finished already" in done.err
    assert files(tmp_path / "out") == whole
    assert [p for p, time in before.items() if p.stat().st_mtime_ns != time] == [damaged]


def test_resume_of_a_resolved_config_continues_in_its_folder(sample, tmp_path, monkeypatch) -> None:
    assert sample("--prompt", "a dog", "--output-dir", tmp_path / "out").code == 0
    before = files(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert main(["--base", str(tmp_path / "out" / "resolved.yaml"), "--resume"]) == 0
    assert files(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_written_ends_the_run_before_a_weight_is_read(sample, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    done = sample("--prompt", "a dog", "--output-dir", tmp_path / "file")
    assert done.code == 1 and "cannot write to output folder" in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err


def test_resume_without_a_folder_continues_the_default_one(sample, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample("--prompt", "a dog").code == 0
    done = sample("--prompt", "a dog", "--resume")
    assert done.code == 0
    assert "1 of 1 prompts are finished already" in done.err


def test_resume_with_other_settings_draws_everything_again(sample, tmp_path) -> None:
    assert sample("--prompt", "a dog", "--output-dir", tmp_path).code == 0
    before = files(tmp_path)
    done = sample("--prompt", "a dog", "--output-dir", tmp_path, "--resume", "--steps", 5)
    assert "finished already" not in done.err
    assert files(tmp_path) != before


def test_an_interrupted_run_leaves_whole_files_and_continues(sample, tmp_path, three, monkeypatch) -> None:
    arguments = ("--prompt-file", three, "--batch-size", 2)
    assert sample(*arguments, "--output-dir", tmp_path / "whole").code == 0
    write, count = OutputFolder.write_image, 0

    def interrupted(self, *given):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return write(self, *given)

    monkeypatch.setattr(OutputFolder, "write_image", interrupted)
    done = sample(*arguments, "--output-dir", tmp_path / "cut")
    assert done.code == 130
    assert done.err.endswith("stopped by Ctrl-C; run the same command with --resume to draw the rest\n")
    assert list(files(tmp_path / "cut")) == [
        "0_a_red_apple/000000000.png",
        "0_a_red_apple/000000001.png",
        "0_a_red_apple/grid.png",
        "1_a_blue_car/000000000.png",
    ]
    monkeypatch.undo()
    assert sample(*arguments, "--output-dir", tmp_path / "cut", "--resume").code == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_shares_draw_the_files_of_one_run_between_them(sample, tmp_path, three) -> None:
    arguments = ("--prompt-file", three, "--batch-size", 2)
    assert sample(*arguments, "--output-dir", tmp_path / "whole").code == 0
    for share, count in (("0/2", 6), ("1/2", 3)):
        done = sample(*arguments, f"sampling.share={share}", "--output-dir", tmp_path / "shares")
        assert done.code == 0, done.err
        assert f"{count} files written" in done.err
        assert "of another run" not in done.err
    assert files(tmp_path / "shares") == files(tmp_path / "whole")
    ends = sorted(path.name for path in (tmp_path / "shares").glob("ended*"))
    assert ends == ["ended-0-of-2.json", "ended-1-of-2.json"], "each share has its own"
    assert load([tmp_path / "shares" / "resolved.yaml"]).sampling.share is None


def test_a_share_may_be_empty(sample, tmp_path, three) -> None:
    for name, more in {"keep": (), "free": ("memory.text_encoder=free",)}.items():
        words = ("--prompt-file", three, "sampling.share=4/5", "--output-dir", tmp_path / name, *more)
        done = sample(*words)
        assert done.code == 0, done.err
        assert files(tmp_path / name) == {}
    checked = sample("--prompt-file", three, "sampling.share=1/2", "--check")
    assert checked.out.startswith("config ok: 1 of 3 prompts, ")


def test_another_runs_folders_are_named(sample, tmp_path) -> None:
    assert sample("--prompt", "a dog", "--output-dir", tmp_path).code == 0
    done = sample("--prompt", "a cat", "--output-dir", tmp_path, "--overwrite")
    assert "warning: " in done.err
    assert "holds 1 prompt folders of another run, such as 0_a_dog" in done.err


def test_a_fresh_run_replaces_no_picture_and_an_interrupted_one_is_found_again(sample, tmp_path) -> None:
    out, second, third = (tmp_path / name for name in ("out", "out-2", "out-3"))
    one = ("--prompt", "a dog", "--output-dir", out)
    assert sample(*one).code == 0
    before = files(out)
    done = sample(*one, "--seed", 7)
    assert done.code == 0 and f"goes to {second}" in done.err and done.out.startswith(str(second))
    done = sample(*one)
    assert done.out.startswith(str(third)) and files(third) == before == files(out)
    (second / "0_a_dog/000000000.png").unlink()  # as if it had been stopped
    done = sample(*one, "--seed", 7, "--resume")
    assert done.out.startswith(str(second)) and len(files(second)) == 1 and files(third) == before
    done = sample(*one, "--seed", 8, "--overwrite")
    assert done.out.startswith(str(out)) and files(out) != before
    done = sample(*one, "--overwrite", "--resume")
    assert done.code == 2 and "give one of them" in done.err


def test_shares_and_a_job_queued_again_go_on_where_they_began(sample, tmp_path, three, monkeypatch) -> None:
    out, second = tmp_path / "out", tmp_path / "out-2"
    assert sample("--prompt", "a dog", "--output-dir", out).code == 0
    for part in (1, 0):
        done = sample("--prompt-file", three, "--output-dir", out, f"sampling.share={part}/2")
        assert done.code == 0, done.err
    assert len(files(second)) == 3 and len(files(out)) == 1
    (second / "began.json").replace(tmp_path / "kept")
    done = sample("--prompt-file", three, "--output-dir", out, "sampling.share=0/2", "--check-inputs")
    assert f"run folder: {tmp_path / 'out-3'}" in done.out  # as the job script reads it
    (tmp_path / "kept").replace(second / "began.json")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    done = sample("--prompt-file", three, "--output-dir", out)
    assert done.code == 0 and "3 of 3 prompts are finished already" in done.err
    assert not (tmp_path / "out-3").exists()


@pytest.mark.parametrize("where", ["free", "cpu"])
def test_freeing_the_text_encoder_changes_no_picture(sample, tmp_path, three, where) -> None:
    arguments = ("--prompt-file", three, "--negative-prompt", "a dog")
    assert sample(*arguments, "--output-dir", tmp_path / "keep").code == 0
    assert sample(*arguments, f"memory.text_encoder={where}", "--output-dir", tmp_path / where).code == 0
    assert files(tmp_path / "keep") == files(tmp_path / where)


def test_a_negative_prompt_works_and_an_empty_one_is_none(sample, tmp_path) -> None:
    picture = "0_a_dog/000000000.png"
    for name, words in {
        "no": (),
        "empty": ("--negative-prompt", ""),
        "dog": ("--negative-prompt", "a dog"),
    }.items():
        assert sample("--prompt", "a dog", *words, "--output-dir", tmp_path / name).code == 0
    assert (pixels(tmp_path / "no" / picture) == pixels(tmp_path / "empty" / picture)).all()
    assert (pixels(tmp_path / "no" / picture) != pixels(tmp_path / "dog" / picture)).any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_draws_nearly_the_same(sample, tmp_path, dtype: str) -> None:
    assert sample("--prompt", "a dog", "--output-dir", tmp_path / "a").code == 0
    done = sample("--prompt", "a dog", f"sampling.dtype={dtype}", "--output-dir", tmp_path / "b")
    assert done.code == 0, done.err
    picture = "0_a_dog/000000000.png"
    assert abs(pixels(tmp_path / "a" / picture) - pixels(tmp_path / "b" / picture)).mean() < 4


def test_initial_latents_replace_the_seeds_noise(sample, tmp_path) -> None:
    noise = torch.stack([image_noise(7, i, (4, 6, 8)) for i in range(2)])
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    torch.save(noise.double(), tmp_path / "noise.pt")
    arguments = ("--prompt", "a dog", "--prompt", "a dog", "--batch-size", 2)
    assert sample(*arguments, "--seed", 7, "--output-dir", tmp_path / "seed").code == 0
    for kind in ("safetensors", "pt"):
        given = (f"sampling.latents={tmp_path / f'noise.{kind}'}", "--output-dir", tmp_path / kind)
        assert sample(*arguments, *given).code == 0
        for name in files(tmp_path / "seed"):
            assert (pixels(tmp_path / kind / name) == pixels(tmp_path / "seed" / name)).all()


def test_latents_of_another_size_are_refused(sample, tmp_path) -> None:
    save_file({"latents": torch.zeros(1, 4, 8, 6)}, tmp_path / "noise.safetensors")
    done = sample(
        "--prompt", "a dog", f"sampling.latents={tmp_path / 'noise.safetensors'}", "--output-dir", tmp_path
    )
    assert done.code == 2
    assert "shape (1, 4, 8, 6): expected 1 images of (C, h, w) = (4, 6, 8)" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a dog", "--height", "40"], "height 40 is not a multiple of 16"),
        (["--prompt", "a dog", "--height", "40"], "The nearest size is 48 x 64"),
        (["--prompt", "a dog", "--width", "128"], "width 128 is not between 16 and 64"),
        (["--prompt-file", "gone.txt"], "gone.txt"),
        (["--prompt", "caf\udce9"], "prompt 0 is not valid UTF-8"),
        (["--prompt", "a dog", "--negative-prompt", "\udce9"], "the negative prompt is not valid UTF-8"),
        (["sampling.prompt=[]"], "give at least one prompt"),
        (["--prompt", "a dog", "sampling.share=2/2"], "sampling.share: expected K/N with K from 0 to N - 1"),
        (["sampling.share=0/2"], "sampling.share is a share of given prompts: give --prompt-file"),
        (["--prompt", "a dog", "--batch-size", "0"], "batch_size"),
        (["--prompt", "a dog", "--seed", "-1"], "seed"),
        (["--prompt", "a dog", "--seed", str(2**32 - 1), "--batch-size", "2"], "image i uses seed + i"),
        (["--prompt", "a dog", "--steps", "0"], "expected 1 to 1000 steps, got 0"),
        (["--prompt", "a dog", "sampling.stebs=3"], "did you mean 'sampling.steps'"),
        ([], "no prompt: give --prompt or --prompt-file"),
    ],
)
def test_impossible_wishes_end_with_code_2_and_the_reason(sample, tmp_path, words, message: str) -> None:
    done = sample(*words, "--output-dir", tmp_path / "out")
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_check_validates_and_writes_nothing(sample, tmp_path, three) -> None:
    done = sample("--prompt-file", three, "--check", "--output-dir", tmp_path / "out")
    assert done == (0, "config ok: 3 prompts, 1 x 48 x 64 (images x height x width), 4 steps, fp32\n", "")
    assert not (tmp_path / "out").exists()
    three.write_bytes(b"\xff")
    assert sample("--prompt-file", three, "--check").code == 2


def test_missing_weights_pass_the_check_with_a_note_and_fail_the_run(sample, tmp_path) -> None:
    path = f"checkpoint.path={tmp_path / 'gone'}"
    done = sample("--prompt", "a dog", path, "--check")
    assert done.code == 0
    assert "note: " in done.out
    assert "gone" in done.out
    done = sample("--prompt", "a dog", path, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert "gone" in done.err


def test_print_config_is_the_whole_config(sample, tmp_path) -> None:
    done = sample("--prompt", "a dog", "--print-config", "--seed", 3)
    assert done.code == 0
    (tmp_path / "a.yaml").write_text(done.out)
    assert sample("--base", tmp_path / "a.yaml", "--print-config").out == done.out
    assert "seed: 3" in done.out


def test_a_folder_that_cannot_be_written_fails_before_drawing(sample, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    done = sample("--prompt", "a dog", "--output-dir", tmp_path / "file")
    assert done.code == 1
    assert f"error: cannot write to output folder {tmp_path / 'file'}" in done.err
    assert len(done.err.strip().splitlines()) == 1


class _Terminal:
    def isatty(self) -> bool:
        return True


def test_without_a_prompt_a_terminal_is_asked_until_end_of_file(sample, tmp_path, monkeypatch) -> None:
    loaded = []
    opened = Pipeline.open
    monkeypatch.setattr(Pipeline, "open", lambda *a, **k: loaded.append(a) or opened(*a, **k))
    answers = iter(["a red apple", "  ", "bad \udce9", "the sun"])

    def answer(question: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin", _Terminal())
    (tmp_path / "4_of_another_day").mkdir()
    done = sample("--output-dir", tmp_path, "memory.text_encoder=free")
    assert done.code == 0, done.err
    assert sorted(files(tmp_path)) == ["5_a_red_apple/000000000.png", "6_the_sun/000000000.png"]
    assert "error: the prompt is not valid UTF-8" in done.err
    assert "memory.text_encoder is cpu instead of free" in done.err
    assert len(loaded) == 1


def test_a_prompt_over_the_limit_names_the_dropped_words(sample, tmp_path) -> None:
    done = sample("--prompt", "a red apple " + "and a blue car " * 20 + "zebra", "--output-dir", tmp_path)
    assert done.code == 0
    assert "warning: " in done.err
    assert "zebra" in done.err


def test_a_prompt_the_encoder_does_not_know_is_warned_about(sample, tmp_path) -> None:
    done = sample("--prompt", "一个红苹果", "--output-dir", tmp_path)
    assert done.code == 0
    assert "translate" in done.err


def test_a_non_finite_latent_stops_the_run_with_step_and_dtype(sample, tmp_path, monkeypatch) -> None:
    opened = Pipeline.open

    def poisoned(*given, **more):
        pipeline = opened(*given, **more)
        with torch.no_grad():
            next(pipeline.generator.engine.network.parameters()).fill_(float("nan"))
        return pipeline

    monkeypatch.setattr(Pipeline, "open", poisoned)
    done = sample("--prompt", "a dog", "--output-dir", tmp_path)
    assert done.code == 1
    assert "error: the latent is not finite at step 1 (timestep 999, float32)" in done.err
    assert len(done.err.strip().splitlines()) == 2  # the loading line and the error
    assert files(tmp_path) == {}
