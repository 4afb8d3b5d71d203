#!/bin/bash
# What the .sbatch files share: starts a launch script on every node of the job, and asks for a requeue when it was
# pre-empted.   bash launch/slurm/run.bash launch/train_prior.py FLAGS
set -uo pipefail

# Set MASTER_ADDR yourself where node names do not resolve from node to node.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Where nodes have several networks, name the interface of the fast one: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.

cpus=${SLURM_CPUS_PER_TASK:-1}
export PYTHON=${PYTHON:-.venv/bin/python} N_PROCESSES=${N_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
if [ "$SLURM_NTASKS" = "$SLURM_NNODES" ] && [ "$N_PROCESSES" -gt 1 ]; then
    # One task a node: torchrun starts a process for each GPU, and hands our signal on to them.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cpus + N_PROCESSES - 1) / N_PROCESSES))}
    task='exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --nproc-per-node "$N_PROCESSES" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 110 "$@"'
else
    # One task a GPU, or a node without one: SLURM's numbers are the ranks.
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    task='RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$PYTHON" "$@"'
fi

# SLURM asks us to stop, before the time limit or for a job of higher priority, and srun hands that on to the ranks.
srun= asked= again=1
trap 'asked=1 again=1; [ -z "$srun" ] || kill -USR1 "$srun"' USR1
# This they get without us; we only stay to see them end.
trap 'again=1' TERM
# A rank that ends first, having saved, must not end the others; a minute later none has anything left to do, but for
# the first one, where it copies the last checkpoint to S3.
wait=60
[[ " $* " != *" --loop.upload"* ]] || wait=3600
srun --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait="$wait" bash -c "$task" task "$@" &
srun=$!
[ -z "$asked" ] || kill -USR1 "$srun"
# A signal ends a wait, but not srun.
while [ "$again" ]; do
    again=
    wait "$srun"
    code=$?
done

# 85: saved because somebody asked. torchrun makes 1 of it. A job that is no longer RUNNING was cancelled, or is requeued.
if [ "$code" = 85 ] || { [ "$asked" ] && [ "$code" != 0 ]; }; then
    # Its controller may be busy.
    for pause in 5 10 0; do
        state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID") && break
        sleep "$pause"
    done
    echo "asked to stop: exit code $code, job ${state:-gone}"
    [ "$state" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
