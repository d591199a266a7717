"""Sampling runs: prompts in, folders of pictures out. Importing this package imports nothing heavy."""
