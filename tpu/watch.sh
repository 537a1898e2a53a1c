#!/usr/bin/env bash
# Keeps a run going until it is finished: creates the TPU, installs, launches, and does so again after a preemption.
# The run continues from its checkpoints, which must be on a bucket for a spot TPU, because a preemption deletes the disks.
#
#   watch.sh NAME --type TYPE [--spot] [--slices N] [--service-account EMAIL] [--max-restarts N] [--max-recoveries N]
#            [--project PROJECT] [--zone ZONE] [--dry-run] -- RECIPE CONFIG [FLAGS]
#
#   --max-restarts    restarts of a job that crashed on a healthy TPU, see launch.sh (default 3)
#   --max-recoveries  number of new TPUs and new launches, after which to give up (default 20); the pause before each
#                     doubles, from TPU_POLL_SECONDS (default 30) to 32 times that, until the job has run again
#   the others        see create.sh; RECIPE CONFIG FLAGS: see launch.sh
#
# A TPU that exists already is used as it is. This script must stay alive (tmux, a small VM); when called again, it
# continues from the present state. It deletes a TPU only to replace it: "watch.sh ... && delete.sh NAME" ends the costs.
#
# Exit codes: 0 the job finished on all workers, 3 it was stopped by stop.sh, 4 no quota, 6 the job failed,
# 5 gave up after --max-recoveries, 1 gcloud failed five times in a row.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

type='' request=() restarts=3 max_recoveries=20 spot=0
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --type) needs_value "$@" && type=$2 && request+=(--type "$2") && shift 2 ;;
        --spot) spot=1 && request+=(--spot) && shift ;;
        --slices | --service-account) needs_value "$@" && request+=("$1" "$2") && shift 2 ;;
        --max-restarts) needs_value "$@" && restarts=$2 && shift 2 ;;
        --max-recoveries) needs_value "$@" && max_recoveries=$2 && shift 2 ;;
        *) shared_option "$@" && shift "$taken" ;;
    esac
done
(($# > 2)) || fail 2 "give the recipe and its configuration after --, for example: -- recipes/dense.py v5e-64"
shift
check_shared
[[ -n $type ]] || fail 2 "give the --type of the TPU; see create.sh --help"
is_count "$max_recoveries" || fail 2 "--max-recoveries is $max_recoveries; give a whole number"
is_count "$poll" || fail 2 "TPU_POLL_SECONDS is $poll; give whole seconds"
if ((spot)) && [[ $* != *gs://* ]]; then
    fail 2 "a spot TPU loses its disks when it is preempted; give the run a checkpoint path on a bucket (gs://...), see tpu/README.md"
fi

recipe=("$@")
create() { "$here/create.sh" "$name" "${same_place[@]}" "${request[@]}" --wait 0 "$@"; }
install() { "$here/install.sh" "$name" "${same_place[@]}" "$@"; }
launch() { "$here/launch.sh" "$name" "${same_place[@]}" --max-restarts "$restarts" "$@" -- "${recipe[@]}"; }
stop() { "$here/stop.sh" "$name" "${same_place[@]}"; }
first_start() { stop && install && launch; } # stop: workers may be in different states
new_start() { stop && launch; }
say() { echo "$(date '+%F %T') $name: $*"; }

if ((dry_run)); then # once through a run without an accident
    create --dry-run
    "$here/status.sh" "$name" "${same_place[@]}" --dry-run
    install --dry-run
    launch --dry-run
    exit
fi

trap 'fail 1 "the script stopped watching, but a running job continues; $(leftover)"' INT TERM
scratch

recoveries=0 pause=$poll troubles=0 doubts=0
recover() { # recover REASON: counts, and waits longer each time
    ((recoveries < max_recoveries)) || fail 5 "$1, and $max_recoveries recoveries are used up; $(leftover)"
    recoveries=$((recoveries + 1))
    say "$1; recovery $recoveries of $max_recoveries in $pause s"
    sleep "$pause"
    pause=$((pause * 2 < poll * 32 ? pause * 2 : poll * 32))
}

trouble() { # once is bad luck; gcloud has tried for a minute by itself
    troubles=$((troubles + 1))
    ((troubles < 5)) || fail 1 "$1, five times in a row, see above; $(leftover)"
    say "$1; trying again"
}

replace() { # a queued resource that lost its machines never gets new ones, and takes quota until it is deleted
    recover "$1"
    "$here/delete.sh" "$name" "${same_place[@]}" || trouble "the TPU could not be deleted"
}

start() { # start COMMAND: what starts the job
    if "$@"; then doubts=0; else trouble "the job could not be started"; fi
}

look_at_jobs() { # of an ACTIVE TPU, all of whose workers answered
    local states codes
    states=$(sed -n 's/^worker [^ ]* //p' "$work/status")
    codes=$(sed -n 's/^worker [^ ]* finished //p' "$work/status" | grep -vxE '0|75' | sort -un | paste -sd' ' -) || true
    if grep -q '^stopped' <<<"$states"; then
        fail 3 "the job was stopped by stop.sh; $(leftover ACTIVE)"
    elif grep -qv '^finished 0$' <<<"$states"; then
        if grep -q '^none$' <<<"$states"; then
            start first_start
        elif [[ -n $codes ]]; then
            "$here/logs.sh" "$name" "${same_place[@]}" --lines 5 >&2 || true
            stop || true
            fail 6 "the job failed (exit code $codes) and was stopped everywhere; the ends of its logs are above; $(leftover ACTIVE)"
        elif grep -qxE 'lost|finished 75' <<<"$states"; then
            # Saved and ended, or gone with its machine: a preemption shows itself as a state within the next looks.
            doubts=$((doubts + 1))
            if ((doubts > 2)); then
                recover "the job ended although the TPU is healthy"
                start new_start
            fi
        else
            pause=$poll doubts=0 troubles=0
        fi
    else
        say "finished on all workers"
        leftover ACTIVE
        exit 0
    fi
}

before=''
while :; do
    code=0
    "$here/status.sh" "$name" "${same_place[@]}" >"$work/status" 2>"$work/errors" || code=$?
    current=$(sed -n "1s/^$name: //p" "$work/status")
    if [[ $current != "$before" ]]; then say "${current:-state unknown}"; fi
    before=$current
    case $current in
        ABSENT) # create.sh says what is wrong with the arguments or the quota, and neither mends itself
            code=0
            create || code=$?
            case $code in 0) ;; 2 | 4) exit "$code" ;; *) trouble "the TPU could not be created" ;; esac
            ;;
        SUSPENDED | FAILED) replace "the TPU is $current" ;;
        ACTIVE)
            if grep -qE '^slice [^ ]+ (PREEMPTED|TERMINATED),' "$work/status"; then
                replace "a slice was preempted"
            elif ((code)); then
                cat "$work/errors" >&2
                trouble "not every worker answers"
            else
                look_at_jobs
            fi
            ;;
        '')
            cat "$work/errors" >&2
            trouble "the state of the TPU cannot be read"
            ;;
        *) troubles=0 ;; # in the queue, being made, or being taken away
    esac
    sleep "$poll"
done
