"""Configs: writing and reading are inverse, loading what was dumped changes nothing, order of disjoint files is free."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sat.config.load import FLAGS, dump, escape, load, resolve, wrap
from sat.config.yaml_source import Marks, Problem, parse, write
from tests.configs import DEBUG

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
SNIPPETS = st.lists(
    st.sampled_from(["${", "}", "\\", "$", "a.b", "yes", "1e5", "\n", " ", "#", ": ", "- ", "'", '"', "~", "\x85", "\ufeff", "\u2028"]),
    max_size=6,
).map("".join)  # fmt: skip
TEXTS = TEXT | SNIPPETS
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True) | TEXTS.filter(bool)
TREES = st.dictionaries(
    NAMES,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8),
    max_size=4,
)  # fmt: skip


@given(TREES)
@example({"a": "\x85", "b": {"<<": "x"}, "c": [[], {}, ""], "1": 1e300})
def test_writing_then_reading_gives_the_same_tree(tree: dict[str, Any]) -> None:
    assert parse(write(tree), "x")[0] == tree


@given(TREES)
@example({"a": "\\\\${a}", "b": ["\\", "${b.0}\\"], "c": "???", "sampling": {"prompt": ["${a}"]}})
def test_escaped_texts_hold_no_references(tree: dict[str, Any]) -> None:
    marks: Marks = {}
    problems: list[Problem] = []
    config = OmegaConf.create(wrap(escape(tree), marks, problems), flags=FLAGS)
    assert resolve(config, marks) == (tree, [])
    assert not problems


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Some valid settings of a toy experiment."""
    side = st.integers(1, 4).map(lambda n: 16 * n)
    choices = {
        "sampling.prompt": st.none() | TEXTS | st.lists(TEXTS, max_size=3),
        "sampling.negative_prompt": TEXTS,
        "sampling.steps": st.integers(1, 1000),
        "sampling.seed": st.integers(0, 2**31),
        "sampling.height": side,
        "sampling.width": side,
        "sampling.dtype": st.sampled_from(["fp32", "bf16", "fp16"]),
        "sampling.guider.params.scale": st.floats(0, 100),
        "diffusion.schedule.params.shift": st.floats(0.1, 10) | st.integers(1, 9),
        "memory.decode_tile": st.none() | st.integers(8, 99),
        "parallel.timeout": st.floats(0.5, 1e6),
        "checkpoint.allow_missing": st.lists(TEXTS, max_size=2),
        "output.dir": st.none() | st.sampled_from(["out", "a b/ü", "/tmp/x"]),
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=6))
    return [(name, draw(choices[name])) for name in names]


@settings(max_examples=12)
@given(changes())
def test_a_dumped_experiment_loads_equal_and_dumps_the_same(settings: list[tuple[str, Any]]) -> None:
    experiment = load([DEBUG], [("conditioning.tokenizer", None), *settings])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resolved.yaml"
        path.write_text(dump(experiment), encoding="utf-8", newline="")
        again = load([path])
    assert again == experiment
    assert dump(again) == dump(experiment)


@settings(max_examples=12)
@given(st.integers(1, 1000), st.integers(0, 99), st.booleans())
def test_files_about_different_keys_may_come_in_any_order(steps: int, seed: int, swap: bool) -> None:
    files = [{"sampling": {"steps": steps}}, {"sampling": {"seed": seed}}]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a.yaml", "b.yaml")]
        for path, file in zip(paths, files, strict=True):
            path.write_text(write(file))
        found = load([DEBUG, *(reversed(paths) if swap else paths)], ["conditioning.tokenizer=null"])
    assert (found.sampling.steps, found.sampling.seed) == (steps, seed)
