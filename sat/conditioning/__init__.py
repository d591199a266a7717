"""Conditions of a network: text and sizes."""
