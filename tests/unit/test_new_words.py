"""New words of a textual inversion: their ids, their embeddings, their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat.adapters.factors import AdapterError
from sat.adapters.tokens import (
    NewWord,
    WordTokenizer,
    add_words,
    learn_words,
    load_words,
    read_words,
    table_of,
    write_words,
)
from sat.conditioning.conditioner import Conditioner, SizeConditioner
from sat.errors import UserError
from sat.models.t5 import T5Encoder
from sat.tokenizers import EOS, T5Tokenizer
from tests.checkpoints import tokenizer as vocabulary
from tests.small import fill
from tests.tolerances import EXACT, F32


@pytest.fixture(scope="module")
def spiece(tmp_path_factory) -> Path:
    return vocabulary(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture
def conditioner(spiece) -> Conditioner:
    base = T5Tokenizer(spiece, 12)
    text = T5Encoder(
        dim=24, heads=3, head_dim=8, mlp_dim=40, depth=2, vocab=base.vocab_size + 5,
        buckets=8, max_distance=16,
    )  # fmt: skip
    fill(text, std=0.2)
    return Conditioner(text, SizeConditioner(8), base, 12)


def test_a_new_word_is_its_ids_and_the_rest_is_as_before(spiece) -> None:
    base = T5Tokenizer(spiece, 12)
    words = WordTokenizer(base, {"<it>": [900, 901], "<its>": [902]})
    assert words.encode("a red apple") == base.encode("a red apple")
    front, end = base.encode("a red")[:-1], base.encode("apple")
    assert words.encode("a red <it> apple") == [*front, 900, 901, *end]
    assert words.encode("<its><it>") == [902, 900, 901, EOS]
    assert words(["<it>"]).ids[0, :4].tolist() == [900, 901, EOS, 0]


def test_pieces_of_a_new_word_lie_where_it_stands(spiece) -> None:
    words = WordTokenizer(T5Tokenizer(spiece, 5), {"<it>": [900, 901]})
    text = "a red <it> apple"
    assert [text[p.start : p.end] for p in words.pieces(text) if p.id >= 900] == ["<it>", "<it>"]
    assert "".join(text[p.start : p.end] for p in words.pieces("a red ") + words.pieces(text)[-1:])
    assert words.truncation("<it> <it> <it> apple").startswith("<it>")
    assert words.unknown_share("<it>") == 0


def test_new_rows_stand_behind_the_table_and_old_ones_are_untouched(conditioner) -> None:
    rows = torch.randn(3, 24)
    before = conditioner.encode(["a red apple"]).text
    table = table_of(conditioner.text)[1]
    vocab = table.weight.shape[0]
    add_words(conditioner, {"<it>": rows[:2]})
    add_words(conditioner, {"<that>": rows[2:]})
    made = table_of(conditioner.text)[1]
    ids = torch.tensor([[3, vocab, vocab + 2, vocab + 1, 0]])
    expected = torch.stack([table.weight[3], rows[0], rows[2], rows[1], table.weight[0]])
    torch.testing.assert_close(made(ids)[0], expected, atol=EXACT, rtol=EXACT)
    assert torch.equal(conditioner.encode(["a red apple"]).text, before)
    assert conditioner.tokenizer.encode("<that> <it>") == [vocab + 2, vocab, vocab + 1, EOS]


def test_gradients_reach_the_rows_of_the_word_alone(conditioner) -> None:
    learn_words(conditioner, [NewWord("<it>", 2, "red apple"), NewWord("<that>")], seed=0)
    conditioner.requires_grad_(False)
    new = table_of(conditioner.text)[1].new.requires_grad_(True)
    conditioner.encode_batch(["a red <it>"]).text.square().sum().backward()
    norms = new.weight.grad.norm(dim=1)
    assert (norms[:2] > 0).all()
    assert norms[2] == 0


@pytest.mark.parametrize("vectors", [1, 2, 3, 7])
def test_vectors_start_from_the_embeddings_of_their_words_in_order(conditioner, vectors) -> None:
    table = table_of(conditioner.text)[1].weight.detach().clone()
    ids = conditioner.tokenizer.encode("red apple")[:-1]
    learn_words(conditioner, [NewWord("<it>", vectors, "red apple")], seed=0)
    rows = table_of(conditioner.text)[1].new.weight
    if vectors == 1:
        torch.testing.assert_close(rows[0], table[ids].mean(0), atol=F32, rtol=0)
    else:
        places = [i * len(ids) // vectors for i in range(vectors)]
        whole = vectors >= len(ids)
        for row, place in zip(rows, places, strict=True):
            assert not whole or torch.equal(row, table[ids[place]])
    assert rows.shape == (vectors, 24)


def test_a_word_is_the_same_from_its_file(conditioner, spiece, tmp_path) -> None:
    rows = torch.randn(2, 24)
    write_words(tmp_path / "embeddings.safetensors", {"<it>": rows})
    assert torch.equal(load_file(tmp_path / "embeddings.safetensors")["<it>"], rows)
    load_words(conditioner, [tmp_path])
    assert torch.equal(table_of(conditioner.text)[1].new.weight, rows)
    save_file({"<one>": rows[0]}, tmp_path / "learned_embeds.safetensors")  # as diffusers writes one vector
    assert read_words(tmp_path / "learned_embeds.safetensors")["<one>"].shape == (1, 24)


@pytest.mark.parametrize(("tensors", "words"), [
    ({"<it>": torch.zeros(2, 25)}, r"'<it>' has embeddings of \[2, 25\], .* 24 channels: they"),
    ({"<it>": torch.zeros(2, 24, dtype=torch.int64)}, "expected the embeddings of a word"),
    ({"<it>": torch.full((1, 24), torch.nan)}, "<it>"),
])  # fmt: skip
def test_embeddings_that_do_not_fit_are_refused_by_name(conditioner, tmp_path, tensors, words) -> None:
    save_file(tensors, tmp_path / "embeddings.safetensors")
    with pytest.raises(UserError, match=words):
        load_words(conditioner, [tmp_path])


def test_a_word_twice_and_a_folder_without_one_are_refused(conditioner, tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"holds no embeddings.safetensors"):
        read_words(tmp_path)
    write_words(tmp_path / "embeddings.safetensors", {"<it>": torch.zeros(1, 24)})
    with pytest.raises(AdapterError, match="the word '<it>' is there already"):
        load_words(conditioner, [tmp_path, tmp_path])
