"""`python -m bench COMMAND`: runs one bench and ends stdout with its JSON object.

Exit status: 0; 1 if the bench is a check that failed; 2 if it could not run as asked.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

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
from bench.errors import BenchError
from bench.measure.report import Outcome, publish, run_context, to_json
from bench.options import BenchOptions, parse_options
from bench.progress import note, show_figures
from server.errors import EuryaleError

_RUN: dict[str, Callable[[BenchOptions], Outcome]] = {
    "latency": latency.run,
    "acceptance": acceptance.run,
    "exactness": exactness.run,
    "overhead": overhead.run,
    "quality": quality.run,
    "quantization": quantization.run,
    "serving": serving.run,
    "prefill": prefill.run,
    "peers": peers.run,
}


def main(argv: Sequence[str]) -> int:
    """Run the bench that the command line names; returns the exit status."""
    options = parse_options(argv)
    load_average = os.getloadavg()[0]
    try:
        outcome = _RUN[options.command](options)
    except (BenchError, EuryaleError) as error:
        note(f"error: {error}")
        return 2
    context = run_context(argv, outcome.device, outcome.dtype, load_average)
    line = to_json(options.command, outcome.result, {**outcome.extra, "context": asdict(context)})
    show_figures(options.command, asdict(outcome.result))
    publish(line, options.output)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
