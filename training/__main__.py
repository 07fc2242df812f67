"""`python -m training COMMAND`: runs a command and ends stdout with its result as a JSON object.

Exit status: 0; 2 if the command could not run as asked; 3 if the loss diverged; 130 after Ctrl-C,
after which the same command goes on where it was.
"""

import json
import logging
import sys
from collections.abc import Sequence

from server.cli.console import log_to_stderr, print_error
from server.cli.options import Program
from server.errors import EuryaleError
from training.commands.convert import CONVERT
from training.commands.distill import DISTILL
from training.commands.evaluate import EVALUATE
from training.commands.report import REPORT
from training.commands.train import TRAIN
from training.errors import DivergedError

PROGRAM = Program(
    "python -m training",
    "Train draft heads for a base model.",
    (DISTILL, TRAIN, EVALUATE, REPORT, CONVERT),
)
_LOGGER = logging.getLogger("euryale.training")


def main(argv: Sequence[str]) -> int:
    """Run the command that the command line names; returns the exit status."""
    log_to_stderr()
    try:
        result = PROGRAM.parse(argv).run()
    except KeyboardInterrupt:
        _LOGGER.info("interrupted; the same command goes on from here")
        return 130
    except DivergedError as error:
        print_error(error)
        return 3
    except EuryaleError as error:
        print_error(error)
        return 2
    if result is not None:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
