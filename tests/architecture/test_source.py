"""Rules on the text of the package that no linter states."""

from __future__ import annotations

import ast
import re

from tests.architecture.tree import ROOT, files, place, sources, tree

LAUNCH = ROOT / "sat/parallel/launch.py"
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".sbatch", ".cfg", ".json", ".jsonl", ""}


def _allowed_values(module: ast.Module) -> set[ast.AST]:
    """Everything within ``Literal[...]`` and ``choices=``: what a setting may say, not what code uses."""
    inside: set[ast.AST] = set()
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and node.value.id == "Literal"
        ):
            inside.update(ast.walk(node))
        elif isinstance(node, ast.keyword) and node.arg == "choices":
            inside.update(ast.walk(node.value))
    return inside


def test_devices_are_named_only_in_launch() -> None:
    found = []
    for path in sources():
        if path == LAUNCH:
            continue
        module = tree(path)
        allowed = _allowed_values(module)
        for node in ast.walk(module):
            literal = isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in allowed
            if literal and re.fullmatch(r"cuda(:\d+)?", node.value):
                found.append(place(path, node))
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "cuda"
            ):
                found.append(place(path, node))
    assert not found, f"device literals outside sat/parallel/launch.py: {found}"


def test_no_method_takes_arbitrary_keywords() -> None:
    """``**kwargs`` would hide a misspelt setting; only subclass hooks pass theirs on."""
    found = []
    for path in sources():
        for owner in ast.walk(tree(path)):
            if not isinstance(owner, ast.ClassDef):
                continue
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and node.args.kwarg and node.name != "__init_subclass__":
                    found.append(f"{place(path, node)} {owner.name}.{node.name}(**{node.args.kwarg.arg})")
    assert not found, f"methods with **keywords: {found}"


def test_no_default_is_mutable() -> None:
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    found = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                made = isinstance(default, ast.Call) and getattr(default.func, "id", "") in (
                    "list",
                    "dict",
                    "set",
                )
                if isinstance(default, mutable) or made:
                    found.append(place(path, node))
    assert not found, f"mutable defaults: {found}"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    """Paths such as a home folder mean nothing to the next reader."""
    path_like = re.compile(r"(?<![\w.~$}])/(?:root|home/\w+|Users/\w+|mnt/\w+|work/\w+|opt/\w+)\b")
    found = []
    for path in files():
        if (
            path.suffix not in TEXT
            or path.name == "LICENSE"
            or path.is_relative_to(ROOT / "tests/architecture")
        ):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if path_like.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "machine paths:\n" + "\n".join(found)


def test_test_peers_are_not_required_at_run_time() -> None:
    """requirements.txt is what the package imports; peers and tools belong to requirements-dev.txt."""
    names = {re.split(r"[<>=!~ ]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert not names & {
        "transformers",
        "diffusers",
        "peft",
        "torchvision",
        "xformers",
        "pytorch-lightning",
        "apex",
    }


def test_every_requirement_has_both_bounds() -> None:
    bad = []
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-docs.txt"):
        for line in (ROOT / name).read_text().splitlines():
            wanted = line.split("#")[0].strip()
            if wanted and not re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\w.]+,<[\w.]+", wanted):
                bad.append(f"{name}: {wanted}")
    assert not bad, f"requirements need a lower and an upper bound: {bad}"
