"""pytest-benchmark cases of the small ops.

    pytest bench --benchmark-only
    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=median:50%

The last fails where an op's median became half as long again as in the run that was saved last.
"""

import pytest
import torch

from bench import families, overhead
from bench.cases import eager, ours, timed_call
from bench.parity import Judge

pytest.importorskip("pytest_benchmark", reason="pip install mistral-kernels[bench]")

BENCHES = {
    b.key: b for b in (*(b for b in families.all_benches() if b.quick and b.limit != "gemm"), *overhead.benches())
}


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("key", BENCHES)
def test_op(benchmark, key, impl):
    bench = BENCHES[key]
    benchmark.group = key
    arguments = bench.arguments("cpu")
    with torch.no_grad():
        call, outputs = timed_call((ours if impl == "ours" else eager)(bench.case.op), arguments, bench.backward)
        verdict = Judge(bench, arguments)(outputs(benchmark(call)))
    assert verdict.passed, verdict
