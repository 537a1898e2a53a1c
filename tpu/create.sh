#!/usr/bin/env bash
# Asks for a TPU through a queued resource and waits until it is there.
#
#   create.sh NAME --type TYPE [--spot] [--slices N] [--wait MINUTES] [--service-account EMAIL]
#             [--project PROJECT] [--zone ZONE] [--dry-run]
#
#   --type             Google's name: v5litepod-16, v6e-64 (chips), v4-32, v5p-32 (TensorCores: 2 per chip)
#   --spot             cheaper, but may be preempted at any time; default: on demand
#   --slices           number of slices of this type, joined by the data-centre network (default 1)
#   --wait             minutes after which to stop waiting (default 60; 0: do not wait); the request stays in the queue
#   --service-account  identity of the workers, which needs access to the bucket; default: that of the project
#   --project, --zone  default: CLOUDSDK_CORE_PROJECT, CLOUDSDK_COMPUTE_ZONE
#   --dry-run          print the commands without running them
#
# Exit codes: 2 wrong argument, 3 NAME exists already or failed, 4 no quota, 5 still waiting, 1 any other failure.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

type='' spot=() slices=1 wait=60 account=()
while (($#)); do
    case $1 in
        --type) needs_value "$@" && type=$2 && shift 2 ;;
        --spot) spot=(--spot) && shift ;;
        --slices) needs_value "$@" && slices=$2 && shift 2 ;;
        --wait) needs_value "$@" && wait=$2 && shift 2 ;;
        --service-account) needs_value "$@" && account=("--service-account=$2") && shift 2 ;;
        *) shared_option "$@" && shift "$taken" ;;
    esac
done
check_shared
is_count "$wait" || fail 2 "--wait is $wait; give whole minutes"
if ! is_count "$slices" || ((slices == 0)); then fail 2 "--slices is $slices; give a number from 1"; fi

runtime=''
while read -r prefix image cores; do
    if [[ $type =~ ^$prefix-([1-9][0-9]{0,4})$ ]] && ((BASH_REMATCH[1] % cores == 0)); then
        runtime=$image chips=$((BASH_REMATCH[1] / cores))
    fi
done <<<"$accelerators"
[[ -n $runtime ]] || fail 2 "--type is '$type'; give v5litepod-N (v5e) or v6e-N with N chips, v4-N or v5p-N with N TensorCores, 2 per chip"

nodes=("--node-id=$name")
if ((slices > 1)); then nodes=("--node-count=$slices" "--node-prefix=$name"); fi

# In case of Ctrl-C and of every other end that is not told below.
trap 'fail 1 "interrupted; $(leftover)"' INT TERM

request() {
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${nodes[@]}" "--accelerator-type=$type" \
        "--runtime-version=$runtime" "${spot[@]}" "${account[@]}"
}

if ((dry_run)); then
    request
    if ((wait)); then quoted gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)'; fi
    exit
fi

scratch
echo "asking for $slices x $type: $((slices * chips)) chips${spot:+, spot}" >&2
if ! request 2>&1 | tee "$work/answer" >&2; then
    answer=$(<"$work/answer")
    [[ $answer != *ALREADY_EXISTS* ]] || fail 3 "the TPU $name exists already; use it, choose another name, or delete it with delete.sh"
    after=$(state) || after=unknown
    if [[ $after == ABSENT ]]; then after='nothing was created'; else after=$(leftover "$after"); fi
    if [[ $answer == *RESOURCE_EXHAUSTED* || $answer == *[Qq]uota* ]]; then
        fail 4 "the quota of $project in $zone does not allow $slices x $type${spot:+ spot}; delete what status.sh lists, or ask for more at console.cloud.google.com/iam-admin/quotas (service tpu.googleapis.com); $after"
    fi
    fail 1 "gcloud could not create $name, see above; $after"
fi

deadline=$((SECONDS + wait * 60)) before=''
while ((wait)); do
    read_state
    if [[ $current != "$before" ]]; then echo "$name: $current" >&2; fi
    before=$current
    case $current in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED)
            gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=yaml(state)' >&2 || true
            fail 3 "the request failed, for the reason above; $(leftover "$current")"
            ;;
        ABSENT | DELETING) fail 3 "$name was deleted while this script waited; nothing is left" ;;
    esac
    ((SECONDS < deadline)) || fail 5 "no TPU after $wait minutes; the request stays in the queue and may become ACTIVE at any time: $(leftover "$current")"
    sleep "$poll"
done
echo "$name is requested${before:+ and $before}; next: $here/install.sh $(quoted "$name" "${same_place[@]}")"
