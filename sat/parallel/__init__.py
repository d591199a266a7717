"""Processes and their groups: how a run starts, who is who, and what the ranks agree on."""
