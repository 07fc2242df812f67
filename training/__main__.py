"""`python -m training COMMAND`: runs a command and ends stdout with its result as a JSON object.

Exit status: 0; 2 if the command could not run as asked; 3 if the loss diverged; 130 after Ctrl-C,
when the same command goes on where it was.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from server.errors import EuryaleError
from training.commands import convert, distill, evaluate, report, train
from training.commands.options import (
    ConvertOptions,
    DistillOptions,
    EvaluateOptions,
    Options,
    ReportOptions,
    TrainOptions,
    parse_options,
)
from training.errors import DivergedError
from training.progress import note, note_error


def main(argv: Sequence[str]) -> int:
    """Run the command that the command line names; returns the exit status."""
    try:
        result = _run(parse_options(argv))
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from here")
        return 130
    except DivergedError as error:
        note_error(error)
        return 3
    except EuryaleError as error:
        note_error(error)
        return 2
    if result is not None:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _run(options: Options) -> dict[str, Any] | None:
    match options:
        case DistillOptions():
            return distill.run(options)
        case TrainOptions():
            return train.run(options)
        case EvaluateOptions():
            return evaluate.run(options)
        case ConvertOptions():
            return convert.run(options)
        case ReportOptions():
            return report.run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
