"""The published sizes, by hand: ``python -m tests.full_size plus`` (docs/memory.md has the figures)."""
