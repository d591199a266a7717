"""Text of different lengths: GLM's tokens, batches padded in front, masks, empty prompts."""

from __future__ import annotations

import builtins
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition, Conditioner, Encoded, SizeConditioner, Sizes, joined
from sat.data.batch import Sample, collate
from sat.diffusion.guidance import ClassifierFree
from sat.models.cogview4 import CogView4
from sat.models.glm import GLMEncoder
from sat.tokenizers import GLMTokenizer, MissingTokenizersError, T5Tokenizer
from tests.small import fill
from tests.tolerances import F64
from tests.vocabulary import write_vocabulary

SIZES = Sizes.uncropped(64, 96, 3)
LONG = "a red apple " * 12


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("glm"))


@pytest.fixture(scope="module")
def bytes_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary with GLM's special tokens, written by the library."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["a red apple on a table", "the blue ship"], trainer)
    ids = [(name, made.token_to_id(name)) for name in special[1:]]
    made.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=ids)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    made.save(str(path))
    return path


def conditioner(path: Path, **settings: Any) -> Conditioner:
    tokenizer = GLMTokenizer(path, 64)
    text = GLMEncoder(dim=24, heads=6, kv_heads=2, head_dim=8, mlp_dim=40, depth=2, vocab=2048)
    fill(text)
    return Conditioner(text, SizeConditioner(dim=8), tokenizer, 64, **settings).eval().requires_grad_(False)


# -- tokens


def test_padding_stands_in_front_up_to_a_multiple_of_16(vocabulary: Path) -> None:
    glm, t5 = GLMTokenizer(vocabulary, 64), T5Tokenizer(vocabulary, 64)
    ids, mask = glm(["a red apple", "", LONG])
    longest = len(t5.encode(LONG))
    assert 16 < longest < 64 and ids.shape == (3, -(-longest // 16) * 16)
    for row, text in enumerate(["a red apple", "", LONG]):
        own = t5.encode(text)
        assert ids[row, -len(own) :].tolist() == own and mask[row].sum() == len(own)
        assert bool((ids[row, : -len(own)] == 0).all()) and not mask[row, : -len(own)].any()
    assert glm([""]).ids.shape == (1, 16)


def test_ids_equal_those_of_transformers_with_padding_on_the_left(bytes_json: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(
        tokenizer_file=str(bytes_json), pad_token="<|endoftext|>", padding_side="left"
    )
    ours = GLMTokenizer(bytes_json, 40)
    texts = ["a red apple", "", "the blue ship ß 船", "a red apple on a table " * 9]
    theirs = peer(texts, padding="longest", max_length=40, truncation=True, return_tensors="pt")
    ids, mask = ours(texts)
    extra = ids.shape[1] - theirs.input_ids.shape[1]
    assert ids.shape[1] % 16 == 0 and extra < 16
    assert torch.equal(ids[:, extra:], theirs.input_ids) and bool((ids[:, :extra] == ours.pad).all())
    assert torch.equal(mask[:, extra:].long(), theirs.attention_mask)
    assert ours.trained == len(peer)


def test_text_beyond_the_limit_is_told(bytes_json: Path, vocabulary: Path) -> None:
    for path in (bytes_json, vocabulary):
        tokenizer = GLMTokenizer(path, 8)
        assert tokenizer.truncation("a red") is None
        dropped = tokenizer.truncation("a red apple and the blue ship of a friend")
        assert dropped and dropped.endswith("friend")
        assert tokenizer(["a red apple and the blue ship of a friend"]).mask.sum() == 8


def test_a_missing_library_is_named(bytes_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kw: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingTokenizersError, match=r"needs the tokenizers library"):
        GLMTokenizer(bytes_json, 16)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"neither <\|endoftext\|> nor <pad>"):
        GLMTokenizer(tmp_path, 16)
    with pytest.raises(FileNotFoundError, match="No such file"):
        GLMTokenizer(tmp_path / "absent", 16)


# -- batches


def test_shorter_text_begins_later_and_is_masked() -> None:
    a, b = torch.ones(1, 3, 2), torch.ones(2, 5, 2)
    text, mask = joined([Encoded(a, None), Encoded(b, None)])
    assert text.shape == (3, 5, 2) and mask is not None
    assert text[0, :2].abs().sum() == 0 and mask.tolist() == [
        [False] * 2 + [True] * 3,
        [True] * 5,
        [True] * 5,
    ]
    assert joined([Encoded(a, None), Encoded(a, None)]).mask is None


def test_each_prompt_is_encoded_alone_whatever_its_neighbours(vocabulary: Path) -> None:
    ours = conditioner(vocabulary)
    text, mask = ours.encode(["a red apple", LONG])
    alone = ours.encode(["a red apple"])
    assert alone.mask is None and alone.text.shape[1] == 16
    assert mask is not None and mask[0].sum() == 16
    assert torch.equal(text[0, -16:], alone.text[0])


def test_masked_padding_is_no_text(vocabulary: Path) -> None:
    ours = conditioner(vocabulary, padding="masked")
    text, mask = ours.encode(["a red apple"])
    assert mask is not None and 0 < mask.sum() < 16 and text.shape[1] == 16
    (row,) = ours.encode_apart(["a red apple"])
    assert torch.equal(row, text[0][mask[0]])
    assert conditioner(vocabulary).encode_apart(["a red apple"])[0].shape == (16, 24)


def test_an_empty_prompt_is_encoded_for_guidance_and_for_dropped_captions(vocabulary: Path) -> None:
    ours = conditioner(vocabulary, empty_prompt="encoded")
    empty = ours.encode([""]).text
    cond = ours.condition(["a red apple", LONG, "a car"], SIZES)
    null = ours.unconditional(cond)
    assert null.text.shape == (3, 16, 24) and torch.equal(null.text, empty.expand(3, -1, -1))
    assert null.vector.equal(cond.vector)
    dropped = ours.dropped(cond, torch.tensor([False, True, False]))
    assert dropped.text.shape == cond.text.shape and dropped.text_mask is not None
    assert torch.equal(dropped.text[1, -16:], empty[0]) and dropped.text_mask[1].sum() == 16
    assert torch.equal(dropped.text[0], cond.text[0]) and bool(dropped.text_mask[0].all())
    ours.empty_text = torch.ones(1, 16, 24)
    assert bool((ours.null(cond).text == 1).all()), "of a cache, where there is no encoder"


def test_negative_prompts_of_a_batch_may_be_empty_in_part(vocabulary: Path) -> None:
    ours = conditioner(vocabulary, empty_prompt="encoded")
    cond = ours.condition(["a red apple", "a dog", "a car"], SIZES)
    null = ours.unconditional(cond, ["", "a car", ""])
    assert torch.equal(null.text[0], ours.encode([""]).text[0])
    assert torch.equal(null.text[1], ours.encode(["a car"]).text[0])


def test_cached_text_of_different_lengths_makes_one_batch() -> None:
    size = (8, 8)
    samples = [
        Sample(caption=str(n), original_size=size, crop=(0, 0), target_size=size, text=torch.ones(n, 4))
        for n in (16, 48)
    ]
    batch = collate(samples)
    assert batch.text is not None and batch.text_mask is not None
    assert batch.text.shape == (2, 48, 4) and batch.text_mask.sum(1).tolist() == [16, 48]
    assert batch.text[0, :32].abs().sum() == 0
    alike = collate([samples[0], replace(samples[0])])
    assert alike.text_mask is None


# -- guidance


@torch.no_grad()
def test_a_freed_text_encoder_is_gone_at_once(vocabulary: Path) -> None:
    made = conditioner(vocabulary)
    seen = weakref.ref(made.text)
    gc.disable()
    try:
        made.free_text_encoder()
        assert seen() is None
    finally:
        gc.enable()


def test_guidance_of_two_lengths_in_one_pass_equals_two_passes() -> None:
    network = CogView4(
        dim=32, heads=4, depth=2, channels=4, text_dim=16, emb_dim=24, size_dim=48, rope_size=(8, 8)
    ).double()
    fill(network)
    g = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    x, vector = some(1, 4, 12, 20), some(1, 48)
    cond, uncond = Condition(some(1, 48, 16), vector), Condition(some(1, 16, 16), vector)
    rows = ClassifierFree(5.0).rows(cond, uncond)
    assert rows.text_mask is not None and len(rows) == 2
    both = network(torch.cat([x, x]), 500.0, network.prepare(rows, (12, 20), [500.0]))
    apart = [network(x, 500.0, network.prepare(one, (12, 20), [500.0])) for one in (uncond, cond)]
    assert (both - torch.cat(apart)).abs().max() < F64
