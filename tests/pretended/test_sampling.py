"""Sampling of every shipped small model on a pretended accelerator."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sat import Pipeline
from tests.pretended.device import GPU, LARGE, ROOT, Watch, faults, pretended

ALLOWED = {"sat/mixins/patch_embed.py": 3}
"""Operators a step, by file, that could be made before the loop and are not: the head's shift and scale."""
PLUS, UNET, ROTATED = 23, 392, 160
"""Launches a step at most: of the small Plus for each layer, of the small UNet in all; once 33 and 487.
Of the small CogView4, which turns queries and keys, in all."""
CONFIGS = {
    "debug": "debug.yaml",
    "debug_rope": "debug.yaml debug_rope.yaml",
    "tiny": "tiny.yaml",
    "tiny_base": "tiny_base.yaml",
    "tiny_base_distill": "tiny_base_distill.yaml",
    "tiny_cogview4": "tiny_cogview4.yaml sampling.sampler.target=sat.diffusion.samplers.Euler",
    "tiny_relay": "tiny_relay.yaml",
    "tiny_relay_distill": "tiny_relay_distill.yaml",
    "tiny_flow": "tiny.yaml flow.yaml tiny_flow.yaml",
    "tiny_sr": "tiny_sr.yaml checkpoint.model=null checkpoint.random=0",
}
"""Every small model, random weights where none ship, with the stages of cascades."""


def sample(
    watch: Watch, name: str, *settings: str, plant: Callable[[Tensor], object] | None = None
) -> Pipeline:
    """Three watched steps of a small model, or those it is for; ``plant`` is done in each of its passes."""
    words = [*CONFIGS[name].split(), *settings]
    bases = [str(ROOT / "configs" / word) for word in words if "=" not in word]
    pipe = Pipeline.from_config(bases, [word for word in words if "=" in word], device=GPU)
    engine = pipe.generator.engine
    left = [n for n, p in engine.named_parameters() if watch.tags.of(p).type == "cpu"]
    assert not left or any(word.startswith("memory.") for word in settings), f"left on the CPU: {left[:3]}"

    process = engine.process.input
    trained = pipe.experiment.sampling.trained_steps  # of distilled weights
    steps = 1 if name == "tiny_sr" else trained[0] if trained else 3

    def first(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if not watch.loop and watch.step < 0:
            watch.begin(given[0])
            watch.step = 0 if steps == 1 else -1
        if plant is not None:
            plant(given[0])

    def after(done: int, total: int, preview: Tensor) -> None:
        watch.step = done
        if done == total:
            watch.end()

    handle = engine.network.register_forward_pre_hook(first)
    given = [Image.new("RGB", (64, 64), "red")] if process is not None else None
    watch.on = True
    out = pipe(["a red apple"], seed=0, steps=steps, callback=after, images=given)
    watch.on = False
    handle.remove()
    assert torch.isfinite(out.latents).all()
    return pipe


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_wait_for_nothing_copy_nothing_and_launch_no_more_than_needed(name: str) -> None:
    kernel = "float16" if "base" in name or "relay" in name else "bfloat16"
    with pretended() as watch:
        pipe = sample(watch, name, f"sampling.dtype={'bf16' if kernel == 'bfloat16' else 'fp16'}")
    plus = getattr(pipe.generator.engine.network, "transformer", None)
    most = UNET if plus is None else max(PLUS * len(plus.blocks), 120)
    most = ROTATED if name == "tiny_cogview4" else most
    assert not faults(watch, most, ALLOWED)
    assert list(watch.attention) == [f"CUDNN_ATTENTION {kernel}"]
    if name in ("tiny", "tiny_flow", "tiny_base") and (found := max(watch.launches.values())) < most - 12:
        warnings.warn(f"{found} launches a step, the bound is {most}: lower it", stacklevel=1)


@pytest.mark.parametrize(
    "settings",
    ["memory.network=blocks memory.text_encoder=blocks memory.first_stage=cpu", "memory.network=cpu"],
)
def test_offloaded_weights_come_without_a_wait_of_the_host(settings: str) -> None:
    with pretended() as watch:
        sample(watch, "tiny", "sampling.dtype=bf16", *settings.split())
    assert not [line for line in faults(watch, 10**6, ALLOWED) if not line.startswith("hoistable")]


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "mixing": lambda x: x + torch.zeros(x.shape[-1]),
    "sync": lambda x: bool((x > 0).any()),
    "transfer": lambda x: torch.zeros(5).to(x.device, non_blocking=True),
    "race": lambda x: x.to("cpu", non_blocking=True),
    "hoistable": lambda x: torch.ones(64, device=x.device).exp(),
    "hoistable memory": lambda x: torch.empty(LARGE, device=x.device),
    "launches": lambda x: [x * number for number in range(100)],
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_fault_is_found(kind: str) -> None:
    with pretended() as watch:
        sample(watch, "debug", "sampling.dtype=bf16", plant=PLANTED[kind])
    found, kind = faults(watch, 120, ALLOWED), kind.partition(" ")[0]
    assert found and all(line.startswith((kind, "sync")) for line in found), found
    assert any(line.startswith(kind) for line in found)
    assert kind == "launches" or all("tests/pretended/test_sampling.py" in line for line in found)
