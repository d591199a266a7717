"""Token ids against transformers' T5 tokenizer, which has one implementation under both of its names.

Ours are sentencepiece's own, as T5 was trained with; transformers runs a copy of its rules, and differs where
``CAUSES`` says.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
import transformers
from transformers import T5TokenizerFast

from sat.tokenizers import T5Tokenizer
from tests.vocabulary import odd_strings, write_vocabulary

LENGTH = 24
TINY = Path("checkpoints/tiny/tokenizer")

CAUSES = {
    # transformers cuts special tokens out of a text and puts their ids there; to sentencepiece they are text.
    "special token": re.compile("<(pad|/s|unk|extra_id_[0-9]+)>"),
    # transformers splits at every Unicode white space; sentencepiece does not count this one.
    "U+0085": re.compile("\x85"),
    # transformers replaces a cluster by the shortest entry of the normalisation table that it begins with,
    # and clusters of six bytes and more character by character; sentencepiece takes the longest entry.
    "cluster": re.compile(
        "["
        + "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
        + "\u0e33\u0eb3\uff9e\uff9f"  # vowels and marks that are letters to Unicode
        + "\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]"  # letters of a Korean syllable
        + "|\xa0[\u200c\u200d]"  # joiners, too, form clusters, of fewer than six bytes after this space alone
    ),
}


def cause(text):
    """The first cause for which the ids of ``text`` may differ, None where they must be equal."""
    folded = unicodedata.normalize("NFKC", text)  # full-width brackets make special tokens, too
    return next((name for name, rule in CAUSES.items() if rule.search(text) or rule.search(folded)), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("t5")).parent


@pytest.fixture(scope="module")
def strings():
    found = [text for text in odd_strings(8000) if cause(text) is None]
    assert len(set(found)) > 2000
    return found


@pytest.fixture(scope="module")
def peer(folder):
    assert transformers.T5Tokenizer is T5TokenizerFast, "two implementations: compare with both"
    return T5TokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return T5Tokenizer(folder, LENGTH)


def different(ours, peer, strings):
    """The strings whose ids differ."""
    theirs = peer(strings).input_ids
    return [ascii(text) for text, ids in zip(strings, theirs, strict=True) if ours.encode(text) != ids]


def test_ids_equal_on_strings_of_every_kind(ours, peer, strings):
    wrong = different(ours, peer, strings)
    assert not wrong, f"{len(wrong)} of {len(strings)}: {wrong[:5]}"


def test_padded_and_cut_batches_equal(ours, peer, strings):
    theirs = peer(strings, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    tokens = ours(strings)
    assert tokens.ids.equal(theirs.input_ids)
    assert tokens.mask.equal(theirs.attention_mask.bool())


@pytest.mark.parametrize("first", [0x00, 0x300, 0x1E00, 0x2000, 0xFB00, 0xFF00])
def test_every_character_of_a_block_normalises_alike_alone_and_with_one_mark(ours, peer, first):
    block = [chr(code) for code in range(first, first + 0x100)]
    strings = [text.format(c) for c in block for text in ("{}", "a{}b", "e\u0301 {}")]
    wrong = different(ours, peer, [text for text in strings if "\x85" not in text])
    assert not wrong, f"{len(wrong)} of {len(strings)}: {wrong[:5]}"


def test_every_shipped_prompt_has_the_same_ids(pytestconfig):
    root = pytestconfig.rootpath
    files = sorted(root.glob("configs/*prompts.txt"))
    prompts = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert len(prompts) > 250
    assert not different(T5Tokenizer(root / TINY, 224), T5TokenizerFast.from_pretrained(root / TINY), prompts)


@pytest.mark.parametrize(
    ("text", "why", "read", "theirs"),
    [
        ("</s>", "special token", "▁< / s >", "</s>"),
        ("a <extra_id_0> dog", "special token", "▁a ▁< e x tra _ i d _0 > ▁dog", "▁a <extra_id_0> ▁dog"),
        ("a\x85b", "U+0085", "▁a <unk> b", "▁a ▁ b"),
        ("e\u0302\u0301", "cluster", "▁\u1ebf", "▁ <unk>"),  # a Vietnamese letter with its marks apart
        ("\u1100\u1161\u11a8", "cluster", "▁\uac01", "▁ <unk>"),  # a Korean syllable letter by letter
    ],
)
def test_where_ids_differ_ours_are_those_of_the_text_as_written(ours, peer, text, why, read, theirs):
    assert cause(text) == why
    assert peer.convert_ids_to_tokens(ours.encode(text)[:-1]) == read.split()
    assert peer.convert_ids_to_tokens(peer(text).input_ids[:-1]) == theirs.split()


def test_sentinels_would_take_the_last_ids_in_reverse_order(ours, peer):
    assert ours.vocab_size == len(peer)
    for k in (0, 1, 10, 99):
        assert peer(f"<extra_id_{k}>").input_ids == [ours.vocab_size - 1 - k, 1]


def test_a_model_without_normalisation_gives_the_same_ids(tmp_path, strings):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red apple", "ein roter Apfel", "abc def ghi jkl"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    peer, ours = T5TokenizerFast.from_pretrained(tmp_path), T5Tokenizer(tmp_path, LENGTH)
    few = [text for text in strings if not re.search(r"[^\S ]|▁", text)][:600]  # " " is its only white space
    assert len(few) > 400
    assert [ours.encode(text) for text in few] == peer(few).input_ids
