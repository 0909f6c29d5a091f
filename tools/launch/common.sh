# shellcheck shell=bash
# What the launchers share: errors with a remedy, commands that --dry-run prints instead of running. Keeps to bash 3.2 (macOS).

DRY_RUN=
PATH=$REPO/.venv/bin:$PATH # uv and xpk, where `make setup` or pip put them
exec 3>&1                  # a dry run prints here, also from inside $(...)

# fail MESSAGE REMEDY
fail() {
  printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 2
}

say() {
  [ -n "$DRY_RUN" ] || printf '%s\n' "$*"
}

# The words as one line that a shell reads back as the same words.
quoted() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word=$(printf '%s' "$word" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/") && word=${word:-"''"} ;;
    esac
    line=$line${line:+ }$word
  done
  printf '%s\n' "$line"
}

run() {
  if [ -n "$DRY_RUN" ]; then quoted "$@" >&3; else "$@"; fi
}

# ask ASSUMED COMMAND...: the output of COMMAND, of which a dry run prints the line and assumes the answer.
ask() {
  local assumed=$1
  shift
  if [ -n "$DRY_RUN" ]; then
    quoted "$@" >&3
    printf '%s\n' "$assumed"
  else
    "$@"
  fi
}

# The comment at the head of the script, without its first line, is its help.
show_help() {
  sed -n '2,/^[^#]/{/^#/!d; s/^# \{0,1\}//; p;}' "$0"
  exit 0
}

# needs_value "$@": the option that is first has a word after it.
needs_value() {
  [ $# -ge 2 ] || fail "$1 needs a value" "see $(basename "$0") --help"
}

# needs PROGRAM REMEDY; a dry run needs none.
needs() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null 2>&1 || fail "$1 is not on PATH" "$2"
}

# number NAME VALUE LEAST
number() {
  case $2 in
    '' | *[!0-9]*) fail "$1 $2 is not a whole number" "give $1 a number from $3 on" ;;
  esac
  [ "$2" -ge "$3" ] || fail "$1 is $2, and must be at least $3" "give $1 a number from $3 on"
}

# The wheel of this checkout, built unless one was given; sets $wheel.
find_wheel() {
  local version
  if [ -n "$wheel" ]; then
    [ -f "$wheel" ] || fail "there is no wheel $wheel" "leave out --wheel to build one from $REPO"
    return
  fi
  version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$REPO/instructrec_jax/__init__.py")
  wheel=$REPO/dist/instructrec_jax-$version-py3-none-any.whl
  needs uv "make setup installs it in .venv; or give --wheel FILE"
  run uv build --quiet --wheel --out-dir "$REPO/dist" "$REPO"
}
