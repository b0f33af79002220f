"""The judge of the drawn world is right about the truth itself, and about known mistakes."""

import json
import warnings
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch

import cues
import data
import judge
import toy
from evaluate import masked_l1
from load_cogvideox import load_weights, save_weights
from model import DIT_PRESETS, DiT
from video import Video, read_image


@pytest.fixture(scope="module")
def pairs():
    return [judge.draw_pair(n) for n in (0, 2)]


def test_pairs_are_people_and_motions_that_no_training_clip_has():
    """data.py draws clips 0.. and 1,000,000.., other performers 500,000 further."""
    used = set(range(100_000)) | set(range(500_000, 600_000)) | set(range(1_000_000, 1_700_000))
    assert not used & {judge.FIRST + 10_000 * k + n for k in range(judge.PEOPLE) for n in range(10_000)}


@pytest.mark.parametrize("number", [0, 1])
def test_a_driver_gives_the_place_at_the_height_of_the_person(pairs, number):
    """Medians over the clip: the driver's aligned outline is as high as the person in her picture, and is not her own."""
    pair, args = pairs[number], judge.parse_args(["--place", "driver"])[1]
    frames, track = judge.place_of(pair, args, None)
    hard = cues.CueOptions(location="hard")
    masks = np.stack([row[2][0] for row in cues.render(frames, track, None, hard)])
    height = lambda bodies: np.median([np.ptp(np.nonzero(body)[0]) + 1 for body in bodies])  # noqa: E731
    assert abs(height(masks > 0.5) / height(pair.still.body) - 1) < 0.1
    assert (masks > 0.5)[:, 8:-8, 8:-8].sum() and np.abs(masks - pair.truth.body).mean() > 0.02
    args.place = "clip"
    _, own = judge.place_of(pair, args, None)
    assert all(np.array_equal(own.mask(t), body) for t, body in enumerate(pair.truth.body))


def test_the_location_cue_is_softened_by_the_cells_that_are_asked_for(pairs):
    """Frame 0's latent of the mask channel against the reference softening of A's own silhouette."""
    vae = load_weights(judge.ASSETS / "toy-vae.safetensors", torch.float32)[0].eval()
    for cell in (8, 32):
        args = judge.parse_args(["--soften-cell", str(cell)])[1]
        _, pose, _ = judge.conditions(vae, pairs[0], args, 0)
        soft = cues.grid_soften(np.float32(pairs[0].truth.body[:1]), cell)
        expected = torch.nn.functional.avg_pool2d(torch.from_numpy(soft), 8)[0]
        assert torch.allclose(pose[0, 1, 16], expected, atol=1e-6)


def test_the_locator_is_exact_on_the_truth_and_on_moved_truth(pairs):
    """0 on the truth; a clip moved by (3, -4) is 5 pixels off at every joint whose patch stays inside."""
    truth = pairs[0].truth
    assert set(judge.joint_errors(truth, truth.video)) == {0.0}
    moved = np.roll(truth.video, (-4, 3), axis=(1, 2))
    errors = judge.joint_errors(truth, moved)
    assert np.median(errors) == 5 and np.mean(np.array(errors) == 5) > 0.9


def test_the_locator_forgives_blur_more_than_another_pose(pairs):
    for pair in pairs:
        blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in pair.truth.video])
        still = np.stack([pair.reference] * judge.FRAMES)
        blur, pose = (np.mean(judge.joint_errors(pair.truth, v)) for v in (blurred, still))
        assert blur < 1.5 < pose


def test_joints_behind_the_body_are_not_counted(pairs):
    truth = pairs[0].truth
    assert len(judge.joint_errors(truth, truth.video)) == truth.visible.sum() < truth.visible.size


def test_the_nearest_person_is_who_is_shown(pairs):
    """A on the truth, blurred or not; with the parts swapped, B and A."""
    for pair in pairs:
        assert judge.nearest_person(pair.truth.video, pair) == 0
        assert judge.nearest_person(np.stack([cv2.GaussianBlur(f, (0, 0), 3) for f in pair.truth.video]), pair) == 0
        swapped = pair._replace(truth=pair.driver, driver=pair.truth)  # now B is the one who should be shown
        assert judge.nearest_person(pair.driver.video, swapped) == 0
        assert judge.nearest_person(pair.truth.video, swapped) == 1


def test_measures_of_the_truth_and_of_a_known_error(pairs):
    """The mask is the silhouette, two pixels wider: what is wrong outside does not count."""
    truth = pairs[0].truth
    assert judge.measure(pairs[0], truth.video)["masked_l1"] == 0
    wide = np.stack([cv2.dilate(b.astype(np.uint8), np.ones((5, 5), np.uint8)) for b in truth.body]) > 0
    elsewhere = np.where(wide[..., None], truth.video, 255 - truth.video)
    assert judge.measure(pairs[0], elsewhere)["masked_l1"] == 0
    darker = (truth.video // 2).astype(np.uint8)
    expected = np.mean([masked_l1(a, b, m) for a, b, m in zip(darker, truth.video, wide)])
    assert judge.measure(pairs[0], darker)["masked_l1"] == pytest.approx(expected)


def test_nothing_leaks_into_the_truth_and_a_pasted_driver_leaks_in_full(pairs):
    """0 on the truth; half of both mixed 0.5 of the texture; the driver pasted in: her texture, and a ghost around A."""
    for pair in pairs:
        truth, driver = pair.truth.video, pair.driver.video
        assert judge.leaks(pair, truth) == pytest.approx(dict(leak_color=0, leak_texture=0, leak_outline=0), abs=1e-5)
        mixed = np.float32(truth) / 2 + np.float32(driver) / 2
        assert judge.leaks(pair, mixed)["leak_texture"] == pytest.approx(0.5, abs=0.01)
        pasted = judge.leaks(pair, np.where(pair.driver.body[..., None], driver, truth))
        assert pasted["leak_texture"] > 0.8 and pasted["leak_color"] > 0.2 and pasted["leak_outline"] > 0.99
        swapped = judge.leaks(pair._replace(truth=pair.driver, driver=pair.truth), driver)
        assert swapped["leak_color"] == pytest.approx(0, abs=1e-5)


def test_what_is_wrong_but_not_the_drivers_is_no_leak(pairs):
    """The reference standing still, blur and an empty picture hold nothing of B."""
    for pair in pairs:
        still = np.stack([pair.reference] * judge.FRAMES)
        blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in pair.truth.video])
        for wrong in (still, blurred, np.full_like(still, 128)):
            found = judge.leaks(pair, wrong)
            assert max(found["leak_color"], found["leak_texture"], found["leak_outline"]) < 0.25, found


def test_a_run_is_judged_by_the_cues_that_it_was_trained_with(tmp_path):
    run, looks = tmp_path / "run", dict(pose_cue="skeleton", joint_noise=2.0, face_cue="centered")
    run.mkdir()
    (tmp_path / "toy.json").write_text(json.dumps(looks))
    (run / "config.json").write_text(json.dumps(dict(data=str(tmp_path))))
    judged = lambda *flags: judge.check_looks(judge.parse_args([str(run), *flags])[1])  # noqa: E731
    with pytest.raises(ValueError, match="--pose-cue lowpass: .* was trained with --pose-cue skeleton"):
        judged()
    with pytest.raises(ValueError, match="--joint-noise 0.0: .* was trained with --joint-noise 2.0"):
        judged("--pose-cue", "skeleton")
    judged("--pose-cue", "skeleton", "--joint-noise", "2")


def test_an_empty_picture_has_no_pose(pairs):
    for pair in pairs:
        assert np.median(judge.joint_errors(pair.truth, np.full_like(pair.truth.video, 128))) == judge.REACH


@pytest.mark.parametrize("kind", ["motion_blur", "low_light", "low_resolution"])
def test_a_bad_driving_clip_changes_what_the_model_is_shown_and_not_what_is_measured(pairs, kind):
    bad, good = judge.draw_pair(0, kind, 1.0), pairs[0]
    assert np.array_equal(bad.truth.video, good.truth.video) and np.array_equal(bad.reference, good.reference)
    assert np.array_equal(bad.seen.body, good.driver.body)
    assert np.abs(np.float32(bad.seen.video) - good.driver.video)[bad.seen.body].mean() > 1
    assert judge.leaks(bad, bad.seen.video) == judge.leaks(good, bad.seen.video)


def test_drift_is_the_slope_and_seam_what_changes_where_latents_meet():
    """A line with noise around it, in gray levels per 100 frames; a clip that jumps 3 at every new latent, else 1."""
    errors = 5 + 0.02 * np.arange(201) + np.where(np.arange(201) % 2, 0.5, -0.5)
    jumps = np.array([0] + [3 if t % 4 == 1 else 1 for t in range(1, 41)])  # frame 0 is a latent, then 1-4, 5-8, ...
    video = (np.cumsum(jumps)[:, None, None, None] * np.ones((1, 2, 2, 3))).astype(np.uint8)
    assert judge.drift(list(errors)) == pytest.approx(2, rel=0.01) and judge.seam(video) == 3
    assert np.isnan(judge.seam(video * 0))
    rows = [{"seam": np.nan, "joint_error": [0.0]}, {"seam": 2.0, "joint_error": [0.0]}]
    with warnings.catch_warnings(action="error"):  # of what stands still there is no seam, and nothing to warn of
        assert judge.summary(rows)["seam"] == 2 and np.isnan(judge.summary(rows[:1])["seam"])
    rows = [{"drift": d, "joint_error": [0.0]} for d in (1.0, 2.0, 3.0)]
    assert judge.summary(rows) == pytest.approx({"drift": 2, "drift_error": 3**-0.5, "joint_error": 0})


def test_long_clips_are_sampled_in_windows_and_measured_over_time(monkeypatch):
    """A stand-in for the model that answers with the truth's own v: 20 frames, exact count, and every window asked for."""
    from data import toy_text

    vae, asked = load_weights(judge.ASSETS / "toy-vae.safetensors", torch.float32)[0].eval(), []

    def model(x, step, text, pose, face):
        asked.append(tuple(x.shape))
        assert x.shape[:2] == pose.shape[:2] == face.shape[:2] and text.shape == toy_text()[None].shape
        return x[:, :, :16]

    _, args = judge.parse_args(["--frames", "20", "--steps", "2"])
    pair = judge.draw_pair(0, length=20)
    (video,) = judge.generate(model, vae, [pair], [0], args, seed=0)
    assert video.shape == (20, 96, 96, 3) and pair.truth.video.shape == (20, 96, 96, 3)
    assert asked == [(1, 6, 32, 12, 12)] * 2 * 2, "25 frames are 7 latents: two windows of 5, at 0 and 2"
    found = judge.measure(pair, pair.truth.video)
    assert found["drift"] == 0 and found["seam"] > 0.3
    with pytest.raises(SystemExit) as stop:
        judge.main(["--frames", "9"])
    assert stop.value.code == 2


def test_a_vae_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        judge.main(["--vae", str(judge.ASSETS / "toy.safetensors")])
    assert stop.value.code == 2 and "holds a DiT" in capsys.readouterr().err


def test_summary_takes_the_median_over_all_joints():
    rows = [{"masked_l1": 1.0, "joint_error": [0.0, 0.0, 9.0]}, {"masked_l1": 3.0, "joint_error": [5.0, 7.0]}]
    assert judge.summary(rows) == {"masked_l1": 2.0, "joint_error": 5.0}


def test_a_sheet_shows_reference_driver_output_and_truth(pairs, tmp_path):
    """A row a pair; three moments as PNG, every frame as GIF; another name is refused before anything is drawn."""
    shown = [(pair, pair.truth.video) for pair in pairs]
    judge.write_sheet(tmp_path / "sheet.png", shown)
    sheet = read_image(tmp_path / "sheet.png")
    side, gap = 2 * judge.TOY_SIZE, 8
    assert sheet.shape == (2 * side, side + 3 * (gap + 3 * side), 3)
    assert np.array_equal(sheet[:side:2, :side:2], pairs[0].reference)
    first = sheet[::2, side + gap : side + gap + 3 * side : 2].reshape(2, judge.TOY_SIZE, 3, judge.TOY_SIZE, 3)
    for row, pair in zip(first, pairs):
        assert np.array_equal(row[:, 0], pair.driver.video[0]) and np.array_equal(row[:, 2], pair.truth.video[0])
    judge.write_sheet(tmp_path / "sheet.gif", shown)
    assert len(list(Video(tmp_path / "sheet.gif"))) == judge.FRAMES
    with pytest.raises(SystemExit) as stop:
        judge.main(["--sheet", str(tmp_path / "sheet.bmp")])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--pairs", "0"], "argument --pairs: 0: give a whole number, 1 or more"),
        (["--soften-cell", "0"], "argument --soften-cell: 0: give a whole number, 1 or more"),
        (["-o", "nofolder/x.json"], "nofolder does not exist"),
        (["--sheet", "nofolder/x.png"], "nofolder does not exist"),
        (["--sheet", "x.jpg"], "must end in .png or .gif"),
        ([str(judge.ASSETS / "toy-vae.safetensors")], "holds a CausalVAE"),
        (["--strength", "0.5"], "--strength 0.5 is of --degrade"),
        (["--joint-noise", "2"], "--joint-noise 2 is of skeletons"),
    ],
)
def test_mistakes_are_found_before_anything_is_sampled(flags, said, capsys, monkeypatch):
    monkeypatch.setattr(judge, "load_weights", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit) as stop:
        judge.main(flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.fixture(scope="module")
def vae():
    return load_weights(judge.ASSETS / "toy-vae.safetensors", torch.float32)[0].eval()


def test_noise_depends_on_the_pair_and_the_sampling_seed_alone(pairs, vae, monkeypatch):
    shape = judge.conditions(vae, pairs[0], judge.parse_args([])[1], 0)
    monkeypatch.setattr(judge, "conditions", lambda *_: shape)
    monkeypatch.setattr(vae, "decode", lambda z: torch.zeros(1, 17, 3, 96, 96))

    def start(numbers, seed):
        seen = []
        model = lambda x, *_: seen.append(x[:, :, :16]) or x[:, :, :16]  # noqa: E731
        _, args = judge.parse_args(["--steps", "1"])
        judge.generate(model, vae, [pairs[0]] * len(numbers), numbers, args, seed)
        return seen[0]

    both, other = start([0, 2], 0), start([0, 2], 1)
    assert torch.equal(both[1:], start([2], 0)), "whatever is sampled beside it"
    assert not torch.equal(both[0], both[1]) and not torch.equal(both, other)


def test_the_moved_truth_is_the_truth_under_eq_11(pairs):
    """Half a pixel off at most; who leaves the picture is no longer seen. Catches a swapped axis or an inverse."""
    clip = pairs[0].truth
    for scale, shift in ((1.0, (0, 0)), (0.8, (12, 5)), (1.2, (-30, 4))):
        found = judge.moved(clip, scale, np.array(shift))
        np.testing.assert_allclose(found.joints, scale * clip.joints + np.float32(shift), atol=1e-3)
        ys, xs = np.nonzero(found.body[0])
        there = np.rint((np.stack([xs, ys], 1) - shift) / scale).astype(int)
        assert clip.body[0][there[:, 1], there[:, 0]].mean() > 0.97
        outside = ((found.joints < -0.5) | (found.joints > 95.5)).any(-1)
        assert np.array_equal(found.visible, clip.visible & ~outside) and (clip.visible & outside).any() == (scale > 1)
        assert np.abs(np.float32(found.video[0][found.body[0]]) - clip.video[0][there[:, 1], there[:, 0]]).mean() < 12
    assert np.array_equal(judge.moved(clip, 1.0, np.zeros(2)).video, clip.video)


def test_pose_and_face_are_the_drivers_the_place_is_the_clips_own(pairs, vae):
    """Slot 0 is A's; with B as A nothing but pose and face may change; --face none hides the face."""
    pair = pairs[0]
    cues_of = lambda pair, *flags: judge.conditions(vae, pair, judge.parse_args([*flags])[1], 0)[1:]  # noqa: E731
    pose, face = cues_of(pair)
    own_pose, own_face = cues_of(pair._replace(seen=pair.truth))
    for cue, own in ((pose, own_pose), (face, own_face)):
        assert torch.equal(cue[:, 0], own[:, 0]) and torch.equal(cue[:, :, 16], own[:, :, 16])
        assert not torch.equal(cue[:, 1:, :16], own[:, 1:, :16])
    hidden = cues_of(pair, "--face", "none")
    assert torch.equal(hidden[0], pose) and not hidden[1].any()
    _, track = judge.place_of(pair, judge.parse_args(["--place", "aligned"])[1], None)
    aligned = cues_of(pair, "--place", "aligned")
    by_hand = cues_of(pair._replace(seen=judge.moved(pair.driver, track.scale, track.shift_xy)))
    away = lambda found: (aligned[0][:, 1:, :16] - found[0][:, 1:, :16]).abs().mean()  # noqa: E731
    assert away(by_hand) < 0.5 * away((pose, face)) and torch.equal(aligned[1][:, :, :16], face[:, :, :16])
    placed = cues_of(pair, "--place", "driver")
    assert torch.equal(placed[0][:, :, :16], pose[:, :, :16]) and not torch.equal(placed[0][:, :, 16], pose[:, :, 16])


@pytest.mark.parametrize("kind", ["motion_blur", "low_light", "low_resolution"])
def test_a_weaker_degradation_changes_less(pairs, kind):
    away = [
        np.abs(np.float32(judge.draw_pair(0, kind, s).seen.video) - pairs[0].driver.video).mean() for s in (0, 0.5, 1)
    ]
    assert away[0] == 0 < away[1] < away[2]


def test_low_light_noise_is_another_for_another_seed():
    video = toy.render(0, 8, frames=1, size=64).video
    a, b, c = (toy.degrade(video, "low_light", 0.5, seed) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_no_training_clip_shows_a_judged_person_or_motion(monkeypatch):
    """By the seeds that data.py and judge.py draw with, at both ends of their ranges; failed pseudo drivers too."""
    seeds = []
    monkeypatch.setattr(toy, "render", lambda identity, motion, *_, **__: seeds.extend([identity, motion]))
    for number in (0, 99_999, data.HELD_OUT, data.HELD_OUT + 99_999):
        data.toy_clip(number)
        data.toy_pseudo(number, Namespace(pseudo_faults=1.0, pseudo_people=None), data.keyed(0))
    trained = seeds[:]
    seeds.clear()
    for number in (0, 9_999):
        judge.draw_pair(number)
    assert max(trained) < min(seeds)


def test_flags_of_cues_and_sampling_reach_the_model(pairs, vae, monkeypatch):
    """--location and --face-cue change what the model reads; --steps and --sampler how often and by whom it is asked."""
    pair = pairs[0]
    cues_of = lambda *flags: judge.conditions(vae, pair, judge.parse_args([*flags])[1], 0)[1:]  # noqa: E731
    pose, face = cues_of()
    none, hard, inplace = cues_of("--location", "none"), cues_of("--location", "hard"), cues_of("--face-cue", "inplace")
    assert not none[0][:, :, 16].any() and torch.equal(none[0][:, :, :16], pose[:, :, :16])
    assert not torch.equal(hard[0][:, :, 16], pose[:, :, 16]) and torch.equal(hard[1], face)
    assert torch.equal(inplace[0], pose) and not torch.equal(inplace[1][:, :, :16], face[:, :, :16])
    asked, found = [], judge.conditions(vae, pair, judge.parse_args([])[1], 0)
    monkeypatch.setattr(judge, "conditions", lambda *_: found)
    monkeypatch.setattr(vae, "decode", lambda z: torch.zeros(1, 17, 3, 96, 96))
    for name in ("ddim", "dpm_solver"):
        solver = lambda fused, start, schedule, steps, name=name, **_: asked.append((name, steps)) or start  # noqa: E731
        monkeypatch.setattr(judge, name, solver)
    for sampler, steps in (("ddim", 7), ("dpm", 3)):
        _, args = judge.parse_args(["--sampler", sampler, "--steps", str(steps)])
        judge.generate(None, vae, [pair], [0], args, 0)
    assert asked == [("ddim", 7), ("dpm_solver", 3)]


def test_a_score_has_each_sampling_seed_and_the_window_of_the_training(tmp_path, monkeypatch):
    save_weights(tmp_path / "m.safetensors", DiT(DIT_PRESETS["toy"]), preset="toy", stage="1", step=1, window=3)
    asked = []

    def perfect(model, vae, pairs, numbers, args, seed, **trained):
        asked.append((numbers, seed, trained))
        return [pair.truth.video for pair in pairs]

    monkeypatch.setattr(judge, "generate", perfect)
    _, args = judge.parse_args([str(tmp_path / "m.safetensors"), "--pairs", "2", "--seeds", "2", "--device", "cpu"])
    answers = judge.score(args)["answers"]
    assert asked == [([0, 1], seed, {"window": 3}) for seed in (0, 1)]
    l1 = {name: row["masked_l1"] for name, row in answers.items()}
    assert l1["seed 0"] == l1["seed 1"] == 0 < l1["driver's frames"]


def test_an_aligned_truth_has_the_references_height_and_place(tmp_path, monkeypatch):
    """Eq. 9 and 10 on A's own clip; what the model is shown is not moved here. Catches B's similarity, which shrinks tall A."""
    save_weights(tmp_path / "m.safetensors", DiT(DIT_PRESETS["toy"]), preset="toy", stage="1", step=1)
    seen = []
    monkeypatch.setattr(
        judge, "generate", lambda m, v, pairs, *_, **__: seen.extend(pairs) or [p.seen.video for p in pairs]
    )
    given = [str(tmp_path / "m.safetensors"), "--pairs", "3", "--seeds", "1", "--device", "cpu", "--place", "aligned"]
    judge.score(judge.parse_args(given)[1])
    for number, pair in enumerate(seen):
        plain = judge.draw_pair(number)
        height = lambda clip: np.median(np.ptp(clip.body_boxes[:, 1::2], axis=1))  # noqa: E731
        assert height(pair.truth) == pytest.approx(height(pair.still), abs=2.5)
        assert np.array_equal(pair.seen.video, plain.seen.video) and np.array_equal(pair.reference, plain.reference)
    assert any(not np.array_equal(pair.truth.video, judge.draw_pair(n).truth.video) for n, pair in enumerate(seen))
