"""Rules that map a format's tensor names to ours, as data: one list reads, writes and documents a format.

Names are the full dotted keys of a part, without the prefix that an engine file puts in front of the part
(``model.diffusion_model.``, ``first_stage_model.``, ``conditioner.embedders.0.transformer.``): the format
strips it.

Patterns, on both sides of a rule and matched to each other in order of appearance:

``{}``
    an index (a layer, a level): digits.
``{~}``
    an index counted from the other end: 0 on one side is the last on the other. The number of indices is read
    from the names themselves, so one rule serves every depth. Write it on one side of the rule only.
``*``
    one name without dots (weight, bias).
``**``
    any rest, dots included; last in a pattern.

A rule may match nothing (a list serves variants of a model): what must be there is decided by the module that
is loaded, key by key. A key that no rule matches, or two rules match, is an error.

The model families keep their lists in ``keys.py`` beside the model, under the names of the formats:
``SAT``, ``DIFFUSERS``, ``MEGATRON``, ``HF``, ``HF_LM`` (see
:data:`LAYOUTS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

#: Foreign layouts: the name of a rule list in a ``keys.py`` -> what it describes.
LAYOUTS = {
    "SAT": "official SwissArmyTransformer files",
    "DIFFUSERS": "diffusers component folders",
    "MEGATRON": "Megatron training files",
    "HF": "Hugging Face transformers folders (text encoders)",
    "HF_LM": "whole language models of Hugging Face, whose first layers are a text encoder",
}


@dataclass(frozen=True)
class Rename:
    """One tensor under another name. ``optional``: where it is absent, our module's computed value stays."""

    theirs: str
    ours: str
    optional: bool = False


@dataclass(frozen=True)
class Fuse:
    """Several of their tensors of equal shape, concatenated on dim 0, are one of ours (q, k, v -> qkv)."""

    theirs: Sequence[str]
    ours: str


@dataclass(frozen=True)
class Split:
    """One tensor of theirs is several of ours of equal shape, one after the other on dim 0 (value, gate)."""

    theirs: str
    ours: Sequence[str]


@dataclass(frozen=True)
class SwapHalves:
    """Their first and second half of dim 0 are our second and first (scale, shift against shift, scale)."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class ConvToLinear:
    """Their 1x1 convolution weight (O, I, 1, 1) is our linear weight (O, I); a bias passes unchanged."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class LinearToConv:
    """Their linear weight (O, I) is our 1x1 convolution weight (O, I, 1, 1); a bias passes unchanged."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class Flatten:
    """Their convolution of patches (O, C, p, p) is our linear weight (O, C p p); written as ours is."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class HeadsFirst:
    """Rows of theirs are q, k and v of one head after another, ours all of q, then of k, then of v."""

    theirs: str
    ours: str
    head_dim: int


@dataclass(frozen=True)
class Tie:
    """Several of their names hold one tensor of ours. Any of them is enough; the first is written."""

    theirs: Sequence[str]
    ours: str


@dataclass(frozen=True)
class Drop:
    """A tensor of theirs without a place in ours; ignored when read, never written. ``why``: for readers."""

    theirs: str
    why: str


@dataclass(frozen=True)
class Computed:
    """A tensor of ours that they do not store: our module computes it; left out when theirs is written."""

    ours: str
    why: str


@dataclass(frozen=True)
class Beyond:
    """Tensors that would have these names of ours in a deeper module: ignored where ours ends before."""

    ours: str
    why: str


Rule: TypeAlias = (
    Rename | Fuse | Split | SwapHalves | ConvToLinear | LinearToConv | Flatten | HeadsFirst | Tie | Drop
    | Computed | Beyond
)  # fmt: skip
Rules: TypeAlias = Sequence[Rule]
