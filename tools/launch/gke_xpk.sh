#!/usr/bin/env bash
# TPUs under Google Kubernetes Engine, through xpk (https://github.com/AI-Hypercomputer/xpk): a cluster once, then runs on it.
#
#   gke_xpk.sh cluster CLUSTER [options]                     create the cluster and its TPU nodes, or change the number of slices
#   gke_xpk.sh image   CLUSTER [options]                     build the Dockerfile for TPUs and push it to --image
#   gke_xpk.sh run     CLUSTER RUN [options] -- COMMAND ...  start COMMAND on every worker; started again after a preemption
#   gke_xpk.sh logs    CLUSTER RUN [options]                 follow the output of the first worker
#   gke_xpk.sh status  CLUSTER [options]                     the runs of the cluster
#   gke_xpk.sh stop    CLUSTER RUN [options]                 end a run: training saves first
#   gke_xpk.sh delete  CLUSTER [options]                     delete the cluster: only this ends the costs
#
# COMMAND runs in the image, where the presets are in /app/configs. Give `train` a gs:// folder for its runs: what lies in a
# container is lost when it is started again, and the same command continues from the last checkpoint there.
#
#   --dry-run             print every command, run none
#   --project NAME        Google Cloud project (default: that of gcloud config)
#   --zone ZONE           zone that has the accelerator and your quota (default: that of gcloud config)
#   --accelerator TYPE    v5litepod-16, v5p-32, v6e-16, ... as xpk calls them (default: v5litepod-16)
#   --slices N            pods of that accelerator, in `run` as one multislice run (default: 1)
#   --spot                cheaper nodes that may be preempted at any time (default: on demand)
#   --reservation NAME    nodes of a reservation
#   --image IMAGE         container image (default: gcr.io/PROJECT/instructrec:tpu)
#   --max-restarts N      start a run again so often (default: 50)
#
# Started again is what ended by a signal (status 127 and more), as workers do that are preempted or whose peer is gone; status 1 and 2
# are mistakes that would only happen again.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/launch/common.sh
. "$REPO/tools/launch/common.sh"

project='' zone='' accelerator=v5litepod-16 slices=1 capacity=(--on-demand) image='' max_restarts=50 command=()

action=${1:---help}
case $action in
  cluster | image | run | logs | status | stop | delete) shift ;;
  -h | --help | help) show_help ;;
  *) fail "unknown action $action" "one of cluster, image, run, logs, status, stop, delete; see gke_xpk.sh --help" ;;
esac
case ${1:-} in
  '' | -*) fail "$action needs the name of the cluster" "gke_xpk.sh $action CLUSTER ..." ;;
esac
cluster=$1
shift
case $action in
  run | logs | stop)
    case ${1:-} in
      '' | -*) fail "$action needs the name of the run" "gke_xpk.sh $action $cluster RUN ..." ;;
    esac
    name=$1
    shift
    ;;
esac

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=yes ;;
    --spot) capacity=(--spot) ;;
    --reservation) needs_value "$@" && capacity=(--reservation="$2") && shift ;;
    --project) needs_value "$@" && project=$2 && shift ;;
    --zone) needs_value "$@" && zone=$2 && shift ;;
    --accelerator) needs_value "$@" && accelerator=$2 && shift ;;
    --slices) needs_value "$@" && slices=$2 && shift ;;
    --image) needs_value "$@" && image=$2 && shift ;;
    --max-restarts) needs_value "$@" && max_restarts=$2 && shift ;;
    -h | --help) show_help ;;
    --) shift && command=("$@") && break ;;
    *) fail "unknown option $1" "see gke_xpk.sh --help; the command to run comes after --" ;;
  esac
  shift
done

number --slices "$slices" 1
number --max-restarts "$max_restarts" 0
if [ "$action" = run ]; then
  [ ${#command[@]} -gt 0 ] || fail "run needs a command" "gke_xpk.sh run $cluster $name ... -- instructrec train CONFIG"
else
  [ ${#command[@]} -eq 0 ] || fail "$action takes no command, but has: ${command[*]}" "use run"
fi
needs gcloud "install the Google Cloud SDK: https://cloud.google.com/sdk/docs/install"
where=(${project:+--project="$project"} ${zone:+--zone="$zone"}) # gcloud and xpk take the others from gcloud config
case $action in
  image | run)
    [ -n "$image$project" ] || fail "no image is named" "give --image IMAGE, or --project NAME for gcr.io/NAME/instructrec:tpu"
    image=${image:-gcr.io/$project/instructrec:tpu}
    ;;
esac

on_cluster() {
  needs xpk "pip install xpk"
  run xpk "$@" --cluster="$cluster" ${where[@]+"${where[@]}"}
}

case $action in
  cluster)
    on_cluster cluster create --tpu-type="$accelerator" --num-slices="$slices" "${capacity[@]}"
    ;;
  image)
    needs docker "install docker, or let Cloud Build do it: gcloud builds submit"
    run docker build --build-arg VARIANT=tpu --tag "$image" "$REPO"
    run docker push "$image"
    ;;
  run)
    # exec: SIGTERM reaches the command itself, not a shell around it. A run that is stopped has two minutes for its checkpoint.
    on_cluster workload create --workload="$name" --docker-image="$image" --tpu-type="$accelerator" --num-slices="$slices" \
      --max-restarts="$max_restarts" --termination-grace-period-seconds=120 --command="exec $(quoted "${command[@]}")"
    ;;
  logs)
    [ -n "$zone" ] || fail "logs needs the zone of the cluster" "give --zone ZONE"
    needs kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
    run gcloud container clusters get-credentials "$cluster" --location="${zone%-*}" \
      ${project:+--project="$project"}
    run kubectl logs --follow --all-containers \
      --selector="xpk.google.com/workload=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  status) on_cluster workload list ;;
  stop) on_cluster workload delete --workload="$name" ;;
  delete) on_cluster cluster delete ;;
esac
