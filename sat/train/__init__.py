"""Training: one loop for every objective, on a DeepSpeed engine."""
