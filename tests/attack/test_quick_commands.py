"""Mistakes on the command line: each ends in one line that names it, with code 2 where it is the user's."""

from __future__ import annotations

import logging
import shlex
import signal
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from tests.configs import ROOT

TINY = f"--base {ROOT / 'configs/tiny.yaml'}"
LORA = f"{TINY} {ROOT / 'configs/lora.yaml'} {ROOT / 'configs/tiny_lora.yaml'}"
CASCADE = f"--base {ROOT / 'configs/tiny_cascade.yaml'}"
EDGES = ROOT / "checkpoints" / "tiny_control" / "edges.safetensors"
EMOJI = ROOT / "data" / "emoji_sample"
MISTAKES = [
    ("sample --prompt a red apple", 2, "unexpected argument 'red': put the prompt in quotes"),
    ("sample --promts x", 2, "unrecognized arguments: --promts; did you mean --prompt"),
    ("sample --base configs --prompt x", 2, "configs: is a folder"),
    ("sample --base config/tiny.yaml --prompt x", 2, "there is no such config; did you mean"),
    ("sample --base empty.yaml --prompt x", 2, "put a model file such as configs/tiny.yaml first"),
    ("sample --prompt-file empty.txt", 2, "holds no prompt: expected one per line"),
    ("sample --prompt-file rows.jsonl", 2, "rows.jsonl, line 1: not JSON"),
    ("sample --prompt x --lora nothere", 2, "--lora: adapters.load.0.path: there is no 'nothere'"),
    ("sample --prompt x --control no:a.png", 2, "--control: sampling.controls.0.path: there is no 'no'"),
    ("sample --prompt x --region no.png=cat", 2, "--region: sampling.regions.areas.0.mask: there is no"),
    ("sample --prompt x --strength 0.5", 2, "name one in sampling.init_image"),
    ("sample --prompt x --guidance nan", 2, "guidance scale is nan, expected a finite number"),
    ("sample --prompt x --output-dir file", 1, "cannot write to output folder file: File exists"),
    (f"sample --prompt x --lora {EDGES}", 2, "is a control, not an adapter: --control FILE:IMAGE"),
    ("sample --prompt x --output-dir ''", 2, "--output-dir: is empty"),
    ("sample --prompt x --init-image ''", 2, "--init-image: sampling.init_image: the path is empty"),
    (f"train {LORA} data.sources.0.path=", 2, "data.sources.0.path: expected path, got null"),
    ("sample --prompt x --grid guidance", 2, "--grid guidance: expected KEY=VALUE,VALUE or KEY=A..B"),
    ("sample --prompt x --grid guidance=a,b", 2, "--grid guidance: expected numbers, got a, b"),
    ("sample --prompt x --grid seed=3..1", 2, "--grid seed=3..1: expected the lower end first"),
    ("sample --prompt x --grid seed=0..100000", 2, "at most 400 values"),
    ("sample --prompt x --grid steps=0,2", 2, "--grid: sampling.steps: expected 1 to 1000 steps, got 0"),
    ("sample --prompt x --grid lora=0,1", 2, "--grid lora: strengths of --lora, of which there is none"),
    ("sample --prompt x --grid nothing=1,2", 2, "--grid: 'nothing' names no key"),
    (f"train {LORA} --output-dir file", 1, "file: File exists"),
    ("convert file out --to native", 2, "file: is no file of weights"),
    ("convert x.safetensors out --to native", 2, "does not say which part it holds; name it with --only"),
    ("prepare inspect empty", 2, "no pair of picture and caption that can be used"),
    (f"prepare inspect {EMOJI} --height -3", 2, "--height -3: expected at least 1"),
    (f"prepare inspect {EMOJI} --sheet a.xyz", 2, "--sheet a.xyz: expected a file that ends in .png"),
    (f"prepare inspect {EMOJI} --sheet file/a.png", 2, "--sheet: cannot make the folder file"),
    (f"prepare inspect {EMOJI} --tokenizer file", 2, "file: is no sentencepiece model"),
    (f"prepare tokenizer --captions {EMOJI} --vocab 3 --out t.model", 2, "--vocab 3: the captions need"),
    ("prepare emoji --out e --concepts nothere", 2, "--concepts 'nothere': expected 'all', 'core' or a file"),
    ("prepare emoji --out file", 2, "--out: cannot make the folder file"),
    (f"prepare prior {TINY} --prompt '' --out p", 2, "--prompt '': is empty"),
    (f"prepare cache {LORA} --cache file", 2, "--cache: cannot make the folder file"),
    ("evaluate --images nothere --out e", 2, "nothere: no such folder of images"),
    ("evaluate", 2, "evaluate run: error: the following arguments are required: --out"),
    ("evaluate retrieval --images one", 2, "one: no images with a caption"),
    ("evaluate retrieval --images one --classifier nothere", 2, "nothere: no classifier.safetensors"),
    ("evaluate sheet --images one --out s.xyz", 2, "--out s.xyz: expected a file that ends in .png"),
    ("evaluate sheet --images one --out s.png --columns 0", 2, "--columns 0: expected 1 to 1000"),
    (f"evaluate train-classifier --data {EMOJI} --out c --lr nan", 2, "--lr nan: expected a number above 0"),
    (f"plot attention {TINY} --prompt '' --out s.png", 2, "--prompt: is empty"),
    ("plot one --out x.gif", 2, "--out x.gif: expected a file that ends in .png, .svg, .pdf, .html"),
    ("plot runs", 2, "plot runs: error: the following arguments are required: RUN"),
    (f"plot steps {TINY} --prompt x --out s.xyz", 2, "--out s.xyz: expected a file that ends in .png"),
    (f"plot steps {CASCADE} --prompt x --out s.png", 2, "name the config of one stage here"),
    ("prompt --prompt x --dry-run --output file/y", 2, "--output: cannot make the folder file"),
    ("prompt --prompt x --api_key k --base_url notaurl", 1, "the server's address is 'notaurl'"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file, an empty folder, and files without content."""
    for name in ("empty.txt", "empty.yaml"):
        (tmp_path / name).write_text("")
    for name in ("file", "x.safetensors", "rows.jsonl"):
        (tmp_path / name).write_text("a line\n")
    for name in ("empty", "one", "configs"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "one" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    yield tmp_path
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


@pytest.mark.parametrize(("line", "code", "said"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_is_told_in_a_line_and_draws_nothing(
    line: str, code: int, said: str, folder: Path, capsys
) -> None:
    command, *words = shlex.split(line)
    try:
        got = import_module(f"sat.cli.{command}").main(words)
    except SystemExit as end:
        got = end.code
    err = capsys.readouterr().err
    assert got == code, err
    assert said in err and "Traceback" not in err and "--debug" not in err, err
    assert not list(folder.glob("outputs*/**/*.png"))


@pytest.mark.parametrize(
    ("model", "address"),
    [
        ("plus", "https://huggingface.co/THUDM/CogView3-Plus-3B"),
        ("cogview4", "https://huggingface.co/THUDM/CogView4-6B"),
        ("relay", "https://cloud.tsinghua.edu.cn/d/134951acced949c1a9e1"),
    ],
)
def test_absent_official_weights_are_told_with_their_address(model, address, folder, capsys) -> None:
    words = ["--base", str(ROOT / f"configs/{model}.yaml"), "--prompt", "x"]
    assert import_module("sat.cli.sample").main(words) == 2
    err = capsys.readouterr().err
    assert f"there is no 'weights/{model}'; download {address}" in err
    assert all(address in (ROOT / page).read_text("utf-8") for page in ("README.md", "docs/checkpoints.md"))


def test_a_negative_prompt_without_guidance_is_told(folder, capsys) -> None:
    words = [
        *shlex.split(TINY),
        "--prompt",
        "x",
        "--negative-prompt",
        "blue",
        "--guidance",
        "1",
        "--steps",
        "1",
    ]
    assert import_module("sat.cli.sample").main(words) == 0
    assert "warning: the negative prompt has no effect" in capsys.readouterr().err
