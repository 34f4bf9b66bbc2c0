# Signals, exit codes and restarts of a job: sourced by the .sbatch files after env.sh. Nothing to edit.
#
#   run_ranks ARGS...   starts `megavid ARGS` on every rank, hands USR1 and TERM on, sets $status
#   preflight ARGS...   with MEGAVID_PREFLIGHT=1: `megavid preflight ARGS` first
#   finish              requeues or stops by $status, and ends the script
# shellcheck shell=bash disable=SC2154

# Faults in a row (lost rank, storage, machine) after which the job stops: the counter starts anew at a newer checkpoint.
MAX_FAULTS=${MEGAVID_MAX_FAULTS:-3}
# Requeue the job itself, or leave the rest to the next job of a chain (`megavid launch slurm --chain`).
RESTART_BY=${MEGAVID_RESTART_BY:-requeue}

say() { echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T'): $*"; }

# The value of --out among the arguments: the folder of the run.
out_of() {
    local before=""
    for word in "$@"; do
        [ "$before" = --out ] && echo "$word"
        [[ $word == --out=* ]] && echo "${word#--out=}"
        before=$word
    done
}

run_ranks() {
    OUT=$(out_of "$@")
    [ -n "$OUT" ] || { echo "sbatch ${0##*/}: --out DIR is missing among its arguments" >&2; exit 2; }
    mkdir -p "$OUT/slurm"
    errors=$OUT/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.srun
    export MEGAVID_STATUS_FILE=${errors%.srun}.status # the first rank that ends writes its exit status there
    rm -f "$MEGAVID_STATUS_FILE"
    stage_environment || { status=$?; return; }
    local command=("${MEGAVID[@]}" "$@")
    if [ "$RANKS_BY" = torchrun ]; then
        local each=${SLURM_NTASKS_PER_NODE:?--ntasks-per-node says how many ranks a node has}
        SRUN_OPTIONS+=(--ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES")
        # Each node names itself: the number of its task is the number of the node. Slurm's signals reach every process of
        # a step, the ranks too; torchrun ignores them, as its answer would be to kill the ranks 30 s later, saved or not.
        command=(bash -c 'trap "" USR1 TERM; exec torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_PROCID" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --signals-to-handle SIGINT \
            --nproc-per-node "$0" --no-python "$@"' "$each" "${command[@]}")
    fi
    export MEGAVID_ENDED_JOB
    MEGAVID_ENDED_JOB=$(ended_holder)
    say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), ranks by $RANKS_BY: ${MEGAVID[*]} $*"
    # In the background: bash runs traps only between commands, or while it waits. What srun itself says is kept, because
    # it names the first host that failed. One dead rank ends them all; they would wait for it otherwise.
    srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" "${command[@]}" 2> >(tee "$errors" >&2) &
    local srun=$! signal
    # USR1, also where TERM came: srun hands USR1 on, but answers TERM by killing every task.
    trap 'signal=USR1; kill -USR1 $srun 2>/dev/null' USR1
    trap 'signal=TERM; kill -USR1 $srun 2>/dev/null' TERM
    while :; do
        signal=""
        wait "$srun"
        status=$?
        [ -n "$signal" ] || break
        say "got $signal: every rank is told to save and stop"
    done
    trap '' USR1 TERM
    # What the first rank said is meant: srun kills the others then, and says 143; torchrun says 1 whatever happened, and
    # where it does so without a word of any rank, one was killed.
    if [ $status -ne 0 ]; then
        sleep 1 # for tee's last lines
        ls "$OUT/slurm" > /dev/null # a shared file system looks anew
        local said
        said=$(cat "$MEGAVID_STATUS_FILE" 2>/dev/null)
        [ -z "$said" ] && [ "$RANKS_BY" = torchrun ] && said=137
        status=${said:-$status}
    fi
}

# Unpack MEGAVID_STAGE on every node where it does not lie yet, and start the ranks from there. The folder's name has the
# file's time and size in it, so that a new one is unpacked anew; it gets that name when it is whole.
stage_environment() {
    [ -n "${MEGAVID_STAGE:-}" ] || return 0
    local told staged
    told=$(stat -L -c %Y-%s "$MEGAVID_STAGE") || return 2
    staged=$NODE_CACHE/env-$told
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        mkdir -p "${2%/*}" && exec 9>"$2.lock" && flock 9 || exit 3
        [ -x "$2/bin/python" ] && exit 0
        rm -rf "$2.partial"
        mkdir "$2.partial" && tar -xf "$1" -C "$2.partial" && [ -x "$2.partial/bin/python" ] || exit 3
        mv "$2.partial" "$2" || exit 3
    ' stage "$MEGAVID_STAGE" "$staged" 2> >(tee "$errors" >&2) || return 3
    MEGAVID=("$staged/bin/python" -m megavid)
}

# The job that the run's lock names, if Slurm no longer has it. Its ranks may live on, on a node that Slurm lost sight of,
# and hold the lock for good: the next job of a chain takes it from them, and the run's fence refuses what they still
# write. A start of this same job needs no such word (SLURM_RESTART_COUNT). Where Slurm does not answer, nothing is known.
ended_holder() {
    local job cluster mine
    [ -O "$OUT/.lock" ] || return 0 # Slurm need not show the jobs of others
    read -r job cluster < <(sed -n 's/.*, Slurm job \([0-9]*\) start [0-9]* of cluster \(.*\)$/\1 \2/p' "$OUT/.lock")
    [ -n "$job" ] && [ "$cluster" = "${SLURM_CLUSTER_NAME:-unknown}" ] || return 0
    mine=$(squeue --noheader --user="$(id -un)" --format=%A) || return 0
    grep -qx "$job" <<< "$mine" || echo "$job"
}

# With MEGAVID_PREFLIGHT=1: examine the nodes first; bad ones are left out by the next start, and nothing trains on them.
preflight() {
    [ "${MEGAVID_PREFLIGHT:-0}" = 1 ] || return 0
    run_ranks preflight "$@"
    errors=/dev/null # which hosts are bad stands in slurm/exclude; that a rank says so is no fault of its host
    [ "$status" -eq 0 ] || finish
}

# Append one line on this fault; print how many came since the latest checkpoint.
note_fault() {
    local step host
    step=$(cat "$OUT/checkpoints/latest" 2>/dev/null || echo none)
    # The watchdog's word first: "megavid: error: rank 0: rank 1 on n1 does not answer". Else the first task that srun saw
    # end, "srun: error: n1: task 2: Killed"; but a rank that ended with status 5 only reports another one.
    host=$(sed -n 's/^megavid: error: \(rank [0-9]*: \)*rank [0-9]* on \([^ ,;]*\) .*/\2/p' "$errors" | head -n 1)
    [ -n "$host" ] || host=$(grep -v 'exit code 5$' "$errors" |
        sed -n 's/^srun: error: \([^: ]*\): task.*/\1/p' | head -n 1)
    echo "$step ${host:-unknown} $status $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" >> "$OUT/slurm/faults"
    grep -c "^$step " "$OUT/slurm/faults"
}

# Hosts that failed at least twice, or that preflight found bad, with commas between.
bad_hosts() {
    {
        awk '$2 != "unknown" { print $2 }' "$OUT/slurm/faults" 2>/dev/null | sort | uniq -d
        cat "$OUT/slurm/exclude" 2>/dev/null
    } | sort -u | paste -s -d ,
}

# Keep the waiting starts of this run away from bad hosts: those of a chain, and this job once it is requeued.
exclude_bad_hosts() {
    local hosts job before
    hosts=$(bad_hosts)
    [ -n "$hosts" ] || return 0
    for job in "$@"; do
        before=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p') # a person's --exclude stays
        [ "$before" = "(null)" ] && before=""
        scontrol update JobId="$job" ExcNodeList="${before:+$before,}$hosts" && say "job $job leaves out $hosts"
    done
}

job_state() { scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p'; }

# Those of this run's chain: `megavid launch slurm` has written their numbers.
waiting_jobs() {
    squeue --noheader --states=PENDING --user="$(id -un)" --format=%i | grep -xFf "$OUT/slurm/chain" 2>/dev/null
}

finish() {
    local faults
    # A job that no longer runs for Slurm was cancelled, requeued from outside, preempted, or has lost a node: Slurm knows
    # what comes next, and ranks that were killed for it are no fault of their hosts.
    if [ $status -ne 0 ] && [ "$(job_state)" != RUNNING ]; then
        say "ended by Slurm ($(job_state)), status $status"
        exit "$status"
    fi
    case $status in
        0) say "done"; exit 0 ;;
        75) say "stopped on request, saved" ;;
        3 | 5 | 129 | 13? | 14? | 15?)
            faults=$(note_fault)
            say "fault, status $status, number $faults since the checkpoint $(tail -n 1 "$OUT/slurm/faults")"
            if [ "$faults" -ge "$MAX_FAULTS" ]; then
                say "$faults faults without a newer checkpoint: stop (MEGAVID_MAX_FAULTS)"
                stop_chain
                exit "$status"
            fi
            ;;
        *) say "status $status needs a person: stop"; stop_chain; exit "$status" ;;
    esac
    if [ "$RESTART_BY" = chain ]; then
        # shellcheck disable=SC2046
        exclude_bad_hosts $(waiting_jobs)
        say "the next job of the chain goes on"
        exit "$status"
    fi
    scontrol requeue "$SLURM_JOB_ID" && exclude_bad_hosts "$SLURM_JOB_ID"
    exit "$status"
}

# What a person has to look at first would fail in every job that waits behind this one.
stop_chain() {
    [ "$RESTART_BY" = chain ] || return 0
    # shellcheck disable=SC2046
    scancel $(waiting_jobs) 2>/dev/null || true
}
