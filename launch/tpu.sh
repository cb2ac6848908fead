#!/usr/bin/env bash
# Runs the same training command on every worker of a TPU VM slice.
#
#   TPU=NAME [ZONE=Z] [PROJECT=P] launch/tpu.sh [arguments of python -m jaxmoe.train]
#   TPU=NAME launch/tpu.sh -- COMMAND...   any command on all workers, in DIR
#   TPU=NAME launch/tpu.sh --end           asks the run to end: all save at one step, exit code 75
#
#   TPU=v5p-a ZONE=us-east5-a launch/tpu.sh -- make .venv/installed
#   TPU=v5p-a launch/tpu.sh --config configs/olmoe.py --run-dir /mnt/runs/olmoe
#   python -m jaxmoe.supervise --run-dir /mnt/runs/olmoe -- env TPU=v5p-a launch/tpu.sh \
#       --config configs/olmoe.py --run-dir /mnt/runs/olmoe         (where /mnt/runs is mounted here too)
#
# JAX finds the workers' number and addresses by itself. All need the same checkout in DIR (default
# jaxmoe, below the home directory), its PYTHON there (default .venv/bin/python) with jax[tpu], and a
# shared --run-dir. GCLOUD_FLAGS are more words for `gcloud compute tpus tpu-vm ssh`, such as
# --internal-ip. SIGTERM, SIGUSR1 and Ctrl-C ask the run to end, as --end does. The exit code is that
# of the first worker which failed; 75 where any worker saved because it was asked to end.
set -u
usage() { sed -n '2,17s/^# \{0,1\}//p' "$0"; }
say() { echo "launch/tpu.sh: $*" >&2; }
case "${1:-}" in -h|--help) usage; exit 0 ;; esac
[ -n "${TPU:-}" ] || { say "say which slice: TPU=NAME launch/tpu.sh ... (--help has examples)"; exit 2; }
command -v gcloud > /dev/null || { say "gcloud is not on PATH; install the Google Cloud CLI"; exit 2; }
dir=${DIR:-jaxmoe} python=${PYTHON:-.venv/bin/python}
ssh=(gcloud compute tpus tpu-vm ssh "$TPU" --worker=all)
[ -z "${ZONE:-}" ] || ssh+=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || ssh+=("--project=$PROJECT")
# shellcheck disable=SC2206  # words, as documented
ssh+=(${GCLOUD_FLAGS:-})

# The trainer's process on a worker: the shell that writes this file becomes it.
pid="\$HOME/.jaxmoe.pid"
alive="[ -f $pid ] && kill -0 \$(cat $pid) 2> /dev/null && grep -q jaxmoe /proc/\$(cat $pid)/cmdline"
end="if $alive; then kill -TERM \$(cat $pid); else echo no run here >&2; fi"
case "${1:-}" in
  --end) exec "${ssh[@]}" --command="$end" ;;
  --) shift; exec "${ssh[@]}" --command="cd ${dir@Q} && ${*@Q}" ;;
esac
train="cd ${dir@Q} || exit 2
if $alive; then echo a run is alive on this worker: launch/tpu.sh --end >&2; exit 2; fi
echo \$\$ > $pid && exec ${python@Q} -m jaxmoe.train ${*@Q}"

heard=$(mktemp) || exit 2
trap 'rm -f "$heard"' EXIT
asked='' again=''
# shellcheck disable=SC2317  # by the trap
ask() { asked=yes again=yes; "${ssh[@]}" --command="$end" > /dev/null; }
trap ask TERM USR1 INT
# In a process group of its own: a terminal's Ctrl-C would cut the connections before all have saved.
set -m
( set -o pipefail; "${ssh[@]}" --command="$train" < /dev/null 2>&1 >&3 | tee "$heard" >&2 ) 3>&1 &
job=$!
set +m
code=127
while :; do
  wait "$job"; now=$?
  [ "$now" = 127 ] || code=$now  # 127: bash has told of this end already
  [ -n "$again" ] || break
  again=''  # the wait may have been cut short by the signal that was passed on
done
if [ "$code" != 0 ]; then
  # Of workers that were asked, one may not have begun (143), or miss the coordinator, who left
  # before it. gcloud tells each end as "... failed with exit status N. Continuing."
  if grep -q 'failed with exit status 75\.' "$heard"; then code=75; fi
  if [ -n "$asked" ] && [ "$code" = 143 ]; then code=75; fi
fi
exit "$code"
