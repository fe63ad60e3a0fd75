"""The ring cache of int8 codes: what is written, and attention over it, in every implementation usable here."""

import functools

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.ring_cache.int8 import dequantise, quantise
from mistral_kernels.testing import assert_parity, cached_case, fill

IMPLS = [name for name, reason in mk.backends().items() if reason is None and name != "cuda"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def device_of(impl):
    return DEVICE if impl == "triton" else "cpu"


def skip_interpreted_bf16(impl, dtype):
    if impl == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")


def rings(batch, slots, kv_heads, dim, device="cpu", scales=torch.float32):
    codes = [torch.full((batch, slots, kv_heads, dim), 99, dtype=torch.int8, device=device) for _ in range(2)]
    return (*codes, *(torch.full((batch, slots, kv_heads), 7.0, dtype=scales, device=device) for _ in range(2)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_a_code_is_at_most_half_a_step_off(kind, dtype):
    x = fill((5, 3, 40), kind).to(dtype)
    x[1, 2] = 0
    codes, scale = quantise(x)
    assert codes.abs().max() <= 127 and (codes.abs().amax(-1)[scale > 0] == 127).all()
    error = (dequantise(codes, scale, torch.float64) - x.double()).abs()
    assert (error <= scale[..., None].double() * 0.5 * (1 + 1e-5)).all()
    assert not codes[1, 2].any() and scale[1, 2] == 0


def test_what_is_no_number_does_not_come_back_as_one():
    x = torch.ones(3, 1, 8)
    x[0, 0, 3], x[1, 0, 3] = torch.nan, torch.inf
    codes, scale = quantise(x)
    back = dequantise(codes, scale, torch.float32)
    assert back[0].isnan().all() and not back[1].isfinite().any() and back[2].isfinite().all()


def written(impl, lengths, before, slots, kv_heads, dim, dtype, packed=True):
    """The rings after a chunk of each sequence, with and without `impl`."""
    device, tokens = device_of(impl), sum(lengths)
    k, v = (fill((tokens, kv_heads, dim), seed=s).to(device, dtype) for s in (1, 2))
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    positions = torch.cat([torch.arange(b, b + n) for b, n in zip(before, lengths, strict=True)]).to(device)
    found = []
    for which in (impl, "reference"):
        ring = rings(len(lengths), slots, kv_heads, dim, device)
        mk.write_kv(k, v, *ring[:2], positions, ends, k_scale=ring[2], v_scale=ring[3], impl=which)
        found.append(ring)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 40, 128])
def test_every_implementation_writes_the_same_bits(impl, dtype, dim):
    skip_interpreted_bf16(impl, dtype)
    ours, eager = written(impl, [5, 0, 1, 37], [0, 3, 77, 4], 16, 3, dim, dtype)
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)
    assert (eager[0][1] == 99).all() and (eager[2][1] == 7).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_instruction_sets_write_the_same_bits(dtype):
    x = fill((64, 3, 59), seed=3).to(dtype) * torch.logspace(-30, 30, 64)[:, None, None].to(dtype)
    x[1], x[2, 1], x[3, 0, 7], x[4, 2, 58] = 0, torch.finfo(dtype).smallest_normal / 4, torch.inf, torch.nan
    x[5, 0] = torch.arange(59) - 29.5  # halves, rounded to even, where the largest is 127
    x[5, 0, 0] = 127
    codes, scale = quantise(x)
    for tier in testing.isa_tiers():
        for layout in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
            ring = [layout(t) for t in rings(64, 2, 3, 59, scales=scale.dtype)]
            with testing.isa(tier):
                positions = torch.arange(64)[:, None]
                mk.write_kv(x[:, None], x[:, None], *ring[:2], positions, k_scale=ring[2], v_scale=ring[3], impl="cpu")
            at = torch.arange(64), torch.arange(64) % 2
            for found_codes, found_scale in zip(ring[:2], ring[2:], strict=True):
                assert torch.equal(found_codes[at], codes), tier
                torch.testing.assert_close(found_scale[at], scale, rtol=0, atol=0, equal_nan=True)


def test_torch_ops_stand_in_for_the_library():
    from mistral_kernels.ring_cache import int8

    made = cached_case([5, 1], [3, 70], 16, 6, 2, 24, 16, codes=True).arguments(torch.float32)
    rest = (made["seq_lens"], 16, 0.2, made["k_new"], made["v_new"], made["cu_seqlens"], 5, False)
    caches = [made[n] for n in ("k_cache", "v_cache", "k_scale", "v_scale")]
    expected = int8.eager_attention(made["q"], *caches, *rest)
    torch.testing.assert_close(int8._attention(made["q"], *caches, *rest), expected)
    positions = torch.tensor([3, 4, 5, 6, 7, 70])
    ours, eager = ([t.clone() for t in caches] for _ in range(2))
    for write, ring in ((int8._write, ours), (int8._eager_write, eager)):
        write(made["k_new"], made["v_new"], *ring, positions, made["cu_seqlens"])
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_write_in_one_are_both_in_turn(impl, dtype, interleaved):
    skip_interpreted_bf16(impl, dtype)
    device = device_of(impl)
    cos, sin = (t.to(device) for t in mk.rope_table(40, 1e4, 64))
    q, k, v = (fill((2, 5, h, 40), seed=s).to(device, dtype) for s, h in enumerate((6, 2, 2)))
    positions = torch.tensor([[7, 8, 9, 10, 11], [3, 4, -1, -1, -1]], device=device)
    ring = rings(2, 8, 2, 40, device)
    q1, k1 = mk.rope_write_kv(
        q, k, v, *ring[:2], positions, cos, sin, interleaved=interleaved, k_scale=ring[2], v_scale=ring[3], impl=impl
    )
    plain = [torch.zeros(2, 8, 2, 40, dtype=dtype, device=device) for _ in range(2)]
    q2, k2 = mk.rope_write_kv(q, k, v, *plain, positions, cos, sin, interleaved=interleaved, impl=impl)
    assert torch.equal(q1, q2) and torch.equal(k1, k2)
    again = rings(2, 8, 2, 40, device)
    mk.write_kv(k1, v, *again[:2], positions, k_scale=again[2], v_scale=again[3], impl="reference")
    for a, b in zip(ring, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 80, 256])
def test_attention_parity(impl, dtype, dim):
    skip_interpreted_bf16(impl, dtype)
    if (impl, dtype, dim) == ("triton", torch.float32, 256):
        dim = 128  # beyond, the interpreter's float32 products add up in an order that costs more than the budget
    judge = functools.partial(assert_parity, dtype=dtype, impl=impl, device=device_of(impl))
    judge(cached_case([1, 1, 1], [1, 64, 999], 64, 6, 2, dim, window=64, chunk=False, codes=True))
    judge(cached_case([19, 2, 0], [0, 70, 5], 64, 7, 1, dim, window=30, codes=True))


@pytest.mark.parametrize("kind", testing.KINDS)
def test_attention_of_other_values(impl, kind):
    assert_parity(
        cached_case([20, 1, 7], [1, 64, 100], 64, 4, 2, 16, 40, codes=True),
        torch.float32, impl, device=device_of(impl), kind=kind,
    )  # fmt: skip


def test_slots_outside_the_window_are_not_read(impl):
    device = device_of(impl)
    k, v = (fill((1, 64, 2, 16), seed=s).float() for s in (1, 2))
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    q, lens = fill((1, 1, 4, 16)).float().to(device), torch.tensor([100], dtype=torch.int32, device=device)
    run = functools.partial(mk.attention_cached, q, seq_lens=lens, window=10, impl=impl)
    ring = dict(k_cache=k.to(device), v_cache=v.to(device), k_scale=k_scale.to(device), v_scale=v_scale.to(device))
    clean = run(**ring)
    for name in ("k_scale", "v_scale"):  # positions 90..99 lie in slots 26..35
        ring[name][:, :26], ring[name][:, 36:] = torch.nan, torch.nan
    if impl != "triton":  # these read the whole ring; the window masks it
        ring["k_scale"].nan_to_num_(), ring["v_scale"].nan_to_num_()
    assert torch.equal(run(**ring), clean)


def test_bad_arguments():
    k = torch.zeros(1, 1, 2, 8)
    positions = torch.zeros(1, 1, dtype=torch.int64)
    codes_k, codes_v, k_scale, v_scale = rings(1, 4, 2, 8)
    write = functools.partial(mk.write_kv, k, k)
    with pytest.raises(ValueError, match="k_scale and v_scale"):
        write(codes_k, codes_v, positions)
    with pytest.raises(ValueError, match="v_scale is missing"):
        write(codes_k, codes_v, positions, k_scale=k_scale)
    with pytest.raises(ValueError, match=r"k_scale is \[1, 4, 2\] torch.float16"):
        write(codes_k, codes_v, positions, k_scale=k_scale.half(), v_scale=v_scale)
    with pytest.raises(TypeError, match=r"must be torch\.int8"):
        write(codes_k.float(), codes_v, positions, k_scale=k_scale, v_scale=v_scale)
    lens = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="k_scale and v_scale"):
        mk.attention_cached(k, codes_k, codes_v, lens)


def test_opcheck():
    ops = torch.ops.mistral_kernels
    k, positions = fill((2, 3, 2, 8)).float(), torch.arange(3).expand(2, 3)
    cos, sin = mk.rope_table(8, 1e4, 8)
    lens = torch.tensor([3, 3], dtype=torch.int32)
    for suffix in ("", "_triton") if "triton" in IMPLS else ("",):
        ring = rings(2, 4, 2, 8)
        torch.library.opcheck(getattr(ops, "write_kv_int8" + suffix).default, (k, k, *ring, positions, None))
        torch.library.opcheck(
            getattr(ops, "rope_write_kv_int8" + suffix).default,
            (k, k, k, *ring, positions, cos, sin, None, False),
        )
        torch.library.opcheck(
            getattr(ops, "attention_cached_int8" + suffix).default,
            (k, *ring, lens, 4, 1.0, None, None, None, 3, False),
        )


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("window", [None, 48])
def test_batch_invariance(impl, codes, window):
    """A sequence alone, among others, and beside one with a longer chunk: the same bits."""
    device, slots = device_of(impl), 1024
    lens = [1000, 70, 3, 500]
    q = fill((4, 1, 6, 16)).float().to(device)
    k, v = (fill((4, slots, 2, 16), seed=s).float().to(device) for s in (1, 2))
    ring = dict(k_cache=k, v_cache=v)
    if codes:
        (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        ring = dict(k_cache=k, v_cache=v, k_scale=k_scale, v_scale=v_scale)
    run = functools.partial(mk.attention_cached, window=window, batch_invariant=True, impl=impl)

    def of(rows, q=q, **more):
        seq_lens = torch.tensor([lens[r] for r in rows], dtype=torch.int32, device=device)
        return run(q, seq_lens=seq_lens, **{n: t[rows] for n, t in ring.items()}, **more)

    together = of([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(of([row], q[[row]])[0], together[row])
    # Packed beside a chunk of nine tokens.
    longer = torch.cat((q[0], fill((9, 6, 16), seed=9).float().to(device)))
    cu = torch.tensor([0, 1, 10], dtype=torch.int32, device=device)
    mixed = of([0, 3], longer, cu_seqlens=cu, max_seqlen=9)
    assert torch.equal(mixed[0], together[0, 0])
