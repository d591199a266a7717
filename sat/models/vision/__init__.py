"""Image encoders for losses, controls and scores."""
