"""Folders we write open in diffusers and transformers, theirs open here, with the same numbers."""

import pytest
import torch
from diffusers import AutoencoderKL as TheirAutoencoder
from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel
from transformers import T5EncoderModel, T5Tokenizer

from sat.checkpoint import Options, detect, load, save_diffusers
from sat.checkpoint.formats.diffusers import FOLDERS
from sat.conditioning.conditioner import Condition, SizeConditioner
from sat.config.check import build as build_component
from sat.tokenizers import T5Tokenizer as OurTokenizer
from tests.checkpoints import CONFIG, build, same, tensors, tokenizer

PEERS = {
    "model": CogView3PlusTransformer2DModel,
    "first_stage": TheirAutoencoder,
    "text": T5EncoderModel,
}


@pytest.fixture(scope="module", params=[30_000, 10**9], ids=["shards", "one file"])
def ours(request, tmp_path_factory):
    """A diffusers folder we wrote."""
    root = tmp_path_factory.mktemp("ours")
    options = Options(max_shard_bytes=request.param)
    spiece = tokenizer(root / "spiece.model")
    return save_diffusers(root / "out", tensors(), CONFIG, tokenizer=spiece, options=options)


@pytest.fixture(scope="module")
def pipeline(ours):
    return CogView3PlusPipeline.from_pretrained(ours)


@pytest.mark.parametrize("part", PEERS)
def test_their_classes_load_our_folders_without_a_word(ours, part):
    peer, info = PEERS[part].from_pretrained(ours / FOLDERS[part], output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not peer.training


def test_the_whole_pipeline_opens_and_draws(ours, pipeline):
    """The pictures are compared in test_end_to_end.py; here the folder must hold all that is needed."""
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler)
    out = pipeline(
        "a red apple", height=32, width=48, num_inference_steps=2, max_sequence_length=16, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert out.shape == (1, 3, 32, 48)
    assert out.isfinite().all()


def test_their_scheduler_has_our_settings(pipeline):
    config = pipeline.scheduler.config
    assert config.snr_shift_scale == 2.5
    assert config.rescale_betas_zero_snr
    assert (config.timestep_spacing, config.prediction_type) == ("trailing", "v_prediction")
    assert config.set_alpha_to_one
    assert pipeline.scheduler.alphas_cumprod[-1] == 0


def test_their_transformer_gives_our_numbers(ours, pipeline):
    """Float64; without the official second norm before the head, which diffusers does not have."""
    config = {**CONFIG["model"], "params": {**CONFIG["model"]["params"], "double_norm": False}}
    with torch.device("meta"):
        module = build_component(config).double()
    load(module, ours, "model", dtype=torch.float64)
    peer = CogView3PlusTransformer2DModel.from_pretrained(ours / "transformer").double()
    peer.patch_embed.pos_embed = peer.patch_embed.pos_embed.double()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 8, 12, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 16, 24, generator=generator, dtype=torch.float64)
    size = torch.tensor([[64.0, 96.0]]).double().expand(2, 2)
    with torch.no_grad():
        wanted = peer(latent, text, torch.tensor([7, 7]), size, size, size * 0, return_dict=False)[0]
        vector = SizeConditioner(8)(size, size * 0, size).double()
        cond = Condition(text, vector)
        found = module(latent, 7.0, module.prepare(cond, (8, 12), [7.0]))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()  # float32 sinusoids in both


def test_their_autoencoder_gives_our_numbers(ours, pipeline):
    module = build("first_stage", meta=True)
    load(module, ours, "first_stage")
    module = module.double()
    latent = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        wanted = TheirAutoencoder.from_pretrained(ours / "vae").double().decode(latent).sample
        assert (module.decode(latent) - wanted).abs().max() < 1e-10 * wanted.abs().max()
    assert pipeline.vae.config.scaling_factor == 0.7


def test_their_text_encoder_gives_our_numbers(ours):
    module = build("text", meta=True)
    load(module, ours, "text")
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        wanted = T5EncoderModel.from_pretrained(ours / "text_encoder").double()(ids).last_hidden_state
        # their RMS norm takes the mean square in float32 whatever the type of the weights
        assert (module.double()(ids) - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_their_tokenizer_gives_our_ids(ours):
    theirs = T5Tokenizer.from_pretrained(ours / "tokenizer")
    own = OurTokenizer(ours / "tokenizer" / "spiece.model", 16)
    captions = ["a red apple", "", "a green house with the sun", "blue  car, red ship!", "z" * 60]
    wanted = theirs(
        captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(own(captions).ids, wanted)
    assert theirs.model_max_length == 16


def test_what_their_pipeline_saves_loads_here_bit_for_bit(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    for part in PEERS:
        module = build(part, meta=True)
        report = load(module, tmp_path / "theirs", part)
        assert report.missing == report.unexpected == []
        assert same(module.state_dict(), build(part).state_dict())
    config = detect(tmp_path / "theirs").config(tmp_path / "theirs")
    assert CONFIG["model"]["params"].items() <= config["model"]["params"].items()
    assert config["diffusion"]["schedule"]["params"]["shift"] == 2.5


def test_their_bin_files_and_whole_t5_models_load_here(tmp_path):
    """The published T5 1.1 is a .bin with the decoder in it."""
    from transformers import T5Config, T5ForConditionalGeneration

    text = CONFIG["conditioning"]["text"]["params"]
    config = T5Config(
        vocab_size=text["vocab"], d_model=text["dim"], d_kv=text["head_dim"], d_ff=text["mlp_dim"],
        num_layers=text["depth"], num_heads=text["heads"], feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=16, tie_word_embeddings=False,
    )  # fmt: skip
    whole = T5ForConditionalGeneration(config).eval()
    config.save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    assert detect(tmp_path).name == "huggingface"
    module = build("text", meta=True)
    report = load(module, tmp_path, "text")
    assert "lm_head.weight" in report.ignored
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        assert (module(ids) - whole.encoder(ids).last_hidden_state).abs().max() < 1e-4
