#!/usr/bin/env bash
# The quick tests of what computes, as on a processor with AVX2 alone and on one with SSE4 alone.
# Usage: test_processors.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
folders=(tests/{core,model,data,evaluation,distributed,library})

capability() { "$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())'; }

as_it_is=$(capability) failed=0
for kernels in avx2,AVX2,AVX2 default,SSE4_2,SSE41; do
    IFS=, read -r ATEN_CPU_CAPABILITY MKL_ENABLE_INSTRUCTIONS DNNL_MAX_CPU_ISA <<<"$kernels"
    export ATEN_CPU_CAPABILITY MKL_ENABLE_INSTRUCTIONS DNNL_MAX_CPU_ISA
    found=$(capability)
    echo "kernels of PyTorch: $found instead of $as_it_is"
    [ "$found" != "$as_it_is" ] || echo "NOTHING CHANGED: with $ATEN_CPU_CAPABILITY PyTorch has the same kernels as without"
    "$python" -m pytest "$@" "${folders[@]}" || failed=1
done
exit $failed
