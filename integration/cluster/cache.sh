# Sourced by what builds: things that are built once for a version.
# shellcheck shell=bash

mkdir -p "$CACHE" "$LOGS"
# One build at a time: two cores, and nobody sees half a directory.
exec 8>"$CACHE/lock"
flock 8

# key FILES AND WORDS...: a short hash of files' contents and of words.
key() {
  local x
  for x in "$@"; do
    if [ -f "$x" ]; then cat "$x"; else printf '%s\n' "$x"; fi
  done | sha256sum | cut -c1-12
}

# part NAME KEY FUNCTION: runs FUNCTION OUTPUT_DIRECTORY unless it is cached, and
# sets the variable NAME_dir. The output appears under its name when complete.
part() {
  local name=$1 out=$CACHE/$1-$2 build=$3 log=$LOGS/build-$1.log start=$SECONDS
  printf -v "${name}_dir" %s "$out"
  [ -d "$out" ] && return
  say "building $name (log: $log)"
  rm -rf "$out.partial"
  mkdir -p "$out.partial"
  # Not `if ! (...)`: bash ignores -e inside a condition.
  set +e
  (set -e; "$build" "$out.partial") >"$log" 2>&1
  local status=$?
  set -e
  if [ "$status" != 0 ]; then
    show_log "$log" 20
    fail "$name did not build"
  fi
  mv "$out.partial" "$out"
  say "built $name in $((SECONDS - start)) s"
}
