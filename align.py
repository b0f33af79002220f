"""Place the driving person where the reference person stands: Eq. 9-12 (paper A.2), on mask boxes, numpy.

One similarity for the whole clip, T(x) = scale * x + shift_xy (Eq. 11), carries the driving masks onto the
reference person. Only the Location Cue is moved by it (the Pose Cue too with --pose-place aligned). The other half
of A.2 is here too: in stage 2 pseudo Pose Cues are misaligned, which teaches the model to trust the Location Cue.

Coordinates are pixel centres, (x, y), as in Eq. 12: pixel i sits at i, and a mask's box holds its outermost
indices. The paper's s and t are `scale` and `shift_xy`, its B is a box (x0, y0, x1, y1), its h(B) is y1 - y0.

    python cues.py preview ref.png drive.mp4 -o sheet.png        # prints and draws scale and shift
"""

import cv2
import numpy as np

ALIGN_MODES = ("height", "face", "none")
STRAY_SHARE = 0.01                     # blobs below this share of the largest one are dirt, not limbs
PLAUSIBLE_SCALE = (0.5, 2.0)


# ---- Boxes ----

def without_strays(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool without blobs under 1 % of the largest: one stray pixel would stretch the box."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 3:                                                  # the background and at most one blob
        return mask
    area = stats[:, cv2.CC_STAT_AREA]
    return mask & (area >= STRAY_SHARE * area[1:].max())[labels]


def tight_box(mask: np.ndarray) -> np.ndarray:
    """B: (H, W) bool -> float (x0, y0, x1, y1), indices of the outermost pixels; NaN for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]] if len(rows) else [np.nan] * 4, float)


def centre(box: np.ndarray) -> np.ndarray:
    """c(B): (..., 4) -> (..., 2)."""
    return (box[..., :2] + box[..., 2:]) / 2


def height(box: np.ndarray) -> np.ndarray:
    """h(B) = y1 - y0. Paper silent: a mask one pixel high would divide by zero and counts as 1."""
    return np.maximum(box[..., 3] - box[..., 1], 1.0)


# ---- Eq. 9-12 ----

def fit_boxes(reference_box, boxes, accepted=None) -> tuple[float, np.ndarray]:
    """Eq. (9), (10) from boxes alone, (4,) and (T, 4), so that a clip of any length needs no stack of masks.

    Paper silent: frames without a box (NaN) or not `accepted`, (T,) bool, enter neither median nor mean.
    ValueError where the reference has no box or no frame is left.
    """
    if not np.isfinite(reference_box).all():
        raise ValueError("the reference shows nobody to align to: use another one, or --align none")
    usable = np.isfinite(boxes).all(-1) & (True if accepted is None else np.asarray(accepted, bool))
    if not usable.any():
        raise ValueError(f"none of the {len(boxes)} driving frames shows anybody to align: use --align none")
    scale = np.median(height(reference_box) / height(boxes[usable]))                       # Eq. (9)
    shift_xy = centre(reference_box) - scale * centre(boxes[usable]).mean(0)               # Eq. (10)
    return float(scale), shift_xy


def fit_similarity(reference_mask, masks, accepted=None) -> tuple[float, np.ndarray]:
    """The same from bool masks (H, W), (T, H, W), for clips that fit in memory."""
    reference_box, *boxes = (tight_box(without_strays(mask)) for mask in (reference_mask, *masks))
    return fit_boxes(reference_box, np.array(boxes).reshape(-1, 4), accepted)


def transform(xy: np.ndarray, scale: float, shift_xy) -> np.ndarray:
    """Eq. (11): T(x) = scale * x + shift_xy, on points (..., 2) or boxes (..., 4), which are two points."""
    return scale * xy + np.tile(shift_xy, xy.shape[-1] // 2)


def warp(masks: np.ndarray, scale: float, shift_xy) -> np.ndarray:
    """Eq. (12): warped(x) = mask(T^-1(x)), (..., H, W) of any dtype; nearest pixel, 0 beyond the frame.

    T scales both axes alike and does not turn, so rows and columns are looked up apart.
    """
    for axis, shift in ((-1, shift_xy[0]), (-2, shift_xy[1])):
        size = masks.shape[axis]
        source = np.floor((np.arange(size) - shift) / scale + 0.5).astype(int)             # T^-1(x), rounded
        inside = ((source >= 0) & (source < size)).reshape((-1, 1) if axis == -2 else -1)
        masks = np.where(inside, masks.take(source.clip(0, size - 1), axis), masks.dtype.type(0))
    return masks


def resized(scale: float, shift_xy, ratio: float) -> tuple[float, np.ndarray]:
    """The same similarity on a canvas `ratio` times as large: x becomes ratio * (x + 1/2) - 1/2."""
    return scale, ratio * np.asarray(shift_xy) + (scale - 1) * (1 - ratio) / 2


def align(mode, reference_body, bodies, reference_face, faces, accepted=None) -> tuple[float, np.ndarray]:
    """The paper's mode is "height": Eq. (9), (10) on body boxes; "none" is the identity.

    Differs: "face" takes face boxes instead; body heights mean nothing when one of the two pictures ends at the waist.
    """
    if mode == "height":
        return fit_boxes(reference_body, bodies, accepted)
    if mode == "face":
        if not np.isfinite(reference_face).all() or not np.isfinite(faces).any():
            raise ValueError("--align face needs a face in the reference and in the clip; use --align height")
        return fit_boxes(reference_face, faces)
    return 1.0, np.zeros(2)


# ---- Misalignment augmentation (A.2, stage 2 only) ----

def misalignment(presence: np.ndarray, generator: np.random.Generator, strength: float = 1.0, probability: float = 0.8,
                 scales=(0.7, 1.4), shift: float = 0.15, keep: float = 0.7) -> tuple[float, np.ndarray]:
    """A random similarity for one clip's segmented person -> scale, shift_xy; see `render(misalign=...)`.

    presence: (H, W), the clip's mask or the mean of its masks. Paper silent: in `probability` of the clips,
    scale log-uniform in `scales` about the silhouette's centroid, shift up to `shift` of each side; both (the
    scale in logarithms) times `strength`, then halved until `keep` of the silhouette stays inside. Always draws
    four numbers, used or not, so that whatever is drawn later stays the same.
    """
    chance, log_scale, *offset = generator.uniform([0, np.log(scales[0]), -shift, -shift],
                                                   [1, np.log(scales[1]), shift, shift])
    presence, size = np.asarray(presence, float), np.array(presence.shape[::-1])           # size: (W, H)
    if chance >= probability or not presence.any():
        return 1.0, np.zeros(2)
    xy = np.stack(np.meshgrid(*map(np.arange, size)), -1)                                  # (H, W, 2)
    centroid = (xy * presence[..., None]).sum((0, 1)) / presence.sum()
    log_scale, offset = strength * log_scale, strength * np.array(offset) * size
    while True:
        scale, shift_xy = np.exp(log_scale), centroid + offset - np.exp(log_scale) * centroid
        moved = transform(xy, scale, shift_xy)
        inside = ((moved > -0.5) & (moved < size - 0.5)).all(-1)
        if presence[inside].sum() >= keep * presence.sum():
            return float(scale), shift_xy
        log_scale, offset = log_scale / 2, offset / 2
