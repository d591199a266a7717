"""docs/hooks.md is what the hook classes say."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from types import ModuleType
from typing import get_type_hints

import pytest

from sat.diffusion.process import ProcessHooks
from sat.transformer.hooks import TransformerHooks
from tests.architecture.tree import ROOT


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_hooks", ROOT / "docs" / "generate_hooks.py")
    assert spec is not None and spec.loader is not None, "docs/generate_hooks.py is importable"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hooks_page_is_current() -> None:
    assert (ROOT / "docs" / "hooks.md").read_text() == _generator().page(), (
        "run python docs/generate_hooks.py"
    )


@pytest.mark.parametrize("host", [TransformerHooks, ProcessHooks], ids=lambda h: h.__name__)
def test_every_hook_says_what_it_returns(host: type) -> None:
    hints = get_type_hints(host)
    for field in fields(host):  # type: ignore[arg-type]
        doc = hints[field.name].__doc__ or ""
        assert doc and not doc.startswith(f"{hints[field.name].__name__}("), f"{field.name} has no doc line"
