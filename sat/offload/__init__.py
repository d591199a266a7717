"""Weights that wait in host memory until they are needed."""
