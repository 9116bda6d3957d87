# Sourced by quickstart.sh and test.sh from the repository's root; not to be run.
#
#   set_up EXTRAS    makes .venv and installs the project there with these extras, in the versions
#                    of constraints.txt. Skipped when that was done before. Sets $venv_python.
#
# PYTHON names another interpreter than python3. pip's own settings (PIP_INDEX_URL, ...) apply.

fail() {
    echo "error: $*" >&2
    exit 1
}

set_up() {
    local extras=$1 python=${PYTHON:-python3} wanted stamp
    venv_python=.venv/bin/python
    stamp=.venv/.hf_rmsnorm-$extras

    command -v "$python" >/dev/null || fail "no $python; install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old for constraints.txt; set PYTHON to 3.11 or newer"

    wanted=$({ "$python" --version && cat constraints.txt pyproject.toml; } | cksum)
    if [ -x "$venv_python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$venv_python" ]; then
        echo "making .venv"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            fail "$python -m venv does not work; on Debian or Ubuntu: apt install python3-venv"
        fi
    fi
    # torch first and alone: the build that pip picks for this machine is the one that stays.
    "$venv_python" -m pip install --disable-pip-version-check torch==2.13.0
    "$venv_python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    echo "$wanted" >"$stamp"
}
