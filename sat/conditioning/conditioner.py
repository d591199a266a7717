"""Conditions of a batch of images: captions and sizes become encoded text and a size vector."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.control_input import Controls, stacked
from sat.embeddings import sent, sinusoid


class Encoded(NamedTuple):
    """Hidden states of B captions."""

    text: Tensor  # (B, T, C_text) in the encoder's dtype
    mask: Tensor | None  # (B, T) true = real token; None = padding counts as text, as officially


def joined(parts: Sequence[Encoded]) -> Encoded:
    """One batch of ``parts``: shorter text gets zeros in front, which the mask hides from all attention."""
    length = max(text.shape[1] for text, _ in parts)
    if all(mask is None and text.shape[1] == length for text, mask in parts):
        return Encoded(torch.cat([text for text, _ in parts]), None)
    masks = [torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if m is None else m for t, m in parts]
    return Encoded(
        torch.cat([F.pad(text, (0, 0, length - text.shape[1], 0)) for text, _ in parts]),
        torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks]),
    )


@dataclass(frozen=True)
class Condition:
    """Encoded text and size vector of B images."""

    text: Tensor  # (B, T, C_text)
    vector: Tensor  # (B, V)
    text_mask: Tensor | None = None  # (B, T) true = real token; None = all attended, as officially
    guidance: Tensor | None = None  # (B,) guidance strength as an input, for distilled networks
    controls: Controls = ()  # pictures of trained controls

    def __len__(self) -> int:
        return self.text.shape[0]

    def null(self) -> Condition:
        """The unconditional counterpart: text zeros, sizes kept (official ``force_uc_zero_embeddings``)."""
        return replace(
            self, text=torch.zeros_like(self.text), controls=tuple(own.null() for own in self.controls)
        )

    def dropped(self, drop: Tensor) -> Condition:
        """Text of the rows where ``drop`` (B,) is true replaced by zeros."""
        return replace(self, text=self.text.masked_fill(drop[:, None, None], 0))

    def rows(self, index: slice) -> Condition:
        """A part of the batch."""
        mask = None if self.text_mask is None else self.text_mask[index]
        guidance = None if self.guidance is None else self.guidance[index]
        controls = tuple(own.rows(index) for own in self.controls)
        return Condition(self.text[index], self.vector[index], mask, guidance, controls)

    def at(self, noise_share: float) -> Condition:
        """The same with those controls alone that act at a level of this share of noise."""
        acting = tuple(own for own in self.controls if own.acts(noise_share))
        return self if len(acting) == len(self.controls) else replace(self, controls=acting)

    def guided(self, strength: float | Tensor) -> Condition:
        """The same with a guidance strength as an input: one for all, or (B,)."""
        device = self.text.device
        rows = torch.as_tensor(strength, dtype=torch.float32, device=device).expand(len(self))
        return replace(self, guidance=rows)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Batches one after the other, of :func:`joined` text; all have a guidance strength or none has."""
        strengths = [p.guidance for p in parts if p.guidance is not None]
        if strengths and len(strengths) != len(parts):
            raise ValueError("either every condition has a guidance strength or none has")
        text, mask = joined([Encoded(p.text, p.text_mask) for p in parts])
        return Condition(
            text,
            torch.cat([p.vector for p in parts]),
            mask,
            torch.cat(strengths) if strengths else None,
            stacked([p.controls for p in parts]) if any(p.controls for p in parts) else (),
        )


# -- size conditions: a picture's original size, its crop, and its size as trained on


class Sizes(NamedTuple):
    """Size conditions of B images in pixels, each (B, 2): (height, width), (top, left), (height, width)."""

    original: Tensor
    crop: Tensor
    target: Tensor

    @classmethod
    def uncropped(cls, height: int, width: int, batch: int) -> Sizes:
        """Sizes of the official sampler: original = target = the requested size, nothing cut off."""
        size = torch.tensor([[height, width]]).expand(batch, 2)
        return cls(size, torch.zeros_like(size), size)


class SizeConditioner(nn.Module):
    """Sizes -> (B, 6 * dim) float32: a sinusoid of ``dim`` channels for each of six numbers, no parameters.

    In the order original height and width, crop top and left, target height and width.
    Source: official ``encoders/modules.py:995-1003``.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"the size embedding's dim is {dim}, expected at least 1")
        self.dim = dim

    @property
    def width(self) -> int:
        """Channels of the size vector, V."""
        return 6 * self.dim

    def forward(self, original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
        """(B, 6 * dim) float32 of three (B, 2) tensors of pixels."""
        for name, pair in (("original", original), ("crop", crop), ("target", target)):
            if pair.shape != (original.shape[0], 2):
                raise ValueError(
                    f"{name} sizes have shape {tuple(pair.shape)}, expected ({original.shape[0]}, 2)"
                )
        numbers = torch.cat([original, crop, target], 1)  # (B, 6)
        waves = sinusoid(numbers.flatten(), self.dim)  # (6 B, dim)
        return rearrange(waves, "(b n) d -> b (n d)", n=6)


# -- captions and sizes to conditions of the network; notices for text that does not reach it whole


MOSTLY_UNKNOWN = 0.3
"""Share of a prompt's characters, spaces aside, from which on losing them is worth a warning."""
_SHOWN = 40

log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """A batch of token ids."""

    ids: Tensor  # (B, T) int64, padded
    mask: Tensor  # (B, T) bool, true = real token, the end of sequence included


class Tokenizer(Protocol):
    """Texts to token ids; each text encoder names its own (:mod:`sat.tokenizers`)."""

    max_length: int  # tokens T of a batch at most, the end of sequence included
    multiple: int | None  # batches are as long as their longest text, in multiples of it; None: max_length
    trained: int  # ids below this one are those of real pieces
    path: Any  # file of the vocabulary

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids (B, T) of ``texts``, cut and padded."""
        ...

    def encode(self, text: str) -> list[int]:
        """All ids of ``text``, neither cut nor padded."""
        ...

    def truncation(self, text: str) -> str | None:
        """The end of ``text`` that does not fit into ``max_length`` tokens, None if all of it does."""
        ...

    def unknown_share(self, text: str) -> float:
        """Share of the characters of ``text`` that the vocabulary does not know; 0 to 1."""
        ...


class TextEncoder(Protocol):
    """A network (``nn.Module``) from token ids (B, T) to hidden states (B, T, dim)."""

    dim: int  # C_text
    vocab: int  # rows of the embedding table

    def __call__(self, ids: Tensor) -> Tensor:
        """Hidden states (B, T, dim) of ``ids`` (B, T)."""
        ...


class FreedEncoder(nn.Module):
    """Placeholder of a text encoder that gave its memory back."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raise: there is nothing left to run."""
        raise RuntimeError(
            "the text encoder was freed (memory.text_encoder is free): "
            "set memory.text_encoder=cpu or keep to encode more prompts"
        )


def distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different captions in order of appearance, and the place of each of ``captions`` among them."""
    places: dict[str, int] = {}
    index = [places.setdefault(caption, len(places)) for caption in captions]
    return list(places), index


def notices(tokenizer: Tokenizer, caption: str) -> list[str]:
    """One line for each way in which ``caption`` does not reach the encoder whole; [] if it does."""
    shown = repr(caption if len(caption) <= _SHOWN else caption[: _SHOWN - 1] + "…")
    lines = []
    dropped = tokenizer.truncation(caption)
    if dropped is not None:
        lines.append(
            f"prompt {shown} has {len(tokenizer.encode(caption))} tokens, more than the "
            f"{tokenizer.max_length} of conditioning.max_length; these words were dropped: {dropped!r}"
        )
    unknown = tokenizer.unknown_share(caption)
    if unknown >= MOSTLY_UNKNOWN:
        lines.append(
            f"the text encoder does not know {unknown:.0%} of the characters of prompt {shown} and "
            "will ignore them: translate the prompt into English or rewrite it"
        )
    return lines


class Conditioner(nn.Module):
    """A text encoder with its tokenizer, and the size embedding.

    ``max_length`` is the number of tokens at most, the end of sequence included. Captions are padded as their
    tokenizer pads, and the padding takes part in the encoder. ``padding`` ``as_diffusers``: in the network
    too, as officially; ``masked``: the network does not attend to it. ``empty_prompt``: ``zeros`` in place of
    its hidden states (CogView3), or ``encoded`` like any other (CogView4). Without a ``tokenizer`` only token
    ids can be encoded.
    """

    def __init__(
        self,
        text: TextEncoder,
        size: SizeConditioner,
        tokenizer: Tokenizer | None,
        max_length: int,
        padding: Literal["as_diffusers", "masked"] = "as_diffusers",
        empty_prompt: Literal["zeros", "encoded"] = "zeros",
    ) -> None:
        super().__init__()
        assert isinstance(text, nn.Module), "a text encoder is a network"
        if tokenizer is not None and tokenizer.max_length != max_length:
            raise ValueError(
                f"the tokenizer cuts at {tokenizer.max_length} tokens, "
                f"not at conditioning.max_length {max_length}"
            )
        if tokenizer is not None and tokenizer.trained > text.vocab:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.trained} pieces, the text encoder's table {text.vocab} "
                "rows (conditioning.text.params.vocab): they do not belong together"
            )
        self.text: nn.Module = text
        self.text_dim = text.dim  # C_text, also after the encoder was freed
        self.size = size
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.masked, self.encodes_empty = padding == "masked", empty_prompt == "encoded"
        self.empty_text: Tensor | None = None  # (1, T, C_text) of "", where the encoder is not there
        self.moves_encoder = True  # to the device that ``encode`` names; False: offloading moves its weights

    def encode(self, captions: Sequence[str], device: torch.device | None = None) -> Encoded:
        """Hidden states (B, T, C_text) of ``captions``, for sampling.

        Each different caption goes through the encoder once and alone, so that its hidden states are the same
        to the last bit whatever else is asked for. Warns of words that do not fit and of text the encoder
        does not know. The encoder is moved to ``device`` if it is elsewhere; None leaves it where it is.
        """
        tokenizer = self._tokenizer()
        unique, index = distinct(captions)
        for caption in unique:
            for line in notices(tokenizer, caption):
                log.warning(line)
        encoded = [self._hidden([caption], device) for caption in unique]
        return joined([encoded[i] for i in index])

    def encode_batch(self, captions: Sequence[str], device: torch.device | None = None) -> Encoded:
        """Hidden states (B, T, C_text) of ``captions``, for training: one pass for all, and no warnings.

        Duplicates are encoded once; gradients are recorded where the caller records them.
        """
        unique, index = distinct(captions)
        hidden, mask = self._hidden(unique, device)
        if len(unique) < len(index):
            rows = torch.tensor(index, device=hidden.device)
            hidden, mask = hidden[rows], None if mask is None else mask[rows]
        return Encoded(hidden, mask)

    def encode_apart(self, captions: Sequence[str], device: torch.device | None = None) -> list[Tensor]:
        """Hidden states (T, C_text) of each caption, for a cache; without padding that is masked anyway."""
        if self._tokenizer().multiple is None and not self.masked:
            return list(self.encode_batch(captions, device).text)
        apart = [self.encode_batch([caption], device) for caption in captions]
        return [text[0] if mask is None else text[0][mask[0]] for text, mask in apart]

    def condition(
        self, captions: Sequence[str], sizes: Sizes, device: torch.device | None = None
    ) -> Condition:
        """The condition of B captions and their ``sizes``, for training (see ``encode_batch``)."""
        text, mask = self.encode_batch(captions, device)
        return Condition(text, sent(self.size(*sizes), text.device), mask)

    def unconditional(self, cond: Condition, negative: Sequence[str] | None = None) -> Condition:
        """Condition that guidance steers away from: ``cond`` with the text of B ``negative`` prompts.

        Where an empty prompt is zeros it does not run the encoder; None is empty for all. The size vector
        stays. Source: official ``force_uc_zero_embeddings``, ``sample_dit.py:149``.
        """
        null = cond.null()
        rows = [row for row, prompt in enumerate(negative or ()) if prompt.strip()]
        if not rows:
            return self.null(cond)
        assert negative is not None, "it has rows"
        if len(negative) != len(cond):
            raise ValueError(f"{len(negative)} negative prompts for {len(cond)} images")
        if self.encodes_empty:
            text, mask = self.encode(negative, cond.text.device)
            return replace(null, text=text.to(cond.text.dtype), text_mask=mask)
        encoded = self.encode([negative[row] for row in rows], cond.text.device).text.to(cond.text.dtype)
        text = null.text.index_copy(0, torch.tensor(rows, device=cond.text.device), encoded)
        return replace(null, text=text)

    def null(self, cond: Condition) -> Condition:
        """``cond`` with empty prompts: zeros, or the encoding of "" for all."""
        if not self.encodes_empty:
            return cond.null()
        device, count = cond.text.device, len(cond)
        if self.empty_text is None:
            text, mask = self.encode_batch([""], device)
        else:
            text, mask = self.empty_text.to(device), None
        mask = None if mask is None else mask.expand(count, -1)
        return replace(cond.null(), text=text.to(cond.text.dtype).expand(count, -1, -1), text_mask=mask)

    def dropped(self, cond: Condition, drop: Tensor) -> Condition:
        """``cond`` with empty prompts in the rows where ``drop`` (B,) is true."""
        if not self.encodes_empty:
            return cond.dropped(drop)
        empty, count = self.null(cond), len(cond)
        text, mask = joined([Encoded(cond.text, cond.text_mask), Encoded(empty.text, empty.text_mask)])
        text = torch.where(drop[:, None, None], text[count:], text[:count])
        mask = None if mask is None else torch.where(drop[:, None], mask[count:], mask[:count])
        return replace(cond, text=text, text_mask=mask)

    def text_encoder_to(self, device: torch.device) -> None:
        """Move the text encoder; the memory it held on its old device is free for others."""
        self.text.to(device)

    def free_text_encoder(self) -> None:
        """Give the text encoder's memory back for good; encoding raises from then on."""
        self.text = FreedEncoder()
        gc.collect()  # modules and their hooks hold each other

    def _hidden(self, captions: Sequence[str], device: torch.device | None) -> Encoded:
        """Hidden states (B, T, C_text) in one pass."""
        ids, mask = self._tokenizer()(captions)
        here = next(self.text.parameters(), ids).device
        if device is not None and device != here:
            if self.moves_encoder:
                self.text_encoder_to(device)
            here = device
        hidden: Tensor = self.text(sent(ids, here))
        return Encoded(hidden, sent(mask, here) if self.masked else None)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("captions need a tokenizer: name its vocabulary in conditioning.tokenizer")
        return self.tokenizer
