"""What a network is conditioned on: text, sizes, and how they are put together."""
