"""Tools for every layer: random numbers, images on disk, atomic files, logging, progress."""
