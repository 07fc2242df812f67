"""The program `euryale`: its commands, and what becomes of their errors.

An error of ours ends as one line on stderr and an exit code: 2 for a wrong option or a file that
one names, 3 for the model, 4 for heads of another model, 1 for others.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from server.api.config import installed_version
from server.cli.console import print_error
from server.cli.generate import GENERATE
from server.cli.options import Command, Program
from server.cli.serve import SERVE
from server.errors import (
    ConfigError,
    EuryaleError,
    HeadsCheckpointError,
    HeadsMismatchError,
    InvalidRequestError,
    ModelError,
)

# The first one that fits counts.
_EXIT_CODES: tuple[tuple[type[EuryaleError], int], ...] = (
    (ConfigError, 2),
    (InvalidRequestError, 2),
    (ModelError, 3),
    (HeadsMismatchError, 4),
    (HeadsCheckpointError, 2),
    (EuryaleError, 1),
)


def print_version() -> None:
    """Print the version on stdout."""
    sys.stdout.write(f"{installed_version()}\n")


PROGRAM = Program(
    "euryale",
    "An LLM inference server that speculates.",
    (SERVE, GENERATE, Command("version", "Print the version.", print_version)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names.

    Args:
        argv: Arguments; those of the process if not given.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        PROGRAM.parse(arguments, _own_variables(os.environ)).run()
    except KeyboardInterrupt:
        return 130
    except EuryaleError as error:
        print_error(error)
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
    return 0


def _own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the `EURYALE_PORT` that Kubernetes sets.

    A pod gets the variables of "service links" for each service of its namespace. For one that is
    called euryale, EURYALE_PORT is the service's address, like tcp://10.0.0.1:8000, and it would
    be taken for the option --port.
    """
    is_link = environ.get("EURYALE_PORT", "").startswith("tcp://")
    return {k: v for k, v in environ.items() if not (is_link and k == "EURYALE_PORT")}
