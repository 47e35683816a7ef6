#!/bin/sh
# Commands of a scheduler as profiles/generic wants them, run in the folder of the workflow:
#   scheduler.sh pbs|lsf submit CORES MEM_MB MINUTES GPUS SCRIPT    prints the id of the job
#   scheduler.sh pbs|lsf status ID                                  prints running, success or failed
#   scheduler.sh pbs|lsf cancel ID...
# A job leaves its exit code in .snakemake/generic/ID, so that nothing depends on how long the scheduler remembers it.
set -eu
scheduler=$1 action=$2
shift 2
codes=.snakemake/generic
mkdir -p "$codes"

# queues, accounts and whatever else your site wants belong into these lines
pbs_submit() {
    qsub -V -j oe -o "$PWD/$codes" -l "select=1:ncpus=$1:mem=${2}mb$([ "$4" -eq 0 ] || echo ":ngpus=$4")" \
        -l "walltime=$(($3 / 60)):$(printf %02d $(($3 % 60))):00"
}
lsf_submit() {
    # shellcheck disable=SC2046
    bsub -o "$PWD/$codes/%J.out" -n "$1" -R "span[hosts=1]" -M "${2}MB" -W "$3" $([ "$4" -eq 0 ] || echo -gpu "num=$4") |
        sed -n 's/^Job <\([0-9]*\)>.*/\1/p'
}

# known: the scheduler still has the job; gone: it has ended, or was never there; unsure: no answer, ask again later
pbs_state() {
    # 153 is PBS for an unknown job
    answer=$(qstat -x -f "$1" 2> /dev/null) || { [ $? -eq 153 ] && echo gone || echo unsure; return; }
    case $(printf '%s\n' "$answer" | sed -n 's/^ *job_state = //p') in F | C) echo gone ;; *) echo known ;; esac
}
lsf_state() {
    answer=$(bjobs -noheader -o stat "$1" 2>&1) || true
    case $answer in
    DONE | EXIT | ZOMBI | *"is not found"*) echo gone ;;
    PEND | RUN | PSUSP | USUSP | SSUSP | WAIT | PROV) echo known ;;
    *) echo unsure ;;
    esac
}

exit_code() {
    ls "$codes" > /dev/null # a shared file system looks anew
    cat "$codes/$1" 2> /dev/null || true
}

case $action in
submit)
    "${scheduler}_submit" "$1" "$2" "$3" "$4" << END
#!/bin/sh
sh "$5"
code=\$?
echo \$code > "$PWD/$codes/\${PBS_JOBID:-\$LSB_JOBID}"
exit \$code
END
    ;;
status)
    code=$(exit_code "$1")
    if [ -z "$code" ] && [ "$("${scheduler}_state" "$1")" = gone ]; then
        sleep "${CUPEL_PATIENCE:-5}"
        code=$(exit_code "$1")
        code=${code:-killed}
    fi
    case $code in "") echo running ;; 0) echo success ;; *) echo failed ;; esac
    ;;
cancel)
    case $scheduler in pbs) qdel "$@" ;; lsf) bkill "$@" ;; esac
    ;;
esac
