"""The command lines; each module has ``main(argv)``."""
