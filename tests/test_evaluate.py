"""evaluate.py: each metric against loops written from its definition; degenerate inputs; order on real clips.

Inception, VGG, I3D and Keypoint R-CNN have no trained weights here. Fast tests put functions or a torchscript
of the same interface in their place and check what they are fed and what is made of the answer; the slow test
runs the real architectures with random weights, saved under the names that the libraries look for.
"""

import json
import math
import subprocess
import sys
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

import finder
import evaluate
import toy
from video import Video, read_image, resize, write_image

H, W = 12, 17


def pictures(seed=0, height=H, width=W):
    return np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def save_frames(folder, frames):
    folder.mkdir(parents=True)
    for k, frame in enumerate(frames):
        write_image(folder / f"{k:03d}.png", frame)
    return folder


@pytest.fixture(scope="module")
def dance(assets):
    """8 frames of a real clip, 24 frames/s, at 288 rows."""
    frames = [resize(f, 288, 176) for f in islice(Video(assets / "video/steadydancer_00002.mp4"), 8)]
    return np.stack(frames)


@pytest.fixture(scope="module")
def face(assets):
    return evaluate.load_face(str(assets / "weights/face"))


# ---- Oracles: plain loops over Python floats -----------------------------------------------------------------------


def loop_mse(a, b, weight=None):
    total = count = 0.0
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            w = 1.0 if weight is None else float(weight[y, x])
            for c in range(3):
                total += w * (float(a[y, x, c]) - float(b[y, x, c])) ** 2
                count += w
    return total / count


def loop_l1(a, b, weight=None):
    total = count = 0.0
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            w = 1.0 if weight is None else float(weight[y, x])
            for c in range(3):
                total += w * abs(float(a[y, x, c]) - float(b[y, x, c]))
                count += w
    return total / count


def decibel(mse):
    return 20 * math.log10(255 / math.sqrt(mse))


def loop_overflow(a, b):
    total = 0
    for p, q in zip(a.ravel().tolist(), b.ravel().tolist()):
        d = (p - q) % 256
        total += (d * d) % 256
    return decibel(total / a.size)


def loop_ssim(a, b):
    """Wang et al. 2004 7 x 7 uniform window, sample covariance, K1 = 0.01, K2 = 0.03, whole windows."""
    a, b = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY).astype(float).tolist() for p in (a, b))
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for y in range(len(a) - 6):
        for x in range(len(a[0]) - 6):
            p = [a[y + i][x + j] for i in range(7) for j in range(7)]
            q = [b[y + i][x + j] for i in range(7) for j in range(7)]
            mp, mq = sum(p) / 49, sum(q) / 49
            vp = sum((v - mp) ** 2 for v in p) / 48
            vq = sum((v - mq) ** 2 for v in q) / 48
            cov = sum((v - mp) * (w - mq) for v, w in zip(p, q)) / 48
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return sum(values) / len(values)


@pytest.fixture(params=["random", "real"])
def pair(request):
    if request.param == "random":
        return pictures()
    dance = request.getfixturevalue("dance")
    return dance[0, 60:90, 70:111], dance[3, 60:90, 70:111]


def test_picture_metrics_equal_loops(pair):
    """Catches uint8 arithmetic where it is not meant, a wrong divisor, a Gaussian or biased SSIM window."""
    a, b = pair
    h, w = a.shape[:2]
    assert evaluate.l1(a, b) == pytest.approx(loop_l1(a, b) / (h * w), rel=1e-12)
    assert evaluate.psnr(a, b) == pytest.approx(decibel(loop_mse(a, b)), rel=1e-12)
    assert evaluate.psnr_overflow(a, b) == pytest.approx(loop_overflow(a, b), rel=1e-12)
    assert evaluate.ssim(a, b) == pytest.approx(loop_ssim(a, b), abs=1e-10)


def test_masked_metrics_equal_loops(pair):
    """With a bool and with a soft mask; catches division by the picture's area instead of the mask's."""
    a, b = pair
    soft = np.random.default_rng(1).random(a.shape[:2])
    for mask in (soft, soft > 0.7):
        assert evaluate.masked_l1(a, b, mask) == pytest.approx(loop_l1(a, b, mask), rel=1e-12)
        assert evaluate.masked_psnr(a, b, mask) == pytest.approx(decibel(loop_mse(a, b, mask)), rel=1e-12)
    full = np.ones(a.shape[:2], bool)
    assert evaluate.masked_psnr(a, b, full) == pytest.approx(evaluate.psnr(a, b), rel=1e-12)


def test_overflow_hides_errors_and_the_correct_psnr_does_not():
    """The measured trap: 16.9 dB reads as about 28; a picture 16 levels off even as perfect."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 42, a.shape), 0, 255).astype(np.uint8)
    assert evaluate.psnr(a, b) < 18 and 27 < evaluate.psnr_overflow(a, b) < 30
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert evaluate.psnr_overflow(flat, flat + 16) == math.inf
    assert evaluate.psnr(flat, flat + 16) == pytest.approx(decibel(256))
    with pytest.raises(ValueError, match="uint8"):
        evaluate.psnr_overflow(flat.astype(float), flat)


def test_l1_scale_is_the_papers():
    """13.9 gray levels at 256 x 256 print as 2.12E-04; the same error at 512 x 512 as a quarter."""
    a = np.full((256, 256, 3), 100.0)
    assert evaluate.l1(a, a + 13.9) == pytest.approx(2.12e-4, rel=1e-3)
    big = np.full((512, 512, 3), 100.0)
    assert evaluate.l1(big, big + 13.9) == pytest.approx(evaluate.l1(a, a + 13.9) / 4)


@pytest.mark.filterwarnings("error")
def test_degenerate_pictures_have_a_value_and_no_warning():
    a, b = pictures()
    assert evaluate.psnr(a, a) == evaluate.psnr_overflow(a, a) == math.inf and evaluate.l1(a, a) == 0
    assert evaluate.ssim(a, a) == 1
    nothing = np.zeros((H, W), bool)
    assert math.isnan(evaluate.masked_l1(a, b, nothing)) and math.isnan(evaluate.masked_psnr(a, b, nothing))
    only = nothing.copy()
    only[3, 4] = True
    assert evaluate.masked_psnr(a, np.where(only[..., None], a, b), only) == math.inf
    with pytest.raises(ValueError, match="6x9"):
        evaluate.ssim(a[:9, :6], b[:9, :6])


# ---- Frechet distance ----------------------------------------------------------------------------------------------


def loop_covariance(x):
    n, d = len(x), len(x[0])
    mean = [sum(row[i] for row in x) / n for i in range(d)]
    return np.array(mean), np.array(
        [[sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in x) / (n - 1) for j in range(d)] for i in range(d)]
    )


@pytest.mark.parametrize("n, m, d", [(40, 30, 5), (4, 7, 6), (2, 2, 3), (9, 9, 1)])
def test_frechet_distance_is_its_definition(n, m, d):
    """Covariances by loops, the root by eigenvalues; singular ones too. Catches n for n - 1, a lost 2."""
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), 2 + rng.normal(size=(m, d))
    (mx, sx), (my, sy) = loop_covariance(x.tolist()), loop_covariance(y.tolist())
    root = np.sqrt(np.linalg.eigvals(sx @ sy).astype(complex)).real.sum()
    expected = ((mx - my) ** 2).sum() + np.trace(sx) + np.trace(sy) - 2 * root
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert evaluate.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(x, x + 1) == pytest.approx(d, abs=1e-9)


def test_frechet_distance_of_float32_and_of_one_feature():
    """float32 features, as networks give them, are not accumulated in float32; one has no covariance."""
    x = np.float32(np.random.default_rng(0).normal(1000, 1, (50, 4)))
    y = x[:30] + np.float32(0.1)
    expected = evaluate.frechet_distance(np.float64(x), np.float64(y))
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        evaluate.frechet_distance(x[:1], x)


# ---- Faces ---------------------------------------------------------------------------------------------------------


def test_face_identity_and_stability_equal_loops_and_skip_frames_without_a_face():
    """Not normalised on purpose. A pair is two neighbours: a face, none, a face makes none."""
    rng = np.random.default_rng(0)
    e = [rng.normal(size=5), None, rng.normal(size=5), 3 * rng.normal(size=5), None]
    reference = rng.normal(size=5)

    def cos(a, b):
        dot = sum(p * q for p, q in zip(a, b))
        return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))

    expected = (cos(e[0], reference) + cos(e[2], reference) + cos(e[3], reference)) / 3
    assert evaluate.face_identity(e, reference) == pytest.approx(expected, rel=1e-12)
    assert evaluate.face_stability(e) == pytest.approx(cos(e[2], e[3]), rel=1e-12)
    for lacking in ([None, None], [], [None]):
        assert math.isnan(evaluate.face_identity(lacking, reference))
        assert math.isnan(evaluate.face_stability(lacking))
    assert math.isnan(evaluate.face_identity(e, None))
    assert math.isnan(evaluate.face_stability(e[:1])), "one frame"


def test_real_faces_are_found_and_their_landmarks_lie_on_them(assets, face):
    """The largest of two, a face that fills the frame, which needs the margin, and a picture without one."""
    portrait = read_image(assets / "image/dynamictrl_person1.jpg")
    embedding, points = face(portrait)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-3) and points.shape == (5, 3)
    assert points[0, 0] < points[1, 0] and points[0, 1] < points[2, 1] < points[3, 1], "eyes, nose, mouth"
    x0, y0 = points[:, :2].min(0).astype(int)
    x1, y1 = points[:, :2].max(0).astype(int)
    reach = int(y1 - y0)
    y0, x0 = max(0, y0 - reach), max(0, x0 - reach)
    close = portrait[y0 : y1 + reach, x0 : x1 + reach]
    assert not len(finder.load_face_finder(assets / "weights/face")(close)), "only the margin helps"
    again, near = face(close)
    assert again is not None and evaluate.cosine(again, embedding) > 0.5
    assert np.abs(near[:, :2] + (x0, y0) - points[:, :2]).max() < 0.15 * (y1 - y0 + reach)
    small = resize(read_image(assets / "image/mimicmotion_web_hb_0.png"), 1024, 600)
    assert face(small)[0] is not None
    for both in ((small, portrait), (portrait, small)):
        assert evaluate.cosine(face(np.hstack(both))[0], embedding) > 0.9
    nobody, none = face(np.zeros((64, 48, 3), np.uint8))
    assert nobody is None and not none.any() and none.shape == (5, 3)


# ---- Keypoints -----------------------------------------------------------------------------------------------------


def loop_consistency(driver, generated, diagonal=None):
    frames = []
    for p, q in zip(driver.tolist(), generated.tolist()):
        seen = [a for a in p if a[2] > 0.3]
        shared = [(a, b) for a, b in zip(p, q) if a[2] > 0.3 and b[2] > 0.3]
        if not shared:
            continue
        xs, ys = [a[0] for a in seen], [a[1] for a in seen]
        unit = diagonal or math.hypot(max(xs) - min(xs), max(ys) - min(ys))
        if unit == 0:
            continue
        frames.append(sum(math.dist(a[:2], b[:2]) for a, b in shared) / len(shared) / unit)
    return sum(frames) / len(frames)


def random_points(seed, frames=6, count=9):
    rng = np.random.default_rng(seed)
    return np.concatenate((rng.normal(40, 15, (frames, count, 2)), rng.random((frames, count, 1))), -1)


def test_keypoint_consistency_equals_loops_and_has_a_rule_for_what_is_not_seen():
    """Frames with no shared point, or with a single one, which spans no box, do not count."""
    driver, generated = random_points(0), random_points(1)
    driver[2, :, 2] = 0
    driver[3, 1:, 2], driver[3, 0, 2], generated[3, 0, 2] = 0, 1, 1
    value = evaluate.keypoint_consistency(driver, generated)
    assert value == pytest.approx(loop_consistency(driver, generated), rel=1e-12)
    value = evaluate.keypoint_consistency(driver, generated, 77.0)
    assert value == pytest.approx(loop_consistency(driver, generated, 77.0), rel=1e-12)
    assert evaluate.keypoint_consistency(driver, driver) == 0
    assert math.isnan(evaluate.keypoint_consistency(driver, np.zeros_like(driver)))
    twice = driver * (2, 2, 1), generated * (2, 2, 1)
    assert evaluate.keypoint_consistency(*twice) == pytest.approx(evaluate.keypoint_consistency(driver, generated))


def test_similarity_is_removed_and_nothing_else():
    """Somebody of another size and place scores 0, another motion does not: one fit a clip, not a frame."""
    driver = random_points(0)
    driver[..., 2] = 1
    moved = driver * (1.7, 1.7, 1) + (30, -12, 0)
    assert evaluate.keypoint_consistency(driver, evaluate.remove_similarity(driver, moved)) < 1e-12
    drifting = driver + np.arange(6)[:, None, None] * (9, 0, 0)
    assert evaluate.keypoint_consistency(driver, evaluate.remove_similarity(driver, drifting)) > 0.05
    other = random_points(7)
    other[..., 2] = 1
    fitted = evaluate.remove_similarity(driver, other)[..., :2].reshape(-1, 2)
    centre = lambda points: [sum(p[k] for p in points) / len(points) for k in range(2)]  # noqa: E731
    size = lambda points: sum((p[k] - centre(points)[k]) ** 2 for p in points for k in range(2))  # noqa: E731
    onto = driver[..., :2].reshape(-1, 2)
    assert np.allclose(centre(fitted), centre(onto)) and size(fitted) == pytest.approx(size(onto)), "not shrunk"
    steps = np.diff(fitted, axis=0) / np.diff(other[..., :2].reshape(-1, 2), axis=0)
    assert np.allclose(steps, steps[0, 0]) and steps[0, 0] > 0, "one positive scale"
    unseen = np.zeros_like(driver)
    assert evaluate.remove_similarity(driver, unseen) is unseen


def test_being_small_hides_no_wrong_motion_across_identities():
    """A wrong motion at any size, and drawn together to a point, which has no motion at all."""
    driver, other = random_points(0), random_points(7)
    driver[..., 2] = other[..., 2] = 1
    size = 256, 256
    rows = [evaluate.point_rows(driver, other * (k, k, 1), size, size, True) for k in (1, 0.1, 0.01)]
    for row in rows:
        assert (
            row[""] == pytest.approx(rows[0][""])
            and row["_image"] == pytest.approx(rows[0]["_image"])
            and row["_image"] > 0.05
        )
    point = evaluate.point_rows(driver, other * (0, 0, 1), size, size, True)
    assert math.isnan(point[""]) and math.isnan(point["_image"])


def test_points_of_another_canvas_are_placed_as_sample_py_letterboxes_them():
    """A 100 x 200 (H, W) driver on a 400 x 400 canvas: scale 2, 100 rows of black above."""
    driver = random_points(0)
    driver[..., 2] = 1
    there = driver * (2, 2, 1) + (0.5, 100.5, 0)  # pixel centres: x -> 2 (x + 1/2) - 1/2
    rows = evaluate.point_rows(driver, there, (100, 200), (400, 400), False)
    assert rows[""] < 1e-9 and rows["_image"] < 1e-9 and rows["_rate"] == 1
    there[:, :3, 2] = 0
    off = evaluate.point_rows(driver, there + (8, 6, 0), (100, 200), (400, 400), False)
    assert off["_image"] == pytest.approx(10 / math.hypot(400, 400)) and off["_rate"] == pytest.approx(6 / 9)


# ---- Order on real clips -------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    evaluate.main([str(a) for a in arguments])
    return capsys.readouterr().out


def means(tmp_path, capsys, *arguments):
    out = tmp_path / "results.json"
    run(capsys, *arguments, "-o", out)
    return json.loads(out.read_text())


def test_pictures_rank_the_same_clip_then_its_neighbour_then_blur_and_noise(dance):
    """Equal < the next frame < heavy noise, and less blur before more blur, for every picture metric."""
    a = dance[:4]
    blur = lambda sigma: np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in a])
    noise = np.clip(a + np.random.default_rng(0).normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    score = lambda metric, b: np.mean([metric(p, q) for p, q in zip(b, a)])
    for metric, sign in ((evaluate.ssim, 1), (evaluate.psnr, 1), (evaluate.l1, -1)):
        same, near, rough = (sign * score(metric, b) for b in (a, dance[1:5], noise))
        assert same > near > rough, metric.__name__
        assert same > sign * score(metric, blur(1)) > sign * score(metric, blur(6)), metric.__name__
    assert score(evaluate.ssim, dance[1:5]) > score(evaluate.ssim, blur(6))


def test_faces_rank_the_same_person_above_another_and_her_own_motion_above_another(assets, face):
    """FIS: own clip above a stranger's. FTS: one person above two in turn. FLC: next frame before a later."""
    near = [resize(f, 240, 240) for f in islice(Video(assets / "video/liveportrait_d18.mp4"), 21)]
    other = resize(read_image(assets / "image/dynamictrl_person1.jpg"), 240, 180)
    looks = {k: face(near[k]) for k in (0, 1, 2, 20)}
    stranger = face(other)[0]
    own = [looks[k][0] for k in (1, 2, 20)]
    assert evaluate.face_identity(own, looks[0][0]) > 0.6
    assert evaluate.face_identity([stranger], looks[0][0]) < 0.3
    assert evaluate.face_stability(own) > evaluate.face_stability([own[0], stranger, own[1]])
    at = lambda *frames: np.stack([looks[k][1] for k in frames])
    same, next_frame, later = (evaluate.keypoint_consistency(at(0), at(k)) for k in (0, 1, 20))
    assert same == 0 < next_frame < later
    another = [resize(f, 240, 240) for f in islice(Video(assets / "video/liveportrait_s13.mp4"), 3)]
    moving = np.stack([face(f)[1] for f in another])
    assert evaluate.point_rows(at(0, 1, 2), moving, (240, 240), (240, 240), True)[""] > next_frame, "another motion"


def test_toy_joints_rank_motions_and_forget_the_person():
    """Exact joints: the same motion of another person beats another motion, the similarity removed."""

    def joints(identity, motion):
        clip = toy.render(identity, motion, camera=0, frames=9, size=64)
        return np.concatenate((clip.joints, clip.visible[..., None]), -1)

    driver, other_person, other_motion = joints(1, 2), joints(5, 2), joints(5, 3)
    plc = lambda generated: evaluate.keypoint_consistency(driver, evaluate.remove_similarity(driver, generated))
    assert evaluate.keypoint_consistency(driver, driver) == 0 < plc(other_person) < plc(other_motion)


# ---- The command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Two clips of three drawn frames, generated (another size) and true."""
    for name, seed in (("one", 0), ("two", 1)):
        truth = np.random.default_rng(seed).integers(0, 256, (3, 20, 14, 3), dtype=np.uint8)
        save_frames(tmp_path / "truth" / name, truth)
        save_frames(tmp_path / "generated" / name, [resize(f // 2, 30, 21) for f in truth])
    return tmp_path


def test_numbers_are_means_over_frames_then_clips_and_the_clips_are_named(folders, capsys):
    """The truth's size rules, bilinear; L1 at 256 x 256. The table has the JSON's numbers and the names."""
    generated, truth = folders / "generated", folders / "truth"
    result = means(folders, capsys, generated, truth, "--metrics", "ssim,psnr,l1")
    for row, metric in (("ssim", evaluate.ssim), ("psnr", evaluate.psnr), ("l1", evaluate.l1)):
        clips = []
        for name in ("one", "two"):
            values = []
            for g, t in zip(Video(generated / name), Video(truth / name)):
                g = cv2.resize(g, (14, 20), interpolation=cv2.INTER_LINEAR)
                if row == "l1":
                    g, t = resize(g, 256, 256), resize(t, 256, 256)
                values.append(metric(g, t))
            clips.append(sum(values) / 3)
            assert result["clips"][name][row] == pytest.approx(clips[-1])
        assert result["mean"][row]["mean"] == pytest.approx(sum(clips) / 2)
        assert result["mean"][row]["clips"] == ["one", "two"]
    printed = run(capsys, generated, truth, "--metrics", "ssim,psnr,l1")
    rows = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4 and all("| 2: one, two |" in row for row in rows) and "uint8 overflow" in printed
    assert f"{1e4 * result['mean']['l1']['mean']:.4g}" in printed
    squeezed = means(folders, capsys, generated, truth, "--metrics", "psnr", "--size", "16")
    assert squeezed["clips"]["one"]["psnr"] != result["clips"]["one"]["psnr"]


def test_one_frame_and_equal_clips(tmp_path, capsys):
    """One frame: FTS has no pair, and inf is no JSON number."""
    save_frames(tmp_path / "a", [pictures()[0]])
    result = means(tmp_path, capsys, tmp_path / "a", tmp_path / "a", "--metrics", "psnr,ssim,l1")
    assert result["clips"]["a"]["psnr"] == result["mean"]["psnr"]["mean"] == "inf"
    assert (result["mean"]["ssim"]["mean"], result["mean"]["l1"]["mean"]) == (1, 0)


def test_masked_numbers_are_those_of_the_mask(tmp_path, capsys):
    """The toy's exact masks, read from pictures, squeezed with them; frames with an empty one are skipped."""
    clip, other = (toy.render(1, m, frames=3, size=(96, 64)) for m in (2, 3))
    masks = [finder.paint_mask(b, f) for b, f in zip(clip.body, clip.face)]
    masks[1][:] = 0
    folders = [save_frames(tmp_path / n, v) for n, v in (("g", other.video), ("t", clip.video), ("m", masks))]
    arguments = [*folders[:2], "--masks", folders[2], "--metrics", "masked"]
    result = means(tmp_path, capsys, *arguments)["mean"]
    expected = [evaluate.masked_l1(other.video[k], clip.video[k], clip.body[k]) for k in (0, 2)]
    assert result["masked_l1"]["mean"] == pytest.approx(sum(expected) / 2)
    expected = [evaluate.masked_psnr(other.video[k], clip.video[k], clip.body[k]) for k in (0, 2)]
    assert result["masked_psnr"]["mean"] == pytest.approx(sum(expected) / 2)
    assert means(tmp_path, capsys, *arguments, "--size", "32")["mean"]["masked_l1"]["mean"] > 0
    for file in folders[2].iterdir():
        write_image(file, np.zeros((96, 64, 3), np.uint8))
    assert "not run: the masks are empty" in run(capsys, *arguments)


def test_faces_of_a_real_clip_through_the_command(tmp_path, capsys, dance, assets):
    """FIS, FTS, detection rate, FLC of a real clip; a clip without a face is not among the clips."""
    generated = save_frames(tmp_path / "g" / "dance", dance[2:4]).parent
    save_frames(generated / "grey", np.full((1, 64, 64, 3), 90, np.uint8))
    truth = save_frames(tmp_path / "t" / "dance", dance[:2]).parent
    save_frames(truth / "grey", np.full((1, 64, 64, 3), 90, np.uint8))
    model = assets / "weights/face"
    result = means(tmp_path, capsys, generated, truth, "--metrics", "fis,fts,flc", "--face-model", model)
    mean, clips = result["mean"], result["clips"]
    assert mean["fis"]["clips"] == mean["fts"]["clips"] == mean["flc"]["clips"] == ["dance"]
    assert 0.5 < mean["fis"]["mean"] < 1 and 0.5 < mean["fts"]["mean"] < 1 and 0 < mean["flc"]["mean"] < 1
    assert mean["face_rate"]["mean"] == 0.5 and clips["grey"]["face_rate"] == 0 and clips["grey"]["fis"] is None
    alone = ["--metrics", "fis", "--face-model", model]
    assert "not run: no face" in run(capsys, generated / "grey", truth / "grey", *alone)
    picture = tmp_path / "wall.png"
    write_image(picture, np.full((64, 64, 3), 9, np.uint8))
    assert "not run: no face" in run(capsys, generated / "dance", truth / "dance", *alone, "--reference", picture)


def test_keypoints_from_files_need_no_network(folders, capsys):
    """PLC and FLC from .npz, one file a clip; what the file lacks is not run."""
    (folders / "points").mkdir()
    expected = []
    for seed, name in enumerate(("one", "two")):
        driver, generated = random_points(seed, 3), random_points(seed + 5, 3)
        moved = driver * (1.5, 1.5, 1) + (0.25, 0.25, 0)  # 20 x 14 onto 30 x 21
        np.savez(folders / "points" / f"{name}.npz", driver_body=driver, generated_body=generated)
        expected.append(loop_consistency(moved, generated))
    arguments = [
        folders / "generated",
        folders / "truth",
        "--metrics",
        "plc,flc",
        "--keypoints",
        folders / "points",
    ]
    result = means(folders, capsys, *arguments)["mean"]
    assert result["plc"]["mean"] == pytest.approx(sum(expected) / 2)
    assert "not_run" in result["flc"]
    assert means(folders, capsys, *arguments, "--cross-id")["mean"]["plc"]["mean"] != result["plc"]["mean"]


class TinyI3D(torch.nn.Module):
    """The interface of the I3D torchscript: (B, 3, T, 224, 224) in [-1, 1] -> (B, D)."""

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert not rescale and not resize and return_features and x.shape[1:] == (3, 16, 224, 224)
        return torch.cat([x.mean((2, 3, 4)), x[:, :, 0].mean((2, 3)), x.amax((2, 3, 4))], 1)


def test_fvd_feeds_every_run_of_16_frames_as_the_field_does(tmp_path, capsys, dance):
    """A torchscript of the same interface: windows, size, scale and pooling are checked, not I3D itself."""
    from PIL import Image

    path = tmp_path / "i3d.pt"
    torch.jit.script(TinyI3D()).save(str(path))
    clips = {"long": (18, 0), "short": (17, 3), "lone": (9, 0)}
    features = [], []
    for name, (length, start) in clips.items():
        truth = dance[np.arange(start, start + length) % 8, 100:160, 50:100]
        generated = 255 - truth[::-1] // 2
        for side, kind, frames in zip(features, ("g", "t"), (generated, truth)):
            save_frames(tmp_path / kind / name, frames)
            small = [np.float64(Image.fromarray(f).resize((224, 224), Image.Resampling.BICUBIC)) for f in frames]
            for k in range(length - 15):
                window = np.stack(small[k : k + 16]) / 127.5 - 1
                side.append(np.r_[window.mean((0, 1, 2)), window[0].mean((0, 1)), window.max((0, 1, 2))])
    result = means(tmp_path, capsys, tmp_path / "g", tmp_path / "t", "--metrics", "fvd", "--i3d", path)
    fvd = result["mean"]["fvd"]
    assert len(features[0]) == 5 and "5 features" in fvd["definition"] and "too few" in fvd["definition"]
    assert fvd["clips"] == ["long", "short"], "a clip of 9 frames has no run of 16"
    assert fvd["mean"] == pytest.approx(evaluate.frechet_distance(*features), abs=1e-4)
    printed = run(capsys, tmp_path / "g/lone", tmp_path / "t/lone", "--metrics", "fvd", "--i3d", path)
    assert "not run: fewer than 2 runs" in printed


def test_fid_and_lpips_see_the_pair_that_the_other_metrics_see(dance, tmp_path):
    """Functions in place of Inception and VGG: FID pools all clips' frames, LPIPS keeps both numbers."""
    networks = {"inception": lambda p: p.mean((0, 1)), "lpips": lambda a, b: (evaluate.l1(a, b), 7.0)}
    clips, features = {}, {}
    for k, name in enumerate("ab"):
        truth = save_frames(tmp_path / name / "t", dance[k : k + 3])
        generated = save_frames(tmp_path / name / "g", [resize(f, 144, 88) for f in dance[k + 1 : k + 4]])
        clip = evaluate.Clip(name, {"generated": generated, "truth": truth}, dance[0], None)
        clips[name], features[name] = evaluate.measure(clip, ["fid", "lpips"], networks)
    up = lambda f: cv2.resize(resize(f, 144, 88), (176, 288))
    x = [up(dance[k + j]).mean((0, 1)) for k in (0, 1) for j in (1, 2, 3)]
    y = [dance[k + j].mean((0, 1)) for k in (0, 1) for j in (0, 1, 2)]
    pooled = {"fid": {name: found["fid"] for name, found in features.items()}}
    summary = evaluate.summarise(clips, pooled, ["fid", "lpips"], {})
    assert summary["fid"]["mean"] == pytest.approx(evaluate.frechet_distance(x, y))
    assert summary["lpips_normalized"]["mean"] == 7
    expected = np.mean([evaluate.l1(up(dance[j + 1]), dance[j]) for j in range(3)])
    assert clips["a"]["lpips"] == pytest.approx(expected)


def test_what_cannot_run_is_named_in_the_table(folders, capsys, monkeypatch):
    """A missing library, weights that cannot be fetched, a missing file: a sentence each, never a number."""
    monkeypatch.setenv("TORCH_HOME", str(folders / "empty"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    generated, truth = folders / "generated/one", folders / "truth/one"
    result = means(folders, capsys, generated, truth, "--metrics", "psnr,lpips,fid,fvd,masked")
    why = {row: entry["not_run"] for row, entry in result["mean"].items() if "not_run" in entry}
    assert "pip install -r requirements-eval.txt" in why["lpips"] and why["lpips"] == why["lpips_normalized"]
    assert "offline" in why["fid"] and "pytorch-fid" in why["fid"]
    assert "--i3d" in why["fvd"] and "http" in why["fvd"] and "--masks" in why["masked_l1"]
    assert result["mean"]["psnr"]["mean"] > 0, "the others run"


def mistake(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in arguments])
    assert stop.value.code == 2
    sentence = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
    assert sentence.startswith(("pytest", "evaluate", "__main__")) and "Traceback" not in sentence
    return sentence


def test_user_mistakes_end_in_one_sentence(folders, capsys):
    """Exit code 2, what was given, what to give."""
    g, t, pair = folders / "generated", folders / "truth", ["--metrics", "psnr"]
    (folders / "empty").mkdir()
    assert "empty" in mistake(capsys, folders / "empty", t, *pair)
    assert "nowhere does not exist" in mistake(capsys, folders / "nowhere", t, *pair)
    assert "nowhere" in mistake(capsys, g / "one", folders / "nowhere", *pair)
    assert "folder of clips" in mistake(capsys, g, t / "one", *pair)
    save_frames(folders / "films", pictures()[:1])  # sample.py --every-step leaves one beside its film
    (folders / "films" / "a.mp4").write_bytes(b"")
    assert "a folder of clips" in mistake(capsys, folders / "films", t / "one", *pair)
    assert "one clip" in mistake(capsys, g / "one", t, *pair)
    save_frames(t / "three", pictures())
    assert "three" in mistake(capsys, g, t, *pair)
    save_frames(g / "four", pictures())
    assert all(name in mistake(capsys, g, t, *pair) for name in ("three", "four"))
    save_frames(folders / "brief", pictures())
    assert "2 frames" in mistake(capsys, g / "one", folders / "brief", *pair)
    (g / "four.mp4").write_bytes(b"")
    assert "both four and four.mp4" in mistake(capsys, g, t, *pair)
    assert "'pnsr'" in mistake(capsys, g, t, "--metrics", "pnsr") and "psnr" in mistake(
        capsys, g, t, "--metrics", "pnsr"
    )
    one = [g / "one", t / "one"]
    assert "--driver" in mistake(capsys, *one, *pair, "--driver", t / "one")
    assert "--masks" in mistake(capsys, *one, *pair, "--masks", t / "one")
    assert "--size 3" in mistake(capsys, *one, *pair, "--size", "3")
    assert "LPIPS can see: give at least 16" in mistake(capsys, *one, "--metrics", "lpips", "--size", "12")
    assert ".json" in mistake(capsys, *one, *pair, "-o", folders / "out.txt")
    text = folders / "text.npz"
    text.write_text("no array")
    assert "text.npz" in mistake(capsys, *one, "--metrics", "plc", "--keypoints", text)
    np.savez(text, driver_body=random_points(0, 3), generated_body=random_points(0, 4))
    assert "(T, K, 3)" in mistake(capsys, *one, "--metrics", "plc", "--keypoints", text)
    np.savez(text, driver_body=random_points(0, 9), generated_body=random_points(0, 9))
    assert "9 frames" in mistake(capsys, *one, "--metrics", "plc", "--keypoints", text)
    np.savez(text, body=random_points(0, 9))
    assert "driver_body" in mistake(capsys, *one, "--metrics", "plc", "--keypoints", text)
    with open(text, "wb") as file:
        np.save(file, random_points(0, 3))
    assert "is not an .npz" in mistake(capsys, *one, "--metrics", "plc", "--keypoints", text)
    assert "no truth for psnr" in mistake(capsys, *one, "--metrics", "psnr,plc", "--cross-id")
    assert "by --reference" in mistake(capsys, *one, "--metrics", "fis,plc", "--cross-id")
    assert "text.npz" in mistake(capsys, *one, "--metrics", "fvd", "--i3d", text)
    assert "text.npz" in mistake(capsys, *one, "--metrics", "fis", "--face-model", text)
    small = [save_frames(folders / name, pictures(0, 6, 9)) for name in ("s", "r")]
    assert "9x6" in mistake(capsys, *small, "--metrics", "ssim")
    assert not list(folders.glob("*.part")) and not list(folders.glob("*.json"))


def test_help_imports_no_network():
    command = [sys.executable, "-X", "importtime", "evaluate.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--keypoints" in done.stdout
    for library in (" torch\n", " insightface\n", " skimage\n", " torchmetrics\n"):
        assert library not in done.stderr


# ---- Slow: the real architectures, random weights ------------------------------------------------------------------


@pytest.mark.slow
def test_real_architectures_run_with_random_weights(tmp_path, capsys, monkeypatch, dance):
    """What the loaders ask of the libraries, and LPIPS's formula by hand over VGG's five layers.

    The numbers mean nothing: the weights are random, put where the libraries save the fetched ones.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import detection, inception_v3, vgg16

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    vgg = vgg16(weights=None)
    torch.save(vgg.state_dict(), cache / "vgg16-397923af.pth")
    inception = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(inception.state_dict(), cache / "pt_inception-2015-12-05-6726825d.pth")
    people = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(people.state_dict(), cache / "keypointrcnn_resnet50_fpn_coco-fc266e95.pth")

    a, b = dance[0], dance[1]
    lins = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net

    def by_hand(a, b):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, total = torch.stack((a, b)).sub(shift).div(scale).permute(0, 3, 1, 2).float(), 0
        for k, layer in enumerate(vgg.features):
            x = layer(x)
            if k in (3, 8, 15, 22, 29):
                unit = x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)
                weight = getattr(lins, f"lin{(3, 8, 15, 22, 29).index(k)}").model[-1].weight
                total += ((unit[0] - unit[1]) ** 2 * weight[0]).sum(0).mean()
        return float(total)

    with torch.inference_mode():
        unit = [torch.from_numpy(p) / 255 for p in (a, b)]
        expected = by_hand(*unit), by_hand(2 * unit[0] - 1, 2 * unit[1] - 1)
    assert evaluate.load_lpips()(a, b) == pytest.approx(expected, rel=1e-3)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)
    feature = evaluate.load_inception()(a)
    assert feature.shape == (2048,) and np.isfinite(feature).all()
    nothing, joints = evaluate.load_body()(a)
    assert nothing is None and joints.shape == (17, 3)

    folders = [save_frames(tmp_path / name, frames) for name, frames in (("g", dance[1:4]), ("t", dance[:3]))]
    result = means(tmp_path, capsys, *folders, "--metrics", "lpips,fid,plc")["mean"]
    assert result["lpips"]["mean"] > 0 and result["fid"]["mean"] >= 0 and "plc" in result


def test_a_clip_that_breaks_is_named_counted_and_skipped(folders, capsys):
    """The others are measured; a single one, or the last that is left, is a mistake."""
    g, t = folders / "generated", folders / "truth"
    for name in ("good", "bad"):
        save_frames(g / name, pictures())
        save_frames(t / name, pictures())
    broken = sorted((g / "bad").iterdir())[1]
    broken.write_bytes(b"no picture")
    evaluate.main([str(g), str(t), "--metrics", "psnr", "-o", str(folders / "out.json")])
    said, result = capsys.readouterr(), json.loads((folders / "out.json").read_text())
    assert "bad: skipped, " in said.err and "1 of 4 clips skipped: bad" in said.out
    assert result["clips"].keys() == {"good", "one", "two"} and result["skipped"].keys() == {"bad"}
    assert broken.name in mistake(capsys, g / "bad", t / "bad", "--metrics", "psnr")
