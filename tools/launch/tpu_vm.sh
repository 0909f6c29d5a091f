#!/usr/bin/env bash
# A Cloud TPU pod, or several as one (multislice), through queued resources: one command on all workers, again after a preemption.
#
#   tpu_vm.sh up     NAME [options] -- instructrec train CONFIG ...    create, install, run, watch; start again after a preemption
#   tpu_vm.sh create NAME [options]                  request the TPUs and wait until they are ACTIVE
#   tpu_vm.sh install NAME [options]                 the wheel and --copy paths to every worker, into a new environment
#   tpu_vm.sh run    NAME [options] -- COMMAND ...   start COMMAND on every worker; it outlives the SSH connection
#   tpu_vm.sh watch  NAME [options] -- COMMAND ...   what `up` does once COMMAND runs (after your own machine went away)
#   tpu_vm.sh logs   NAME [options]                  follow the output of the first worker
#   tpu_vm.sh status NAME [options]                  state of the TPUs, and of the command on every worker
#   tpu_vm.sh stop   NAME [options]                  SIGTERM to the command on every worker: training saves and ends
#   tpu_vm.sh delete NAME [options]                  give the TPUs back: only this ends the costs
#
# COMMAND runs in ~/instructrec of every worker, where the paths of --copy are. Give `train` a gs:// folder for its runs: what lies
# on a preempted machine is lost, and the same command continues from the last checkpoint there.
#
#   --dry-run             print every command, run none (NAME's TPUs are taken to become ACTIVE at once)
#   --project NAME        Google Cloud project (default: that of gcloud config)
#   --zone ZONE           zone that has the accelerator and your quota (default: that of gcloud config)
#   --accelerator TYPE    v5litepod-16, v5p-32, v6e-16, ... as Cloud TPU calls them (default: v5litepod-16)
#   --runtime VERSION     software of the VMs (default: that of the accelerator's generation)
#   --slices N            N pods of that accelerator as one run, over the data-centre network (default: 1)
#   --spot                cheaper, and may be preempted at any time
#   --reserved            from your reservation
#   --service-account ADDRESS   whose rights the workers have; it must be able to write the bucket (default: Compute Engine's)
#   --network NAME, --subnetwork NAME   where the VMs are (default: network default)
#   --internal-ips        no external addresses; the network then needs Cloud NAT for the installation, and ssh goes through IAP
#   --wheel FILE          install this wheel (default: build one from this checkout)
#   --extras LIST         extras to install (default: tpu,gcs)
#   --copy PATH           file or folder to copy to every worker; may be repeated (default: configs)
#   --poll SECONDS        between two looks at the state (default: 60)
#   --max-restarts N      starts again so often, then gives up (default: 50)
#
# Started again are a command whose TPUs were taken away and one that ended by a signal (status 127 and more), as workers do whose peer
# is gone. Status 1 and 2 are mistakes that would only happen again.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/launch/common.sh
. "$REPO/tools/launch/common.sh"

project='' zone='' accelerator=v5litepod-16 runtime='' slices=1 tier='' wheel='' extras=tpu,gcs poll=60 max_restarts=50
internal='' copies=() placement=() command=()

action=${1:---help}
case $action in
  up | create | install | run | watch | logs | status | stop | delete) shift ;;
  -h | --help | help) show_help ;;
  *) fail "unknown action $action" "one of up, create, install, run, watch, logs, status, stop, delete; see tpu_vm.sh --help" ;;
esac
case ${1:-} in
  '' | -*) fail "$action needs the name of the TPUs" "tpu_vm.sh $action NAME ..." ;;
esac
name=$1
shift

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=yes ;;
    --spot) tier=--spot ;;
    --reserved) tier=--reserved ;;
    --internal-ips) internal=yes placement+=(--internal-ips) ;;
    --project) needs_value "$@" && project=$2 && shift ;;
    --zone) needs_value "$@" && zone=$2 && shift ;;
    --accelerator) needs_value "$@" && accelerator=$2 && shift ;;
    --runtime) needs_value "$@" && runtime=$2 && shift ;;
    --slices) needs_value "$@" && slices=$2 && shift ;;
    --service-account | --network | --subnetwork) needs_value "$@" && placement+=("$1=$2") && shift ;;
    --wheel) needs_value "$@" && wheel=$2 && shift ;;
    --extras) needs_value "$@" && extras=$2 && shift ;;
    --copy) needs_value "$@" && copies+=("$2") && shift ;;
    --poll) needs_value "$@" && poll=$2 && shift ;;
    --max-restarts) needs_value "$@" && max_restarts=$2 && shift ;;
    -h | --help) show_help ;;
    --) shift && command=("$@") && break ;;
    *) fail "unknown option $1" "see tpu_vm.sh --help; the command to run comes after --" ;;
  esac
  shift
done

number --slices "$slices" 1
number --poll "$poll" 0
number --max-restarts "$max_restarts" 0
case $action in
  up | run | watch) [ ${#command[@]} -gt 0 ] || fail "$action needs a command" "tpu_vm.sh $action $name ... -- instructrec train CONFIG" ;;
  *) [ ${#command[@]} -eq 0 ] || fail "$action takes no command, but has: ${command[*]}" "use run or up" ;;
esac
if [ -z "$runtime" ]; then
  case $accelerator in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "no runtime version is known for the accelerator $accelerator" \
      "give --runtime, from https://cloud.google.com/tpu/docs/runtimes; types look like v5litepod-16, v5p-32 or v6e-16" ;;
  esac
fi
[ ${#copies[@]} -gt 0 ] || copies=("$REPO/configs")
for path in "${copies[@]}"; do
  [ -e "$path" ] || fail "--copy $path does not exist" "give a file or folder of this machine"
done
needs gcloud "install the Google Cloud SDK: https://cloud.google.com/sdk/docs/install"
where=(${project:+--project="$project"} ${zone:+--zone="$zone"}) # gcloud and xpk take the others from gcloud config

# -------------------------------------------------------------------------------------------------- one line of gcloud each

queued_resources() {
  run gcloud compute tpus queued-resources "$@" ${where[@]+"${where[@]}"}
}

# on NODE WORKER ACTION...: worker.sh there
on() {
  local node=$1 worker=$2
  shift 2
  queued_resources ssh "$name" --node="$node" --worker="$worker" ${internal:+--tunnel-through-iap} \
    --command="bash instructrec/worker.sh $(quoted "$@")"
}

state() {
  ask ACTIVE gcloud compute tpus queued-resources describe "$name" ${where[@]+"${where[@]}"} --format='value(state.state)'
}

status() {
  ask 'exited 0' gcloud compute tpus queued-resources ssh "$name" --node=0 --worker=0 ${internal:+--tunnel-through-iap} \
    --command='bash instructrec/worker.sh status' ${where[@]+"${where[@]}"} | tail -n 1
}

request() {
  local nodes=(--node-id="$name")
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  queued_resources create "$name" "${nodes[@]}" --accelerator-type="$accelerator" --runtime-version="$runtime" \
    ${tier:+"$tier"} ${placement[@]+"${placement[@]}"}
}

remove() {
  queued_resources delete "$name" --force --quiet
}

# ------------------------------------------------------------------------------------------------------------------ steps

# The state of the request, into $now; a look may fail, three in a row are the end.
look() {
  local failures=0
  until now=$(state); do
    failures=$((failures + 1))
    [ "$failures" -lt 3 ] || fail "the state of $name cannot be read" "see gcloud's message above: was it deleted, is the login still valid?"
    sleep "$poll"
  done
  [ "$now" != DELETING ] || fail "$name is being deleted" "wait until it is gone, then create it again"
}

# Wait until the request is ACTIVE; status 1 if it has failed or was taken away.
wait_active() {
  local last=
  while :; do
    look
    [ "$now" = "$last" ] || say "$(date +%T) $name: $now"
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED) return 1 ;;
    esac
    sleep "$poll"
  done
}

create() {
  request
  wait_active || fail "$name did not become ACTIVE" \
    "gcloud compute tpus queued-resources describe $name ${where[*]-} says why (quota, capacity, wrong zone); then tpu_vm.sh delete $name"
}

# Status 1 if a step failed; && because `set -e` is off where a caller asks for the status.
install() {
  local tries=1
  until queued_resources ssh "$name" --node=all --worker=all ${internal:+--tunnel-through-iap} --command='mkdir -p instructrec'; do
    [ "$tries" -lt 5 ] || return 1 # fresh machines take a minute to know the key
    tries=$((tries + 1))
    sleep "$poll"
  done
  queued_resources scp "$wheel" "$REPO/tools/launch/worker.sh" "${copies[@]}" "$name:instructrec/" --recurse \
    --node=all --worker=all ${internal:+--tunnel-through-iap} \
    && on all all install "$(basename "$wheel")" "$extras"
}

start() {
  on all all start "${command[@]}"
}

count_restart() {
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] || fail "$name was started again $max_restarts times" "see tpu_vm.sh logs $name; raise --max-restarts"
}

# Have the TPUs again if they were taken away, and the same command on them.
again() {
  until wait_active; do
    count_restart
    remove
    request
  done
  on all all stop || true # of a slice that stayed while another one was replaced; fresh machines have no worker.sh
  { install && start; } || say "$(date +%T) $name: the command could not be started" # taken away again? the next look tells
}

# Until the command has ended well on the first worker. What resumes loses only the steps since its last checkpoint.
watch() {
  local seen before='' odd=0
  while :; do
    look
    seen=
    [ "$now" != ACTIVE ] || seen=$(status || true)
    [ "$now $seen" = "$before" ] || say "$(date +%T) $name: $now${seen:+, $seen}"
    case $now,$seen in
      ACTIVE,running) odd=0 ;;
      'ACTIVE,exited 0')
        say "done. The TPUs still cost: tpu_vm.sh delete $name ${where[*]-}"
        return
        ;;
      'ACTIVE,exited '[12])
        fail "the command has ended with status ${seen#exited } on the first worker" \
          "tpu_vm.sh logs $name ${where[*]-} shows why; then run it again, or tpu_vm.sh delete: the TPUs still cost"
        ;;
      ACTIVE,*)
        # A preempted worker ends the command everywhere before the state says so: look twice. No answer may be a bad line: five times.
        odd=$((odd + 1))
        if [ "$odd" -ge "$([ -n "$seen" ] && echo 2 || echo 5)" ]; then
          count_restart
          again
          odd=0
        fi
        ;;
      *)
        again
        odd=0
        ;;
    esac
    before="$now $seen"
    sleep "$poll"
  done
}

restarts=0
case $action in
  create) create ;;
  install) find_wheel && install ;;
  run) start ;;
  logs) on 0 0 log ;;
  stop) on all all stop ;;
  delete) remove ;;
  status)
    queued_resources describe "$name" --format='value(state.state)'
    on all all status
    ;;
  up | watch)
    find_wheel # before anything costs, and again() installs it
    if [ "$action" = up ]; then
      create
      install
      start
    fi
    watch
    ;;
esac
