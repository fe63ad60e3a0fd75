"""Autocast, as docs/torch.md defines it, for every op; a model with fused ops exported and packaged for C++."""

import pytest
import tiny
import torch
import torch.nn.functional as F

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill

IMPLS = [None, "reference"]
F32, BF16 = torch.float32, torch.bfloat16
COS, SIN = mk.rope_table(16, 1e4, 32)


def made(*shape, dtype=F32, seed=0):
    return fill(shape, seed=seed).to(dtype)


def autocast():
    return torch.autocast("cpu", BF16)


X, R, W = made(5, 32), made(5, 32, seed=1), made(32, seed=2)
Q, K, V = made(2, 7, 6, 16), made(2, 7, 2, 16, seed=1), made(2, 7, 2, 16, seed=2)
# The dtypes that come in are kept: what casts is the projections around these ops.
KEPT = {
    "rms_norm": lambda ops, d: ops.rms_norm(X.to(d), W),
    "add_rms_norm": lambda ops, d: ops.add_rms_norm(X.to(d), R.to(d), W),
    "swiglu": lambda ops, d: ops.swiglu(X.to(d), R.to(d)),
    "swiglu_packed": lambda ops, d: ops.swiglu_packed(X.to(d)),
    "rope": lambda ops, d: ops.rope(Q.to(d), K.to(d), COS, SIN),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_autocast_changes_nothing_in_what_is_no_product(name, dtype, impl):
    ops = mk.using(impl=impl)
    expected = KEPT[name](ops, dtype)
    with autocast():
        out = KEPT[name](ops, dtype)
    pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_attention_as_sdpa(impl):
    """And only its inputs: the softmax inside stays in float32, forward and backward."""
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    with autocast():
        out = mk.attention(*leaves, window=3, impl=impl)
        theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (Q, K, V)), enable_gqa=True)
        if impl is None:  # torch's own gradients are not for use under autocast: it casts their products
            gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    if impl is not None:
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert out.dtype == theirs.dtype == BF16
    cast = [t.detach().to(BF16).requires_grad_() for t in leaves]
    expected = mk.attention(*cast, window=3, impl=impl)
    assert torch.equal(out, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected.float().square().sum(), cast), strict=True):
        assert a.dtype == F32 and torch.equal(a, b.float())


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_alone(impl):
    with autocast():
        out = mk.attention(Q.double(), K.double(), V.double(), impl=impl)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, mk.attention(Q.double(), K.double(), V.double(), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_and_the_ring(impl):
    case = testing.cached_case([5, 1], [0, 9], 8, 6, 2, 16, window=4)
    arguments = case.arguments(F32)
    expected = testing.call("attention_cached", arguments, impl)
    with autocast():
        out = testing.call("attention_cached", arguments, impl)
    assert all(torch.equal(out[n], expected[n]) for n in out)


class Logits(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, tokens):
        return self.net(tokens)


def model():
    return Logits(tiny.model(sliding_window=5)).eval()


def test_export_of_the_model(one_thread):
    net, tokens = model(), tiny.tokens(2, 11)
    # Of 16 rows and fewer a linear layer has a kernel of its own, so that a graph is for few rows or for many.
    length = torch.export.Dim("length", min=9, max=200)
    with torch.no_grad():
        exported = torch.export.export(net, (tokens,), dynamic_shapes={"tokens": {1: length}})
        for n in (11, 30):
            tokens = tiny.tokens(2, n, seed=n)
            torch.testing.assert_close(exported.module()(tokens), net(tokens))
    names = {node.target.name() for node in exported.graph.nodes if hasattr(node.target, "name")}
    assert {f"mistral_kernels::{op}" for op in ("attention", "rope", "rms_norm", "add_rms_norm", "swiglu")} <= names


@pytest.mark.slow
def test_packaged_model_runs_and_agrees(one_thread, tmp_path):
    """AOTInductor: compiled ahead of time, loaded back from its package."""
    net, tokens = Logits(tiny.model(sliding_window=5, n_layers=1)).eval(), tiny.tokens(2, 11)
    with torch.no_grad():
        exported = torch.export.export(net, (tokens,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(packaged(tokens), net(tokens))
        other = tiny.tokens(2, 11, seed=1)
        torch.testing.assert_close(packaged(other), net(other))
