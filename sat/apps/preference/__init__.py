"""Human preference between two models: a blind page side by side, votes on disk, statistics."""
