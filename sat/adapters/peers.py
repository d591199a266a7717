"""Adapters of other programs: names of their tensors, what is in front of them, and PEFT's settings.

Layers are found by the end of a name, so whatever a program puts in front (``transformer.``,
``diffusion_model.``, ``module.``, kohya's ``lora_unet_`` with ``_`` for every dot) is taken off, if it is the
same for all layers of a part.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sat.adapters.factors import AdapterError
from sat.adapters.names import Layout, Parts, layouts
from sat.checkpoint.format import listing

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value", int, float)

_SIDES = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_linear_layer.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "lora_linear_layer.up": "up",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude", "magnitude": "magnitude",
    "alpha": "alpha",
}  # fmt: skip
_FACTOR = re.compile(
    r"(.+)\.(lora_[AB]|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.(?:down|up)|"
    r"lora_magnitude_vector)(?:\.((?!weight$|bias$)[^.]+))?(?:\.weight)?|(.+)\.(dora_scale|magnitude|alpha)"
)
_REFUSED = {  # pieces of a name of something that is no pair of factors
    "biases": r"\.bias$|\.diff_b$",
    "a LoHa": r"\.hada_",
    "a LoKr of a convolution": r"\.lokr_t",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "three factors of a convolution (lora_mid)": r"\.lora_mid\b",
    "orthogonal factors (OFT)": r"\.(oft|boft)_",
    "a LoRA of an embedding": r"\.lora_embedding_",
    "an IA3 adapter": r"\.ia3_",
    "VeRA factors": r"\.vera_",
    "whole layers (modules_to_save)": r"\.modules_to_save\.|\.base_layer\.|\.diff$|\.set_weight$",
    "embeddings of a textual inversion": r"^bundle_emb\.|emb_params|string_to_param",
    "norms": r"norm[^.]*\.weight$|\.[wb]_norm$",
}
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_USUAL = {"", "base_model.model.", "transformer.", "unet.", "text_encoder."}  # of PEFT and diffusers


class Name(NamedTuple):
    """A tensor's name taken apart: the linear, ``down``, ``up``, ``magnitude`` or ``alpha``, and which one.

    ``which`` is PEFT's name of the adapter, the number of a fused part in our own files, or empty.
    """

    linear: str
    side: str
    which: str


def parse(name: str) -> Name | None:
    """``name`` taken apart; None if it is not of an adapter's factors."""
    found = _FACTOR.fullmatch(name)
    if found is None:
        return None
    linear, side, which, other, single = found.groups()
    return Name(linear or other, _SIDES[side or single], which or "")


def refusal(names: Collection[str]) -> str:
    """Description of ``names``, which are no factors."""
    for what, pattern in _REFUSED.items():
        if hits := [name for name in names if re.search(pattern, name)]:
            known = "only LoRA and DoRA of linears, LoRA of convolutions"
            return f"holds {what}, which are not supported, {known}: {listing(hits, 3)}"
    return f"{len(names)} tensors are no LoRA factors: {listing(list(names), 3)}"


# -- linears of a file found in the model


@dataclass(frozen=True)
class Place:
    """Place of a linear of a file: the part, its name in ``layout``, and what stood in front of that."""

    part: str
    layout: Layout
    known: str
    prefix: str


def place(names: Collection[str], parts: Parts, file: object) -> dict[str, Place]:
    """Places of the linears ``names``. Each part's layout is the one that knows most of them."""
    best: dict[str, dict[str, Place]] = {}
    for part, module in parts.items():
        for layout in layouts(module):
            flat = {known.replace(".", "_"): known for known in layout.places}
            hits = {
                name: Place(part, layout, known, prefix)
                for name in names
                for known, prefix in [_found(name, layout.places, flat)]
                if known
            }
            if len(hits) > len(best.get(part, {})):
                best[part] = hits
    placed = {name: at for hits in best.values() for name, at in hits.items()}
    if left := [name for name in names if name not in placed]:
        kinds = " or ".join(type(module).__name__ for module in parts.values())
        raise AdapterError(
            f"{file}: {len(left)} of its {len(names)} layers are none of {kinds}: {listing(left, 3)}; "
            f"it is a LoRA of another model"
        )
    for part, hits in best.items():
        prefixes = list(dict.fromkeys(at.prefix for at in hits.values()))
        if len(prefixes) > 1:
            raise AdapterError(
                f"{file}: names layers of the {part} part in several ways, {listing(prefixes, 3)} in front: "
                f"several adapters in one file; save one alone"
            )
        if prefixes[0] not in _USUAL:
            log.info("%s: %r in front of its names is left out", file, prefixes[0])
    return placed


def _found(name: str, known: Collection[str], flat: Mapping[str, str]) -> tuple[str, str]:
    """Longest end of ``name`` that is ``known``, and what is in front of it; empty texts for none."""
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    for count in range(len(words)):
        if (rest := ".".join(words[count:])) in known:
            prefix = ".".join([*words[:count], ""])
            return (rest, prefix) if not re.search(r"(^|\.)\d+\.", prefix) else ("", "")
    if len(words) == 1 and (found := re.match(r"(lora|lycoris)_", name)):
        for end in [at.end() for at in re.finditer("_", name)]:
            if end >= found.end() and name[end:] in flat and not re.search(r"_\d+_", name[:end]):
                return flat[name[end:]], name[:end]
    return "", ""


# -- PEFT's adapter_config.json, and its copy in the header of diffusers' files


_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "mica")
"""Values of init_lora_weights after which the base's weights are as they were."""
_OTHER_MATHS = (
    "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip
_WITHOUT_EFFECT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    "decompose_both", "decompose_factor", "init_weights", "module_dropout", "rank_dropout",
    "rank_dropout_scale", "use_effective_conv2d",  # of a LoKr
}  # fmt: skip
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Rank = Annotated[int, Field(ge=1)]


class PeftConfig(BaseModel):
    """The settings of PEFT that decide numbers, with PEFT's defaults."""

    model_config = ConfigDict(extra="allow", strict=True)
    peft_type: str = "LORA"
    r: _Rank = 8
    lora_alpha: _Finite = 8.0
    lokr_alpha: _Finite = Field(8.0, alias="alpha")  # of a LoKr alone
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Finite] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True

    def refuse(self, source: str) -> None:
        """Raise for settings under which factors do not mean what LoRA and DoRA mean; name unknown ones."""
        extra = self.model_extra or {}
        other = next((key for key in _OTHER_MATHS if extra.get(key)), None)
        if self.peft_type not in ("LORA", "LOKR"):
            other = self.peft_type
        elif self.bias not in (None, "none"):
            other = f"bias {self.bias!r}"
        if other is not None:
            raise AdapterError(f"{source}: PEFT's {other} is not supported, only plain LoRA and DoRA")
        if self.init_lora_weights not in _PLAIN_STARTS:
            raise AdapterError(
                f"{source}: init_lora_weights {self.init_lora_weights!r} changes the base's weights too: "
                f"convert it by PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            )
        for patterns in (self.rank_pattern or {}, self.alpha_pattern or {}):
            if len(patterns) > 1 << 12:
                raise AdapterError(f"{source}: {len(patterns):,} patterns, at most 4,096 are read")
            for pattern in patterns:
                _compiled(pattern, source)
        if unknown := sorted(key for key in set(extra) - _WITHOUT_EFFECT if extra[key]):
            log.warning("%s: %s: unknown here, and without effect", source, listing(unknown))

    def lokr_scale(self, name: str) -> float:
        """Alpha / rank of a LoKr of the linear ``name``: PEFT's rule, whatever its pieces."""
        if self.peft_type != "LOKR":
            raise AdapterError(f"holds a LoKr, and its PEFT config is of {self.peft_type}")
        return float(_pattern(self.alpha_pattern, name, self.lokr_alpha)) / self.rank(name)

    def rank(self, name: str) -> int:
        """Rank of the linear ``name``."""
        return _pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str, rank: int) -> float:
        """Alpha that scales the linear ``name``, of ``rank``, by alpha / rank."""
        alpha = float(_pattern(self.alpha_pattern, name, self.lora_alpha))
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


@lru_cache(maxsize=1 << 13)
def _compiled(pattern: str, source: str) -> re.Pattern[str]:
    """PEFT's expression for ``pattern``: an end of a name, or all of it after ``^``."""
    if len(pattern) > 1000 or re.search(r"[+*}|][^()]*\)[+*{]", pattern):
        raise AdapterError(
            f"{source}: the pattern {pattern[:80]!r} is too long, or repeats a repetition or a choice"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{source}: the pattern {pattern[:80]!r} is no regular expression: {error}"
        ) from error


def _pattern(patterns: Mapping[str, Value] | None, name: str, default: Value) -> Value:
    """PEFT's rule: the first pattern that ends ``name``, else ``default``."""
    hits = (value for pattern, value in (patterns or {}).items() if _compiled(pattern, "").match(name))
    return next(hits, default)


def checked(kind: type[Model], content: Any, source: str) -> Model:
    """``content`` as a ``kind``; the first thing wrong with it is the error's line."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))[:120]
        raise AdapterError(f"{source}: is damaged at {at!r}: {first['msg']}") from error


def split_header(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of each component in diffusers' header, whose keys begin with ``transformer.`` or the like."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        component, dot, rest = key.partition(".")
        parts.setdefault(f"{component}." if dot else "", {})[rest if dot else key] = value
    yield from parts.items()
