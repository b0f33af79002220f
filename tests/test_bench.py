"""bench.py measures fairly and runs every part. No test judges by a real clock: machines differ, days too."""

import json
import sys
import time

import numpy as np
import pytest
import torch

import bench


class FakeClock:
    """Time that passes only when a side runs: each run takes the next of its own durations."""

    def __init__(self, **durations):
        self.now, self.order, self.durations = 0.0, [], {name: iter(d) for name, d in durations.items()}

    def __call__(self) -> float:
        return self.now

    def sides(self) -> dict:
        def run(name):
            self.order.append(name)
            self.now += next(self.durations[name])

        return {name: lambda name=name: run(name) for name in self.durations}


def test_sides_alternate_and_the_warm_up_is_not_counted():
    """Runs of one side in a row would charge a slow minute of the machine to that side alone."""
    clock = FakeClock(ours=[100, 1, 1, 9], diffusers=[100, 2, 2, 18])
    times = bench.alternate(clock.sides(), 3, clock=clock)
    assert clock.order == ["ours", "diffusers"] * 4
    assert times == {"ours": [1, 1, 9], "diffusers": [2, 2, 18]}


def test_the_device_is_idle_when_the_clock_is_read():
    """On a GPU a call returns before its work is done: unless the clock waits, it times the sending off."""
    clock = FakeClock(ours=[5, 5])
    pending = []
    sides = {"ours": lambda: (clock.order.append("run"), pending.append(7))}

    def wait():
        clock.now += sum(pending)
        pending.clear()

    assert bench.alternate(sides, 1, wait=wait, clock=clock) == {"ours": [7]}


def test_ratio_is_the_median_over_pairs():
    """A machine that slows for one run shifts a ratio of means or of best runs, not the median of pairs."""
    times = {"ours": [1.0, 3.0, 2.0, 2.0, 2.0], "diffusers": [2.0, 3.0, 4.0, 4.0, 9.0]}
    assert bench.ratio(times) == 2.0
    assert bench.ratio(times, "ours", "diffusers") == 0.5


@pytest.mark.parametrize(
    "target, value, verdict",
    [("<= 0.6", 0.6, "yes"), ("<= 0.6", 0.61, "no"), (">= 4", 4.5, "yes"),
     (">= 2 or so", 1, "no"), ("", 3, "")],
)  # fmt: skip
def test_targets_are_read_in_their_direction(target, value, verdict):
    assert bench.met(target, value) == verdict


def test_peak_memory_sees_what_is_freed_before_the_end():
    """Memory that a call takes and gives back is the peak; what was there before it is not counted."""
    kept = np.ones(64 * bench.MIB, np.uint8)

    def run():
        large = np.ones(128 * bench.MIB, np.uint8)
        time.sleep(0.1)
        del large

    megabytes = bench.peak(run, bench.CPU) / bench.MIB
    assert kept.all() and 120 < megabytes < 160


def test_a_looped_clip_goes_there_and_back():
    """A jump at the end of the drawn frames would be a cut, which cues warn of; no frame is shared."""
    frames = [np.full(1, i) for i in range(4)]
    clip = list(bench.loop(frames, 9))
    assert [int(frame[0]) for frame in clip] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert not any(np.shares_memory(frame, drawn) for frame in clip for drawn in frames)


def test_fresh_is_another_process():
    assert bench.fresh(bench.anonymous) != bench.anonymous()


def test_missing_diffusers_is_one_sentence(monkeypatch, capsys):
    """Said at once, not after the cues, which could be measured without it, took minutes."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit) as stop:
        bench.main(["all", "--size", "small", "--device", "cpu"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("flags", [["--repeat", "0"], ["-o", "no/such/folder/bench.json"], ["-o", "."]])
def test_mistakes_are_found_before_anything_is_measured(flags, capsys):
    """An hour of measuring must not end in a file that cannot be written."""
    with pytest.raises(SystemExit) as stop:
        bench.main(["cues", *flags])
    assert stop.value.code == 2 and flags[-1] in capsys.readouterr().err


@pytest.fixture
def in_this_process(monkeypatch):
    """A fresh process for each side takes seconds to start; `test_fresh_is_another_process` looks at that."""
    monkeypatch.setattr(bench, "fresh", lambda function, *args: function(*args))


@pytest.mark.parametrize(
    "part, compared",
    [
        ("cues", ["frames/s", "memory"]),
        ("vae", ["encode: our error", "encode: diffusers' time", "channels-last", "encode: our peak memory",
                 "decode: our error", "decode: diffusers' time", "channels-last", "decode: our peak memory"]),
        ("dit", ["forward, eager: diffusers' time", "share of the ceiling"]),
        ("train", ["step without cues", "what cues add", "teacher", "peak memory of a step"]),
        ("pipeline", ["picture and cues to frames", "Table 7"]),
    ],
)  # fmt: skip
def test_every_part_runs_and_its_rows_are_whole(part, compared, in_this_process, tmp_path, capsys):
    """Small networks: each row says what was compared, sizes, dtype, runs and ratio, and is one line."""
    if part != "cues":
        pytest.importorskip("diffusers")
    bench.main([part, "--size", "small", "--device", "cpu", "--repeat", "2", "-o", str(tmp_path / "bench.json")])
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    assert report["size"] == "small" and len(rows) == len(compared)
    for row, words in zip(rows, compared):
        assert words in row["what"] and row["part"] == part and row["sizes"] and row["dtype"]
        assert row["repeats"] in (1, 2) and np.isfinite([row["ratio"], *row["figures"].values()]).all()
        assert row["target"] == row["met"] == ""  # what small networks do says nothing
    table = capsys.readouterr().out.split(bench.HEAD)[1].strip().splitlines()
    assert len(table) == len(rows) and {text.count(" | ") for text in table} == {8}
    assert not any(name.endswith(" s") for row in rows for name in row["figures"])  # no seconds without a GPU


def test_both_sides_compute_the_same(in_this_process):
    """A ratio of two different computations would mean nothing."""
    pytest.importorskip("diffusers")
    setting = bench.Setting(True, bench.CPU, 1)
    (row, _) = bench.bench_dit(setting)
    assert row["figures"]["relative difference"] < 0.01
    vae, size = bench.vae_networks(setting), setting.vae[1:]
    for action in ("encode", "decode"):
        ours, theirs, other = (bench.vae_calls(network, *size, "cpu")[action]() for network in vae.values())
        torch.testing.assert_close(ours, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)
        torch.testing.assert_close(other, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)
