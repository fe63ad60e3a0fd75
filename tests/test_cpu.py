"""The C++ kernels of the elementwise ops, on every instruction set that this processor has."""

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing

OPS = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope", "write_kv", "rope_write_kv")
ALL_DTYPES = (*testing.DTYPES, torch.float64)

pytestmark = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")


def tails():
    """Lengths around every vector width, alone and several rows of them."""
    for n in (1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 257, 1023, 1025):
        yield testing.norm_case((3, n))
        yield testing.add_norm_case((2, n), "fp32")
        yield testing.swiglu_case((2, n))
        yield testing.swiglu_packed_case((3, 2 * n))
    for dim in (2, 6, 14, 18, 34, 62, 66, 130):
        yield testing.rope_case(2, 3, 2, 1, dim)
        yield testing.rope_case(None, 3, 2, 1, dim, interleaved=True, first=5)
        yield testing.rope_write_case([1, 4], [3, 0], 3, 2, 2, dim)
        yield testing.write_case([1, 4], [3, 0], 3, 2, dim - 1)
    yield testing.norm_case((2, 262144))


CASES = [c for c in testing.cases() if c.op in OPS]


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parity(tier, op, dtype):
    """Over the tiers and dtypes every case meets every kind of values."""
    shift = testing.isa_tiers().index(tier) + testing.DTYPES.index(dtype)
    for i, case in enumerate(c for c in CASES if c.op == op):
        testing.assert_parity(case, dtype, "cpu", kind=testing.KINDS[(i + shift) % len(testing.KINDS)])


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_parity_of_tails(tier, dtype):
    for case in tails():
        testing.assert_parity(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_in_a_batch(tier, dtype):
    """Rows of the norm go through it in pairs, or with the next one's sum, or one by one, by their length and place."""
    for n in (1000, 1027, 2050, 4097, 8195):
        x, weight = testing.fill((5, n), seed=n).to(dtype), testing.fill((n,), seed=1).to(dtype)
        x *= torch.arange(1, 6)[:, None]
        for rounding in ("model", "fp32"):
            alone = [mk.rms_norm(row, weight, rounding=rounding, impl="cpu") for row in x]
            assert torch.equal(mk.rms_norm(x, weight, rounding=rounding, impl="cpu"), torch.stack(alone)), (n, rounding)


@pytest.mark.parametrize("op", OPS)
def test_float64_equals_eager(tier, op):
    for case in (c for c in (*CASES, *tails()) if c.op == op):
        arguments = case.arguments(torch.float64)
        eager, out = (testing.call(op, arguments, impl) for impl in ("reference", "cpu"))
        for name, expected in eager.items():
            scale = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(out[name], expected, rtol=1e-15, atol=1e-15 * scale, msg=f"{case.label} {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["model", "fp32"])
def test_float32_weight_gives_float32(tier, dtype, rounding):
    x, residual = (testing.fill((3, 131), seed=s).to(dtype) for s in (0, 1))
    weight = testing.fill((131,), seed=2).float()
    for out, eager in zip(
        (mk.rms_norm(x, weight, rounding=rounding), *mk.add_rms_norm(x, residual, weight, rounding=rounding)),
        (
            mk.reference.rms_norm(x, weight, rounding=rounding),
            *mk.reference.add_rms_norm(x, residual, weight, rounding=rounding),
        ),
        strict=True,
    ):
        assert out.dtype == eager.dtype
        torch.testing.assert_close(out, eager, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(tier, dtype):
    """x * 1 through float32 and back; but the bf16 instruction of AVX512 takes subnormals for 0."""
    values = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    pairs, nowhere = values.view(-1, 1, 2), torch.zeros(32768, dtype=torch.int32)
    out, _ = mk.rope(pairs, pairs, torch.ones(1, 1), torch.zeros(1, 1), nowhere, impl="cpu")
    out, expected = out.view(-1, 2), values.view(-1, 2)
    if tier in ("avx512bf16", "amx") and dtype == torch.bfloat16:
        expected = torch.where(expected.abs() < torch.finfo(dtype).tiny, 0, expected)
    finite = expected.isfinite().all(-1)
    assert finite.sum() > 28000 and torch.equal(out[finite], expected[finite])
    assert out[~finite].isnan().any(-1).all()


def test_float32_rounds_to_16_bits_as_torch_does(tier):
    """Halfway cases and overflow: the sums of random bit patterns."""
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.randint(-32768, 32768, (64, 1024), generator=torch.Generator().manual_seed(0)).to(torch.int16)
        a = a.view(dtype)
        b = a.flip(0).roll(3, 1)
        total = mk.add_rms_norm(a, b, torch.ones(1024, dtype=dtype), impl="cpu")[1]
        expected = a + b
        subnormal = expected.abs() < torch.finfo(dtype).tiny  # 0 where the bf16 instruction rounds
        torch.testing.assert_close(total[~subnormal], expected[~subnormal], rtol=0, atol=0, equal_nan=True)


def test_silu_at_the_ends(tier):
    """Where exp overflows, is subnormal, or the gate is infinite or nan. Below -88.7 eager, too, gives 0 for 3e-37."""
    gate = torch.cat((torch.linspace(-110, 110, 2201), torch.tensor([-3e38, 3e38, torch.inf, torch.nan, 0.0, -0.0])))
    out = mk.swiglu(gate, torch.ones_like(gate), impl="cpu")
    truth = mk.swiglu(gate.double(), torch.ones_like(gate).double(), impl="reference")
    torch.testing.assert_close(out.double(), truth, rtol=5e-7, atol=3e-37, equal_nan=True)


def strided(t):
    """The values of `t` in layouts whose last dimension has stride 1: a slice of wider rows, and transposed."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 24), torch.nan, dtype=t.dtype)
    wide[..., 8 : 8 + t.shape[-1]] = t
    yield wide[..., 8 : 8 + t.shape[-1]]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0]  # stride 2: copied


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_layouts_change_nothing(tier, dtype):
    x, y = (testing.fill((4, 3, 5, 72), seed=s).to(dtype) for s in (0, 1))
    weight = testing.fill((72,), seed=2).to(dtype)
    cos, sin = mk.rope_table(72, 10_000.0, 16)
    positions = torch.tensor([[3, 1, 2]]).expand(4, 3)
    calls = {
        "rms_norm": lambda a, b: (mk.rms_norm(a, weight, impl="cpu"),),
        "add_rms_norm": lambda a, b: mk.add_rms_norm(a, b, weight, impl="cpu"),
        "swiglu": lambda a, b: (mk.swiglu(a, b, impl="cpu"),),
        "swiglu_packed": lambda a, b: (mk.swiglu_packed(a, impl="cpu"),),
        "rope": lambda a, b: mk.rope(a, b[:, :, :2], cos, sin, positions, impl="cpu"),
        "rope adjacent": lambda a, b: mk.rope(a, b[:, :, 2:], cos, sin, None, True, impl="cpu"),
    }
    for name, run in calls.items():
        expected = run(x, y)
        for a in strided(x):
            for b in strided(y):
                for got, want in zip(run(a, b), expected, strict=True):
                    assert got.is_contiguous() and torch.equal(got, want), name


def test_expanded_input(tier):
    row = testing.fill((1, 1, 96)).bfloat16()
    full = row.expand(3, 5, 96)
    weight = torch.ones(96, dtype=torch.bfloat16)
    assert torch.equal(mk.rms_norm(full, weight, impl="cpu"), mk.rms_norm(full.contiguous(), weight, impl="cpu"))
    assert torch.equal(mk.swiglu(full, row.expand(3, 5, 96), impl="cpu"), mk.swiglu(row, row).expand(3, 5, 96))


def test_packed_projection(tier):
    """q, k and v as views of one projection [B, S, (H + 2 Hkv) D], and caches that are views too."""
    qkv = testing.fill((2, 4, 10 * 32)).bfloat16()
    q, k, v = (t.unflatten(-1, (-1, 32)) for t in qkv.split((6 * 32, 2 * 32, 2 * 32), -1))
    cos, sin = mk.rope_table(32, 10_000.0, 16)
    positions = torch.arange(4, dtype=torch.int32).expand(2, 4)
    both = torch.zeros(2, 5, 2, 2, 32, dtype=torch.bfloat16)
    apart = [torch.zeros(2, 5, 2, 32, dtype=torch.bfloat16) for _ in range(2)]
    inside = mk.rope_write_kv(q, k, v, both[:, :, 0], both[:, :, 1], positions, cos, sin, impl="cpu")
    copied = mk.rope_write_kv(
        q.contiguous(), k.contiguous(), v.contiguous(), *apart, positions.contiguous(), cos, sin, impl="cpu"
    )
    assert all(torch.equal(a, b) for a, b in zip(inside, copied, strict=True))
    assert torch.equal(both[:, :, 0], apart[0]) and torch.equal(both[:, :, 1], apart[1])
    assert apart[0].any() and apart[1].any()


def test_cache_with_a_strided_last_dimension(tier):
    k = testing.fill((2, 3, 2, 8)).float()
    cache = torch.zeros(2, 4, 2, 8, 2)
    mk.write_kv(k, 2 * k, cache[..., 0], cache[..., 1], torch.arange(3).expand(2, 3), impl="cpu")
    assert torch.equal(cache[:, :3, ..., 0], k) and torch.equal(cache[:, :3, ..., 1], 2 * k)
    assert not cache[:, 3].any()


@pytest.mark.parametrize("op", OPS)
def test_inputs_stay_as_they_are_and_runs_agree(op):
    for case in (c for c in CASES if c.op == op):
        arguments = case.arguments(torch.bfloat16)
        before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        first, second = (testing.call(op, arguments, "cpu") for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in first)
        assert all(torch.equal(before[n], arguments[n]) for n in before)


def test_threads_and_streaming_change_nothing(tier):
    """Outputs over 16 MB are stored past the caches; each row is what it is alone."""
    x = testing.fill((4160, 1024)).float()
    weight = testing.fill((1024,), seed=1).float()
    whole = (mk.rms_norm(x, weight, impl="cpu"), mk.swiglu(x, x, impl="cpu"))
    rows = slice(4100, 4105)
    assert torch.equal(whole[0][rows], mk.rms_norm(x[rows], weight, impl="cpu"))
    residual = x.flip(0)
    added = mk.add_rms_norm(x, residual, weight, impl="cpu")
    few = mk.add_rms_norm(x[rows], residual[rows], weight, impl="cpu")
    assert all(torch.equal(a[rows], b) for a, b in zip(added, few, strict=True))
    assert torch.equal(whole[1][rows], mk.swiglu(x[rows], x[rows], impl="cpu"))
    q = x.view(4160, 16, 64)
    cos, sin = mk.rope_table(64, 10_000.0, 4160)
    alone = mk.rope(q[rows], q[rows], cos, sin, torch.arange(4100, 4105), impl="cpu")[0]
    assert torch.equal(mk.rope(q, q, cos, sin, impl="cpu")[0][rows], alone)


def test_empty_inputs():
    for shape in ((0, 8), (2, 0, 8)):
        x = torch.empty(shape)
        assert mk.rms_norm(x, torch.ones(8), impl="cpu").shape == shape
        assert mk.add_rms_norm(x, x, torch.ones(8), impl="cpu")[1].shape == shape
        assert mk.swiglu(x, x, impl="cpu").shape == shape
        assert mk.swiglu_packed(x, impl="cpu").shape == (*shape[:-1], 4)
    assert mk.swiglu_packed(torch.empty(3, 0), impl="cpu").shape == (3, 0)
    assert mk.rms_norm(torch.empty(3, 0), torch.empty(0), impl="cpu").shape == (3, 0)
    cos, sin = mk.rope_table(8, 10_000.0, 4)
    q, k, v = torch.empty(0, 3, 8), torch.empty(0, 2, 8), torch.empty(0, 2, 8)
    assert mk.rope(q, k, cos, sin, impl="cpu")[0].shape == q.shape
    caches = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    nowhere, cu = torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    assert mk.rope_write_kv(q, k, v, *caches, nowhere, cos, sin, cu, impl="cpu")[1].shape == k.shape
    mk.write_kv(k, v, *caches, nowhere, cu, impl="cpu")
    assert not caches[0].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_position_outside_the_tables(dtype):
    """The public functions look first; the kernel itself has to throw as well, before it writes a cache."""
    q = torch.ones(2, 1, 8)
    cos, sin = mk.rope_table(8, 10_000.0, 4)
    for bad in (-1, 4, 2**31 - 1):
        positions = torch.tensor([0, bad], dtype=dtype)
        with pytest.raises(RuntimeError, match=f"positions holds {bad}, .* positions 0 to 3"):
            torch.ops.mistral_kernels.rope(q, q, cos, sin, positions, False, False)
        if bad < 0:
            continue
        caches = torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 1, 8)
        with pytest.raises(RuntimeError, match=f"positions holds {bad}, .* positions 0 to 3"):
            torch.ops.mistral_kernels.rope_write_kv(q, q, q, *caches, positions, cos, sin, None, False)
        assert not caches[0].any() and not caches[1].any()


def test_idle_tokens(tier):
    q, kv = torch.ones(3, 2, 16), torch.ones(3, 1, 16)
    cos, sin = mk.rope_table(16, 10_000.0, 8)
    caches = torch.zeros(3, 4, 1, 16), torch.zeros(3, 4, 1, 16)
    positions = torch.tensor([5, -1, 2], dtype=torch.int32)
    rotated = mk.rope_write_kv(q, kv, kv, *caches, positions, cos, sin, impl="cpu")
    assert all(t[[0, 2]].abs().sum((1, 2)).all() and not t[1].any() for t in rotated)
    for cache in caches:
        assert cache.flatten(2).any(-1).nonzero().tolist() == [[0, 1], [2, 2]]


def test_ring_of_the_reference_implementation():
    """mistral-inference's example: chunks of 5, 7 and 2 tokens from positions 0, 1 and 3, three slots a sequence."""
    lengths, firsts, slots = (5, 7, 2), (0, 1, 3), 3
    tokens = torch.arange(1.0, 15.0)
    k = tokens.view(14, 1, 1).expand(14, 1, 8)
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(firsts, lengths, strict=True)])
    cu = torch.tensor([0, 5, 12, 14], dtype=torch.int32)
    caches = torch.zeros(3, slots, 1, 8), torch.zeros(3, slots, 1, 8)
    mk.write_kv(k, -k, *caches, positions, cu, impl="cpu")
    expected = torch.zeros(9)
    for token, slot in zip((2, 3, 4, 9, 10, 11, 12, 13), (2, 0, 1, 5, 3, 4, 6, 7), strict=True):
        expected[slot] = token + 1
    assert torch.equal(caches[0][..., 0, 0].flatten(), expected)
    assert torch.equal(caches[1], -caches[0])


def test_the_library_takes_the_best_instruction_set():
    tiers = testing.isa_tiers()
    with testing.isa(tiers[0]), testing.isa(tiers[-1]):
        pass
    with pytest.raises(NotImplementedError, match="no instruction set 'mmx'"), testing.isa("mmx"):
        pass
    assert testing.isa_tiers() == tiers
