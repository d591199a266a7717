"""Scores of generated images that need no download: retrieval by a small classifier, distance of features."""
