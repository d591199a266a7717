"""Textual inversion: new words with embeddings of their own beside the text encoder's table.

A new word stands for one or more rows behind the table (ids from ``vocab`` on). Around it a caption goes
through sentencepiece in pieces, as if each began a text. The file has a tensor (n, dim) for each word under
the word itself, as diffusers writes learned embeddings.

Source: arXiv:2208.01618.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from sat.adapters.factors import AdapterError
from sat.checkpoint.files import open_file
from sat.checkpoint.format import SEAL, CheckpointError, TensorInfo, listing, seal, write_safetensors
from sat.checkpoint.load import refuse_not_finite
from sat.checkpoint.verify import Verify
from sat.conditioning.conditioner import Conditioner
from sat.mixins.text_encoder import TokenEmbed
from sat.tokenizers import EOS, Piece, T5Tokenizer

FILE = "embeddings.safetensors"
KIND = "cogview3-embeddings"

log = logging.getLogger(__name__)


class NewWord(NamedTuple):
    """A word to learn, and the words that its ``vectors`` embeddings start from; None: random ones."""

    word: str
    vectors: int = 1
    start: str | None = None


class WordTokenizer(T5Tokenizer):
    """A T5 tokenizer that knows new ``words`` too: word -> its ids. Other texts keep their ids."""

    def __init__(self, base: T5Tokenizer, words: Mapping[str, Sequence[int]]) -> None:
        vars(self).update(vars(base))
        known = {**getattr(base, "words", {}), **words}
        self.words: Mapping[str, Sequence[int]] = known
        ordered = "|".join(re.escape(word) for word in sorted(known, key=len, reverse=True))
        self._found = re.compile(f"({ordered})")

    def encode(self, text: str) -> list[int]:
        """All token ids of ``text``, end of sequence included."""
        ids: list[int] = []
        for part in self._found.split(text):
            ids += self.words[part] if part in self.words else super().encode(part)[:-1] if part else []
        return [*ids, EOS]

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of ``text`` with their places; each token of a new word has the word's."""
        out, start = list[Piece](), 0
        for part in self._found.split(text):
            if part in self.words:
                out += [Piece(one, start, start + len(part)) for one in self.words[part]]
            elif part:
                out += [Piece(id, start + a, start + b) for id, a, b in super().pieces(part)]
            start += len(part)
        return out


class WordTable(nn.Module):
    """A table of token embeddings (vocab, D) with further rows behind it, looked up from ``vocab`` on."""

    def __init__(self, table: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vocab = cast(Tensor, table.weight).shape[0]
        with torch.device("meta"):
            self.new = nn.Embedding(*rows.shape)
        self.new.weight = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """The table's own rows."""
        return cast(Tensor, self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(…) ids -> (…, D)."""
        old: Tensor = self.table(ids.clamp(max=self.vocab - 1))
        new: Tensor = self.new((ids - self.vocab).clamp(min=0))
        return torch.where((ids >= self.vocab)[..., None], new.to(old.dtype), old)


def table_of(text: nn.Module) -> tuple[TokenEmbed, nn.Module]:
    """The mixin of ``text`` that looks tokens up, and its table."""
    found = next((module for module in text.modules() if isinstance(module, TokenEmbed)), None)
    if found is None:
        raise AdapterError(f"{type(text).__name__} has no table of tokens to add words to")
    return found, cast(nn.Module, found.table)


def add_words(conditioner: Conditioner, words: Mapping[str, Tensor]) -> None:
    """Let ``conditioner`` know the new ``words``: word -> embeddings (n, D), further ones behind earlier."""
    tokenizer = conditioner.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, T5Tokenizer):
        raise AdapterError(
            f"new words need a text encoder with a T5 vocabulary; this one's is a {type(tokenizer).__name__}"
        )
    if tokenizer is None:
        raise AdapterError("new words need the text encoder's tokenizer: name one in conditioning.tokenizer")
    place, table = table_of(conditioner.text)
    dim = cast(Tensor, table.weight).shape[1]
    taken = getattr(tokenizer, "words", {})
    for word, rows in words.items():
        if rows.dim() != 2 or rows.shape[1] != dim:
            raise AdapterError(
                f"{word!r} has embeddings of {list(rows.shape)}, this text encoder's are of {dim} channels: "
                f"they are of another model"
            )
        if word in taken:
            raise AdapterError(f"the word {word!r} is there already: load one of the two files")
    before = [table.new.weight.detach()] if isinstance(table, WordTable) else []
    inner = table.table if isinstance(table, WordTable) else table
    weight = cast(Tensor, inner.weight)
    first = weight.shape[0] + sum(len(rows) for rows in before)
    ids: dict[str, range] = {}
    for word, rows in words.items():
        ids[word] = range(first, first + len(rows))
        first += len(rows)
    whole = torch.cat([*before, *(rows.to(weight.device, weight.dtype) for rows in words.values())])
    place.table = WordTable(inner, whole)  # type: ignore[assignment]
    conditioner.tokenizer = WordTokenizer(tokenizer, ids)


def learn_words(conditioner: Conditioner, words: Sequence[NewWord], seed: int) -> None:
    """Add ``words`` to learn. Each starts from its ``start``'s tokens, shared out over its vectors in order.

    Without a ``start`` they are drawn with the table's mean and deviation, from ``seed`` and the word.
    """
    tokenizer, weight = conditioner.tokenizer, cast(Tensor, table_of(conditioner.text)[1].weight).detach()
    if tokenizer is None:
        raise AdapterError("new words need the text encoder's tokenizer: name one in conditioning.tokenizer")
    made: dict[str, Tensor] = {}
    for number, one in enumerate(words):
        if one.start is not None:
            ids = tokenizer.encode(one.start)[:-1]
            if not ids:
                raise AdapterError(f"adapters.tokens: start {one.start!r} of {one.word!r} has no token")
            rows = weight[torch.tensor(ids, device=weight.device)].float()  # (k, D)
            edges = [i * len(ids) // one.vectors for i in range(one.vectors + 1)]
            parts = [rows[a : max(b, a + 1)].mean(0) for a, b in pairwise(edges)]
            made[one.word] = torch.stack(parts)  # (n, D)
        else:
            generator = torch.Generator().manual_seed(seed * 1000 + number)
            std, mean = torch.std_mean(weight.float(), dim=0)
            noise = torch.randn(one.vectors, weight.shape[1], generator=generator)
            made[one.word] = mean + std * noise.to(weight.device)
    add_words(conditioner, made)


# -- files


def find_words(path: Path) -> Path:
    """The file of embeddings at ``path``: itself, in the folder, or of a run's newest whole checkpoint."""
    if path.is_file():
        return Path(path)
    steps = sorted(marker.parent for marker in path.glob("checkpoints/step_*/COMPLETE"))
    for file in (path / FILE, path / "native" / FILE, *(step / "native" / FILE for step in steps[-1:])):
        if file.is_file():
            return file
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    raise AdapterError(
        f"{path}: holds no {FILE}, the file of a textual inversion; it holds {listing(there) or 'nothing'}"
    )


def read_words(path: Path, verify: Verify | None = None) -> dict[str, Tensor]:
    """Word -> embeddings (n, D) of the file at ``path``; ours, or diffusers' of a T5."""
    file = find_words(path)
    try:
        opened = open_file(file, verify=verify or Verify())
    except CheckpointError as error:  # no switch lets it run code
        raise CheckpointError(str(error).partition("; if you trust")[0]) from error
    with opened as tensors:
        found = {name: tensors[name].clone() for name in tensors}
        tensors.verified()
    for word, rows in found.items():
        refuse_not_finite(rows, word, str(file))
        if not rows.is_floating_point() or rows.dim() not in (1, 2) or not rows.numel() or not word.strip():
            raise AdapterError(
                f"{file}: {word!r} is {list(rows.shape)} of {str(rows.dtype)[6:]}: expected the embeddings "
                f"of a word, (n, channels)"
            )
    if not found:
        raise AdapterError(f"{file}: holds no words")
    return {word: rows if rows.dim() == 2 else rows[None] for word, rows in found.items()}


def load_words(conditioner: Conditioner, paths: Sequence[Path], verify: Verify | None = None) -> None:
    """Add the words of the files at ``paths``."""
    for path in paths:
        words = read_words(path, verify)
        try:
            add_words(conditioner, words)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
        told = ", ".join(f"{word!r} ({len(rows)})" for word, rows in words.items())
        log.info("%s: new words with their numbers of vectors: %s", path, told)


def write_words(file: Path, words: Mapping[str, Tensor]) -> None:
    """Write ``words`` in float32."""
    tensors = {word: rows.detach().float().cpu().contiguous() for word, rows in words.items()}
    header = {"format": "pt", "adapter": KIND, "words": json.dumps({w: len(t) for w, t in tensors.items()})}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    whole = {**header, SEAL: seal(infos, tensors.__getitem__, header)}
    write_safetensors(file, infos, tensors.__getitem__, whole)


class Export(Protocol):
    """As :class:`sat.train.checkpoints.Export`."""

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write ``weights`` into ``folder``."""
        ...

    def frozen(self) -> Mapping[str, Tensor]:
        """Untrained parameters to write."""
        ...


@dataclass(frozen=True)
class WordExport:
    """Writes the words under training into ``embeddings.safetensors``, beside what ``inner`` writes."""

    objective: nn.Module
    words: Mapping[str, Sequence[int]]
    table: WordTable
    inner: Export | None

    def frozen(self) -> Mapping[str, Tensor]:
        """Those of ``inner``."""
        return {} if self.inner is None else self.inner.frozen()

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write ``folder/embeddings.safetensors``."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        rows = weights[names[id(self.table.new.weight)]]
        if self.inner is None:
            folder.mkdir(parents=True)
        else:
            self.inner(folder, weights)
        first = self.table.vocab
        words = {word: rows[ids[0] - first : ids[-1] + 1 - first] for word, ids in self.words.items()}
        write_words(folder / FILE, words)
