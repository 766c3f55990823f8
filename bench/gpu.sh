#!/bin/sh
# All figures that need a GPU, beside the limits of the GPU measured in the same run: in under nine minutes, without a
# network. `bench/gpu.sh --help`; PYTHON=… another Python than that of .venv.
cd "$(dirname "$0")/.." && exec "${PYTHON:-.venv/bin/python}" -m bench.gpu "$@"
