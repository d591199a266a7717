"""Emoji sets in several drawing styles as image-caption pairs: the data of the small model that ships."""
