"""Hugging Face models on the ops: what is replaced, what is left, and that they compute what they computed."""

import copy
import importlib

import pytest
import torch

from mistral_kernels.patch import OPS, patch, register_attention, sources, unpatch
from mistral_kernels.testing import compare, pooled, pooled_max

transformers = pytest.importorskip("transformers", minversion="5.20")
pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "mistral": ("Mistral", dict(sliding_window=8)),
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "ministral": (
        "Ministral",
        dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
}
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def make(family: str = "mistral", dtype: torch.dtype = torch.float32, **changes):
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | own | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # norms that are not all ones, biases that are not 0
    return model


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(kind: str, length: int = 21) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    if kind == "left":
        mask[0, :6] = 0
    elif kind == "right":
        mask[1, -5:] = 0
    elif kind == "both":
        mask[0, :3], mask[0, -4:], mask[1, -1] = 0, 0, 0
    elif kind == "holes":
        mask[0, 5:8] = 0
    return mask


def run(model, ids, labels=None, **kwargs):
    """Loss, logits and every gradient; the logits are those of a second pass, since a fused loss has none."""
    model.zero_grad()
    model.train()
    loss = model(ids, labels=ids if labels is None else labels, **kwargs).loss
    loss.backward()
    model.eval()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return found | {"loss": loss.detach(), "logits": model(ids, use_cache=False, **kwargs).logits}


def truth_of(model):
    """A float64 copy. Its norms are this package's, since transformers' own compute in float32 whatever comes."""
    exact = copy.deepcopy(model).double()
    patch(exact, ops="rms_norm", impl="reference")
    return exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral without a window"])
def test_parity(family, dtype):
    changes = {} if family in FAMILIES else dict(sliding_window=None)
    model, ids = make(family.partition(" ")[0], dtype, **changes), tokens()
    model.set_attn_implementation("eager")
    eager, truth = run(model, ids), run(truth_of(model), ids)
    report = patch(model)
    assert set(report.replaced.values()) == set(OPS), str(report)
    patched = run(model, ids)
    assert patched.keys() == eager.keys()
    errors = [compare(n, patched[n], eager[n], truth[n]) for n in patched]
    assert pooled_max(errors) <= 1 and pooled(errors) <= 1, sorted(errors, key=lambda e: e.max_ratio)[-3:]


def test_truth():
    model, ids = make(), tokens()
    plain, exact = run(copy.deepcopy(model).double(), ids), run(truth_of(model), ids)
    for name, value in exact.items():
        torch.testing.assert_close(plain[name], value.to(plain[name].dtype), atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["none", "left", "right", "both", "holes"])
@pytest.mark.parametrize("family", ["mistral", "llama", "ministral"])
def test_padding(family, kind):
    model, ids, mask = make(family), tokens(), padding(kind)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        patch(model)
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-6, rtol=2e-5)


def test_padding_matters():
    """A mask that is dropped would pass a test whose model ignores it."""
    model, ids = make(), tokens()
    patch(model)
    with torch.no_grad():
        assert (model(ids, attention_mask=padding("left")).logits - model(ids).logits)[0, 6:].abs().max() > 1e-3


def test_window_matters():
    model, ids = make(), tokens()
    patch(model)
    with torch.no_grad():
        windowed = model(ids).logits
        model.config.sliding_window = None
        assert (model(ids).logits - windowed)[:, 8:].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "llama"])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_positions(family, rows):
    model, ids = make(family), tokens(rows)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(rows, -1)
    eager = run(model, ids, position_ids=positions)
    patch(model)
    found = run(model, ids, position_ids=positions)
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)
    with torch.no_grad():
        alone = model(ids[:, 9:]).logits
    torch.testing.assert_close(found["logits"][:, 9:], alone, atol=2e-6, rtol=2e-5)


def test_packed_cu_seqlens():
    model, ids = make(), tokens(1)
    patch(model)
    cu = torch.tensor([0, 9, 21])
    flash = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=12, max_length_k=12)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with torch.no_grad():
        found = model(ids, position_ids=positions, use_cache=False, **flash).logits
        for start, end in ((0, 9), (9, 21)):
            alone = model(ids[:, start:end]).logits
            torch.testing.assert_close(found[:, start:end], alone, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, kind, cache):
    model, ids = make(family), tokens()
    options = dict(attention_mask=padding(kind), max_new_tokens=14, do_sample=False, disable_compile=True)
    options |= dict(cache_implementation=cache, output_logits=True, return_dict_in_generate=True, eos_token_id=None)
    expected = model.generate(ids, **options)
    patch(model)
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-6, rtol=2e-5)


def test_chunked_prefill_and_beams():
    model, ids = make(), tokens()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=padding("left"))
    chunked, beams = dict(prefill_chunk_size=5), dict(num_beams=3)
    expected = [model.generate(ids, **options, **more) for more in (chunked, beams)]
    patch(model)
    for more, sequences in zip((chunked, beams), expected, strict=True):
        assert torch.equal(model.generate(ids, **options, **more), sequences)


def test_assisted_decoding():
    model, assistant, ids = make(), make(num_hidden_layers=1), tokens(1)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **options)
    patch(model)
    patch(assistant)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_unpatch_restores(family):
    model, ids = make(family), tokens()
    before = run(model, ids)
    state = [set(m.__dict__) for m in model.modules()]
    other = copy.deepcopy(model)
    patch(model)
    assert set(run(other, ids)) == set(before)
    assert all(torch.equal(a, b) for a, b in zip(run(other, ids).values(), before.values(), strict=True))
    clone = copy.deepcopy(model)
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert [set(m.__dict__) for m in model.modules()] == state
    unpatch(clone)
    for again in (model, clone):
        assert all(torch.equal(a, b) for a, b in zip(run(again, ids).values(), before.values(), strict=True))


def test_classes():
    existing, ids = make(), tokens()
    expected = run(existing, ids)
    module = importlib.import_module("transformers.models.mistral.modeling_mistral")
    before = {n: dict(vars(c)) for n, c in vars(module).items() if isinstance(c, type)}
    report = patch("mistral")
    try:
        assert report.replaced["MistralMLP"] == "swiglu" and report.replaced["MistralPreTrainedModel"] == "attention"
        model = make()
        assert model.config._attn_implementation == "mistral_kernels"
        assert existing.config._attn_implementation == "sdpa"
        assert make(attn_implementation="eager").config._attn_implementation == "eager"
        again = patch(transformers.MistralForCausalLM)
        assert not again.replaced and all("already" in reason for reason in again.left.values())
        instance = patch(model)
        assert not instance.replaced
        for patched in (model, existing):
            for name, value in run(patched, ids).items():
                torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-3, msg=name)
    finally:
        unpatch("mistral")
    assert {n: dict(vars(c)) for n, c in vars(module).items() if isinstance(c, type)} == before
    assert all(torch.equal(a, b) for a, b in zip(run(existing, ids).values(), expected.values(), strict=True))


def test_report_and_choice():
    model = make()
    report = patch(model, ops=["rms_norm", "swiglu"])
    assert set(report.replaced.values()) == {"rms_norm", "swiglu"}
    assert "5 × rms_norm" in str(report) and model.config._attn_implementation == "sdpa"
    assert "already" in str(patch(model, ops="rms_norm"))
    assert set(OPS) - {"rms_norm", "swiglu"} == set(patch(model).replaced.values())
    gelu = make(hidden_act="gelu")
    expected = run(gelu, tokens())
    report = patch(gelu, ops="swiglu")
    assert not report.replaced and report.left["model.layers.0.mlp"] == "swiglu: its activation is not SiLU"
    assert all(torch.equal(a, b) for a, b in zip(run(gelu, tokens()).values(), expected.values(), strict=True))


def test_other_arithmetic_is_left():
    """Gemma adds one to the norm's weight and scales; nothing of it may pass for ours."""
    config = transformers.GemmaConfig(**SIZES, head_dim=16)
    model, ids = transformers.GemmaForCausalLM(config).eval(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        report = patch(model)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-6, rtol=2e-5)
    assert "rms_norm" not in report.replaced.values()
    assert "model.norm" in report.left and "rms_norm: its forward is none" in str(report)


def test_sources_tell_one_token():
    changed = sources.RMS_NORM.replace("keepdim=True", "keepdim=False")
    assert sources.same(transformers.models.mistral.modeling_mistral.MistralRMSNorm.forward, sources.RMS_NORM)
    assert not sources.same(transformers.models.mistral.modeling_mistral.MistralRMSNorm.forward, changed)
    assert not sources.same(len, sources.RMS_NORM)


def test_bad_arguments():
    with pytest.raises(ValueError, match="ops holds 'norm'"):
        patch(make(), ops=["norm"])
    with pytest.raises(ValueError, match="'bert_like'"):
        patch("bert_like")
    with pytest.raises(TypeError, match="model is int"):
        patch(3)
    with pytest.raises(ValueError, match="impl is 'cuda13'"):
        patch(make(), impl="cuda13")


def test_impl_reference():
    model, ids = make(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        patch(model, impl="reference")
        assert model.config._attn_implementation == "mistral_kernels_reference"
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-6, rtol=2e-5)


def test_attention_implementation_alone():
    assert register_attention() == "mistral_kernels"
    model, ids, mask = make(), tokens(), padding("left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("mistral_kernels")
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_attention_weights_and_whole_masks(kind):
    """What the kernels lack goes to the model's own eager attention, with the mask in full."""
    model, mask = make(), padding(kind)
    patch(model, ops="attention")
    layer = model.model.layers[0].self_attn
    q, k, v = (torch.randn(2, h, 21, 16, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    attention, masks = (importlib.import_module(f"mistral_kernels.patch.{n}") for n in ("attention", "masks"))
    masking_utils = transformers.masking_utils
    function = masking_utils.sliding_window_causal_mask_function(8)
    ours = masks.mask(2, 21, 21, mask_function=function, attention_mask=mask.bool())
    theirs = masking_utils.sdpa_mask(
        2, 21, 21, mask_function=function, attention_mask=mask.bool(), allow_is_causal_skip=False
    )
    out, weights = attention.forward(layer, q, k, v, ours, scaling=0.25, sliding_window=8, output_attentions=True)
    assert weights.shape == (2, 4, 21, 21)
    rows = mask.bool()[:, None, :, None].expand_as(weights)
    unseen = rows & ~theirs
    assert unseen.any() and (weights[unseen] == 0).all() and (weights[rows & theirs] > 0).all()
    plain, none = attention.forward(layer, q, k, v, ours, scaling=0.25, sliding_window=8)
    assert none is None
    torch.testing.assert_close(plain[mask.bool()], out[mask.bool()], atol=2e-6, rtol=2e-5)


def test_dropout_falls_to_eager():
    model, ids = make(attention_dropout=0.5), tokens()
    patch(model)
    model.train()
    torch.manual_seed(1)
    a = model(ids, labels=ids).loss
    torch.manual_seed(2)
    assert a != model(ids, labels=ids).loss


def test_skip_logits():
    model, ids = make(), tokens()
    expected = model(ids, labels=ids)
    patch(model)
    evaluated = model(ids, labels=ids)
    torch.testing.assert_close(evaluated.logits, expected.logits, atol=2e-6, rtol=2e-5)
    fused = model(ids, labels=ids, skip_logits=True)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, expected.loss)
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model(ids, labels=ids, return_dict=False)[0].shape == ()
    for kwargs in (dict(num_items_in_batch=7), dict(num_items_in_batch=torch.tensor(7)), dict(shift_labels=ids)):
        unfused = model(ids, labels=ids, skip_logits=False, **kwargs).loss
        torch.testing.assert_close(model(ids, labels=ids, **kwargs).loss, unfused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, ids, mask = make(), tokens(), padding("left")
    with torch.autocast("cpu", dtype=dtype):
        expected = run(model, ids, attention_mask=mask)
        truth = run(copy.deepcopy(model).double(), ids, attention_mask=mask)["logits"]
        patch(model)
        found = run(model, ids, attention_mask=mask)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    eager, ours = ((x["logits"].double() - truth)[mask.bool()].abs().max() for x in (expected, found))
    assert ours <= 2 * eager + torch.finfo(dtype).eps


def test_hooks_are_called():
    """A hook on the norm that is fused into the residual addition, and on the head, still sees its call."""
    model, ids = make(), tokens()
    patch(model)
    calls = []
    for module in (model.model.layers[0].post_attention_layernorm, model.lm_head):
        module.register_forward_hook(lambda module, inputs, output: calls.append(type(module).__name__))
    model.train()
    model(ids, labels=ids)
    assert calls == ["MistralRMSNorm", "Linear"]


@pytest.mark.parametrize("kind", ["left", *(pytest.param(k, marks=pytest.mark.slow) for k in (None, "none", "both"))])
def test_compile(kind):
    model, ids = make(), tokens()
    more = {} if kind is None else dict(attention_mask=padding(kind))
    labels = ids
    if kind is not None:  # what padding predicts counts neither: attention of padding means nothing
        known = padding(kind) == 1
        labels = ids.masked_fill(~(known & torch.nn.functional.pad(known, (1, 0), value=True)[:, :-1]), -100)
    expected = run(model, ids, labels, **more)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    model.train()
    model.zero_grad()
    loss = compiled(ids, labels=labels, **more).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"], atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_compile_refuses_holes():
    """What a traced model cannot look at before, it finds while it runs."""
    model, ids = make(), tokens()
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="holes"):
        compiled(ids, attention_mask=padding("holes"))
