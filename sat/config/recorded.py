"""Config that comes with weights, compared with the experiment's: what contradicts is told by its key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, NamedTuple

from sat.checkpoint.format import CheckpointError, Part
from sat.checkpoint.formats import detect
from sat.config.schema import CheckpointConfig, Experiment, plain
from sat.config.targets import TargetError, resolve, signature
from sat.config.yaml_source import Key, dotted
from sat.tokenizers import NEEDS

SECTIONS: dict[Part, tuple[Key, ...]] = {
    "text": (("conditioning", "text"),),
    "model": (
        ("model",),
        ("diffusion", "schedule"),
        ("diffusion", "prediction"),
        ("diffusion", "process"),
        ("conditioning", "size"),
    ),
    "first_stage": (("first_stage",),),
}
"""Components that belong to the weights of a part."""

SAMPLING = {"spacing", "rescale", "quantise"}
"""Parameters that change how is sampled and not what the weights mean: a difference is a notice."""

_THEIRS = ("model_index.json", "config.json")
_OWN = {"guidance_dim"}  # the loader tells it from the tensors, with advice


class Difference(NamedTuple):
    """A key whose value the weights' own config contradicts; ``fatal`` unless it is a sampling setting."""

    key: Key
    what: str
    fatal: bool


def differences(  # noqa: C901 - one comparison a folder, from its format to its keys
    experiment: Experiment, weights: CheckpointConfig
) -> Iterator[Difference]:
    """Every difference between ``experiment`` and the configs in the folders of ``weights``.

    Keys that ``checkpoint.allow_config`` names are left out, and so are folders that carry no config.
    """
    ours = plain(experiment)
    text = weights.source("text")
    if experiment.conditioning.tokenizer is None and text is not None and text.is_dir():
        with suppress(CheckpointError):
            file = detect(text).tokenizer(text)
            if file is not None and file.suffix == ".json" and find_spec("tokenizers") is None:
                yield Difference(("conditioning", "tokenizer"), NEEDS.format(file), True)
    for part, sections in SECTIONS.items():
        path = weights.source(part)
        if path is None or not path.is_dir():
            continue
        try:
            found = detect(path)
        except CheckpointError:
            continue  # told when it is read, with what it holds
        try:
            theirs = found.config(path)
        except CheckpointError as error:
            yield Difference(("checkpoint", part if path != weights.path else "path"), str(error), True)
            continue
        # A diffusers folder says it with the tokenizer, if at all.
        unsaid = (
            {"text_len"}
            if (path / "model_index.json").is_file() or (path / "config.json").is_file()
            else set()
        )
        for key in sections:
            for at, here, there in _compare(key, _get(ours, key), _get(theirs, key), experiment.imports):
                if any(fnmatchcase(dotted(at), pattern) for pattern in weights.allow_config):
                    continue
                if at[-1] in unsaid:
                    continue
                added = there is None and _only_wraps(here, experiment.imports)
                fatal = at[-1] not in SAMPLING and not added
                advice = "; if that is meant, name the key in checkpoint.allow_config" if fatal else ""
                what = f"{_shown(here)}, but the weights in {path} are of {_shown(there)}{advice}"
                yield Difference(at, what, fatal)


def _get(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree.get(name) if isinstance(tree, Mapping) else tree
    return tree


def _compare(key: Key, ours: Any, theirs: Any, imports: Any) -> Iterator[tuple[Key, Any, Any]]:
    """(key, here, there) of whatever differs between two components, defaults filled in."""
    if theirs is None or ours is None:
        return
    if not isinstance(theirs, Mapping) or not isinstance(theirs.get("target"), str):
        yield key, ours.get("target"), theirs
        return
    if ours["target"] != theirs["target"]:
        yield (*key, "target"), ours["target"], theirs["target"]
        return
    try:
        defaults = dict(signature(resolve(ours["target"], imports)).defaults)
    except TargetError:
        defaults = {}
    here, there = ours.get("params") or {}, theirs.get("params") or {}
    if not isinstance(there, Mapping):
        yield (*key, "params"), here, there
        return
    for name in sorted({*here, *there} - _OWN):
        one, other = plain(here.get(name, defaults.get(name))), plain(there.get(name, defaults.get(name)))
        if name == "mixins":
            yield from _mixins((*key, "params", name), one or {}, other or {}, imports)
        elif one != other:
            yield (*key, "params", name), one, other


def _mixins(key: Key, ours: Any, theirs: Any, imports: Any) -> Iterator[tuple[Key, Any, Any]]:
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and "target" in one:
            yield from _compare((*key, name), one, other, imports)
        elif one != other:
            yield (*key, name), one, other


def _only_wraps(mixin: Any, imports: Any) -> bool:
    """True for a mixin around what the weights have, such as a probe, which takes nothing's place."""
    try:
        declared = resolve(mixin["target"], imports).declared.values()
    except (TargetError, TypeError, KeyError, AttributeError):
        return False
    return all(kind == "wraps" for _, kind in declared)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
