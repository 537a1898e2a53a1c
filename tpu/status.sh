#!/usr/bin/env bash
# Shows a TPU and the job on each of its workers; without NAME, every queued resource of the zone, because each uses quota.
#
#   status.sh [NAME] [--project PROJECT] [--zone ZONE] [--dry-run]
#
# A worker's job is none, running, finished CODE, stopped CODE (by stop.sh) or lost (the machine restarted).
# Exit codes: 3 a slice is not READY, 6 a worker does not answer.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
    shared_option "$@" && shift "$taken"
done
if [[ -z $name ]]; then
    check_place
    run gcloud compute tpus queued-resources list "${place[@]}"
    exit
fi
check_shared
if ((dry_run)); then
    quoted gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)'
else
    read_state
    echo "$name: $current"
    [[ $current == ACTIVE ]] || exit 0
    read_slices
    printf %s "$slices"
fi
exec 9>/dev/null
show=9
on_workers status "$(remote_or_none status)" || fail 6 "not every worker answered; $(leftover ACTIVE)"
((dry_run)) || while read -r reply; do echo "worker $reply"; done <<<"$replies"
