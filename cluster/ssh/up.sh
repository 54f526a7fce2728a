#!/usr/bin/env bash
# A Ray cluster over plain SSH: the first host is the head, the others join it.
#
#   cluster/ssh/up.sh up   host-a host-b host-c       # prints the command that runs a sweep there
#   cluster/ssh/up.sh down host-a host-b host-c       # ends what `up` started, and nothing else
#
# Each host needs raysweep, at the same version, in RAYSWEEP_ENV (default: ~/venv), SSH without a password, and all ports
# open to the other hosts and to nobody else. The token of ~/.ray/auth_token, made if there is none, goes to all of them.
set -euo pipefail

env=${RAYSWEEP_ENV:-\~/venv}
port=${RAYSWEEP_PORT:-6379}
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

usage() {
  echo "usage: $0 up|down HEAD [WORKER...]" >&2
  exit 2
}

on() { # HOST COMMAND: run in the host's own shell
  ssh -o BatchMode=yes -o ConnectTimeout=10 "$1" "$2"
}

send_token() { # HOST. By standard input: arguments are seen by all users of a machine.
  on "$1" 'umask 077 && mkdir -p ~/.ray && cat > ~/.ray/auth_token' <"$token"
}

start() { # HOST ARGUMENTS: Ray in a process of its own, whose end is that of all it started; jobs find its `python`
  on "$1" ": >~/.ray/raysweep.log
    RAY_AUTH_MODE=token PATH=$env/bin:\$PATH nohup ray start $2 --block >~/.ray/raysweep.log 2>&1 </dev/null &
    echo \$! >~/.ray/raysweep.pid"
}

wait_for_head() { # HOST
  on "$1" "for _ in \$(seq 60); do
      RAY_AUTH_MODE=token $env/bin/ray health-check --address $2 >/dev/null 2>&1 && exit 0
      sleep 1
    done
    tail -n 20 ~/.ray/raysweep.log >&2
    exit 1"
}

wait_for_node() { # HOST
  # shellcheck disable=SC2016 # Expanded on the host.
  on "$1" 'for _ in $(seq 60); do
      grep -q "Ray runtime started" ~/.ray/raysweep.log && exit 0
      sleep 1
    done
    tail -n 20 ~/.ray/raysweep.log >&2
    exit 1'
}

up() {
  local head=$1 host ip
  shift
  [ -s "$token" ] || (umask 077 && mkdir -p "$(dirname "$token")" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
  for host in "$head" "$@"; do send_token "$host"; done
  # The address by which this machine's SSH would reach it may be another one than the hosts' own.
  ip=$(on "$head" "hostname -I | cut -d' ' -f1")
  start "$head" "--head --node-ip-address=$ip --port=$port --dashboard-host=127.0.0.1"
  wait_for_head "$head" "$ip:$port"
  for host in "$@"; do start "$host" "--address=$ip:$port"; done
  for host in "$@"; do wait_for_node "$host"; done
  echo "check it:  ssh $head '$env/bin/raysweep doctor --address $ip:$port --store /shared/sweeps'"
  echo "run there: ssh $head '$env/bin/raysweep run SWEEP.yaml --address $ip:$port --store /shared/sweeps'"
}

down() {
  local head=$1 host
  shift
  # The head last: what takes its leave of one that is gone waits for it for half a minute.
  for host in "$@" "$head"; do
    # Only a process that is still that Ray: its number may be another's by now.
    # shellcheck disable=SC2016 # Expanded on the host.
    on "$host" 'pid=$(cat ~/.ray/raysweep.pid 2>/dev/null) || exit 0
      if tr "\0" " " <"/proc/$pid/cmdline" 2>/dev/null | grep -q "ray start"; then
        kill "$pid"
        for _ in $(seq 60); do [ -e "/proc/$pid" ] || break; sleep 0.5; done
      fi
      rm -f ~/.ray/raysweep.pid'
  done
}

[ $# -ge 2 ] || usage
action=$1
shift
case $action in
  up | down) "$action" "$@" ;;
  *) usage ;;
esac
