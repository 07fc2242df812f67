#!/usr/bin/env bash
# Runs the GPU tests and every bench on the built-in model on CUDA, in less than ten minutes.
#
#   bench/gpu.sh DIR
#
# DIR gets a JSON file of every bench, a log of every part, tests.xml, and summary.json with each
# part's exit status and seconds. A failing part does not stop the others, but the script then
# exits with 1. PYTHON names the interpreter (default: the checkout's .venv, else python3).
set -u

if [ "$#" -ne 1 ]; then
    echo "usage: bench/gpu.sh DIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
fi
failed=0
summary=""

# part NAME LIMIT_S COMMAND...: the limits of all parts add up to 570 seconds.
part() {
    local name=$1 limit_s=$2 start=$SECONDS status
    shift 2
    echo "== $name (at most $limit_s s)"
    timeout -k 5 "$limit_s" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 3 "$out/$name.log"
    if [ "$status" -ne 0 ]; then
        echo "== $name failed with status $status" >&2
        failed=1
    fi
    summary+="${summary:+, }\"$name\": {\"status\": $status, \"seconds\": $((SECONDS - start))}"
}

# bench NAME LIMIT_S OPTION...
bench() {
    local name=$1 limit_s=$2
    shift 2
    part "$name" "$limit_s" "$python" -m bench "$name" --device cuda --output "$out/$name.json" "$@"
}

part tests 140 "$python" -m pytest -q -m gpu --junitxml "$out/tests.xml"
bench latency 110 --limit 12 --max-new-tokens 128
bench acceptance 80 --limit 24 --max-new-tokens 128
bench exactness 120 --limit 12 --max-new-tokens 96
bench overhead 40 --limit 4 --max-new-tokens 128
bench quality 80 --limit 4 --max-new-tokens 128

echo "{$summary}" >"$out/summary.json"
cat "$out/summary.json"
exit "$failed"
