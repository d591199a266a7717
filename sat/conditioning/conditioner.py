"""From captions and sizes to what the network is conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sat.conditioning.condition import Condition
from sat.conditioning.size import SizeConditioner, Sizes
from sat.conditioning.text import Encoded, FreedEncoder, distinct, notices
from sat.models.t5 import T5Encoder, T5Tokenizer
from sat.tokenizers import UNKNOWN

log = logging.getLogger(__name__)


class Conditioner(nn.Module):
    """A text encoder with its tokenizer, and the size embedding.

    ``max_length`` is the number of tokens T, the end of sequence included. Captions are padded to it and the
    padding takes part in everything, as officially: no mask is made. ``tokenizer`` None serves those who
    bring token ids.
    """

    def __init__(
        self, text: T5Encoder, size: SizeConditioner, tokenizer: T5Tokenizer | None, max_length: int
    ) -> None:
        super().__init__()
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
        self.text_dim = text.dim  # C_text, also when the encoder is gone
        self.size = size
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.follows = True  # the encoder moves to where it is asked for; else its weights come by themselves
        self._rows = text.vocab

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
        return Condition(text, self.size(*sizes).to(text.device), mask)

    def unconditional(self, cond: Condition, negative: Sequence[str] | None = None) -> Condition:
        """What guidance steers away from: ``cond`` with the text of B ``negative`` prompts.

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
        return Condition(text, cond.vector, cond.text_mask)

    def text_encoder_to(self, device: torch.device) -> None:
        """Move the text encoder; the memory it held on its old device is free for others."""
        self.text.to(device)

    def free_text_encoder(self) -> None:
        """Give the text encoder's memory back for good; encoding raises from then on."""
        self.text = FreedEncoder()

    def _hidden(self, captions: Sequence[str], device: torch.device | None) -> Tensor:
        """(B, T, C_text) in one pass."""
        ids = self._tokenizer()(captions).ids
        here = next(self.text.parameters(), ids).device
        if device is not None and device != here:
            if self.follows:
                self.text_encoder_to(device)
            here = device
        ids = ids.masked_fill(ids >= self._rows, UNKNOWN)  # a small table may lack rows for the sentinels
        hidden: Tensor = self.text(ids.to(here))
        return hidden

    def _tokenizer(self) -> T5Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "captions need a tokenizer: name a sentencepiece model in conditioning.tokenizer"
            )
        return self.tokenizer
