"""Adapters: small trained additions to linears and convolutions of a built model, made from outside.

``factors.py`` is an adapter as data, ``lora.py`` the layers. ``groups.py`` and ``names.py`` choose the
linears that get one and rename them for other programs, ``files.py`` reads and ``write.py`` writes adapters,
``merge.py`` folds them into weights. Nothing is imported here: the groups are read before torch is.
"""
