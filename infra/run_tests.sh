#!/usr/bin/env bash
# run_tests.sh PYTEST MARKS ARGS...: the tests that MARKS leave, in three parts, each run whatever the others find:
# those that compute with a real model, two at a time; those that mostly wait, four at a time; and those that want the
# machine to themselves, one by one. A module's stay together, so that its engines are started once, and in order: the
# unit tests, which are short, come last and fill what is left. Where none of a part can be (tests/conftest.py sees to
# it) is not looked: to collect all of them takes each process a quarter of a minute.
set -uo pipefail

NOTHING_RAN=5 # pytest's exit code
pytest=$1 marks=$2
shift 2

code=$NOTHING_RAN
part() {
    "$pytest" "$@"
    local found=$?
    if [ $found -ne $NOTHING_RAN ] && { [ $code -eq 0 ] || [ $code -eq $NOTHING_RAN ]; }; then code=$found; fi
}
without() {
    for folder in "$@"; do printf -- '--ignore=tests/%s ' "$folder"; done
}

together="--dist loadscope --no-loadscope-reorder"
small="unit nats nats_router nats_worker"
part -n 2 $together $(without $small e2e chaos) -m "($marks) and model and not alone" "$@"
part -n 4 $together $(without e2e chaos) -m "($marks) and not model and not alone" "$@"
part $(without $small) -m "($marks) and alone" "$@"
exit $code
