"""Groups of layers that an adapter can be attached to, by name. Standard library only: configs read it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        "model.*.attn.qkv",
        "model.*.attn.proj",
        "model.*.cross.layers.*.q",
        "model.*.cross.layers.*.kv",
        "model.*.cross.layers.*.proj",
    ),
    "self_attention": ("model.*.attn.qkv", "model.*.attn.proj"),
    "cross_attention": (
        "model.*.cross.layers.*.q",
        "model.*.cross.layers.*.kv",
        "model.*.cross.layers.*.proj",
    ),
    "mlp": ("model.*.mlp.gate", "model.*.mlp.up", "model.*.mlp.down"),
    # How time and size act on a layer: modulation in a transformer, the embedding of a residual block.
    "adaln": ("model.*.adaln.layers.*.1", "model.*.final_layer.adaln.1", "model.*.emb"),
    "convolution": (  # of UNets: residual blocks, and changes of resolution
        "model.*.conv1",
        "model.*.conv2",
        "model.*.shortcut",
        "model.*.shrink",
        "model.*.grow",
    ),
    "text_attention": ("text.*.attn.qkv", "text.*.attn.q", "text.*.attn.kv", "text.*.attn.proj"),
    "text_mlp": ("text.*.mlp.gate", "text.*.mlp.up", "text.*.mlp.down"),
    "text_encoder": (
        "text.*.attn.qkv",
        "text.*.attn.q",
        "text.*.attn.kv",
        "text.*.attn.proj",
        "text.*.mlp.gate",
        "text.*.mlp.up",
        "text.*.mlp.down",
    ),
}
"""Group -> shell patterns over ``model.`` or ``text.`` and a layer's name; ``attention`` has all kinds."""


def patterns(target: str) -> tuple[str, ...]:
    """The patterns of a group, or ``target`` itself where it is a pattern."""
    return GROUPS.get(target, (target,))


def is_pattern(target: str) -> bool:
    """True if ``target`` is a pattern over names of layers, not the name of a group."""
    return "." in target or "*" in target


def of_text(target: str) -> bool:
    """True if ``target`` means layers of the text encoder."""
    return any(pattern.startswith("text.") for pattern in patterns(target))


def hint(name: str, known: Iterable[str]) -> str:
    """``; did you mean '…'?`` when a known name is close, else nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
