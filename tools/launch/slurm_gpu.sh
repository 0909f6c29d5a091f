#!/usr/bin/env bash
# GPUs under Slurm: one process for each GPU, and the job queues again when it is preempted or its time is up.
#
#   slurm_gpu.sh [options] -- instructrec train CONFIG ...
#
# COMMAND runs in the current folder, which must be on a file system that all nodes share, as must the folders of data and runs.
# Slurm sends SIGTERM two minutes before the end (slurm_gpu.sbatch): training saves, and the same job continues later.
#
#   --dry-run             print the command, run nothing
#   --nodes N             nodes (default: 1)
#   --gpus N              GPUs of each node, and so many processes (default: 8)
#   --cpus N              CPU cores for each process (default: 8)
#   --time TIME           limit of one turn, as sbatch takes it (default: 24:00:00)
#   --name NAME           name of the job (default: instructrec)
#   --log FILE            output of the job (default: NAME-JOBID.log)
#   --venv DIR            environment with instructrec_jax[cuda] on all nodes (default: .venv of this checkout)
#   --sbatch OPTION       any further option of sbatch, like --sbatch --partition=gpu; may be repeated
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/launch/common.sh
. "$REPO/tools/launch/common.sh"

nodes=1 gpus=8 cpus=8 limit=24:00:00 name=instructrec log='' venv=$REPO/.venv more=() command=()

[ $# -gt 0 ] || show_help
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=yes ;;
    --nodes) needs_value "$@" && nodes=$2 && shift ;;
    --gpus) needs_value "$@" && gpus=$2 && shift ;;
    --cpus) needs_value "$@" && cpus=$2 && shift ;;
    --time) needs_value "$@" && limit=$2 && shift ;;
    --name) needs_value "$@" && name=$2 && shift ;;
    --log) needs_value "$@" && log=$2 && shift ;;
    --venv) needs_value "$@" && venv=$2 && shift ;;
    --sbatch) needs_value "$@" && more+=("$2") && shift ;;
    -h | --help) show_help ;;
    --) shift && command=("$@") && break ;;
    *) fail "unknown option $1" "see slurm_gpu.sh --help; the command to run comes after --" ;;
  esac
  shift
done

number --nodes "$nodes" 1
number --gpus "$gpus" 1
number --cpus "$cpus" 1
[ ${#command[@]} -gt 0 ] || fail "there is no command to run" "slurm_gpu.sh [options] -- instructrec train CONFIG"
[ -n "$DRY_RUN" ] || [ -x "$venv/bin/python" ] || fail "$venv is no virtual environment" \
  "give --venv DIR, made with: uv venv DIR && uv pip install --python DIR/bin/python '${REPO}[cuda]'"
needs sbatch "run this on a login node of the Slurm cluster"

run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus" \
  --time="$limit" --output="${log:-$name-%j.log}" ${more[@]+"${more[@]}"} \
  "$REPO/tools/launch/slurm_gpu.sbatch" "$venv" "${command[@]}"
