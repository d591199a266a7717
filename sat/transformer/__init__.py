"""The transformer base: blocks, hooks and the values they exchange."""

from sat.transformer.hooks import Context, Grid, LayerModulation, Modulation, TransformerHooks
from sat.transformer.transformer import BlockSpec, Transformer

__all__ = ["BlockSpec", "Context", "Grid", "LayerModulation", "Modulation", "Transformer", "TransformerHooks"]
