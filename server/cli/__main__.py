"""Runs `python -m server.cli`, which is the command `euryale`."""

import sys

from server.cli import main

sys.exit(main())
