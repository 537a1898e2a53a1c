#!/usr/bin/env bash
# Copies a run directory here: from a bucket, or from the disk of the first worker.
#
#   fetch.sh NAME RUN FOLDER [--project PROJECT] [--zone ZONE] [--dry-run]
#
#   fetch.sh my-tpu gs://my-bucket/dense runs/dense     the whole run; files that exist here are not copied again
#   fetch.sh my-tpu runs/dense runs/dense-tpu           from ~/efftrain/work/runs/dense on worker 0 of slice 0; FOLDER
#                                                       must not exist. Checkpoints that several workers wrote to their
#                                                       own disks are incomplete there: give the run a bucket.
#
# Exit codes: 1 the copy failed, and FOLDER is incomplete, 3 FOLDER exists or the TPU is not ACTIVE.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

words=()
while (($#)); do
    case $1 in
        -*) shared_option "$@" && shift "$taken" ;;
        *) words+=("$1") && shift ;;
    esac
done
((${#words[@]} == 3)) || fail 2 "give NAME RUN FOLDER; see fetch.sh --help"
name=${words[0]} source=${words[1]%/} folder=${words[2]%/}
check_shared

incomplete="the copy failed, see above, and $folder is incomplete; call fetch.sh again"
if [[ $source == gs://* ]]; then
    run mkdir -p "$folder"
    run gcloud storage rsync "$source" "$folder" "--project=$project" --recursive || fail 1 "$incomplete"
else
    [[ $source != /* && $source != *..* ]] || fail 2 "$source is not a path in ~/efftrain/work on the worker; give the --out of the run"
    [[ ! -e $folder ]] || fail 3 "$folder exists; choose another folder, so that two runs are not mixed"
    ((dry_run)) || require_active
    run mkdir -p "$(dirname "$folder")"
    run gcloud compute tpus queued-resources scp "$name:efftrain/work/$source" "$folder" "${place[@]}" \
        --node=0 --worker=0 --recurse </dev/null || fail 1 "$incomplete after removing that folder"
fi
((dry_run)) || echo "fetched $source into $folder"
