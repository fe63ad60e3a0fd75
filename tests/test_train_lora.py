"""LoRA and QLoRA: training, files in three formats, merging; peft itself is the judge where it can be."""

import json

import pytest
import tiny
import torch
import training_runs as runs

from mistral import adapters
from mistral.training import checkpoints
from mistral.training.log import read_csv
from mistral.weights import hf_config, load_model, save_hf, to_hf_names

peft = pytest.importorskip("peft")
WIDE = dict(dim=64, hidden_dim=128, n_heads=8)  # NF4 takes widths in blocks of 64
ALL = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapted(dtype=torch.float32, seed=0):
    """A model with an adapter on every projection, B not zero."""
    model = adapters.add_adapters(tiny.model(dtype=dtype), 4, 6.0, ALL, seed=seed)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in adapters.adapter_state(model).items():
        if "lora_B" in name:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def save(model, folder, format="ours"):
    adapters.save_adapter(adapters.adapter_state(model), folder, model.config, 4, 6.0, format)
    return folder


@torch.no_grad()
def logits(model):
    return model(tiny.tokens(2, 19))


def test_only_adapters_are_trained_and_start_at_nothing():
    model, plain = adapters.add_adapters(tiny.model(), 4, 6.0, ["wq", "w2"]), tiny.model()
    assert torch.equal(logits(model), logits(plain))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    logits_of = model(tiny.tokens(2, 19)).square().mean()
    logits_of.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == 6 and all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("format", adapters.FORMATS)
def test_files_come_back(tmp_path, format):
    model = adapted()
    folder = save(model, tmp_path / format, format)
    loaded = adapters.load_adapter(tiny.model(), folder)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny.model()))


def test_peft_loads_our_files(tmp_path):
    model = adapted()
    theirs = peft.PeftModel.from_pretrained(tiny.model(), save(model, tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)


def hugging_face(model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**hf_config(model.config))).eval()
    theirs.load_state_dict(to_hf_names(model.state_dict()), strict=False)
    return theirs


def test_an_adapter_moves_to_hugging_face_and_back(tmp_path):
    model, plain = adapted(), tiny.model()
    theirs = peft.PeftModel.from_pretrained(hugging_face(plain), save(model, tmp_path / "hf", "hf"))
    tokens = tiny.tokens(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, logits(model), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "back")
    torch.testing.assert_close(logits(adapters.load_adapter(plain, tmp_path / "back")), logits(model))


def test_rows_are_permuted_for_mistrals_weights(tmp_path):
    """Merged into interleaved weights, the interleaved adapter is the interleaved merged weight."""
    from safetensors.torch import load_file

    from mistral.checkpoint import to_interleaved

    model = adapted()
    stored = load_file(save(model, tmp_path, "mistral") / "lora.safetensors")
    plain, merged = tiny.model(), adapters.merge_adapters(adapted())
    for leaf, heads in (("wq", 6), ("wk", 2)):
        name = f"layers.1.attention.{leaf}"
        a, b = (stored[f"{name}.lora_{part}.weight"] for part in "AB")
        base = to_interleaved(plain.get_parameter(name + ".weight").detach(), heads)
        expected = to_interleaved(merged.get_parameter(name + ".weight"), heads)
        torch.testing.assert_close(base + 6.0 / 4 * b @ a, expected, rtol=0, atol=1e-5)


def test_merging_changes_nothing_but_rounding():
    model = adapted()
    before = logits(model)
    merged = adapters.merge_adapters(model)
    assert merged.state_dict().keys() == tiny.model().state_dict().keys()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_quantized_weights_act_as_they_are_merged():
    pytest.importorskip("bitsandbytes")
    model = adapters.quantize_nf4(tiny.model(**WIDE), ALL, torch.float32)
    model = adapters.add_adapters(model, 4, 6.0, ALL)
    before = logits(model)
    merged = adapters.merge_adapters(model)
    for name, exact in tiny.model(**WIDE).state_dict().items():
        error = (merged.state_dict()[name] - exact).norm() / exact.norm()
        # NF4 rounds Gaussian values, in blocks of 64, with an RMS error of about 9 %.
        assert 0.07 < error < 0.11 if name.split(".")[-2] in ALL else error == 0, (name, error)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_widths_that_nf4_cannot_take():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"wq has 40 inputs; NF4 needs a multiple of 64"):
        adapters.quantize_nf4(tiny.model(), ALL, torch.float32)


# ---- runs ----


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_hf(tiny.model(vocab_size=runs.VOCAB, **WIDE), folder, progress=False)
    return str(folder)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_goes_on_bitwise_and_exports(tmp_path, base, quantize):
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    how = dict(shape={}, model=base, window="config", lora_rank=4, lora_dropout=0.1, quantize=quantize)
    how |= dict(precision="bfloat16", eval_every=2, merge=True)
    runs.run(tmp_path, out=str(tmp_path / "whole"), **how)
    runs.run(tmp_path, out=str(tmp_path / "parts"), save_every=3, **how)
    (tmp_path / "parts" / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    assert runs.run(tmp_path, out=str(tmp_path / "parts"), **how)["first_step"] == 3
    assert runs.losses(tmp_path / "parts") == runs.losses(tmp_path / "whole")
    state = checkpoints.newest(tmp_path / "parts" / "checkpoints")
    saved = sum(f.stat().st_size for f in state.iterdir())
    assert saved < 4 * 3 * 4 * 40_000  # adapters and their moments, not the model
    held = [float(row["eval_loss"]) for row in read_csv(tmp_path / "whole" / "log.csv") if row["eval_loss"]]
    assert held[-1] < held[0]
    merged = load_model(tmp_path / "whole" / "export", dtype=torch.bfloat16, progress=False)
    model = load_model(base, dtype=torch.bfloat16, progress=False)
    if quantize == "nf4":
        adapters.quantize_nf4(model, ALL, torch.bfloat16)
    adapters.load_adapter(model, tmp_path / "whole" / "adapter")
    tokens = tiny.tokens(2, 19, vocab=runs.VOCAB)
    with torch.no_grad():
        a, b = merged(tokens).float(), model(tokens).float()
    assert (a - b).norm() / b.norm() < 0.05


def test_processes_agree_on_adapters(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    from test_train_parallel import launch

    how = dict(shape={}, model=base, window="config", lora_rank=4, precision="float32", steps=4)
    kinds = {"none": how, "nf4": how | dict(quantize="nf4")}
    launch(tmp_path, 2, [dict(made, out=f"{tmp_path}/{name}-many") for name, made in kinds.items()])
    for name, made in kinds.items():
        runs.run(tmp_path, out=f"{tmp_path}/{name}-one", **made)
        one, many = ([float(x) for x in runs.losses(tmp_path / f"{name}-{n}")] for n in ("one", "many"))
        assert many == pytest.approx(one, rel=2e-6), name


# ---- errors ----


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter: found adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), "no whole safetensors"),
        (lambda f: edit(f, use_dora=True), "has use_dora; plain LoRA"),
        (lambda f: edit(f, peft_type="IA3"), "peft_type IA3"),
    ],
)
def test_bad_adapters(tmp_path, change, message):
    save(adapted(), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapters.load_adapter(tiny.model(), tmp_path)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_model(tmp_path):
    save(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model|the model needs"):
        adapters.load_adapter(tiny.model(dim=32), tmp_path)


def test_generation_takes_an_adapter(tmp_path, base, capsys, monkeypatch):
    """Merged or not, the command line draws the same tokens, and others than without the adapter."""
    from mistral import generate, tokenizer

    class Letters:
        stop_ids = ()

        def encode(self, text, bos=True):
            return [ord(c) % runs.VOCAB for c in text]

        def decode(self, ids):
            return "".join(chr(48 + i) for i in ids)

    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda path: Letters())
    model = load_model(base, dtype=torch.float32, progress=False)
    adapters.add_adapters(model, 4, 6.0, ALL)
    for name, tensor in adapters.adapter_state(model).items():
        if "lora_B" in name:
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    folder = str(save(model, tmp_path))
    seen = []
    for extra in ([], ["--adapter", folder], ["--adapter", folder, "--merge"]):
        how = ["--model", base, "--prompt", "some text", "--max-tokens", "12", "--dtype", "float32"]
        assert generate.main([*how, "--device", "cpu", *extra]) == 0
        seen.append(capsys.readouterr().out)
    assert seen[0] != seen[1] == seen[2]


@pytest.mark.parametrize("quantize", [False, True])
def test_peft_on_a_patched_hugging_face_model(quantize):
    """The patch keeps the projections that adapters sit on: loss and gradients are those of the unpatched model."""
    from mistral_kernels.patch import patch

    plain = tiny.model(vocab_size=runs.VOCAB, **WIDE)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tokens = tiny.tokens(2, 19, vocab=runs.VOCAB)
    found = []
    for patched in (False, True):
        model = hugging_face(plain)
        if quantize:
            pytest.importorskip("bitsandbytes")
            adapters.quantize_nf4(model, names, torch.float32)
        if patched:
            patch(model)
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0))
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for n, p in made.named_parameters() if "lora_" in n):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        loss = made.train()(tokens, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for n, p in made.named_parameters() if "lora_" in n)])
    assert len(found[0]) == 1 + 2 * 7 * 3
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5 * max(1.0, theirs.abs().max().item()))
