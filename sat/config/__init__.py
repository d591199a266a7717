"""Experiments as YAML: what may be written, how it is read, checked and built."""
