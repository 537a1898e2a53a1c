#!/usr/bin/env bash
# Shows the end of the log of every worker, or follows the log of one worker.
#
#   logs.sh NAME [--lines N] [--follow [--slice S] [--worker W]] [--project PROJECT] [--zone ZONE] [--dry-run]
#
#   --lines           number of lines per worker (default 20); 1000000 shows all: logs.sh NAME --lines 1000000 >all.log
#   --follow          show new lines until Ctrl-C, which does not affect the job
#   --slice, --worker the worker to follow (default 0 and 0, which writes the metrics)

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

lines=20 follow=0 slice=0 worker=0
while (($#)); do
    case $1 in
        --lines) needs_value "$@" && lines=$2 && shift 2 ;;
        --follow) follow=1 && shift ;;
        --slice) needs_value "$@" && slice=$2 && shift 2 ;;
        --worker) needs_value "$@" && worker=$2 && shift 2 ;;
        *) shared_option "$@" && shift "$taken" ;;
    esac
done
check_shared
for number in "$lines" "$slice" "$worker"; do
    is_count "$number" || fail 2 "$number is not a whole number; see logs.sh --help"
done

if ((follow)); then
    ((dry_run)) || require_active
    run gcloud compute tpus queued-resources ssh "$name" "${place[@]}" "--node=$slice" "--worker=$worker" \
        "--command=$(remote follow "$lines")" </dev/null
else
    exec 9>/dev/null
    show=9 status=0
    on_workers logs "$(remote log "$lines")" || status=$?
    ((dry_run)) || grep '^\[' "$work/output" || true
    ((status == 0)) || fail "$status" "the log of some workers is missing above; has launch.sh been called?"
fi
