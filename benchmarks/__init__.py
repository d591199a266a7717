"""Measurements, each a command that writes its result file."""
