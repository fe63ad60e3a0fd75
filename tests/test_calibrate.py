"""Calibrated weights: the feedback of errors against its definition, models and files, the command line."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from test_quantize import load, logits

import mistral_kernels as mk
from mistral import calibrate, quantize, weights
from mistral.calibrate import calibrate_model, calibration_windows
from mistral.quantized import quantize_model, quantized_names
from mistral.quantized_file import FILE
from mistral_kernels.testing import fill

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [("int8", 0, False), ("int8", 32, False), ("w8a8", 0, False), ("int4", 32, False), ("int4", 64, True)]
KINDS += [("int4", 0, False), ("nf4", 32, False)]
HOW = pytest.mark.parametrize("how", KINDS, ids=lambda how: "-".join(map(str, how)))


def inputs(rows, k, seed=0):
    """Columns that depend on each other, of very different sizes."""
    mixed = fill((rows, k), seed=seed) @ fill((k, k), seed=seed + 1) * k**-0.5
    return mixed * 2.0 ** torch.linspace(-3, 3, k, dtype=mixed.dtype)


def error(x, weight, made):
    return ((x @ (made.dequantize(torch.float64) - weight).T).square().mean() / (x @ weight.T).square().mean()).item()


# ---- one weight ----


@HOW
def test_inputs_that_do_not_depend_on_each_other_change_no_code(how):
    weight = fill((9, 192)).float()
    plain, fed = (mk.quantize_weight(weight, *how, hessian=h) for h in (None, 7 * torch.eye(192)))
    for part in ("codes", "scale", "offset"):
        left, right = getattr(plain, part), getattr(fed, part)
        assert (left is None and right is None) or torch.equal(left, right)


@HOW
def test_the_error_of_the_outputs_falls(how):
    x, weight = inputs(600, 160), fill((24, 160), seed=5)
    h = x.T @ x / len(x)
    plain, fed = (mk.quantize_weight(weight, *how, hessian=g) for g in (None, h))
    assert error(x, weight, fed) < 0.5 * error(x, weight, plain)
    again = mk.quantize_weight(weight.float(), *how, hessian=1e-6 * h.float())
    assert (again.codes != fed.codes).double().mean() < 0.01  # of rounding alone


def test_the_codes_are_those_of_the_definition():
    """Columns by falling weight; before each is rounded, the best values of all that are left, given those before."""
    x, weight = inputs(300, 40), fill((5, 40), seed=5)
    h = x.T @ x / len(x)
    made = mk.quantize_weight(weight, "int4", 32, hessian=h)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    order, scale = h.diagonal().argsort(descending=True).tolist(), made.scale.double()
    found, codes = weight.clone(), torch.zeros(5, 40)
    for i, at in enumerate(order):
        codes[:, at] = (found[:, at] / scale[:, at // 32] + 8).round().clamp(0, 15)
        found[:, at] = (codes[:, at] - 8) * scale[:, at // 32]
        done, left = order[: i + 1], order[i + 1 :]
        pull = (found - weight)[:, done] @ h[done][:, left]
        found[:, left] = weight[:, left] - torch.linalg.solve(h[left][:, left], pull, left=False)
    wanted = mk.QuantizedWeight("int4", mk.quant_linear.reference.pack(codes), made.scale, None, 32, 40)
    assert torch.equal(wanted.codes, made.codes)


def test_inputs_and_weights_of_zeros():
    x, weight = inputs(90, 70), fill((6, 70), seed=5)
    x[:, 3], x[:, 40:] = 0, 0
    weight[2], weight[4, 32:64] = 0, 0
    for how in KINDS:
        made = mk.quantize_weight(weight, *how, hessian=x.T @ x)
        assert (made.dequantize().isfinite().all() and not made.dequantize()[2].any()) or how[0] == "nf4"
        assert error(x, weight, made) < 0.02
    made = mk.quantize_weight(weight, "int8", hessian=torch.zeros(70, 70))
    assert torch.equal(made.codes, mk.quantize_weight(weight, "int8").codes)
    assert mk.quantize_weight(torch.ones(3, 1), "int4", hessian=torch.ones(1, 1)).dequantize().allclose(torch.ones(1))


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.ones(4, 5), r"hessian is \[4, 5\]; for weight \[3, 4\] it must be \[4, 4\]"),
        (torch.full((4, 4), torch.nan), "hessian has elements that are not finite"),
        (-torch.eye(4), "negative ones on its diagonal"),
        (torch.eye(4) + 5 * (1 - torch.eye(4)), "no mean of x · xᵀ"),
    ],
)
def test_hessians_that_are_none(bad, words):
    with pytest.raises(ValueError, match=words):
        mk.quantize_weight(torch.ones(3, 4), "int8", hessian=bad)


# ---- models ----


def of_low_rank(**changes):
    """A tiny model whose residual stream lies in few dimensions, so that errors can make up for each other."""
    net = tiny.model(**changes)
    for i, (name, weight) in enumerate(net.named_parameters()):
        if name.startswith("tok_") or name.endswith(("wo.weight", "w2.weight")):
            left, right = fill((weight.shape[0], 5), seed=i + 1), fill((5, weight.shape[1]), seed=i + 99)
            if not name.startswith("tok_"):
                left, right = fill((weight.shape[0], 5), seed=7), right * weight.shape[1] ** -0.5
            weight.data = (left @ right).float()
    return net


@pytest.mark.parametrize("changes", [{}, dict(attention_bias=True, sliding_window=9)], ids=["plain", "window"])
@pytest.mark.parametrize("how", [("int8", None, False), ("int4", 32, False)], ids=str)
def test_a_model_is_closer_to_its_float_one(how, changes):
    whole, windows, ids = of_low_rank(**changes), tiny.tokens(20, 32), tiny.tokens(4, 30, seed=3)
    nets = [quantize_model(of_low_rank(**changes), *how), calibrate_model(of_low_rank(**changes), windows, *how)]
    plain, fed = ((logits(net, ids) - logits(whole, ids)).square().mean() for net in nets)
    assert 0 < fed < 0.8 * plain
    assert all(
        nets[1].get_submodule(n).scheme == nets[0].get_submodule(n).scheme for n in quantized_names(whole.config)
    )


def test_a_layer_is_calibrated_on_what_quantised_layers_give_it():
    net, windows = tiny.model(), tiny.tokens(3, 20)
    made = calibrate_model(tiny.model(), windows, "int4", 32)
    seen = []
    hook = made.layers[2].feed_forward.w1.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    logits(made, windows)
    hook.remove()
    again = mk.quantize_weight(net.layers[2].feed_forward.w1.weight, "int4", 32, hessian=calibrate.hessian(seen[0]))
    assert (again.codes == made.layers[2].feed_forward.w1.codes).double().mean() > 0.98


def test_calibration_repeats_itself_and_leaves_modes_alone():
    nets = [calibrate_model(tiny.model(), tiny.tokens(3, 20), "int4") for _ in range(2)]
    assert torch.is_grad_enabled()
    left, right = (net.state_dict() for net in nets)
    assert all(torch.equal(left[n], right[n]) for n in left)
    with pytest.raises(ValueError, match=r"model has no layers\.0\.attention\.wq\.weight"):
        calibrate_model(nets[0], tiny.tokens(1, 3))
    for windows in (tiny.tokens(3), tiny.tokens(1, 257), tiny.tokens(0, 3)):
        with pytest.raises(ValueError, match=r"it must be \[B, S\] tokens"):
            calibrate_model(tiny.model(), windows)


# ---- text and files ----


def letters(text):
    return [ord(c) % 97 for c in text]


TOKENIZER = SimpleNamespace(encode=letters)


def test_windows_of_a_text(tmp_path):
    rows, plain = tmp_path / "x.jsonl", tmp_path / "x.txt"
    rows.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in ("abcd", "efgh", "ijk")))
    plain.write_text("abcdefghijk")
    for file in (rows, plain):
        assert calibration_windows(file, TOKENIZER, 9, 4).tolist() == [letters("abcd"), letters("efgh")]
        assert calibration_windows(file, TOKENIZER, 3, 400).tolist() == [letters("abc")]
    for arguments, words in (((0, 4), "tokens is 0"), ((40, 20), "has 11 tokens; calibration needs 20")):
        with pytest.raises(ValueError, match=words):
            calibration_windows(plain, TOKENIZER, *arguments)


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, vocab_size=99)], ids=["plain", "tied"])
def test_the_command_line(tmp_path, monkeypatch, changes):
    """Tied weights of 99 rows cannot lie in the file in the order in which they are made."""
    net = tiny.model(**changes)
    weights.save_hf(net, tmp_path / "whole", progress=False)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 30)
    monkeypatch.setattr(quantize, "load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr(quantize, "_copy_tokenizer", lambda *_: None)
    options = ["--scheme", "int4", "--group-size", "32", "--dtype", "float32", "--quiet", "--calibration-tokens", "600"]
    common = ["--model", str(tmp_path / "whole"), "--out", str(tmp_path / "codes"), "--calibrate", str(text), *options]
    assert quantize.main(common) == 0
    windows = calibration_windows(text, TOKENIZER, 600, net.config.max_positions)
    wanted, found = calibrate_model(tiny.model(**changes), windows, "int4", 32), load(tmp_path / "codes")
    left, right = found.state_dict(), wanted.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    about = dict(method="gptq", windows=2, window=256, text="text.txt")
    with safe_open(tmp_path / "codes" / FILE, framework="pt") as file:
        assert json.loads(file.metadata()["quantization"])["calibration"] == about
    settings = json.loads((tmp_path / "codes" / "config.json").read_text())["quantization_config"]
    assert settings["calibration"] == about
