"""Image-caption data: reading, transforming, ordering, batching."""
