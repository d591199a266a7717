"""Controls put on built networks: what they change, what they leave, and in which order they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sat.conditioning.conditioner import Condition
from sat.config.schema import Component
from sat.control.base import BaseModel, Control, ControlError, attach, detach
from sat.control.controlnet import TransformerControlNet, controlnet
from sat.control.light import Blockwise, blockwise, concat
from sat.control.reference import ImagePrompt, Reference, image_prompt
from sat.control_input import ControlInput
from sat.diffusion.guidance import ClassifierFree
from sat.kernels.apply import fold
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_unet import CogView3UNet
from sat.models.cogview4 import CogView4
from tests.configs import ROOT
from tests.small import condition, fill
from tests.tolerances import EXACT

PLUS = Component(
    "sat.models.cogview3_plus.CogView3Plus",
    {
        "dim": 32, "heads": 4, "depth": 2, "channels": 4, "patch": 2, "text_dim": 16, "text_len": 7,
        "emb_dim": 24, "size_dim": 48, "table_size": (9, 11),
    },
)  # fmt: skip
UNET = Component(
    "sat.models.cogview3_unet.CogView3UNet",
    {
        "channels": 4, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (2,), "depths": (1, 1),
        "head_dim": 8, "text_dim": 16, "text_len": 7, "size_dim": 48, "groups": 8,
    },
)  # fmt: skip
FOURTH = Component(
    "sat.models.cogview4.CogView4",
    {
        "dim": 32, "heads": 4, "depth": 2, "channels": 4, "patch": 2, "text_dim": 16, "emb_dim": 24,
        "size_dim": 48, "rope_size": (16, 16),
    },
)  # fmt: skip
SIZE = (12, 20)
T = torch.tensor([900.0, 30.0])
HINT = (4, 6)
CLASSIFIER = str(ROOT / "checkpoints" / "tiny_classifier")


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base(component: Component, **params: object) -> BaseModel:
    component = replace(component, params={**component.params, **params})
    kinds: tuple[Callable[..., nn.Module], ...] = (CogView3Plus, CogView3UNet, CogView4)
    (kind,) = (kind for kind in kinds if component.target.endswith(kind.__name__))  # type: ignore[attr-defined]
    network = kind(**component.params)
    fill(network)
    return BaseModel(network.eval(), component)


DESIGNS: dict[str, Callable[[], tuple[BaseModel, Control]]] = {
    "plus": lambda: (b := base(PLUS), controlnet(1, base=b)),
    "plus, shared adaLN": lambda: (b := base(PLUS), controlnet(2, share_adaln=True, base=b)),
    "unet": lambda: (b := base(UNET), controlnet(hint=HINT, base=b)),
    "plus, block-wise": lambda: (b := base(PLUS), Blockwise(12, base=b)),
    "plus, concat": lambda: (b := base(PLUS), concat(base=b)),
    "plus, inpaint": lambda: (b := base(PLUS), concat(inpaint=True, base=b)),
    "plus, image prompt": lambda: (b := base(PLUS), ImagePrompt(CLASSIFIER, base=b)),
    "unet, image prompt": lambda: (b := base(UNET), image_prompt(CLASSIFIER, base=b)),
    "cogview4": lambda: (b := base(FOURTH), controlnet(1, base=b)),
    "cogview4, block-wise": lambda: (b := base(FOURTH), Blockwise(12, base=b)),
    "cogview4, concat": lambda: (b := base(FOURTH), concat(base=b)),
    "cogview4, inpaint": lambda: (b := base(FOURTH), concat(inpaint=True, base=b)),
    "cogview4, image prompt": lambda: (b := base(FOURTH), ImagePrompt(CLASSIFIER, base=b)),
    "unet, concat": lambda: (b := base(UNET), concat(base=b)),
    "unet, inpaint": lambda: (b := base(UNET), concat(inpaint=True, base=b)),
    "plus, pixels": lambda: (b := base(PLUS), controlnet(1, input="pixels", cell=2, base=b)),
    "plus, block-wise, pixels": lambda: (b := base(PLUS), Blockwise(12, "pixels", 2, base=b)),
    "plus, concat, pixels": lambda: (b := base(PLUS), concat(input="pixels", cell=2, base=b)),
    "unet, latent": lambda: (b := base(UNET), controlnet(input="latent", base=b)),
    "unet, concat, pixels": lambda: (b := base(UNET), concat(input="pixels", cell=2, base=b)),
    "unet, block-wise": lambda: (b := base(UNET), blockwise(12, cell=2, base=b)),
    "unet, block-wise, latent": lambda: (b := base(UNET), blockwise(input="latent", base=b)),
    "unet, pixels": lambda: (b := base(UNET), controlnet(hint=(), cell=2, base=b)),
}
"""Networks with a control that is not attached yet."""
REFERENCE: dict[str, Callable[[], tuple[BaseModel, Control]]] = {
    "plus, reference": lambda: (b := base(PLUS), Reference(base=b)),
    "cogview4, reference": lambda: (b := base(FOURTH), Reference(base=b)),
}
"""The same, of one that makes no claim about its untrained state."""


def value(control: Control, seed: int = 3) -> Tensor:
    """An encoded picture for two rows."""
    if control.takes == "features":
        return draw(2, 5, 112, seed=seed)
    shape = (2, 3, 24, 40) if control.takes == "pixels" else (2, 4 + (control.takes == "inpaint"), *SIZE)
    return draw(*shape, seed=seed)


def given(control: Control, scale: float = 1.0, **fields: object) -> Condition:
    own = ControlInput("edges", value(control), (scale, scale), **fields)  # type: ignore[arg-type]
    return replace(condition(2), controls=(own,))


def run(network: nn.Module, cond: Condition) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(draw(2, 4, *SIZE), T, network.prepare(cond, SIZE))  # type: ignore[operator]
    return out


@pytest.mark.parametrize("design", DESIGNS)
def test_an_untrained_control_changes_nothing(design: str) -> None:
    model, control = DESIGNS[design]()
    plain = run(model.network, condition(2))
    attach(model.network, "edges", control)
    assert torch.equal(run(model.network, given(control)), plain)


@pytest.mark.parametrize("design", [*DESIGNS, *REFERENCE])
def test_scale_0_and_no_picture_leave_the_branch_out(design: str) -> None:
    model, control = {**DESIGNS, **REFERENCE}[design]()
    plain = run(model.network, condition(2))
    fill(control, seed=4)
    attach(model.network, "edges", control)
    steered = run(model.network, given(control))
    assert (steered - plain).abs().max() > 0.01
    assert torch.equal(run(model.network, condition(2)), plain)
    assert torch.equal(run(model.network, given(control).at(0.5)), steered)
    assert torch.equal(run(model.network, given(control, 0.0).at(0.5)), plain)
    detach(model.network, control)
    assert torch.equal(run(model.network, condition(2)), plain)
    assert not any("edges" in name for name, _ in model.network.named_modules())


@pytest.mark.parametrize("design", DESIGNS)
def test_strength_and_rows_count_alone(design: str) -> None:
    """Half the strength is not the whole; a row of strength 0 is that of the plain model."""
    model, control = DESIGNS[design]()
    plain = run(model.network, condition(2))
    fill(control, seed=4)
    attach(model.network, "edges", control)
    both, half = run(model.network, given(control)), run(model.network, given(control, 0.5))
    assert (both - half).abs().max() > 0.001
    own = ControlInput("edges", value(control), (1.0, 0.0))
    one = run(model.network, replace(condition(2), controls=(own,)))
    assert torch.equal(one[1], plain[1])
    assert torch.equal(one[0], both[0])


LEARN = [
    "plus",
    "plus, shared adaLN",
    "unet",
    "plus, block-wise",
    "plus, pixels",
    "unet, latent",
    "unet, pixels",
    "unet, block-wise",
]


@pytest.mark.parametrize("design", LEARN)
def test_the_embedding_of_the_picture_learns_one_step_after_what_leads_out(design: str) -> None:
    """Zero-init order: after one optimizer step it is unchanged, after two it is not."""
    model, control = DESIGNS[design]()
    attach(model.network, "edges", control)
    model.network.requires_grad_(False)
    for parameter in control.parameters():
        parameter.requires_grad_(True)
    trained = {n: p for n, p in control.named_parameters() if p.requires_grad}
    began = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for step in range(2):
        network, cond = model.network, given(control)
        out = network(draw(2, 4, *SIZE), T, network.prepare(cond, SIZE))  # type: ignore[operator]
        (out - draw(2, 4, *SIZE, seed=9)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, p in trained.items() if not torch.equal(p, began[n])}
        entry = {n for n in trained if "picture" in n}
        assert {n.partition(".")[0] for n in moved} >= {"zeros"}
        assert entry and bool(entry & moved) == (step == 1)
        if step == 0:
            assert all(n.startswith(("zeros.", "middle.", "stem.")) for n in moved)


@pytest.mark.parametrize(("blocks", "layers"), [(b, n) for n in (5, 28, 30) for b in range(1, n + 1)])
def test_every_block_of_a_control_is_used_whatever_their_number(blocks: int, layers: int) -> None:
    """Trap: with ceil(L / N) layers a block, 8 blocks for 28 layers use 7."""
    used = [layer * blocks // layers for layer in range(layers)]
    assert sorted(set(used)) == list(range(blocks)), "none is wasted"
    assert used == sorted(used)
    wasted = {layer // math.ceil(layers / blocks) for layer in range(layers)}
    assert (blocks, layers) != (8, 28) or len(wasted) == 7


def test_layers_behind_a_block_get_its_residual_and_only_on_the_image() -> None:
    model, control = DESIGNS["plus"]()
    assert isinstance(control, TransformerControlNet)
    fill(control, seed=4)
    attach(model.network, "edges", control)
    seen: list[tuple[Tensor, Tensor]] = []
    transformer = model.network.transformer
    inner = control.layer

    def spy(original: object, x: Tensor, ctx: object, layer: int) -> Tensor:
        out = inner(lambda *a: seen.append((original(*a).clone(), x)) or seen[-1][0], x, ctx, layer)  # type: ignore
        seen[-1] = (seen[-1][0], out)
        return out

    control.layer = spy  # type: ignore[method-assign]
    transformer._resolve()
    run(model.network, given(control))
    for before, after in seen:
        assert torch.equal(before[:, :7], after[:, :7]), "text stays"
        assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).min() > 0, "every image token moves"


def test_several_controls_add_up_in_any_order() -> None:
    model, one = DESIGNS["plus"]()
    two = controlnet(2, base=model)
    fill(one, seed=4)
    fill(two, seed=5)
    attach(model.network, "edges", one)
    attach(model.network, "depth", two)
    a = ControlInput("edges", value(one), (0.7, 0.7))
    b = ControlInput("depth", value(two, 8), (0.4, 0.4))
    cond = condition(2)
    together = run(model.network, replace(cond, controls=(a, b)))
    assert (together - run(model.network, replace(cond, controls=(b, a)))).abs().max() < 1e-4
    for alone in ((a,), (b,)):
        assert (together - run(model.network, replace(cond, controls=alone))).abs().max() > 0.01
    pair = run(model.network, replace(cond, controls=(a, replace(a, value=value(one, 8)))))
    assert (pair - run(model.network, replace(cond, controls=(a,)))).abs().max() > 0.01, "two of one control"


def test_an_image_prompt_leaves_out_the_cross_attentions_of_other_controls() -> None:
    model, side = DESIGNS["unet"]()
    alone = image_prompt(CLASSIFIER, base=model).state_dict()
    attach(model.network, "edges", side)
    assert image_prompt(CLASSIFIER, base=model).state_dict().keys() == alone.keys()


def test_weights_of_layers_choose_where_a_control_acts() -> None:
    model, control = DESIGNS["plus"]()
    fill(control, seed=4)
    attach(model.network, "edges", control)
    whole = run(model.network, given(control))
    assert torch.equal(run(model.network, given(control, layers=(1.0, 1.0))), whole)
    assert (run(model.network, given(control, layers=(1.0, 0.0))) - whole).abs().max() > 0.01
    assert not given(control, layers=(0.0, 0.0)).at(0.5).controls, "left out"


def test_start_and_end_are_shares_of_the_noise_range() -> None:
    """Trap: as shares of the steps, a control that ends at 0.8 is off in a run of one step."""
    own = given(DESIGNS["plus"]()[1], start=0.0, end=0.8).controls[0]
    assert own.acts(1.0), "the only step of a one-step model is at pure noise"
    assert own.acts(0.2) and not own.acts(0.1)
    late = replace(own, start=0.5, end=1.0)
    assert late.acts(0.0) and late.acts(0.5) and not late.acts(0.9)


def test_a_tile_sees_its_part_of_a_map_and_features_whole() -> None:
    latent, pixels, features = draw(2, 4, *SIZE), draw(2, 3, 24, 40), draw(2, 5, 112)
    at = slice(4, 12), slice(7, 15)
    for given_, wanted in (
        (latent, latent[:, :, 4:12, 7:15]),
        (pixels, pixels[:, :, 8:24, 14:30]),
        (features, features),
    ):
        assert torch.equal(ControlInput("edges", given_, (1.0, 1.0)).cut(at, SIZE).value, wanted)


def test_guess_mode_leaves_the_unconditional_half_alone() -> None:
    model, control = DESIGNS["plus"]()
    fill(control, seed=4)
    cond = given(control, guess=True)
    rows = ClassifierFree(5.0).rows(cond, cond.null())
    assert rows.controls[0].strengths == (0.0, 0.0, 1.0, 1.0)

    def out() -> Tensor:
        x, t = draw(2, 4, *SIZE).repeat(2, 1, 1, 1), T.repeat(2)
        with torch.no_grad():
            made: Tensor = model.network(x, t, model.network.prepare(rows, SIZE))  # type: ignore[operator]
        return made

    plain = out()
    attach(model.network, "edges", control)
    steered = out()
    assert torch.equal(steered[:2], plain[:2])
    assert (steered[2:] - plain[2:]).abs().max() > 0.01


def test_rows_of_a_batch_keep_their_own_pictures() -> None:
    model, control = DESIGNS["plus"]()
    fill(control, seed=4)
    attach(model.network, "edges", control)
    cond = given(control)
    both = run(model.network, cond)
    with torch.no_grad():
        for row in range(2):
            part = cond.rows(slice(row, row + 1))
            alone = model.network(
                draw(2, 4, *SIZE)[row : row + 1], T[row : row + 1], model.network.prepare(part, SIZE)
            )
            assert (alone - both[row : row + 1]).abs().max() < 1e-4


def test_text_folded_beside_a_control_changes_nothing() -> None:
    """Rows whose text tokens are all alike go through with one of them, each with its own picture."""
    model, control = DESIGNS["plus"]()
    fill(control, seed=4)
    attach(model.network, "edges", control)
    cond = given(control)
    rows = ClassifierFree(5.0).rows(cond, cond.null())
    rows = replace(rows, controls=(replace(rows.controls[0], value=draw(4, 4, *SIZE, seed=6)),))
    x, t = draw(4, 4, *SIZE), T.repeat(2)
    with torch.no_grad():
        whole = model.network(x, t, model.network.prepare(rows, SIZE))
        fold(model.network, 0)
        prepared = model.network.prepare(rows, SIZE)
        assert len(prepared.context.parts) == 2
        assert (model.network(x, t, prepared) - whole).abs().max() < 1e-4


def test_the_bases_weights_stay_and_the_copy_shares_none() -> None:
    model, control = DESIGNS["plus"]()
    began = {name: p.clone() for name, p in model.network.named_parameters()}
    fill(control, seed=4)
    attach(model.network, "edges", control)
    kept = dict(model.network.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in began.items())
    addresses = [p.data_ptr() for p in kept.values()]
    assert len(set(addresses)) == len(addresses)


def test_a_copy_begins_as_the_bases_first_blocks() -> None:
    model, control = DESIGNS["plus"]()
    own = dict(control.named_parameters())
    base_ = dict(model.network.named_parameters())
    copied = [name for name in own if name.startswith("transformer.") and "picture" not in name]
    assert len(copied) > 10
    assert all(torch.equal(own[name], base_[name]) for name in copied)
    assert all(p.abs().max() == EXACT for name, p in own.items() if name not in copied)


def test_shared_modulations_are_the_bases_own() -> None:
    _, control = DESIGNS["plus, shared adaLN"]()
    assert not any("adaln" in name for name, _ in control.named_parameters())


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_number_of_blocks_that_the_base_does_not_have_is_refused(blocks: int) -> None:
    with pytest.raises(ControlError, match=f"{blocks} blocks: the base has 2"):
        controlnet(blocks, base=base(PLUS))


def test_a_picture_of_another_size_is_refused_with_the_cause() -> None:
    model, _ = DESIGNS["unet"]()
    control = controlnet(hint=(4, 6, 8), base=model)
    attach(model.network, "edges", control)
    with pytest.raises(ControlError, match="halves once for each width but the first"):
        run(model.network, given(control))


@pytest.mark.parametrize(
    "design", ["plus, pixels", "unet, pixels", "unet, block-wise", "unet, concat, pixels"]
)
def test_pixels_of_another_autoencoder_are_refused_with_the_cause(design: str) -> None:
    model, control = DESIGNS[design]()
    attach(model.network, "edges", control)
    own = ControlInput("edges", draw(2, 3, 48, 80), (1.0, 1.0))
    with pytest.raises(ControlError, match="set the control's `cell`"):
        run(model.network, replace(condition(2), controls=(own,)))


def test_inpainting_by_pixels_is_refused() -> None:
    with pytest.raises(ControlError, match="inpainting takes the rest's latent"):
        concat(inpaint=True, input="pixels", base=base(PLUS))


def test_pixels_are_encoded_as_they_are_in_0_to_1() -> None:
    _, control = DESIGNS["plus, block-wise, pixels"]()
    pictures = draw(2, 3, 24, 40).clamp(-1, 1)
    assert torch.equal(control.encode(None, pictures), (pictures + 1) / 2)  # type: ignore[arg-type]


def test_a_name_is_taken_once() -> None:
    model, control = DESIGNS["plus"]()
    attach(model.network, "edges", control)
    with pytest.raises(ControlError, match="'edges' at transformer already"):
        attach(model.network, "edges", controlnet(1, base=model))
    with pytest.raises(ControlError, match="letters, digits and _"):
        attach(model.network, "a.b", controlnet(1, base=model))


# -- what a design computes


@pytest.mark.parametrize("component", [PLUS, UNET], ids=["plus", "unet"])
@pytest.mark.parametrize("inpaint", [False, True])
def test_concatenated_channels_are_one_wider_first_layer(component: Component, inpaint: bool) -> None:
    """[x_t, picture] or [x_t, mask, rest]: 33 channels of 16 + 1 + 16, the old weights in front."""
    model = base(component)
    control = concat(inpaint, base=model)
    fill(control, seed=4)
    x, more = draw(2, 4, *SIZE), value(control)
    joined, new = torch.cat([x, more], 1), control.zeros.weight.detach()  # type: ignore[union-attr]
    attach(model.network, "edges", control)
    own = ControlInput("edges", more, (1.0, 1.0))
    with torch.no_grad():
        prepared = model.network.prepare(replace(condition(2), controls=(own,)), SIZE)  # type: ignore[operator]
        if component is UNET:
            stem = model.network.stem
            ours = model.network.resolved.hooks.enter(x, prepared)
            wanted = torch.conv2d(joined, torch.cat([stem.weight, new], 1), stem.bias, padding=1)
        else:
            ctx, proj = prepared.context, model.network.transformer.mixins["patch_embed"].proj
            ours = model.network.transformer.hooks.embed(replace(ctx, image=x))[:, 7:] + ctx.table[:, 7:]
            cells = joined.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
            table = model.network.transformer.mixins["position"].position(ctx)
            wanted = cells @ torch.cat([proj.weight, new], 1).T + proj.bias + table
    assert (ours - wanted).abs().max() < 1e-5


def test_patches_of_pixels_are_a_convolution_of_their_size() -> None:
    model, control = DESIGNS["plus, concat, pixels"]()
    fill(control, seed=4)
    attach(model.network, "edges", control)
    network, picture = model.network, value(control)
    with torch.no_grad():
        table = network.prepare(given(control), SIZE).context.table[:, 7:]  # type: ignore[operator, union-attr]
        plain = network.prepare(condition(2), SIZE).context.table[:, 7:]  # type: ignore[operator, union-attr]
        weight = control.zeros.weight.view(-1, 3, 4, 4)  # type: ignore[union-attr, operator]
        wanted = torch.conv2d(picture, weight, stride=4).flatten(2).transpose(1, 2)
    assert (table - plain - wanted).abs().max() < 1e-5


def test_pixels_of_a_unets_cells_are_a_convolution_of_stride_cell() -> None:
    model, control = DESIGNS["unet, concat, pixels"]()
    fill(control, seed=4)
    attach(model.network, "edges", control)
    network, x = model.network, draw(2, 4, *SIZE)
    kernel = control.zeros.weight.detach()  # type: ignore[union-attr]
    kernel = kernel.view(-1, 3, 2, 2, 3, 3).permute(0, 1, 4, 2, 5, 3).reshape(-1, 3, 6, 6)
    with torch.no_grad():
        prepared = network.prepare(given(control), SIZE)  # type: ignore[operator]
        added = network.resolved.hooks.enter(x, prepared) - network.stem(x)  # type: ignore[operator, union-attr]
    assert (added - torch.conv2d(value(control), kernel, stride=2, padding=2)).abs().max() < 1e-5


def test_block_wise_control_of_a_unet_is_one_small_mlp_a_map() -> None:
    model, control = DESIGNS["unet, block-wise"]()
    fill(control, seed=4)
    control.stem.weight.data.zero_()  # type: ignore[union-attr, operator]
    network, x = model.network, draw(2, 4, *SIZE)
    assert isinstance(network, CogView3UNet)

    def down(cond: Condition) -> list[Tensor]:
        prepared = network.prepare(cond, SIZE)
        skips, middle = network.resolved.hooks.descend(x, T, network.embeddings(T, prepared), prepared)
        return [*skips, middle]

    with torch.no_grad():
        plain = down(condition(2))
        attach(network, "edges", control)
        got, c = down(given(control)), torch.pixel_unshuffle(value(control), 2)
        first = nn.functional.conv2d(c, control.picture[0].weight, control.picture[0].bias, padding=1)  # type: ignore
        for place in (0, 1):  # the stem's map and that of the first residual block
            seen = torch.cat([control.norms[place](plain[place]), control.norms_c[0](first)], 1)  # type: ignore
            wanted = control.zeros[place](nn.functional.gelu(control.up[place](seen), approximate="tanh"))  # type: ignore
            assert (got[place] - plain[place] - wanted).abs().max() < 1e-5
        assert all((a - b).abs().max() > 0.001 for a, b in zip(got, plain, strict=True))
    assert [tuple(one.shape) for one in got] == [tuple(one.shape) for one in plain]


def test_a_references_keys_are_made_once_and_kept_over_the_steps() -> None:
    model, control = REFERENCE["plus, reference"]()
    attach(model.network, "edges", control)
    network, passes = model.network, list[int]()
    hook = network.transformer.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        prepared = network.prepare(given(control), SIZE)  # type: ignore[operator]
        assert len(passes) == 1, "the reference's own pass"
        for t in (900.0, 500.0, 30.0):
            network(draw(2, 4, *SIZE), t, prepared)
    hook.remove()
    assert len(passes) == 4, "one pass a step, of the picture alone"


def test_a_reference_goes_through_the_blocks_at_timestep_0_without_text() -> None:
    """Its keys do not change with the prompt or the step; with its picture they do."""
    model, control = REFERENCE["plus, reference"]()
    attach(model.network, "edges", control)

    def keys(cond: Condition) -> Tensor:
        with torch.no_grad():
            made = model.network.prepare(cond, SIZE).context.controls[0].made  # type: ignore[operator]
        assert len(made) == 2 and made[0].k.shape == (2, 4, 60, 8)
        return torch.stack([one.k for one in made])

    cond = given(control)
    assert torch.equal(keys(cond), keys(replace(cond, text=cond.text.flip(1))))
    changed = replace(cond, controls=(replace(cond.controls[0], value=value(control, 9)),))
    assert (keys(cond) - keys(changed)).abs().max() > 0.01


def test_an_image_prompt_acts_on_image_tokens_alone_and_zeros_are_the_other_half() -> None:
    model, control = DESIGNS["plus, image prompt"]()
    own = ControlInput("edges", value(control), (1.0, 1.0), blank=control.blank)
    assert not own.null().value.any()
    fill(control, seed=4)
    attach(model.network, "edges", control)
    seen: list[tuple[Tensor, Tensor]] = []
    attend = control.attend  # type: ignore[union-attr]

    def spy(inner: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, ctx: object) -> Tensor:
        out: Tensor = attend(inner, q, k, v, ctx)  # type: ignore[operator]
        seen.append((inner(q, k, v, ctx), out))
        return out

    control.attend = spy  # type: ignore[assignment]
    model.network.transformer._resolve()
    run(model.network, replace(condition(2), controls=(own,)))
    for plain, steered in seen:
        assert torch.equal(plain[:, :, :7], steered[:, :, :7])
        assert (plain[:, :, 7:] - steered[:, :, 7:]).abs().amax((0, 1, 3)).min() > 0


@pytest.mark.parametrize(("blocks", "most"), [(1, 1.25), (2, 1.5), (4, 2.0)])
def test_a_step_costs_n_of_l_more_by_count(blocks: int, most: float) -> None:
    """1 + N / L, and at most a twentieth beyond it for the layers that lead out."""
    model = base(PLUS, depth=4)
    control = controlnet(blocks, base=model)

    def count(cond: Condition) -> int:
        with torch.no_grad():
            prepared = model.network.prepare(cond, SIZE)  # type: ignore[operator]
            with FlopCounterMode(display=False) as counter:
                model.network(draw(2, 4, *SIZE), 500.0, prepared)
        return counter.get_total_flops()

    plain = count(condition(2))
    attach(model.network, "edges", control)
    ratio = count(given(control)) / plain
    assert 0.95 * most < ratio < 1.06 * most
