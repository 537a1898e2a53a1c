#!/usr/bin/env bash
# Deletes a TPU with its slices, their disks and its place in the queue. Files in a bucket stay.
#
#   delete.sh NAME [--project PROJECT] [--zone ZONE] [--dry-run]
#
# Exit codes: 0 also if there was nothing to delete, 1 the TPU may still exist.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
    shared_option "$@" && shift "$taken"
done
check_shared

if ! ((dry_run)); then
    read_state
    if [[ $current == ABSENT ]]; then
        echo "there is no TPU $name in $zone of $project; nothing to delete"
        exit
    fi
fi
run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet || fail 1 "gcloud could not delete the TPU, see above; $(leftover "$current")"
((dry_run)) && exit
read_state
[[ $current == ABSENT ]] || fail 1 "gcloud reported success, but $(leftover "$current")"
echo "$name is deleted"
