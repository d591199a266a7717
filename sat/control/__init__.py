"""Trained controls: branches that steer a built model by a picture, put on and taken off from outside.

``base.py`` is the contract, ``controlnet.py`` and its neighbours are the designs, ``files.py`` reads and
writes them. Nothing is imported here.
"""
