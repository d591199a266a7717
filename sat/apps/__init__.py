"""Applications: nothing in the library imports them."""
