"""Adapter files: every layout of every model holds the same adapter, and what does not belong is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sat.adapters.factors import AdapterError, LayerFactors, some_norms, telling, weight_change
from sat.adapters.files import NATIVE_FILE, is_adapter, locate, read
from sat.adapters.lora import attach, base_norms, detach, merge
from sat.adapters.merge import AdapterRef, folded, load_adapters
from sat.adapters.names import choose, layouts, to_ours, to_theirs
from sat.adapters.write import LAYOUTS, write
from sat.checkpoint import load, open_part, save_native
from sat.checkpoint.convert import Completed
from sat.checkpoint.format import ENGINE_PREFIXES, CheckpointError, InMemory
from sat.cli.convert import main as convert
from sat.kernels.packed import pack, packable
from sat.kernels.quantize import QuantizedLinear, Scheme
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_unet import CogView3UNet
from sat.models.t5 import T5Encoder
from tests.adapters import EVERYTHING, about, adapter, noisy, output, start, t5, unet
from tests.checkpoints import CONFIG, MODEL, build, spec, tensors
from tests.small import plus
from tests.tolerances import F32

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plus": (plus, "model"),
    "unet": (unet, "model"),
    "t5": (t5, "text"),
}


def layers_of(name: str, *, dora: bool = False) -> tuple[nn.Module, str, dict[str, LayerFactors]]:
    build_model, part = MODELS[name]
    model = build_model()
    targets = ["text_encoder"] if part == "text" else list(EVERYTHING)
    targets += ["convolution", "model.stem"] if name == "unet" and not dora else []
    return model, part, noisy(start(model, targets, part=part, dora=dora))


def changes(model: nn.Module, layers: dict[str, LayerFactors]) -> dict[str, torch.Tensor]:
    """What an adapter adds to every weight."""
    return {n: weight_change(model.get_submodule(n).weight.detach(), layer) for n, layer in layers.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the adapter of the small network in a layout; the folder."""
    model, part, layers = layers_of("plus")

    def save(layout: str) -> Path:
        write(tmp_path / layout, adapter(layers, part), layout, {part: model})
        return tmp_path / layout

    return save


# ---------------------------------------------------------------------- layouts


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_holds_the_same_adapter(name: str, layout: str, dora: bool, tmp_path: Path) -> None:
    model, part, layers = layers_of(name, dora=dora)
    files = write(tmp_path / "out", adapter(layers, part), layout, {part: model})
    assert all(file.is_file() for file in files)
    found = read(tmp_path / "out", {part: model})
    assert (found.layout, found.info.rank, found.info.alpha) == (layout, 4, 6.0)
    assert (found.info.dora, found.info.targets) == (dora, EVERYTHING)
    assert found.of(part).keys() == layers.keys()
    there = changes(model, found.of(part))
    for path, change in changes(model, layers).items():
        assert change.abs().max() > 0.01
        assert (there[path] - change).abs().max() < F32 * change.abs().max()


def test_names_and_header_of_our_own_file(saved) -> None:
    with safe_open(saved("native") / NATIVE_FILE, "pt") as file:
        names, header = set(file.keys()), file.metadata()
    block = "model.transformer.blocks.1."
    assert {f"{block}attn.qkv.lora_{side}.{i}.weight" for side in "AB" for i in range(3)} <= names
    assert {f"{block}mlp.up.lora_A.0.weight"} <= names
    assert (header["adapter"], header["rank"], header["alpha"]) == ("cogview3-lora", "4", "6.0")
    assert json.loads(header["targets"]) == list(EVERYTHING)
    assert json.loads(header["layers"])[f"{block}mlp.up#0"] == {"rank": 2, "alpha": 5.0, "parts": 1}


def test_names_of_peft_and_diffusers_are_unfused(saved) -> None:
    folder = saved("peft")
    peft = load_file(folder / "adapter_model.safetensors")
    there = load_file(saved("diffusers") / "pytorch_lora_weights.safetensors")
    name = "transformer_blocks.1.attn1.to_k.lora_B.weight"
    assert peft[f"base_model.model.{name}"].shape == there[f"transformer.{name}"].shape == (32, 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6.0)
    assert config["rank_pattern"]["transformer_blocks.0.ff.net.2"] == 2
    assert config["alpha_pattern"]["transformer_blocks.0.ff.net.2"] == 5.0
    assert "transformer_blocks.0.attn1.to_v" in config["target_modules"]


@pytest.mark.parametrize(
    ("kind", "file", "layout", "layers"),
    [
        (CogView3Plus, "plus_diffusers", "DIFFUSERS", 30 * (3 + 1 + 2 + 1) + 1),
        (CogView3UNet, "unet_sat", "SAT", None),
        (T5Encoder, "t5_xxl_hf", "HF", 24 * 7),
    ],
)
def test_at_full_size_every_layer_has_a_published_name(
    kind: type[nn.Module], file: str, layout: str, layers: int | None
) -> None:
    with torch.device("meta"):
        model = kind()
    part, targets = ("text", ["text_encoder"]) if kind is T5Encoder else ("model", list(EVERYTHING))
    targets += ["convolution", "model.stem", "model.head.2"] if kind is CogView3UNet else []
    prefix = ENGINE_PREFIXES[part]
    published = {name.removeprefix(prefix) for name in spec(file)}
    chosen = choose({part: model}, targets, 4, {})
    names = {n.partition(".")[2]: linear for n, (linear, _) in chosen.items()}
    found = next(one for one in layouts(model) if one.name == layout or layout == "HF")
    places = {theirs for theirs, source in found.places.items() if set(source.names) & names.keys()}
    assert {f"{theirs}.weight" for theirs in places} <= published
    reached = {name for theirs in places for name in found.places[theirs].names}
    assert names.keys() <= reached
    assert layers is None or len(places) == layers


def test_halves_of_the_final_modulation_are_swapped_for_diffusers() -> None:
    """Ours is (shift, scale), theirs (scale, shift)."""
    model, _, layers = layers_of("plus", dora=True)
    mine = layers["transformer.mixins.final_layer.adaln.1"]
    theirs = to_theirs(layers, layouts(model)[0])["norm_out.linear"]
    assert mine.parts[0] is not None
    assert torch.equal(theirs.pair.up, torch.cat(mine.parts[0].up.chunk(2)[::-1]))
    assert torch.equal(theirs.magnitude, torch.cat(mine.magnitude.chunk(2)[::-1]))
    assert torch.equal(theirs.pair.down, mine.parts[0].down)


def test_value_and_gate_of_a_unet_are_one_layer_of_theirs() -> None:
    model, _, layers = layers_of("unet")
    up = next(name for name in layers if name.endswith("mlp.up"))
    gate = up.removesuffix("up") + "gate"
    layout = layouts(model)[0]
    their, flat = next((n, f) for n, f in to_theirs(layers, layout).items() if n.endswith("ff.net.0.proj"))
    whole = flat.pair.scale * flat.pair.up @ flat.pair.down
    pairs = [layers[name].parts[0] for name in (up, gate)]
    assert flat.pair.rank == 4
    assert torch.allclose(whole, torch.cat([p.scale * p.up @ p.down for p in pairs if p]), atol=1e-6)
    alone = to_theirs({gate: layers[gate]}, layout)[their]
    back = to_ours({their: alone}, layout)
    assert back[up].parts[0].up.abs().max() == 0
    assert torch.allclose(
        back[gate].parts[0].scale * back[gate].parts[0].up @ back[gate].parts[0].down,
        pairs[1].scale * pairs[1].up @ pairs[1].down, atol=1e-6,
    )  # fmt: skip


def test_a_part_that_is_not_adapted_stays_as_it_is(saved, tmp_path: Path) -> None:
    """As PEFT writes it with targets to_q and to_v."""
    peft = saved("peft")
    kept = {n: t for n, t in load_file(peft / "adapter_model.safetensors").items() if ".to_k." not in n}
    save_file(kept, tmp_path / "few.safetensors")
    found = read(tmp_path / "few.safetensors", {"model": plus()}).of("model")
    assert [pair is None for pair in found["transformer.blocks.0.attn.qkv"].parts] == [False, True, False]


def test_both_parts_in_one_file_and_in_two_folders(tmp_path: Path) -> None:
    model, text = plus(), t5()
    both = {f"model.{n}": v for n, v in layers_of("plus")[2].items()}
    both |= {f"text.{n}": v for n, v in layers_of("t5")[2].items()}
    parts: dict[str, nn.Module] = {"model": model, "text": text}
    one = adapter({}, "model")
    for layout in LAYOUTS:
        write(tmp_path / layout, type(one)(both, about(), "native", "test"), layout, parts)
        found = read(tmp_path / layout, parts)
        assert found.layers.keys() == both.keys()
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {"transformer", "text_encoder"}
    with pytest.raises(
        AdapterError, match="none of CogView3Plus: .*encoder.block.0.*a LoRA of another model"
    ):
        read(tmp_path / "diffusers", {"model": model})
    with pytest.raises(AdapterError, match="adapts the text part, of which this model has none"):
        read(tmp_path / "native", {"model": model})


def test_alpha_of_a_file_without_config_is_its_tensor_or_the_rank(saved, tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    raw = load_file(saved("diffusers") / "pytorch_lora_weights.safetensors")
    few = {n: t for n, t in raw.items() if n.startswith(name)}
    save_file(few, tmp_path / "rank.safetensors")
    save_file({**few, f"{name}.alpha": torch.tensor(1.5)}, tmp_path / "alpha.safetensors")
    alphas = []
    for file in ("rank", "alpha"):
        layer = read(tmp_path / f"{file}.safetensors", {"model": plus()}).of("model")
        alphas.append(layer["transformer.blocks.0.attn.qkv"].parts[0].alpha)
    assert alphas == [4.0, 1.5]


# ---------------------------------------------------------------------- refusals


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **header: str) -> Path:
    """The file in ``folder`` with tensors changed, and header entries; its header is kept."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    metadata.pop("xxh3", None)  # as a program writes it that knows nothing of our digests
    content = load_file(file)
    change(content)
    save_file({n: t.contiguous() for n, t in content.items()}, file, {**metadata, **header})
    return folder


QKV = "model.transformer.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{QKV}.lora_B.1.weight"), "attn.qkv#1' has lora_A but no lora_B: incomplete"),
        (
            lambda t: t.update({f"{QKV}.lora_A.1.weight": torch.zeros(3, 32)}),
            "attn.qkv#1': rank 3 of lora_A, 4 of lora_B",
        ),
        (
            lambda t: t.update(
                {f"{QKV}.lora_A.1.weight": torch.zeros(3, 32), f"{QKV}.lora_B.1.weight": torch.zeros(32, 3)}
            ),
            "attn.qkv#1' has rank 3, its header says 4: wrong rank",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{QKV}.")],
            r"3 of its 15 layers are missing: 'model.transformer.blocks.0.attn.qkv#0'",
        ),
        (lambda t: t.update({"model.time.0.weight": torch.zeros(2)}), "1 tensors are no LoRA factors"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(saved, change: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        read(edited(saved("native"), change), {"model": plus()})


def test_the_wrong_rank_in_pefts_config_is_refused(saved) -> None:
    folder = edited(saved("peft"), lambda t: None, adapter="none of ours")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(AdapterError, match="has rank 4, its config says 8: wrong rank"):
        read(folder, {"model": plus()})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(AdapterError, match="PEFT's LOHA is not supported, only plain LoRA and DoRA"):
        read(folder, {"model": plus()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_of_another_model_is_refused_by_name(saved, layout: str) -> None:
    folder = saved(layout)
    other = CogView3Plus(**{**MODEL, "dim": 64})
    with pytest.raises(
        AdapterError,
        match=r"the adapter is for .* inputs and .* outputs, CogView3Plus has .*: it is of another model",
    ):
        read(folder, {"model": other})
    with pytest.raises(AdapterError, match="another model"):
        read(folder, {"model": unet()})


def test_the_class_it_was_trained_on_is_compared(tmp_path: Path) -> None:
    model, part, layers = layers_of("plus")
    one = adapter(layers)
    base = {"model": {"target": "sat.models.cogview3_unet.CogView3UNet", "params": {}}}
    named = type(one)(one.layers, type(one.info)(4, 6.0, base=base), "native", "test")
    write(tmp_path / "out", named, "native", {part: model})
    with pytest.raises(AdapterError, match="is a LoRA of CogView3UNet, this model is CogView3Plus"):
        read(tmp_path / "out", {"model": model})


def test_a_lora_of_a_convolution_and_dora_of_some_parts_are_refused(saved, tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    kernel = {
        f"{name}.lora_A.weight": torch.zeros(4, 32, 3, 3),
        f"{name}.lora_B.weight": torch.zeros(32, 4, 1, 1),
    }
    save_file(kernel, tmp_path / "conv.safetensors")
    with pytest.raises(AdapterError, match="is a LoRA of a convolution of 3x3"):
        read(tmp_path / "conv.safetensors", {"model": plus()})
    raw = load_file(saved("diffusers") / "pytorch_lora_weights.safetensors")
    raw[f"{name}.lora_magnitude_vector"] = torch.ones(32)
    save_file(raw, tmp_path / "dora.safetensors")
    with pytest.raises(AdapterError, match="DoRA of some of its 3 fused parts only"):
        read(tmp_path / "dora.safetensors", {"model": plus()})


def test_what_holds_no_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file or folder"):
        locate(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="holds no adapter: expected adapter.safetensors"):
        locate(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    (tmp_path / "a.bin").write_bytes(b"nonsense")
    for name in ("a.safetensors", "a.bin"):
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            read(tmp_path / name, {"model": plus()})


def test_a_run_is_its_newest_whole_checkpoints_adapter(saved, tmp_path: Path, caplog) -> None:
    native = saved("native") / NATIVE_FILE
    for step, whole in ((1, True), (2, True), (3, False)):
        place = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        (place / "native").mkdir(parents=True)
        (place / "native" / NATIVE_FILE).write_bytes(native.read_bytes())
        if whole:
            (place / "COMPLETE").write_text("{}")
    assert locate(tmp_path / "run")[0].parent.parent.name == "step_00000002"
    read(tmp_path / "run", {"model": plus()})
    assert "step_00000003 is torn (no COMPLETE file): the adapter of step_00000002 is used" in caplog.text


# ---------------------------------------------------------------------- using and merging


def test_two_loaded_adapters_have_names_and_strengths(saved) -> None:
    model = plus()
    before = output(model)
    found = load_adapters(
        {"model": model}, [AdapterRef(saved("native"), 0.5), AdapterRef(saved("peft"), -0.5)]
    )
    assert list(found)[1] == "peft"
    assert (output(model) - before).abs().max() < 1e-4 * before.abs().max()  # they cancel out
    for name in found:
        detach(model, name)
    assert torch.equal(output(model), before)


def test_an_adapter_is_called_after_its_run(saved, tmp_path: Path) -> None:
    native = saved("native") / NATIVE_FILE
    step = tmp_path / "my run" / "checkpoints" / "step_00000002"
    (step / "native").mkdir(parents=True)
    (step / "native" / NATIVE_FILE).write_bytes(native.read_bytes())
    (step / "COMPLETE").write_text("{}")
    paths = [tmp_path / "my run", step, step / "native" / NATIVE_FILE]
    found = load_adapters({"model": plus()}, [AdapterRef(path) for path in paths])
    assert list(found) == ["my_run", "my_run_2", "my_run_3"]


def told(adapter_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture) -> bool:
    """True if loading says that the adapter was trained on other weights than those of ``model``."""
    caplog.clear()
    load_adapters({"model": model}, [AdapterRef(adapter_path)])
    return "was trained on other weights of the same shapes" in caplog.text


def test_other_weights_of_the_same_shapes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In whatever type or integers they are kept, and whichever adapter is there already."""
    model = plus()
    layers = noisy(start(model))
    norms = {n: some_norms(base_norms(model.get_submodule(n))) for n in telling(layers)}
    assert len(norms) == 4
    one = adapter(layers)
    base = {"model": {"target": "sat.models.cogview3_plus.CogView3Plus"}}
    info = type(one.info)(4, 6.0, base=base, norms={"model": norms})
    write(tmp_path / "out", type(one)(one.layers, info, "native", "test"), "peft", {"model": model})
    assert not told(tmp_path / "out", plus(), caplog)
    assert not told(tmp_path / "out", plus().bfloat16(), caplog)
    attached = plus()
    assert not told(tmp_path / "out", attached, caplog) and not told(tmp_path / "out", attached, caplog)
    for kind in ("int8", "int4"):
        small = plus()
        for name in layers:
            parent, _, leaf = name.rpartition(".")
            layer = QuantizedLinear(small.get_submodule(name), Scheme(kind))
            setattr(small.get_submodule(parent), leaf, layer)
        assert not told(tmp_path / "out", small, caplog)
    tuned = plus()
    with torch.no_grad():
        for name in layers:
            tuned.get_submodule(name).weight.mul_(1.01)
    caplog.clear()
    for other in (plus(), tuned):
        merged = folded(
            {"model": Completed(InMemory(other.state_dict()), other, [], {})}, [AdapterRef(tmp_path / "out")]
        )
        assert len(dict(merged["model"])) == len(other.state_dict())
        assert caplog.text.count("was trained on other weights") == (other is tuned)
    assert told(tmp_path / "out", tuned, caplog)


def test_packed_layers_take_adapters_too(saved) -> None:
    """As the web page attaches them, to a model that draws already."""
    model, plain = plus(), plus()
    if not packable(torch.float32):
        pytest.skip("weights are not packed on this machine")
    assert pack(model) > 0
    before = output(model)
    (name,) = load_adapters({"model": model}, [AdapterRef(saved("peft"))])
    load_adapters({"model": plain}, [AdapterRef(saved("diffusers"))])
    wanted = output(plain)
    assert (output(model) - wanted).abs().max() < F32 * wanted.std() < (wanted - before).abs().max()
    detach(model, name)
    assert torch.equal(output(model), before)
    load_adapters({"model": model}, [AdapterRef(saved("native"))], fold=True)
    assert (output(model) - wanted).abs().max() < F32 * wanted.std()


def test_values_beyond_half_precision_are_refused(saved) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QKV}.lora_B.1.weight"].fill_(1e6)

    folder = edited(saved("native"), large)
    with pytest.raises(AdapterError, match="beyond the range of float16"):
        load_adapters({"model": plus().half()}, [AdapterRef(folder)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint of the tiny models, and an adapter of its network and text encoder."""
    root = tmp_path_factory.mktemp("world")
    save_native(root / "native", tensors(), CONFIG)
    layers: dict[str, LayerFactors] = {}
    for part, targets in (("model", EVERYTHING), ("text", ("text_encoder",))):
        own = noisy(start(build(part), targets, part=part))
        layers |= {f"{part}.{name}": layer for name, layer in own.items()}
    one = adapter({})
    base = {"model": CONFIG["model"], "text": CONFIG["conditioning"]["text"]}
    parts = {part: build(part) for part in ("model", "text")}
    whole = type(one)(layers, type(one.info)(4, 6.0, base=base), "native", "test")
    write(root / "lora", whole, "native", parts)
    return root


@pytest.mark.parametrize("to", ["native", "sat", "diffusers"])
def test_convert_folds_adapters_into_every_part(world: Path, tmp_path: Path, to: str) -> None:
    code = convert(
        [str(world / "native"), str(tmp_path / "out"), "--to", to, "--merge-lora", f"{world / 'lora'}:0.5"]
    )
    assert code == 0
    for part in ("model", "text"):
        wanted = build(part)
        attach(
            wanted,
            "a",
            read(world / "lora", {"model": build("model"), "text": build("text")}).of(part),
            strength=0.5,
        )
        merge(wanted)
        found = build(part, meta=True)
        load(found, tmp_path / "out", part)
        plain = build(part).state_dict()
        differs = 0
        for name, tensor in wanted.state_dict().items():
            assert (found.state_dict()[name] - tensor).abs().max() < F32 * max(1.0, tensor.abs().max())
            differs += not torch.equal(tensor, plain[name])
        assert differs >= 8
    first = dict(open_part(world / "native", "first_stage"))
    if to == "native":
        assert all(torch.equal(t, first[n]) for n, t in open_part(tmp_path / "out", "first_stage").items())


@pytest.mark.parametrize("to", ["native", "peft", "diffusers"])
def test_convert_writes_an_adapter_in_every_layout(world: Path, tmp_path: Path, to: str, capsys) -> None:
    assert convert([str(world / "lora"), str(tmp_path / "out"), "--to", to, "--dtype", "bf16"]) == 0
    assert f"as {to}: " in capsys.readouterr().out
    parts: dict[str, nn.Module] = {"model": build("model"), "text": build("text")}
    found, wanted = read(tmp_path / "out", parts), read(world / "lora", parts)
    assert found.layers.keys() == wanted.layers.keys()
    assert found.info.base == wanted.info.base
    pair = next(iter(found.layers.values())).parts[0]
    assert pair is not None and pair.up.dtype == torch.bfloat16


def test_a_foreign_adapter_needs_the_model_it_belongs_to(saved, tmp_path: Path, capsys) -> None:
    folder = edited(saved("peft"), lambda t: None, adapter="none of ours")
    assert convert([str(folder), str(tmp_path / "out"), "--to", "native"]) == 2
    said = capsys.readouterr().err
    assert "another size of this one (--base names the YAML of the model it belongs to)" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{0}/lora", "{1}", "--to", "sat"], "an adapter is written as native, peft, diffusers, not as sat"),
        (["{0}/native", "{1}", "--to", "peft"], "--to peft is for adapters, and .* is none"),
        (["{0}/lora", "{1}", "--to", "peft", "--merge-lora", "{0}/lora"], "--merge-lora is for checkpoints"),
        (
            ["{0}/lora", "{1}", "--to", "peft", "--base", "configs/tiny.yaml"],
            "is a LoRA of a model with model.params.channels 4, here it is",
        ),
        (
            ["checkpoints/tiny", "{1}", "--to", "native", "--merge-lora", "{0}/lora"],
            "is a LoRA of a model with model.params.",
        ),
        (["{0}/native", "{1}", "--to", "native", "--merge-lora", "nope:2"], "nope: no such file or folder"),
        (
            ["{0}/native", "{1}", "--to", "native", "--only", "model", "--merge-lora", "{0}/lora"],
            "adapts the text part, of which this model has none",
        ),
    ],
)
def test_convert_refuses_what_makes_no_sense(world: Path, tmp_path: Path, capsys, arguments, said) -> None:
    assert convert([a.format(world, tmp_path / "out") for a in arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_adapters_are_told_from_checkpoints(world: Path) -> None:
    assert is_adapter(world / "lora") and is_adapter(world / "lora" / NATIVE_FILE)
    assert not is_adapter(world / "native") and not is_adapter(world / "native" / "model.safetensors")
    assert not is_adapter(world / "nowhere")
