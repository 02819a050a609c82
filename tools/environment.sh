# shellcheck shell=bash
# Finds or makes a Python environment for this repository and exports PYTHON, its interpreter.
#
#   source tools/environment.sh plots|test || exit 1
#
# An active environment (virtual, conda, $PYTHON or plain python3) that already has what is needed is used as it is.
# Otherwise .venv in the repository root is made from a Python >= 3.12, with the versions in constraints.txt; it is
# made once, and completed again when constraints.txt, pyproject.toml or setup.py change. Returns 1, after one line on
# standard error, when that is not possible. Then the compiled kernels, megatron_xmoe/_C*.so, are built, again when
# csrc changes; where that is not possible, the reason is shown, and the rest works without them (XMOE_BUILD_EXT=0
# builds nothing, 1 makes a failed compilation an error). Bash only; nothing outside .venv, build and that file is changed.

_xmoe_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
_xmoe_venv=$_xmoe_root/.venv
_xmoe_stamp=$_xmoe_venv/xmoe-complete # written last: its absence marks a half-made environment
_xmoe_mark=$_xmoe_venv/xmoe-made-here # this script made the folder and may empty it
_xmoe_log=$_xmoe_venv/xmoe-setup.log
_xmoe_gigabytes=8

_xmoe_say() { printf 'environment: %s\n' "$*"; }

_xmoe_error() {
    printf 'environment: error: %s\n' "$*" >&2
    return 1
}

# The absolute path of program $1, if there is one.
_xmoe_which() {
    local path
    path=$(type -P -- "$1") && printf '%s\n' "$([[ $path == /* ]] || printf '%s/' "$PWD")$path"
}

# Whether interpreter $1 has everything that extra $2 needs; prints why not.
_xmoe_suitable() {
    (cd / && timeout 120 "$1" - "$_xmoe_root" "$2" 2> /dev/null) << 'PYTHON'
import os
import sys
from importlib.util import find_spec

root, extra = sys.argv[1:]
needed = ["torch", "megatron.core", "megatron.training", "megatron_xmoe", "numpy", "sentencepiece", "tqdm"]
needed += ["matplotlib", "tensorboard"] + (["pytest", "ruff"] if extra == "test" else [])


def found(name):
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def reason():
    if sys.version_info < (3, 12):
        return f"it is Python {sys.version_info[0]}.{sys.version_info[1]}, and 3.12 is needed"
    missing = [name for name in needed if not found(name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    try:
        import megatron.core
        import megatron_xmoe
        import torch
    except Exception as error:
        return f"an import fails: {' '.join(str(error).split())}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        return f"it has torch {torch.__version__}, and 2.9 is needed"
    if not megatron.core.__version__.startswith("0.19."):
        return f"it has megatron-core {megatron.core.__version__}, and 0.19 is needed"
    where = os.path.dirname(os.path.realpath(megatron_xmoe.__file__))
    if where != os.path.join(os.path.realpath(root), "megatron_xmoe"):
        return f"its megatron_xmoe is another copy, {where}"
    return ""


text = reason()
print(text)
sys.exit(1 if text else 0)
PYTHON
}

# Looks for an environment of the user's that is suitable; prints its interpreter.
_xmoe_users() {
    local extra=$1 candidate reason tried=:
    for candidate in "${PYTHON:-/}" "${VIRTUAL_ENV-}/bin/python" "${CONDA_PREFIX-}/bin/python" python3 \
        "$_xmoe_venv/bin/python"; do
        candidate=$(_xmoe_which "$candidate") || continue
        [[ $tried != *":$candidate:"* ]] || continue
        tried+=$candidate:
        [[ $candidate != "$_xmoe_venv"/* || ! -e $_xmoe_mark ]] || continue # made here: judged by its stamp
        if reason=$(_xmoe_suitable "$candidate" "$extra"); then
            printf '%s\n' "$candidate"
            return 0
        fi
        case $candidate in # a system's python3 is not expected to be suitable
            "${PYTHON:-/}" | "${VIRTUAL_ENV:-/}"/* | "${CONDA_PREFIX:-/}"/*)
                _xmoe_say "$candidate is not used: ${reason:-it does not run}" >&2 ;;
        esac
    done
    return 1
}

# Finds a Python >= 3.12 that runs and can make virtual environments; prints it.
_xmoe_base_python() {
    local candidate version without_venv="" list
    # newest last: not every package has wheels for the newest Python
    list=("${PYTHON:-/}" python3.12 python3.13 python3)
    list+=("${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/3.1[2-9]*/bin/python3)
    list+=("${HOME-}"/.local/share/uv/python/cpython-3.1[2-9]*/bin/python3)
    list+=({/usr,/usr/local,/opt/*,"${CONDA_PREFIX-}"}/bin/python3{.12,.13,} python3.14 python3.15)
    for candidate in "${list[@]}"; do
        candidate=$(_xmoe_which "$candidate") || continue
        # a pyenv shim can be in PATH and fail: only running it tells
        version=$(cd / && timeout 60 "$candidate" -c '
import sys
print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 12) and sys.maxsize > 2**32 else "")
' 2> /dev/null) || continue
        [[ -n $version ]] || continue
        if (cd / && timeout 60 "$candidate" -c 'import ensurepip, venv') 2> /dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
        without_venv=${without_venv:-$candidate $version}
    done
    if [[ -n $without_venv ]]; then
        _xmoe_error "${without_venv% *} has no venv module. Fix (Debian, Ubuntu):" \
            "apt-get install python${without_venv##* }-venv"
    else
        _xmoe_error "no Python >= 3.12 found. Fix: apt-get install python3.12 python3.12-venv (Ubuntu 24.04)," \
            "or pyenv install 3.12, or uv python install 3.12, then run this again; PYTHON=/path/to/python3 points to one"
    fi
}

# What the stamp of a complete .venv says: the place, the extra and the files that name versions.
_xmoe_wanted() {
    printf 'place %s\nextra %s\nfiles ' "$_xmoe_root" "$1"
    (cd -- "$_xmoe_root" && cat constraints.txt pyproject.toml setup.py | cksum)
}

# Whether .venv was made here (not copied or moved here) and its Python runs; it does not when its base has gone.
_xmoe_runs() {
    [[ -f $_xmoe_stamp && $(head -n 1 "$_xmoe_stamp") == "place $_xmoe_root" && -x $_xmoe_venv/bin/python ]] &&
        (cd / && "$_xmoe_venv/bin/python" -c 'import pip' 2> /dev/null)
}

_xmoe_complete() {
    local stamp
    _xmoe_runs || return 1
    stamp=$(< "$_xmoe_stamp")
    [[ $stamp == "$(_xmoe_wanted "$1")" || $stamp == "$(_xmoe_wanted test)" ]] # test includes plots
}

# Shows a running time and what pip does at the moment; the whole output goes to the log.
_xmoe_follow() {
    local line status shown="preparing" start=$SECONDS printed=$SECONDS every=15 width=${COLUMNS:-80}
    [[ -t 1 ]] && every=1
    while true; do
        if IFS= read -r -t 1 line; then
            printf '%s\n' "$line" >> "$_xmoe_log"
            case $line in
                *"Downloading "*) shown=${line#"${line%%[![:space:]]*}"} shown=${shown%%.metadata*} ;;
                "Collecting "*) shown="looking for ${line#Collecting }" shown=${shown%% (from*} ;;
                "Installing collected"*) shown="installing what was downloaded (the longest step)" ;;
            esac
        else
            status=$?
            [[ $status -gt 128 ]] || break # 1 is the end of the output, above 128 a second without any
        fi
        if [[ $((SECONDS - printed)) -ge $every ]]; then
            printed=$SECONDS
            line=$(printf '%4d s  %s' $((SECONDS - start)) "${shown##*/}")
            if [[ -t 1 ]]; then printf '\r\033[K%s' "${line:0:width-1}"; else printf '%s\n' "$line"; fi
        fi
    done
    [[ ! -t 1 ]] || printf '\r\033[K'
}

_xmoe_install() {
    local extra=$1 status reason
    : > "$_xmoe_log"
    (
        cd -- "$_xmoe_root" || exit 1
        export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
        unset PYTHONPATH PYTHONHOME
        "$_xmoe_venv/bin/python" -m pip install --progress-bar off -c constraints.txt -e ".[$extra]" 2>&1
    ) < /dev/null | _xmoe_follow
    status=${PIPESTATUS[0]}
    if [[ $status -ne 0 ]]; then
        reason=$(grep -E 'ERROR|No space left|error:' "$_xmoe_log" | head -n 1)
        [[ $reason != *"No space left"* ]] || reason+=" (TMPDIR=/a/larger/disk moves pip's temporary files)"
        reason=${reason%.}
        _xmoe_error "pip failed: ${reason:-exit code $status}. Fix: see $_xmoe_log, then run this again"
        return 1
    fi
    if ! reason=$(unset PYTHONPATH PYTHONHOME && _xmoe_suitable "$_xmoe_venv/bin/python" "$extra"); then
        _xmoe_error "$_xmoe_venv is not usable: ${reason:-its Python does not run}. Fix: rm -r '$_xmoe_venv', run this again"
        return 1
    fi
}

# Makes or completes .venv; called with the lock held.
_xmoe_make() {
    local extra=$1 base free start=$SECONDS
    if _xmoe_runs; then
        if grep -q '^extra test$' "$_xmoe_stamp"; then extra="test"; fi # never fewer packages than before
        _xmoe_say "bringing $_xmoe_venv up to date (constraints.txt, pyproject.toml or what is needed has changed)"
        rm -f -- "$_xmoe_stamp"
    else
        if [[ ! -e $_xmoe_mark && -n $(find "$_xmoe_venv/" -mindepth 1 ! -name xmoe-lock -print -quit) ]]; then
            _xmoe_error "$_xmoe_venv is an environment of your own that is not complete. Fix: activate it and" \
                "pip install -c constraints.txt -e '.[test]', or move it away and run this again"
            return 1
        fi
        base=$(_xmoe_base_python) || return 1
        find "$_xmoe_venv/" -mindepth 1 -maxdepth 1 ! -name xmoe-lock -exec rm -rf -- {} + # half-made, or moved here
        free=$(cd / && "$base" -c 'import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free >> 30)' "$_xmoe_root")
        if [[ $free -lt $_xmoe_gigabytes ]]; then
            _xmoe_error "$free GB are free in $_xmoe_root; the environment needs $_xmoe_gigabytes GB. Fix: free some" \
                "space, or activate an environment that has torch >= 2.9 and megatron-core 0.19"
            return 1
        fi
        _xmoe_say "making $_xmoe_venv with $base ($("$base" -V))"
        _xmoe_say "pip downloads about 3 GB once (torch comes with its CUDA libraries, without a GPU too): some minutes"
        [[ ! -e /dev/kfd ]] || _xmoe_say "note: this machine has an AMD GPU, and torch from PyPI is for NVIDIA and the" \
            "CPU. To use the GPU, stop this and activate an environment with torch for ROCm (see README.md)"
        : > "$_xmoe_mark"
        if ! (cd / && unset PYTHONPATH PYTHONHOME && "$base" -m venv "$_xmoe_venv" > "$_xmoe_log" 2>&1); then
            _xmoe_error "$base cannot make a virtual environment. Fix: see $_xmoe_log"
            return 1
        fi
    fi
    _xmoe_install "$extra" || return 1
    _xmoe_wanted "$extra" > "$_xmoe_stamp.new" && mv -f -- "$_xmoe_stamp.new" "$_xmoe_stamp"
    _xmoe_say "$_xmoe_venv is ready ($((SECONDS - start)) s)"
}

# What the compiled kernels depend on: sources, interpreter, torch, compilers and settings.
_xmoe_kernels_wanted() {
    local name
    for name in XMOE_BUILD_EXT CXX CUDA_HOME ROCM_HOME TORCH_CUDA_ARCH_LIST PYTORCH_ROCM_ARCH; do
        printf '%s=%s\n' "$name" "${!name-}"
    done
    type -P c++ g++ nvcc hipcc
    (cd / && "$PYTHON" -c 'import importlib.metadata, sys; print(sys.prefix, sys.version, importlib.metadata.version("torch"))')
    (cd -- "$_xmoe_root" && find csrc setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 cksum)
}

# Whether kernels that were built by hand serve what is here.
_xmoe_kernels_are_here() {
    (cd -- "$_xmoe_root" && "$PYTHON" - 2> /dev/null) << 'PYTHON'
import sys

import torch

from megatron_xmoe import _optional

devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
sys.exit(not all(_optional.extension(device).usable for device in devices))
PYTHON
}

# Builds the compiled kernels for $PYTHON unless that was tried before with the same sources, compilers and settings.
_xmoe_kernels() {
    local folder=$_xmoe_root/build wanted stamp lock status=0 start=$SECONDS line
    [[ ${XMOE_BUILD_EXT-} != 0 ]] || return 0
    if ! mkdir -p -- "$folder" 2> /dev/null || ! { exec {lock}>> "$folder/xmoe-kernels.lock"; } 2> /dev/null; then
        _xmoe_say "compiled kernels left out: $folder cannot be written"
        return 0
    fi
    flock "$lock" 2> /dev/null || true # a file system without locks
    stamp=$folder/xmoe-kernels
    if [[ ! -f $stamp && ${XMOE_BUILD_EXT-} != 1 ]] && _xmoe_kernels_are_here; then
        _xmoe_say "using the compiled kernels that are here"
        exec {lock}>&-
        return 0
    fi
    wanted=$(_xmoe_kernels_wanted 2> /dev/null)
    if [[ ! -f $stamp || $(< "$stamp") != "$wanted" ]] ||
        { grep -q 'compiled kernels built' "$stamp.log" && ! compgen -G "$_xmoe_root/megatron_xmoe/_C*.so" > /dev/null; }; then
        _xmoe_say "building the compiled kernels (a minute or two, once)"
        rm -f -- "$stamp"
        (cd -- "$_xmoe_root" && "$PYTHON" setup.py build_ext --inplace) > "$stamp.log" 2>&1 < /dev/null || status=$?
        if [[ $status -eq 0 ]]; then printf '%s\n' "$wanted" > "$stamp"; fi
        _xmoe_say "the output of the build is in $stamp.log ($((SECONDS - start)) s)"
    fi
    exec {lock}>&-
    while IFS= read -r line; do _xmoe_say "${line#megatron-xmoe: }"; done < <(grep '^megatron-xmoe: ' "$stamp.log")
    [[ $status -ne 0 ]] || return 0
    line="the compiled kernels cannot be built: $(tail -n 1 "$stamp.log"). Fix: see $stamp.log"
    if [[ ${XMOE_BUILD_EXT-} == 1 ]]; then
        _xmoe_error "$line"
    else
        _xmoe_say "$line"
    fi
}

_xmoe_environment() {
    _xmoe_python "$1" && _xmoe_kernels
}

# Finds or makes the environment and exports PYTHON.
_xmoe_python() {
    local extra=$1 found lock status=0
    if found=$(_xmoe_users "$extra"); then
        _xmoe_say "using $found, which has what is needed"
        export PYTHON=$found
        return 0
    fi
    if ! _xmoe_complete "$extra"; then
        if ! mkdir -p -- "$_xmoe_venv" || ! exec {lock}>> "$_xmoe_venv/xmoe-lock"; then
            _xmoe_error "$_xmoe_venv cannot be written. Fix: copy the repository to a folder of your own"
            return 1
        fi
        flock --nonblock --conflict-exit-code 75 "$lock" 2> /dev/null || status=$?
        if [[ $status -eq 75 ]]; then # anything else: a file system without locks, where this goes on without
            _xmoe_say "another set-up is at work in $_xmoe_venv; waiting for it"
            flock "$lock"
        fi
        status=0
        _xmoe_complete "$extra" || _xmoe_make "$extra" || status=1
        exec {lock}>&-
        [[ $status -eq 0 ]] || return 1
    fi
    _xmoe_say "using $_xmoe_venv"
    if [[ -n ${PYTHONPATH-}${PYTHONHOME-} ]]; then
        _xmoe_say "PYTHONPATH and PYTHONHOME are ignored: $_xmoe_venv has what is needed"
        unset PYTHONPATH PYTHONHOME
    fi
    export PYTHON=$_xmoe_venv/bin/python
}

case ${1-} in
    plots | test) _xmoe_environment "$1" ;;
    *) _xmoe_error "source tools/environment.sh takes 'plots' or 'test', not '${1-}'" ;;
esac
