"""align.py against Eq. 9-12 written out in loops, on degenerate masks, and the misalignment of A.2.

    pytest tests/test_align.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align import (
    align, centre, fit_similarity, height, misalignment, resized, tight_box, transform, warp, without_strays
)

H, W = 40, 64                                                          # not square: no swapped axis can pass


def block(x0, y0, x1, y1, shape=(H, W)):
    """A filled rectangle with the tight box (x0, y0, x1, y1), ends included."""
    mask = np.zeros(shape, bool)
    mask[y0:y1 + 1, x0:x1 + 1] = True
    return mask


sides = st.integers(3, 8)
boxes_inside = st.tuples(st.integers(0, W - 9), st.integers(0, H - 9), sides, sides).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


# ---- Eq. 9-12, loop by loop ----------------------------------------------------------------------------------------

def eq_9_and_10(reference, masks):
    """As on the page, in float64, one pixel at a time."""
    def box(mask):
        xs = [x for y in range(H) for x in range(W) if mask[y, x]]
        ys = [y for y in range(H) for x in range(W) if mask[y, x]]
        return min(xs), max(xs), min(ys), max(ys)

    x_min, x_max, y_min, y_max = box(reference)
    c_ref, h_ref = ((x_min + x_max) / 2, (y_min + y_max) / 2), y_max - y_min
    ratios, centres = [], []
    for mask in masks:
        x_min, x_max, y_min, y_max = box(mask)
        ratios.append(h_ref / (y_max - y_min))                         # s_t
        centres.append(((x_min + x_max) / 2, (y_min + y_max) / 2))     # c_t
    s = sorted(ratios)
    s = (s[(len(s) - 1) // 2] + s[len(s) // 2]) / 2                    # median
    c_bar = [sum(c[axis] for c in centres) / len(centres) for axis in (0, 1)]
    return s, [c_ref[axis] - s * c_bar[axis] for axis in (0, 1)]


@settings(max_examples=30, deadline=None)
@given(boxes_inside, st.lists(boxes_inside, min_size=1, max_size=4))
def test_eq_9_and_10_equal_the_page(reference, boxes):
    """Catches a swapped axis, a height of y_max - y_min + 1, a mean in place of the median, t = c - c_bar."""
    masks = np.stack([block(*box) for box in boxes])
    scale, shift_xy = fit_similarity(block(*reference), masks)
    s, t = eq_9_and_10(block(*reference), masks)
    assert scale == pytest.approx(s, abs=1e-12) and shift_xy == pytest.approx(t, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 3), st.floats(-30, 30), st.floats(-30, 30), st.integers(0, 2 ** 32 - 1))
def test_eq_12_equals_the_page(scale, t_x, t_y, seed):
    """Catches a warp by T instead of its inverse, wrap-around and repeated edges, a swap of x and y."""
    masks = np.random.default_rng(seed).random((2, H, W)) < 0.5
    expected = np.zeros_like(masks)
    for frame in range(2):
        for y in range(H):
            for x in range(W):
                u, v = int(np.floor((x - t_x) / scale + 0.5)), int(np.floor((y - t_y) / scale + 0.5))
                expected[frame, y, x] = masks[frame, v, u] if 0 <= u < W and 0 <= v < H else False
    assert (warp(masks, scale, (t_x, t_y)) == expected).all()


def test_warp_keeps_the_dtype_and_the_identity_keeps_every_pixel():
    """bool in, bool out and float in, float out; the slot of the reference must come back bit for bit."""
    soft = np.random.default_rng(0).random((3, H, W)).astype(np.float32)
    assert (warp(soft, 1.0, (0, 0)) == soft).all() and warp(soft, 0.7, (3, 1)).dtype == np.float32
    assert warp(soft > 0.5, 0.7, (3, 1)).dtype == bool
    assert (warp(soft, 1.0, (5, -2))[:, :-2, 5:] == soft[:, 2:, :-5]).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 2), st.floats(-8, 8), st.floats(-8, 8))
def test_a_known_similarity_is_undone_to_within_a_pixel(scale, t_x, t_y):
    """The claim of A.2 itself: after alignment heights and centres are the reference's, where no box is cut.

    Boxes agree exactly. A nearest-pixel mask adds rounding and, enlarged, the growth of half a pixel a side.
    """
    shape = (200, 160)
    masks = np.stack([block(60 + k, 70 - k, 90 + 2 * k, 120 + k, shape) for k in range(5)])
    reference = warp(masks[2], scale, (80 * (1 - scale) + t_x, 100 * (1 - scale) + t_y))
    found = fit_similarity(reference, masks)
    target, boxes = tight_box(reference), transform(np.stack([tight_box(mask) for mask in masks]), *found)
    assert abs(np.median(height(boxes)) - height(target)) < 1e-9
    assert np.abs(centre(boxes).mean(0) - centre(target)).max() < 1e-9
    moved = np.stack([tight_box(mask) for mask in warp(masks, *found)])
    assert abs(np.median(height(moved)) - height(target)) <= 1 + max(0, found[0] - 1)
    assert np.abs(centre(moved).mean(0) - centre(target)).max() <= 1


# ---- What must not move the fit ------------------------------------------------------------------------------------

FRAMES = np.stack([block(20 + k, 10, 30 + k, 30) for k in range(5)])
REFERENCE = block(8, 4, 28, 34)


def test_a_rejected_or_empty_frame_moves_nothing():
    """Catches a mean over all T frames: one failed segmentation would drag every mask of the clip aside."""
    expected = fit_similarity(REFERENCE, FRAMES)
    bad = np.concatenate((FRAMES, [block(0, 0, 3, 3)], [np.zeros((H, W), bool)]))
    for accepted in ([True] * 5 + [False, True], [True] * 5 + [False, False]):
        scale, shift_xy = fit_similarity(REFERENCE, bad, np.array(accepted))
        assert (scale, *shift_xy) == (expected[0], *expected[1])


def test_a_stray_blob_moves_nothing_and_a_limb_does():
    """One wrong pixel in a corner stretches a naive box over the whole frame; 1 % of the body is a hand."""
    stray, hand = FRAMES.copy(), FRAMES.copy()
    stray[2, 0, 0] = stray[2, -1, -1] = True                           # 1 pixel, the body has 231
    hand[2, 0:2, 0:2] = True                                           # 4 pixels
    assert np.allclose(fit_similarity(REFERENCE, stray)[1], fit_similarity(REFERENCE, FRAMES)[1])
    assert not np.allclose(fit_similarity(REFERENCE, hand)[1], fit_similarity(REFERENCE, FRAMES)[1])
    assert (without_strays(stray[2]) == FRAMES[2]).all() and not without_strays(np.zeros((H, W), bool)).any()


def test_an_accepted_outlier_leaves_the_scale():
    """Eq. 9 takes the median so that a crouch or a jump does not resize the person; catches a mean."""
    odd = np.concatenate((FRAMES, [block(0, 0, 60, 2)], [block(0, 0, 60, 39)]))
    assert fit_similarity(REFERENCE, odd)[0] == fit_similarity(REFERENCE, FRAMES)[0]


# ---- Degenerate input, decided -------------------------------------------------------------------------------------

def test_nobody_to_align_is_one_sentence():
    empty = np.zeros((H, W), bool)
    with pytest.raises(ValueError, match="reference shows nobody"):
        fit_similarity(empty, FRAMES)
    with pytest.raises(ValueError, match="none of the 5 driving frames"):
        fit_similarity(REFERENCE, FRAMES, np.zeros(5, bool))
    with pytest.raises(ValueError, match="none of the 2 driving frames"):
        fit_similarity(REFERENCE, np.stack([empty, empty]))
    with pytest.raises(ValueError, match="none of the 0 driving frames"):
        fit_similarity(REFERENCE, np.zeros((0, H, W), bool))


def test_a_mask_one_pixel_high_counts_as_one():
    """h = y_max - y_min = 0 would make the scale infinite."""
    line = block(10, 20, 30, 20)
    assert fit_similarity(REFERENCE, line[None])[0] == height(tight_box(REFERENCE))
    assert fit_similarity(line, line[None])[0] == 1 and np.isnan(tight_box(np.zeros((H, W), bool))).all()


# ---- Modes, boxes, other canvases ----------------------------------------------------------------------------------

def test_modes_use_bodies_faces_or_nothing():
    """Face mode must not look at bodies: it exists because a half body has no usable height."""
    body, bodies = np.array([0, 0, 20, 30.0]), np.array([[0, 0, 20, 10.0]] * 3)
    face, faces = np.array([5, 0, 9, 6.0]), np.array([[0, 0, 4, 4.0], [np.nan] * 4, [2, 0, 6, 4.0]])
    assert align("height", body, bodies, face, faces)[0] == 3
    scale, shift_xy = align("face", body, bodies, face, faces, np.zeros(3, bool))
    assert scale == 1.5 and np.allclose(shift_xy, [7 - 1.5 * 3, 3 - 1.5 * 2])
    scale, shift_xy = align("none", body * np.nan, bodies, face, faces)
    assert scale == 1 and (shift_xy == 0).all()
    with pytest.raises(ValueError, match="needs a face"):
        align("face", body, bodies, face, faces * np.nan)


def test_boxes_go_where_their_pixels_go():
    """The face mask is warped as a box (Eq. 11), the body mask as pixels (Eq. 12): both must agree."""
    mask, similarity = block(20, 10, 40, 30), (0.8, np.array([3.2, -1.4]))
    assert np.abs(transform(tight_box(mask), *similarity) - tight_box(warp(mask, *similarity))).max() <= 0.5


@pytest.mark.parametrize("ratio", [2, 3])
def test_a_similarity_resized_equals_the_similarity_of_resized_masks(ratio):
    """Integer centres shift by half a pixel when a canvas grows; forgetting it moves masks by (s - 1) / 2."""
    mask, scale, shift_xy = block(20, 10, 40, 30), 1.5, np.array([-7.0, -9.0])
    large = mask.repeat(ratio, 0).repeat(ratio, 1)
    box = tight_box(warp(large, *resized(scale, shift_xy, ratio)))
    expected = (transform(tight_box(mask) + [-.5, -.5, .5, .5], scale, shift_xy) + 0.5) * ratio - 0.5
    assert np.abs(box - expected - [.5, .5, -.5, -.5]).max() <= 0.5


# ---- Misalignment (A.2) --------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), boxes_inside)
def test_misalignment_keeps_70_percent_inside_and_its_ranges(seed, box):
    """A person pushed out of the frame would teach that the Pose Cue may be empty."""
    mask = block(*box)
    scale, shift_xy = misalignment(mask, np.random.default_rng(seed), probability=1)
    assert 0.7 <= scale <= 1.4
    moved = transform(np.argwhere(mask)[:, ::-1].astype(float), scale, shift_xy)
    inside = ((moved > -0.5) & (moved < np.array([W, H]) - 0.5)).all(1)
    assert inside.mean() >= 0.7
    drift = transform(centre(tight_box(mask)), scale, shift_xy) - centre(tight_box(mask))
    assert (np.abs(drift) <= 0.15 * np.array([W, H]) + 1e-9).all()     # only the shift moves the centroid


def test_misalignment_draws_the_same_number_in_every_case_and_leaves_one_clip_in_five():
    """Later draws of a sample (cut-off, blank runs) must not depend on whether this clip was misaligned."""
    moved = 0
    for seed in range(400):
        generator, plain = np.random.default_rng(seed), np.random.default_rng(seed)
        scale, _ = misalignment(REFERENCE, generator)
        plain.random(4)
        assert generator.random() == plain.random()
        moved += scale != 1
    assert 0.74 < moved / 400 < 0.86                                   # 3 sigma about 0.8
    assert misalignment(np.zeros((H, W)), np.random.default_rng(0), probability=1)[0] == 1


def test_misalignment_scales_log_uniformly():
    """Uniform in the scale would enlarge more often; half the log-uniform draws lie below sqrt(0.98)."""
    tiny = block(30, 18, 34, 22)
    scales = [misalignment(tiny, np.random.default_rng(seed), probability=1)[0] for seed in range(400)]
    assert abs(np.mean(np.array(scales) < np.sqrt(0.7 * 1.4)) - 0.5) < 0.075


def test_half_the_strength_is_half_the_shift_and_the_root_of_the_scale():
    """The drawn world trains with less than the 5B model's ranges."""
    tiny, middle = block(30, 18, 34, 22), centre(tight_box(block(30, 18, 34, 22)))
    for seed in range(20):
        whole, half, none = (
            misalignment(tiny, np.random.default_rng(seed), strength, probability=1) for strength in (1, 0.5, 0)
        )
        assert half[0] == pytest.approx(whole[0] ** 0.5)
        drift, less = (transform(middle, *found) - middle for found in (whole, half))
        assert less == pytest.approx(drift / 2, abs=1e-9) and none[0] == 1 and none[1] == pytest.approx([0, 0])
