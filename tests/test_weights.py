"""Checkpoints in Mistral's and Hugging Face's formats: round trips, parity with transformers, and what is refused."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mistral import convert, weights
from mistral.checkpoint import expected_shapes
from mistral.config import ModelConfig
from mistral.model import Transformer
from mistral_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
load = partial(weights.load_model, dtype=torch.float32, progress=False)
save_hf = partial(weights.save_hf, progress=False)
save_mistral = partial(weights.save_mistral, progress=False)


def same(a: Transformer, b: Transformer) -> bool:
    """Bitwise, with the config."""
    left, right = a.state_dict(), b.state_dict()
    return a.config == b.config and left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return (found - wanted).abs().max() < 2e-4 * wanted.abs().max()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- the order of rotary pairs ----


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(), (1,), (3,)]))
def test_orders_are_inverse_and_as_documented(heads, half, columns):
    w = torch.randn(heads * 2 * half, *columns)
    split = weights.to_half_split(w, heads)
    for h in range(heads):
        for i in range(half):
            for j in range(2):
                assert torch.equal(split[h * 2 * half + j * half + i], w[h * 2 * half + 2 * i + j])
    assert torch.equal(weights.to_interleaved(split, heads), w)
    assert torch.equal(weights.to_half_split(weights.to_interleaved(w, heads), heads), w)


@pytest.mark.parametrize("rows, heads", [(12, 4), (10, 4), (0, 2), (8, 0)])
def test_rows_that_are_no_heads_are_refused(rows, heads):
    for order in (weights.to_half_split, weights.to_interleaved):
        with pytest.raises(ValueError, match="multiple of"):
            order(torch.zeros(rows, 3), heads)


def test_interleaved_weights_on_interleaved_rope_are_the_same_model(tmp_path):
    save_mistral(tiny.model(), tmp_path)
    ops = SimpleNamespace(**vars(reference) | {"rope": partial(reference.rope, interleaved=True)})
    raw = Transformer(tiny.CONFIG, ops=ops)
    raw.load_state_dict(load_file(tmp_path / "consolidated.safetensors"))
    split = load(tmp_path, ops=reference)
    ids = tiny.tokens(2, 30)
    with torch.inference_mode():
        wanted = split(ids)
        assert close(raw(ids), wanted)
        wk = raw.layers[0].attention.wk.weight.data
        # One head of twice the size is what k permuted by the wrong number of heads looks like.
        wk.copy_(weights.to_interleaved(weights.to_half_split(wk, tiny.CONFIG.n_kv_heads), 1))
        assert not close(raw(ids), wanted)


# ---- round trips ----


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), dict(sliding_window=9, rope_theta=1e6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_bitwise(tmp_path, changes, dtype):
    net = tiny.model(dtype=dtype, **changes)
    save_mistral(net, tmp_path / "a")
    from_mistral = load(tmp_path / "a", dtype=dtype)
    save_hf(from_mistral, tmp_path / "b", max_shard_bytes=20_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    from_hf = load(tmp_path / "b", dtype=dtype)
    save_mistral(from_hf, tmp_path / "c")
    assert same(net, from_mistral) and same(net, from_hf)
    assert files(tmp_path / "a") == files(tmp_path / "c")
    stored = load_file(tmp_path / "a" / "consolidated.safetensors")
    assert stored.keys() == net.state_dict().keys()
    assert not torch.equal(stored["layers.0.attention.wq.weight"], net.state_dict()["layers.0.attention.wq.weight"])


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), dict(attention_bias=True)])
def test_expected_shapes_are_the_models(changes):
    net = Transformer(tiny.config(**changes))
    assert expected_shapes(net.config) == {name: tuple(t.shape) for name, t in net.state_dict().items()}


def test_consolidated_shards_are_one_checkpoint(tmp_path):
    net = tiny.model()
    save_mistral(net, tmp_path)
    whole = tmp_path / "consolidated.safetensors"
    state = load_file(whole)
    whole.unlink()
    for n, part in enumerate((dict(list(state.items())[:9]), dict(list(state.items())[9:])), 1):
        save_file(part, tmp_path / f"consolidated-0000{n}-of-00002.safetensors")
    assert same(net, load(tmp_path))
    (tmp_path / "consolidated-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 files.*consolidated-00002-of-00002"):
        load(tmp_path)


def test_loading_converts_sets_the_window_and_takes_ops(tmp_path):
    net = tiny.model(sliding_window=5)
    save_hf(net, tmp_path)
    assert load(tmp_path).config.sliding_window == 5
    assert load(tmp_path, window=None).config.sliding_window is None
    found = load(tmp_path, dtype=torch.bfloat16, window=3, ops=reference)
    assert found.config.sliding_window == 3 and found.layers[0].attention_norm.ops.rms_norm is reference.rms_norm
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name].bfloat16())
    assert found.rope.cos.dtype == torch.float32 and not found.training
    assert weights.read_config(tmp_path) == net.config


# ---- transformers ----


def hf_model(kind: str, **changes):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    if kind == "Mistral":
        sizes["sliding_window"] = 7
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("shard", ["10GB", "30KB"])
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("Mistral", {}),
        ("Llama", {}),
        ("Llama", dict(tie_word_embeddings=True)),
        ("Llama", dict(rope_parameters={**LLAMA3, "rope_theta": 5e5})),
        ("Qwen2", {}),
    ],
)
def test_what_transformers_saves_gives_its_logits(tmp_path, kind, changes, shard):
    theirs = hf_model(kind, **changes)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    ours = load(tmp_path / "hf")
    ids = tiny.tokens(2, 30)
    with torch.inference_mode():
        wanted = theirs(ids).logits
        assert close(ours(ids), wanted)
        if "rope_parameters" in changes or kind == "Qwen2":
            with pytest.raises(ValueError, match=r"params\.json has no entry"):
                save_mistral(ours, tmp_path / "mistral")
            return
        assert convert.main([str(tmp_path / "hf"), str(tmp_path / "mistral"), "--to", "mistral", "--quiet"]) == 0
        assert close(load(tmp_path / "mistral")(ids), wanted)


@pytest.mark.parametrize(
    "changes", [dict(sliding_window=7), dict(tie_embeddings=True), dict(rope_scaling=LLAMA3), dict(attention_bias=True)]
)
def test_transformers_loads_what_is_saved(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    net = tiny.model(**changes)
    save_hf(net, tmp_path, max_shard_bytes=30_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    with torch.inference_mode():
        assert close(theirs(tiny.tokens(2, 30)).logits, net(tiny.tokens(2, 30)))
    assert same(net, load(tmp_path))
    made = getattr(transformers, type(theirs.config).__name__)(**weights.hf_config(net.config))
    assert ModelConfig.from_hf(made.to_dict() | {"architectures": [type(theirs).__name__]}) == net.config


# ---- what is refused ----


@pytest.fixture
def saved(tmp_path):
    save_hf(tiny.model(), tmp_path)
    return tmp_path


def change(folder: Path, edit) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


def test_one_error_names_every_tensor_that_does_not_fit(saved, monkeypatch):
    def edit(state):
        del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
        state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        state["model.layers.7.input_layernorm.weight"] = torch.ones(40)
        state["lm_head.weight"] = torch.zeros(96, 40)
        state["model.embed_tokens.weight"] = torch.zeros(97, 40, dtype=torch.int8)

    change(saved, edit)
    monkeypatch.setattr("mistral.weights._read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError) as caught:
        load(saved)
    for part in (
        "missing (2): model.norm.weight [40], model.layers.1.mlp.up_proj.weight [56, 40]",
        "unknown (2): ",
        "model.layers.0.self_attn.q_norm.weight [16]",
        "model.layers.7.input_layernorm.weight [40]",
        "misshapen (1): lm_head.weight is [96, 40], needed [97, 40]",
        "not read (1): model.embed_tokens.weight is I8",
    ):
        assert part in str(caught.value)


def test_a_long_error_is_cut_short(saved):
    change(saved, lambda state: [state.pop(name) for name in list(state) if ".layers." in name])
    with pytest.raises(ValueError, match=r"missing \(27\): .*, and 17 more"):
        load(saved)


def test_computed_tables_of_old_checkpoints_are_ignored(saved):
    change(saved, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert same(load(saved), tiny.model())


def test_a_stored_copy_of_a_tied_embedding_must_be_the_same(tmp_path):
    net = tiny.model(tie_embeddings=True)
    save_hf(net, tmp_path)
    embedding = net.tok_embeddings.weight.detach()
    change(tmp_path, lambda state: state.update({"lm_head.weight": embedding.clone()}))
    assert same(load(tmp_path), net)
    change(tmp_path, lambda state: state.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("names", [["consolidated.00.pth", "params.json"], ["pytorch_model.bin", "config.json"]])
def test_pickles_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    for path in (tmp_path, tmp_path / names[0]):
        with pytest.raises(ValueError, match=rf"{re.escape(names[0])}.*run any code(.|\n)*weights_only=True"):
            load(path)


def test_an_incomplete_folder_says_what_was_found_and_what_is_needed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"Found: config\.json, notes\.txt(.|\n)*consolidated(.|\n)*\.gguf"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="never downloaded"):
        load(tmp_path / "mistralai" / "Mistral-7B")
    with pytest.raises(ValueError, match="neither a folder nor a GGUF"):
        load(tmp_path / "notes.txt")


def test_hugging_face_is_taken_where_there_are_both(saved):
    save_mistral(tiny.model(seed=1), saved)
    assert weights.open_checkpoint(saved).format == "hf" and same(load(saved), tiny.model())
    with pytest.raises(ValueError, match="give its folder"):
        load(saved / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_file_that_is_cut_short_says_so(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is no whole safetensors file; cut short"):
        load(saved)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load(saved)


def test_an_index_must_be_complete_and_stay_in_its_folder(tmp_path):
    save_hf(tiny.model(), tmp_path, max_shard_bytes=40_000)
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of {len(shards)} files of weights: {shards[1].name}"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load(tmp_path)
    index.write_text("[")
    with pytest.raises(ValueError, match=r"index\.json is no JSON"):
        load(tmp_path)


# ---- saving whole or not at all ----


@pytest.mark.parametrize("save", [save_mistral, partial(save_hf, max_shard_bytes=60_000)], ids=["mistral", "hf"])
def test_a_failure_leaves_what_was_there(tmp_path, save):
    save(tiny.model(), tmp_path)
    before = files(tmp_path)
    broken = tiny.model(seed=1)
    broken.norm.weight = torch.nn.Parameter(torch.empty(40, device="meta"))  # cannot be written, and is not the first
    with pytest.raises(NotImplementedError):
        save(broken, tmp_path)
    assert files(tmp_path) == before
    save(tiny.model(seed=1), tmp_path)
    assert files(tmp_path).keys() == before.keys() and same(load(tmp_path), tiny.model(seed=1))


def test_nothing_is_renamed_before_all_is_on_the_disk(saved, monkeypatch):
    import os

    synced, renamed = [], []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(len(renamed)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(Path(b).name), replace(a, b)))
    save_hf(tiny.model(seed=1), saved)
    assert synced == [0, 0, 2] and renamed == ["model.safetensors", "config.json"]


def test_files_that_would_be_taken_for_the_new_ones_are_not_kept(saved):
    with pytest.raises(ValueError, match=r"already has model\.safetensors, which would be"):
        save_hf(tiny.model(), saved, max_shard_bytes=40_000)
    assert same(load(saved), tiny.model())


# ---- the converter ----


def test_the_converter_keeps_or_changes_the_dtype_and_copies_the_tokenizer(tmp_path, capsys):
    save_hf(tiny.model(), tmp_path / "a", max_shard_bytes=40_000)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "notes.txt").write_text("")
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "mistral", "--quiet"]) == 0
    assert files(tmp_path / "b").keys() == {"consolidated.safetensors", "params.json", "tokenizer.json"}
    assert same(load(tmp_path / "b"), tiny.model())
    options = ["--to", "hf", "--dtype", "bfloat16", "--quiet"]
    assert convert.main([str(tmp_path / "b"), str(tmp_path / "c"), *options]) == 0
    kept = dict(weights.load_state(tmp_path / "c", progress=False))
    assert all(torch.equal(kept[n], t.bfloat16()) for n, t in tiny.model().state_dict().items())
    assert "model.safetensors" in capsys.readouterr().out


def test_the_converter_shows_examples_and_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        convert.main(["--help"])
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^convert: .* does not exist"):
        convert.main([str(tmp_path / "no"), str(tmp_path), "--to", "hf"])
