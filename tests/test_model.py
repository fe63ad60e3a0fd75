"""The model: parity with Hugging Face, the window's edge, gradients, layouts, compilation."""

import copy

import pytest
import tiny
import torch

import mistral_kernels
from mistral.model import FullPass, Transformer
from mistral_kernels import reference

OPS = pytest.mark.parametrize("ops", [mistral_kernels, reference], ids=["fused", "reference"])
pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = pytest.mark.parametrize("window", [3, 8, None])


# ---- Hugging Face ----

NAMES = (
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
)


def hf_name(name: str) -> str:
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    if name.startswith("output"):
        return name.replace("output", "lm_head")
    return "model." + name.replace("tok_embeddings", "embed_tokens")


def hf_model(kind: str, net: Transformer):
    """The same weights in Hugging Face's eager model; its rotary layout is the model's own."""
    transformers = pytest.importorskip("transformers")
    c = net.config
    sizes = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta, **(c.rope_scaling or {})},
    )
    if kind == "Mistral":
        sizes["sliding_window"] = c.sliding_window
    config = getattr(transformers, kind + "Config")(**sizes, attn_implementation="eager")
    theirs = getattr(transformers, kind + "ForCausalLM")(config).to(net.dtype).eval()
    result = theirs.load_state_dict({hf_name(n): w for n, w in net.state_dict().items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if c.tie_embeddings else set())
    return theirs


def assert_close(got: torch.Tensor, truth: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert (got - truth).abs().max() < tolerance * truth.abs().max()


@OPS
@WINDOWS
@torch.inference_mode()
def test_logits_equal_mistral(ops, window):
    net = tiny.model(ops, sliding_window=window, rope_theta=5e4)
    tokens = tiny.tokens(2, 29)
    truth = hf_model("Mistral", net)(tokens).logits
    assert_close(net(tokens), truth)
    for chunk in {1, (window or 8) - 1, window or 8, (window or 8) + 1, 11}:
        for row, part in enumerate(tiny.through_cache(net, [tokens[0], tokens[1, :20]], chunk)):
            assert_close(part, truth[row, : len(part)])
    if window is not None:
        causal = tiny.model(ops, rope_theta=5e4)
        assert (causal(tokens) - truth).abs().max() > 0.02 * truth.abs().max()


LLAMAS = {
    "plain": {},
    "tied": dict(tie_embeddings=True, n_kv_heads=6),
    "llama3": dict(
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
}


@pytest.mark.parametrize("kind", LLAMAS)
@torch.inference_mode()
def test_logits_equal_llama(kind):
    # LlamaConfig takes no heads that do not divide the width.
    net = tiny.model(dim=48, **LLAMAS[kind])
    tokens = tiny.tokens(2, 40)
    assert_close(net(tokens), hf_model("Llama", net)(tokens).logits)


@torch.inference_mode()
def test_logits_equal_qwen2():
    net = tiny.model(attention_bias=True)
    tokens = tiny.tokens(2, 40)
    truth = hf_model("Qwen2", net)(tokens).logits
    assert_close(net(tokens), truth)
    without = copy.deepcopy(net)
    without.layers[1].attention.wv.bias.zero_()
    assert (without(tokens) - truth).abs().max() > 0.02 * truth.abs().max()


# ---- the window ----


@pytest.mark.parametrize("cached", [False, True])
@OPS
@torch.inference_mode()
def test_window_edge(ops, cached):
    """One layer: the key at distance W changes nothing, the one at W − 1 does."""
    window = 5
    net = tiny.model(ops, n_layers=1, sliding_window=window)

    def last(tokens: torch.Tensor) -> torch.Tensor:
        return tiny.through_cache(net, [tokens], 4)[0][-1] if cached else net(tokens[None])[0, -1]

    tokens = tiny.tokens(3 * window + 2)
    base = last(tokens)
    for distance, seen in ((window + 1, False), (window, False), (window - 1, True), (0, True)):
        changed = tokens.clone()
        changed[-1 - distance] = (changed[-1 - distance] + 1) % net.config.vocab_size
        assert torch.equal(last(changed), base) != seen, distance


@torch.inference_mode()
def test_layers_reach_further_than_one_window():
    """k layers see k · (W − 1) tokens back and not one more."""
    net = tiny.model(n_layers=3, sliding_window=4)
    tokens = tiny.tokens(1, 20)
    base = net(tokens)[0, -1]
    for distance, seen in ((9, True), (10, False)):
        changed = tokens.clone()
        changed[0, -1 - distance] = (changed[0, -1 - distance] + 1) % net.config.vocab_size
        assert torch.equal(net(changed)[0, -1], base) != seen


# ---- shapes of input and output ----


@OPS
@WINDOWS
@torch.inference_mode()
def test_packed_equals_dense(ops, window):
    net = tiny.model(ops, sliding_window=window)
    lengths = [13, 0, 1, 21]
    parts = [tiny.tokens(n, seed=i) for i, n in enumerate(lengths)]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = net(torch.cat(parts), cu_seqlens=cu)
    dense = [net(p[None])[0] for p in parts if len(p)]
    assert_close(packed, torch.cat(dense), 1e-5)
    assert_close(net(torch.cat(parts), cu_seqlens=cu, last_only=True), torch.stack([d[-1] for d in dense]), 1e-5)


@torch.inference_mode()
def test_packed_positions_start_again_with_each_sequence():
    """Together longer than the context, which none of the sequences is."""
    net = tiny.model(max_positions=16)
    parts = [tiny.tokens(16, seed=i) for i in range(3)]
    packed = net(torch.cat(parts), cu_seqlens=torch.tensor([0, 16, 32, 48], dtype=torch.int32))
    assert_close(packed, torch.cat([net(p[None])[0] for p in parts]), 1e-5)


@torch.inference_mode()
def test_last_and_float32():
    net = tiny.model(dtype=torch.bfloat16)
    tokens = tiny.tokens(2, 9)
    full = net(tokens)
    assert full.dtype == torch.bfloat16 and full.shape == (2, 9, 97)
    assert torch.equal(net(tokens, float32=True), full.float())
    assert net(tokens, last_only=True).shape == (2, 97)
    assert_close(net(tokens, last_only=True).float(), full[:, -1].float(), 2e-2)


def test_arguments_that_do_not_fit_raise():
    net = tiny.model(max_positions=16)
    cache = net.cache(2, 8)
    with pytest.raises(ValueError, match=r"it must be \[B, S\]"):
        net(tiny.tokens(5))
    with pytest.raises(ValueError, match="cu_seqlens"):
        net(tiny.tokens(1, 5), lengths=[5])
    with pytest.raises(ValueError, match="pass lengths"):
        net(tiny.tokens(5), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), cache=cache)
    with pytest.raises(ValueError, match=r"must be \[7\], packed"):
        net(tiny.tokens(5), cache=cache, lengths=[3, 4])
    with pytest.raises(ValueError, match="tables hold 16"):
        net(tiny.tokens(1, 17))
    with pytest.raises(NotImplementedError, match=r"torch\.no_grad"):
        net(tiny.tokens(2), cache=cache)
    with pytest.raises(ValueError, match="context of 16"):
        net.reserve_positions(17)


# ---- weights and tables ----


def test_state_dict_has_the_checkpoint_names():
    layer = {f"layers.0.attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")}
    layer |= {f"layers.0.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")}
    layer |= {"layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"}
    ends = {"tok_embeddings.weight", "norm.weight"}
    assert set(tiny.model(n_layers=1).state_dict()) == layer | ends | {"output.weight"}
    assert set(tiny.model(n_layers=1, tie_embeddings=True).state_dict()) == layer | ends


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rope_tables_are_never_rounded(dtype):
    """16 bits cannot hold the angles of long positions."""
    config = tiny.config(max_positions=131_072)
    net = Transformer(config).to(dtype)
    net = net.half() if dtype == torch.float16 else net.bfloat16()
    position = 131_071
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    assert net.rope.cos.dtype == net.rope.sin.dtype == torch.float32
    assert (net.rope.cos[position] - torch.cos(position * frequencies)).abs().max() < 1e-7
    assert (net.rope.sin[position] - torch.sin(position * frequencies)).abs().max() < 1e-7


def test_built_on_meta_the_tables_are_real():
    with torch.device("meta"):
        net = Transformer(tiny.CONFIG)
    weights = tiny.model().state_dict()
    net.load_state_dict(weights, strict=True, assign=True)
    tokens = tiny.tokens(1, 9)
    assert torch.equal(net(tokens), tiny.model()(tokens))
    assert torch.equal(net.to_empty(device="cpu").rope.cos, tiny.model().rope.cos)


def test_tables_follow_the_model_to_float64_and_back():
    net, exact = Transformer(tiny.CONFIG), Transformer(tiny.CONFIG)
    cos, _ = mistral_kernels.rope_table(16, 1e4, 256, dtype=torch.float64)
    exact.reset_tables(torch.float64)
    assert torch.equal(net.double().rope.cos, cos) and torch.equal(exact.rope.cos, cos)
    assert torch.equal(net.bfloat16().rope.cos, cos.float())


def test_copies_compute_the_same():
    net = tiny.model(mistral_kernels.using(impl="reference"))
    tokens = tiny.tokens(1, 9)
    assert torch.equal(copy.deepcopy(net)(tokens), net(tokens))


def test_a_window_lets_positions_pass_the_context():
    net = tiny.model(sliding_window=4, max_positions=16)
    with torch.inference_mode():
        net.reserve_positions(50)
        longer = tiny.model(sliding_window=4, max_positions=50)(tiny.tokens(1, 50))
        assert torch.equal(net(tiny.tokens(1, 50)), longer)
    net(tiny.tokens(1, 50)).sum().backward()  # the tables that were made within inference_mode can be saved


# ---- gradients ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [4, None])
def test_gradients_equal_the_reference(dtype, window):
    tokens, gradients = tiny.tokens(2, 19), []
    for ops in (mistral_kernels, reference):
        net = tiny.model(ops, dtype, sliding_window=window, attention_bias=True, tie_embeddings=True)
        loss = torch.nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert all(g.abs().max() > 0 for g in gradients[1].values() if g is not None)
    for name, truth in gradients[1].items():
        assert_close(gradients[0][name], truth, 1e-10 if dtype == torch.float64 else 1e-4)


def test_gradients_equal_hugging_face():
    net, tokens = tiny.model(sliding_window=5), tiny.tokens(2, 19)
    theirs = hf_model("Mistral", net)
    for logits in (net(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    truth = dict(theirs.named_parameters())
    for name, p in net.named_parameters():
        assert_close(p.grad, truth[hf_name(name)].grad, 2e-4)


# ---- torch.compile ----


def test_a_layer_compiles_forward_and_backward():
    net = tiny.model(n_layers=1, sliding_window=5)
    layer = net.layers[0]
    compiled = torch.compile(layer, fullgraph=True)
    plan = FullPass(net.ops, net.rope.cos, net.rope.sin, 5, None, None)
    results = []
    for run in (layer, compiled):
        torch.manual_seed(0)
        inputs = [torch.randn(2, 17, 40, requires_grad=True) for _ in range(2)]
        outputs = run(*inputs, plan)
        gradients = torch.autograd.grad(sum((o * o).sum() for o in outputs), [*inputs, *layer.parameters()])
        results.append([*outputs, *gradients])
    for eager, fast in zip(*results, strict=True):
        assert_close(fast, eager, 1e-5)


@torch.no_grad()
def test_a_decode_step_compiles():
    net = tiny.model(n_layers=1, sliding_window=4)
    layer, cache = net.layers[0], net.cache(2, 30)
    net(tiny.tokens(12), cache=cache, lengths=[9, 3])
    before, other = cache.k[0].clone(), copy.deepcopy(cache)
    compiled = torch.compile(layer, fullgraph=True)
    x, residual = torch.randn(2, 40), torch.randn(2, 40)
    plans = [c.begin(None, net.rope.cos, net.rope.sin, net.ops) for c in (cache, other)]
    results = [run(x, residual, p, next(iter(p.layers()))) for run, p in zip((layer, compiled), plans, strict=True)]
    for eager, fast in zip(*results, strict=True):
        assert_close(fast, eager, 1e-5)
    assert_close(other.k[0], cache.k[0], 1e-5)
    assert not torch.equal(other.k[0], before)


@torch.no_grad()
def test_compiled_layers_share_their_graphs():
    """More layers and steps than Dynamo compiles variants of one function: none may need its own."""
    net, eager = (tiny.model(n_layers=torch._dynamo.config.recompile_limit + 4, sliding_window=4) for _ in range(2))
    for layer in net.layers:
        layer.compile(fullgraph=True, backend="eager")
    torch._dynamo.reset()
    caches = [m.cache(2, 40) for m in (net, eager)]
    for chunks in ([9, 3], [5, 5], *[None] * 12):
        tokens = tiny.tokens(sum(chunks or [1, 1]))
        fast, slow = (m(tokens, cache=c, lengths=chunks) for m, c in zip((net, eager), caches, strict=True))
        assert_close(fast, slow, 1e-5)
