"""What is timed: one function a case and side, each giving the work of one sample.

A case is data (:class:`Case`), so that every variant can run in a process of its own, with its own peak
memory and allocator settings.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import BENCH, SMALL, Side, Size, decoder, plus, quiet

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLUS = Size("Plus 3 B", {}, cells=128)
SIZES = {"small": SMALL, "bench": BENCH, "plus": PLUS}
Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """``kind`` and ``side`` name a function below, ``size`` a network; ``options`` are the function's own."""

    kind: str
    side: str
    size: str = "bench"
    dtype: str = "fp32"
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Size:
        """The network and latent; ``cells``, ``batch`` and ``params`` of the options change it."""
        base = SIZES[self.size]
        params = {**base.params, **self.options.get("params", {})}
        return replace(
            base,
            params=params,
            cells=self.options.get("cells", base.cells),
            batch=self.options.get("batch", base.batch),
        )


def make(case: Case) -> Work:
    """The work of one sample of ``case``."""
    return KINDS[case.kind](case)


# -- one denoising step


def step(case: Case) -> Work:
    """A step of the transformer with guidance, ``side`` ours, plain, or a peer."""
    pair = plus(case.shape, DTYPES[case.dtype], case.device, peer=case.side in _THEIRS)
    if case.side in _THEIRS:
        return torch.no_grad()(pair.their_step(_THEIRS[case.side](pair.network)))
    return _ours(case, pair)


def prepare(case: Case) -> Work:
    """What our loop does once per picture; a step's share of it is a fiftieth."""
    pair = plus(case.shape, DTYPES[case.dtype], case.device, peer=False)
    return torch.inference_mode()(pair.prepare)


def _ours(case: Case, pair: Side) -> Work:
    from sat.config.schema import QuantizeConfig
    from sat.kernels import apply as speed
    from sat.kernels import attention as kernels
    from sat.kernels.quantize import Quantizer, Scheme
    from sat.parallel.launch import keep_freed_memory

    if case.device == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()
    if case.side != "plain":
        known = ("attention", "pack", "fold", "compile", "graphs")
        wanted = speed.Speed(**{key: case.options[key] for key in known if key in case.options})
        if scheme := case.options.get("quantize"):
            Quantizer("model", Scheme(scheme), QuantizeConfig().patterns())(pair.network)
        if case.device == "cpu":
            cells = tuple(pair.latent.shape[2:])
            wanted = speed.measured_speed(pair.network, wanted, cells, len(pair.latent))
        speed.quicken_network(pair.network, wanted)
        if size := case.options.get("padded"):
            kernels.put_kernel(pair.network.transformer, kernels.Plain(_padded(size)))
        if case.options.get("offload"):
            _offloaded(pair.network, torch.device(case.device))
    with torch.inference_mode():
        work = pair.our_step()
    return torch.inference_mode()(work)


def _padded(size: int) -> Callable[..., Tensor]:
    """Attention with heads padded to ``size`` channels, which some kernels are faster with."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        wide = [F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*wide, scale=scale)[..., : q.shape[-1]]

    return attend


def _offloaded(network: nn.Module, device: torch.device) -> None:
    """The network's blocks in host memory, as ``memory.network=blocks`` has them."""
    if device.type == "cpu":
        raise ValueError("offloading needs a GPU")
    from sat.config.schema import MemoryConfig
    from sat.offload.block_swap import DeviceStream, OffloadedPart, swap_groups

    groups = swap_groups(network, MemoryConfig(network="blocks"), "model")
    network.cpu()
    torch.cuda.empty_cache()
    OffloadedPart(network, DeviceStream(device), groups).onload()


def _compiled(network: nn.Module) -> nn.Module:
    """diffusers' network, each block compiled: its own helper refuses this class."""
    for block in network.transformer_blocks:  # type: ignore[union-attr]
        block.compile()  # type: ignore[operator]
    return network


def _cached(network: nn.Module) -> nn.Module:
    """cache-dit over diffusers with its defaults; samples then mix computed and cached steps."""
    import cache_dit

    cache_dit.enable_cache(network)
    return network


_THEIRS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "diffusers": lambda network: network,
    "diffusers compiled": _compiled,
    "cache-dit": _cached,
}


# -- floors: the same matrix products and attention alone


def floor(case: Case) -> Work:
    """The layers' matrix products, their attention, or both, by torch's plain calls: ``side`` says which."""
    shape, dtype = case.shape, DTYPES[case.dtype]
    dim, heads, depth = (shape.params.get(k, d) for k, d in (("dim", 2560), ("heads", 64), ("depth", 30)))
    tokens = shape.params.get("text_len", 224) + (shape.cells // 2) ** 2

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=case.device, dtype=dtype)

    length = 0 if case.side == "products" else tokens
    q, k, v = (normal(shape.rows, heads, length, dim // heads) for _ in range(3))
    attention = torch.inference_mode()(
        lambda: [F.scaled_dot_product_attention(q, k, v) for _ in range(depth)] and None
    )
    if case.side == "attention":
        return attention
    rows, wide = normal(shape.rows * tokens, dim), normal(shape.rows * tokens, 4 * dim)
    weights = [(rows, normal(3 * dim, dim)), (rows, normal(dim, dim)), (rows, normal(4 * dim, dim))]
    weights.append((wide, normal(dim, 4 * dim)))
    products = torch.inference_mode()(
        lambda: [F.linear(x, w) for _ in range(depth) for x, w in weights][:0] or None
    )
    return products if case.side == "products" else lambda: (products(), attention())


# -- first stage and text encoder


def decode(case: Case) -> Work:
    """The 16-channel autoencoder's decoding of one picture."""
    theirs = case.side == "diffusers"
    network, work = decoder(
        case.options.get("vae", {}), case.options["cells"], DTYPES[case.dtype], case.device, peer=theirs
    )
    if theirs:
        return torch.no_grad()(work)
    if case.dtype != "fp32" and case.options.get("channels_last", case.device == "cpu"):
        from sat.kernels.apply import channels_last

        channels_last(network)
    return torch.inference_mode()(work)


def encode_text(case: Case) -> Work:
    """T5's encoder over 224 tokens; ``options`` shrink it."""
    dims = {"dim": 4096, "heads": 64, "head_dim": 64, "mlp_dim": 10240, "depth": 24, "vocab": 32128}
    dims |= case.options.get("text", {})
    ids = torch.randint(2, dims["vocab"], (1, 224), device=case.device)
    torch.manual_seed(0)
    if case.side == "transformers":
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            d_model=dims["dim"], num_heads=dims["heads"], d_kv=dims["head_dim"], d_ff=dims["mlp_dim"],
            num_layers=dims["depth"], vocab_size=dims["vocab"], feed_forward_proj="gated-gelu",
        )  # fmt: skip
        with torch.device(case.device):
            theirs = T5EncoderModel(config).to(DTYPES[case.dtype]).eval()
        return torch.no_grad()(lambda: theirs(ids))
    from sat.models.t5 import T5Encoder

    with torch.device(case.device):
        ours = T5Encoder(**dims).to(DTYPES[case.dtype]).eval()
    return torch.inference_mode()(lambda: ours(ids))


def unet(case: Case) -> Work:
    """A step of CogView3-Base's UNet with guidance at 512²; ``options`` shrink it."""
    from sat.conditioning.conditioner import Condition
    from sat.kernels import apply as speed
    from sat.models.cogview3_unet import CogView3UNet

    params = dict(case.options.get("params", {}))
    torch.manual_seed(0)
    with torch.device(case.device):
        network = CogView3UNet(**params).to(DTYPES[case.dtype]).eval()
    if case.options.get("channels_last"):
        speed.channels_last(network)
    speed.quicken_network(network, speed.Speed(compile=bool(case.options.get("compile"))))
    takes, cells = inspect.signature(CogView3UNet).parameters, case.options.get("cells", 64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, dtype=DTYPES[case.dtype])

    def number(name: str) -> int:
        return int(params.get(name, takes[name].default))

    condition = Condition(
        normal(2, case.options.get("tokens", 225), number("text_dim")), normal(2, number("size_dim"))
    )
    with torch.inference_mode():
        prepared = network.prepare(condition, (cells, cells), [500.0])
    latent = normal(2, number("channels"), cells, cells)
    return torch.inference_mode()(lambda: network(latent, 500.0, prepared))


# -- training


def lora_step(case: Case) -> Work:
    """Forward, backward and update of rank-16 factors on attention; weights frozen, ``side`` peft or ours."""
    pair = plus(case.shape, DTYPES[case.dtype], case.device, peer=case.side == "peft")
    target = torch.randn_like(pair.latent)
    if case.side == "peft":
        from peft import LoraConfig, get_peft_model

        names = ["to_q", "to_k", "to_v", "to_out.0"]
        network: nn.Module = get_peft_model(
            pair.network, LoraConfig(r=16, lora_alpha=16, target_modules=names)
        )
        forward = pair.their_step(network)
    else:
        network, forward = _our_lora(case, pair)
    network.train()
    factors = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(forward().float(), target.float()).backward()
        optimizer.step()

    return work


def _our_lora(case: Case, pair: Side) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network with factors as ``train.py`` attaches them, and its settings of the process."""
    from sat.conditioning.conditioner import Condition
    from sat.config.schema import LoraConfig
    from sat.kernels import apply as speed
    from sat.parallel.launch import keep_freed_memory
    from sat.train import lora
    from sat.train.objectives import Objective

    if case.device == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()
    network = pair.network

    class Network(Objective):
        """Trains the network alone."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def parts(self) -> dict[str, nn.Module]:
            return {"model": network}

    chosen = speed.Speed()
    if case.device == "cpu":
        cells, rows = tuple(pair.latent.shape[2:]), len(pair.latent)
        chosen = speed.measured_speed(network, chosen, cells, rows, trains=True)
        speed.use_kernel(network, chosen.attention, section="train")
    lora.add_lora(Network(), LoraConfig(rank=16, alpha=16, targets=["attention"]), 0)
    if case.options.get("compile"):
        speed.compiled(network)
    elif chosen.pack:
        lora.pack_frozen({"model": network})
    cells = pair.latent.shape[2]
    times = torch.full((len(pair.latent),), 500.0, device=pair.latent.device)
    condition = Condition(pair.text, pair.vector)
    return network, lambda: network(pair.latent, times, network.prepare(condition, (cells, cells)))


# -- the whole command, from a cold process


def command(case: Case) -> Work:
    """One picture of the small model at 50 steps by ``sample.py`` or a diffusers script; or ``--help``."""
    scratch = Path(tempfile.mkdtemp())
    ours = [sys.executable, "sample.py", "--base", "configs/tiny.yaml"]
    if case.side == "diffusers":
        _convert(scratch / "theirs")
        line = [sys.executable, "-c", _SCRIPT, str(scratch / "theirs"), str(scratch / "picture.png")]
    elif case.side == "help":
        line = [*ours, "--help"]
    else:
        line = [*ours, "--prompt", "a red apple", "--output-dir", str(scratch / "out")]
    compiled = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return lambda: subprocess.run(line, cwd=ROOT, env=compiled, check=True, capture_output=True)


def _convert(folder: Path) -> None:
    """The small model as a diffusers folder."""
    convert = [sys.executable, "convert.py", "checkpoints/tiny", str(folder), "--to", "diffusers"]
    subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)


def picture(case: Case) -> Work:
    """The same picture by a loaded pipeline, ours or diffusers'."""
    if case.side != "diffusers":
        from sat import Pipeline

        ours = Pipeline.from_config(ROOT / "configs" / "tiny.yaml", device="cpu")
        return lambda: ours(["a red apple"], seed=0)
    quiet()
    from diffusers import CogView3PlusPipeline

    folder = Path(tempfile.mkdtemp()) / "theirs"
    _convert(folder)
    theirs = CogView3PlusPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return lambda: theirs(
        "a red apple", height=64, width=64, num_inference_steps=50, guidance_scale=3.0,
        max_sequence_length=16, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def cascade(case: Case) -> Work:
    """A picture of 128 pixels by the loaded small cascade, another prompt each time; ``side``: its steps.

    ``side`` parts: its text encoder and autoencoder alone, run as often as for a picture. Options:
    ``one_step``, the weights of the Base drawn in one step; ``settings`` of both stages; ``tree``, a checkout
    of another commit, which draws in place of this one.
    """
    tree = Path(case.options.get("tree") or ROOT)
    if tree != ROOT:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sat"]:
            del sys.modules[name]
        sys.path.insert(0, str(tree))
    from sat import Pipeline
    from sat.parallel.launch import keep_freed_memory

    def opened(config: str, *overrides: str) -> Any:
        words = [*overrides, *case.options.get("settings", ())]
        return Pipeline.from_config(tree / "configs" / config, words, device="cpu")

    one = case.side == "1 + 1"
    weights = [f"checkpoint.model={Path(case.options['one_step']).resolve()}"] if one else []
    base = opened("tiny_base.yaml", *weights) if one else opened("tiny_base_distill.yaml")
    relay = opened("tiny_relay_distill.yaml")
    keep_freed_memory()  # as `sample.py` does
    lines = (ROOT / "configs" / "tiny_train_prompts.txt").read_text().splitlines()
    prompts = cycle(line for line in lines if line.strip())
    if case.side != "parts":

        def whole() -> None:
            prompt = [next(prompts)]
            encoded = base.encode(prompt)  # as a cascade does
            small = base(prompt, seed=0, encoded=encoded).images
            relay(prompt, seed=0, images=small, encoded=encoded)

        return whole
    small, large = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 16, 16)
    image = torch.rand(1, 3, 128, 128) * 2 - 1

    def parts() -> None:
        prompt = next(prompts)
        base.generator.encode([prompt])
        base.generator.engine.decode(small)
        if tree != ROOT:  # the earlier cascade asked each stage's
            relay.generator.encode([prompt])
        relay.generator.engine.encode(image, large)
        relay.generator.engine.decode(large)

    return parts


# -- a whole picture or training, beside what was planned for it and what is drawn without the option


def whole(case: Case) -> Work:
    """A picture by a pipeline of random weights: ``bases``, ``settings`` and ``steps`` of the options.

    Facts: the planned peak; ``beside`` names settings, and how far apart the latents are from theirs follows.
    """
    from sat import Pipeline
    from sat.estimate.budget import SamplingEstimator
    from sat.parallel.launch import free_memory

    bases = [ROOT / name for name in case.options["bases"]]
    steps = case.options["steps"]

    def opened(settings: Sequence[str]) -> Any:
        return Pipeline.from_config(bases, [*settings, f"sampling.dtype={case.dtype}"], device=case.device)

    facts: dict[str, float] = {}
    plain: Tensor | None = None
    if "beside" in case.options:
        pipe = opened(case.options["beside"])
        plain = pipe(["a red apple"], seed=0, steps=steps).latents.float().cpu()
        del pipe
        free_memory()
    pipe = opened(case.options["settings"])
    planned = SamplingEstimator(host=case.device == "cpu").peaks(pipe.experiment).total
    facts["planned MB"] = planned / 1e6

    def work() -> None:
        seen = replace(pipe.generator.count)
        drawn = pipe(["a red apple"], seed=0, steps=steps).latents.float().cpu()
        if plain is not None:
            facts["apart"] = float((drawn - plain).square().mean().sqrt() / plain.std())
        if looked := pipe.generator.count.evaluations - seen.evaluations:
            facts["computed"] = (pipe.generator.count.computed - seen.computed) / looked

    work.facts = lambda: facts  # type: ignore[attr-defined]
    return work


def training(case: Case) -> Work:
    """Three steps of ``train.py`` with ``bases`` and ``settings`` of the options; facts as above."""
    from sat.cli.train import main
    from sat.config.load import load
    from sat.train.estimate import Estimator

    bases = [str(ROOT / name) for name in case.options["bases"]]
    small = {
        "train.steps": 3, "train.warmup": 0, "train.accumulate": 1, "train.wandb": "disabled",
        "data.workers": 0, "parallel.device": case.device, "train.dtype": case.dtype,
    }  # fmt: skip
    settings = [*case.options["settings"], *(f"{key}={value}" for key, value in small.items())]
    planned = Estimator().estimate(load(bases, settings), 1).total

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--base", *bases, *settings, "--output-dir", f"{folder}/run"]
            if code := main(words):
                raise RuntimeError(f"the training ended with code {code}")

    work.facts = lambda: {"planned MB": planned / 1e6}  # type: ignore[attr-defined]
    return work


_SCRIPT = """
import sys
import torch
from diffusers import CogView3PlusPipeline
pipe = CogView3PlusPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
picture = pipe("a red apple", height=64, width=64, num_inference_steps=50, guidance_scale=3.0,
    max_sequence_length=16, generator=torch.Generator().manual_seed(0)).images[0]
picture.save(sys.argv[2])
"""
"""What a user of diffusers writes for the same picture from a folder of the same weights."""

KINDS: Mapping[str, Callable[[Case], Work]] = {
    "step": step,
    "prepare": prepare,
    "floor": floor,
    "decode": decode,
    "text": encode_text,
    "unet": unet,
    "lora": lora_step,
    "command": command,
    "picture": picture,
    "cascade": cascade,
    "whole": whole,
    "training": training,
}
