# shellcheck shell=bash disable=SC2034  # what is set here is used by those that source this
# What the scripts of this folder share: arguments, dry runs, the state of a TPU, and commands on all of its workers.
#
# Exit codes: 1 gcloud failed, 2 a wrong argument, 3 the TPU or its job is in no state for this, 4 no quota,
# 5 still waiting, 6 not every worker did it.

name='' project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-} dry_run=0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
poll=${TPU_POLL_SECONDS:-30} # whole seconds between two looks at a state
work='' # a temporary folder of this script, from scratch()
slices='' # of the TPU, from read_slices()
show=2  # the file descriptor on which on_workers shows what the workers say

# Accelerator type, its software image, and the TensorCores of a chip: Google counts cores in the names of v4 and v5p,
# chips in the others. Source: cloud.google.com/tpu/docs/runtimes and /tpu/docs/v4, v5e, v5p, v6e.
accelerators='v4 tpu-ubuntu2204-base 2
v5litepod v2-alpha-tpuv5-lite 1
v5p v2-alpha-tpuv5 2
v6e v2-alpha-tpuv6e 1'

fail() { # fail CODE SENTENCE
    echo "error: $2" >&2
    exit "$1"
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    fail 2 "bash $BASH_VERSION is too old; install bash 4.4 or newer (macOS: brew install bash)"
fi

usage() { # the comment at the head of the script is its help
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
}

needs_value() { (($# > 1)) && [[ -n $2 ]] || fail 2 "$1 needs a value; see $(basename "$0") --help"; }

# shared_option WORDS: takes what every script knows from the head of WORDS; `taken` says how many words that was.
shared_option() {
    taken=2
    case $1 in
        --help | -h) usage ;;
        --dry-run) dry_run=1 taken=1 ;;
        --project) needs_value "$@" && project=$2 ;;
        --zone) needs_value "$@" && zone=$2 ;;
        -*) fail 2 "unknown option $1; see $(basename "$0") --help" ;;
        *)
            [[ -z $name ]] || fail 2 "unexpected argument $1; see $(basename "$0") --help"
            name=$1 taken=1
            ;;
    esac
}

# After the arguments: what every call of gcloud needs.
check_shared() {
    [[ -n $name ]] || fail 2 "give the name of the TPU; see $(basename "$0") --help"
    [[ $name =~ ^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$ ]] ||
        fail 2 "$name is not a valid name for a TPU; use a letter, then lowercase letters, digits and dashes, 42 at most"
    check_place
}

check_place() {
    [[ -n $project ]] || fail 2 "the project is not set; give --project or set CLOUDSDK_CORE_PROJECT"
    [[ -n $zone ]] || fail 2 "the zone is not set; give --zone or set CLOUDSDK_COMPUTE_ZONE"
    place=("--project=$project" "--zone=$zone")
    same_place=(--project "$project" --zone "$zone")
    ((dry_run)) || command -v gcloud >/dev/null || fail 2 "gcloud is not installed; see cloud.google.com/sdk/docs/install"
}

is_count() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }

quoted() { # the words as one line that a shell reads back as the same words
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

# run WORDS: executes them, and shows them first; in a dry run only shows them.
run() {
    if ((dry_run)); then
        quoted "$@"
    else
        echo "+ $(quoted "$@")" >&2
        "$@"
    fi
}

scratch() {
    if ((dry_run)); then
        work=/tmp/efftrain.XXXXXX
        quoted mktemp -d "$work"
    else
        work=$(mktemp -d "${TMPDIR:-/tmp}/efftrain.XXXXXX")
        trap 'rm -rf "$work"' EXIT
    fi
}

# state: one word about the queued resource; ABSENT where there is none. Fails, with gcloud's words, where nothing can
# be known.
state() {
    local answer
    if answer=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)' 2>&1); then
        echo "${answer##*$'\n'}" # warnings come first
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo ABSENT
    else
        echo "$answer" >&2
        return 1
    fi
}

read_state() { # sets current
    current=$(state) || fail 1 "the state of $name cannot be read; check 'gcloud auth login', --project and --zone"
}

leftover() { # what the user has to know when a script gives up
    local what="exists in state ${1:-}"
    [[ -n ${1:-} ]] || what='may exist'
    echo "$name $what, takes quota, and costs money while it is ACTIVE; delete it with:" \
        "$here/delete.sh $(quoted "$name" "${same_place[@]}")"
}

require_active() {
    read_state
    case $current in
        ACTIVE) ;;
        ABSENT) fail 3 "there is no TPU $name in $zone; create it with create.sh" ;;
        SUSPENDED | FAILED) fail 3 "$(leftover "$current"), or let watch.sh replace it" ;;
        *) fail 3 "$name is $current, not ACTIVE; wait (create.sh waits, status.sh shows), or delete it with delete.sh" ;;
    esac
}

# read_slices: sets slices (lines of NAME, STATE, number of workers) and workers, their sum.
read_slices() {
    local nodes node answer health endpoints
    nodes=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
        "--format=value(tpu.nodeSpec[].nodeId.join(sep=' '))") || fail 1 "the slices of $name cannot be listed"
    slices='' workers=0
    for node in $nodes; do
        answer=$(gcloud compute tpus tpu-vm describe "$node" "${place[@]}" \
            '--format=value(state,networkEndpoints.len())') || fail 1 "slice $node of $name cannot be described"
        read -r health endpoints <<<"${answer##*$'\n'}"
        slices+="slice $node $health, ${endpoints:-0} workers"$'\n'
        workers=$((workers + ${endpoints:-0}))
    done
    ((workers)) || fail 1 "$name reports no workers; see: gcloud compute tpus tpu-vm list $(quoted "${place[@]}")"
}

require_ready() { # an ssh to all would reach the other slices only
    local unready
    unready=$(grep -v ' READY, ' <<<"${slices%$'\n'}") || return 0
    fail 3 "not READY: ${unready//$'\n'/; }; $(leftover ACTIVE)"
}

# on_workers WHAT COMMAND: runs COMMAND on all workers of all slices; `replies` gets the line of each that confirmed.
# gcloud leaves out a slice that it cannot prepare and still exits with 0 (seen in 528.0), so confirmations are counted.
on_workers() {
    local what=$1 status=0 answered
    local ssh=(gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node=all --worker=all "--command=$2")
    if ((dry_run)); then
        quoted "${ssh[@]}"
        return
    fi
    if [[ -z $slices ]]; then
        require_active
        read_slices
    fi
    require_ready
    [[ -n $work ]] || scratch
    echo "+ $(quoted "${ssh[@]}")" >&2
    "${ssh[@]}" </dev/null | tee "$work/output" >&"$show" || status=$?
    replies=$(sed -n 's/^efftrain-worker: //p' "$work/output" | sort -u)
    answered=$(grep -c . <<<"$replies" || true)
    if ((status || answered != workers)); then
        echo "error: $what: $answered of $workers workers confirmed; those that did: $(cut -d' ' -f1 <<<"$replies" |
            paste -sd' ' -)" >&2
        return 6
    fi
}

# remote WORDS: the shell command that calls worker.sh on a worker.
remote() { echo "bash efftrain/src/tpu/worker.sh $(quoted "$@")"; }

# The same, where a worker without an install is no error: there is no job on it.
remote_or_none() {
    echo "if [ -f efftrain/src/tpu/worker.sh ]; then $(remote "$@"); else echo \"efftrain-worker: \$(hostname) none\"; fi"
}
