"""Agreement of pages and code: config reference, extend.md, names, wording, the two READMEs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sat.cli import sample, train
from sat.cli.arguments import parse, settings
from sat.config.load import load_full
from tests.architecture.tree import ROOT, files

OTHER_NAMES = {"docs/moved.md", "docs/log.md", "CHANGELOG.md", "docs/config_reference.md", "docs/hooks.md"}
"""Pages with history, and pages made of docstrings, which cite files of the official code."""
FOLDERS = ("sat", "tests", "configs", "docs", "benchmarks", "data", "sample_scripts", "train_scripts")


def module(path: Path) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"{path} is importable"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_current() -> None:
    page = module(ROOT / "docs" / "generate_config.py").page()
    assert (ROOT / "docs" / "config_reference.md").read_text() == page, "run python docs/generate_config.py"


def test_the_code_of_the_page_on_extending_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that begin with a file's name become that file; those that begin with ``# use`` are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (ROOT / "docs" / "extend.md").read_text()
    used = 0
    for language, code in re.findall(r"^```(python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = re.match(r"# (\S+?)(:|$)", code.splitlines()[0])
        assert first, f"a block of {language} begins with its file's name, or with use"
        if first[1] != "use":
            Path(first[1]).write_text(code)
            continue
        names: dict[str, object] = {}
        exec(compile(code, "docs/extend.md", "exec"), names)
        used += 1
        if "picture" in names:
            assert names["picture"].size == (64, 48)
            hooks = str(names["pipe"].generator.engine.network.hooks)
            assert re.search(r"^layer +gain -> default$", hooks, re.MULTILINE), hooks
        if "acts" in names:
            assert names["begins"] and names["acts"], "untrained the plain model, trained another"
    assert sample.main(["--base", "configs/debug.yaml", "my.yaml", "--check"]) == 0
    training = ["configs/tiny.yaml", "configs/control.yaml", "my_control.yaml"]
    assert train.main(["--base", *training, "data.height=64", "data.width=64", "--check"]) == 0
    for name in ("my_parts", "my_format", "my_control"):
        sys.modules.pop(name)
    assert used == 3


def _pages() -> list[str]:
    """Pages, notebook, configs and scripts, with names of today."""
    kinds = (".md", ".ipynb", ".yaml", ".sh", ".sbatch")
    places = {".", "docs", "configs", "sample_scripts", "train_scripts"}
    names = [path.relative_to(ROOT) for path in files() if path.suffix in kinds]
    return [str(name) for name in names if str(name.parent) in places and str(name) not in OTHER_NAMES]


def _unknown(text: str) -> Iterator[str]:
    """Paths, dotted names, ``file.py`` and config keys of a page that do not exist."""
    for path in re.findall(rf"(?<![\w/.<-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w", text):
        ours = path.startswith("sat/") or Path(path).suffix in (".md", ".py", ".sh", ".sbatch")
        if ours and path != "train_scripts/site.sh" and not any(ROOT.glob(path)):  # that is the reader's own
            yield path
    for name in re.findall(r"(?<![\w./-])sat(?:\.\w+)+", text):
        if not _resolves(name):
            yield name
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    present = {path.name for path in files()} | set(re.findall(r"^# (\w+\.py)", text, re.MULTILINE))
    for name in re.findall(r"`(\w+\.(?:py|yaml|sh|sbatch))`", prose):
        if name not in present and not name.startswith("my"):
            yield name
    keys = _config_keys()
    for key in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:=[^`]*)?`", prose):
        section, rest = key.split(".")[:2]
        if section in keys and section != "model" and rest not in ("py", "json", *keys[section]):
            yield key


def _resolves(name: str) -> bool:
    """True for a module of today or a name in one; ``sat.compat`` does not help."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            made: object = importlib.import_module(".".join(parts[:count]))
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                try:
                    for part in parts[count:]:
                        made = getattr(made, part)
                        if isinstance(made, ModuleType):  # an old name that another test has imported
                            return False
                except (AttributeError, FutureWarning):
                    return False
            return True
    return False


def _config_keys() -> dict[str, set[str]]:
    """Section -> keys, as the generated reference lists them."""
    page = (ROOT / "docs" / "config_reference.md").read_text()
    sections = re.split(r"^### ", page.partition("## Components")[0], flags=re.MULTILINE)[2:]
    return {part.split("`")[1]: set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE)) for part in sections}


@pytest.mark.parametrize("page", _pages())
def test_names_in_pages_exist(page: str) -> None:
    """Files, modules, classes and config keys that a reader is told of."""
    assert sorted(set(_unknown((ROOT / page).read_text("utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "in sat/transformer/kernels.py",
        "a class of sat.memory.offload",
        "{target: sat.mixins.rope.Rope}",
        "`judges.py`",
        "set `sampling.stepz=3`",
        "[tests](tests/unit/test_nothing.py)",
    ],
)
def test_a_name_that_is_gone_is_noticed(text: str) -> None:
    assert len(list(_unknown(text))) == 1


def _asking(text: str) -> list[str]:
    """Headings, table cells and sentences that begin with a question word without being a question."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    starts = r"(?:^#+ |^[ ]*[-*] (?:\*\*)?|\A|\n\n|[.!?] |\| )"
    words = r"(?:[Ww]hat|[Ww]hich|[Ww]ho|[Ww]hom|[Ww]hose|[Ww]hether|[Ww]here|[Ww]hoever)"
    return re.findall(rf"{starts}({words} [^.|?\n]*)(?=[.|\n])", prose, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in _pages() if page.endswith(".md")])
def test_sentences_begin_with_nouns_or_verbs(page: str) -> None:
    assert _asking((ROOT / page).read_text("utf-8")) == []


def test_a_question_word_in_front_is_noticed() -> None:
    assert _asking("## What happens\n") and _asking("| key | what it costs |\n")
    assert _asking("It runs. Where it fits, it stays.\n") and not _asking("- What is it?\n")


def test_the_walk_prints_the_owners_of_hooks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "walk.md").read_text()
    ((code, shown),) = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL
    )
    exec(compile(code, "docs/walk.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_the_walk_lists_the_layers_of_pyproject() -> None:
    listed = (ROOT / "docs" / "walk.md").read_text().partition("## Import order")[2]
    rows = [set(re.findall(r"`(\w+)`", line)) for line in listed.splitlines() if line.startswith("| ")]
    block = (ROOT / "pyproject.toml").read_text().partition("\nlayers = [")[2].partition("\n]")[0]
    layers = [set(line.split(" | ")) for line in re.findall(r'^    "(.+?)"', block, re.MULTILINE)]
    assert rows[1:] == layers  # after the table's head


def test_files_in_the_drawing_exist() -> None:
    drawing = (ROOT / "docs/images/rings.svg").read_text()
    named = re.findall(r"[\w/]+(?:\.py|/)(?=[\s,:<&])", re.sub(r"</?[a-z][^>]*>", "\n", drawing))
    top = ("", "sat", "sat/apps", "sat/diffusion")
    assert len(named) > 20
    assert [name for name in named if not any((ROOT / place / name).exists() for place in top)] == []


def _skeleton(name: str) -> dict[str, list[str]]:
    """Parts that both languages share: commands, links, pictures, and the number of headings and rows."""
    text = (ROOT / name).read_text("utf-8")
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    links = [link.replace("_zh.md", ".md") for link in re.findall(r"\]\(([^)#\s]+)", text)]
    headings = re.findall(r"^(#+) ", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {
        "commands": [line for block in blocks for line in block.splitlines()],
        "links and pictures": sorted({link for link in links if not link.startswith("README")}),
        "headings": headings,
        "rows of tables": [line.split("|")[-2].strip() for line in rows if "`tests/" in line],
        "rows": ["|"] * len(rows),
    }


@pytest.mark.parametrize("part", ["commands", "links and pictures", "headings", "rows of tables", "rows"])
def test_both_readmes_are_in_step(part: str) -> None:
    english, chinese = _skeleton("README.md")[part], _skeleton("README_zh.md")[part]
    assert [x for x in english if x not in chinese] == [], f"not in README_zh.md: {part}"
    assert [x for x in chinese if x not in english] == [], f"not in README.md: {part}"
    assert len(english) == len(chinese)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_a_training_of_the_readme_runs_in_a_fresh_clone_or_says_what_it_needs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines, runs = [line for block in blocks for line in block.splitlines()], 0
    for before, line in zip(lines, lines[1:], strict=False):
        if "train.py" not in line:
            continue
        words = shlex.split(line.partition("train.py")[2])
        args = parse(train.parser(), words, "x")
        missing = load_full(args.base, [*args.overrides, *settings(args, train._OPTIONS)]).missing
        assert bool(missing) == before.startswith("# needs "), f"{line}: {list(map(str, missing))}"
        runs += not missing
    assert runs, "the first training of a newcomer works"
