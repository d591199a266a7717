"""Stages of our own: random weights in the official layouts, and what is measured and compared on them.

``python -m tests.full_size.work write plus`` in a member's folder, whose ``configs`` has the sizes.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.checkpoint import DTYPES, load, open_part
from sat.checkpoint.format import ENGINE_PREFIXES, PARTS, LazyStateDict, Part, TensorInfo
from sat.checkpoint.formats.sat import SIDECAR
from sat.checkpoint.load import Computes, match, wanted
from sat.checkpoint.rules import as_theirs, family_rules
from sat.checkpoint.save import Options, save_diffusers, save_sat, write_shards
from sat.checkpoint.verify import DIGESTS
from sat.conditioning.conditioner import Condition, SizeConditioner, Sizes
from sat.config.build import build_empty, quantizers
from sat.config.load import load as load_config
from sat.config.schema import Component, Experiment, QuantizeConfig, plain
from sat.kernels.packed import PackedLinear
from sat.models.cogview3_plus import CogView3Plus
from sat.models.t5 import T5Encoder
from sat.transformer import Context
from sat.util.host import trim_heap
from tests.checkpoints import spec
from tests.full_size.stages import PUBLISHED, ROOT, remove
from tests.tolerances import BF16

TOKENIZER = ROOT / "checkpoints" / "tiny" / "tokenizer" / "spiece.model"
TILE = 1_048_573
"""Values drawn for a tensor, which a larger one repeats: a prime, so that no two rows of it are alike."""
BOTH_BF16 = 1.5 * BF16  # each rounds to bf16 by itself, and neither is the reference: sqrt(2), and a margin


class Random(LazyStateDict):
    """Random weights of a network on the meta device, each drawn by its name whenever it is read.

    Their sizes keep signals near 1: weights by their inputs, norms around 1, modulation and biases small.
    """

    digested = True

    def __init__(self, module: nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
        self.source, self.module, self.seed = "random weights", module, seed
        self._infos = {name: TensorInfo(info.shape, dtype) for name, info in wanted(module).items()}

    def info(self, key: str) -> TensorInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, key: str) -> Tensor:
        path, _, local = key.rpartition(".")
        owner, (shape, dtype) = self.module.get_submodule(path), self._infos[key]
        if isinstance(owner, Computes) and local in owner.computed():
            return owner.computed()[local].to(dtype)
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(key.encode()))
        numel = self._infos[key].numel
        value = torch.randn(min(numel, TILE), generator=generator)
        if local == "bias":
            value.mul_(0.02)
        elif len(shape) == 1:
            value.mul_(0.1).add_(1)
        elif not isinstance(owner, nn.Embedding):
            value.mul_((0.5 if "adaln" in path else 1.0) * (numel // shape[0]) ** -0.5)
        value = value.to(dtype).repeat(-(-numel // TILE))[:numel].view(shape)
        if isinstance(self.module, T5Encoder) and path.endswith("attn.qkv"):  # T5 does not scale its logits
            value[: len(value) // 3].mul_(self.module.transformer.blocks[0].attn.head_dim ** -0.5)
        return value


def experiment(member: str) -> Experiment:
    """The member's config."""
    return load_config([f"configs/{member}.yaml"])


def component(config: Experiment, part: Part) -> Component:
    """The config of a part."""
    return {"model": config.model, "first_stage": config.first_stage, "text": config.conditioning.text}[part]


def empty(config: Experiment, part: Part) -> nn.Module:
    """The network of a part, on the meta device."""
    with torch.device("meta"):
        return build_empty(component(config, part))


def weights(member: str, config: Experiment) -> dict[Part, Random]:
    """Every part in the type it is published in; T5-XXL in bf16, for the disk's sake."""
    types: dict[Part, torch.dtype] = {
        "model": torch.bfloat16 if member in ("plus", "cogview4") else torch.float16,
        "first_stage": torch.float32,
        "text": torch.bfloat16,
    }
    return {part: Random(empty(config, part), types[part], len(part)) for part in PARTS}


def as_published(member: str, parts: Mapping[Part, Random]) -> None:
    """Assert that network and autoencoder have the official names and shapes."""
    plus = member == "plus"
    names = {"model": "plus_sat" if plus else "unet_sat", "first_stage": "vae16_sat" if plus else "vae4_sat"}
    added = {"w_proj.weight"} if "distill" in member else set()
    for part in names.keys() & parts.keys():
        theirs = as_theirs(parts[part], family_rules(type(parts[part].module))["SAT"])
        published = spec(names[part]).infos().items()
        assert {k: i.shape for k, i in theirs.infos().items() if k not in added} == {
            k.removeprefix("model.diffusion_model."): i.shape for k, i in published
        }, part


def write(member: str, *only: str) -> dict[str, Any]:
    """The official files of a member, names and shapes as published; without what our writer adds."""
    config, place = experiment(member), Path("weights")
    if member == "cogview4":
        shutil.rmtree(place, ignore_errors=True)
        whole = weights(member, config)
        save_diffusers(place / "CogView4-6B", whole, plain(config), tokenizer=TOKENIZER)
        return {
            "written_gb": gb(sum(info.nbytes for part in whole.values() for info in part.infos().values()))
        }
    parts = {part: found for part, found in weights(member, config).items() if not only or part in only}
    if config.model.params.get("depth") == 30 or config.model.params.get("width") == 320:
        as_published(member, parts)
    for earlier in [
        *(place / name for name in ("new", PUBLISHED[member], "t5-v1_1-xxl")),
        *place.glob("*.*"),
    ]:
        remove(earlier)
    save_sat(place / "new", parts, plain(config), tokenizer=TOKENIZER)
    for added in [*(place / "new").rglob(DIGESTS), *(place / "new").rglob(SIDECAR)]:
        added.unlink()
    if "text" in parts:
        (place / "new" / "t5-v1_1-xxl").rename(place / "t5-v1_1-xxl")
    if "first_stage" in parts and member == "plus":
        next((place / "new" / "vae").iterdir()).rename(place / "imagekl_ch16.pt")
    elif "first_stage" in parts:
        theirs = as_theirs(parts["first_stage"], family_rules(type(parts["first_stage"].module))["SAT"])
        write_shards(place, "sdxl_vae", theirs, Options(), index=False)
    shutil.rmtree(place / "new" / "vae", ignore_errors=True)
    if "model" in parts:
        (place / "new").rename(place / PUBLISHED[member])
    else:
        (place / "new").rmdir()
    return {"written_gb": gb(sum(info.nbytes for part in parts.values() for info in part.infos().values()))}


def check(member: str, path: str) -> dict[str, Any]:
    """Every tensor at ``path`` is the one that was drawn, bit for bit."""
    count = 0
    for part, drawn in weights(member, experiment(member)).items():
        if part != "text" and member == "plus" and Path(path).name == "text":
            continue
        with open_part(path, part) as theirs:
            for name, tensor in match(drawn.module, theirs, part).view.items():
                assert torch.equal(tensor.to(drawn.info(name).dtype), drawn[name]), name
                count += 1
    return {"tensors": count}


def opened(member: str, part: Part, path: str, kind: str) -> nn.Module:
    """The network of a part with its weights, in a type or quantised as it is read."""
    module = empty(experiment(member), part)
    quantizer = None
    if kind in ("int8", "int4"):
        role = {"model": "network", "text": "text_encoder"}[part]
        (quantizer,) = quantizers(QuantizeConfig(**{role: kind})).values()
    load(module, path, part, dtype=DTYPES.get(kind, torch.bfloat16), replacing=quantizer)
    return module


def load_part(member: str, part: Part, path: str, kind: str) -> dict[str, Any]:
    """Loads a part in a type, or quantised as it is read: what the model takes, and the process above it."""
    before = resident("VmHWM")
    return held(opened(member, part, path, kind), before)


@torch.inference_mode()
def turns(member: str, path: str, kind: str) -> dict[str, Any]:
    """The text encoder reads a prompt and goes; then the network takes a step at 512 x 512."""
    config = experiment(member)
    g = torch.Generator().manual_seed(0)
    text = opened(member, "text", path, kind)
    hidden = text(torch.randint(3, text.vocab, (1, 16), generator=g))  # (1, 16, D)
    read = {"text_gb": held(text, 0)["model_gb"], "text_peak_gb": gb(resident("VmHWM"))}
    del text
    gc.collect()  # hooks and modules hold each other
    trim_heap()
    network, side = opened(member, "model", path, kind), 8 if config.model.params["dim"] < 100 else 64
    vector = SizeConditioner(config.model.params["size_dim"] // 6)(*Sizes.uncropped(8 * side, 8 * side, 1))
    prepared = network.prepare(Condition(hidden, vector.to(hidden.dtype)), (side, side))
    x = torch.randn(1, config.model.params["channels"], side, side, generator=g).to(hidden.dtype)
    out = network(x, torch.tensor([500.0]), prepared)
    assert hidden.isfinite().all() and out.isfinite().all() and out.float().std() > 0.1
    return {**read, "model_gb": held(network, 0)["model_gb"]}


def open_pipeline(member: str, path: str, kind: str) -> dict[str, Any]:
    """Opens a whole folder as a user's program does: what its parts take, and the process above them."""
    from sat import Pipeline

    before = resident("VmHWM")
    dtype = DTYPES.get(kind, torch.bfloat16)
    integers = [f"memory.quantize.network={kind}"] if kind not in DTYPES else []
    words = [f"checkpoint.path={path}", *integers]
    pipe = Pipeline.from_config(f"configs/{member}.yaml", words, device="cpu", dtype=dtype)
    return held(pipe.generator.engine, before)


def held(module: nn.Module, before: int) -> dict[str, Any]:
    """GB of the weights in ``module``, packed ones too, and of the process's peak above them."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [layer.packed for layer in module.modules() if isinstance(layer, PackedLinear)]
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    above = resident("VmHWM") - size
    return {"model_gb": gb(size), "above_gb": gb(above), "libraries_gb": gb(before)}


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def gb(nbytes: int) -> float:
    """In 1e9 bytes."""
    return round(nbytes / 1e9, 2)


@torch.no_grad()
def parity(member: str, dtype: str, path: str) -> dict[str, Any]:
    """One forward pass at 512 x 512 pixels of diffusers' network and of ours with the same weights."""
    config, kind = experiment(member), DTYPES[dtype]
    ours = empty(config, "model")
    if isinstance(ours, CogView3Plus):  # the official norm before the head twice; diffusers has it once
        params = {**config.model.params, "double_norm": False}
        with torch.device("meta"):
            ours = build_empty(Component(config.model.target, params))
    load(ours, path, "model", dtype=kind)
    g = torch.Generator().manual_seed(0)
    side = 64 if max(i.numel for i in wanted(ours).values()) > 10**6 else 8
    x = torch.randn(1, config.model.params["channels"], side, side, generator=g).to(kind)
    text = torch.randn(1, config.conditioning.max_length, config.model.params["text_dim"], generator=g)
    sizes = Sizes.uncropped(8 * side, 8 * side, 1)
    vector = SizeConditioner(config.model.params["size_dim"] // 6)(*sizes).to(kind)
    prepared = ours.prepare(Condition(text.to(kind), vector), (side, side))
    mine = ours(x, torch.tensor([500.0]), prepared).float()
    del ours, prepared
    gc.collect()
    if member == "plus":
        from diffusers import CogView3PlusTransformer2DModel

        peer = CogView3PlusTransformer2DModel.from_pretrained(f"{path}/transformer", torch_dtype=kind)
        order = [size.to(kind) for size in (sizes.original, sizes.target, sizes.crop)]
        theirs = peer(x, text.to(kind), torch.tensor([500]), *order, return_dict=False)[0]
    else:
        peer = their_unet(config.model.params, path, kind)
        theirs = peer(x, torch.tensor([500]), text.to(kind), class_labels=vector, return_dict=False)[0]
    difference = float((mine - theirs.float()).square().mean().sqrt() / theirs.float().std())
    assert mine.isfinite().all() and theirs.float().std() > 0.1
    assert difference < (BOTH_BF16 if kind == torch.bfloat16 else 1e-3), difference
    return {"difference": round(difference, 7), "std": round(float(theirs.float().std()), 3)}


def their_unet(params: Mapping[str, Any], path: str, kind: torch.dtype) -> nn.Module:
    """diffusers' UNet with the weights of an official folder."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from tests.parity.test_cogview3_unet import official

    widths = [params["width"] * m for m in params["multipliers"]]
    cross = [2**level in params["attention"] for level in range(len(widths))]
    with init_empty_weights():
        peer = UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=params["blocks"],
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in cross],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(cross)],
            transformer_layers_per_block=params["depths"],
            attention_head_dim=[width // params["head_dim"] for width in widths],  # numbers of heads, in fact
            cross_attention_dim=params["text_dim"], norm_num_groups=params.get("groups", 32),
            use_linear_projection=True, class_embed_type="projection", flip_sin_to_cos=True, freq_shift=0,
            projection_class_embeddings_input_dim=params["size_dim"],
        ).eval()  # fmt: skip
    with open_part(path, "model") as tensors:
        state = {}
        for name, parameter in peer.named_parameters():
            theirs = ENGINE_PREFIXES["model"] + official(name)
            state[name] = tensors[theirs].to(kind, copy=True).view(parameter.shape)
            tensors.release(theirs)
        peer.load_state_dict(state, assign=True)
    return peer


@torch.no_grad()
def blocks(member: str, native: str, official: str) -> dict[str, Any]:
    """T5-XXL block by block in float32: ours from the native folder, transformers' from the official one."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Block

    module = empty(experiment(member), "text")
    assert isinstance(module, T5Encoder)
    settings = T5Config.from_pretrained(official)
    settings._attn_implementation = "eager"
    ids = torch.randint(3, module.vocab, (1, 224), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    with open_part(native, "text") as tensors, open_part(official, "text") as theirs:
        network = module.transformer
        for name in tensors:
            if not name.startswith("transformer.blocks."):
                put(module, name, tensors[name].float())
        ctx = network.prepare(Context(ids=ids))
        x = their_x = network.hooks.embed(ctx)
        bias = None
        for index in range(len(network.blocks)):
            inside = f"transformer.blocks.{index}."
            for name in [name for name in tensors if name.startswith(inside)]:
                put(module, name, tensors[name].float())
            x = network.hooks.layer(x, ctx, index)
            network.blocks[index].to("meta")
            with torch.device("meta"):
                block = T5Block(settings, has_relative_attention_bias=index == 0, layer_idx=index).eval()
            prefix = f"encoder.block.{index}."
            state = {
                name.removeprefix(prefix): theirs[name].float() for name in theirs if name.startswith(prefix)
            }
            block.load_state_dict(state, assign=True)
            their_x, bias = block(their_x, position_bias=bias)[:2]
            worst = max(worst, float((x - their_x).abs().max() / their_x.std()))
            del block, state
        out = network.hooks.final(x, ctx)
    assert out.isfinite().all()
    assert worst < 1e-3, worst
    return {"difference": worst, "std": round(float(out.std()), 3)}


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """``value`` as the parameter ``name``."""
    path, _, local = name.rpartition(".")
    setattr(module.get_submodule(path), local, nn.Parameter(value, requires_grad=False))


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "write": write, "check": check, "load": load_part, "open": open_pipeline, "parity": parity,
    "blocks": blocks, "turns": turns,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Do one thing and print its figures as the last line."""
    what, *words = sys.argv[1:] if argv is None else argv
    print(json.dumps(WORK[what](*words)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
