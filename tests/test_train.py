"""The training loop: it learns, it matches a plain loop, and a run that was cut off goes on bitwise the same."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_runs as runs

import mistral_kernels
from mistral.model import Transformer
from mistral.training import checkpoints
from mistral.training.batches import Order, Sequences, make_batch
from mistral.training.loss import token_loss
from mistral.training.optimizer import LossScale, learning_rate
from mistral.training.parallel import World
from mistral.training.trainer import Trainer
from mistral.weights import load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_writes_what_it_promises(tmp_path):
    summary = runs.run(tmp_path, steps=4, save_every=1, keep=2, export="hf", eval_every=2)
    out = tmp_path / "out"
    assert [f.name for f in checkpoints.step_folders(out / "checkpoints")] == ["step-00000003", "step-00000004"]
    assert len(runs.losses(out)) == 4 and (out / "loss.png").stat().st_size > 1000
    assert summary["eval_loss"] < math.log(runs.VOCAB)
    assert (
        runs.run(tmp_path, steps=4, save_every=1, keep=2, export="hf", eval_every=2) == summary
    )  # nothing is left to do
    exported = load_model(out / "export", dtype=torch.float32, progress=False)
    trained = Trainer(runs.settings(tmp_path, steps=4), World("cpu")).trainee.model
    for name, weight in trained.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight), name


def test_steps_match_a_plain_loop(tmp_path):
    """Accumulated, packed and fused steps against dense, whole ones with torch's own AdamW, loss and clipping."""
    made = runs.settings(tmp_path, micro_batch=2, clip=0.5)
    trainer = Trainer(made, World("cpu"))
    plain = Transformer(trainer.config, ops=mistral_kernels.reference).double()
    plain.load_state_dict({n: t.double() for n, t in trainer.trainee.model.state_dict().items()})
    plain.reset_tables(torch.float64)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    order = Order(len(trainer.sequences), 6, 0)
    for step in range(3):
        found = trainer.train_step()
        total, items = 0.0, 0
        for number in order.of_step(step):
            tokens, labels, cuts = trainer.sequences.read(number)
            for low, high in zip([0, *cuts], cuts, strict=False):  # each document by itself
                logits = plain(tokens[None, low:high])[0]
                total += torch.nn.functional.cross_entropy(logits, labels[low:high], reduction="sum")
                items += int((labels[low:high] != -100).sum())
        (total / items).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, made)
        optimizer.step()
        optimizer.zero_grad()
        assert found["loss"] == pytest.approx((total / items).item(), rel=1e-6)
        assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for (name, ours), theirs in zip(trainer.trainee.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_going_on_is_bitwise_the_same(tmp_path, precision):
    how = dict(precision=precision, checkpoint_activations=precision == "bfloat16", loss_scale=2.0**30)
    runs.run(tmp_path, out=str(tmp_path / "whole"), **how)
    whole = Trainer(runs.settings(tmp_path, out=str(tmp_path / "parts"), save_every=2, **how), World("cpu"))
    for _ in range(4):
        whole.train_step()
        if whole.step == 3:
            whole.save()
    whole.world.stop()
    runs.run(tmp_path, out=str(tmp_path / "parts"), **how)
    expected = runs.losses(tmp_path / "whole")
    assert runs.losses(tmp_path / "parts") == expected[3:] and len(expected) == 6
    if precision == "float16":  # 2^30 overflows: steps were skipped until the scale fitted
        scales = [float(row["loss_scale"]) for row in runs.read_csv(tmp_path / "whole" / "log.csv")]
        assert scales[-1] < scales[0]


def test_precisions_agree(tmp_path):
    found = {}
    for precision in ("float32", "bfloat16", "float16"):
        runs.run(tmp_path, out=str(tmp_path / precision), precision=precision, loss_scale=128.0)
        found[precision] = [float(x) for x in runs.losses(tmp_path / precision)]
    for precision in ("bfloat16", "float16"):
        assert found[precision] != found["float32"]
        assert found[precision] == pytest.approx(found["float32"], rel=2e-3)


def test_recomputation_changes_nothing(tmp_path):
    runs.run(tmp_path, out=str(tmp_path / "a"), steps=3)
    runs.run(tmp_path, out=str(tmp_path / "b"), steps=3, checkpoint_activations=True)
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")


def test_both_losses_agree():
    h, w = torch.randn(11, 8, dtype=torch.float64), torch.randn(13, 8, dtype=torch.float64)
    labels = torch.randint(13, (11,))
    labels[3] = -100
    both = [token_loss(h, w, labels, 5.0, fused) for fused in (True, False)]
    torch.testing.assert_close(both[0].double(), both[1].double(), rtol=1e-6, atol=0)


def test_learning_rate(tmp_path):
    made = runs.settings(tmp_path, warmup=4, steps=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, 10, made) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_loss_scale():
    scale = LossScale(8.0, True, patience=2)
    for finite, value in ((False, 4.0), (True, 4.0), (True, 8.0), (False, 4.0), (True, 4.0), (False, 2.0)):
        scale.update(finite)
        assert scale.value == value
    assert LossScale(8.0, False).value == 1.0


def test_divergence_is_an_error(tmp_path):
    trainer = Trainer(runs.settings(tmp_path), World("cpu"))
    with torch.no_grad():
        trainer.parameters[0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower lr"):
        trainer.train_step()


def test_a_document_does_not_see_another(tmp_path):
    """Changing one document's tokens leaves the loss of the others bitwise alone."""
    trainer = Trainer(runs.settings(tmp_path), World("cpu"))
    sequences: Sequences = trainer.sequences
    number = next(n for n in range(len(sequences)) if len(sequences.read(n)[2]) > 1)
    batch = make_batch(sequences, [number])
    cut = int(batch.cu_seqlens[1])
    with torch.no_grad():
        before = trainer.trainee.model(batch.tokens, cu_seqlens=batch.cu_seqlens)
        batch.tokens[:cut] = (batch.tokens[:cut] + 1) % runs.VOCAB
        after = trainer.trainee.model(batch.tokens, cu_seqlens=batch.cu_seqlens)
    assert torch.equal(before[cut:], after[cut:]) and not torch.equal(before[:cut], after[:cut])


# ---- killed ----


def log_file(folder: Path) -> int | None:
    log = folder / "killed" / "log.csv"
    return log.stat().st_ino if log.exists() else None


def kill_and_resume(folder: Path, delay: float, extra: tuple[str, ...] = ()) -> bool:
    """Starts a run, kills it after `delay` seconds from its first log line; returns whether it was still running."""
    command = [sys.executable, "-m", "training_runs", str(folder), extra[0]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / p) for p in ("kernels", "", "tests")])}
    before = log_file(folder)
    child = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while child.poll() is None and log_file(folder) == before:  # it is replaced when training starts
        time.sleep(0.01)
    time.sleep(delay)
    running = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    return running


def check_killed(folder: Path, delays: list[float], steps: int) -> int:
    """Kills a run at each of these moments in turn, then lets it finish; returns how many kills met a running one."""
    how = f'[{{"out": "{folder}/killed", "steps": {steps}, "save_every": 1, "threads": 1, "precision": "float32"}}]'
    runs.run(folder, out=str(folder / "whole"), steps=steps)
    hits = 0
    for delay in delays:
        hits += kill_and_resume(folder, delay, (how,))
        left = checkpoints.newest(folder / "killed" / "checkpoints")
        if left is not None:  # whole, and never behind the last one that was reported
            assert checkpoints.read_state(left)["step"] == int(left.name[-8:])
    runs.run(folder, out=str(folder / "killed"), steps=steps, save_every=1)
    assert runs.losses(folder / "killed") == runs.losses(folder / "whole")
    assert not list((folder / "killed" / "checkpoints").glob("*.partial"))
    return hits


def test_killed_runs_go_on_bitwise(tmp_path):
    assert check_killed(tmp_path, [0.05], steps=40) >= 1


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    generator = torch.Generator().manual_seed(int(time.time()))
    delays = (torch.rand(30, generator=generator) * 0.6).tolist()
    assert check_killed(tmp_path, delays, steps=600) >= 25


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    runs.run(tmp_path, steps=2, save_every=1)
    folder = tmp_path / "out" / "checkpoints"
    (folder / "step-00000003.partial").mkdir()
    (folder / "step-00000003.partial" / "__0_0.distcp").write_bytes(b"torn")
    assert runs.run(tmp_path, steps=3)["first_step"] == 2
    assert not list(folder.glob("*.partial"))


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    runs.run(tmp_path, steps=1)
    newest = checkpoints.newest(tmp_path / "out" / "checkpoints")
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged.*remove it"):
        runs.run(tmp_path, steps=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seed=1), "seed is 1.*made with 0"),
        (dict(seq_len=12), "seq_len is 12.*made with 24"),
        (dict(resume="must", out="elsewhere"), "has no checkpoint"),
    ],
)
def test_going_on_with_other_settings_is_an_error(tmp_path, changes, message):
    runs.run(tmp_path, steps=1)
    if "out" in changes:
        changes = changes | dict(out=str(tmp_path / changes["out"]))
    with pytest.raises(ValueError, match=message):
        runs.run(tmp_path, **dict(steps=2) | changes)


def test_a_profiled_step_and_no_checkpoints(tmp_path):
    import json

    runs.run(tmp_path, out=str(tmp_path / "plain"), steps=2)
    runs.run(tmp_path, steps=2, profile=2, keep=0)
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["step"] == 2 and found["longest"] and 0 <= found["communication_share_of_step"] < 1
    assert checkpoints.newest(tmp_path / "out" / "checkpoints") is None
    assert runs.losses(tmp_path / "out") == runs.losses(tmp_path / "plain")
