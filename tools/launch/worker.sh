#!/usr/bin/env bash
# On a worker of a pod: install the wheel, run one command that outlives the SSH connection. tpu_vm.sh copies and calls this.
#
#   worker.sh install WHEEL EXTRAS    a new environment ~/instructrec/venv with instructrec_jax[EXTRAS] and its own Python
#   worker.sh start COMMAND...        run COMMAND in the background; output to ~/instructrec/run.log
#   worker.sh status                  running, exited N, lost (it ended without a word, as after a reboot), or absent
#   worker.sh stop                    SIGTERM (training saves a checkpoint), and wait
#   worker.sh log                     follow the output
set -euo pipefail
cd "$(dirname "$0")"

status() {
  if [ -f run.exit ]; then
    echo "exited $(cat run.exit)"
  elif [ ! -f run.pid ]; then
    echo absent
  elif kill -0 "$(cat run.pid)" 2>/dev/null; then
    echo running
  else
    echo lost
  fi
}

case ${1:-} in
  install)
    # The images' own Python is older than the package needs, so uv brings one. --clear: nothing of an older install stays.
    command -v uv >/dev/null || export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --quiet --clear --python 3.12 venv
    uv pip install --quiet --python venv/bin/python "$2[$3]"
    venv/bin/python -c 'import importlib.metadata as m; print("installed: jax", m.version("jax"), "instructrec_jax", m.version("instructrec_jax"))'
    ;;
  start)
    shift
    if [ "$(status)" = running ]; then
      echo "error: a command is already running here (process $(cat run.pid)); stop it first" >&2
      exit 2
    fi
    rm -f run.exit
    printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$*" >>run.log
    export PATH=$PWD/venv/bin:$PATH
    # A session of its own: the end of the SSH connection does not reach it, and `stop` reaches all its processes.
    # shellcheck disable=SC2016  # expanded by the inner shell, which waits on through the SIGTERM that its child gets too
    setsid nohup bash -c 'trap : TERM; "$@" &
      while :; do code=0; wait $! || code=$?; kill -0 $! 2>/dev/null || break; done
      echo $code >run.exit.new; mv run.exit.new run.exit' run "$@" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    ;;
  status) status ;;
  stop)
    if [ "$(status)" = running ]; then
      kill -TERM -- "-$(cat run.pid)"
      for _ in $(seq 120); do
        [ "$(status)" = running ] || break
        sleep 1
      done
    fi
    status
    ;;
  log) exec tail -n 100 -F run.log ;;
  *)
    sed -n '2,/^[^#]/{/^#/!d; s/^# \{0,1\}//; p;}' "$0" >&2
    exit 2
    ;;
esac
