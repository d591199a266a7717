"""Conditions of a batch of images: captions and sizes become encoded text and a size vector."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.control_input import Controls, stacked
from sat.embeddings import sent, sinusoid


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
        """Batches one after the other; a mask or guidance strength has either every part or none."""
        masks = [p.text_mask for p in parts if p.text_mask is not None]
        strengths = [p.guidance for p in parts if p.guidance is not None]
        for what, found in (("text mask", masks), ("guidance strength", strengths)):
            if found and len(found) != len(parts):
                raise ValueError(f"either every condition has a {what} or none has")
        return Condition(
            torch.cat([p.text for p in parts]),
            torch.cat([p.vector for p in parts]),
            torch.cat(masks) if masks else None,
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

    ids: Tensor  # (B, T) int64, padded with 0
    mask: Tensor  # (B, T) bool, true = real token, the end of sequence included


class Tokenizer(Protocol):
    """Texts to token ids; :class:`sat.tokenizers.T5Tokenizer` is one."""

    max_length: int  # tokens T of a batch, the end of sequence included
    trained: int  # ids below this one are those of real pieces
    path: Any  # file of the vocabulary

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids (B, max_length) of ``texts``, cut and padded."""
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


class Encoded(NamedTuple):
    """Hidden states of B captions."""

    text: Tensor  # (B, T, C_text) in the encoder's dtype
    mask: Tensor | None  # (B, T) true = real token; None = padding counts as text, as officially


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

    ``max_length`` is the number of tokens T, the end of sequence included. Captions are padded to it and the
    padding takes part in everything, as officially: no mask is made. Without a ``tokenizer`` only token ids
    can be encoded.
    """

    def __init__(
        self, text: TextEncoder, size: SizeConditioner, tokenizer: Tokenizer | None, max_length: int
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
        hidden = [self._hidden([caption], device) for caption in unique]
        return Encoded(torch.cat([hidden[i] for i in index]), None)

    def encode_batch(self, captions: Sequence[str], device: torch.device | None = None) -> Encoded:
        """Hidden states (B, T, C_text) of ``captions``, for training: one pass for all, and no warnings.

        Duplicates are encoded once; gradients are recorded where the caller records them.
        """
        unique, index = distinct(captions)
        hidden = self._hidden(unique, device)
        if len(unique) < len(index):
            hidden = hidden[torch.tensor(index, device=hidden.device)]
        return Encoded(hidden, None)

    def condition(
        self, captions: Sequence[str], sizes: Sizes, device: torch.device | None = None
    ) -> Condition:
        """The condition of B captions and their ``sizes``, for training (see ``encode_batch``)."""
        text, mask = self.encode_batch(captions, device)
        return Condition(text, sent(self.size(*sizes), text.device), mask)

    def unconditional(self, cond: Condition, negative: Sequence[str] | None = None) -> Condition:
        """Condition that guidance steers away from: ``cond`` with the text of B ``negative`` prompts.

        An empty prompt is zeros, not the encoding of "", and does not run the encoder; None is empty for all.
        The size vector stays. Source: official ``force_uc_zero_embeddings``, ``sample_dit.py:149``.
        """
        null = cond.null()
        if negative is None or not any(prompt.strip() for prompt in negative):
            return null
        if len(negative) != len(cond):
            raise ValueError(f"{len(negative)} negative prompts for {len(cond)} images")
        rows = [row for row, prompt in enumerate(negative) if prompt.strip()]
        encoded = self.encode([negative[row] for row in rows], cond.text.device).text.to(cond.text.dtype)
        text = null.text.index_copy(0, torch.tensor(rows, device=cond.text.device), encoded)
        return replace(null, text=text)

    def text_encoder_to(self, device: torch.device) -> None:
        """Move the text encoder; the memory it held on its old device is free for others."""
        self.text.to(device)

    def free_text_encoder(self) -> None:
        """Give the text encoder's memory back for good; encoding raises from then on."""
        self.text = FreedEncoder()

    def _hidden(self, captions: Sequence[str], device: torch.device | None) -> Tensor:
        """Hidden states (B, T, C_text) in one pass."""
        ids = self._tokenizer()(captions).ids
        here = next(self.text.parameters(), ids).device
        if device is not None and device != here:
            if self.moves_encoder:
                self.text_encoder_to(device)
            here = device
        hidden: Tensor = self.text(sent(ids, here))
        return hidden

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "captions need a tokenizer: name a sentencepiece model in conditioning.tokenizer"
            )
        return self.tokenizer
