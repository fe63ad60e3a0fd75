"""Quantised linear layers in models of transformers, under adapters, and as torchao's tensors."""

import copy
import pickle

import pytest
import tiny
import torch

import mistral_kernels as mk
from mistral_kernels.quant_linear import QuantizedLinear, from_torchao, to_torchao
from mistral_kernels.testing import fill

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEMES = ("int8", "w8a8", "int4", "nf4")


def hugging_face(**changes):
    transformers = pytest.importorskip("transformers")
    from mistral.weights import hf_config, to_hf_names

    net = tiny.model(dim=64, hidden_dim=128, n_heads=4, **changes)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**hf_config(net.config)))
    model.load_state_dict(to_hf_names(net.state_dict()), strict=False)
    return model.eval()


def dequantised(model):
    """The same model with the weights that the codes stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent, _, leaf = name.rpartition(".")
            plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = module.quantized.dequantize()
            setattr(model.get_submodule(parent), leaf, plain)
    return model


# ---- quantize_ ----


@pytest.mark.parametrize("patched", ["not", "before", "after"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_models_of_transformers(scheme, patched):
    model, ids = hugging_face(), tiny.tokens(2, 19)
    if patched == "before":
        mk.patch(model)
    assert mk.quantize_(model, scheme, 32) is model
    plain = dequantised(mk.unpatch(copy.deepcopy(model)) or model) if patched == "not" else None
    if patched == "after":
        mk.patch(model)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 3 * len(NAMES) and type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        found = model(ids).logits
        if plain is None:
            mk.unpatch(model)
            plain = dequantised(model)
        torch.testing.assert_close(found, plain(ids).logits, rtol=1e-3, atol=1e-3)
    tokens = model.generate(ids[:1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.shape == (1, 24)


def test_loss_of_a_patched_model_with_a_quantised_head():
    """The fused loss reads the head's weight, which is no longer there."""
    model, ids = hugging_face(), tiny.tokens(2, 19)
    mk.patch(mk.quantize_(model, "int8", skip=()))
    assert isinstance(model.lm_head, QuantizedLinear)
    found = model.train()(ids, labels=ids).loss
    mk.unpatch(model)
    torch.testing.assert_close(found, dequantised(model)(ids, labels=ids).loss, rtol=1e-3, atol=1e-3)


def test_what_is_left():
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 8) for name in ("a", "lm_head", "hooked")})
    model["own"], model["inner"] = Own(32, 8), torch.nn.Sequential(torch.nn.Linear(32, 8, dtype=torch.bfloat16))
    model["hooked"].register_forward_hook(lambda m, i, o: o)
    mk.quantize_(model, "int4", 32, True, skip=("lm_head", "inner.1"))
    kinds = {n: type(m) for n, m in model.named_modules() if "." in n or n in model}
    assert kinds["a"] is kinds["inner.0"] is QuantizedLinear
    assert kinds["lm_head"] is kinds["hooked"] is torch.nn.Linear and kinds["own"] is Own
    assert model["inner"][0].bias.dtype == torch.bfloat16 and model["a"].offset is not None
    x = fill((3, 32)).float()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(torch.nn.ModuleList([model["a"]])))):
        assert torch.equal((other["a"] if "a" in dict(other.named_children()) else other[0])(x), model["a"](x))
    assert not model["a"].bias.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mk.quantize_(torch.ones(3)), TypeError, "model is Tensor; it must be a torch.nn.Module"),
        (lambda: mk.quantize_(torch.nn.Linear(3, 4)), ValueError, "model is a Linear itself"),
        (lambda: mk.quantize_(torch.nn.ReLU(), "int5"), ValueError, "scheme is 'int5'"),
        (lambda: mk.quantize_(torch.nn.ReLU(), "int4", 7), ValueError, "group_size is 7"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- adapters ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_train_on_codes(scheme):
    """Gradients are those on the dequantised weights; of int8 activations, close to them."""
    pytest.importorskip("peft")
    from mistral import adapters
    from mistral.quantized import quantize_model

    def built(quantised):
        model = quantize_model(tiny.model(), scheme)
        if not quantised:
            for name, module in list(model.named_modules()):
                if isinstance(module, QuantizedLinear):
                    weight = module.quantized.dequantize()
                    model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = replaced(
                        weight, model.ops
                    )
        model = adapters.add_adapters(model, 4, 6.0, ["wq", "wv", "w2"])
        generator = torch.Generator().manual_seed(1)
        for tensor in adapters.adapter_state(model).values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        return model

    def replaced(weight, ops):
        from mistral.model import Linear

        plain = Linear(weight.shape[1], weight.shape[0], ops)
        plain.weight.data = weight
        return plain

    found = []
    for quantised in (True, False):
        model = built(quantised)
        model(tiny.tokens(2, 9)).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        if quantised:
            with torch.no_grad():
                before = model(tiny.tokens(2, 9))
                merged = adapters.merge_adapters(model)(tiny.tokens(2, 9))
            if scheme != "w8a8":
                torch.testing.assert_close(merged, before, rtol=1e-3, atol=1e-3)
    assert len(found[0]) == 2 * 3 * 3
    for ours, theirs in zip(*found, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < (0.3 if scheme == "w8a8" else 1e-3)


# ---- torchao ----


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_of_torchao(torchao, dtype):
    for config, scheme in (
        (torchao.Int8WeightOnlyConfig(version=2), "int8"),
        (torchao.Int8DynamicActivationInt8WeightConfig(version=2), "w8a8"),
    ):
        layer = torch.nn.Sequential(torch.nn.Linear(96, 20, dtype=dtype))
        torchao.quantize_(layer, config)
        theirs = layer[0].weight
        ours = from_torchao(theirs)
        assert ours.scheme == scheme and ours.group == 0
        torch.testing.assert_close(ours.dequantize(dtype), theirs.dequantize(), rtol=0, atol=0)
        back = to_torchao(ours, dtype)
        assert type(back) is type(theirs) and torch.equal(back.dequantize(), theirs.dequantize())
        x = fill((5, 96)).to(dtype)
        exact = 1e-5 if dtype == torch.float32 else 2e-2
        wanted = torch.nn.functional.linear(x, theirs)
        found = mk.linear_quantized(x, ours)
        if scheme == "int8":
            torch.testing.assert_close(found, wanted, rtol=exact, atol=exact)
        else:  # torchao rounds x to steps of max|x| / 127.5
            assert (found - wanted).norm() < 0.02 * wanted.norm()
        torch.testing.assert_close(torch.nn.functional.linear(x, back), wanted, rtol=exact, atol=exact)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_int4_of_torchao(torchao, group, symmetric):
    layer = torch.nn.Sequential(torch.nn.Linear(256, 20))
    kind = torchao.quant_primitives.MappingType
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=torchao.PerGroup(group),
        mapping_type=kind.SYMMETRIC if symmetric else kind.ASYMMETRIC,
    )
    torchao.quantize_(layer, config)
    theirs = layer[0].weight
    ours = from_torchao(theirs)
    assert (ours.scheme, ours.group, ours.offset is None) == ("int4", group, symmetric)
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=1e-6, atol=1e-7)
    if symmetric:
        assert torch.equal(to_torchao(ours, torch.float32).dequantize(), theirs.dequantize())
    else:
        with pytest.raises(ValueError, match="weight has offsets, which torchao's tensors cannot state"):
            to_torchao(ours)


@pytest.mark.parametrize("how", [("int8", 0), ("int8", 64), ("w8a8", 0), ("int4", 0), ("int4", 32)])
def test_there_and_back(torchao, how):
    ours = mk.quantize_weight(fill((9, 128)), *how)
    back = from_torchao(to_torchao(ours, torch.float32))
    assert (back.scheme, back.group, back.shape) == (ours.scheme, ours.group, ours.shape)
    assert torch.equal(back.codes, ours.codes) and torch.equal(back.scale, ours.scale) and back.offset is None
    torch.testing.assert_close(to_torchao(ours, torch.float32).dequantize(), ours.dequantize(), rtol=1e-6, atol=1e-9)


def test_what_torchao_has_and_we_have_not(torchao):
    layer = torch.nn.Sequential(torch.nn.Linear(96, 20))
    torchao.quantize_(layer, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)))
    with pytest.raises(ValueError, match="groups of 16"):
        from_torchao(layer[0].weight)
    with pytest.raises(TypeError, match="weight is Tensor; it must be torchao's"):
        from_torchao(torch.ones(2, 3))
    for how, words in ((("nf4", 64), "nf4 in groups of 64"), (("w8a8", 32), "w8a8 in groups of 32")):
        with pytest.raises(ValueError, match=words):
            to_torchao(mk.quantize_weight(torch.ones(4, 128), *how))
    with pytest.raises(ValueError, match="rows of 100 in groups of 64; torchao has no shorter last group"):
        to_torchao(mk.quantize_weight(torch.ones(4, 100), "int4", 64))


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        to_torchao(mk.quantize_weight(torch.ones(4, 128)))
