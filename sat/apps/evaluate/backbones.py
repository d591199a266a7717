"""CLIP, BLIP and Inception networks read from local files, for metrics that do not ship.

The only file that imports transformers: an extra of evaluation, never of sampling or training.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.checkpoint.files import open_file
from sat.checkpoint.format import CheckpointError, LazyStateDict, Prefixed
from sat.checkpoint.rules import as_ours
from sat.checkpoint.verify import read_json
from sat.keys import Drop, Rename, Rules, Split

EXTRA = "pip install 'transformers>=5,<6'"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's and BLIP's training pictures, in [0, 1]."""

_QKV = ("q_proj", "k_proj", "v_proj")


def _transformer(theirs: str, ours: str) -> Rules:
    """Rules of one of OpenCLIP's two transformers."""
    block, layer = f"{theirs}transformer.resblocks.{{}}", f"{ours}.encoder.layers.{{}}"
    split = [
        Split(f"{block}.attn.in_proj_{kind}", tuple(f"{layer}.self_attn.{name}.{kind}" for name in _QKV))
        for kind in ("weight", "bias")
    ]
    return (
        *split,
        Rename(f"{block}.attn.out_proj.*", f"{layer}.self_attn.out_proj.*"),
        Rename(f"{block}.ln_1.*", f"{layer}.layer_norm1.*"),
        Rename(f"{block}.ln_2.*", f"{layer}.layer_norm2.*"),
        Rename(f"{block}.mlp.c_fc.*", f"{layer}.mlp.fc1.*"),
        Rename(f"{block}.mlp.c_proj.*", f"{layer}.mlp.fc2.*"),
    )


OPEN_CLIP: Rules = (
    *_transformer("visual.", "vision_model"),
    *_transformer("", "text_model"),
    Rename("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Rename("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rename("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rename("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # transformers' own spelling
    Rename("visual.ln_post.*", "vision_model.post_layernorm.*"),
    Rename("visual.proj", "visual_projection.weight"),
    Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rename("ln_final.*", "text_model.final_layer_norm.*"),
    Rename("text_projection", "text_projection.weight"),
    Rename("logit_scale", "logit_scale"),
)
"""OpenCLIP's names, under which HPS v2 is published, to transformers'."""

TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
"""OpenCLIP keeps these (in, out)."""

BLIP_VISION: Rules = (
    Rename("cls_token", "embeddings.class_embedding"),
    Rename("pos_embed", "embeddings.position_embedding"),
    Rename("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    Rename("blocks.{}.norm1.*", "encoder.layers.{}.layer_norm1.*"),
    Rename("blocks.{}.norm2.*", "encoder.layers.{}.layer_norm2.*"),
    Rename("blocks.{}.attn.qkv.*", "encoder.layers.{}.self_attn.qkv.*"),
    Rename("blocks.{}.attn.proj.*", "encoder.layers.{}.self_attn.projection.*"),
    Rename("blocks.{}.mlp.fc1.*", "encoder.layers.{}.mlp.fc1.*"),
    Rename("blocks.{}.mlp.fc2.*", "encoder.layers.{}.mlp.fc2.*"),
    Rename("norm.*", "post_layernorm.*"),
)
"""BLIP's names of its image encoder, under which ImageReward is published, to transformers'."""

BLIP_TEXT: Rules = (
    Drop("embeddings.position_ids", "transformers counts them itself"),
    Rename("embeddings.*.*", "embeddings.*.*"),
    Rename("encoder.**", "encoder.**"),
)


def lacks_transformers() -> str | None:
    """The command that installs transformers; None where it is installed."""
    return None if importlib.util.find_spec("transformers") is not None else EXTRA


def normalised(values: Tensor) -> Tensor:
    """CLIP's input (3, H, W) of RGB (3, H, W) in [0, 1]."""
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def unit(image: PIL.Image.Image) -> Tensor:
    """RGB (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def pixels(image: PIL.Image.Image, side: int) -> Tensor:
    """The middle square (3, side, side), normalised for CLIP; bytes are resized."""
    scale = side / min(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return normalised(unit(image.crop((left, top, left + side, top + side))))


def whole_pixels(image: PIL.Image.Image, side: int) -> Tensor:
    """The whole picture on black (3, side, side), normalised for CLIP, as hpsv2 1.2.0 prepares it.

    There floats are resized, not bytes, so that edges overshoot [0, 1]; of an odd margin the larger part
    lies at the bottom and right. torchvision has smoothed (``antialias``) by default since 0.17.
    """
    values = unit(image)
    scale = side / max(image.size)
    height, width = (max(1, round(length * scale)) for length in values.shape[1:])
    if values.shape[1:] != (height, width):
        values = F.interpolate(values[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = (side - width) // 2, (side - height) // 2
    return normalised(F.pad(values, (left, side - width - left, top, side - height - top)))


class Clip:
    """A CLIP of transformers: unit vectors of pictures and captions in one space."""

    def __init__(self, folder: Path, device: torch.device, weights: Path | None = None) -> None:
        """Read ``folder``; with ``weights`` (OpenCLIP's names) only its config and tokenizer."""
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        self.folder, self.device = folder, device
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if weights is None:
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        else:
            model = CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True))
            fill(model, weights, OPEN_CLIP, transposed=TRANSPOSED)
        self.model: Any = model.float().to(device).eval()
        self.side = int(model.config.vision_config.image_size)
        self.width = int(model.config.projection_dim)
        self.tokens = int(model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def images(self, images: Sequence[PIL.Image.Image], *, whole: bool = False) -> Tensor:
        """(B, width) of length 1, on the device."""
        batch = torch.stack([(whole_pixels if whole else pixels)(image, self.side) for image in images])
        out = self.model.visual_projection(self.model.vision_model(batch.to(self.device)).pooler_output)
        return nn.functional.normalize(out, dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, width) of length 1, on the device; captions are cut at the model's number of tokens."""
        ids = self.tokenizer(
            list(texts), truncation=True, padding="max_length", max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        out = self.model.text_model(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        return nn.functional.normalize(self.model.text_projection(out.pooler_output), dim=-1)

    def cut(self, texts: Sequence[str]) -> int:
        """Number of captions that are longer than the model reads."""
        whole = self.tokenizer(list(texts), truncation=False, verbose=False).input_ids
        return sum(len(ids) > self.tokens for ids in whole)


class Blip:
    """ImageReward's network: BLIP's text encoder, cross attention to the picture, a head of linears."""

    def __init__(self, weights: Path, config: Path, vocabulary: Path, device: torch.device) -> None:
        from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        file = open_file(weights)
        self.device = device
        tokenizer: Any = BertTokenizer.from_pretrained(vocabulary, local_files_only=True)
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        self.tokenizer = tokenizer

        image = Prefixed(file, "blip.visual_encoder.")  # its tensors tell its size; heads are 64 wide in all
        width, _, patch, _ = image.info("patch_embed.proj.weight").shape
        cells = image.info("pos_embed").shape[1] - 1
        shape = BlipVisionConfig(
            hidden_size=width, intermediate_size=image.info("blocks.0.mlp.fc1.weight").shape[0],
            num_hidden_layers=sum(name.endswith(".attn.qkv.weight") for name in image),
            num_attention_heads=max(1, width // 64), patch_size=patch,
            image_size=patch * round(cells**0.5), layer_norm_eps=1e-6,
        )  # fmt: skip
        vision: Any = BlipVisionModel(shape)

        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                 "max_position_embeddings", "layer_norm_eps", "hidden_act")  # fmt: skip
        med = read_json(config)
        none = dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
        text_config = BlipTextConfig(
            encoder_hidden_size=width, pad_token_id=0, **none,
            is_decoder=True,  # it has cross attention; the call says that it reads both ways
            **{name: med[name] for name in names if name in med},
        )  # fmt: skip
        text: Any = BlipTextModel(text_config, add_pooling_layer=False)
        fill(vision, image, BLIP_VISION)
        fill(text, Prefixed(file, "blip.text_encoder."), BLIP_TEXT)
        self.head = head(Prefixed(file, "mlp."), str(weights)).to(device)
        self.vision, self.text = vision.float().to(device).eval(), text.float().to(device).eval()
        self.side = int(vision.config.image_size)

    @torch.inference_mode()
    def __call__(self, images: Sequence[PIL.Image.Image], texts: Sequence[str], tokens: int) -> Tensor:
        """The head's output (B) for pictures and captions of at most ``tokens`` tokens, on the CPU."""
        batch = torch.stack([pixels(image, self.side) for image in images]).to(self.device)
        seen = self.vision(batch).last_hidden_state
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
        ).to(self.device)
        out = self.text(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device),
            is_decoder=False,
        )
        result: Tensor = self.head(out.last_hidden_state[:, 0]).squeeze(-1).float().cpu()
        return result


class Inception:
    """A feature network as a TorchScript program, such as the published ``inception-2015-12-05.pt``.

    It takes bytes (B, 3, H, W) and resizes them itself, as the published FID does.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.name, self.device = path.name, device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, the published file remains one
                self.program: Any = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: not a TorchScript file ({str(error).splitlines()[0][:120]})"
            ) from error
        names = {argument.name for argument in self.program.forward.schema.arguments}
        self._arguments = {"return_features": True} if "return_features" in names else {}

    @torch.inference_mode()
    def __call__(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Features (B, F) on the CPU. Pictures of one size go through together."""
        rows: dict[int, Tensor] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        opened = list(images)
        for index, image in enumerate(opened):
            by_size.setdefault(image.size, []).append(index)
        for group in by_size.values():
            batch = torch.stack([torch.from_numpy(np.array(opened[i])).permute(2, 0, 1) for i in group])
            out = self.program(batch.to(self.device), **self._arguments)
            rows |= dict(zip(group, out.flatten(1).float().cpu(), strict=True))
        return torch.stack([rows[index] for index in range(len(rows))])


def fill(
    module: nn.Module, weights: Path | LazyStateDict, rules: Rules, transposed: Sequence[str] = ()
) -> None:
    """Put the tensors of ``weights``, renamed by ``rules``, into ``module``: all of them, and no others."""
    file = open_file(weights) if isinstance(weights, Path) else weights
    ours = as_ours(file, rules)
    state = {name: ours[name].float() for name in ours}
    state |= {name: state[name].T.contiguous() for name in transposed if name in state}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(
            f"{file.source}: does not fit {type(module).__name__}: {lines[0][:200]}"
        ) from error


def head(weights: LazyStateDict, source: str) -> nn.Sequential:
    """The linears of a head, one after the other, as its tensors name them (``layers.0.weight``, …)."""
    names = sorted(
        (n for n in weights if n.endswith("weight")),
        key=lambda n: [int(p) for p in n.split(".") if p.isdigit()],
    )
    if not names:
        raise CheckpointError(f"{source}: no linear layers in it")
    layers = []
    for name in names:
        weight, bias = weights[name].float(), weights[name.removesuffix("weight") + "bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).eval()
