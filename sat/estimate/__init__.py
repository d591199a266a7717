"""Memory and time of a run, estimated before weights are read."""
