"""Ways on the CPU are chosen by given timings, kept, written down by a run, and pinned for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sat.cli.commands.estimate import estimate
from sat.cli.sample import main as sample
from sat.config import settle
from sat.config.load import dump, load_full
from sat.config.schema import Component, DataConfig, SourceConfig, TrainConfig
from sat.estimate.budget import apply_budget
from sat.first_stage import AutoencoderKL
from sat.kernels import measured
from sat.kernels.apply import Speed, measured_convolutions, measured_speed
from tests.configs import debug
from tests.small import plus
from tests.training import CONFIG

CPU = torch.device("cpu")
SMALL = measured.Layer(32, 128, 8, 2, 7, 12, torch.float32)


@dataclass
class Timer:
    """Two clocks that only samples move: ``wall`` and ``cpu`` seconds of each way."""

    wall: Mapping[str, float]
    cpu: Mapping[str, float]
    now: tuple[float, float] = (0.0, 0.0)
    samples: int = 0

    def make(self) -> dict[str, Callable[[], object]]:
        def run(name: str) -> None:
            self.now = (self.now[0] + self.wall[name], self.now[1] + self.cpu[name])
            self.samples += 1

        return {name: lambda name=name: run(name) for name in self.wall}

    def ask(self, question: str = "pack?") -> str:
        clocks = (lambda: self.now[0], lambda: self.now[1])
        return measured.fastest(question, "packed", "plain", self.make, clocks)


def timer(packed: float, plain: float, cpu: tuple[float, float] | None = None) -> Timer:
    other = cpu or (packed, plain)
    return Timer({"packed": packed, "plain": plain}, {"packed": other[0], "plain": other[1]})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SAT_MEASURE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cogview3-sat" / "cpu"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (timer(1.0, 0.9), "plain"),
        (timer(1.0, 0.97), "packed"),  # within what two measurements differ by
        (timer(1.0, 2.0), "packed"),
        (timer(1.0, 0.5, cpu=(1.0, 1.1)), "packed"),  # other programs had the processor meanwhile
    ],
    ids=["faster", "alike", "slower", "busy"],
)
def test_the_other_way_is_taken_if_it_is_faster_by_every_clock(
    cache: Path, given: Timer, expected: str
) -> None:
    assert given.ask() == expected


def test_the_least_of_at_least_three_samples_counts() -> None:
    taken, now = {"packed": iter([0.0, 9.0, 9.0, 1.0]), "plain": iter([0.0, 5.0, 6.0, 5.0])}, [0.0]

    def run(name: str) -> None:
        now[0] += next(taken[name])

    ways = {name: lambda name=name: run(name) for name in taken}
    assert measured.least_times(ways, (lambda: now[0],)) == {"packed": [1.0], "plain": [5.0]}


def test_an_answer_is_measured_once(cache: Path) -> None:
    first, second = timer(1.0, 0.5), timer(0.5, 1.0)
    assert (first.ask(), second.ask(), second.samples) == ("plain", "plain", 0)
    assert second.ask("another question") == "packed"
    assert len([*cache.iterdir()]) == 2  # and no draft


@pytest.mark.parametrize("kind", ["empty", "cut", "list", "unknown answer", "other torch", "other question"])
def test_a_damaged_or_foreign_answer_is_measured_again(cache: Path, kind: str) -> None:
    timer(1.0, 0.5).ask()
    (file,) = cache.iterdir()
    whole = json.loads(file.read_text())
    changed = {
        "unknown answer": {"choice": "folded"},
        "other torch": {"torch": "1.0"},
        "other question": {"question": "?"},
    }
    texts = {"empty": "", "cut": file.read_text()[:40], "list": "[1]"}
    file.write_text(texts.get(kind) or json.dumps(whole | changed.get(kind, {})) if kind != "empty" else "")
    again = timer(0.5, 1.0)
    assert again.ask() == "packed" and again.samples
    assert json.loads(file.read_text())["choice"] == "packed"


def test_another_processor_asks_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer(1.0, 0.5).ask()
    monkeypatch.setattr(measured, "here", lambda: {"processor": "another", "torch": torch.__version__})
    assert timer(0.5, 1.0).ask() == "packed"


def test_the_answer_of_a_process_that_was_first_stands(cache: Path) -> None:
    slow = timer(0.5, 1.0)
    make, done = slow.make, []

    def meanwhile() -> dict[str, Callable[[], object]]:
        done.append(timer(1.0, 0.5).ask())
        return make()

    slow.make = meanwhile  # type: ignore[method-assign]
    assert slow.ask() == "plain" and done == ["plain"]


def test_without_a_folder_for_answers_the_usual_way_is_taken_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SAT_MEASURE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    given = timer(1.0, 0.5)
    assert (given.ask(), given.ask(), given.samples) == ("packed", "packed", 0)
    assert caplog.text.count("Set XDG_CACHE_HOME to a folder that can be written") == 1


def test_the_suite_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = timer(1.0, 0.5)
    assert given.ask() == "packed" and not given.samples and not [*tmp_path.iterdir()]


def test_every_question_can_be_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs both its ways, at sizes in which it is open."""
    monkeypatch.setattr(measured, "MOST_ROUNDS", 1)
    monkeypatch.setattr(measured, "LEAST_ROUNDS", 1)
    long = replace(SMALL, text=200, image=400)
    measured.packs(SMALL)
    measured.packs(SMALL, trains=True)
    measured.attention(replace(long, dtype=torch.bfloat16))
    measured.attention(long)
    measured.attention(long, trains=True)
    measured.folds(long, packed=False, kernel="torch")
    measured.folds(long, packed=True, kernel="exp")
    measured.folds(SMALL, packed=True, kernel="torch")
    measured.sigmoid(SMALL, packed=False)
    measured.sigmoid(SMALL, packed=True)
    measured.convolutions(measured.Maps((8, 16), 4, 20))
    asked = [json.loads(file.read_text()) for file in cache.iterdir()]
    assert len(asked) == 11 and all(len(one["ms"]) == 2 for one in asked)


def test_nothing_is_asked_where_only_one_way_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "fastest", lambda *_: pytest.fail("asked"))
    wide, imaged = replace(SMALL, dim=4096), replace(SMALL, text=0)
    assert measured.attention(SMALL) == "torch" and not measured.folds(wide, packed=True, kernel="torch")
    assert not measured.folds(imaged, packed=True, kernel="torch")
    assert not measured.sigmoid(replace(SMALL, dtype=torch.bfloat16), packed=True)
    assert measured.folds(replace(SMALL, dim=4096, image=4096), packed=True, kernel="torch")
    assert not measured.packs(replace(SMALL, dtype=torch.float16))
    assert measured.convolutions(measured.Maps((128, 512), 32, 1024)) == "plain"
    half = AutoencoderKL(8, (1, 2), groups=4).bfloat16()
    assert measured_convolutions(half, (6, 10)) == "plain"
    explicit = Speed("torch", pack=False, fold=True)
    assert measured_speed(plus(), explicit, (6, 10), 2) == explicit


def answers(monkeypatch: pytest.MonkeyPatch, which: int) -> list[str]:
    """Every question gets its usual (0) or its other (1) answer; the questions, as they are asked."""
    asked = list[str]()

    def fastest(question: str, usual: str, other: str, make: object) -> str:
        asked.append(question)
        return (usual, other)[which]

    monkeypatch.setattr(measured, "fastest", fastest)
    return asked


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_auto_follows_the_measurement(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    monkeypatch.setattr(measured, "FOLD_FROM", 16)
    monkeypatch.setattr(measured, "SHORTEST", 16)
    asked = answers(monkeypatch, which)
    found = measured_speed(plus(), Speed(), (6, 10), 2)
    assert found == Speed(("torch", "exp")[which], pack=(True, "plain_sigmoid")[which], fold=not which)
    assert len(asked) == 4 and all("2 x 7 + 15 tokens, float32" in question for question in asked)
    monkeypatch.undo()
    answers(monkeypatch, which)
    assert measured_speed(plus(), Speed(), (6, 10), 2).fold == (False, "ragged")[which]  # of few tokens


def test_a_run_writes_its_choices_and_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--base", "configs/debug.yaml", "--prompt", "a", "--steps", "1", "--output-dir"]

    def chosen(folder: str) -> tuple[object, ...]:
        made = load_full([tmp_path / folder / "resolved.yaml"]).experiment.sampling
        return made.pack, made.fold, made.attention, made.convolutions

    answers(monkeypatch, 1)
    assert sample([*run, str(tmp_path / "plain")]) == 0 and chosen("plain") == (
        "plain_sigmoid",
        "ragged",
        "torch",
        "packed",
    )
    answers(monkeypatch, 0)
    assert sample([*run, str(tmp_path / "packed")]) == 0 and chosen("packed") == (
        *(True, False, "torch"),
        "plain",
    )
    picture = next((tmp_path / "plain").rglob("*.png"))
    first = picture.read_bytes()
    picture.unlink()
    assert sample([*run, str(tmp_path / "plain"), "--resume"]) == 0 and chosen("plain")[0] == "plain_sigmoid"
    assert picture.read_bytes() == first
    again = ["--base", str(tmp_path / "plain" / "resolved.yaml"), "--output-dir", str(tmp_path / "again")]
    assert sample(again) == 0
    assert next((tmp_path / "again").rglob("*.png")).read_bytes() == first


def test_a_training_goes_on_with_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SHORTEST", 16)
    experiment = replace(debug(), train=CONFIG)

    def settled(train: TrainConfig | None, which: int, *, packs: bool = True) -> TrainConfig:
        answers(monkeypatch, which)
        assert train is not None
        return settle.settle_training(train, plus(), (6, 10), CPU, packs=packs)

    made = settled(CONFIG, 1)
    assert (made.pack, made.attention) == (False, "exp")
    (tmp_path / "resolved.yaml").write_text(dump(replace(experiment, train=made)))
    later = settle.as_recorded(experiment, tmp_path / "resolved.yaml").train
    assert settled(later, 0) == made
    assert settled(CONFIG, 0, packs=False).pack == "auto"  # nothing to pack, nothing said
    (tmp_path / "resolved.yaml").write_text("damaged: [")
    assert settle.as_recorded(experiment, tmp_path / "resolved.yaml") == experiment


def test_a_type_that_the_processor_is_slow_in_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settle._warn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for _ in range(2):
        settle.tell_slow("bf16", "sampling.dtype=fp32", CPU)
    settle.tell_slow("fp32", "", CPU)
    (told,) = caplog.messages
    assert "has no bf16 arithmetic" in told and told.endswith("; set sampling.dtype=fp32")


def test_estimates_for_a_processor_without_bf16_name_what_they_do_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "not counted: buffers of bf16 convolutions"
    kind = Component("sat.train.objectives.diffusion.DiffusionObjective")
    data = DataConfig(sources=[SourceConfig(Path("data/emoji_sample"))], height=48, width=64)
    plan = replace(debug("parallel.device=cpu"), train=replace(CONFIG, objective=kind, zero=1), data=data)

    def planned(dtype: str) -> str:
        estimate(replace(plan, train=replace(plan.train, dtype=dtype)), 1, None)
        return capsys.readouterr().out

    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert settle.slow_convolutions("bf16") == ""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert told in str(apply_budget(debug("sampling.dtype=bf16", "memory.budget=8GB"), CPU))
    assert told in planned("bf16")
    automatic = planned("auto")
    assert "fp32, ZeRO 1" in automatic and told not in automatic


@pytest.mark.parametrize(
    ("slow", "zero", "expected"), [(True, 1, "fp32 fp32"), (False, 1, "bf16 bf16"), (False, 0, "bf16 fp32")]
)
def test_an_automatic_type_is_the_fastest_safe_one(
    monkeypatch: pytest.MonkeyPatch, slow: bool, zero: int, expected: str
) -> None:
    monkeypatch.setattr(measured, "slow", lambda dtype: slow)
    train = replace(CONFIG, dtype="auto", zero=zero)
    made = settle.settle_dtype(replace(debug("sampling.dtype=auto"), train=train), CPU)
    assert made.train is not None and f"{made.sampling.dtype} {made.train.dtype}" == expected


def test_a_gpu_without_bf16_draws_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = debug("sampling.dtype=auto")
    for has, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        device = SimpleNamespace(type="cuda")
        assert settle.settle_dtype(experiment, device).sampling.dtype == expected  # type: ignore[arg-type]
