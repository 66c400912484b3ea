# Sourced by every script here: where things are, and how to say what happens.
# shellcheck shell=bash
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$HERE/../.." && pwd)
# shellcheck source=versions
. "$HERE/versions"

# State, binaries and caches of the cluster. Everything that a cluster leaves on
# the machine is below here or named adit-*.
DIR=${ADIT_CLUSTER_DIR:-/var/lib/adit/cluster}
CACHE=$DIR/cache
BIN=$DIR/bin
RUN=$DIR/run
LOGS=$DIR/logs
KUBECONFIG_FILE=$DIR/kubeconfig

say() { printf '%s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# need COMMAND PACKAGE: fails with the Debian package to install.
need() {
  command -v "$1" >/dev/null 2>&1 || fail "$1 is not installed: apt-get install $2"
}

# until_ok SECONDS COMMAND...: repeats the command until it succeeds; fails then.
until_ok() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.2
  done
}

# show_log FILE: the end of a log, for the reader of an error.
show_log() {
  [ -s "$1" ] || return 0
  printf -- '--- last lines of %s\n' "$1" >&2
  tail -n "${2:-15}" "$1" >&2
}

kubectl() { "$BIN/kubectl" --kubeconfig "$KUBECONFIG_FILE" "$@"; }
