"""Experiments as YAML: written (schema), read (load), checked (check, refuse), built (component, fill, build)."""
