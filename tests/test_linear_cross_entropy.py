"""The fused loss against torch's own, in memory, under autocast, under FSDP2, and as a registered op."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.linear_cross_entropy import chunked, reference
from mistral_kernels.testing import fill, linear_cross_entropy_case

IMPLS = [None, "reference", "cpu", "triton"]
CASES = [c for c in testing.cases() if c.op == "linear_cross_entropy"]


@pytest.fixture(params=IMPLS, ids=str)
def impl(request):
    if request.param is not None and (reason := mk.backends()[request.param]) is not None and request.param != "cpu":
        pytest.skip(reason)
    return request.param


def inputs(tokens=23, n=16, vocabulary=50, dtype=torch.float64, grad=True, seed=0):
    hidden = fill((tokens, n), seed=seed).to(dtype).requires_grad_(grad)
    weight = fill((vocabulary, n), seed=seed + 1).to(dtype).requires_grad_(grad)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    return hidden, weight, labels


def torch_loss(hidden, weight, labels, **how):
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), labels.flatten().long(), **how)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 5, 23, 1000])
def test_is_torchs_cross_entropy(impl, reduction, chunk):
    dtype = torch.float32 if impl == "triton" else torch.float64
    hidden, weight, labels = inputs(dtype=dtype)
    labels[3:9] = -100
    loss = mk.linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk=chunk, impl=impl)
    theirs = torch_loss(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(loss, theirs)
    seed = fill(tuple(loss.shape), seed=5).to(dtype)
    ours, expected = (torch.autograd.grad(t, (hidden, weight), seed) for t in (loss, theirs))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "large"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_parity(impl, case, dtype, kind):
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter miscomputes bfloat16")
    testing.assert_parity(case, dtype, impl, kind=kind, gradients=True)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(impl, reduction):
    hidden, weight, labels = inputs(tokens=7, n=4, vocabulary=9)
    labels[2] = 4
    assert torch.autograd.gradcheck(
        lambda h, w: mk.linear_cross_entropy(h, w, labels, 4, reduction, chunk=3, impl=impl), (hidden, weight)
    )


def test_ignored_tokens(impl):
    dtype = torch.float32 if impl == "triton" else torch.float64
    hidden, weight, labels = inputs(dtype=dtype)
    labels[:] = -100
    ignored = mk.linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl)
    assert ignored.item() == 0
    assert all((g == 0).all() for g in gradients(ignored, hidden, weight))
    assert mk.linear_cross_entropy(hidden, weight, labels, impl=impl).isnan()
    assert mk.linear_cross_entropy(hidden, weight, labels, num_items=5, impl=impl).item() == 0
    labels[4] = 7
    (dhidden,) = gradients(mk.linear_cross_entropy(hidden, weight, labels, impl=impl), hidden)
    assert (dhidden[4] != 0).any() and (dhidden[:4] == 0).all() and (dhidden[5:] == 0).all()


@pytest.mark.parametrize("num_items", [7, 7.0, torch.tensor(7), torch.tensor([7.0])])
def test_num_items_is_what_mean_divides_by(num_items):
    hidden, weight, labels = inputs()
    loss = mk.linear_cross_entropy(hidden, weight, labels, num_items=num_items)
    torch.testing.assert_close(loss.reshape(()), torch_loss(hidden, weight, labels, reduction="sum") / 7)


def test_micro_batches_sum_to_the_batch():
    hidden, weight, labels = inputs()
    labels[:11] = -100
    whole = mk.linear_cross_entropy(hidden, weight, labels)
    parts = [mk.linear_cross_entropy(hidden[s], weight, labels[s], num_items=12) for s in (slice(0, 13), slice(13, 23))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed(impl, frozen):
    dtype = torch.float32 if impl == "triton" else torch.float64
    made = dict(zip(("hidden", "weight", "labels"), inputs(dtype=dtype), strict=True))
    (other,) = {"hidden", "weight"} - {frozen}
    expected = gradients(mk.linear_cross_entropy(**made, impl=impl), made[other])[0]
    made[frozen] = made[frozen].detach()
    with mock.patch.object(chunked, "_add_product", wraps=chunked._add_product) as products:
        loss = mk.linear_cross_entropy(**made, chunk=9, impl=impl)
        torch.testing.assert_close(gradients(loss, made[other])[0], expected)
    composite = impl == "triton" or (impl != "reference" and not testing.isa_tiers())
    assert products.call_count == (3 if composite and other == "weight" else 0)


def test_layouts(impl):
    """Batched, transposed and strided hidden, a weight that is a view of a larger table, int32 labels."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    table = fill((60, 40)).to(dtype)
    base = fill((6, 4, 32), seed=1).to(dtype)
    labels = torch.randint(50, (4, 6), dtype=torch.int32)
    for hidden in (base.transpose(0, 1)[..., :16], base.transpose(0, 1)[..., ::2], base[:1, :1, :16].expand(4, 6, 16)):
        for weight in (table[5:55, 3:19], table[:50, ::2][:, :16], table.t()[:16].t()[:50]):
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = mk.linear_cross_entropy(h, w, labels, chunk=7, impl=impl)
            theirs = torch_loss(h, w, labels)
            torch.testing.assert_close(loss, theirs)
            for a, b in zip(gradients(loss, h, w), gradients(theirs, h, w), strict=True):
                torch.testing.assert_close(a, b)


def test_empty(impl):
    hidden, weight, labels = inputs(tokens=0, dtype=torch.float32)
    loss = mk.linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl)
    assert loss.item() == 0
    assert [g.abs().sum().item() for g in gradients(loss, hidden, weight)] == [0, 0]
    assert mk.linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl).shape == (0,)
    assert mk.linear_cross_entropy(hidden, weight, labels, impl=impl).isnan()
    narrow = mk.linear_cross_entropy(torch.empty(3, 0), torch.empty(8, 0), torch.tensor([0, 1, 7]), impl=impl)
    assert math.isclose(narrow.item(), math.log(8), rel_tol=1e-6)


@pytest.mark.parametrize("run", ["reference", "torch", "triton"])
def test_label_outside_the_vocabulary_on_a_device_is_nan(run):
    """What the kernels do where nobody may look at the labels before."""
    if run == "triton":
        pytest.importorskip("triton")
        from mistral_kernels.linear_cross_entropy import triton_kernel as module

        forward, backward = module.forward, module.backward
    elif run == "torch":
        forward, backward = chunked.forward, chunked.backward
    else:
        forward, backward = reference.linear_cross_entropy, reference.linear_cross_entropy_backward
    hidden, weight, _ = inputs(tokens=4, dtype=torch.float32, grad=False)
    labels = torch.tensor([1, 50, -1, -100])
    losses, lse = forward(hidden, weight, labels, -100, 2)
    assert losses.isnan().tolist() == [False, True, True, False] and losses[3] == 0
    dhidden, _ = backward(torch.ones(4), hidden, weight, labels, lse, -100, 2, True, False)
    assert dhidden.isnan().all(-1).tolist() == [False, True, True, False] and (dhidden[3] == 0).all()


def test_inputs_are_left_alone_and_runs_agree(impl):
    hidden, weight, labels = inputs(dtype=torch.float32)
    before = [t.detach().clone() for t in (hidden, weight, labels)]
    runs = []
    for _ in range(2):
        losses = mk.linear_cross_entropy(hidden, weight, labels, reduction="none", chunk=7, impl=impl)
        seed = torch.ones(()).expand(losses.shape)
        runs.append([losses, *torch.autograd.grad(losses, (hidden, weight), seed)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, labels), before, strict=True))


HIDDEN, WEIGHT, LABELS = inputs(grad=False)
BAD = {
    "labels": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS[:4]), ValueError, r"labels is \[4\]; with"),
    "weight": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT[:, :3], LABELS), ValueError, r"\[..., N\] and \[V, N\]"),
    "no words": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT[:0], LABELS), ValueError, "V at least 1"),
    "range": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS + 50), ValueError, "they must be 0 to 49"),
    "negative": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS - 60), ValueError, "labels holds -"),
    "dtype": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS.float()), TypeError, "labels must be a tensor of"),
    "reduction": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, reduction="avg"), ValueError, "'avg'"),
    "items": (
        lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, reduction="sum", num_items=3),
        ValueError,
        "num_items is given with reduction='sum'",
    ),
    "chunk": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, chunk=0), ValueError, "chunk is 0; it must be"),
    "impl": (lambda: mk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, impl="fast"), ValueError, "impl is 'fast'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


# ---- the composite, which stands in for the C++ kernels where they are not built ----


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_composite_is_the_reference(dtype, chunk):
    hidden, weight, labels = inputs(dtype=dtype, grad=False)
    labels[3:9] = -100
    expected = reference.linear_cross_entropy(hidden, weight, labels, -100, 0)
    torch.testing.assert_close(chunked.forward(hidden, weight, labels, -100, chunk), expected)
    given = (fill((23,), seed=4).to(expected[1]), hidden, weight, labels, expected[1], -100, chunk, True, True)
    # The reference rounds the gradient of the logits before its products.
    how = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(chunked.backward(*given), reference.linear_cross_entropy_backward(*given), **how)


# ---- the C++ kernels on every instruction set ----

compiled = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")
FORWARD = torch.ops.mistral_kernels.linear_cross_entropy.default
BACKWARD = torch.ops.mistral_kernels.linear_cross_entropy_backward.default


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Products of this size are done before a second thread wakes up, on a busy machine long before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes():
    """Words around vectors, pairs and sums, columns around panels, rows around strips; a chunk makes many blocks."""
    for i, words in enumerate((1, 2, 7, 16, 33, 63, 1000, 1025, 5125)):
        for n in (1, 24, 75):
            yield linear_cross_entropy_case((1 + (5 * i + n) % 14, n), words, "none", ignored=3)
    for rows, n, words, chunk in ((23, 24, 1000, 1), (23, 75, 1000, 2), (13, 136, 5125, 3), (40, 48, 331, 7)):
        yield linear_cross_entropy_case((rows, n), words, "mean", ignored=5, chunk=chunk)


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_cpu_parity(tier, dtype, one_thread):
    errors = []
    for i, case in enumerate(shapes()):
        kind = testing.KINDS[i % len(testing.KINDS)]
        errors += testing.parity(case, dtype, "cpu", kind=kind, gradients=True)
    assert testing.pooled_max(errors) <= 1 and testing.pooled(errors) <= 1, errors


@compiled
def test_cpu_float64(tier, one_thread):
    hidden, weight, labels = inputs(tokens=29, n=40, vocabulary=1027)
    labels[::4] = -100
    for chunk in (None, 2):
        loss = mk.linear_cross_entropy(hidden, weight, labels, chunk=chunk, impl="cpu")
        theirs = torch_loss(hidden, weight, labels)
        torch.testing.assert_close(loss, theirs)
        for a, b in zip(gradients(loss, hidden, weight), gradients(theirs, hidden, weight), strict=True):
            torch.testing.assert_close(a, b)


def whole_numbers(shape, seed, dtype):
    """Whose products are exact in every order of summation."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_sums_over_many_blocks_of_words(tier, dtype, one_thread):
    """dhidden of blocks, packed whole and in parts, is that of the whole vocabulary."""
    for tokens, n, words in ((520, 8, 600), (3, 4100, 1100), (7, 100, 130)):
        hidden, weight = whole_numbers((tokens, n), 0, dtype) / 8, whole_numbers((words, n), 1, dtype) / 8
        labels = torch.arange(tokens) % words
        lse = FORWARD(hidden, weight, labels, -100, 0)[1]
        given = (fill((tokens,)).float(), hidden, weight, labels, lse, -100)
        expected = BACKWARD(*(t.double() if t.is_floating_point() else t for t in given[:5]), -100, 0, True, True)
        for chunk in (0, tokens * 2 // 3, max(1, tokens // 40)):
            for got, truth in zip(BACKWARD(*given, chunk, True, True), expected, strict=True):
                tolerance = max(4 * torch.finfo(dtype).eps, 5e-6) * truth.abs().max().item()
                torch.testing.assert_close(got.double(), truth, rtol=0, atol=tolerance)


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_threads_and_layouts_change_nothing(tier, dtype):
    """Of dweight, and of dhidden but for bf16 in pairs, the order of the sums is torch's."""
    hidden, weight = whole_numbers((203, 75), 0, dtype), whole_numbers((1003, 75), 1, dtype)
    labels, seed = torch.arange(203) * 4, fill((203,)).float()
    wide_hidden, wide_weight = torch.full((203, 90), torch.nan).to(dtype), torch.full((1003, 80), torch.nan).to(dtype)
    wide_hidden[:, 5:80], wide_weight[:, 3:78] = hidden, weight
    own = tier in ("avx512bf16", "amx") and dtype == torch.bfloat16
    layouts = (
        (hidden, weight),
        (wide_hidden[:, 5:80], wide_weight[:, 3:78]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t()),
    )
    before = torch.get_num_threads()
    for h, w in layouts:
        for threads in (1, 2, 5) if h is hidden else (2,):
            torch.set_num_threads(threads)
            try:
                losses, lse = FORWARD(h, w, labels, -100, 50)
                dhidden, dweight = BACKWARD(seed, h, w, labels, lse, -100, 50, True, True)
            finally:
                torch.set_num_threads(before)
            if h is hidden and threads == 1:
                expected = losses, lse, dhidden, dweight
            assert torch.equal(losses, expected[0]) and torch.equal(lse, expected[1])
            assert torch.equal(dhidden, expected[2]) or not own
            torch.testing.assert_close((dhidden, dweight), expected[2:], rtol=1e-2, atol=1e-2)


INF, NAN = math.inf, math.nan
LOGITS = {
    "all words −inf": [-INF] * 70,
    "words −inf, then few that are small": [-INF] * 65 + [-1000.0, -1001.0, -999.0, -1004.0, -1000.0],
    "words that rise far": [-3e4, -2e4, -1e3, 0.0, 5e2, 2e4, 3e4] * 10,
    "words that fall far": [3e4, 2e4, -1e3, 0.0, 5e2, -2e4, -3e4] * 10,
    "inf": [-1e3] * 30 + [INF] + [2e4] * 39,
    "inf first": [INF, -INF, 1.0, 2.0, -5.0] * 14,
    "inf among −inf": [-INF] * 40 + [INF] + [-INF] * 29,
    "nan": [0.0] * 33 + [NAN] + [1.0] * 36,
    "nan before inf": [NAN] + [INF, 1.0, 2.0] * 23,
    "nan behind −inf": [-INF] * 69 + [NAN],
    "nan in the vector's end": [1.0] * 67 + [NAN, 2.0, 3.0],
}


@compiled
@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64])
@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_are_not_finite(tier, name, dtype, one_thread):
    """hidden is 1, so that the weight is the logits, and dweight of one token their gradient."""
    weight, hidden = torch.tensor(LOGITS[name]).to(dtype)[:, None], torch.ones(1, 1, dtype=dtype)
    for label in (0, 33, 64, 69, -100, 70, -1):
        labels = torch.tensor([label])
        expected = reference.linear_cross_entropy(hidden, weight, labels, -100, 0)
        seed = torch.full_like(expected[0], 0.5)
        given = (seed, hidden, weight, labels, expected[1], -100)
        _, gradient = reference.linear_cross_entropy_backward(*given, 0, False, True)
        got = FORWARD(hidden, weight, labels, -100, 0)
        # Eager's losses are the difference of float32 of up to 3e4.
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-6, atol=4e-3)
        torch.testing.assert_close(BACKWARD(*given, 0, False, True)[1], gradient, equal_nan=True)
        # Blocks of words: tokens that all say the same, of which a chunk is one.
        for tokens in (2, 5, 70):
            many = FORWARD(hidden.expand(tokens, 1), weight, labels.expand(tokens), -100, 1)
            torch.testing.assert_close(many, tuple(t.expand(tokens) for t in got), equal_nan=True)


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_labels(tier, dtype, one_thread):
    """Ignored, at the ends of the vocabulary and of blocks of 101 words, and outside; an ignored one may lie inside.

    Rows of NaN follow upon others: where words are odd, the pair of a row's last one is the next row's first.
    """
    labels = torch.tensor([0, 100, 101, 1009, 1010, 7, -1, -100, 7, 1008])
    hidden, weight, _ = inputs(tokens=10, n=24, vocabulary=1010, dtype=dtype, grad=False)
    for ignored in (-100, 7, 1010):
        for chunk in (0, 1):
            expected = reference.linear_cross_entropy(hidden, weight, labels, ignored, 0)
            losses, lse = FORWARD(hidden, weight, labels, ignored, chunk)
            torch.testing.assert_close((losses, lse), expected, equal_nan=True, rtol=1e-4, atol=1e-4)
            given = (torch.ones(10), hidden, weight, labels, lse, ignored, chunk, True, False)
            dhidden, dweight = BACKWARD(*given)
            theirs = reference.linear_cross_entropy_backward(*given)[0]
            torch.testing.assert_close(dhidden, theirs, equal_nan=True, rtol=2e-2, atol=2e-2)
            assert (dhidden[labels == ignored] == 0).all() and dweight.shape == (0,)


@compiled
def test_few_and_none(tier):
    for tokens, n, words in ((0, 16, 50), (3, 0, 9), (0, 0, 1), (1, 1, 1)):
        hidden, weight = torch.ones(tokens, n).bfloat16(), torch.ones(words, n).bfloat16()
        labels = torch.zeros(tokens, dtype=torch.int64)
        losses, lse = FORWARD(hidden, weight, labels, -100, 1)
        torch.testing.assert_close(losses, torch.full((tokens,), math.log(words)))
        dhidden, dweight = BACKWARD(torch.ones(tokens), hidden, weight, labels, lse, -100, 1, True, True)
        assert dhidden.shape == hidden.shape and dweight.shape == weight.shape
        assert (dhidden == 0).all() and (dweight == 0).all()


@compiled
def test_wrong_tensors_are_told():
    hidden, weight, labels = inputs(dtype=torch.float32, grad=False)
    lse = torch.ones(23)
    for wrong in ((hidden[:, :3], weight, labels), (hidden, weight, labels.int()), (hidden, weight.double(), labels)):
        with pytest.raises(RuntimeError, match="must be"):
            FORWARD(*wrong, -100, 0)
    for dlosses in (lse.double(), lse[:4]):
        with pytest.raises(RuntimeError, match="dlosses and lse must be"):
            BACKWARD(dlosses, hidden, weight, labels, lse, -100, 0, True, True)


# ---- torch ----


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_cross_entropy_triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(op, dtype):
    if op.endswith("triton") and mk.backends()["triton"] is not None:
        pytest.skip(mk.backends()["triton"])
    hidden, weight, labels = inputs(dtype=dtype)
    torch.library.opcheck(getattr(torch.ops.mistral_kernels, op).default, (hidden, weight, labels, -100, 5))


def test_opcheck_backward():
    hidden, weight, labels = inputs(grad=False)
    op = torch.ops.mistral_kernels.linear_cross_entropy_backward.default
    for needs in ((True, True), (True, False), (False, True)):
        seed, lse = fill((23,)), fill((23,), seed=1)
        torch.library.opcheck(op, (seed, hidden, weight, labels, lse, -100, 0, *needs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_is_eager(reduction):
    def loss(h, w, labels):
        return mk.linear_cross_entropy(h, w, labels, reduction=reduction).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 14):
        hidden, weight, labels = inputs(tokens=tokens)
        expected, got = loss(hidden, weight, labels), compiled(hidden, weight, labels)
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients(expected, hidden, weight), gradients(got, hidden, weight), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_casts_as_linear_does(impl):
    hidden, weight, labels = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mk.linear_cross_entropy(hidden, weight, labels, impl=impl)
        theirs = torch_loss(hidden, weight, labels)
    assert loss.dtype == theirs.dtype == torch.float32
    cast = mk.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, impl=impl)
    torch.testing.assert_close(loss, cast, rtol=1e-6, atol=0)
    assert not torch.equal(loss, mk.linear_cross_entropy(hidden, weight, labels, impl=impl))
    assert all(g.dtype == torch.float32 for g in gradients(loss, hidden, weight))


# ---- memory ----


def peak_memory(impl: str | None, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes by which loss and gradients raise the largest resident size of this process."""
    hidden, weight, labels = inputs
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    gradients(mk.linear_cross_entropy(hidden, weight, labels, impl=impl), hidden, weight)
    return resident()[1] - before


def resident() -> tuple[int, int]:
    """Resident bytes now and at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


MEASURE = """
import json
import test_linear_cross_entropy as tests
given = tests.inputs(tokens=2048, n=32, vocabulary=8192, dtype=tests.torch.float32)
tests.peak_memory(None, given)  # pays for threads and kernels
print(json.dumps([min(tests.peak_memory(impl, given) for _ in range(5)) for impl in (None, "reference")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_logits_of_all_tokens_never_exist():
    """2048 tokens by 8192 words are 64 MiB of float32 logits; eager holds three times that, the chunks a fraction.

    In a process of its own: memory that other tests freed would be taken again unseen, or given back meanwhile. The
    least of five, since what the allocator gives back between two runs is faulted in again by the next.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    fused, eager = json.loads(done.stdout)
    logits = 2048 * 8192 * 4
    assert eager > 1.9 * logits
    assert fused < 0.5 * logits < 0.25 * eager


def test_default_chunks():
    """Never more logits than the budget; an eighth of the tokens; whole up to 128; else what is given; even parts."""
    assert chunked.rows_of_chunk(8192, 32768, 0) == 1024
    assert chunked.rows_of_chunk(4096, 32768, 0) == 512
    assert chunked.rows_of_chunk(100, 32768, 0) == 100
    assert chunked.rows_of_chunk(2**20, 10**6, 0) == 128
    assert chunked.rows_of_chunk(98, 32768, 7) == 7
    assert chunked.rows_of_chunk(100, 32768, 700) == 100
    assert chunked.rows_of_chunk(130, 32768, 0) == chunked.rows_of_chunk(130, 32768, 128) == 65
    assert chunked.rows_of_chunk(2000, 49152, 0, chunked.ON_GPU) == 2000
    assert chunked.rows_of_chunk(8192, 128256, 0, chunked.ON_GPU) == 2048
    assert chunked.rows_of_chunk(16384, 32000, 0, chunked.ON_GPU) == 4096
