"""Attention in its production configurations: tensor cores, 16-byte or TMA copies, the order of waits on Hopper."""

import re

import torch
from triton_aot import Spec, main_loop

from mistral_kernels.attention import triton_forward as forward
from mistral_kernels.ring_cache import triton_attention as cached

BF16, F32 = torch.bfloat16, torch.float32
# D=256 reloads one value a block under Triton 3.9, and is still 10% faster on an H100 than the form that does not.
D256 = dict(mma=True, reloads=1)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _forward(dim, dtype=BF16, window=4096, causal=True, packed=False, tma=True, family=None):
    """q, k and v are views of one packed projection of 32 heads over 8."""

    def launch(capability):
        choice = forward.production_config if tma else forward.without_tma
        config = choice(family or capability, dim, dtype.itemsize)
        lead = (8192,) if packed else (2, 4096)
        qkv = meta(*lead, 48, dim, dtype=dtype)
        q, k, v = qkv.split((32, 8, 8), dim=-2)
        cu = meta(9, dtype=torch.int32) if packed else None
        return forward.attention(q, k, v, window, dim**-0.5, causal, cu, cu, lead[-1], lead[-1], config=config)

    return launch


def _cached(dim, queries=1, chunk=False, packed=False, dtype=BF16, batch=1, family=None):
    def launch(capability):
        lead = (batch * queries,) if packed else (batch, queries)
        q, new = meta(*lead, 32, dim, dtype=dtype), meta(*lead, 8, dim, dtype=dtype)
        cache, lens = meta(batch, 4096, 8, dim, dtype=dtype), meta(batch, dtype=torch.int32)
        config = cached.production_config(family or capability, dim, dtype.itemsize, queries * 4)
        cut = cached.plan(config, batch, 8, 4, dim, queries, 4096, 4096)
        cu = meta(batch + 1, dtype=torch.int32) if packed else None
        k, v = (new, new) if chunk else (None, None)
        return cached.attention_cached(q, cache, cache, lens, 4096, dim**-0.5, k, v, cu, queries, False, cut)

    return launch


def _copies(report):
    """Keys and values reach shared memory by TMA or in pieces of 16 bytes."""
    loop = main_loop(report)
    narrow = [n for n in report["count"] if re.fullmatch(r"LDGSTS\.(8|16|32|64)", n)]
    wrong = [f"narrow copies: {narrow}"] if narrow else []
    return wrong if loop.get("UTMALDG") or loop.get("LDGSTS.128") else [*wrong, f"no wide copies: {loop}"]


def hopper_order(ptx):
    """The matrix products, waits for them and exponentials of each loop, as runs: `H8 W1 H8 E66`."""
    orders = []
    for label, body in re.findall(r"^(\$L__BB\d+_\d+):(.*?)(?=^\$L__BB|\Z)", ptx, flags=re.S | re.M):
        if f"bra \t{label};" not in body and f"bra {label};" not in body:
            continue
        events = re.findall(r"wgmma\.(m|w)\w+|(ex2)\.", body)
        letters = "".join("E" if e else {"m": "H", "w": "W"}[k] for k, e in events)
        orders.append(" ".join(f"{run[0]}{len(run)}" for run, _ in re.findall(r"((.)\2*)", letters)))
    return [order for order in orders if "H" in order]


def _in_flight(report, ptx):
    """The product with V must still be running during the exponentials: one wait a block, before it."""
    orders = hopper_order(ptx)
    fine = orders and all(re.fullmatch(r"H\d+ W1 H\d+ E\d+", order) for order in orders)
    return [] if fine else [f"the order in the loops is {orders}"]


def _lag(report, ptx):
    return _copies(report) + (_in_flight(report, ptx) if report["capability"] == 90 else [])


def _plain(report, ptx):
    return _copies(report)


def _decode(report, ptx):
    """One row tile of 16 is too small for wgmma and tcgen05: HMMA on every GPU. The merge has no product."""
    if report["kernel"] == "combine":
        return []
    return _copies(report) + ([] if main_loop(report).get("HMMA") else ["no HMMA in the loop"])


SPECS = [
    Spec("attention D64", _forward(64), mma=True, check=_lag),
    Spec("attention D128", _forward(128), mma=True, check=_lag),
    Spec("attention D256", _forward(256), check=_lag, **D256),
    Spec("attention D128 packed", _forward(128, packed=True), mma=True, check=_lag),
    Spec("attention D64 packed", _forward(64, packed=True), mma=True, check=_lag, slow=True),
    Spec("attention D256 packed", _forward(256, packed=True), check=_lag, slow=True, **D256),
    Spec("attention D128 no window", _forward(128, window=0), mma=True, check=_lag, slow=True),
    Spec("attention D128 not causal", _forward(128, window=0, causal=False), mma=True, check=_lag, slow=True),
    Spec("attention D96", _forward(96), mma=True, check=_lag, slow=True),
    Spec("attention D80 packed", _forward(80, packed=True), mma=True, check=_lag, slow=True),
    Spec("attention D128 without TMA", _forward(128, tma=False), (90, 100), mma=True, check=_plain),
    Spec("attention D256 without TMA", _forward(256, tma=False), (90, 100), mma=True, check=_plain, slow=True),
    Spec("attention D64 sm_86", _forward(64, family=86), (80,), mma=True, check=_plain, slow=True),
    Spec("attention D128 sm_86", _forward(128, family=86), (80,), mma=True, check=_plain, slow=True),
    Spec("attention D256 sm_86", _forward(256, family=86), (80,), mma=True, check=_plain, slow=True),
    Spec("attention D64 float32", _forward(64, F32)),
    Spec("attention D128 float32", _forward(128, F32), slow=True),
    Spec("attention D256 float32", _forward(256, F32), slow=True),
    Spec("decode D64", _cached(64), check=_decode),
    Spec("decode D128", _cached(128), check=_decode),
    Spec("decode D256", _cached(256), check=_decode),
    Spec("decode D128 batch 64", _cached(128, batch=64), check=_decode, slow=True),
    Spec("decode D96", _cached(96), check=_decode, slow=True),
    Spec("decode D128 8 queries", _cached(128, 8, True), check=_decode, slow=True),
    Spec("decode D128 float32", _cached(128, dtype=F32)),
    Spec("decode D64 float32", _cached(64, dtype=F32), slow=True),
    Spec("decode D256 float32", _cached(256, dtype=F32), slow=True),
    Spec("chunk D64", _cached(64, 512, True), mma=True, check=_plain, slow=True),
    Spec("chunk D128 packed", _cached(128, 512, True, True, batch=4), mma=True, check=_plain),
    Spec("chunk D256", _cached(256, 512, True), mma=True, check=_plain, slow=True),
    Spec("chunk D96 packed", _cached(96, 512, True, True, batch=4), mma=True, check=_plain, slow=True),
    Spec("chunk D128 float32", _cached(128, 512, True, dtype=F32), slow=True),
    Spec("chunk D128 sm_86", _cached(128, 512, True, family=86), (80,), mma=True, check=_plain, slow=True),
    Spec("chunk D256 sm_86", _cached(256, 512, True, family=86), (80,), mma=True, check=_plain, slow=True),
]
