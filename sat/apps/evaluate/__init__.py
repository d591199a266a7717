"""Scores of generated pictures: by a small classifier that ships, and by networks from local files."""
