#!/usr/bin/env bash
# Starts a recipe on all workers of a TPU. It continues after this script and the ssh session have ended.
#
#   launch.sh NAME [--max-restarts N] [--project PROJECT] [--zone ZONE] [--dry-run] -- RECIPE CONFIG [FLAGS]
#
#   launch.sh my-tpu -- recipes/dense.py v5e-64 --training.steps 20000
#
# On each worker: efftrain train RECIPE CONFIG FLAGS --max-restarts N (default 3), in ~/efftrain/work, where runs stay
# when install.sh replaces the checkout; its output in ~/efftrain/train.log. The same launch continues the run that it
# finds. If a worker does not start, the others are stopped again. Exit codes: 3 TPU not ACTIVE, 6 a worker
# failed.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

restarts=3
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --max-restarts) needs_value "$@" && restarts=$2 && shift 2 ;;
        *) shared_option "$@" && shift "$taken" ;;
    esac
done
(($# > 2)) || fail 2 "give the recipe and its configuration after --, for example: -- recipes/dense.py v5e-64"
shift
check_shared
is_count "$restarts" || fail 2 "--max-restarts is $restarts; give a whole number"
[[ -f $here/../$1 ]] || fail 2 "there is no recipe $1 in this checkout; give its path from the top, such as recipes/dense.py"

recipe=../src/$1 # seen from ~/efftrain/work
if ! on_workers launch "$(remote start efftrain train "$recipe" "${@:2}" --max-restarts "$restarts")"; then
    (on_workers stop "$(remote_or_none stop 60)") || echo "error: not every worker could be told to stop; see status.sh" >&2
    fail 6 "$1 was not started on every worker, so it was stopped again on the others; if install.sh ran, launch again; $(leftover ACTIVE)"
fi
((dry_run)) || echo "started on $workers workers; follow it with: $here/logs.sh $(quoted "$name" "${same_place[@]}") --follow"
