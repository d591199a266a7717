"""Which of two models' pictures people prefer: a blind page side by side, votes on disk, statistics."""
