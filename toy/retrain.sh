#!/bin/sh
# Makes the toy world's bundled model from nothing: hours on two cores. Stopped and started again it
# goes on where it was: what is already in out/toy is not done again, and towers and stages resume.
#
#     sh toy/retrain.sh              or PYTHON=path/to/python sh toy/retrain.sh
set -e
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

"$PYTHON" -m toy towers
test -f out/toy/stage1/model.safetensors || "$PYTHON" train.py --stage 1
test -f out/toy/stage2/model.safetensors || "$PYTHON" train.py --stage 2
"$PYTHON" -m toy ship
