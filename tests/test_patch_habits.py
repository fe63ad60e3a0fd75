"""What users do with a model: save, copy, pickle, cast, tie, resize, ask for attention; each with a patched one."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from test_patch import FAMILIES, OPS, make, run, tokens

from mistral_kernels.patch import patch, unpatch

transformers = pytest.importorskip("transformers", minversion="5.20")
pytestmark = pytest.mark.usefixtures("one_thread")


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)


def equal(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def replaced_everything(report):
    assert set(report.replaced.values()) == set(OPS), str(report)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mistral", dict(sliding_window=None)),
        ("mistral", dict(head_dim=24)),
        ("mistral", dict(sliding_window=1)),
        ("mistral", dict(num_key_value_heads=1, num_attention_heads=3, hidden_size=48)),
        ("llama", dict(attention_bias=True)),
        ("llama", dict(mlp_bias=True)),
        ("llama", dict(tie_word_embeddings=True)),
        ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
        ("qwen3", dict(head_dim=40)),
    ],
    ids=str,
)
def test_configs(family, changes):
    model, ids = make(family, **changes), tokens()
    expected = run(model, ids)
    replaced_everything(patch(model))
    close(run(model, ids), expected)
    unpatch(model)
    equal(run(model, ids), expected)


@pytest.fixture
def picklable():
    """Where the package `kernels` is installed, transformers puts local classes into its models."""
    try:
        pickle.dumps(make())
    except AttributeError as error:
        pytest.skip(f"transformers' own models cannot be pickled here: {error}")


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    with io.BytesIO() as file:
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("copied", [through_pickle, through_torch, copy.deepcopy])
def test_copies_are_patched(copied, impl, request):
    if copied is not copy.deepcopy:
        request.getfixturevalue("picklable")
    model, ids = make(), tokens()
    expected = run(model, ids)
    patch(model, impl=impl)
    patched, other = run(model, ids), copied(model)
    for module in other.modules():
        own = module.__dict__.get("forward")
        assert own is None or own.__self__ is module
    with torch.no_grad():
        model.lm_head.weight.zero_()
    equal(run(other, ids), patched)
    again = patch(other)
    assert not again.replaced and all("already" in reason for reason in again.left.values())
    unpatch(other)
    equal(run(other, ids), expected)
    replaced_everything(patch(other))


def logits_of(pickled, ids, answers):
    answers.send(pickle.loads(pickled)(ids).logits.detach().numpy())


def test_pickles_arrive_patched_in_another_process(picklable):
    """Where nobody has patched or registered anything before."""
    model, ids = make(), tokens()
    patch(model)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=logits_of, args=(pickle.dumps(model), ids, theirs))
    process.start()
    assert mine.poll(120), "the other process gave no answer"
    found = torch.from_numpy(mine.recv())
    process.join(30)
    assert torch.equal(found, model(ids).logits)


def test_other_methods_pickle_as_ever(picklable):
    patch(make())
    text = "a,b"
    assert pickle.loads(pickle.dumps(text.split))(",") == ["a", "b"]
    assert pickle.loads(pickle.dumps(make().num_parameters))() == make().num_parameters()


def test_saved_and_loaded(tmp_path):
    model, ids = make(), tokens()
    expected = run(model, ids)
    patch(model)
    model.save_pretrained(tmp_path)
    assert "mistral_kernels" not in (tmp_path / "config.json").read_text()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.config._attn_implementation == "sdpa"
    equal(run(other, ids), expected)
    replaced_everything(patch(other))
    close(run(other, ids), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_after_the_patch(dtype):
    model, ids = make(), tokens()
    expected = run(model, ids)["logits"]
    patch(model)
    found = model.to(dtype)(ids).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_meta_device(impl):
    """As accelerate plans memory, and as a model is built before its weights are there."""
    model, ids = make(), tokens()
    patch(model, impl=impl)
    model.to("meta")
    found = model(ids.to("meta"), labels=ids.to("meta"))
    assert found.logits.device.type == "meta" and found.logits.shape == (2, 21, 97)


def test_built_on_meta_then_filled():
    source, ids = make(), tokens()
    expected = run(source, ids)
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(source.config)
    replaced_everything(patch(model))
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = source.model.rotary_emb
    close(run(model, ids), expected)


@pytest.mark.parametrize("order", ["instance first", "class first"])
@pytest.mark.parametrize("undo", ["instance first", "class first"])
def test_instance_and_class(order, undo):
    model, ids = make(), tokens()
    expected = run(model, ids)
    targets = {"instance first": (model, "mistral"), "class first": ("mistral", model)}
    try:
        for target in targets[order]:
            patch(target)
        close(run(model, ids), expected)
        unpatch(targets[undo][0])
        close(run(model, ids), expected)
    finally:
        unpatch(targets[undo][0])
        unpatch(targets[undo][1])
    equal(run(model, ids), expected)
    unpatch(model)
    unpatch("mistral")
    equal(run(model, ids), expected)


def test_piece_by_piece():
    model, ids = make(), tokens()
    expected = run(model, ids)
    for op in OPS:
        assert set(patch(model, ops=op).replaced.values()) == {op}
        close(run(model, ids), expected)
    unpatch(model)
    equal(run(model, ids), expected)


class Derived(transformers.MistralForCausalLM):
    pass


@pytest.mark.parametrize("name", ["MistralForCausalLM", "mistral", Derived, transformers.MistralModel])
def test_names_of_classes(name):
    try:
        report = patch(name)
        assert report.replaced["MistralMLP"] == "swiglu" and report.replaced["MistralForCausalLM"]
        assert make().config._attn_implementation == "mistral_kernels"
    finally:
        unpatch(name)
    assert make().config._attn_implementation == "sdpa"


def test_a_name_that_is_no_model():
    for name in ("MistralConfig", "models", "Mistral", "nothing.here"):
        with pytest.raises(ValueError, match=f"model is '{name}'"):
            patch(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_and_hidden_states(family):
    model, ids = make(family), tokens()
    model.set_attn_implementation("eager")
    wanted = dict(output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        expected = model(ids, **wanted)
        patch(model)
        found = model(ids, **wanted)
    assert len(found.attentions) == 2 and len(found.hidden_states) == 3
    pairs = zip(found.attentions + found.hidden_states, expected.attentions + expected.hidden_states, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads(head):
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"MistralFor{head}")(make().config).eval(), tokens()
    with torch.no_grad():
        expected = model(ids)[0]
        report = patch(model)
        torch.testing.assert_close(model(ids)[0], expected, atol=2e-5, rtol=1e-3)
    assert set(report.replaced.values()) == set(OPS) - {"linear_cross_entropy"}


def test_resized_embeddings():
    model, ids = make(), tokens()
    patch(model)
    model.resize_token_embeddings(131)
    found = run(model, ids)
    assert found["logits"].shape[-1] == 131
    unpatch(model)
    close(found, run(model, ids))


def test_gradients_accumulate():
    model, ids = make(), tokens(4)
    expected = run(model, ids)
    patch(model)
    model.train()
    model.zero_grad()
    for half in ids.chunk(2):
        (model(half, labels=half).loss / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-3, msg=name)


def test_frozen_weights():
    model, ids = make(), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    expected = run(model, ids)
    patch(model)
    close(run(model, ids), expected)


@pytest.mark.parametrize(
    "changes", [dict(ignore_index=5), dict(num_items_in_batch=torch.tensor(11)), dict(num_items_in_batch=11.0)], ids=str
)
def test_loss_options(changes):
    model, ids = make(), tokens()
    expected = model(ids, labels=ids, **changes).loss
    patch(model)
    model.train()
    torch.testing.assert_close(model(ids, labels=ids, **changes).loss, expected)


def test_embeddings_instead_of_ids():
    model, ids = make(), tokens()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids).loss
    (expected,) = torch.autograd.grad(loss, embedded)
    patch(model)
    model.train()
    (found,) = torch.autograd.grad(model(inputs_embeds=embedded, labels=ids).loss, embedded)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, top_k=5),
        dict(num_beams=2, num_return_sequences=2),
        dict(prompt_lookup_num_tokens=3),
        dict(use_cache=False),
        dict(repetition_penalty=1.3),
    ],
    ids=str,
)
def test_ways_to_generate(options):
    model, ids = make(), tokens(1 if "prompt_lookup_num_tokens" in options else 2)

    def generated():
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=10, eos_token_id=None, **options)

    expected = generated()
    patch(model)
    assert torch.equal(generated(), expected)


def test_a_norm_of_another_kind_is_told():
    """Starcoder2 has the layer, and LayerNorms in it."""
    sizes = make("llama").config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.Starcoder2Config(**{n: sizes[n] for n in names}, num_key_value_heads=2)
    model, ids = transformers.Starcoder2ForCausalLM(config).eval(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        report = patch(model)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-3)
    assert "the norm behind its addition" in report.left["model.layers.0"]
    assert "attention" in report.replaced.values() and "add_rms_norm" not in report.replaced.values()
