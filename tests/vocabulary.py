"""A small T5 vocabulary, trained on the spot, and strings that try a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

_LINES = (
    "a red green blue apple cat dog sits on the mountain photo of small large old wooden house river under",
    "sky full café naïve über garçon Straße ế e\u0301 tree — emoji style sun flower rocket heart person",
    "running, waving; night day 2024 12 3d render quality < > / s pad unk extra_id_0 </s> <pad>",
    "각 한국 Ω привет й न क का ² ½ km² ™ 中 文字",
)
_ODD_LINES = (
    "</s> <pad> <unk> <extra_id_0> <extra_id_99> <extra_id_100> <extra_id_1 x</s>y ＜/s＞ ＜extra_id_3＞",
    "<s> e\u0301 e\u0302\u0301 a\u0308\u0304 o\u0323\u0302 ﬁ ﬁ\u0302",
    "\u2122\u0301 \u212b \u1e9b\u0323 \u0600a \u0600e\u0301 \u0e33",
    "① ㎏ ｆｕｌｌ ﷺ ½ ² Ⅷ ㌢ 각 \u1100\u1161\u11a8 中文 一只猫，在山上 \uff9e \u0301 \u0301a ▁ ▁▁a a▁b",
    "😀 👩\u200d🚀 🇩🇪 👍🏽 ❤\ufe0f \u200d \u200b \ufeff \xad \x00 \x01 \x07 \x1b[0m",
    "\x7f \ufffd \ue000 \U000f0000 a\x85b a\u2028b a\x9fb",
)
_WORDS = [word for line in _LINES for word in line.split(" ")]
_ODD = [word for line in _ODD_LINES for word in line.split(" ")]
_SPACES = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u2003 ",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u200b",
    "",
)


def write_vocabulary(folder: Path, size: int = 400) -> Path:
    """Trains ``spiece.model`` in ``folder``: T5's ids, NFKC normalisation, words of several scripts."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 14))) + rng.choice(".!? ") for _ in range(800)]
    path = folder / "spiece.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    return path


def odd_strings(count: int, seed: int = 0) -> Iterator[str]:
    """Strings of every kind a prompt can be: plain, empty, long, and what unicode has to offer."""
    rng = random.Random(seed)
    yield from ("", " ", "\n", "\t \r\n", *_WORDS, *_ODD)
    yield from ("a red apple " * 200, "long" * 100, "中" * 300, "\u0301" * 50)

    def letter() -> str:
        low, high = rng.choice(
            [(0x20, 0x7F), (0x00, 0x250), (0x250, 0x2000), (0x300, 0x370), (0x2000, 0x3400)]
            + [(0x4E00, 0xD7A4), (0xE000, 0xE010), (0xF900, 0xFFFF), (0x10000, 0x1FBFF)]
        )
        return chr(rng.randrange(low, high))

    for _ in range(count):
        kind = rng.random()
        if kind < 0.4:
            yield "".join(letter() for _ in range(rng.randint(1, 16)))
        else:
            words = _WORDS if kind < 0.6 else _ODD
            yield "".join(rng.choice(words) + rng.choice(_SPACES) for _ in range(rng.randint(1, 12)))
