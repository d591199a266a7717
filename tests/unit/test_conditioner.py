"""From captions and sizes to a condition: what is encoded, what is not, and what the user is told."""

from __future__ import annotations

import logging

import pytest
import torch

from sat.conditioning.conditioner import Condition, Conditioner, SizeConditioner, Sizes
from sat.models.t5 import T5Encoder
from sat.tokenizers import T5Tokenizer
from tests.small import fill
from tests.tolerances import F32
from tests.vocabulary import write_vocabulary

LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return T5Tokenizer(write_vocabulary(tmp_path_factory.mktemp("t5")), LENGTH)


@pytest.fixture
def conditioner(tokenizer):
    text = T5Encoder(dim=24, heads=3, head_dim=8, mlp_dim=40, depth=2, vocab=tokenizer.vocab_size)
    fill(text)
    return Conditioner(text, SizeConditioner(dim=4), tokenizer, LENGTH).eval().requires_grad_(False)


@pytest.fixture
def passes(conditioner):
    """The batch size of each run of the encoder."""
    found: list[int] = []
    conditioner.text.register_forward_hook(lambda module, args, out: found.append(len(args[0])))
    return found


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_text_is_the_encoders_output_over_padding_and_all(conditioner, tokenizer):
    ids = tokenizer(["a red apple"]).ids
    text, mask = conditioner.encode(["a red apple"])
    assert mask is None
    assert text.equal(conditioner.text(ids))
    assert not torch.allclose(text, conditioner.text(ids, ids != 0)), "padding takes part"


def test_each_caption_is_encoded_alone_and_once(conditioner, passes):
    captions = ["a dog", "a red apple", "a dog", "", "a dog"]
    text = conditioner.encode(captions).text
    assert passes == [1, 1, 1]
    assert text.shape == (5, LENGTH, 24)
    for row, caption in enumerate(captions):
        assert text[row].equal(conditioner.encode([caption]).text[0]), "bitwise, whatever the neighbours"


def test_a_training_batch_takes_one_pass_without_its_duplicates(conditioner, passes, caplog):
    captions = ["a dog", "a red apple", "a dog", "the sky " * 30, "a red apple"]
    text = conditioner.encode_batch(captions).text
    assert passes == [3]
    assert not warnings(caplog)
    torch.testing.assert_close(text, conditioner.encode(captions).text, rtol=F32, atol=F32)


def test_duplicates_add_their_gradients(conditioner):
    conditioner.text.requires_grad_(True)
    table = conditioner.text.transformer.mixins["token_embed"].table.weight

    def gradient(captions):
        table.grad = None
        conditioner.encode_batch(captions).text.sum().backward()
        return table.grad.clone()

    torch.testing.assert_close(gradient(["a dog", "a dog"]), 2 * gradient(["a dog"]), rtol=F32, atol=F32)


def test_a_condition_joins_text_and_sizes(conditioner):
    sizes = Sizes.uncropped(64, 96, 2)
    cond = conditioner.condition(["a dog", "a cat"], sizes)
    assert cond.text.shape == (2, LENGTH, 24)
    assert cond.vector.shape == (2, 24) == (2, conditioner.size.width)
    assert cond.vector.equal(conditioner.size(*sizes))
    assert cond.text_mask is None


@pytest.mark.parametrize("negative", [None, ["", ""], ["  ", "\n"]])
def test_an_empty_negative_prompt_is_zeros_and_is_not_encoded(conditioner, passes, negative):
    cond = conditioner.condition(["a dog", "a cat"], Sizes.uncropped(64, 96, 2))
    passes.clear()
    uncond = conditioner.unconditional(cond, negative)
    assert passes == []
    assert uncond.text.shape == cond.text.shape
    assert not uncond.text.any()
    assert uncond.vector.equal(cond.vector), "the sizes stay"


def test_a_negative_prompt_is_encoded_where_there_is_one(conditioner, passes):
    cond = conditioner.condition(["a dog", "a cat", "a sky"], Sizes.uncropped(64, 96, 3))
    passes.clear()
    uncond = conditioner.unconditional(cond, ["old", "", "old"])
    assert passes == [1]
    assert uncond.text[0].equal(conditioner.encode(["old"]).text[0])
    assert not uncond.text[1].any()
    assert uncond.text[2].equal(uncond.text[0])
    assert uncond.vector.equal(cond.vector)


def test_negative_prompts_of_another_number_are_refused(conditioner):
    cond = Condition(torch.zeros(3, LENGTH, 24), torch.zeros(3, 24))
    with pytest.raises(ValueError, match="2 negative prompts for 3 images"):
        conditioner.unconditional(cond, ["old", "old"])


def test_the_words_that_do_not_fit_are_shown_once(conditioner, caplog):
    long = "a red apple on the mountain under the full sky"
    conditioner.encode([long, "a dog", long])
    (line,) = warnings(caplog)
    assert "11 tokens, more than the 8 of conditioning.max_length" in line
    assert "dropped: 'the full sky'" in line


def test_a_prompt_of_exactly_the_limit_is_not_warned_about(conditioner, caplog):
    conditioner.encode(["a red apple on the mountain under"])
    assert not warnings(caplog)


@pytest.mark.parametrize("prompt", ["一只狗坐在河边", "собака", "一只狗坐在山 on sky"])
def test_a_prompt_the_encoder_cannot_read_is_warned_about(conditioner, caplog, prompt):
    conditioner.encode([prompt])
    (line,) = warnings(caplog)
    assert f"characters of prompt {prompt!r}" in line
    assert "translate the prompt into English or rewrite it" in line


@pytest.mark.parametrize("prompt", ["a red apple 😀", "", "a café under the Straße", "a red <pad>"])
def test_a_prompt_that_is_mostly_known_is_not(conditioner, caplog, prompt):
    conditioner.encode([prompt])
    assert not warnings(caplog)


def test_a_table_with_a_row_for_every_trained_piece_is_enough(tokenizer):
    text = T5Encoder(dim=24, heads=3, head_dim=8, mlp_dim=40, depth=1, vocab=tokenizer.trained)
    fill(text)
    conditioner = Conditioner(text, SizeConditioner(4), tokenizer, LENGTH)
    assert conditioner.encode(["<extra_id_3> dog"]).text.isfinite().all()


def test_a_vocabulary_larger_than_the_table_is_refused(tokenizer):
    text = T5Encoder(dim=24, heads=3, head_dim=8, mlp_dim=40, depth=1, vocab=tokenizer.trained - 1)
    with pytest.raises(ValueError, match=f"has {tokenizer.trained} pieces, .* {tokenizer.trained - 1} rows"):
        Conditioner(text, SizeConditioner(4), tokenizer, LENGTH)


def test_two_token_limits_are_refused(tokenizer, conditioner):
    with pytest.raises(ValueError, match="cuts at 8 tokens, not at conditioning.max_length 16"):
        Conditioner(conditioner.text, SizeConditioner(4), tokenizer, 16)


def test_captions_without_a_tokenizer_are_refused(conditioner):
    with pytest.raises(ValueError, match="name its vocabulary in conditioning.tokenizer"):
        Conditioner(conditioner.text, SizeConditioner(4), None, LENGTH).encode(["a dog"])


def test_a_freed_encoder_holds_nothing_and_says_so(conditioner):
    cond = conditioner.condition(["a dog"], Sizes.uncropped(64, 96, 1))
    conditioner.free_text_encoder()
    assert not list(conditioner.parameters())
    assert not conditioner.unconditional(cond, [""]).text.any(), "zeros need no encoder"
    with pytest.raises(RuntimeError, match="set memory.text_encoder=cpu or keep"):
        conditioner.encode(["a cat"])


def test_the_encoder_goes_where_it_is_asked_to(conditioner):
    conditioner.text_encoder_to(torch.device("meta"))
    assert {p.device.type for p in conditioner.parameters()} == {"meta"}
    assert conditioner.encode(["a dog"]).text.device.type == "meta"


def test_its_names_in_a_checkpoint_start_with_text(conditioner):
    assert all(name.startswith("text.transformer.") for name in conditioner.state_dict())
