#!/usr/bin/env bash
# Copies this checkout to all workers of a TPU and installs it with the extra "tpu". Run it again after every change.
#
#   install.sh NAME [--project PROJECT] [--zone ZONE] [--dry-run]
#
# It copies the newest commit and every change that git does not ignore, so that a run names its commit in
# environment.json. No job may be running on the workers. It replaces ~/efftrain/src, and does not touch
# ~/efftrain/work, in which jobs start and runs are stored. Exit codes: 3 TPU not ACTIVE, 6 a worker failed.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
    shared_option "$@" && shift "$taken"
done
check_shared
checkout=$(git -C "$here" rev-parse --show-toplevel 2>/dev/null) || fail 2 "$here is not in a git checkout; clone efftrain with git"

# The clone carries the commit; the files of the working tree are laid over it, and what was deleted is taken out.
pack() {
    run git clone --quiet --depth 1 "file://$checkout" "$work/src"
    if ((dry_run)); then
        echo "(cd $(quoted "$checkout") && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -C $work/src -xf -"
    else
        git -C "$checkout" ls-files -z --deleted | (cd "$work/src" && xargs -0 rm -f --)
        (cd "$checkout" && git ls-files -z --cached --others --exclude-standard | present | tar --null -T - -cf -) |
            tar -C "$work/src" -xf -
    fi
    run tar -C "$work" -czf "$work/efftrain-src.tgz" src
}

present() { # of the names that come in, those of files that are there
    local path
    while IFS= read -r -d '' path; do
        if [[ -e $path || -L $path ]]; then printf '%s\0' "$path"; fi
    done
}

((dry_run)) || require_active
scratch
pack
run gcloud compute tpus queued-resources scp "$work/efftrain-src.tgz" "$name:efftrain-src.tgz" "${place[@]}" \
    --node=all --worker=all </dev/null || fail 6 "the checkout did not reach every worker; run install.sh again; $(leftover ACTIVE)"
unpack="set -e; rm -rf efftrain/src.new; mkdir -p efftrain/src.new; tar -xzf efftrain-src.tgz --strip-components=1 -C efftrain/src.new; rm efftrain-src.tgz; bash efftrain/src.new/tpu/worker.sh install"
on_workers install "$unpack" || fail 6 "the install is not complete; run install.sh again; $(leftover ACTIVE)"
((dry_run)) || echo "installed on $workers workers; next: $here/launch.sh $(quoted "$name" "${same_place[@]}") -- RECIPE CONFIG"
