"""The benchmark's own promises: parity before time, alternation, slow-downs found, reports that can be read again."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import mistral_kernels
from bench import cases, cli, compare, families, machine, report, runner, timing
from bench.families import attention, rms_norm, swiglu
from bench.limits import FMA_FLOPS, FMA_ROUNDS, Limits, _probe, in_backward
from bench.runner import Settings, fill_row, run_row
from mistral_kernels import testing
from mistral_kernels._isa import _compiled

FAST = timing.Effort(least=3, most=3, seconds=0.0, sample=0.0)
PEERS = ("eager", "F.rms_norm", "SDPA", "matmul", "SDPA, heads as queries", "F.cross_entropy")


@pytest.fixture(autouse=True)
def threads(one_thread):
    pass


@pytest.fixture
def limits():
    found = Limits("cpu", quick=True)
    found.bytes, found.size = 1 << 16, 32
    return found


def settings(**changes):
    return Settings(**(dict(quick=True, peers=PEERS, effort=FAST) | changes))


class Clock:
    """Time that only passes when `spend` is called."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


# ---- rows ----


def test_every_quick_row_runs_with_parity(limits):
    quick = [b for b in families.all_benches() if b.quick]
    assert {b.family for b in quick} >= {"rms_norm", "swiglu", "rope", "attention", "ring_cache"}
    for bench in quick:
        row = run_row(bench, settings(), limits, "command")
        assert not row.refused, row
        assert row.parity["ours"] <= 1
        assert row.seconds["ours"]["median"] > 0 and row.seconds["limit"]["median"] > 0
        assert row.ratios and set(row.ratios) == set(row.seconds) - {"ours", "limit"}
        assert not row.left_out, row.left_out


def test_a_row_has_its_share_of_the_limit_and_of_one_of_its_size(limits):
    row = run_row(rms_norm._norm(4, 64, "float32"), settings(), limits, "command")
    assert row.share["median"] > 0 and row.share_of_size["median"] > 0 and row.seconds.keys() >= {"ours", "limit"}
    assert report.cells(row)[5].endswith("% of its size")
    limits.bytes = 1 << 10
    assert run_row(rms_norm._norm(4, 64, "float32"), settings(), limits, "command").share_of_size is None


def test_keys_are_unique_and_floors_positive():
    benches = list(families.all_benches())
    assert len({b.key for b in benches}) == len(benches)
    for bench in benches:
        assert bench.bytes.value > 0 and bench.flops.value > 0 and bench.limit in cases.LIMITS


def test_backward_rows_time_gradients(limits):
    bench = dataclasses.replace(swiglu._bench(8, 64, packed=False, backward=True), quick=True)
    row = run_row(bench, settings(), limits, "command")
    assert not row.refused and row.direction == "backward"
    call, outputs = cases.timed_call(cases.ours("swiglu"), bench.arguments("cpu"), backward=True)
    wanted = testing.call_with_gradients("swiglu", bench.arguments("cpu"), None)
    for got, name in zip(outputs(call()), ("dgate", "dup"), strict=True):
        assert torch.equal(got, wanted[name])


@pytest.mark.parametrize(("length", "window"), [(5, None), (5, 1), (7, 3), (4, 9), (64, 64)])
def test_visible_pairs_are_those_of_the_mask(length, window):
    from mistral_kernels.attention.reference import visible

    mask = visible(length, length, window or 0, True)
    assert attention.visible_pairs(length, window) == mask.sum().item()


@pytest.mark.parametrize("window", [None, 33, 200])
def test_rows_cut_from_attention_are_those_of_the_whole(window):
    bench = attention.bench(200, window, 4, 2, 16, dtype="float32")
    arguments = bench.arguments("cpu")
    whole = (mistral_kernels.reference.attention(**arguments),)
    covered = 0
    for part, cut in attention.few_rows(arguments):
        (mine,) = cut(whole)
        alone = mistral_kernels.reference.attention(**part)
        covered += mine.shape[1]
        assert torch.allclose(mine, alone, atol=1e-6)
    assert covered == 3 * attention.ROWS


# ---- wrong results ----


@pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")
def test_a_row_is_held_to_its_instruction_set(limits, monkeypatch):
    right, seen = mistral_kernels.swiglu, set()

    def watched(*args, **kwargs):
        seen.add(_compiled().mistral_kernels_isa())
        return right(*args, **kwargs)

    monkeypatch.setattr(mistral_kernels, "swiglu", watched)
    before = _compiled().mistral_kernels_isa()
    bench = dataclasses.replace(swiglu._bench(8, 64, packed=False), isa="base")
    row = run_row(bench, settings(), limits, "command")
    assert not row.refused and row.case.endswith(" base") and row.key == bench.key
    assert seen == {b"base"} and _compiled().mistral_kernels_isa() == before


@pytest.mark.parametrize("family", ["rms_norm", "attention"])
def test_a_planted_wrong_result_is_refused(family, limits, monkeypatch, tmp_path, capsys):
    """One element of the last row is off by 1; no time is reported, and the exit status is 1."""
    right = getattr(mistral_kernels, family)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs).clone()
        out.view(-1)[-1] += 1
        return out

    monkeypatch.setattr(mistral_kernels, family, wrong)
    bench = next(b for b in families.all_benches() if b.quick and b.case.op == family)
    row = run_row(bench, settings(), limits, "command")
    assert "parity fails" in row.refused and not row.seconds and row.share is None
    command = "ops" if family == "rms_norm" else "attention"
    out = tmp_path / "run.json"
    assert cli.main([command, "--quick", "--only", bench.key, "--seconds", "0.001", "--json", str(out)]) == 1
    assert "REFUSED" in capsys.readouterr().out
    (saved,) = report.read_json(out)["rows"]
    assert saved["refused"] and not saved["seconds"]


def test_nan_and_missing_outputs_are_refused(limits, monkeypatch):
    bench = rms_norm._norm(4, 64, "float32")
    right = mistral_kernels.rms_norm
    monkeypatch.setattr(mistral_kernels, "rms_norm", lambda **a: right(**a) * float("nan"))
    assert run_row(bench, settings(), limits, "command").refused
    monkeypatch.setattr(mistral_kernels, "rms_norm", lambda **a: None)
    with pytest.raises(AssertionError, match="0 outputs came"):
        run_row(bench, settings(), limits, "command")


def test_a_peer_that_computes_something_else_is_left_out(limits):
    def other(device):
        yield cases.Candidate("F.rms_norm", lambda a: lambda: a["x"] * 2)

    bench = dataclasses.replace(rms_norm._norm(32, 64, "float32"), peers=other)
    row = run_row(bench, settings(), limits, "command")
    assert "something else" in row.left_out["F.rms_norm"] and "F.rms_norm" not in row.seconds


def test_a_peer_that_fails_is_left_out(limits):
    def broken(device):
        yield cases.Candidate("F.rms_norm", lambda a: lambda: torch.ones(2) @ torch.ones(3))

    bench = dataclasses.replace(rms_norm._norm(32, 64, "float32"), peers=broken)
    row = run_row(bench, settings(), limits, "command")
    assert "RuntimeError" in row.left_out["F.rms_norm"] and not row.refused


# ---- slow-downs ----


def timed_row(factor=1.0, machine=1.0):
    """A row whose op takes `factor` times as long on a machine that is `machine` times slower."""
    clock, noise = Clock(), itertools.cycle((0.97, 1.0, 1.04))
    cost = dict(ours=10e-6 * factor, eager=30e-6, limit=8e-6)
    calls = {
        name: [lambda seconds=seconds: clock.spend(seconds * machine * next(noise))] for name, seconds in cost.items()
    }
    samples = timing.alternate(calls, timing.Effort(5, 5, 0.0, 1e-4), timing.Stopwatch("cpu", clock))
    row = report.rows_of(dict(rows=[vars(run_empty())]))[0]
    fill_row(row, samples, 1e6)
    return row


def run_empty():
    from bench.runner import empty_row

    return empty_row(rms_norm._norm(4, 64, "float32"), "command")


def test_a_planted_slow_down_is_found():
    (found,) = compare.changes([timed_row()], [timed_row(factor=1.5)])
    assert found.verdict == "SLOWER" and found.factor == pytest.approx(1.5, rel=0.1) and compare.failed([found])


@pytest.mark.parametrize(("factor", "machine", "verdict"), [(1, 1, "same"), (1, 2.5, "same"), (0.5, 1, "faster")])
def test_a_slower_machine_is_no_slow_down(factor, machine, verdict):
    (found,) = compare.changes([timed_row()], [timed_row(factor, machine)])
    assert found.verdict == verdict and not compare.failed([found])
    assert found.machine == pytest.approx(machine, rel=0.1)


def test_a_slow_down_on_a_faster_machine_is_found():
    (found,) = compare.changes([timed_row()], [timed_row(1.5, 0.5)])
    assert found.verdict == "SLOWER" and found.new < found.old


def test_a_refused_row_fails_the_comparison():
    refused = dataclasses.replace(timed_row(), refused="parity fails", seconds={})
    assert compare.failed(compare.changes([timed_row()], [refused]))


def test_reports_without_a_common_row_are_an_error():
    with pytest.raises(ValueError, match="no row in common"):
        compare.changes([], [timed_row()])
    with pytest.raises(ValueError, match="tolerance"):
        compare.changes([timed_row()], [timed_row()], 1.0)


def test_compare_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The real clock: an op that waits until it has taken many times as long."""
    import time

    old = tmp_path / "old.json"
    row = ["ops", "--quick", "--only", "swiglu forward", "--seconds", "0.05"]
    assert cli.main([*row, "--json", str(old)]) == 0
    right = mistral_kernels.swiglu

    def slow(*args, **kwargs):
        start = time.perf_counter()
        out = right(*args, **kwargs)
        while time.perf_counter() < start + 0.05:
            pass
        return out

    monkeypatch.setattr(mistral_kernels, "swiglu", slow)
    assert cli.main([*row, "--compare", str(old)]) == 1
    assert "SLOWER" in capsys.readouterr().out


# ---- timing ----


def test_each_round_has_all_in_an_order_of_its_own():
    clock, order = Clock(), []

    def call(name):
        return [lambda: (order.append(name), clock.spend(1.0))]

    timing.alternate({n: call(n) for n in "abc"}, timing.Effort(40, 40, 0, 0), timing.Stopwatch("cpu", clock))
    rounds = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"} and len(rounds) == 40


def test_short_calls_are_repeated_and_sets_take_turns():
    clock, used = Clock(), []
    calls = [lambda i=i: (used.append(i), clock.spend(1e-4)) for i in range(3)]
    seen = timing.alternate({"a": calls}, timing.Effort(2, 2, 0, 1e-3), timing.Stopwatch("cpu", clock))
    assert seen["a"] == pytest.approx([1e-4, 1e-4])
    assert used[6:] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]  # on where the sample before ended


def test_spread():
    found = timing.spread([5, 1, 2, 3, 4])
    assert (found.median, found.low, found.high, found.count) == (3, 1, 5, 5)
    with pytest.raises(ValueError, match="no samples"):
        timing.spread([])


@pytest.mark.parametrize("kind", ["read", "copy", "gemm", "fma"])
def test_limits_do_their_work(kind, limits):
    call = limits.call(kind, torch.float32)
    if kind == "copy":
        limits._buffer.copy_(torch.arange(limits.parts * limits.bytes // 4))
    call()
    if kind == "copy":
        assert torch.equal(limits._buffer, limits._copied)
    fma = FMA_ROUNDS * FMA_FLOPS * torch.get_num_threads() if _probe() is not None else 2 * 32**3
    assert limits.amount(kind) == {"read": 1 << 16, "copy": 1 << 17, "gemm": 2 * 32**3, "fma": fma}[kind]


def test_each_call_of_a_limit_takes_the_next_part_of_more_than_a_cache_holds():
    assert Limits("cpu", quick=True).parts == 1
    limits = Limits("cpu")
    assert limits.parts * limits.bytes >= 2 * machine.last_cache_bytes()
    limits.bytes, limits.parts = 1 << 16, 3
    call = limits.call("copy", torch.float32)
    limits._buffer.copy_(torch.arange(3 << 14))
    for done in (1, 2, 3):
        call()
        assert (limits._copied != 1).sum() == (done << 14) - 1  # one of the source's own values is 1


@pytest.mark.parametrize("kind", ["read", "copy"])
def test_a_limit_of_an_ops_size_moves_as_much_on_as_many_sets(kind, limits):
    limits._buffer.copy_(torch.arange(limits.bytes // 4))
    call, amount = limits.call_of_size(kind, 8192, sets=3)
    assert amount == 8192
    for done in (1, 2, 3, 3):
        call()
        if kind == "copy":
            assert (limits._copied != 1).sum() == (done << 10) - 1  # one of the source's own values is 1
    assert limits.call_of_size("gemm", 8192, 3) is None and limits.call_of_size(kind, 1 << 17, 3) is None


def test_the_limit_of_a_gradients_size_is_a_gradient(limits, monkeypatch):
    made = []
    monkeypatch.setattr(limits, "call_of_size", lambda *args: (lambda: made.append(args), 64.0))
    gradient = in_backward(lambda: made.append("called"))
    assert not made
    with torch.no_grad():
        assert torch.equal(gradient()[0], torch.ones(8)) and torch.equal(gradient()[0], torch.ones(8))
    assert made == ["called"] * 2
    wrapped = []
    monkeypatch.setattr(runner, "in_backward", lambda call: wrapped.append(call) or call)
    for backward in (False, True):
        bench = dataclasses.replace(swiglu._bench(8, 64, packed=False, backward=backward), quick=True)
        assert run_row(bench, settings(), limits, "command").share_of_size["median"] > 0
        assert len(wrapped) == backward


def test_short_attention_has_its_share_of_its_own_products(limits, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "bmm", lambda a, b, out, bmm=torch.bmm: made.append((a.shape, bmm(a, b, out=out).shape)))
    limits.products(torch.float32, 3, 5, 7, 8)[0]()
    assert made == [((3, 5, 8), (3, 5, 7)), ((3, 5, 7), (3, 5, 8))]
    monkeypatch.undo()
    assert limits.products(torch.float32, 3, 5, 7, 8)[1] == 2 * (2 * 3 * 5 * 7 * 8)
    row = run_row(attention.bench(16, None, 2, 1, 8, "float32"), settings(), limits, "command")
    assert row.share_of_size["median"] > 0
    assert attention.bench(2048, None).products is None and attention.bench(16, None, backward=True).products is None


def test_the_probe_reads_every_byte():
    from bench.limits import _aligned

    if _probe() is None:
        pytest.skip("no C compiler")
    data = _aligned(1 << 12)
    data.copy_(torch.arange(1 << 12))
    words = data.view(torch.int64).sum().item()
    assert _probe().probe_read(data.data_ptr(), data.numel() * 4, 2) == words


# ---- reports ----


def test_a_report_is_read_as_it_was_written(tmp_path):
    row = timed_row()
    report.write_json(tmp_path / "a.json", dict(rows=[vars(row)]))
    (again,) = report.rows_of(report.read_json(tmp_path / "a.json"))
    assert again.seconds["ours"]["median"] == pytest.approx(row.seconds["ours"]["median"], rel=1e-5)
    assert report.cells(again) == report.cells(row)
    assert len(report.csv_text([row]).splitlines()) == 1 + len(row.seconds)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps(dict(schema=99))])
def test_a_file_that_is_no_report_is_an_error(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        report.read_json(tmp_path / "a.json")
    with pytest.raises(SystemExit, match="--compare"):
        cli.main(["ops", "--compare", str(tmp_path / "a.json")])


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--seconds", "0"], ["--tolerance", "1"], ["--only", "no such"]])
def test_bad_options_fail_at_once(wrong):
    with pytest.raises(SystemExit, match=r"bench: "):
        cli.main(["ops", *wrong])


def test_plots(tmp_path):
    from bench import plots

    rows = [dataclasses.replace(timed_row(), key=str(n), curve=("series", "S", n)) for n in (256, 512)]
    written = plots.plot_rows(rows, tmp_path / "plots", "ops", "ops")
    assert sorted(p.name for p in written) == ["ops-curves.png", "ops-curves.svg", "ops.png", "ops.svg"]
    assert sorted(written) == sorted((tmp_path / "plots").iterdir())
    first = {p: p.read_bytes() for p in written}
    plots.plot_rows(rows, tmp_path / "plots", "ops", "ops")
    assert {p: p.read_bytes() for p in written} == first


def test_runs_of_one_command_have_plots_of_their_own(tmp_path):
    for stem, json_file in (("ops-default-allocator", tmp_path / "ops-default-allocator.json"), ("ops", None)):
        options = SimpleNamespace(json=json_file, csv=None, plot=tmp_path / stem, command="ops", compare=None)
        assert cli.finish(options, dict(rows=[timed_row()])) == 0
        assert {p.name for p in options.plot.iterdir()} == {f"{stem}.svg", f"{stem}.png"}
