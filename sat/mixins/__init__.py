"""Mixins: small modules that fill a transformer's hooks, one idea a file."""
