"""Small things every layer may use: random numbers, images on disk, logging, progress."""
