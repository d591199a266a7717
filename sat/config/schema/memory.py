"""What memory is saved by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sat.adapters import groups
from sat.config.schema.base import Broken, Section
from sat.util.sizes import parse_size


@dataclass(frozen=True)
class QuantizeConfig(Section):
    """Linears kept as int8 or int4, made whole for each product: ``network`` and ``text_encoder`` by kind.

    ``layers`` are groups of layers (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and
    ``text.…``; other layers, embeddings and norms stay as they are. ``group`` inputs share a scale (null: a
    whole row in int8, 32 in int4).
    """

    section = "memory.quantize"
    network: Literal["int8", "int4"] | None = None
    text_encoder: Literal["int8", "int4"] | None = None
    group: int | None = None
    layers: list[str] = field(default_factory=lambda: ["attention", "mlp", "text_encoder"])

    def patterns(self) -> list[str]:
        """``layers`` as shell patterns over ``model.…`` and ``text.…``."""
        return [pattern for layer in self.layers for pattern in groups.patterns(layer)]

    def _rules(self) -> Broken:
        yield from self._at_least_1("group")
        if not self.layers:
            yield "layers", f"expected at least one of {', '.join(groups.GROUPS)}, or a pattern"
        for layer in groups.unknown(self.layers):
            near = groups.hint(layer, groups.GROUPS)
            yield "layers", f"no group {layer!r}{near} (there are {', '.join(groups.GROUPS)}, and patterns)"


@dataclass(frozen=True)
class MemoryConfig(Section):
    """Time for memory. ``decode_batch`` images are decoded at a time; ``decode_tile`` is in latent cells.

    Of a part on the device, ``cpu`` waits in host memory while others work, ``blocks`` has its blocks there
    throughout and fetches each before its turn. ``adaln`` ``cpu``: the modulation layers, once they have made
    what the steps need. On the CPU these change nothing. ``budget``, such as ``8GB``, adds what is needed of
    all this to stay within it.
    """

    section = "memory"
    text_encoder: Literal["keep", "free", "cpu", "blocks"] = "keep"
    network: Literal["keep", "cpu", "blocks"] = "keep"
    first_stage: Literal["keep", "cpu"] = "keep"
    adaln: Literal["keep", "cpu"] = "keep"
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    decode_batch: int = 1
    decode_tile: int | None = None
    budget: str | None = None

    def _rules(self) -> Broken:
        if self.decode_batch < 1:
            yield "decode_batch", f"expected at least 1 image, got {self.decode_batch}"
        if self.decode_tile is not None and self.decode_tile < 8:
            yield "decode_tile", f"expected at least 8 latent cells, got {self.decode_tile}"
        try:
            parse_size("1GB" if self.budget is None else self.budget)
        except ValueError as error:
            yield "budget", str(error)
