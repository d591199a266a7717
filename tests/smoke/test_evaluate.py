"""``evaluate`` from prompts to report, on the toy model: drawing, going on, comparing, refusals."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from sat.apps.evaluate import metrics
from sat.cli.evaluate import main
from sat.sampling.output import read_png_text
from tests.checkpoints import tokenizer
from tests.sampling import DEBUG, ROOT, Done, files
from tests.unit.test_control_files import written

PROMPTS = "Prompts,Category\na red apple,Fruit\nthe sun,Sky\na banana,Fruit\na zebra,Animals\n"


class Evaluate:
    """The command with what the toy model needs."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.prompts = folder / "list.csv"
        self.prompts.write_text(PROMPTS)
        self.draw = ["--base", DEBUG, f"conditioning.tokenizer={tokenizer(folder / 'spiece.model')}",
                     "parallel.device=cpu", "sampling.steps=2"]  # fmt: skip

    def __call__(self, *words: object) -> Done:
        self.capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(str(stop.code))
        captured = self.capsys.readouterr()
        return Done(code, captured.out, captured.err)


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> Iterator[Evaluate]:
    monkeypatch.chdir(ROOT)
    root, term = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers = list(root.handlers)
    yield Evaluate(tmp_path, capsys)
    root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


def test_a_list_is_drawn_scored_and_gone_on_with(evaluate, tmp_path) -> None:
    words = [*evaluate.draw, "--prompts", evaluate.prompts, "--out", tmp_path / "one", "--batch-size", 2]
    done = evaluate(*words, "--real", ROOT / "data/emoji_sample")
    assert done.code == 1, done.err  # the pictures are not square, which fine detail needs
    assert "error: not taken: detail: " in done.err
    assert "retrieval top-1 (higher is better)" in done.out and "in Fruit" in done.out
    assert "features distance" in done.out
    scores = json.loads((tmp_path / "one" / "scores.json").read_text())
    told = scores["folders"]["one"]
    assert told["scores"]["retrieval top-1"]["pictures"] == 6  # of all but the zebra, two each
    assert scores["failed"] and len(told["pictures"]) == 8
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.count("data:image/webp") == 8 and "Not taken: detail" in page

    before = files(tmp_path / "one")
    next((tmp_path / "one").rglob("1_*/000000001.png")).unlink()
    again = evaluate(*words)
    assert again.code == 0, again.err
    assert "3 of 4 prompts are finished already" in again.err
    assert "not scored: features: compares with real pictures: name their folder with --real" in again.err
    assert files(tmp_path / "one") == before

    both = ["--images", tmp_path / "one", "--compare", tmp_path / "one" / "pictures"]
    told = ["--prompts", evaluate.prompts, "--out", tmp_path / "two", "--report-prompts", 1]
    other = evaluate(*both, *told)
    assert other.code == 0, other.err
    scored = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert list(scored["folders"]) == ["one", "pictures"]
    assert (tmp_path / "two" / "report.html").read_text().count("data:image/webp") == 4


def test_check_draws_nothing_and_names_what_is_missing(evaluate, tmp_path) -> None:
    words = [*evaluate.draw, "--prompts", evaluate.prompts, "--out", tmp_path / "out", "--judges", tmp_path]
    done = evaluate(*words, "--scores", "retrieval,hps,fid", "--check")
    assert done.code == 0, done.err
    assert "config ok: 4 prompts" in done.out
    assert "note: hps: " in done.out and "note: fid: compares with real pictures" in done.out
    assert "scores: retrieval, hps, fid" in done.out
    words[-2] = "--metric-weights"  # the option's name; the other is its old one
    missing = evaluate(*words, "--scores", "retrieval,hps,fid")
    assert missing.code == 2
    assert "HPS_v2" in missing.err and "inception-2015-12-05.pt" in missing.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a dog"], "give --base to draw pictures, or --images"),
        (["--base", DEBUG, "--images", "data", "--prompt", "a dog"], "give --base to draw"),
        (["--images", "data"], "give the prompts: --prompts FILE, or --prompt TEXT"),
        (["--images", "data", "--prompts", "gone.csv"], "prompt list gone.csv does not exist"),
        (["--images", "data", "--prompt", "a", "--scores", "beauty"], "--scores beauty: expected some of"),
        (["--images", "data", "--prompt", "a", "--device", "tpu"], "--device tpu: expected auto, cpu, cuda"),
        (["--images", "data", "--prompt", "a", "sampling.steps=3"], "sampling.steps=3: nothing is drawn"),
        (["--images", "data", "--prompt", "a", "--at-once", "0"], "--at-once 0: expected at least 1"),
        (["--images", "data", "--prompt", "a zebra"], "none of the scores that ship can be taken"),
        (["--images", "X", "--prompt", "a red apple"], "X: no such folder of images"),
        (["--base", "configs/gone.yaml", "--prompt", "a red apple"], "there is no such config"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(evaluate, tmp_path, words, message: str) -> None:
    done = evaluate(*words, "--out", tmp_path / "out")
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_metric_that_breaks_does_not_lose_the_others(evaluate, tmp_path, monkeypatch) -> None:
    class Broken(metrics.Features):
        def __init__(self, config: metrics.MetricConfig) -> None:
            raise RuntimeError("weights are damaged")

        @staticmethod
        def missing(config: metrics.MetricConfig, captions: Sequence[str]) -> Iterator[str]:
            return iter(())

    monkeypatch.setitem(metrics.METRICS, "features", Broken)
    done = evaluate(*evaluate.draw, "--prompt", "a red apple", "--out", tmp_path / "out",
                    "--scores", "features,retrieval")  # fmt: skip
    assert done.code == 1
    assert "not taken: features: weights are damaged" in done.err
    assert "retrieval top-1" in done.out


def test_rows_of_a_list_are_drawn_with_their_own_settings(evaluate, tmp_path) -> None:
    control = {"path": written(tmp_path).name, "image": "a.png"}
    Image.linear_gradient("L").save(tmp_path / "a.png")
    rows = [{"prompt": "a red apple", "seed": 5, "size": "48x48"},
            {"prompt": "the sun", "size": "48x48", "controls": [control]}]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--prompts", tmp_path / "list.jsonl", "--out", tmp_path / "out", "--scores", "retrieval"]
    done = evaluate(*evaluate.draw, *words)
    assert done.code == 0, done.err
    drawn = sorted((tmp_path / "out").rglob("000000000.png"))
    told = [read_png_text(path) or {} for path in drawn]
    assert [(one["seed"], one["size"]) for one in told] == [("5", "48x48"), ("0", "48x48")]
    assert ["a.png" in one.get("controls", "") for one in told] == [False, True]
