"""Metrics that do not ship, in transformers' real classes with tiny random weights; what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from sat.apps.evaluate.backbones import Clip, Inception, pixels, whole_pixels
from sat.apps.evaluate.metrics import (
    METRICS,
    REWARD,
    REWARD_MEAN,
    REWARD_STD,
    Aesthetic,
    ClipScore,
    Hps,
    MetricConfig,
    Reward,
    missing,
)
from sat.apps.evaluate.pictures import Picture
from sat.checkpoint.format import CheckpointError
from tests.small import fill

CPU = torch.device("cpu")
CAPTIONS = ("a red apple", "the sun", "a very long tale of an apple and a sun that went on and on and on")
WIDTH = 12
SAME = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
BLIP_SAME = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("post_layernorm", "norm"),
    ("layer_norm", "norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    rng = np.random.default_rng(0)
    made = []
    for index, caption in enumerate(CAPTIONS):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 255, (40 + 8 * index, 48, 3), dtype=np.uint8)).save(path)
        made.append(Picture(path, caption, index))
    return made


def clip_tokenizer(folder: Path) -> None:
    """A vocabulary of single letters, as CLIP's with no merges."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def clip_model(folder: Path) -> CLIPModel:
    """A saved CLIP: 2 layers of 8 (text) and 16 (pictures of 28 pixels), one space of 12."""
    folder.mkdir(parents=True)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 8, "intermediate_size": 20, "vocab_size": 54, "max_position_embeddings": 24,
            "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text | shape, vision_config=vision | shape, projection_dim=WIDTH)
    model = CLIPModel(config)
    fill(model)
    model.eval().save_pretrained(folder)
    clip_tokenizer(folder)
    return model


def open_clip_names(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights as OpenCLIP has them, written down tensor by tensor."""
    state = model.state_dict()
    out = {
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "text_projection": state["text_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "logit_scale": state["logit_scale"],
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for theirs, ours in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            for layer in range(2):
                block, own = f"{theirs}.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
                qkv = [state[f"{own}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                out[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
                for a, b in SAME:
                    out[f"{block}.{a}.{kind}"] = state[f"{own}.{b}.{kind}"]
    return {name: value.contiguous() for name, value in out.items()}


def cosines(model: CLIPModel, clip: Clip, pictures: list[Picture], *, whole: bool) -> torch.Tensor:
    """Through the whole model's forward pass, as its logits say them; its own temperature divided away."""
    seen = whole_pixels if whole else pixels
    batch = torch.stack([seen(Image.open(p.path), clip.side) for p in pictures])
    ids = clip.tokenizer(
        list(CAPTIONS), max_length=24, truncation=True, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        out = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=batch)
    return out.logits_per_image.diagonal() / model.logit_scale.exp()


def test_clip_score_is_100_times_the_cosine_and_says_what_was_cut(tmp_path, pictures) -> None:
    model = clip_model(tmp_path / "clip")
    metric = ClipScore(MetricConfig(CPU, weights=tmp_path, batch_size=2))
    (score,) = metric(pictures)
    expected = 100 * cosines(model, metric.clip, pictures, whole=False).clamp_min(0)
    torch.testing.assert_close(torch.tensor(score.each), expected, rtol=1e-4, atol=1e-4)
    assert score.value == pytest.approx(expected.mean().item(), rel=1e-4)
    assert score.note == "1 captions were cut at 24 tokens"
    assert len(set(score.each)) > 1


def test_the_published_names_of_hps_are_read_as_transformers_names(tmp_path, pictures) -> None:
    model = clip_model(tmp_path / "hps")
    torch.save({"epoch": 1, "state_dict": open_clip_names(model)}, tmp_path / "hps" / "HPS_v2_compressed.pt")
    (tmp_path / "hps" / "model.safetensors").unlink()  # config and tokenizer are enough
    metric = Hps(MetricConfig(CPU, weights=tmp_path))
    (score,) = metric(pictures)
    expected = cosines(model, metric.clip, pictures, whole=True)
    torch.testing.assert_close(torch.tensor(score.each), expected, rtol=1e-4, atol=1e-5)
    assert (expected - cosines(model, metric.clip, pictures, whole=False)).abs().max() > 1e-4


def test_a_damaged_hps_file_is_named(tmp_path) -> None:
    model = clip_model(tmp_path / "hps")
    weights = open_clip_names(model)
    del weights["ln_final.bias"]
    torch.save({"state_dict": weights}, tmp_path / "hps" / "HPS_v2.1_compressed.pt")
    with pytest.raises(
        CheckpointError, match=r"HPS_v2.1_compressed.pt: does not fit CLIPModel.*final_layer_norm"
    ):
        Hps(MetricConfig(CPU, weights=tmp_path))


def linears(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))


def test_the_aesthetic_head_is_linears_over_the_unit_vector(tmp_path, pictures) -> None:
    clip_model(tmp_path / "clip")
    head = linears(WIDTH, 10, 4, 1)
    names = ("layers.0", "layers.2", "layers.7")  # dropout stands between them
    state = {
        f"{n}.{k}": getattr(layer, k).detach()
        for n, layer in zip(names, head, strict=True)
        for k in ("weight", "bias")
    }
    torch.save(state, tmp_path / "aesthetic.pth")
    metric = Aesthetic(MetricConfig(CPU, weights=tmp_path))
    (score,) = metric(pictures)
    vectors = metric.clip.images([Image.open(p.path) for p in pictures]).clone()
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    weight = head[2].weight @ head[1].weight @ head[0].weight
    bias = head[2].weight @ (head[1].weight @ head[0].bias + head[1].bias) + head[2].bias
    torch.testing.assert_close(
        torch.tensor(score.each), (vectors @ weight.T + bias).detach()[:, 0], rtol=1e-4, atol=1e-5
    )


def test_an_aesthetic_head_of_another_clip_is_refused(tmp_path) -> None:
    clip_model(tmp_path / "clip")
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "aesthetic.pth")
    with pytest.raises(CheckpointError, match="reads vectors of 7 numbers, those of .*clip have 12"):
        Aesthetic(MetricConfig(CPU, weights=tmp_path))


def blip_names(vision: BlipVisionModel, text: BlipTextModel, head: nn.Sequential) -> dict[str, torch.Tensor]:
    """The weights as ImageReward has them."""
    out = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.text_proj.weight": torch.zeros(2),
    }
    for name, value in vision.state_dict().items():
        for ours, theirs in BLIP_SAME:
            name = name.replace(ours, theirs)
        out[f"blip.visual_encoder.{name}"] = value
    out |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    for number, layer in zip((0, 2, 7), head, strict=True):
        out |= {f"mlp.layers.{number}.{kind}": getattr(layer, kind).detach() for kind in ("weight", "bias")}
    return out


def test_image_reward_reads_the_picture_with_the_caption(tmp_path, pictures) -> None:
    folder = tmp_path / "image_reward"
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 1}
    seen = {"hidden_size": 64, "intermediate_size": 20, "image_size": 32, "patch_size": 16}
    vision = BlipVisionModel(BlipVisionConfig(layer_norm_eps=1e-6, **seen, **shape))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "the", "sun"]
    med = {
        "hidden_size": 24,
        "intermediate_size": 28,
        "vocab_size": 12,
        "max_position_embeddings": 40,
        **shape,
    }
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
    config = BlipTextConfig(encoder_hidden_size=64, **none, **med)
    text = BlipTextModel(config, add_pooling_layer=False)
    head = linears(24, 6, 3, 1)
    for seed, part in enumerate((vision, text, head)):
        fill(part.eval(), seed=seed)
    torch.save(blip_names(vision, text, head), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(med))
    (folder / "vocab.txt").write_text("\n".join(words))
    config = MetricConfig(CPU, weights=tmp_path, batch_size=2)
    (score,) = Reward(config)(pictures)
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0]])  # [CLS] a red apple [SEP]; [CLS] the sun [SEP]
    for row, picture in enumerate(pictures[:2]):
        with torch.no_grad():
            seen = vision(pixels(Image.open(picture.path), 32)[None]).last_hidden_state
            length = 5 - row
            out = text(input_ids=ids[row : row + 1, :length], encoder_hidden_states=seen).last_hidden_state[
                :, 0
            ]
            expected = (head(out).item() - REWARD_MEAN) / REWARD_STD
        assert score.each[row] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    swapped = [
        Picture(p.path, q.caption, p.prompt) for p, q in zip(pictures, reversed(pictures), strict=True)
    ]
    assert Reward(config)(swapped)[0].each[0] != pytest.approx(score.each[0], abs=1e-4)


class _Program(nn.Module):
    """Stands for the published program: bytes in, features out, only if it is asked for them."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = x.float().mean(dim=(2, 3))
        return means[:, :, None, None] if return_features else means.sum(dim=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TorchScript.*")
def test_a_torchscript_program_is_asked_for_features_of_bytes(tmp_path, pictures) -> None:
    torch.jit.script(_Program()).save(str(tmp_path / "inception.pt"))
    images = [Image.open(picture.path).convert("RGB") for picture in pictures]
    out = Inception(tmp_path / "inception.pt", CPU)(images)
    expected = np.stack([np.asarray(image).mean((0, 1)) for image in images])  # of three different sizes
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5)
    (tmp_path / "other.pt").write_bytes(b"not a program")
    with pytest.raises(CheckpointError, match="other.pt: not a TorchScript file"):
        Inception(tmp_path / "other.pt", CPU)


def test_a_picture_is_seen_by_its_middle_or_whole() -> None:
    wide = Image.new("RGB", (56, 28), "white")
    wide.paste((255, 0, 0), (14, 0, 42, 28))
    middle, whole = pixels(wide, 28), whole_pixels(wide, 28)
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(middle[:, 14, 3], red, atol=1e-3, rtol=1e-3)
    black = -torch.tensor([0.48145466, 0.4578275, 0.40821073]) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(whole[:, 2, 14], black)
    torch.testing.assert_close(whole[:, 14, 14], red)


def test_a_whole_picture_is_prepared_as_by_the_published_package() -> None:
    """Numbers of hpsv2 1.2.0's own transform (torchvision 0.28) for a picture of 37 x 20 at side 28."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 37, 3), dtype=np.uint8)
    seen = whole_pixels(Image.fromarray(noise), 28)
    row, column = seen[0, 10, ::5].tolist(), seen[2, ::5, 13].tolist()
    assert row == pytest.approx([-1.161785, 0.307097, 0.861161, -0.050729, 0.029925, -0.626358], abs=2e-6)
    assert column == pytest.approx([-1.48022, -1.48022, 0.547733, 0.180183, 0.343791, -1.48022], abs=2e-6)
    assert seen.double().sum().item() == pytest.approx(-1622.8181, abs=1e-3)
    odd = whole_pixels(Image.new("RGB", (20, 7), "white"), 20)  # 13 rows of margin: 6 above, 7 below
    white = (odd[0] > 0).any(1).nonzero().flatten()
    assert white.tolist() == list(range(6, 13))


def test_hps_reads_html_entities_of_a_caption_twice(tmp_path, monkeypatch) -> None:
    said: list[str] = []

    class Fake:
        def __init__(self, *given: object) -> None: ...

        def images(self, images: object, whole: bool) -> torch.Tensor:
            return torch.ones(1, 2)

        def texts(self, texts: list[str]) -> torch.Tensor:
            said.extend(texts)
            return torch.ones(1, 2)

    monkeypatch.setattr("sat.apps.evaluate.metrics.Clip", Fake)
    Hps(MetricConfig(CPU, weights=tmp_path)).values([], ["salt &amp;amp;  pepper &lt;3"])  # type: ignore[arg-type]
    assert said == ["salt & pepper <3"]


def test_every_metric_says_in_a_line_each_what_it_lacks(tmp_path, monkeypatch) -> None:
    config = MetricConfig(CPU, weights=tmp_path / "judges", classifier=tmp_path / "none")
    lines = missing(list(METRICS), config, ["a red apple"])
    assert {line.partition(":")[0] for line in lines} == set(METRICS)
    text = "\n".join(lines)
    files = ("inception-2015-12-05.pt", "HPS_v2", "sac+logos+ava1-l14-linearMSE.pth", *REWARD)
    for words in ("--classifier", "--real", "clip-vit-large-patch14", *files):
        assert words in text, words
    assert "pip install" not in text
    how = "pip install 'transformers>=5,<6'"
    monkeypatch.setattr("sat.apps.evaluate.metrics.lacks_transformers", lambda: how)
    asked = missing(["clip", "image_reward"], config, [])
    assert sum("needs transformers: pip install 'transformers>=5,<6'" in line for line in asked) == 2


def test_a_list_without_known_things_cannot_be_judged_by_retrieval(tmp_path, pytestconfig) -> None:
    config = MetricConfig(
        CPU, classifier=pytestconfig.rootpath / "checkpoints/tiny_classifier", real=tmp_path
    )
    (line,) = missing(["retrieval"], config, ["zebra crossing"])
    assert "none of the 1 prompts names one of the 128 things" in line
    assert missing(["retrieval"], config, ["zebra", "a red apple"]) == []
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (line,) = missing(["features"], config, [])
    assert "holds 1 pictures, at least 4 are needed" in line
