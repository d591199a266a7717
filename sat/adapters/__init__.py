"""Adapters: small trained additions to a built model's linear layers, made and removed from outside.

``lora.py`` holds the layers, ``groups.py`` and ``select.py`` choose which linears get one, ``names.py`` and
``files.py`` read and write them, ``merge.py`` folds them into weights. Nothing is imported here: the groups
are read before torch is.
"""
