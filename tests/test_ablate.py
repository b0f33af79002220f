"""The rows of the paper's tables as commands, and the ledger that their numbers fill."""

import json
import sys

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
    return ablate.Pieces(args).stages


def test_rows_that_differ_in_stage_2_alone_share_data_and_stage_1(tmp_path):
    """full, S8 and D2: one data folder, one stage 1 a seed, a stage 2 and a score each; S4 needs data of its own."""
    assert [len(stage) for stage in plan(tmp_path, "full", "S8", "D2")] == [1, 2, 6, 6]
    assert [len(stage) for stage in plan(tmp_path, "full", "S4")] == [2, 4, 4, 4]
    assert [len(stage) for stage in plan(tmp_path, "full", "S1", "concat")] == [1, 6, 6, 6]
    assert [len(stage) for stage in plan(tmp_path, "full", "unfiltered")] == [2, 2, 4, 4], "stage 1 sees no pseudo cues"
    assert [len(stage) for stage in plan(tmp_path, "full", "dark")] == [1, 2, 2, 4], "judged otherwise, trained alike"


def test_every_row_is_made_of_commands_that_exist(tmp_path):
    """Each command is accepted by the program that it calls, and no two pieces make the same thing."""
    parsers = {"data.py": data.parse_args, "train.py": train.parse_args, "judge.py": judge.parse_args}
    stages = plan(tmp_path)
    assert sum(map(len, stages)) == len({target for stage in stages for target in stage})
    for stage in stages:
        for target, command in stage.items():
            _, args = parsers[command[1]]([str(word) for word in command[2:]])
            made = args.output / target.name if target.suffix != ".json" else args.output
            assert made == target
    scores = {target.stem: judge.parse_args([str(w) for w in c[2:]])[1] for target, c in stages[3].items()}
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
    (target, command), *_ = plan(tmp_path, "full")[3].items()
    target.write_text(json.dumps({"checkpoint": command[2].name, "pairs": 64}))
    ablate.check_results({target: command}, 64)
    with pytest.raises(ValueError, match="take another --results"):
        ablate.check_results({target: command}, 2)
    with pytest.raises(ValueError, match="take another --results"):
        ablate.check_results({target: [*command[:2], tmp_path / "other"]}, 64)


def test_a_failing_piece_names_its_command_and_log(tmp_path):
    with pytest.raises(OSError, match="failed, see .*log"):
        ablate.execute(tmp_path, tmp_path / "never", [sys.executable, "-c", "print('broken')"])
    assert "broken" in (tmp_path / "logs" / f"{tmp_path.name}-never.log").read_text()


# ---- the ledger ----------------------------------------------------------------------------------------------------


def fill(folder, **rows):
    """results/ROW-SEED.json with these masked L1s, one a seed, and curves that end there."""
    for name, values in rows.items():
        for seed, value in enumerate(values):
            answers = {a: {m: value for m in ablate.METERS} for a in ("seed 0", "still reference", "driver's frames")}
            curve = [[100, value + 2], [200, value + 1], [300, value]]
            result = {"answers": answers, "training": {"held_out": curve}}
            (folder / f"{name.replace('_', '-')}-{seed}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    "full, row, said",
    [
        ([10, 11, 12], [12, 13.1, 14], "holds"),
        ([10, 11, 12], [8, 9.1, 10], "does not hold"),
        ([10, 11, 12], [10.5, 10.9, 12.1], "null"),  # two of three agree
        ([10, 11, 12], [10.1, 11.1, 19], "null"),  # all agree, but one seed carries it: 2.73 < 2 x 2.63
        ([10, 11], [12, 13], "too few seeds"),
    ],
)
def test_the_verdict_follows_the_stated_rule(full, row, said):
    assert ablate.verdict(dict(enumerate(row)), dict(enumerate(full)), "masked_l1") == said
    assert ablate.verdict(dict(enumerate(full)), dict(enumerate(row)), "identity") == said, "where high is good"


def test_the_ledger_replaces_itself_between_its_marks_and_the_figures_are_drawn(tmp_path):
    fill(tmp_path, full=[1, 1.1, 1.2], S8=[2, 2.1, 2.2], S1=[1, 1.1, 1.3], S5=[3, 3.1, 3.2], S5_2px=[4, 4.1, 4.2])
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\noutdated\n".join(ablate.MARKS) + "\nafter\n")
    for _ in range(2):
        ablate.main(["table", "--results", str(tmp_path), "--readme", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "outdated" not in text
    assert text.count("| 1.10 ± 0.10 | 2.10 ± 0.10 | holds |") == 1, "S8"
    assert text.count("| 1.10 ± 0.10 | 1.13 ± 0.15 | null |") == 1, "S1"
    assert (
        text.count("| 1.10 ± 0.10 | 3.10 ± 0.10 | holds |") == text.count("| 1.10 ± 0.10 | 4.10 ± 0.10 | holds |") == 1
    )
    assert "seed by seed: 1.50, 1.50, 1.50" in text, "full falls to 2 at step 200, S8 at 300"
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
