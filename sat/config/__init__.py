"""Experiments as YAML: what may be written (schema), read (load), checked (check) and built (build)."""
