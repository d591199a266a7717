"""Experiments as YAML: what may be written (schema), read (load), checked (check, refuse) and built (component, fill, build)."""
