"""`python -m bench COMMAND`: runs one bench and ends stdout with its JSON object.

Exit status: 0; 1 if the bench is a check that failed; 2 if it could not run as asked.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.benches import (
    acceptance,
    exactness,
    latency,
    overhead,
    peers,
    prefill,
    quality,
    quantization,
    serving,
)
from bench.measure.report import Outcome, publish, run_context, show_figures, to_json
from server.cli.console import log_to_stderr, print_error
from server.cli.options import Program, Settings
from server.errors import EuryaleError

BENCHES = (
    latency.COMMAND,
    acceptance.COMMAND,
    exactness.COMMAND,
    quality.COMMAND,
    quantization.COMMAND,
    overhead.COMMAND,
    serving.COMMAND,
    prefill.COMMAND,
    peers.COMMAND,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Report.

    Attributes:
        output: File that also gets the JSON object.
    """

    output: Path | None = None


PROGRAM = Program(
    "python -m bench",
    "Benches: each one measures one promise and ends in one JSON object on stdout.",
    [
        replace(bench, settings={**bench.settings, "report": Settings(ReportOptions)})
        for bench in BENCHES
    ],
)


def main(argv: Sequence[str]) -> int:
    """Run the bench that the command line names; returns the exit status."""
    log_to_stderr()
    load_average = os.getloadavg()[0]
    try:
        parsed = PROGRAM.parse(argv)
        arguments = dict(parsed.arguments)
        report: ReportOptions = arguments.pop("report")
        outcome: Outcome = parsed.command.run(**arguments)
    except EuryaleError as error:
        print_error(error)
        return 2
    name = parsed.command.name
    context = run_context(argv, outcome.device, outcome.dtype, load_average)
    line = to_json(name, outcome.result, {**outcome.extra, "context": asdict(context)})
    show_figures(name, asdict(outcome.result))
    publish(line, report.output)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
