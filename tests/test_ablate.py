"""The rows of the paper's tables as commands, and the ledger that their numbers fill."""

import json
import sys
import threading

import pytest

import ablate
import data
import judge
import train


# ---- rows ----------------------------------------------------------------------------------------------------------


def plan(tmp_path, *rows, seeds=2):
    _, args = ablate.parse_args(
        ["run", *rows, "--seeds", str(seeds), "--work", str(tmp_path), "--results", str(tmp_path)]
    )
    args.rows = args.rows or list(ablate.ROWS)
    return ablate.pieces(args)


def kinds(found):
    return [sum(piece.kind == kind for piece in found.values()) for kind in ("data", "stage 1", "stage 2", "result")]


def test_rows_that_differ_in_stage_2_alone_share_data_and_stage_1(tmp_path):
    """full, S8 and D2: one data folder, one stage 1 a seed, a stage 2 and a score each; S4 needs data of its own."""
    assert kinds(plan(tmp_path, "full", "S8", "D2")) == [1, 2, 6, 6]
    assert kinds(plan(tmp_path, "full", "S4")) == [2, 4, 4, 4]
    assert kinds(plan(tmp_path, "full", "S1", "concat")) == [1, 6, 6, 6]
    assert kinds(plan(tmp_path, "full", "unfiltered")) == [2, 2, 4, 4], "stage 1 sees no pseudo cues"
    assert kinds(plan(tmp_path, "full", "dark")) == [1, 2, 2, 4], "judged otherwise, trained alike"


def test_every_row_is_made_of_commands_that_exist(tmp_path):
    """Each command is accepted by the program that it calls, and no two pieces make the same thing."""
    parsers = {"data.py": data.parse_args, "train.py": train.parse_args, "judge.py": judge.parse_args}
    found = plan(tmp_path)
    for target, piece in found.items():
        _, args = parsers[piece.command[1]]([str(word) for word in piece.command[2:]])
        made = args.output / target.name if target.suffix != ".json" else args.output
        assert made == target
    begun = list(found)
    assert all(begun.index(before) < begun.index(target) for target, piece in found.items() for before in piece.after)
    commands = {
        target.stem: [str(word) for word in piece.command[2:]]
        for target, piece in found.items()
        if piece.kind == "result"
    }
    scores = {name: judge.parse_args(words)[1] for name, words in commands.items()}
    assert scores["S1-0"].face == "none" and scores["S6-1"].location == "none" and scores["S3-0"].pose_cue == "rgb"


def test_the_rows_of_the_papers_tables_are_all_there():
    assert {f"S{k}" for k in range(1, 9)} | {
        "full",
        "D2",
        "D3",
        "lambda0.1",
        "lambda1",
        "concat",
        "cross",
    } <= set(ablate.ROWS)


def test_results_of_other_settings_do_not_pass_for_finished(tmp_path):
    """Neither those of --quick, which have folders of their own, nor those of other steps or pairs."""
    target, piece = [(t, p) for t, p in plan(tmp_path, "full").items() if p.kind == "result"][0]
    command = piece.command
    fill(tmp_path, full=[1])
    target.write_text(json.dumps(json.loads(target.read_text()) | {"checkpoint": command[2].name, "pairs": 64}))
    ablate.check_results({target: command}, 64)
    with pytest.raises(ValueError, match="take another --results"):
        ablate.check_results({target: command}, 2)
    with pytest.raises(ValueError, match="take another --results"):
        ablate.check_results({target: [*command[:2], tmp_path / "other"]}, 64)


def test_a_failing_piece_names_its_command_and_log(tmp_path):
    with pytest.raises(OSError, match="failed, see .*log"):
        ablate.execute(tmp_path, tmp_path / "never", [sys.executable, "-c", "print('broken')"])
    assert "broken" in (tmp_path / "logs" / f"{tmp_path.name}-never.log").read_text()


def test_a_piece_that_fails_stops_only_what_needs_it(tmp_path):
    def piece(target, words, *after):
        code = f"import pathlib; pathlib.Path({str(target)!r}).touch()" if words == "works" else "raise SystemExit(1)"
        return target, ablate.Piece("data", [sys.executable, "-c", code], after, 1.0)

    a, b, c = (tmp_path / name for name in "abc")
    _, args = ablate.parse_args(["run", "--work", str(tmp_path), "--jobs", "2"])
    with pytest.raises(OSError) as failure:
        ablate.work_off(dict([piece(a, "fails"), piece(b, "works", a), piece(c, "works")]), args)
    assert not b.exists() and c.exists() and str(failure.value).count("failed, see") == 1


def test_nobody_waits_for_a_piece_whose_needs_are_not_there_yet(tmp_path, monkeypatch):
    """Two at a time, b after a: c begins beside a, though b comes before it."""
    a, b, c = (tmp_path / name for name in "abc")
    todo = {a: (), b: (a,), c: ()}
    begun, c_began = [], threading.Event()

    def execute(work, target, command):
        begun.append(target)
        c_began.set() if target == c else None
        assert target != a or c_began.wait(10), "c never began"

    monkeypatch.setattr(ablate, "execute", execute)
    pieces = {target: ablate.Piece("x", [], after, 1) for target, after in todo.items()}
    ablate.work_off(pieces, ablate.parse_args(["run", "--jobs", "2", "--work", str(tmp_path)])[1])
    assert sorted(begun[:2]) == [a, c] and begun[2] == b


@pytest.mark.slow
def test_quick_trains_and_judges_some_rows_and_does_nothing_twice(tmp_path, capsys):
    words = ["run", "--quick", "--work", str(tmp_path / "w"), "--results", str(tmp_path / "r")]
    ablate.main(words)
    assert {path.name for path in (tmp_path / "r/quick").iterdir()} == {f"{name}-0.json" for name in ablate.QUICK}
    capsys.readouterr()
    ablate.main(words)
    assert "missing: nothing" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("\n".join(ablate.MARKS))
    ablate.main(["table", "--results", str(tmp_path / "r/quick"), "--readme", str(page)])
    assert page.read_text().count("too few seeds") == 3


# ---- the ledger ----------------------------------------------------------------------------------------------------


def fill(folder, **rows):
    """results/ROW-SEED.json with these masked L1s, one a seed, and curves that end there."""
    for name, values in rows.items():
        for seed, value in enumerate(values):
            answers = {a: {m: value for m in ablate.METERS} for a in ("seed 0", "still reference", "driver's frames")}
            curve = [[100, value + 2], [200, value + 1], [300, value]]
            training = {"held_out": curve, "steps": 300, "batch": 4, "steps_per_s": 2.5}
            result = {"answers": answers, "training": training, "pairs": 64, "sampling_steps": 10}
            result |= {"machine": "an abacus", "sampler": "ddim"}
            (folder / f"{name.replace('_', '-')}-{seed}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    "full, row, seen",
    [
        ([10, 11, 12], [12, 13.1, 14], "better"),
        ([10, 11, 12], [8, 9.1, 10], "worse"),
        ([10, 11, 12], [10.5, 10.9, 12.1], "no difference"),
        ([10, 11, 12], [11, 13, 15], "no difference"),  # 2 is less than 4.30 x 0.577
        ([10, 11], [12, 13], "too few seeds"),
    ],
)
def test_gains_follow_the_stated_rule(full, row, seen):
    assert ablate.gain(dict(enumerate(row)), dict(enumerate(full)), "masked_l1")[2] == seen
    assert ablate.gain(dict(enumerate(full)), dict(enumerate(row)), "identity")[2] == seen, "where high is good"


def test_speed_is_compared_before_the_cool_down_and_between_evaluations():
    run = lambda *losses: {  # noqa: E731
        "training": {"steps": 400, "cooldown": 0.25, "held_out": [(100 * k + 100, x) for k, x in enumerate(losses)]}
    }
    slow = run(5, 4, 3, 1)  # 1 is reached in the cool-down
    assert ablate.speed_up(slow, run(5, 2, 2, 2)) == pytest.approx(300 / (100 + 100 * 2 / 3))
    assert ablate.speed_up(slow, run(2.5, 2, 2, 2)) == 3 and ablate.speed_up(slow, slow) == 1
    assert ablate.speed_up(slow, run(5, 4, 3.1, 1)) is None


def test_verdicts_depend_on_what_the_paper_claims():
    said = {seen: ablate.verdict(ablate.ROWS["S8"], seen) for seen in ("better", "worse", "no difference")}
    assert said == {"better": "holds", "worse": "does not hold", "no difference": "null"}
    robust = ablate.ROWS["lambda1"]
    assert ablate.verdict(robust, "no difference").startswith("holds")
    assert ablate.verdict(robust, "better") == "does not hold (better)"


def test_results_of_two_kinds_make_no_ledger(tmp_path):
    fill(tmp_path, full=[1, 2], S8=[3])
    path = tmp_path / "S8-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pairs": 4}))
    with pytest.raises(ValueError, match="full-0.json and S8-0.json differ"):
        ablate.read_results(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="S8-0.json: not a result"):
        ablate.read_results(tmp_path)


def test_runs_that_were_never_measured_before_their_cool_down_have_no_ratio(tmp_path):
    fill(tmp_path, full=[1], S8=[2])
    results = ablate.read_results(tmp_path)
    for row in results.values():
        row[0]["training"]["held_out"] = [(row[0]["training"]["steps"], 0.2)]
    assert ablate.speed_up(results["S8"][0], results["full"][0]) is None


def test_the_ledger_replaces_itself_between_its_marks_and_the_figures_are_drawn(tmp_path):
    fill(
        tmp_path,
        full=[1, 1.1, 1.2],
        S8=[2, 2.1, 2.2],
        S1=[1, 1.1, 1.3],
        S5=[1, 1.1, 1.3],
        S5_2px=[4, 4.1, 4.2],
    )
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\noutdated\n".join(ablate.MARKS) + "\nafter\n")
    for _ in range(2):
        ablate.main(["table", "--results", str(tmp_path), "--readme", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "outdated" not in text
    assert text.count("| 1.10 ± 0.10 | 2.10 ± 0.10 | 1.00 ± 0.00 | holds |") == 1, "S8"
    assert text.count("| 1.10 ± 0.10 | 1.13 ± 0.15 | 0.03 ± 0.03 | null |") == 2, "S1 and S5"
    assert text.count("| 1.10 ± 0.10 | 4.10 ± 0.10 | 3.00 ± 0.00 | holds |") == 1, "S5-2px is no seed of S5"
    assert "0.03 at 0 px, 3.00 at 2 px; from 2 px on pixels win" in text
    assert (
        "Made on an abacus: 300 steps of stage 2 at batch 4 (2.0 minutes, the median run), 64 pairs, ddim in 10" in text
    )
    assert "| `full` against `S8` | 6.7 | 2.00, 2.00, 2.00 | faster |" in text, "full has 3 at step 100, S8 at 200"
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("rows.png", "same2x.png"))


@pytest.mark.parametrize("missing, said", [("results", "no results there"), ("marks", "which are not there")])
def test_a_ledger_without_results_or_marks_is_a_sentence(tmp_path, capsys, missing, said):
    page = tmp_path / "page.md"
    page.write_text("nothing" if missing == "marks" else "".join(ablate.MARKS))
    if missing == "marks":
        fill(tmp_path, full=[1])
    with pytest.raises(SystemExit) as stop:
        ablate.main(["table", "--results", str(tmp_path), "--readme", str(page)])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert page.read_text() in ("nothing", "".join(ablate.MARKS))
