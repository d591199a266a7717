"""Conversion between all formats: names and shapes are checked first, then tensors stream one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.checkpoint.files import SAFETENSORS, TORCH, VOCABULARY, refuse_occupied
from sat.checkpoint.format import PARTS, CheckpointError, LazyStateDict, Part, TensorInfo, View
from sat.checkpoint.formats import cogview4, detect, open_part
from sat.checkpoint.formats.diffusers import AUTOENCODER, PLUS, SCHEDULE, T5, V, size_component
from sat.checkpoint.load import Computes, match
from sat.checkpoint.rules import Matched
from sat.checkpoint.save import WRITERS, Options
from sat.checkpoint.verify import DIGESTS, CheckpointPathError, records, verify_file

#: Builds the network that a component (``target`` and ``params``) describes; on the meta device where it can.
Build = Callable[[Mapping[str, Any]], nn.Module]

UNET = "sat.models.cogview3_unet.CogView3UNet"
#: Published networks, in the order in which parts without a config (official folders) are tried as them.
PUBLISHED: dict[Part, list[dict[str, Any]]] = {
    "model": [
        {"target": PLUS, "params": {}},
        {"target": UNET, "params": {}},
        {"target": UNET, "params": {"guidance_dim": 512}},  # distilled; the file's own number wins
        {"target": cogview4.COGVIEW4, "params": {}},
    ],
    "first_stage": [
        {"target": AUTOENCODER, "params": {}},
        {
            "target": AUTOENCODER,
            "params": {
                "multipliers": [1, 2, 4, 4],
                "res_blocks": 2,
                "latent_channels": 4,
                "mid_attention": True,
                "quant_convs": True,
                "scale_factor": 0.13025,
            },
        },
    ],
    "text": [{"target": T5, "params": {}}, {"target": cogview4.GLM, "params": {}}],
}
#: Schedule and prediction of a published network.
DIFFUSION: dict[str, dict[str, Any]] = {
    PLUS: {"schedule": {"target": SCHEDULE, "params": {}}, "prediction": {"target": V, "params": {}}},
    UNET: {
        "schedule": {"target": "sat.diffusion.schedule.Discrete", "params": {}},
        "prediction": {"target": "sat.diffusion.prediction.Eps", "params": {}},
    },
    cogview4.COGVIEW4: {
        "schedule": {"target": cogview4.SCHEDULE, "params": {}},
        "prediction": {"target": cogview4.FLOW, "params": {}},
    },
}
TEXT_LENGTH = {PLUS: 224, UNET: 225, cogview4.COGVIEW4: cogview4.TOKENS}


@dataclass(frozen=True)
class Sources:
    """Paths of the parts. ``path`` holds all, or those that the other fields do not name.

    ``change`` maps the parts on the way, for instance folding adapters into their weights.
    ``allow_unexpected`` are shell patterns over names in the files that are left out. ``lay`` changes the
    config sections that are written, as what ``change`` folds in asks for.
    """

    path: Path
    first_stage: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    only: tuple[Part, ...] = PARTS
    model: Path | None = None
    change: Callable[[dict[Part, LazyStateDict]], dict[Part, LazyStateDict]] | None = None
    allow_unexpected: Sequence[str] = ()
    lay: Callable[[dict[str, Any]], dict[str, Any]] = lambda sections: sections

    def of(self, part: Part) -> Path:
        """Path of ``part``."""
        return self.own[part] or self.path

    @property
    def own(self) -> dict[Part, Path | None]:
        """The parts' own paths."""
        return {"model": self.model, "first_stage": self.first_stage, "text": self.text}


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: tensors of each part, bytes in all, and notes for the user."""

    path: Path
    tensors: dict[Part, int]
    nbytes: int
    notes: list[str] = field(default_factory=list)


class Completed(View):
    """``inner`` and the values that its network ``module``, of ``component``, computes itself when asked."""

    def __init__(
        self, inner: LazyStateDict, module: nn.Module, computed: list[str], component: Mapping[str, Any]
    ) -> None:
        super().__init__(inner)
        self.module, self.component = module, component
        self.exact = frozenset(name for name, _ in module.named_buffers())
        self._owners: dict[str, Computes] = {}
        self._infos: dict[str, TensorInfo] = {}
        for name in computed:
            path, _, local = name.rpartition(".")
            owner = module.get_submodule(path)
            if not isinstance(owner, Computes):
                raise CheckpointError(
                    f"{name!r} is not in the file, and {type(owner).__name__} cannot compute it"
                )
            old: Tensor = getattr(owner, local)
            self._owners[name] = owner
            self._infos[name] = TensorInfo(tuple(old.shape), old.dtype)

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self._infos[key] if key in self._infos else self.inner.info(key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        if key not in self._infos:
            self.inner.release(key)

    def __getitem__(self, key: str) -> Tensor:
        if key in self._owners:
            return self._owners[key].computed()[key.rpartition(".")[2]]
        return self.inner[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.inner
        yield from self._infos

    def __len__(self) -> int:
        return len(self.inner) + len(self._infos)


def convert(
    sources: Sources,
    destination: Path,
    to: str,
    build: Build,
    *,
    config: Mapping[str, Any] | None = None,
    options: Options | None = None,
    allow_pickle: bool = False,
    progress: Callable[[int], Callable[[int], None]] | None = None,
) -> Converted:
    """Write the checkpoint at ``sources`` to ``destination`` in the format ``to``; whole or not at all.

    ``config`` are the sections of a YAML file; without it those that the source carries are used, and
    official folders are tried as the published networks. ``progress`` is called with the total bytes and
    returns a function to call with the bytes of each tensor done.
    """
    if to not in WRITERS:
        raise ValueError(f"cannot write the format {to!r}; known are {', '.join(WRITERS)}")
    options = options or Options()
    refuse_occupied(destination)
    sections = _sections(sources, config)
    with ExitStack() as stack:
        parts: dict[Part, LazyStateDict] = {}
        for part in _parts(sources, allow_pickle):
            path = sources.of(part)
            theirs = stack.enter_context(open_part(path, part, allow_pickle=allow_pickle))
            theirs.verified()  # before anything is written
            section = sections.get("conditioning") or {} if part == "text" else sections
            component, module, found = match_component(
                path, theirs, part, section.get(part), build, sources.allow_unexpected
            )
            if part == "text":
                sections["conditioning"] = {**section, "text": component}
            else:
                sections[part] = component
            parts[part] = Completed(found.view, module, found.computed, component)
        if set(sources.only) == set(PARTS):
            _refuse_absent(sources)
        if not parts:
            raise CheckpointError(
                f"{sources.path}: no part to convert: it holds none of {list(sources.only)}"
            )
        if sources.change is not None:
            parts = sources.change(parts)
        total = sum(info.nbytes for tensors in parts.values() for info in tensors.infos().values())
        advance = progress(total) if progress is not None else None
        tokenizer, notes = _tokenizer(sources, parts, to)
        options = replace(options, advance=advance, finite=True)
        sections = sources.lay(_finished(sections))
        WRITERS[to](destination, parts, sections, tokenizer=tokenizer, options=options)
        return Converted(destination, {part: len(tensors) for part, tensors in parts.items()}, total, notes)


def _refuse_absent(sources: Sources) -> None:
    """Refusal of a digests.json on the main path that names a file which is not there."""
    given = VOCABULARY if sources.tokenizer is not None else ()
    for file in sorted(sources.path.rglob(DIGESTS)) if sources.path.is_dir() else []:
        names = [record["name"] for record in records(file) if record["name"] not in given]
        if absent := [name for name in names if not (file.parent / name).is_file()]:
            what = "copy the folder again, or name the parts to convert with --only"
            raise CheckpointError(f"{file}: names {absent[0]!r}, which is not there: {what}")


def _parts(sources: Sources, allow_pickle: bool) -> list[Part]:
    """The parts to convert: those the main path holds and those with a path of their own."""
    held = detect(sources.path).parts(sources.path, allow_pickle=allow_pickle)
    own = [part for part, path in sources.own.items() if path]
    if not held and not own:
        held = list(sources.only) if len(sources.only) == 1 else []
        if not held:
            if sources.path.is_file() and sources.path.suffix not in (*SAFETENSORS, *TORCH):
                kinds = ", ".join((*SAFETENSORS, *TORCH))
                raise CheckpointPathError(f"{sources.path}: is no file of weights ({kinds})")
            raise CheckpointPathError(
                f"{sources.path}: does not say which part it holds; name it with --only model (or another)"
            )
    return [part for part in PARTS if part in sources.only and (part in held or part in own)]


def _sections(sources: Sources, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config sections, by rising weight: of the main path, of a part's own path, of ``config``."""
    found = dict(detect(sources.path).config(sources.path))
    if sources.first_stage is not None:
        own = detect(sources.first_stage).config(sources.first_stage)
        if own.get("first_stage") is not None:
            found["first_stage"] = own["first_stage"]
    if sources.text is not None:
        text = (detect(sources.text).config(sources.text).get("conditioning") or {}).get("text")
        if text is not None:
            found["conditioning"] = {**(found.get("conditioning") or {}), "text": text}
    wanted = ("model", "diffusion", "conditioning", "first_stage")
    return {**found, **{name: config[name] for name in wanted if config and config.get(name) is not None}}


def match_component(
    path: Path,
    theirs: LazyStateDict,
    part: Part,
    given: Mapping[str, Any] | None,
    build: Build,
    allow_unexpected: Sequence[str] = (),
) -> tuple[Mapping[str, Any], nn.Module, Matched]:
    """The network of ``theirs``: the ``given`` one, else the first published one that matches."""
    problems: list[CheckpointError] = []
    for component in [given] if given is not None else PUBLISHED[part]:
        with torch.device("meta"):
            module = build(component)
        try:
            found = match(module, theirs, part, allow_unexpected=allow_unexpected)
        except CheckpointError as error:
            problems.append(error)
        else:
            return component, module, found
    if given is not None:
        raise problems[0]
    raise CheckpointError(
        f"{path}: its {part} part carries no config and is not a published network; give the YAML "
        f"that describes it with --base "
        f"(as published: …{str(problems[0]).partition('does not fit')[2][:200]})"
    ) from problems[0]


def _finished(sections: Mapping[str, Any]) -> dict[str, Any]:
    """``sections``, completed by those of the family's published network."""
    out = dict(sections)
    if "model" in out:
        params, target = out["model"].get("params") or {}, out["model"]["target"]
        out.setdefault("diffusion", DIFFUSION.get(target, DIFFUSION[PLUS]))
        conditioning = dict(out.get("conditioning") or {})
        conditioning.setdefault("size", size_component(params.get("size_dim", 1536)))
        conditioning.setdefault("max_length", params.get("text_len", TEXT_LENGTH.get(target, 224)))
        if target == cogview4.COGVIEW4:
            conditioning.setdefault("empty_prompt", "encoded")
        out["conditioning"] = conditioning
    if "conditioning" in out:  # a path on this machine; the copy lies beside the weights
        out["conditioning"] = {
            name: value for name, value in out["conditioning"].items() if name != "tokenizer"
        }
    return out


def _tokenizer(
    sources: Sources, parts: Mapping[Part, LazyStateDict], to: str
) -> tuple[Path | None, list[str]]:
    """The sentencepiece model to copy; a note where there is none although the text encoder is written."""
    if "text" not in parts:
        return None, []
    if sources.tokenizer is not None:
        folder = sources.tokenizer / "spiece.model"
        found: Path | None = folder if sources.tokenizer.is_dir() else sources.tokenizer
        if found is None or not found.is_file():
            raise CheckpointError(f"{found}: no such tokenizer file")
        return found, []
    path = sources.of("text")
    found = detect(path).tokenizer(path)
    if found is not None:
        verify_file(found)
    if found is not None and found.suffix == ".json" and find_spec("tokenizers") is None:
        return found, [f"{found}: drawing with it needs the tokenizers library: pip install tokenizers"]
    return found, [] if found else [
        f"no spiece.model beside the text encoder: the {to} folder is without a tokenizer"
    ]
