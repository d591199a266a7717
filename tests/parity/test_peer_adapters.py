"""Adapters as other programs write them, with the numbers that PEFT gets from the same file or factors."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from sat.adapters.factors import AdapterError, weight_change
from sat.adapters.files import is_adapter, locate, read
from sat.checkpoint.format import CheckpointError
from tests.adapters import t5
from tests.parity.test_lora import both
from tests.tolerances import F32

PEFT = "adapter_model.safetensors"
BLOCK = "transformer_blocks.0.attn1."


def wanted(wrapped: nn.Module) -> dict[str, Tensor]:
    """Change of every weight that PEFT's layers make, by the peer's name."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in wrapped.named_modules()
        if "default" in getattr(layer, "lora_A", {})
    }


def found(path: Path, ours: nn.Module, part: str = "model") -> dict[str, Tensor]:
    """Change of every weight that the adapter at ``path`` makes here, by our name."""
    layers = read(path, {part: ours}).of(part)
    return {
        name: weight_change(ours.get_submodule(name).weight.detach(), one) for name, one in layers.items()
    }


def same(theirs: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    """Changes of attention in the first block: its q, k, v are one of our layers."""
    fused = here["transformer.blocks.0.attn.qkv"].chunk(3)
    compared = 0
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        change = theirs.get(f"{BLOCK}{name}")
        if change is None:
            assert not fused[index].any()
            continue
        assert change.abs().max() > 1e-3
        assert (fused[index] - change).abs().max() < F32 * change.abs().max()
        compared += 1
    assert compared


def peft(folder: Path, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """An adapter saved by PEFT in ``folder``, and the model that PEFT reads of it; with our network."""
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v"], "init_lora_weights": False}
    peer, ours = both()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(peer, LoraConfig(**{**config, **settings})).save_pretrained(folder)
        return PeftModel.from_pretrained(both()[0], folder), ours


Plain = tuple[Path, nn.Module, nn.Module]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The folder of an adapter that PEFT saved, PEFT's model with it, and our network."""
    folder = tmp_path_factory.mktemp("plain")
    wrapped, ours = peft(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder, wrapped, ours


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"^transformer_blocks.0.attn1.to_q": 16}},
        {"rank_pattern": {"^transformer_blocks.0.attn1.to_q": 2}},
        {"alpha_pattern": {"to_q": 16}, "rank_pattern": {r".*\.0\.attn1\.to_[kv]": 3}},
        {"alpha_pattern": {r"transformer_blocks\.\d+\.attn1\.to_v": 2}, "use_rslora": True},
        {"alpha_pattern": {"attn1.to_k": 1, "to_k": 7}, "rank_pattern": {"blocks.0": 9}},
        {"use_rslora": True, "rank_pattern": {"to_q": 9}},
        {"init_lora_weights": "gaussian", "lora_alpha": 0.5},
    ],
)  # fmt: skip
def test_patterns_scale_as_pefts(settings: dict[str, Any], tmp_path: Path) -> None:
    wrapped, ours = peft(tmp_path, **settings)
    if settings.get("init_lora_weights") == "gaussian":  # which starts at no change
        tensors = {n: torch.randn_like(t) for n, t in load_file(tmp_path / PEFT).items()}
        save_file(tensors, tmp_path / PEFT, {"format": "pt"})
        wrapped = PeftModel.from_pretrained(both()[0], tmp_path)
    same(wanted(wrapped), found(tmp_path, ours))


def renamed(
    folder: Path, to: Path, rename: Callable[[str], str], extra: dict[str, Tensor] | None = None
) -> Path:
    """The tensors of the PEFT adapter in ``folder`` under other names, in a file without settings."""
    to.parent.mkdir(exist_ok=True)
    tensors = load_file(folder / PEFT)
    new = {rename(name.removeprefix("base_model.model.")): tensor for name, tensor in tensors.items()}
    save_file(new | (extra or {}), to)
    return to


def kohya(name: str, start: str = "lora_unet_") -> str:
    """``a.b.lora_A.weight`` as sd-scripts has it."""
    linear, side, _ = name.rsplit(".", 2)
    return f"{start}{linear.replace('.', '_')}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"


@pytest.mark.parametrize("start", ["lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_"])
def test_kohyas_names_are_read_with_its_alpha(start: str, plain: Plain, tmp_path: Path) -> None:
    folder, wrapped, ours = plain
    names = [n.removeprefix("base_model.model.") for n in load_file(folder / PEFT)]
    linears = {kohya(name, start).partition(".")[0] for name in names}
    alphas = {f"{name}.alpha": torch.tensor(2.0, dtype=torch.float16) for name in linears}
    file = renamed(folder, tmp_path / "a.safetensors", lambda n: kohya(n, start), alphas)
    assert is_adapter(file) and is_adapter(file.parent)
    same({n: t / 2 for n, t in wanted(wrapped).items()}, found(file, ours))


def test_kohyas_text_encoder_beside_the_network(plain: Plain, tmp_path: Path) -> None:
    config = T5Config(
        d_model=24, num_heads=3, d_kv=8, d_ff=40, num_layers=2, vocab_size=50, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    targets = LoraConfig(r=4, lora_alpha=4, target_modules=["q", "v", "wi_0"], init_lora_weights=False)
    wrapped = get_peft_model(T5EncoderModel(config), targets)
    wrapped.save_pretrained(tmp_path / "text")
    text = load_file(tmp_path / "text" / PEFT)
    more = {kohya(n.removeprefix("base_model.model."), "lora_te3_"): t for n, t in text.items()}
    layers = read(
        renamed(plain[0], tmp_path / "a.safetensors", kohya, more), {"model": plain[2], "text": t5()}
    )
    assert len(layers.of("model")) == 2
    here = next(layer for name, layer in layers.of("text").items() if name.endswith("0.attn.qkv")).parts[0]
    theirs = wanted(wrapped)["encoder.block.0.layer.0.SelfAttention.q"]
    assert here is not None
    assert (here.scale * here.up @ here.down - theirs).abs().max() < F32 * theirs.abs().max()


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"transformer.{n}",
        lambda n: f"diffusion_model.{n}",
        lambda n: f"model.diffusion_model.{n}",
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: f"base_model.model.module._orig_mod.{n}",
        lambda n: n.replace("transformer_blocks.0", "transformer_blocks.0._orig_mod"),
        lambda n: f"network.of.mine.{n}",
        lambda n: f"base_model.model.{n}".replace(".weight", ".default.weight"),
        lambda n: f"unet.{n}".replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda n: n.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
        lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    ],
)  # fmt: skip
def test_what_stands_in_front_of_all_names_is_left_out(rename, plain: Plain, tmp_path: Path) -> None:
    folder, wrapped, ours = plain
    same(wanted(wrapped), found(renamed(folder, tmp_path / "a.safetensors", rename), ours))


def test_an_unusual_prefix_is_told(plain: Plain, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found(renamed(plain[0], tmp_path / "a.safetensors", lambda n: f"net.{n}"), plain[2])
    assert "'net.' in front of its names is left out" in caplog.text


def test_a_file_of_any_name_and_a_bin_are_read(plain: Plain, tmp_path: Path) -> None:
    folder, wrapped, ours = plain
    mine = tmp_path / "mine" / "my_style-000010.safetensors"
    renamed(folder, mine, lambda n: n)
    assert locate(mine.parent) == [mine]
    same(wanted(wrapped), found(mine.parent, ours))
    old = tmp_path / "old"
    old.mkdir()
    torch.save(load_file(folder / PEFT), old / "adapter_model.bin")
    (old / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    same(wanted(wrapped), found(old, ours))
    torch.save({"lora_A": Path("x")}, old / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="loading it could run any code$"):
        read(old, {"model": ours})
    (mine.parent / "other.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"it holds 'my_style-000010.safetensors', 'other.safetensors'"):
        locate(mine.parent)


def test_doras_scale_of_kohya_is_pefts_magnitude(tmp_path: Path) -> None:
    wrapped, ours = peft(tmp_path, use_dora=True)

    def rename(name: str) -> str:
        if name.endswith("lora_magnitude_vector"):
            return f"lora_unet_{name.removesuffix('.lora_magnitude_vector').replace('.', '_')}.dora_scale"
        return kohya(name)

    file = renamed(tmp_path, tmp_path / "out" / "a.safetensors", rename)
    raw = {n: t[:, None] if n.endswith("dora_scale") else t for n, t in load_file(file).items()}
    save_file({n: t.contiguous() for n, t in raw.items()}, file)
    here, there = read(file, {"model": ours}), read(tmp_path, {"model": ours})
    for name, layer in there.layers.items():
        assert torch.equal(here.layers[name].magnitude, layer.magnitude)


def test_settings_of_two_components_in_one_header_stay_apart(tmp_path: Path) -> None:
    """diffusers keeps those of each with its name in front."""
    wrapped, ours = peft(tmp_path, lora_alpha=2, alpha_pattern={"^transformer_blocks.0.attn1.to_q": 16})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    header = {f"transformer.{key}": value for key, value in settings.items()}
    header |= {f"text_encoder.{key}": value for key, value in {**settings, "r": 9, "lora_alpha": 7}.items()}
    file = renamed(tmp_path, tmp_path / "out" / "a.safetensors", lambda n: f"transformer.{n}")
    for order in (header, dict(reversed(header.items()))):
        save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(order)})
        same(wanted(wrapped), found(file, ours))


# ---------------------------------------------------------------------- refusals


Q, K = f"base_model.model.{BLOCK}to_q", f"base_model.model.{BLOCK}to_k"


def added(**tensors: Tensor) -> Callable[[Path], None]:
    """A change of an adapter: more tensors of the layer Q, or others."""

    def apply(folder: Path) -> None:
        more = {f"{Q}.{name}": tensor for name, tensor in tensors.items()}
        save_file(load_file(folder / PEFT) | more, folder / PEFT)

    return apply


def moved(change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of an adapter: other names."""

    def apply(folder: Path) -> None:
        save_file({change(n): t for n, t in load_file(folder / PEFT).items()}, folder / PEFT)

    return apply


def said(**settings: Any) -> Callable[[Path], None]:
    """A change of an adapter: other settings."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return apply


def text(content: str) -> Callable[[Path], Any]:
    """A change of an adapter: settings that are not written as they should be."""
    return lambda folder: (folder / "adapter_config.json").write_text(content)


NAN, BIAS = float("nan"), torch.ones(32)
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bias of factors": (added(**{"lora_B.bias": BIAS}), "holds biases.*lora_B.bias"),
    "bias of an adapter": (added(**{"lora_B.default.bias": BIAS}), "holds biases"),
    "bias of the layer": (added(bias=BIAS), "holds biases"),
    "lora_bias": (said(lora_bias=True), "PEFT's lora_bias"),
    "bias all": (said(bias="all"), "PEFT's bias 'all'"),
    "two adapters": (
        moved(lambda n: n.replace(".weight", ".a.weight" if Q in n else ".b.weight")),
        "several adapters.*'a', 'b'",
    ),
    "two prefixes": (
        moved(lambda n: n.replace("base_model.model", "unet") if Q in n else n),
        "in several ways.*several adapters in one file",
    ),
    "the same twice": (added(**{"lora_down.weight": torch.ones(4, 32)}), "are the same factor"),
    "whole numbers": (added(**{"lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}), "is int32, expected"),
    "not finite": (added(**{"lora_A.weight": torch.full((4, 32), NAN)}), "not finite"),
    "endless alpha": (added(alpha=torch.tensor(float("inf"))), "not finite"),
    "two alphas": (added(alpha=torch.ones(2)), "2 values, expected one number"),
    "another alpha": (added(alpha=torch.tensor(1.0)), "1 by its alpha, 4 by its config"),
    "alpha alone": (
        moved(lambda n: f"{K}.alpha" if n == f"{K}.lora_A.weight" else n),
        "values, expected one number",
    ),
    "half a pair": (moved(lambda n: n.replace("0.attn1.to_k.lora_A", "1.ff.net.2.lora_A")), "no lora_"),
    "a LoHa": (added(hada_w1_a=torch.ones(2, 2)), "holds a LoHa"),
    "an embedding": (added(lora_embedding_A=torch.ones(2, 2)), "of an embedding"),
    "whole layers": (said(modules_to_save=["proj_out"]), "PEFT's modules_to_save"),
    "DoRA without norms": (said(use_dora=True), "has no magnitudes, its config says use_dora True"),
    "norms without DoRA": (added(lora_magnitude_vector=torch.ones(32)), "has magnitudes, its config"),
    "too few norms": (added(lora_magnitude_vector=torch.ones(3)), r"\[3\] magnitudes, expected one"),
    "an invalid pattern": (said(alpha_pattern={"(": 3}), "no regular expression"),
    "an endless pattern": (said(alpha_pattern={"(a+)+$": 3}), "repeats a repetition"),
    "an endless choice": (said(rank_pattern={"(a|aa)+$": 3}), "repeats a repetition or a choice"),
    "many patterns": (said(rank_pattern={f"x{i}": 4 for i in range(5000)}), "5,000 patterns"),
    "an anchored rank": (said(rank_pattern={"^transformer_blocks.0.attn1.to_q": 2}), "its config says 2"),
    "alpha as text": (said(lora_alpha="4"), "damaged at 'lora_alpha'"),
    "alpha of NaN": (said(lora_alpha=NAN), "damaged at 'lora_alpha'"),
    "rank true": (said(r=True), "damaged at 'r'"),
    "a list": (text("[]"), "expected a JSON object"),
    "a deep list": (text("[" * 10**5), "not valid JSON"),
    "a long file": (text(" " * (1 << 24) + "{}"), "bytes, more than"),
    "two layouts": (lambda folder: (folder / "adapter.safetensors").touch(), "holds several adapters"),
    **{
        name: (said(init_lora_weights=name), f"init_lora_weights '{name}' changes")
        for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "eva", "lora_ga")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_other_numbers_is_refused_by_name(case: str, plain: Plain, tmp_path: Path) -> None:
    for file in plain[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change, message = REFUSED[case]
    change(tmp_path)
    with pytest.raises((AdapterError, CheckpointError), match=message) as error:
        read(tmp_path, {"model": plain[2]})
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_settings_that_are_unknown_are_told(plain: Plain, tmp_path: Path, caplog) -> None:
    for file in plain[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said(use_turbo=True)(tmp_path)
    read(tmp_path, {"model": plain[2]})
    assert "'use_turbo': unknown here, and without effect" in caplog.text


def test_digests_inside_tell_a_flipped_bit(tmp_path: Path) -> None:
    from sat.adapters.write import write
    from sat.checkpoint.verify import Verify
    from tests.adapters import adapter, noisy, start

    _, ours = both()
    write(tmp_path / "out", adapter(noisy(start(ours))), "peft", {"model": ours})
    file = tmp_path / "out" / PEFT
    good = file.read_bytes()
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["xxh3"])["tensors"].keys() == set(opened.keys())
    length = 8 + int.from_bytes(good[:8], "little")
    assert read(tmp_path / "out", {"model": ours}).layers
    alpha = good.index(b"6.0", good.index(b"alpha"))
    for place, bit in ((length + 1000, 1), (len(good) - 3, 64), (alpha, 1)):
        bad = bytearray(good)
        bad[place] ^= bit
        file.write_bytes(bad)
        with pytest.raises(
            CheckpointError, match=r"is not what was written|is not the one that was written|damaged"
        ):
            read(tmp_path / "out", {"model": ours})
    bad = bytearray(good)
    bad[length + 1000] ^= 1
    file.write_bytes(bad)
    for mode in ("manifest", "off"):
        assert read(tmp_path / "out", {"model": ours}, Verify(mode)).layers
