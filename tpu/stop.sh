#!/usr/bin/env bash
# Stops the job on all workers with SIGTERM: it saves and ends. The TPU stays and still costs money.
#
#   stop.sh NAME [--seconds N] [--project PROJECT] [--zone ZONE] [--dry-run]
#
#   --seconds  how long to wait for the job to save (default 120)
#
# Exit codes: 3 TPU not ACTIVE, 6 the job still runs on a worker.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seconds=120
while (($#)); do
    case $1 in
        --seconds) needs_value "$@" && seconds=$2 && shift 2 ;;
        *) shared_option "$@" && shift "$taken" ;;
    esac
done
check_shared
is_count "$seconds" || fail 2 "--seconds is $seconds; give a whole number"

on_workers stop "$(remote_or_none stop "$seconds")" || fail 6 "the job may still run on some workers; $(leftover ACTIVE)"
((dry_run)) || echo "no job runs on the $workers workers of $name; the TPU is still there and costs money until delete.sh"
