"""Linear layers on int8, int4 and NF4 weights: what quantising gives, what the public functions promise, gradients."""

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels.quant_linear import reference
from mistral_kernels.testing import fill

SCHEMES = ("int8", "w8a8", "int4", "nf4")
KINDS = [(s, g, a) for s in SCHEMES for g in (0, 32, 64, 128) for a in ((False, True) if s == "int4" else (False,))]


def weight(n=24, k=200, seed=1, size=1.0):
    return (fill((n, k), seed=seed) * size).float()


# ---- quantising ----


def test_packing_is_ggufs_order():
    codes = torch.randint(16, (3, 70), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = reference.pack(codes)
    assert packed.shape == (3, 48) and torch.equal(reference.unpack(packed, 70), codes)
    assert packed[1, 5] == codes[1, 5] | codes[1, 21] << 4 and packed[2, 16 + 3] == codes[2, 35] | codes[2, 51] << 4


def test_packing_equals_gguf():
    gguf = pytest.importorskip("gguf")
    w = weight(4, 96)
    raw = torch.from_numpy(gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_0)).view(4, 3, 18)
    scale = raw[..., :2].contiguous().view(torch.float16)[..., 0].float()
    codes = raw[..., 2:].reshape(4, -1)
    theirs = gguf.quants.dequantize(raw.reshape(4, -1).numpy(), gguf.GGMLQuantizationType.Q4_0)
    ours = reference.dequantise_int4(codes, scale, None, 32, 96, torch.float32)
    assert torch.equal(ours, torch.from_numpy(theirs))


@pytest.mark.parametrize("size", [1.0, 1e4, 1e-6, 1e30, 1e-30])
@pytest.mark.parametrize("scheme, group, asymmetric", KINDS)
def test_error_is_half_a_step(scheme, group, asymmetric, size):
    w = weight(size=size)
    w[2] = 0
    w[3, 64:128] = 0
    w[4] = size
    q = mk.quantize_weight(w, scheme, group, asymmetric)
    assert q.shape == w.shape and q.scale.dtype == torch.float32 and q.scale.isfinite().all()
    found = q.dequantize()
    steps = reference.spread(q.scale.abs(), group, 200)
    # int4 may clip what a finer step for the others is worth; nf4's widest step is 0.3 of its scale.
    allowed = {"int8": 0.501, "w8a8": 0.501, "int4": 3.0, "nf4": 0.16}[scheme]
    assert ((found - w).abs() <= allowed * steps + 1e-6 * w.abs()).all()
    assert not found[2].any()
    if group in (32, 64):
        assert not found[3, 64:128].any()
    relative = ((found - w) / size).square().mean().sqrt()
    assert relative < {"int8": 0.01, "w8a8": 0.01, "int4": 0.16, "nf4": 0.13}[scheme]


def test_int4_is_no_worse_than_without_the_search():
    """llama.cpp's Q4_0 takes the first of the steps that are tried here."""
    gguf = pytest.importorskip("gguf")
    w = weight(64, 256)
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0
    )
    ours = mk.quantize_weight(w, "int4", 32).dequantize()
    assert (ours - w).square().mean() < 0.97 * (torch.from_numpy(theirs) - w).square().mean()


def test_nf4_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(16, 128)
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(mk.quantize_weight(w, "nf4", 64).dequantize(), theirs, rtol=1e-6, atol=1e-7)


BAD_WEIGHTS = {
    "scheme": (lambda: mk.quantize_weight(weight(), "int3"), ValueError, "scheme is 'int3'; it must be one of 'int8'"),
    "group": (lambda: mk.quantize_weight(weight(), "int4", 48), ValueError, "group_size is 48"),
    "dtype": (lambda: mk.quantize_weight(torch.ones(3, 4, dtype=torch.int8)), TypeError, "weight is torch.int8"),
    "shape": (lambda: mk.quantize_weight(torch.ones(3)), ValueError, r"weight is \[3\]; it must be \[N, K\]"),
    "asymmetric": (lambda: mk.quantize_weight(weight(), asymmetric=True), ValueError, "asymmetric is for int4"),
    "nan": (lambda: mk.quantize_weight(torch.full((2, 3), torch.nan)), ValueError, "not finite"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(name):
    call, error, words = BAD_WEIGHTS[name]
    with pytest.raises(error, match=words):
        call()


# ---- the ops ----


@pytest.mark.parametrize("scheme, group, asymmetric", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reference_is_the_dequantised_product(scheme, group, asymmetric, dtype):
    q, x = mk.quantize_weight(weight(), scheme, group, asymmetric), fill((2, 3, 200)).to(dtype)
    out = mk.linear_quantized(x, q, impl="reference")
    if scheme == "w8a8":
        step = x.abs().amax(-1, keepdim=True).to(out.dtype if dtype == torch.float64 else torch.float32) / 127
        x = (x / step).round() * step
    expected = torch.nn.functional.linear(x.double(), q.dequantize(torch.float64))
    exact = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(out.double(), expected, rtol=exact, atol=20 * max(exact, 2e-8))


@pytest.mark.parametrize("scheme, group, asymmetric", KINDS)
def test_default_implementation(scheme, group, asymmetric):
    q, bias = mk.quantize_weight(weight(), scheme, group, asymmetric), fill((24,), seed=3).float()
    for lead in ((1,), (5,), (2, 20), (0,), ()):
        x = fill((*lead, 200)).float()
        out = mk.linear_quantized(x, q, bias)
        assert out.is_contiguous() and out.shape == (*lead, 24)
        torch.testing.assert_close(out, mk.linear_quantized(x, q, bias, impl="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("scheme, group, asymmetric", KINDS)
def test_gradient_of_x_and_bias(scheme, group, asymmetric, impl):
    q = mk.quantize_weight(weight(), scheme, group, asymmetric)
    x, bias = fill((5, 200)).float().requires_grad_(), fill((24,)).float().requires_grad_()
    dy = fill((5, 24), seed=4).float()
    dx, db = torch.autograd.grad(mk.linear_quantized(x, q, bias, impl=impl), (x, bias), dy)
    torch.testing.assert_close(dx, dy @ q.dequantize())
    torch.testing.assert_close(db, dy.sum(0))
    assert torch.equal(torch.autograd.grad(mk.linear_quantized(x, q, impl=impl), x, dy)[0], dx)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_gradcheck(scheme):
    q = mk.quantize_weight(weight(4, 40), scheme, 32)
    x, bias = fill((3, 40)).requires_grad_(), fill((4,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mk.linear_quantized(a, q, b), (x, bias))


@pytest.mark.parametrize("scheme, group, asymmetric", KINDS)
def test_opcheck(scheme, group, asymmetric):
    q = mk.quantize_weight(weight(), scheme, group, asymmetric)
    name = "linear_w8a8" if scheme == "w8a8" else f"linear_{scheme}"
    x = fill((3, 200)).float().requires_grad_()
    middle = (q.offset,) if scheme == "int4" else ()
    op = getattr(torch.ops.mistral_kernels, name).default
    torch.library.opcheck(op, (x, q.codes, q.scale, *middle, None, group))


def test_compiled():
    for scheme in SCHEMES:
        q = mk.quantize_weight(weight(), scheme)
        run = torch.compile(lambda x, q=q: mk.linear_quantized(x, q), fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 40):
            x = fill((rows, 200)).float()
            torch.testing.assert_close(run(x), mk.linear_quantized(x, q))


def test_autocast_takes_x_in_its_dtype():
    q, x = mk.quantize_weight(weight()), fill((3, 200)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.linear_quantized(x, q, torch.ones(24)).dtype == torch.bfloat16


def test_int8_activations_of_strange_rows():
    q = mk.quantize_weight(weight(3, 40), "w8a8")
    x = torch.ones(4, 40)
    x[1] = 0
    x[2, 3], x[3, 5] = torch.nan, torch.inf
    out = mk.linear_quantized(x, q)
    assert out[0].isfinite().all() and not out[1].any() and out[2].isnan().all()
    assert not out[3].isfinite().any()


Q8, Q4 = mk.quantize_weight(weight(3, 40)), mk.quantize_weight(weight(3, 70), "int4", 32)
X = torch.ones(2, 40)
BAD = {
    "x": (lambda: mk.linear_int8([1.0], Q8.codes, Q8.scale), TypeError, "x must be a tensor, not list"),
    "inner": (
        lambda: mk.linear_int8(X[:, :9], Q8.codes, Q8.scale),
        ValueError,
        r"x is \[2, 9\]; with codes \[3, 40\] it must be \[..., 40\]",
    ),
    "inner4": (
        lambda: mk.linear_int4(X[:, :9], Q4.codes, Q4.scale, group_size=32),
        ValueError,
        r"x is \[2, 9\]; with codes \[3, 48\] it must be \[..., K with 16",
    ),
    "codes": (lambda: mk.linear_int8(X, Q8.codes.float(), Q8.scale), TypeError, "codes must be a tensor of int8"),
    "codes4": (lambda: mk.linear_nf4(X, Q8.codes, Q8.scale), TypeError, "codes must be a tensor of uint8"),
    "scale": (lambda: mk.linear_int8(X, Q8.codes, Q8.scale[:2]), ValueError, r"scale is \[2, 1\]; .* be \[3, 1\]"),
    "scale dtype": (lambda: mk.linear_int8(X, Q8.codes, Q8.scale.half()), TypeError, "scale is torch.float16"),
    "group": (lambda: mk.linear_int8(X, Q8.codes, Q8.scale, None, 20), ValueError, "group_size is 20"),
    "bias": (lambda: mk.linear_int8(X, Q8.codes, Q8.scale, torch.ones(2)), ValueError, r"bias is \[2\]; .* be \[3\]"),
    "activations": (
        lambda: mk.linear_int8(X, Q8.codes, Q8.scale, activations="int4"),
        ValueError,
        "activations is 'int4'",
    ),
    "gradient": (
        lambda: mk.linear_int8(X, Q8.codes, Q8.scale.clone().requires_grad_()),
        NotImplementedError,
        "scale requires one",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty(scheme, impl):
    """No outputs, no rows, and sums of nothing."""
    none, some = mk.quantize_weight(torch.empty(0, 40), scheme), mk.quantize_weight(torch.ones(3, 40), scheme)
    assert mk.linear_quantized(X, none, impl=impl).shape == (2, 0) and none.dequantize().shape == (0, 40)
    assert mk.linear_quantized(torch.empty(0, 40), some, impl=impl).shape == (0, 3)
    narrow = mk.quantize_weight(torch.empty(3, 0), scheme)
    out = mk.linear_quantized(torch.empty(2, 0), narrow, torch.arange(3.0), impl=impl)
    assert torch.equal(out, torch.arange(3.0).expand(2, 3)) and narrow.dequantize().shape == (3, 0)
