"""The command lines; each module has ``main(argv)``, and ``python -m sat.cli.NAME`` runs it."""
