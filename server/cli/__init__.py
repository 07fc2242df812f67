"""The `euryale` command; `options` and `console` also serve `python -m training` and `-m bench`."""

from server.cli.program import main

__all__ = ["main"]
