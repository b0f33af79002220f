"""cues.py: filters against loops written from the definitions; finding, tracking, rejecting on drawn people;
the two passes; the preview command; real clips where test assets are present.

    pytest tests/test_cues.py          (-m slow adds segment-anything at full size with random weights)
"""

import argparse
import shutil
import subprocess
import sys
import tracemalloc
import urllib.error
from dataclasses import fields
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cues
import finder
from align import tight_box, transform
from cues import CueOptions, Track, analyse, crop, extract, face_squares, faults, fill_gaps, grid_soften, low_pass
from cues import pose_cue, render
from finder import Finder, Person, PersonNet, Sam, find_face, load_face_finder, paint_mask, read_mask
from video import Video, read_image, write_image, write_video

ROOT = Path(__file__).parent.parent
NOBODY = np.full(4, np.nan)
H, W = 96, 64                                                          # canvas, rows and columns different
FRAME = (48, 64)                                                       # native frames: landscape


# ---- A drawn clip: a gray person with a bright face walks on a noisy background ------------------------------------

def figure(x, shape=FRAME, y=8, tall=32, wide=10):
    body, face = np.zeros(shape, bool), np.zeros(shape, bool)
    body[y:y + tall, x:x + wide] = True
    face[y + 1:y + 7, x + 2:x + wide - 2] = True
    return body, face


def drawn(body, face, seed=0):
    frame = np.random.default_rng(seed).integers(0, 60, (*body.shape, 3), dtype=np.uint8)
    frame[body], frame[face] = (120, 90, 60), (230, 180, 150)
    return frame


BODIES, FACES = map(np.stack, zip(*(figure(10 + 2 * k) for k in range(12))))
CLIP = np.stack([drawn(body, face, k) for k, (body, face) in enumerate(zip(BODIES, FACES))])
OWN_BODY, OWN_FACE = figure(20, (H, W), 10, 70, 24)
REFERENCE = drawn(OWN_BODY, OWN_FACE)
MASKS = [paint_mask(body, face) for body, face in zip(BODIES, FACES)]
GIVEN = Finder(masks=MASKS, reference_mask=paint_mask(OWN_BODY, OWN_FACE))


class Scripted:
    """A segmenter that returns what it is told, frame by frame: [(mask, predicted IoU, stability), ...]."""

    def __init__(self, script):
        self.script, self.calls = script, 0

    def __call__(self, frame, previous=None):
        if frame.shape[:2] == (H, W):
            return [Person(OWN_BODY, 1.0, 1.0)]
        self.calls += 1
        people = self.script[self.calls - 1]
        return [Person(*person) for person in people]


def judged(script, options=CueOptions()):
    return analyse(CLIP[:len(script)], REFERENCE, Finder(Scripted(script)), options)


# ---- Low-pass ------------------------------------------------------------------------------------------------------

def direct_low_pass(gray, cutoff, gain):
    """The definition in float64 sums: mirror to 2H x 2W, DFT, gain by radius, inverse DFT, crop."""
    rows, columns = gray.shape
    mirrored = np.block([[gray, gray[:, ::-1]], [gray[::-1], gray[::-1, ::-1]]])
    m, n = 2 * rows, 2 * columns
    y, x = np.mgrid[:m, :n]
    out = np.zeros((m, n), complex)
    for u in range(m):
        for v in range(n):
            wave = np.exp(2j * np.pi * (u * y / m + v * x / n))
            fy, fx = min(u, m - u) / rows, min(v, n - v) / columns     # cycles per pixel over Nyquist's 0.5
            out += gain(np.hypot(fy, fx) / cutoff) * (mirrored * wave.conj()).sum() * wave
    return (out.real / (m * n))[:rows, :columns]


@pytest.mark.parametrize("kind, gain", [
    ("gaussian", lambda r: np.exp(-r ** 2 / 2)), ("ideal", lambda r: float(r <= 1)),
    ("butterworth", lambda r: 1 / (1 + r ** 8))])
def test_low_pass_equals_the_direct_sum(kind, gain):
    """Catches a wrong radius (per axis, not per pixel), extension, crop, or Butterworth order (n = 4)."""
    gray = np.random.default_rng(0).random((6, 10))
    assert np.abs(low_pass(gray, 0.37, kind) - direct_low_pass(gray, 0.37, gain)).max() < 1e-12


def dct(picture):
    """Orthonormal DCT-II of both axes, by its matrix."""
    for axis, size in enumerate(picture.shape):
        k, n = np.mgrid[:size, :size]
        basis = np.cos(np.pi * k * (n + 0.5) / size) * np.sqrt(np.where(k == 0, 1, 2) / size)
        picture = np.moveaxis(np.tensordot(basis, picture, (1, axis)), 0, axis)
    return picture


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.floats(0.05, 0.9), st.sampled_from(sorted(cues.FILTERS)))
def test_low_pass_keeps_the_mean_is_linear_and_amplifies_nothing(seed, cutoff, kind):
    """A gain above 1 would add texture that the driver does not have; a mean that drifts, flicker."""
    a, b = np.random.default_rng(seed).random((2, 14, 22))
    low = low_pass(a, cutoff, kind)
    assert abs(low.mean() - a.mean()) < 1e-13
    mixed = low_pass(2 * a - 3 * b, cutoff, kind)
    assert np.allclose(mixed, 2 * low - 3 * low_pass(b, cutoff, kind), atol=1e-12)
    assert (np.abs(dct(low)) <= np.abs(dct(a)) + 1e-12).all()


def test_low_pass_does_not_wrap_around():
    """Feet cut by the lower border must not appear above the head: the fault of an FFT without extension."""
    gray = np.zeros((64, 48))
    gray[-6:], gray[:, -6:] = 1, 1
    assert np.abs(low_pass(gray, 0.12)[:32, :24]).max() < 1e-9


def test_low_pass_keeps_the_dtype_and_clips_nothing():
    assert low_pass(np.ones((8, 12), np.float32), 0.2).dtype == np.float32
    edge = np.zeros((20, 34))
    edge[:, 17:] = 1
    sharp, smooth = low_pass(edge, 0.3, "ideal"), low_pass(edge, 0.12)
    assert sharp.min() < -0.01 and sharp.max() > 1.01                  # rings, and is not clipped
    assert smooth.min() > -1e-9 and smooth.max() < 1 + 1e-9            # a Gaussian does not


# ---- Softening -----------------------------------------------------------------------------------------------------

def direct_soften(mask, cell, statistic, phase):
    """Blocks by their own loops, then bilinear interpolation between block centres, held at the border."""
    rows, columns = mask.shape
    tops, lefts = (list(range(-(offset % cell), size, cell)) for size, offset in zip(mask.shape, phase))
    take = np.mean if statistic == "mean" else np.max
    blocks = np.array([[take(mask[max(top, 0):top + cell, max(left, 0):left + cell]) for left in lefts]
                       for top in tops])
    out = np.zeros(mask.shape)
    for y in range(rows):
        for x in range(columns):
            v = min(max((y + 0.5 - tops[0]) / cell - 0.5, 0), len(tops) - 1)
            u = min(max((x + 0.5 - lefts[0]) / cell - 0.5, 0), len(lefts) - 1)
            i, j = min(int(v), len(tops) - 2), min(int(u), len(lefts) - 2)
            a, b = v - i, u - j
            out[y, x] = ((1 - a) * (1 - b) * blocks[i, j] + (1 - a) * b * blocks[i, j + 1]
                         + a * (1 - b) * blocks[i + 1, j] + a * b * blocks[i + 1, j + 1])
    return out


def disc(seed, shape=(45, 70)):
    x, y, a, b, turn = np.random.default_rng(seed).integers([15, 12, 6, 6, 0], [55, 33, 24, 18, 180]).tolist()
    return cv2.ellipse(np.zeros(shape, np.uint8), (x, y), (a, b), turn, 0, 360, 1, -1).astype(bool)


cells = st.integers(3, 11)
phases = st.tuples(st.integers(0, 10), st.integers(0, 10))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), cells, phases, st.sampled_from(["mean", "max"]))
def test_grid_soften_equals_blocks_and_bilinear_by_hand(seed, cell, phase, statistic):
    """Sizes that no cell divides, any phase; catches blocks that count pixels beyond the border."""
    mask = np.random.default_rng(seed).random((25, 38)) < 0.1
    expected = direct_soften(mask, cell, statistic, phase)
    assert np.abs(grid_soften(mask, cell, statistic, phase) - expected).max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), cells, phases, st.sampled_from(["mean", "max"]))
def test_soft_mask_is_exactly_0_far_outside_and_exactly_1_deep_inside(seed, cell, phase, statistic):
    """Beyond 1.5 cells per axis nothing may leak: a mask of 1e-8 where nobody is would still be somebody."""
    mask = disc(seed)
    soft = grid_soften(mask, cell, statistic, phase)
    reach = np.ones((2 * (3 * cell // 2) + 1,) * 2, np.uint8)
    assert (soft[cv2.dilate(np.uint8(mask), reach) == 0] == 0).all()
    assert (soft[cv2.erode(np.uint8(mask), reach) == 1] == 1).all()
    assert soft.min() >= 0 and soft.max() <= 1 and soft.dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), cells)
def test_max_softening_does_not_see_the_outline_inside_a_cell(seed, cell):
    """Animate Anyone 2's point: outlines that touch the same cells give one mask, so none can leak."""
    mask, rng = disc(seed), np.random.default_rng(seed)
    touched = grid_soften(mask, cell, "max")
    other = np.zeros_like(mask)
    for y in range(0, mask.shape[0], cell):
        for x in range(0, mask.shape[1], cell):
            block = mask[y:y + cell, x:x + cell]
            if block.any():
                inside = other[y:y + cell, x:x + cell]
                inside[rng.integers(block.shape[0]), rng.integers(block.shape[1])] = True
    assert (grid_soften(other, cell, "max") == touched).all()
    assert not (grid_soften(other, cell, "mean") == grid_soften(mask, cell, "mean")).all()


def test_grid_soften_takes_batches():
    masks = np.stack([disc(k) for k in range(6)]).reshape(2, 3, 45, 70)
    assert (grid_soften(masks, 8, phase=(3, 5))[1, 2] == grid_soften(masks[1, 2], 8, phase=(3, 5))).all()


# ---- Faces over time -----------------------------------------------------------------------------------------------

def boxes_with_gap(length, slim_before=0.75, slim_after=0.75, around=6):
    """A face moving right by 1 a frame, 40 high; `length` frames without it in the middle."""
    boxes = np.array([[10 + k, 5, 40 + k, 45] for k in range(2 * around + length)], float)
    boxes[around - 1, 2] = boxes[around - 1, 0] + 40 * slim_before
    boxes[around + length, 2] = boxes[around + length, 0] + 40 * slim_after
    boxes[around:around + length] = np.nan
    return boxes, slice(around, around + length)


def test_gaps_up_to_8_frames_are_interpolated_and_longer_ones_stay_black():
    """Blinks of the detector must not blank the Face Cue, and 9 frames of guessed face must not be shown."""
    boxes, gap = boxes_with_gap(8)
    assert np.allclose(fill_gaps(boxes)[gap], [[10 + k, 5, 40 + k, 45] for k in range(6, 14)])
    boxes, gap = boxes_with_gap(9)
    assert np.isnan(fill_gaps(boxes)[gap]).all()
    boxes[:2] = boxes[-1:] = np.nan
    assert np.isnan(fill_gaps(boxes)[[0, 1, -1]]).all()                # nothing beyond the ends
    assert np.isnan(fill_gaps(np.full((3, 4), np.nan))).all()


def test_a_gap_between_two_profiles_is_a_head_turned_away():
    """The back of a head must not become a Face Cue; one slim box alone is a noisy detection."""
    boxes, gap = boxes_with_gap(3, 0.5, 0.5)
    assert np.isnan(fill_gaps(boxes)[gap]).all()
    boxes, gap = boxes_with_gap(3, 0.5, 0.75)
    assert np.isfinite(fill_gaps(boxes)[gap]).all()


def test_face_squares_are_centred_moving_averages_of_1_6_sides():
    """A window that trails lags behind the face; one that reaches across a gap mixes two places."""
    boxes = np.array([[k * k, 0, k * k + 30, 40] for k in range(9)], float)
    boxes[6] = np.nan
    squares = face_squares(boxes)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    assert np.allclose(np.delete(squares[:, 2] - squares[:, 0], 6), 1.6 * 40)
    assert squares[2, [0, 2]].mean() == pytest.approx(middle[:5].mean())
    assert squares[5, [0, 2]].mean() == pytest.approx(middle[[3, 4, 5, 7]].mean())
    assert squares[2, [1, 3]].mean() == pytest.approx(20 - 0.05 * 40) and np.isnan(squares[6]).all()


def test_crop_is_sub_pixel_and_averages_what_it_shrinks():
    """Whole-pixel crops tremble when enlarged; skipping pixels makes shrunk faces sparkle."""
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    left, right = (crop(ramp, np.array([x, 30, x + 20, 50.0]), 60) for x in (30.0, 30.5))
    assert 0.5 < (right.astype(float) - left).mean() < 1.5             # half a pixel on a ramp of 2 a pixel
    whole = crop(ramp, np.array([29.5, 29.5, 49.5, 49.5]), 20)         # from pixel edge to pixel edge
    assert (whole == ramp[30:50, 30:50]).all()
    checks = np.uint8(np.indices((96, 96)).sum(0) % 2 * 255)[..., None].repeat(3, 2)
    assert np.abs(crop(checks, np.array([0, 0, 96.0, 96]), 24)[2:-2, 2:-2] - 127.5).max() <= 2
    assert (crop(ramp, np.array([-50, 20, -10, 60.0]), 16) == 0).all() # beyond the frame


def test_the_face_kept_is_the_one_on_the_person():
    """Two people side by side: the larger, nearer, better face of the other one must not be taken."""
    mask = np.zeros((60, 80), bool)
    mask[10:60, 5:30] = True
    hers, his, shirt = np.array([10, 12, 24, 28.0]), np.array([40, 5, 70, 40.0]), np.array([12, 35, 22, 45.0])
    frame, seen = np.zeros((60, 80, 3), np.uint8), lambda *boxes: lambda frame: np.array(boxes).reshape(-1, 4)
    assert (find_face(seen(his, hers), frame, mask, NOBODY) == hers).all()
    assert (find_face(seen(shirt, his, hers), frame, mask, hers + 1) == hers).all()    # her last face decides
    assert np.isnan(find_face(seen(his), frame, mask, NOBODY)).all()
    assert np.isnan(find_face(seen(), frame, mask, hers)).all()


# ---- Given masks ---------------------------------------------------------------------------------------------------

def test_painted_masks_survive_a_lossy_video(tmp_path):
    """White person, red face, through H.264 in 4:2:0; a threshold at 0 would drown the frame in noise."""
    body, face = figure(60, (160, 160), 20, 120, 40)
    noise = np.random.default_rng(0).integers(-40, 40, (160, 160, 1))
    write_video(tmp_path / "masks.mp4", [np.uint8(np.clip(paint_mask(body, face) + noise, 0, 255))] * 3, 8)
    for picture in Video(tmp_path / "masks.mp4"):
        found, box = read_mask(picture, 160, 160)
        assert (found ^ body).mean() < 0.002 and np.abs(box - tight_box(face)).max() <= 1
    assert np.isnan(read_mask(paint_mask(body), 160, 160)[1]).all()


def test_masks_and_frames_that_do_not_match_are_one_sentence():
    for masks in (MASKS[:-1], MASKS + MASKS[:1]):
        with pytest.raises(ValueError, match="one mask for each frame"):
            analyse(CLIP, REFERENCE, Finder(masks=masks, reference_mask=MASKS[0]), CueOptions(align="none"))
    with pytest.raises(ValueError, match="64x48 but its picture 64x96"):
        analyse(CLIP, REFERENCE, Finder(masks=MASKS, reference_mask=MASKS[0]))
    with pytest.raises(ValueError, match="--reference-mask"):
        analyse(CLIP, REFERENCE, Finder(masks=MASKS))


def test_a_reference_mask_of_the_original_size_is_cut_like_the_reference():
    """The user's mask fits the photograph, the canvas is a crop of it in multiples of 16."""
    big = cv2.resize(paint_mask(OWN_BODY), (W * 5, H * 5 + 40), interpolation=cv2.INTER_NEAREST)
    mask, _ = read_mask(big, H, W)
    assert mask.shape == (H, W) and abs(mask.mean() / OWN_BODY.mean() - 1) < 0.1


# ---- Tracking ------------------------------------------------------------------------------------------------------

def test_one_person_is_kept_whatever_the_order_and_size_of_the_others():
    """Catches following the largest frame by frame: the cue would jump between two dancers."""
    left = [figure(12 + k)[0] for k in range(6)]
    right = [figure(40 - k, tall=32 + (4 if k > 2 else -4))[0] for k in range(6)]
    script = [[(l, 1, 1), (r, 1, 1)][::(-1) ** k] for k, (l, r) in enumerate(zip(left, right))]
    for number, people in ((1, left), (2, right), (None, left)):       # left is larger at first
        track = list(Finder(Scripted(script), person=number)(CLIP[:6]))
        assert all((person.mask == mask).all() for (_, person, _), mask in zip(track, people))
    with pytest.raises(ValueError, match="--person 3: the first frame with anybody shows 2"):
        list(Finder(Scripted(script), person=3)(CLIP[:6]))


def test_a_person_who_vanishes_is_found_again_where_she_was():
    her, other = figure(10)[0], figure(40)[0]
    script = [[(her, 1, 1)], [], [], [(other, 1, 1), (her, 1, 1)]]
    *_, (_, person, _) = Finder(Scripted(script))(CLIP[:4])
    assert (person.mask == her).all()


def net_that_sees(pictures):
    """A PersonNet whose network answers with `pictures`, (h, w) in [0, 1], or with crops of them."""
    net = object.__new__(PersonNet)
    net.size, net.people, net.calls = (64, 64), [], []
    net.look = lambda frame: net.calls.append(frame.shape[:2]) or frame[..., 0].astype(np.float32) / 255
    return net, [np.uint8(picture * 255)[..., None].repeat(3, 2) for picture in pictures]


def touching(k):
    """Two people, sure (1.0) apart, joined by 0.7 of haze; from frame 2 on they touch with full certainty."""
    picture = np.zeros((64, 64), np.float32)
    picture[10:60, 30:36] = 0.7 if k < 2 else 1.0
    picture[8:60, 14:30] = picture[4:60, 36:52] = 1.0
    return picture


def test_people_who_touch_are_kept_apart():
    """The semantic net melts two people into one blob; the tracked one must not grow into her neighbour."""
    net, frames = net_that_sees([touching(k) for k in range(8)])
    for number, columns in ((1, slice(12, 33)), (2, slice(33, 54))):
        for _, person, _ in Finder(net, person=number)(frames):
            inside = person.mask[:, columns].sum() / person.mask.sum()
            assert inside > 0.99 and 780 < person.mask.sum() < 1100


@pytest.mark.parametrize("cores", [[(4, 24, 20, 40), (36, 60, 20, 28), (36, 60, 32, 40)],     # skirt
                                   [(4, 60, 30, 40), (30, 60, 16, 24)]])                       # a leg astride
def test_one_body_that_the_net_splits_stays_one_person(cores):
    """A dark skirt parts the sure pixels in chest and legs; read as two people, half a dancer is lost."""
    picture = np.zeros((64, 64), np.float32)
    picture[24:36, 16:40] = 0.7                                        # hips, not sure
    for y0, y1, x0, x1 in cores:
        picture[y0:y1, x0:x1] = 1
    body = picture > 0.5
    picture[10:14, 58:62] = 1                                          # a lamp, as sure as she is
    picture[4:60, 40:42] = 0.48                                        # doubt along her side
    net, frames = net_that_sees([picture] * 3)
    for _, person, _ in Finder(net)(frames):
        assert (person.mask == body).all() and len(net.people) == 1
        assert person.stability == pytest.approx((body.sum() + 16) / (body.sum() + 16 + 112))


def test_blobs_come_largest_first_and_without_specks():
    """Noise has hundreds of blobs; each would cost a mask of the frame's size."""
    mask = np.zeros((20, 30), bool)
    mask[1, 1], mask[5:10, 5:10], mask[12:18, 12:28], mask[15, 1] = True, True, True, True
    assert [blob.sum() for blob in finder.blobs(mask, 0.2)] == [96, 25]
    assert [blob.sum() for blob in finder.blobs(mask, 1)] == [96] and not finder.blobs(mask & False, 1)


def test_a_small_person_is_looked_at_twice():
    """8 % of the frame is 70 pixels in a 256 x 256 net: the second look is at her box, grown by 15 %."""
    picture = np.zeros((200, 300), np.float32)
    picture[80:120, 140:160] = 1
    net, frames = net_that_sees([picture] * 2)
    list(Finder(net)(frames))
    assert net.calls == [(200, 300), (50, 24)] * 2


@pytest.mark.parametrize("sides", [(24, 40), ("height", "width")])
def test_an_onnx_network_runs_at_its_own_size(tmp_path, sides):
    """Any person-mask net may be plugged in, also one for pictures of any size; this one answers with the mean of red,
    green and blue."""
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1)
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [1, channels, *sides])
            for name, channels in (("x", 3), ("y", 1)))
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "mean", [x], [y]),
                                   opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "mean.onnx")
    frame = paint_mask(figure(30, (96, 160), 16, 64, 40)[0])
    (person,) = PersonNet(tmp_path / "mean.onnx")(frame)
    assert (person.mask == (frame[..., 0] > 127)).mean() > 0.99


# ---- segment-anything ----------------------------------------------------------------------------------------------

HERS, HIS = np.array([10, 10, 29, 39.0]), np.array([40, 5, 59, 44.0])


class Prompted:
    """A predictor of two people who step right by 1 a frame: logits 4, 1.5 inside, -0.5 on a rim."""

    frame = -1

    def set_image(self, picture):
        self.shape, self.frame = picture.shape[:2], self.frame + 1

    def predict(self, box, multimask_output, return_logits):
        assert return_logits and not multimask_output
        seen, logits = np.zeros(self.shape, bool), np.full((1, *self.shape), -4.0)
        seen[finder.pixels(box)] = True
        for person in (HERS, HIS):
            for share, level in ((0.1, -0.5), (0, 1.5), (-0.2, 4)):
                logits[0][finder.pixels(finder.grown(person + [self.frame, 0] * 2, share))] = level
        return np.where(seen, logits, -4), np.array([0.9]), None


def test_sam_is_prompted_by_the_detector_every_kth_frame_and_by_the_last_mask_between():
    """Catches a detector run on every frame (slow) and a prompt that follows the other person's box."""
    detected = []

    def detector(frame):
        detected.append(frame)
        people = np.stack((HIS, HERS)) + [len(detected) * 3 - 3, 0] * 2
        return people[:1] if len(detected) == 2 else people           # once only he is found

    sam = Sam(every=3, predictor=Prompted(), detector=detector)
    for index, (_, person, _) in enumerate(Finder(sam, person=1)(CLIP[:8])):
        assert (tight_box(person.mask) == HERS + [index, 0] * 2).all() and person.predicted_iou == 0.9
        if index == 1:                                                 # logits above 1 to logits above -1
            assert person.stability == pytest.approx(20 * 30 / (21 * 34))
    assert len(detected) == 3                                          # frames 0, 3, 6


def tiny_sam(size=64, dim=16):
    from segment_anything import modeling
    image = modeling.ImageEncoderViT(size, embed_dim=dim, depth=1, num_heads=2, out_chans=dim)
    prompt = modeling.PromptEncoder(dim, (size // 16,) * 2, (size, size), 4)
    transformer = modeling.TwoWayTransformer(1, dim, 2, 16)
    mask = modeling.MaskDecoder(transformer_dim=dim, transformer=transformer)
    return modeling.Sam(image, prompt, mask).eval()


def test_sam_runs_through_segment_anything_itself():
    """A small model of the real classes: calls, shapes and the score from logits are theirs, no mock's."""
    from segment_anything import SamPredictor
    sam = Sam(predictor=SamPredictor(tiny_sam()), detector=lambda frame: np.array([[8, 4, 40, 44.0]]))
    person, = sam(CLIP[0])
    assert person.mask.shape == FRAME and person.mask.dtype == bool and 0 <= person.stability <= 1


def test_offline_without_weights_is_one_sentence_with_the_way_out(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError) as error:
        Sam()
    for part in ("sam_vit_b_01ec64.pth", str(tmp_path / "checkpoints"), finder.SAM_URL, "--masks DIR"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_full_size_sam_and_detector_load_published_layouts(tmp_path, monkeypatch):
    """Random weights under the published names: the loaders accept them and a text file is one sentence."""
    from segment_anything import sam_model_registry
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(sam_model_registry["vit_b"]().state_dict(), tmp_path / "checkpoints" / Path(finder.SAM_URL).name)
    detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(detector.state_dict(), tmp_path / "checkpoints" / Path(finder.DETECTOR_URL).name)
    sam = Sam()
    assert sam.detector(CLIP[0]).shape[1] == 4
    sam.detector = lambda frame: np.array([[8, 4, 40, 44.0]])
    assert sam(CLIP[0])[0].mask.shape == FRAME
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="does not hold segment-anything"):
        Sam(tmp_path / "text.pth")


# ---- Scores and rejection ------------------------------------------------------------------------------------------

GOOD = [[(body, 0.95, 0.97)] for body in BODIES]


@pytest.mark.parametrize("person, reason", [
    ([], "nobody"), ([(BODIES[5], 0.79, 0.97)], "predicted IoU"), ([(BODIES[5], 0.95, 0.89)], "stability"),
    ([(figure(2, y=0, tall=48, wide=60)[0], 0.95, 0.97)], "area jump"),
    ([(figure(20, y=20, tall=14, wide=10)[0], 0.95, 0.97)], "area jump"),
    ([(figure(5, y=20, tall=5, wide=50)[0], 0.95, 0.97)], "overlap")])
def test_a_bad_frame_is_rejected_for_its_reason_and_its_neighbours_are_not(person, reason):
    """One bad mask must not take the good frames beside it along: overlap is with the better neighbour."""
    script = GOOD[:5] + [person] + GOOD[6:]
    track = judged(script)
    assert np.flatnonzero(~track.accepted).tolist() == [5]
    assert faults(track, CueOptions())[reason][5]
    good = judged(GOOD[:5] + GOOD[6:])
    assert track.scale == good.scale and np.allclose(track.shift_xy, good.shift_xy)    # it moves nothing


def test_a_leap_across_the_frame_is_no_fault():
    """Overlap is measured with centres aligned: a dancer may jump, a mask may not change its shape."""
    assert judged([[(figure(2 + 25 * (k % 3))[0], 0.95, 0.97)] for k in range(9)]).accepted.all()


def test_thresholds_are_options():
    script = GOOD[:5] + [[(BODIES[5], 0.5, 0.5)]] + GOOD[6:]
    assert judged(script, CueOptions(min_iou=0.4, min_stability=0.4)).accepted.all()


def test_no_usable_frame_is_one_sentence_and_one_frame_alone_is_kept():
    """A single picture has no neighbours to lean on: slot 0 must not fail for a low score."""
    with pytest.raises(ValueError, match="none of the 3 driving frames is accepted; 3 fail for: stability"):
        judged([[(body, 0.95, 0.1)] for body in BODIES[:3]])
    assert judged([[(BODIES[0], 0.1, 0.1)]]).accepted.all()
    with pytest.raises(ValueError, match="no frames"):
        judged([])
    with pytest.raises(ValueError, match="1 driving frames is accepted; 1 fail for: nobody"):
        judged([[]])


def test_a_reference_without_a_person_fails_before_the_clip_is_read():
    """Minutes of segmentation must not precede a mistake that was there from the start."""
    unread = (pytest.fail("the clip was read") for _ in range(1))
    for options, mask in ((CueOptions(), OWN_BODY & False), (CueOptions(align="face"), OWN_BODY)):
        with pytest.raises(ValueError, match="nobody to align to|needs a face"):
            analyse(unread, REFERENCE, Finder(masks=MASKS, reference_mask=paint_mask(mask)), options)


def test_a_rejected_frame_has_a_black_pose_and_its_neighbours_mask():
    """The model must know where the person is even when it is not shown how she stands."""
    track = judged(GOOD[:5] + [[]] + GOOD[6:])
    rows = list(render(CLIP, track))
    assert (rows[5][0] == -1).all() and (rows[4][0] > -1).any()
    assert (rows[5][2] == rows[4][2]).all() or (rows[5][2] == rows[6][2]).all()


# ---- The two passes ------------------------------------------------------------------------------------------------

def test_slot_0_is_aligned_by_the_identity():
    """The reference's own cues sit where the reference is; anything else teaches an offset."""
    track = analyse(REFERENCE[None], REFERENCE, GIVEN.reference)
    assert track.scale == 1.0 and (track.shift_xy == 0).all()
    own = extract(REFERENCE[None], REFERENCE, GIVEN.reference, CueOptions(location="hard"))
    assert (own.body_mask[0, 0] == OWN_BODY).all() and (own.face_mask[0, 0] == OWN_FACE).all()
    assert own.pose.shape == own.face.shape == (1, 3, H, W)


def test_the_cues_have_their_ranges_shapes_and_places():
    """Frames are landscape, the canvas portrait: pose in its letterbox, masks on the reference person."""
    track, result = analyse(CLIP, REFERENCE, GIVEN), extract(CLIP, REFERENCE, GIVEN)
    assert result.pose.shape == result.face.shape == (12, 3, H, W) and result.body_mask.shape == (12, 1, H, W)
    for name, cue in vars(result).items():
        assert cue.dtype == np.float32 and cue.min() == (0 if "mask" in name else -1) and cue.max() <= 1
    assert (result.pose[:, 0] == result.pose[:, 2]).all()              # gray
    inside = result.pose[:, :, 24:72]                                  # 64x48 letterboxed in 64x96
    assert (result.pose[:, :, :15] < -0.99).all() and (inside > -0.5).any()
    shown = np.flatnonzero((result.face[0] > -1).any((0, 1)))          # centred, 0.9 of the shorter side
    assert shown[0] == (W - len(shown)) // 2 and len(shown) == round(0.9 * W) == np.ptp(shown) + 1
    assert result.face[0, 0, H // 2, W // 2] > 0.5
    moved = np.stack([tight_box(mask > 0.5) for mask in result.body_mask[:, 0]])
    assert abs(np.median(moved[:, 3] - moved[:, 1]) - 69) <= 2         # the reference's height
    for index, mask in enumerate(result.face_mask[:, 0]):
        expected = transform(track.face_boxes[index], track.scale, track.shift_xy)
        inside = [max(expected[0], 0), max(expected[1], 0), min(expected[2], W - 1), min(expected[3], H - 1)]
        assert not mask.any() or np.abs(tight_box(mask > 0) - inside).max() < 1
    assert set(np.unique(result.face_mask)) == {0, 1}                  # filled, never softened


@pytest.mark.parametrize("option, cue, claim", [
    (dict(face="none"), "face", lambda a, b: (a == -1).all()),                                 # S1
    (dict(face="none"), "face_mask", lambda a, b: (a == 0).all()),
    (dict(face="inplace"), "face", lambda a, b: 0 < (a > -1).mean() < 0.5 * (b > -1).mean()),  # S2
    (dict(pose="rgb"), "pose", lambda a, b: (a[:, 0] != a[:, 2]).any()),                       # S3
    (dict(pose="gray"), "pose", lambda a, b: np.diff(a).max() > 1.5 * np.diff(b).max()),       # S4
    (dict(pose="none"), "pose", lambda a, b: (a == -1).all()),
    (dict(location="none"), "body_mask", lambda a, b: (a == 0).all()),                         # S6
    (dict(location="none"), "face_mask", lambda a, b: (a == 0).all()),
    (dict(location="hard"), "body_mask", lambda a, b: set(np.unique(a)) == {0, 1} != set(np.unique(b)))])
def test_ablation_rows_change_their_cue_and_nothing_else(option, cue, claim):
    plain, other = extract(CLIP, REFERENCE, GIVEN), extract(CLIP, REFERENCE, GIVEN, CueOptions(**option))
    assert claim(getattr(other, cue), getattr(plain, cue))
    touched = {"pose": ["pose"], "face": ["face", "face_mask"], "location": ["body_mask", "face_mask"]}
    for name in set(vars(plain)) - set(touched[next(iter(option))]):
        assert (getattr(plain, name) == getattr(other, name)).all()


def test_misalign_moves_the_pose_and_nothing_else_and_drop_blanks_it():
    """A.2: the pseudo Pose Cue goes astray, the Location Cue stays true."""
    track = analyse(CLIP, REFERENCE, GIVEN)
    plain, astray = list(render(CLIP, track)), list(render(CLIP, track, misalign=(1.0, (6, -4))))
    for a, b in zip(plain, astray):
        assert np.allclose(a[0][:, 20:60, 10:50], b[0][:, 16:56, 16:56], atol=0.02)
        assert all((x == y).all() for x, y in zip(a[1:], b[1:]))
    drop = np.arange(12) % 5 == 1
    blanked = [(pose == -1).all() for pose, *_ in render(CLIP, track, drop=drop)]
    assert blanked == drop.tolist()
    assert 0 < track.presence().max() <= 1 and track.presence().shape == (H, W)


def test_a_track_renders_at_another_size_of_its_aspect():
    """Masks, faces and alignment scale along; twice the size, averaged down, is the same picture."""
    track = analyse(CLIP, REFERENCE, GIVEN)
    hard = CueOptions(location="hard", pose="gray")
    for small, large in zip(render(CLIP, track, None, hard), render(CLIP, track, (2 * H, 2 * W), hard)):
        for a, b in zip(small, large):
            assert np.abs(a - b.reshape(len(b), H, 2, W, 2).mean((2, 4))).mean() < 0.03
    with pytest.raises(ValueError, match="another aspect than the 64x96"):
        next(render(CLIP, track, (H, H)))


def test_another_clip_than_the_analysed_one_is_one_sentence():
    track = analyse(CLIP, REFERENCE, GIVEN)
    for wrong in (CLIP[:-1], np.concatenate((CLIP, CLIP))):
        with pytest.raises(ValueError, match="not the 12 frames"):
            list(render(wrong, track))


def test_the_first_pass_reads_no_other_options_than_it_says():
    """sample.py remembers tracks by these: one that is missing there would give stale masks."""
    plain = vars(analyse(CLIP, REFERENCE, GIVEN))
    for entry in fields(CueOptions):
        if entry.name not in cues.READ_BY_ANALYSE:
            value = (entry.metadata["choices"] or (None, 3 * entry.default))[1]
            found = vars(analyse(CLIP, REFERENCE, GIVEN, CueOptions(**{entry.name: value})))
            for name in plain:
                np.testing.assert_array_equal(plain[name], found[name], entry.name)


def test_a_track_survives_the_disk(tmp_path):
    """Saved beside a clip for later epochs; a half-written file must not be found there."""
    track = analyse(CLIP, REFERENCE, GIVEN)
    track.warnings.append("with ümlauts")
    track.save(tmp_path / "track.npz")
    loaded = Track.load(tmp_path / "track.npz")
    for name, value in vars(track).items():
        assert type(value) is type(getattr(loaded, name)), name
        np.testing.assert_array_equal(value, getattr(loaded, name), name)
    for a, b in zip(render(CLIP, track), render(CLIP, loaded)):
        assert all((x == y).all() for x, y in zip(a, b))
    assert [path.name for path in tmp_path.iterdir()] == ["track.npz"]


def test_memory_is_flat_in_the_length_of_the_clip():
    """10,000 frames must stream: only packed masks may grow, some hundred bytes a frame."""
    class Long:
        def __init__(self, frames): self.frames = frames
        def __iter__(self): return (CLIP[k % 12].copy() for k in range(self.frames))

    def peak(frames):
        masks = (MASKS[k % 12] for k in range(frames))
        tracemalloc.start()
        track = analyse(Long(frames), REFERENCE, Finder(masks=masks, reference_mask=paint_mask(OWN_BODY)))
        for _ in render(Long(frames), track):
            pass
        return tracemalloc.get_traced_memory()[1], tracemalloc.stop()
    peak(12)                                                           # imports and caches
    assert peak(300)[0] - peak(30)[0] < 270 * 8000                     # a frame with its cues is 100 kB more


# ---- Warnings in words ---------------------------------------------------------------------------------------------

def warnings_of(clip, masks, reference_mask=GIVEN.reference_mask, **options):
    find = Finder(masks=masks, reference_mask=reference_mask)
    return " | ".join(analyse(clip, REFERENCE, find, CueOptions(**options)).warnings)


def test_a_good_clip_draws_no_warning():
    body, face = figure(20, (H, W), 6, 84, 24)
    clip = np.stack([drawn(body, face, k) for k in range(4)])
    assert warnings_of(clip, [paint_mask(body, face)] * 4) == ""


def test_warnings_name_what_a_person_should_look_at():
    """Each is a complaint users of sibling projects bring after a night of GPU time."""
    assert "scale" in warnings_of(CLIP, MASKS) and "outside [0.5, 2]" in warnings_of(CLIP, MASKS)
    faceless = [paint_mask(body) for body in BODIES]
    assert "no face was found in the driving video" in warnings_of(CLIP, faceless)
    assert "no face was found in the reference" in warnings_of(CLIP, MASKS, paint_mask(OWN_BODY))
    cut = CLIP.copy()
    cut[7:, ..., 2] += 120
    assert "frame 7 looks like a cut" in warnings_of(cut, MASKS)
    half = [paint_mask(*figure(20, FRAME, 8, 12)) for _ in CLIP]       # the face is half of what is shown
    assert "half body against full body: the reference shows more" in warnings_of(CLIP, half)
    assert "half body" not in warnings_of(CLIP, half, align="face")    # which is what it recommends
    track = judged(GOOD[:2] + [[(body, 0.95, 0.1)] for body in BODIES[2:]])
    assert "10 of 12 driving frames are rejected" in track.summary()


# ---- Command line --------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    for folder, pictures in (("drive", CLIP), ("masks", MASKS)):
        (tmp_path / folder).mkdir()
        for index, picture in enumerate(pictures):
            write_image(tmp_path / folder / f"{index}.png", picture)
    write_image(tmp_path / "ref.png", REFERENCE)
    write_image(tmp_path / "ref_mask.png", paint_mask(OWN_BODY, OWN_FACE))
    return tmp_path


def run(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["cues.py", "preview", *arguments])
    cues.main()


EXACT = ("--masks", "masks", "--reference-mask", "ref_mask.png", "--area", str(H * W))


def test_preview_writes_a_sheet_and_a_film(files, monkeypatch, capsys):
    """The product a person judges: it opens, is 1600 wide, and the film has every frame."""
    run(monkeypatch, files, "ref.png", "drive", "-o", "sheet.png", "--rows", "3", *EXACT)
    sheet = read_image(files / "sheet.png")
    assert sheet.shape[1] == 1600 and sheet.std() > 20
    assert "12 of 12 frames accepted" in capsys.readouterr().out
    run(monkeypatch, files, "ref.png", "drive", "-o", "film.MP4", *EXACT)
    assert Video(files / "film.MP4").frames == 12 and Video(files / "film.MP4").width == 1600


def test_several_videos_make_a_folder_of_sheets_and_one_that_fails_is_named(files, monkeypatch, capsys):
    monkeypatch.setattr(finder, "from_arguments", lambda args: Finder(
        masks=[read_image(p) for p in sorted((files / "masks").iterdir(), key=lambda p: int(p.stem))],
        reference_mask=paint_mask(OWN_BODY, OWN_FACE)))
    shutil.copytree(files / "drive", files / "again")
    (files / "text.mp4").write_text("not a video")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, files, "ref.png", "drive", "text.mp4", "again", "-o", "sheets", "--area", str(H * W))
    said = capsys.readouterr()
    assert stop.value.code == 2 and "1 of 3 videos have no sheet: text.mp4" in said.err
    assert "drive: 12 of 12 frames accepted" in said.out and "text.mp4: no sheet: " in said.out
    assert sorted(p.name for p in (files / "sheets").iterdir()) == ["again.png", "drive.png"]


@pytest.mark.parametrize("arguments, sentence", [
    (("ref.png", "drive", "drive", "-o", "sheet.png"), "-o sheet.png must be a folder"),
    (("ref.png", "drive", "./drive", "-o", "sheet"), "two of the driving videos have one name"),
    (("none.png", "drive", *EXACT), "none.png does not exist"),
    (("ref.png", "text.mp4", *EXACT), "text.mp4 cannot be opened"),
    (("ref.png", "drive", *EXACT, "-o", "nowhere/sheet.png"), "the folder nowhere does not exist"),
    (("ref.png", "drive", *EXACT, "-o", "sheet.gif"), "sheet.gif must end in"),
    (("ref.png", "drive", *EXACT, "--person", "2"), "--masks has chosen already"),
    (("ref.png", "drive", "--segmenter", "a.tflite", "--sam", "b.pth"), "two segmenters"),
    (("ref.png",), "the following arguments are required: drive"),
    (("ref.png", "drive", "--person", "0"), "--person: 0: give a whole number, 1 or more"),
    (("ref.png", "drive", *EXACT, "--segmenter", "a.tflite"), "leave nothing to segment"),
    (("ref.png", "drive", *EXACT, "--rows", "0"), "--rows: 0: give a whole number, 1 or more"),
    (("ref.png", "drive", "--segmenter", "text.mp4"), "no person-mask network, .tflite or .onnx"),
    (("ref.png", "drive", "--segmenter", "none.tflite"), "--segmenter none.tflite: no such file"),
    (("ref.png", "drive", "--sam", "none.pth"), "--sam none.pth: no such file"),
    (("ref.png", "drive", *EXACT, "--face-model", "text.onnx"), "the face detector text.onnx"),
    (("ref.png", "drive", "--masks", "masks", "--sam", "text.mp4"), "does not hold segment-anything's ViT-B"),
    (("ref.png", "drive", *EXACT, "--cutoff", "0"), "--cutoff 0.0: give 0.001 to 100"),
    (("ref.png", "drive", *EXACT, "--cutoff", "nan"), "--cutoff nan: give 0.001 to 100"),
    (("ref.png", "drive", *EXACT, "--min-iou", "nan"), "--min-iou nan: give 0 to 1"),
    (("ref.png", "drive", *EXACT, "--fps", "0.0001"), "--fps: 0.0001: give a number, 0.001 to 1000"),
    (("ref.png", "drive", *EXACT, "--area", "99999999999"), "--area: 99999999999: give a whole number, 256 to 67108864"),
    (("ref.png", "drive", *EXACT, "-o", "ref_mask.png"), "ref_mask.png is also an input"),
    (("ref.png", "drive", *EXACT, "-o", "masks/0.png"), "masks/0.png is also an input"),
    (("ref.png", "drive", *EXACT, "-o", "drive/0.png"), "drive/0.png is also an input")])
def test_a_users_mistake_is_one_sentence_and_exit_code_2(files, monkeypatch, capsys, arguments, sentence):
    """Never a traceback, never a half-written file."""
    (files / "text.mp4").write_text("not a video")
    (files / "text.onnx").write_text("not a network")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, files, *arguments)
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert stop.value.code == 2 and sentence in error and error.startswith("cues.py")
    assert not list(files.glob("sheet*"))


def test_help_needs_no_torch():
    """--help answers at once: torch and the networks are imported where they are used."""
    code = ("import sys; sys.argv = ['cues.py', 'preview', '--help']; import cues\n"
            "try: cues.main()\n"
            "finally: assert not {'torch', 'insightface', 'segment_anything'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "row S4" in done.stdout, done.stderr


def test_options_reject_unknown_words():
    with pytest.raises(ValueError, match="pose='grey' is not one of lowpass, gray, rgb, none"):
        CueOptions(pose="grey")


# ---- Real pictures -------------------------------------------------------------------------------------------------

def test_detail_of_a_real_frame_falls_by_the_filters_own_curve(assets):
    """Fig. 7 as a number: every DCT coefficient is multiplied by the Gaussian of its radius."""
    gray = cv2.cvtColor(read_image(assets / "image/moore_anyone-3.png"), cv2.COLOR_RGB2GRAY)
    gray = cv2.resize(gray, (96, 144)).astype(float)
    before, after = dct(gray), dct(low_pass(gray, 0.12))
    radius2 = (np.arange(144) / 144)[:, None] ** 2 + (np.arange(96) / 96) ** 2
    assert np.allclose(after, before * np.exp(-radius2 / (2 * 0.12 ** 2)), atol=1e-9)
    above = radius2 > 0.12 ** 2
    assert 0 < np.square(after[above]).sum() < 0.15 * np.square(before[above]).sum()


def test_a_model_pack_is_fetched_once_whole_whatever_other_ranks_do(tmp_path, monkeypatch):
    """insightface writes where it looks: a rank that comes later would find half of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, fetched = tmp_path / ".insightface/models/pack", []

    def fetch(sub, name, root):
        made = Path(root) / sub / name
        made.mkdir(parents=True)
        assert not folder.exists()
        (made / "a.onnx").write_text(str(len(fetched)))
        fetched.append(root)
        if len(fetched) == 1:
            assert finder.fetched_pack(name) == folder                 # another rank, meanwhile
        return str(made)

    monkeypatch.setattr("insightface.utils.storage.ensure_available", fetch)
    assert finder.fetched_pack("pack") == folder and finder.fetched_pack("pack") == folder
    assert (folder / "a.onnx").read_text() == "1" and len(fetched) == 2
    assert [p.name for p in folder.parents[1].iterdir()] == ["models"], "nothing is left beside it"


@pytest.mark.parametrize("name", ["face", "yunet_n_640_640.onnx"])
def test_a_face_that_fills_the_frame_is_found_unless_the_last_one_was_small(assets, name):
    """Detectors miss faces larger than their anchors; a margin brings them back, but also faces in hair."""
    photo, sizes = read_image(assets / "image/dynamictrl_person1.jpg"), []
    find = load_face_finder(assets / "weights" / name)
    (box,) = find(photo)
    close = photo[finder.pixels(finder.grown(box, 0.05))]
    everywhere = np.ones(close.shape[:2], bool)

    def blind(frame):                                                  # to what is not surrounded
        sizes.append(frame.shape[:2])
        return find(frame) if len(sizes) % 2 == 0 else np.empty((0, 4))

    near = find_face(blind, close, everywhere, NOBODY)
    assert finder.box_iou(near, np.array([0, 0, *close.shape[1::-1]])) > 0.6 and sizes[1] > sizes[0]
    assert np.isnan(find_face(blind, close, everywhere, np.array([5, 5, 25, 30.0]))).all() and len(sizes) == 3
    assert find(np.zeros((300, 200, 3), np.uint8)).shape == (0, 4)


def real_track(assets, clip, image, fps, start, stop, **finder):
    source = list(islice(Video(assets / "video" / clip, fps), start, stop))
    reference = cv2.resize(read_image(assets / "image" / image), (384, 688), interpolation=cv2.INTER_AREA)
    weights = assets / "weights"
    segmenter = PersonNet(weights / "selfie_segmentation.tflite")
    return analyse(source, reference, Finder(segmenter, load_face_finder(weights / "face"), **finder)), source


@pytest.mark.parametrize("person", [1, 2])
def test_of_two_people_side_by_side_one_is_kept(assets, person):
    """steadydancer_douyin001: they stand shoulder to shoulder and touch; 5 fps from 4 s on."""
    track, _ = real_track(assets, "steadydancer_douyin001.mp4", "mimicmotion_web_fb_0.png", 5, 20, 30,
                          person=person)
    middle = (track.body_boxes[:, 0] + track.body_boxes[:, 2]) / 2
    faces = (track.face_boxes[:, 0] + track.face_boxes[:, 2]) / 2
    assert track.accepted.mean() > 0.7 and np.ptp(middle) < 40 and np.abs(faces - middle).max() < 40
    assert (middle < 190).all() if person == 1 else (middle > 220).all()


def test_the_face_cue_is_black_while_the_back_is_turned(assets):
    """scail_001 turns once: around frame 18 only hair is seen, before and after a face."""
    track, source = real_track(assets, "scail_001.mp4", "mimicmotion_web_hb_0.png", None, 14, 25)
    black = np.array([(face == -1).all() for _, face, _, _ in render(source, track)])
    assert black[4:6].any() and not black[:2].any() and not black[9:].any() and track.accepted.all()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--pose-cue", "rgb", "--cutoff", "0.3"], "--cutoff is read by --pose-cue lowpass only"),
        (["--pose-cue", "gray", "--filter", "ideal"], "--filter is read by --pose-cue lowpass only"),
        (["--location-cue", "none", "--soften-by", "max"], "--soften-by is read by --location-cue soft only"),
    ],
)
def test_a_flag_that_nothing_reads_is_a_mistake(words, said):
    parser = argparse.ArgumentParser()
    cues.add_arguments(parser)
    with pytest.raises(ValueError, match=said):
        cues.options(parser.parse_args(words))
    assert cues.options(parser.parse_args(["--cutoff", "0.3"])).cutoff == 0.3


def test_gray_is_rec_601():
    """Red, green and blue tell their weights apart; BGR for RGB would darken skin and brighten jeans."""
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[..., channel] = 200
        cue = pose_cue(frame, np.ones((16, 16), bool), CueOptions(pose="gray"))
        assert cue.mean() == pytest.approx(200 * weight / 127.5 - 1, abs=0.005)


@pytest.mark.parametrize("option", [dict(statistic="max"), dict(cell=8)])
def test_softening_is_by_the_cells_and_the_statistic_that_are_asked_for(option):
    hard = extract(CLIP, REFERENCE, GIVEN, CueOptions(location="hard")).body_mask
    soft = extract(CLIP, REFERENCE, GIVEN, CueOptions(**option)).body_mask
    np.testing.assert_array_equal(soft, grid_soften(hard, option.get("cell", 16), option.get("statistic", "mean")))


@pytest.mark.parametrize("kind", ["gaussian", "butterworth", "ideal"])
def test_the_pose_cue_is_filtered_as_asked_and_stays_in_range_though_a_filter_rings(kind):
    frame = np.full((32, 32, 3), 255, np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[8:24, 10:22] = True
    cue = pose_cue(frame, mask, CueOptions(kind=kind, cutoff=0.4))
    smooth = cues.low_pass(np.float32(mask) * 2, 0.4, kind) - 1
    assert (smooth.max() > 1.01) == (kind != "gaussian")
    np.testing.assert_allclose(cue[0], smooth.clip(-1, 1), atol=1e-6)


def test_a_misaligned_pose_scales_with_the_canvas():
    """As for the plain cues: twice the size, averaged down, is the same picture."""
    track, gray = analyse(CLIP, REFERENCE, GIVEN), CueOptions(pose="gray")
    small, large = (list(render(CLIP, track, size, gray, misalign=(1.2, (-9, 5)))) for size in (None, (2 * H, 2 * W)))
    for a, b in zip(small, large):
        assert np.abs(a[0] - b[0].reshape(3, H, 2, W, 2).mean((2, 4))).mean() < 0.03


def test_misalign_scales_the_pose_too():
    track, gray = analyse(CLIP, REFERENCE, GIVEN), CueOptions(pose="gray")
    boxes = [tight_box(next(iter(render(CLIP, track, None, gray, misalign=m)))[0][0] > -0.9) for m in (None, (0.5, (10, 20)))]
    np.testing.assert_allclose(boxes[1], 0.5 * boxes[0] + [10, 20, 10, 20], atol=1)


@pytest.mark.parametrize("size", [None, (2 * H, 2 * W)])
def test_an_aligned_pose_lies_where_the_location_cue_says(size):
    """The person of the Pose Cue fills the moved mask; the other cues stay as they are."""
    track, hard = analyse(CLIP, REFERENCE, GIVEN), dict(pose="gray", location="hard")
    assert abs(np.log(track.scale)) > 0.1                                                   # else this shows nothing
    aligned = list(render(CLIP, track, size, CueOptions(pose_place="aligned", **hard)))
    for row, plain in zip(aligned, render(CLIP, track, size, CueOptions(**hard)), strict=True):
        person, place = row[0][0] > -0.9, row[2][0] > 0.5
        assert (person & place).sum() > 0.85 * (person | place).sum() > 1.1 * ((plain[0][0] > -0.9) & place).sum()
        assert all((a == b).all() for a, b in zip(row[1:], plain[1:]))


def test_area_is_compared_with_the_frames_around_not_with_the_whole_clip():
    """A person who walks up to the camera grows tenfold, slowly: no fault."""
    sizes = np.linspace(6, 44, 60).round().astype(int)
    script = [[(figure(20, y=2, tall=tall, wide=max(tall // 3, 4))[0], 0.95, 0.97)] for tall in sizes]
    clip = np.repeat(CLIP[:1], len(script), 0)
    track = analyse(clip, REFERENCE, Finder(Scripted(script)))
    assert np.ptp([track.mask(k).sum() for k in (0, 59)]) > 9 * track.mask(0).sum()
    assert (track.scores[2:, 2] < 2).all() and track.accepted[2:].all()
