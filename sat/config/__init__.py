"""Experiments as YAML: what may be written (schema), reading it (load), checking it (check), building from it (build)."""
