#!/usr/bin/env bash
# Runs ruff and all tests that this machine can run, in an environment that is made when there is none.
#
#   bash tools/test.sh [--slow] [pytest arguments]
#
#   --slow   also run the full matrix of layouts (marker slow)
#
# Paths in pytest arguments are relative to the repository. Tests that need GPUs run where torch finds some.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ ${1-} == --help || ${1-} == -h ]]; then
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit 0
fi
# shellcheck source=environment.sh
source "$root/tools/environment.sh" test || exit 1
cd -- "$root"

lint=0 tests=0
printf '\n== ruff check\n'
"$PYTHON" -m ruff check . || lint=$?
printf '\n== pytest\n'
"$PYTHON" -m pytest "$@" || tests=$?

if [[ $lint -ne 0 ]]; then printf '\ntest.sh: ruff found faults (exit code %d)\n' "$lint" >&2; fi
if [[ $tests -ne 0 ]]; then printf '\ntest.sh: pytest failed (exit code %d)\n' "$tests" >&2; fi
exit $((lint != 0 ? lint : tests))
