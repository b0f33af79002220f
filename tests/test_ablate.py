"""The judge of the drawn world is right about the truth itself, and about known mistakes."""

import sys

import cv2
import numpy as np
import pytest

import ablate
import data
import train
from evaluate import masked_l1


@pytest.fixture(scope="module")
def pairs():
    return [ablate.draw_pair(n) for n in range(2)]


def test_pairs_are_people_and_motions_that_no_training_clip_has():
    """data.py draws clips 0.. and 1,000,000.., other performers 500,000 further."""
    used = set(range(100_000)) | set(range(500_000, 600_000)) | set(range(1_000_000, 1_700_000))
    assert not used & {ablate.FIRST + 10_000 * k + n for k in range(ablate.PEOPLE) for n in range(10_000)}


def test_the_locator_is_exact_on_the_truth_and_on_moved_truth(pairs):
    """0 on the truth; a clip moved by (3, -4) is 5 pixels off at every joint whose patch stays inside."""
    truth = pairs[0].truth
    assert set(ablate.joint_errors(truth, truth.video)) == {0.0}
    moved = np.roll(truth.video, (-4, 3), axis=(1, 2))
    errors = ablate.joint_errors(truth, moved)
    assert np.median(errors) == 5 and np.mean(np.array(errors) == 5) > 0.9


def test_the_locator_forgives_blur_more_than_another_pose(pairs):
    for pair in pairs:
        blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in pair.truth.video])
        still = np.stack([pair.reference] * ablate.FRAMES)
        blur, pose = (np.mean(ablate.joint_errors(pair.truth, v)) for v in (blurred, still))
        assert blur < 1.5 < pose


def test_joints_behind_the_body_are_not_counted(pairs):
    truth = pairs[0].truth
    assert len(ablate.joint_errors(truth, truth.video)) == truth.visible.sum() < truth.visible.size


def test_the_nearest_person_is_who_is_shown(pairs):
    """A on the truth, blurred or not; with the parts swapped, B and A."""
    for pair in pairs:
        assert ablate.nearest_person(pair.truth.video, pair) == 0
        assert ablate.nearest_person(np.stack([cv2.GaussianBlur(f, (0, 0), 3) for f in pair.truth.video]), pair) == 0
        swapped = pair._replace(truth=pair.driver, driver=pair.truth)  # now B is the one who should be shown
        assert ablate.nearest_person(pair.driver.video, swapped) == 0
        assert ablate.nearest_person(pair.truth.video, swapped) == 1


def test_measures_of_the_truth_and_of_a_known_error(pairs):
    """The mask is the silhouette, two pixels wider: what is wrong outside does not count."""
    truth = pairs[0].truth
    assert ablate.measure(pairs[0], truth.video)["masked_l1"] == 0
    wide = np.stack([cv2.dilate(b.astype(np.uint8), np.ones((5, 5), np.uint8)) for b in truth.body]) > 0
    elsewhere = np.where(wide[..., None], truth.video, 255 - truth.video)
    assert ablate.measure(pairs[0], elsewhere)["masked_l1"] == 0
    darker = (truth.video // 2).astype(np.uint8)
    expected = np.mean([masked_l1(a, b, m) for a, b, m in zip(darker, truth.video, wide)])
    assert ablate.measure(pairs[0], darker)["masked_l1"] == pytest.approx(expected)


def test_summary_takes_the_median_over_all_joints():
    rows = [{"masked_l1": 1.0, "joint_error": [0.0, 0.0, 9.0]}, {"masked_l1": 3.0, "joint_error": [5.0, 7.0]}]
    assert ablate.summary(rows) == {"masked_l1": 2.0, "joint_error": 5.0}


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


def test_every_row_is_made_of_commands_that_exist(tmp_path):
    """Each command is accepted by the program that it calls, and no two pieces make the same thing."""
    parsers = {"data.py": data.parse_args, "train.py": train.parse_args, "ablate.py": ablate.parse_args}
    stages = plan(tmp_path)
    assert sum(map(len, stages)) == len({target for stage in stages for target in stage})
    for stage in stages:
        for target, command in stage.items():
            _, args = parsers[command[1]]([str(word) for word in command[2:]])
            made = args.output / target.name if target.suffix != ".json" else args.output
            assert made == target
    scores = {target.stem: ablate.parse_args([str(w) for w in c[2:]])[1] for target, c in stages[3].items()}
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


def test_a_failing_piece_names_its_command_and_log(tmp_path):
    with pytest.raises(OSError, match="failed, see .*log"):
        ablate.execute(tmp_path, tmp_path / "never", [sys.executable, "-c", "print('broken')"])
    assert "broken" in (tmp_path / "logs" / f"{tmp_path.name}-never.log").read_text()
