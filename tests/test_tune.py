"""Tuning with a stand-in GPU and a stand-in timer: what is tried, what is refused, what is written and then used."""

import json

import pytest
import torch

pytest.importorskip("triton")

from mistral_kernels import _tuned, tune
from mistral_kernels._dispatch import backends, triton_interpreted
from mistral_kernels.attention import triton_backward_launch as backward
from mistral_kernels.attention import triton_forward as forward
from mistral_kernels.attention.triton_blocks import Config

CPU = torch.device("cpu")
NAME = "NVIDIA Stand-In 80GB"
OTHER = Config(16, 16, 4, 1)
needs_interpreter = pytest.mark.skipif(
    backends()["triton"] is not None or not triton_interpreted(), reason="runs in Triton's interpreter"
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The CPU stands in for a GPU, and a temporary folder for the user's."""
    monkeypatch.setattr(_tuned, "device_name", lambda _: NAME)
    _tuned.use(tmp_path / "cache")
    yield tmp_path / "cache"
    _tuned.use(None)


def qkv(dim=64):
    return [torch.zeros(1, 4, 2, dim, dtype=torch.float16) for _ in range(3)]


def wrote(kernel, config, dim=64, itemsize=2):
    _tuned.write(_tuned.path(NAME), {_tuned.key(kernel, dim, itemsize): _tuned.entry(config, 1e-3, 2e-3)})


@needs_interpreter
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_the_fastest_right_candidate_wins(kernel, monkeypatch):
    """One is fast and wrong, one does not compile: neither is taken, and each is named."""
    wrong, broken, slow, fast = (Config(16, 16, 4, n) for n in (1, 2, 3, 4))
    monkeypatch.setattr(tune, "candidates", lambda *_: [slow, wrong, broken, fast])
    monkeypatch.setattr(tune, "passes", lambda _, config, *__: config != wrong)
    real = tune.calls

    def calls(*args):
        run, tensors = real(*args)

        def raises(config):
            if config == broken:
                raise RuntimeError("out of resource: shared memory")
            times.append(config)
            return run(config)

        return raises, tensors

    def timer(run):
        run()
        return {slow: 3.0, fast: 2.0}[times[-1]]

    times, said = [], []
    monkeypatch.setattr(tune, "calls", calls)
    found = tune.best(kernel, 16, torch.float32, CPU, timer=timer, length=17, window=9, heads=(2, 1), say=said.append)
    assert Config(**found["config"]) == fast and found["built_in"] == 3e6 and found["microseconds"] == 2e6
    assert any("stages=1" in s and "wrong results" in s for s in said)
    assert any("stages=2" in s and "RuntimeError" in s for s in said)


@needs_interpreter
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_wrong_results_do_not_pass(kernel, monkeypatch):
    assert tune.passes(kernel, Config(64, 64, 4, 1), 16, torch.float16, CPU)
    real = tune.calls

    def calls(*args):
        run, tensors = real(*args)
        return lambda config: (lambda out: (*out[:-1], out[-1] * 1.01))(run(config)), tensors

    monkeypatch.setattr(tune, "calls", calls)
    assert not tune.passes(kernel, Config(64, 64, 4, 1), 16, torch.float16, CPU)


def test_launchers_use_what_was_written(folder):
    before = forward.choose(*qkv()), backward.choose(*qkv(), qkv()[0])
    assert OTHER not in (before[0], *before[1])
    wrote("attention_forward", OTHER)
    assert forward.choose(*qkv()) == OTHER and backward.choose(*qkv(), qkv()[0]) == before[1]
    wrote("attention_dkv", OTHER)
    assert backward.choose(*qkv(), qkv()[0]) == (before[1][0], OTHER)
    wrote("attention_dq", OTHER)
    assert backward.choose(*qkv(), qkv()[0]) == (OTHER, OTHER)
    assert forward.choose(*qkv()) == OTHER  # the earlier entries stay
    assert forward.choose(*qkv(128)) != OTHER and forward.choose(*(t.float() for t in qkv())) != OTHER


def test_a_descriptor_is_not_used_where_it_cannot_read(folder):
    wrote("attention_forward", Config(16, 16, 4, 1, tma=True))
    q, k, v = qkv()
    assert forward.choose(q, k, v).tma
    assert not forward.choose(q, k[:, :1].expand_as(k), v).tma


def test_another_gpu_or_triton_has_its_own_file(folder, monkeypatch):
    wrote("attention_forward", OTHER)
    file = _tuned.path(NAME)
    assert file.parent == folder and "nvidia-stand-in-80gb" in file.name and [file] == list(folder.iterdir())
    assert _tuned.path("NVIDIA H100") != file
    monkeypatch.setattr("triton.__version__", "0.1")
    assert _tuned.path(NAME) != file


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    wrote("attention_forward", OTHER)
    old = _tuned.path(NAME).read_text()

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="no space"):
        wrote("attention_dq", OTHER)
    assert _tuned.path(NAME).read_text() == old and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 2, "entries": {}}',
        '{"format": 1, "entries": {"any kernel": {"config": {}}}}',
    ],
)
def test_a_damaged_file_is_said_and_not_used(folder, content):
    folder.mkdir()
    _tuned.path(NAME).write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read.*delete it"):
        _tuned.read(_tuned.path(NAME))
    with pytest.warns(UserWarning, match="built-in configurations are used"):
        assert forward.choose(*qkv()) == forward.production_config(80, 64, 2)


def test_candidates_begin_with_the_built_in_choice():
    for kernel in tune.KERNELS:
        for of in (80, 86, 90, 100):
            for dim in tune.DIMS:
                for itemsize in (2, 4):
                    found = tune.candidates(kernel, of, dim, itemsize)
                    assert found[0] == tune.built_in(kernel, of, dim, itemsize)
                    assert len(found) == len(set(found)) >= 4
                    assert of >= 90 or not any(c.tma or c.lag for c in found)


def test_without_a_gpu_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--show"], ["--delete"]):
        with pytest.raises(SystemExit, match="CUDA GPU"):
            tune.main([*options, "--cache", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_command(folder, monkeypatch, capsys):
    """Tune, show, delete, as on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "triton_interpreted", lambda: False)
    monkeypatch.setattr(tune, "backends", lambda: {"triton": None})
    monkeypatch.setattr(tune, "best", lambda *_, **__: _tuned.entry(OTHER, 1e-3, 2e-3))
    options = ["--cache", str(folder)]
    tune.main([*options, "--show"])
    assert "not there" in capsys.readouterr().out
    tune.main([*options, "--kernel", "attention_dq", "--dim", "64", "--dim", "128"])
    assert "2 entries" in capsys.readouterr().out
    assert backward.choose(*qkv(), qkv()[0])[0] == OTHER
    tune.main([*options, "--show"])
    assert "attention_dq D128 16 bits" in capsys.readouterr().out
    tune.main([*options, "--delete"])
    assert not list(folder.iterdir()) and "deleted" in capsys.readouterr().out
