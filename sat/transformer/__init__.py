"""The transformer base: blocks, hooks and the values they exchange."""

from sat.transformer.block import BlockSpec
from sat.transformer.context import Context, Grid, LayerModulation, Modulation
from sat.transformer.hooks import TransformerHooks
from sat.transformer.transformer import Transformer

__all__ = ["BlockSpec", "Context", "Grid", "LayerModulation", "Modulation", "Transformer", "TransformerHooks"]
