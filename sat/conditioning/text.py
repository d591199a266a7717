"""What a text encoder is told, and what a user is told when it cannot be told everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sat.tokenizers import T5Tokenizer

MOSTLY_UNKNOWN = 0.3
"""Share of a prompt's characters, spaces aside, from which on losing them is worth a warning."""
_SHOWN = 40


class Encoded(NamedTuple):
    """Hidden states of B captions."""

    text: Tensor  # (B, T, C_text) in the encoder's dtype
    mask: Tensor | None  # (B, T) true = real token; None = padding counts as text, as officially


class FreedEncoder(nn.Module):
    """Stands where a text encoder was before its memory was given back."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raise: there is nothing left to run."""
        raise RuntimeError(
            "the text encoder was freed (memory.text_encoder is free): "
            "set memory.text_encoder=cpu or keep to encode more prompts"
        )


def distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different captions in order of appearance, and for each of ``captions`` its place among them."""
    places: dict[str, int] = {}
    index = [places.setdefault(caption, len(places)) for caption in captions]
    return list(places), index


def notices(tokenizer: T5Tokenizer, caption: str) -> list[str]:
    """One line for each way in which ``caption`` does not reach the encoder whole; [] if it does."""
    lines = []
    dropped = tokenizer.truncation(caption)
    if dropped is not None:
        lines.append(
            f"prompt {_short(caption)} has {len(tokenizer.encode(caption))} tokens, more than the "
            f"{tokenizer.max_length} of conditioning.max_length; these words were dropped: {dropped!r}"
        )
    unknown = tokenizer.unknown_share(caption)
    if unknown >= MOSTLY_UNKNOWN:
        lines.append(
            f"the text encoder does not know {unknown:.0%} of the characters of prompt {_short(caption)} and "
            "will ignore them: translate the prompt into English or rewrite it"
        )
    return lines


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
