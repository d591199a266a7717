"""Prompts rewritten by a language model."""
