"""Runs `python -m server.cli`, which is the command `euryale`."""

from server.cli import main

main()
