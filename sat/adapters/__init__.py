"""Adapters: small trained additions to a built model's linear layers, made and removed from outside.

``factors.py`` is an adapter as data, ``lora.py`` the layers. ``groups.py`` and ``select.py`` choose which
linears get one, ``names.py``, ``files.py`` and ``write.py`` read and write them, ``merge.py`` folds them into
weights. Nothing is imported here: the groups are read before torch is.
"""
