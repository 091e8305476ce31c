#!/usr/bin/env bash
# What one GPU does with this package, in parts that are cut for nine minutes each:
#
#     benchmarks/gpu.sh step|large|layer|rest [--smoke] [FOLDER]
#
# step   training and forward pass against PyTorch, eager and compiled, in bfloat16, 256 images
# large  the same with 1,024 images (CRATE-L: 512), as far as the memory holds all of them at once
# layer  attention by every path, held against float32; the account of a layer; other settings
# rest   evaluation on synthetic batches; float32; the input pipeline, where grain and OpenCV are
#
# It needs jax for CUDA, flax and optax, and for step, large and float32 PyTorch: no network, and
# nothing is installed. Tables go to the output; JSON and the tables go into FOLDER, by default
# benchmarks/results. With --smoke everything is small and may run on a CPU: a rehearsal, whose
# figures mean nothing.
set -euo pipefail

part=${1:-}
shift || true
smoke=""
if [ "${1:-}" = --smoke ]; then
    smoke=yes
    shift
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out=${1:-$here/results}
python=${PYTHON:-python3}
mkdir -p "$out"

measure() { # NAME PROGRAM ARGUMENTS…
    local name=$1
    shift
    printf '\n== %s\n' "$*"
    # The last line is the JSON, which is in the file.
    "$python" "$here/$1" "${@:2}" --output "$out/${name}_gpu.json" | grep -v '^{'
}

t=crate_tiny_patch16_224 s=crate_small_patch16_224 b=crate_base_patch16_224 l=crate_large_patch16_224
case "$part" in
step)
    if [ "$smoke" ]; then
        measure step step.py --models "$t:2" --rounds 1
    else
        measure step step.py --models "$t:256,$s:256,$b:256,$l:256" --dtype bfloat16 --rounds 5
    fi
    ;;
large)
    if [ "$smoke" ]; then
        TORCH_COMPILE_DISABLE=1 measure step_large step.py --models "$t:4" --rounds 1
    else
        measure step_large step.py --models "$t:1024,$s:1024,$b:1024,$l:512" --dtype bfloat16 --rounds 5
    fi
    ;;
layer)
    if [ "$smoke" ]; then
        measure layer layer.py --model "$t" --batch-size 1 --rounds 1
        measure variants variants.py --model "$t" --batch-size 1 --rounds 1 --settings 2
    else
        measure layer layer.py --model "$b" --batch-size 256 --dtype bfloat16
        measure variants variants.py --model "$b" --batch-size 256 --dtype bfloat16
    fi
    ;;
rest)
    if [ "$smoke" ]; then
        measure evaluation evaluation.py --models "$t:2" --rounds 1
    else
        measure evaluation evaluation.py --models "$t:512,$s:512,$b:512,$l:256" --dtype bfloat16
    fi
    if ! "$python" -c 'import torch' 2>/dev/null; then
        printf '\nNot run: float32 against PyTorch, which is not there.\n'
    elif [ "$smoke" ]; then
        TORCH_COMPILE_DISABLE=1 measure step_float32 step.py --models "$t:1" --rounds 1
    else
        measure step_float32 step.py --models "$b:128" --rounds 5
    fi
    if [ "$smoke" ]; then
        printf '\nNot run: the input pipeline, which takes its time.\n'
    elif "$python" -c 'import grain, cv2, sklearn' 2>/dev/null; then
        measure input_pipeline input_pipeline.py
    else
        printf '\nNot run: the input pipeline, which needs grain, OpenCV and scikit-learn.\n'
    fi
    ;;
*)
    echo "usage: benchmarks/gpu.sh step|large|layer|rest [--smoke] [FOLDER]" >&2
    exit 2
    ;;
esac
