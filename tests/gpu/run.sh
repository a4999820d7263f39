#!/usr/bin/env bash
# See on a real GPU what the CPU can't show: tests/gpu/run.sh [options] [FOLDER]
#
#   --device cuda|cpu   cpu tries the script itself where there is no GPU (default: cuda)
#   --seconds N         stop after so long; what is left is then said to have not run (default: 290)
#   --only NAME         run one part (repeatable): demo devices recipes rank kernels mobilenet
#                       evaluation speed
#   --logs DIR          keep the whole output of each part there (default: a temporary folder)
#
# Needs no network and no installation: autoquant runs from a copy of this tree, beside the wheels in
# FOLDER (.gpu), which tests/gpu/pack.sh gathers, and beside what python3 has (torch with CUDA,
# Triton, pytest). Each part has a time limit; one that fails does not end the others. A table comes
# last, and the exit status is 1 where a part failed or did not run.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
device=cuda seconds=290 logs='' only=() folder=''
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --only) only+=("$2"); shift 2 ;;
        --logs) logs=$2; shift 2 ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
folder=$(realpath -m "${folder:-$root/.gpu}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=$(realpath -m "${logs:-$work/logs}")
mkdir -p "$logs" "$work/tree" "$work/run"
SECONDS=0

# --- autoquant, as if it were installed -----------------------------------------------------------
cp -r "$root/autoquant" "$root/tests" "$root/pyproject.toml" "$work/tree"
find "$work/tree" -name __pycache__ -prune -exec rm -rf {} +
find "$work/tree" -name '*.so' -delete # built for another Python or processor
cp -r "$root/search_spaces" "$work/tree/autoquant/search_spaces"
# The C library, as pyproject.toml would have it built.
mapfile -t build < <("$python" - "$root/pyproject.toml" <<'PYTHON'
import sys, tomllib
from pathlib import Path

for module in tomllib.loads(Path(sys.argv[1]).read_text())["tool"]["setuptools"]["ext-modules"]:
    target = module["name"].replace(".", "/") + ".so"
    print(*module["extra-compile-args"], "-shared", "-fPIC", *module["sources"],
          "-o", target, *module.get("extra-link-args", []), "-lm")
PYTHON
)
for line in "${build[@]}"; do
    # shellcheck disable=SC2086
    (cd "$work/tree" && cc $line) 2>>"$logs/native.log" ||
        echo "no C library (see native.log): eager operators stand in for it"
done
install=("$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site")
if ! "${install[@]}" "$folder"/wheels/*.whl >"$logs/wheels.log" 2>&1; then
    echo "not all wheels fit this Python: those that do are taken one by one"
    for wheel in "$folder"/wheels/*.whl; do
        "${install[@]}" "$wheel" >>"$logs/wheels.log" 2>&1 || echo "left out: ${wheel##*/}"
    done
fi
export PYTHONPATH="$work/site:$work/tree" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XDG_CACHE_HOME="$work/cache" TRITON_CACHE_DIR="$work/cache/triton"
export AUTOQUANT_IMAGENET="$folder/photos.zip" CI=true
cd "$work/run" || exit 1

# Two sets of tests run side by side, most of the cores on that which compiles more.
few=() many=()
if "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(nproc)
    few=(-n "$((cores / 4 + 1))") many=(-n "$((cores * 3 / 4))")
fi
tests=("$python" -m pytest --disable-warnings -c "$work/tree/pyproject.toml" --rootdir "$work/tree"
    -p no:cacheprovider)
kernels=$work/tree/tests/kernels/gpu
if [ "$device" = cuda ]; then
    # Where tests marked gpu are, or the fixture that marks them.
    mapfile -t marked < <(grep -rl 'mark\.gpu' "$work/tree/tests" --include='*.py' |
        xargs -n 1 dirname | sort -u | grep -v "^$kernels$")
    device_tests=("${tests[@]}" "${few[@]}" -m gpu "${marked[@]}")
    kernel_tests=("${tests[@]}" "${many[@]}" -m 'not slow' "$kernels") # slow ones need no GPU
else
    device_tests=("${tests[@]}" "${few[@]}" -m 'not gpu and not slow' "$work/tree/tests/devices")
    kernel_tests=("${tests[@]}" "${many[@]}" "$kernels/test_geometry.py" "$kernels/test_planes.py")
fi

# --- the parts ------------------------------------------------------------------------------------
names=() results=() failed=0

wanted() { [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $1 "* ]]; }

# begin NAME LIMIT COMMAND…: run it beside what follows, for LIMIT seconds at most. What is timed comes
# last: the other parts leave it KEPT seconds.
kept=0
! wanted evaluation || kept=$((kept + 60))
! wanted speed || kept=$((kept + 40))
[ "$kept" -le $((seconds / 2)) ] || kept=$((seconds / 2))
begin() {
    local name=$1 limit=$2 left=$((seconds - SECONDS - kept)) from=$SECONDS
    shift 2
    wanted "$name" || return 0
    if [ "$left" -lt 8 ]; then
        echo "- 0" >"$work/$name.status"
        return 0
    fi
    (
        timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$logs/$name.log" 2>&1
        echo "$? $((SECONDS - from))" >"$work/$name.status"
    ) &
    eval "pid_$name=$!"
}

# finish NAME: wait for it, print the end of what it said.
finish() {
    local name=$1 pid="pid_$1" status took result
    wanted "$name" || return 0
    [ -z "${!pid:-}" ] || wait "${!pid}"
    read -r status took <"$work/$name.status"
    echo "=== $name"
    case $status in
        0) result="ok, $took s; $(tail -n 1 "$logs/$name.log" | cut -c 1-150)" ;;
        -) result="NOT RUN: no time left" ;;
        124 | 137) result="FAILED: over its time, $took s" ;;
        *) result="FAILED: status $status, $took s" ;;
    esac
    [ "$status" = 0 ] || failed=1
    [ "$status" = - ] || tail -n "$([ "$status" = 0 ] && echo 14 || echo 45)" "$logs/$name.log"
    names+=("$name")
    results+=("$result")
}

"$python" -c 'import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda,
      torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'

simulate=()
[ "$device" = cuda ] || simulate=(--simulate)

# Tests keep the processor busy, searches the GPU: they run side by side. What is timed runs alone.
begin devices 200 "${device_tests[@]}"
begin kernels 250 "${kernel_tests[@]}"
begin demo 100 "$python" -m tests.gpu.recipes search demo "$device" "$folder"
finish demo
begin recipes 80 "$python" -m tests.gpu.recipes evaluate "$device" "$folder"
finish recipes
begin rank 60 "$python" -m tests.gpu.recipes rank "$device" "$folder"
finish rank
begin mobilenet 170 "$python" -m tests.gpu.recipes search mobilenet_v2 "$device" "$folder"
finish devices
finish mobilenet
finish kernels
kept=0
begin evaluation 70 "$python" -m tests.benchmarks.evaluation --quick --device "$device" "${simulate[@]}"
finish evaluation
begin speed 50 "$python" -m tests.gpu.speed "$device"
finish speed

# --- what came of it ------------------------------------------------------------------------------
echo
echo "part        result"
for i in "${!names[@]}"; do printf '%-11s %s\n' "${names[$i]}" "${results[$i]}"; done
echo "$SECONDS s in all"
exit "$failed"
