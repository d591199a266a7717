"""The work behind each command, imported once its arguments are good."""
