"""The real loops on a pretended accelerator: what a GPU would mind, found on a CPU."""
