#!/usr/bin/env bash
# run_tests.sh PYTEST MARKS ARGS...: the tests that MARKS leave, two at a time, and then, one by one, those that bring
# up whole systems and want the machine to themselves. Both are run whatever the first finds.
set -uo pipefail

NOTHING_RAN=5 # pytest's exit code
pytest=$1 marks=$2
shift 2

"$pytest" -n 2 -m "($marks) and not system" "$@"
parts=$?
"$pytest" -m "($marks) and system" "$@"
systems=$?

for code in $parts $systems; do
    if [ "$code" -ne 0 ] && [ "$code" -ne $NOTHING_RAN ]; then exit "$code"; fi
done
if [ $parts -eq $NOTHING_RAN ] && [ $systems -eq $NOTHING_RAN ]; then exit $NOTHING_RAN; fi
