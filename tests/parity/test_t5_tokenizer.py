"""Token ids against transformers' T5 tokenizer, which has one implementation under both of its names."""

from __future__ import annotations

import pytest
import transformers
from transformers import T5TokenizerFast

from sat.models.t5 import T5Tokenizer
from tests.vocabulary import odd_strings, write_vocabulary

LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("t5")).parent


@pytest.fixture(scope="module")
def strings():
    return list(odd_strings(3000))


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
    assert len(set(strings)) > 2500
    wrong = different(ours, peer, strings)
    assert not wrong, f"{len(wrong)} of {len(strings)}: {wrong[:5]}"


def test_padded_and_cut_batches_equal(ours, peer, strings):
    theirs = peer(strings, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    tokens = ours(strings)
    assert tokens.ids.equal(theirs.input_ids)
    assert tokens.mask.equal(theirs.attention_mask.bool())


@pytest.mark.parametrize("first", [0x00, 0x300, 0x1E00, 0x2000, 0xFB00, 0xFF00])
def test_every_character_of_a_block_normalises_alike_alone_and_with_marks(ours, peer, first):
    block = [chr(code) for code in range(first, first + 0x100)]
    strings = [
        text.format(c) for c in block for text in ("a{}b", "{}\u0301", "e\u0301{}", "{0}\u0302\u0301 {0}")
    ]
    wrong = different(ours, peer, strings)
    assert not wrong, f"{len(wrong)} of {len(strings)}: {wrong[:5]}"


def test_sentinels_take_the_last_ids_in_reverse_order(ours, peer):
    assert ours.vocab_size == len(peer)
    for k in (0, 1, 10, 99):
        assert ours.encode(f"<extra_id_{k}>") == [len(peer) - 1 - k, 1] == peer(f"<extra_id_{k}>").input_ids


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
    few = strings[:600]
    assert [ours.encode(text) for text in few] == peer(few).input_ids
