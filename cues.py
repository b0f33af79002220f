"""The Driving Cue Triplet (paper 3.1 and A.2): raw driving video -> Pose Cue, Face Cue, Location Cue.

    Pose Cue      the person on black, gray, low-passed in the frequency domain (Fig. 7): motion, no texture
    Face Cue      the face, tracked, enlarged and centred on black, in colour: expression and head pose
    Location Cue  the masks of body and face, aligned to the reference (Eq. 9-12), the body's softened: where

Two passes over the driving video, both in constant memory. `analyse` finds one person and her face in every
native frame, scores the masks and fits the alignment: a small `Track`. `render` streams the cues from both.
finder.py does the finding. Boxes are (x0, y0, x1, y1) in pixel centres, as in align.py.

    python cues.py preview ref.png drive.mp4 -o sheet.png        # judge the cues before a GPU is touched
"""

import argparse
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np

import finder
from align import ALIGN_MODES, PLAUSIBLE_SCALE, align, centre, height, resized, tight_box, transform, warp
from align import without_strays
from finder import Finder, pixels
from video import Parser, Video, atomic, check_output, cover, letterbox, letterbox_box, output_size
from video import area, natural, rate, read_image, resize, write_image, write_video

FILTERS = {"gaussian": lambda r2: np.exp(-r2 / 2), "butterworth": lambda r2: 1 / (1 + r2 ** 4),
           "ideal": lambda r2: (r2 <= 1).astype(float)}            # gain over (radius / cutoff) ** 2


def option(flag: str, default, text: str, *others):
    choices = (default, *others) if others else None
    return field(default=default, metadata={"flag": flag, "help": text, "choices": choices})


@dataclass(frozen=True)
class CueOptions:
    """What the cues look like, and when a frame is rejected; S1-S4, S6 and S7 are rows of the paper's Table 3."""
    pose: str = option("--pose-cue", "lowpass", "gray = row S4, rgb = row S3", "gray", "rgb", "none")
    face: str = option("--face-cue", "centered", "inplace = row S2, none = row S1", "inplace", "none")
    location: str = option("--location-cue", "soft", "hard = row S7, none = row S6", "hard", "none")
    kind: str = option("--filter", "gaussian", "shape of the low-pass", "butterworth", "ideal")
    cutoff: float = option("--cutoff", 0.12, "of the low-pass, as a fraction of the Nyquist frequency")
    cell: int = option("--soften-cell", 16, "side of a softening cell in pixels; 16 is one token")
    statistic: str = option("--soften-by", "mean", "what a softening cell takes of its pixels", "max")
    align: str = option("--align", "height", "match body heights (Eq. 9-12), face heights, or nothing",
                        *ALIGN_MODES[1:])
    pose_place: str = option("--pose-place", "kept", "where the Pose Cue's person is: kept = where the driver is, as in the "
                             "paper; aligned = moved as her mask is, sample.py's default for --preset toy", "aligned")
    min_iou: float = option("--min-iou", 0.80, "reject a frame whose mask has a lower predicted IoU")
    min_stability: float = option("--min-stability", 0.90, "reject a frame whose mask is less stable")
    max_area_jump: float = option("--max-area-jump", 2.0, "reject a mask so many times its neighbours' size")
    min_overlap: float = option("--min-overlap", 0.3, "reject a mask that overlaps both neighbours less")

    def __post_init__(self):
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{entry.name}={value!r} is not one of {', '.join(choices)}")
        bounds = {"cutoff": (0.001, 100), "cell": (1, 2 ** 20), "min_iou": (0, 1), "min_stability": (0, 1),
                  "max_area_jump": (1, 2 ** 20), "min_overlap": (0, 1)}
        for name, (low, high) in bounds.items():
            if not low <= (value := getattr(self, name)) <= high:          # nor NaN
                flag = self.__dataclass_fields__[name].metadata["flag"]
                raise ValueError(f"{flag} {value}: give {low} to {high}")


READ_BY_ANALYSE = "align", "min_iou", "min_stability", "max_area_jump", "min_overlap"


# ---- Pose Cue: low-pass in the frequency domain (Fig. 7) ----

@lru_cache(maxsize=4)                                             # else 3/4 of the filter's time
def filter_gain(rows: int, columns: int, cutoff: float, kind: str, dtype: np.dtype) -> np.ndarray:
    """The filter on the grid of a DCT, (rows, columns), by the radius in fractions of Nyquist."""
    radius2 = (np.arange(rows)[:, None] / rows) ** 2 + (np.arange(columns) / columns) ** 2
    return FILTERS[kind](radius2 / cutoff ** 2).astype(dtype)


def low_pass(gray: np.ndarray, cutoff: float, kind: str = "gaussian") -> np.ndarray:
    """(H, W) float, both even -> the same, low-passed; nothing is clipped.

    Computed as a DCT-II, the Fourier transform of the picture mirrored at its borders, so feet at the lower border
    do not bleed into the sky. The mean is kept and no coefficient grows. Paper silent: the filter; here a
    Gaussian, exp(-r^2 / 2 cutoff^2), which cannot ring. A cutoff of 0.12 is a blur of sigma 2.65 pixels.
    """
    return cv2.idct(cv2.dct(gray) * filter_gain(*gray.shape, cutoff, kind, gray.dtype))


def pose_cue(frame, mask, options: CueOptions, moved=(1.0, (0, 0))) -> np.ndarray:
    """Native frame (H0, W0, 3), canvas mask (H, W) -> (3, H, W) float32 in [-1, 1], black background. moved: scale, shift_xy."""
    rows, columns = mask.shape
    if options.pose == "rgb":
        picture = letterbox(frame, rows, columns) * mask[..., None]
    else:
        picture = letterbox(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), rows, columns) * mask        # Rec. 601
    scale, (x, y) = moved
    if (scale, x, y) != (1, 0, 0):
        picture = cv2.warpAffine(picture, np.float64([[scale, 0, x], [0, scale, y]]), (columns, rows))
    picture = picture.astype(np.float32) / 127.5
    if options.pose == "lowpass":
        picture = low_pass(picture, options.cutoff, options.kind)
    picture = np.clip(picture - 1, -1, 1)                          # only butterworth and ideal overshoot
    return picture.transpose(2, 0, 1) if picture.ndim == 3 else np.repeat(picture[None], 3, 0)


# ---- Location Cue: grid softening ----

def grid_soften(mask: np.ndarray, cell: int, statistic: str = "mean", phase=(0, 0)) -> np.ndarray:
    """(..., H, W) in [0, 1] -> float32, mean or max of each cell x cell block, bilinear in between.

    Keeps the coarse silhouette and hides the outline, which would leak the driver's shape. It is exactly 0 farther
    than 1.5 cells per axis outside the silhouette, and exactly 1 deeper than that inside. `phase` (y, x) shifts
    the grid; a block cut by the border averages its own pixels only.
    Paper silent: the grid; 16 pixels are one token, max is Animate Anyone 2's.
    """
    soft, sizes = np.asarray(mask, np.float32), mask.shape[-2:]
    along = lambda values, axis: values[:, None] if axis == -2 else values
    starts = [np.arange(-(offset % cell), size, cell) for size, offset in zip(sizes, phase)]
    for axis in (-2, -1):
        edges = np.append(starts[axis].clip(0), sizes[axis])
        if statistic == "max":
            soft = np.maximum.reduceat(soft, edges[:-1], axis)
        else:
            soft = np.add.reduceat(soft, edges[:-1], axis) / along(np.diff(edges).astype(np.float32), axis)
    for axis in (-2, -1):
        last = len(starts[axis]) - 1
        position = ((np.arange(sizes[axis]) + 0.5 - starts[axis][0]) / cell - 0.5).clip(0, last)
        left = position.astype(int)
        near, far = soft.take(left, axis), soft.take((left + 1).clip(max=last), axis)
        soft = near + along((position - left).astype(np.float32), axis) * (far - near)  # exact where equal
    return soft


# ---- Face Cue: fill, smooth, enlarge, centre ----

def fill_gaps(boxes: np.ndarray, longest: int = 8) -> np.ndarray:
    """(T, 4), NaN = no face. Interpolates gaps of up to `longest` frames; longer ones and both ends stay NaN.
    A gap between two profiles (boxes narrower than 0.62 of their height) stays NaN too: there the head turned
    away, and no face was missed. Paper silent.
    """
    boxes, seen = boxes.copy(), np.flatnonzero(np.isfinite(boxes[:, 0]))
    slim = (boxes[:, 2] - boxes[:, 0]) / np.maximum(boxes[:, 3] - boxes[:, 1], 1)
    for left, right in zip(seen[:-1], seen[1:]):
        turned_away = max(slim[left], slim[right]) < 0.62
        if 1 < right - left <= longest + 1 and not turned_away:
            weight = np.linspace(0, 1, right - left + 1)[1:-1, None]
            boxes[left + 1:right] = (1 - weight) * boxes[left] + weight * boxes[right]
    return boxes


def face_squares(boxes: np.ndarray, enlarge: float = 1.6, window: int = 5) -> np.ndarray:
    """(T, 4) face boxes -> (T, 4) squares to crop: larger side x `enlarge`, a bit higher, moving average."""
    sides = boxes[:, 2:] - boxes[:, :2]
    raw = np.column_stack((centre(boxes) - [0, 0.05] * sides, enlarge * sides.max(1)))     # x, y, side
    smooth = raw.copy()
    for index in np.flatnonzero(np.isfinite(boxes[:, 0])):
        smooth[index] = np.nanmean(raw[max(0, index - window // 2):index + window // 2 + 1], 0)
    middle, half = smooth[:, :2], smooth[:, 2:] / 2
    return np.concatenate((middle - half, middle + half), 1)


def to_canvas(boxes, source_shape, canvas, back: bool = False) -> np.ndarray:
    """Boxes (..., 4) of a native frame -> where the letterbox puts them on the canvas, or back."""
    scale_x, scale_y, x0, y0 = letterbox_box(*source_shape[:2], *canvas)
    scale, offset = np.array([scale_x, scale_y] * 2), np.array([x0, y0] * 2)
    return (boxes + 0.5 - offset) / scale - 0.5 if back else (boxes + 0.5) * scale + offset - 0.5


def crop(frame: np.ndarray, box, side: int) -> np.ndarray:
    """The region `box` of a frame as side x side pixels, black beyond the frame.

    Sub-pixel, since whole-pixel boxes make an enlarged face tremble; shrunk, it is the mean of k x k samples.
    """
    k = max(1, int(np.ceil((box[2] - box[0]) / side)))
    x, y = (box[2:] - box[:2]) / (side * k)
    matrix = np.float64([[x, 0, box[0] + x / 2], [0, y, box[1] + y / 2]])
    flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_CUBIC if k == 1 else cv2.INTER_LINEAR)
    return resize(cv2.warpAffine(frame, matrix, (side * k, side * k), flags=flags), side, side)


def face_cue(frame, square, options: CueOptions, canvas) -> np.ndarray:
    """Native frame, square on the canvas -> (3, H, W) in [-1, 1]; not turned upright, head pose is signal."""
    rows, columns = canvas
    picture = np.zeros((rows, columns, 3), np.uint8)
    if options.face == "inplace":
        picture[pixels(square)] = letterbox(frame, rows, columns)[pixels(square)]
    else:
        side = round(0.9 * min(rows, columns))
        y, x = (rows - side) // 2, (columns - side) // 2
        picture[y:y + side, x:x + side] = crop(frame, to_canvas(square, frame.shape, canvas, back=True), side)
    return picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


# ---- Pass 1: analyse ----

def colours(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (8, 8, 8), the share of each colour."""
    return cv2.calcHist([resize(frame, 64, 64)], [0, 1, 2], None, [8] * 3, [0, 256] * 3) / 64 ** 2


def is_cut(before: np.ndarray, after: np.ndarray) -> bool:
    """True if more than half of the picture changed, judging by the `colours` of two successive frames."""
    return np.abs(after - before).sum() / 2 > 0.5


@dataclass
class Track:
    """What pass 1 knows of a clip of T frames; coordinates in pixels of the canvas: the reference's size."""
    canvas: tuple[int, int]
    masks: list[bytes]             # T person masks on the canvas, bits packed, zlib: about 1.5 kB each
    body_boxes: np.ndarray         # (T, 4), NaN = nobody
    face_boxes: np.ndarray         # (T, 4) as detected, short gaps filled, NaN = no face
    face_squares: np.ndarray       # (T, 4) smoothed, what the Face Cue shows
    scores: np.ndarray             # (T, 4): predicted IoU; stability; area / median area of 31 frames around;
                                   # overlap = IoU with the better of both neighbours, centres aligned
    accepted: np.ndarray           # (T,) bool
    reference_box: np.ndarray      # (4,) the reference's body, NaN where nothing is aligned
    scale: float = 1.0
    shift_xy: np.ndarray = field(default_factory=lambda: np.zeros(2))
    warnings: list[str] = field(default_factory=list)

    def mask(self, index: int) -> np.ndarray:
        rows, columns = self.canvas
        bits = np.frombuffer(zlib.decompress(self.masks[index]), np.uint8)
        return np.unpackbits(bits, count=rows * columns).reshape(rows, columns).astype(bool)

    def presence(self) -> np.ndarray:
        """(H, W), the share of accepted frames with the person at a pixel, for `align.misalignment`."""
        kept = np.flatnonzero(self.accepted)
        return sum(self.mask(index).astype(np.float32) for index in kept) / len(kept)

    def summary(self) -> str:
        """One line of numbers, then one line for each warning."""
        faces, (x, y) = np.isfinite(self.face_boxes[:, 0]).sum(), self.shift_xy
        return "\n".join([f"{self.accepted.sum()} of {len(self.accepted)} frames accepted, face in {faces}, "
                          f"scale {self.scale:.2f}, shift ({x:+.0f}, {y:+.0f}) pixels",
                          *(f"Warning: {line}" for line in self.warnings)])

    def save(self, path: str | Path) -> None:
        """One .npz without pickles, written to a temporary name, then renamed."""
        ends = np.cumsum([len(mask) for mask in self.masks])
        parts = vars(self) | {"masks": np.frombuffer(b"".join(self.masks), np.uint8), "ends": ends}
        with atomic(Path(path), ".npz") as part, open(part, "wb") as file:
            np.savez(file, **parts)

    @classmethod
    def load(cls, path: str | Path) -> "Track":
        with np.load(path) as file:
            parts = dict(file)
        data, ends = parts.pop("masks").tobytes(), parts.pop("ends").tolist()
        parts["masks"] = [data[start:end] for start, end in zip([0, *ends], ends)]
        for name, kind in (("canvas", tuple), ("scale", float), ("warnings", list)):
            parts[name] = kind(parts[name].tolist())
        return cls(**parts)


def faults(track: Track, options: CueOptions) -> dict[str, np.ndarray]:
    """Why frames are rejected: reason -> (T,) bool. Paper silent: the scores and their thresholds.

    A clip of one frame has no neighbours to lean on, so there only an empty mask counts.
    """
    nobody, (predicted_iou, stability, jump, overlap) = np.isnan(track.body_boxes[:, 0]), track.scores.T
    if len(nobody) == 1:
        return {"nobody": nobody}
    jump = np.maximum(jump, 1 / np.maximum(jump, 1e-9))
    return {"nobody": nobody, "predicted IoU": predicted_iou < options.min_iou,
            "stability": stability < options.min_stability, "area jump": jump > options.max_area_jump,
            "overlap": overlap < options.min_overlap}


def analyse(source: Iterable[np.ndarray], reference: np.ndarray, find: Finder,
            options: CueOptions = CueOptions(), progress: Callable = iter) -> Track:
    """Pass 1 over `source`, (H0, W0, 3) uint8 RGB frames, for the canvas of `reference`, (H, W, 3) uint8.

    The finder sees native pixels; masks and boxes are then letterboxed onto the canvas. `progress` may wrap
    the frames. ValueError: an empty clip, no frame accepted, or a reference that shows nobody to align to.
    """
    canvas, masks, bodies, faces, scores, cuts = reference.shape[:2], [], [], [], [], []
    own_box, own_face, last_mask, last_colour = np.full(4, np.nan), np.full(4, np.nan), None, None
    if options.align != "none":
        _, person, own_face = next(find.reference([reference]))
        own_box = tight_box(without_strays(person.mask))
        align(options.align, own_box, own_box[None], own_face, own_face[None])    # fails before the long part
    for frame, person, face in find(progress(source)):
        mask = without_strays(letterbox(np.uint8(person.mask) * 255, *canvas) > 127)
        body, overlap = tight_box(mask), 0.0
        if masks and np.isfinite([body, bodies[-1]]).all():
            moved = warp(last_mask, 1.0, centre(body) - centre(bodies[-1]))
            overlap = (moved & mask).sum() / (moved | mask).sum()
        colour = colours(frame)
        if masks and is_cut(last_colour, colour):
            cuts.append(len(masks))
        masks.append(zlib.compress(np.packbits(mask)))
        bodies.append(body)
        faces.append(to_canvas(face, frame.shape, canvas))
        scores.append((person.predicted_iou, person.stability, mask.sum(), overlap))
        last_mask, last_colour = mask, colour
    if not masks:
        raise ValueError("the driving video has no frames")
    scores, face_boxes = np.array(scores, float), fill_gaps(np.array(faces))
    area = np.where(scores[:, 2] > 0, scores[:, 2], np.nan)
    scores[:, 2] = [n / np.nanmedian(area[max(0, k - 15):k + 16]) if n > 0 else 0 for k, n in enumerate(area)]
    scores[:, 3] = np.maximum(scores[:, 3], np.append(scores[1:, 3], 0))
    track = Track(canvas, masks, np.array(bodies), face_boxes, face_squares(face_boxes), scores,
                  np.ones(len(masks), bool), own_box)
    rejected = faults(track, options)
    track.accepted = ~np.any(list(rejected.values()), 0)
    if not track.accepted.any():
        worst = max(rejected, key=lambda reason: rejected[reason].sum())
        raise ValueError(f"none of the {len(masks)} driving frames is accepted; "
                         f"{rejected[worst].sum()} fail for: {worst}")
    track.scale, track.shift_xy = align(options.align, own_box, track.body_boxes, own_face, face_boxes,
                                        track.accepted)
    track.warnings = complaints(track, own_face, cuts, options.align)
    return track


def complaints(track: Track, own_face: np.ndarray, cuts: list[int], align: str) -> list[str]:
    """What a person should look at before spending GPU hours, in words."""
    lines, kept, seen = [], track.accepted, np.isfinite(track.face_boxes[:, 0])
    if kept.mean() < 0.5:
        lines.append(f"{(~kept).sum()} of {len(kept)} driving frames are rejected: motion there is guessed")
    for index in cuts:
        lines.append(f"frame {index} looks like a cut: give one shot at a time")
    if not seen.any():
        lines.append("no face was found in the driving video: the Face Cue is black throughout")
    if np.isnan(track.reference_box).any():
        return lines                                               # nothing was aligned
    if np.isnan(own_face).any():
        lines.append("no face was found in the reference")
    low, high = PLAUSIBLE_SCALE
    if not low <= track.scale <= high:
        lines.append(f"scale {track.scale:.2f} is outside [{low:g}, {high:g}]: crop the video or the "
                     "reference, so that both persons fill their pictures alike")
    if align == "height" and (kept & seen).any() and np.isfinite(own_face).all():
        heads = height(track.body_boxes[kept & seen]) / height(track.face_boxes[kept & seen])
        ratio = height(track.reference_box) / height(own_face) / np.median(heads)
        if max(ratio, 1 / ratio) > 1.6:
            more, less = ("reference", "driving video") if ratio > 1 else ("driving video", "reference")
            lines.append(f"half body against full body: the {more} shows more of the person than the {less}, "
                         "so equal heights misplace her; try --align face")
    return lines


# ---- Pass 2: render ----

def render(source: Iterable[np.ndarray], track: Track, size: tuple[int, int] | None = None,
           options: CueOptions = CueOptions(), drop: np.ndarray | None = None,
           misalign: tuple | None = None) -> Iterator[tuple]:
    """Pass 2: stream (pose (3, H, W), face (3, H, W), body_mask (1, H, W), face_mask (1, H, W)), float32.

    Cues lie in [-1, 1], -1 where there is nothing; masks in [0, 1]. A rejected frame has a black pose and the
    mask of the nearest accepted one ("rely on adjacent results"); without a face its cue and mask are empty.
    size: (H, W) of the canvas's aspect, default the canvas. drop: (T,) bool, blanks more poses. misalign:
    (scale, shift_xy) on the canvas, moves the Pose Cue's person before the low-pass and nothing else (A.2, training).

    Differs: options.pose_place "aligned" moves her as the masks are moved; the paper's model learns, by A.2, to look past
    her place.
    """
    rows, columns = size = size or track.canvas
    if rows * track.canvas[1] != columns * track.canvas[0]:
        raise ValueError(f"size {columns}x{rows} has another aspect than the {track.canvas[1]}x"
                         f"{track.canvas[0]} for which the clip was analysed")
    ratio, nothing = rows / track.canvas[0], np.full((3, *size), -1, np.float32)
    scale, shift_xy = resized(track.scale, track.shift_xy, ratio)
    moved = (scale, shift_xy) if options.pose_place == "aligned" else (1.0, (0, 0))
    moved = resized(*misalign, ratio) if misalign else moved
    squares, face_boxes = ((boxes + 0.5) * ratio - 0.5 for boxes in (track.face_squares, track.face_boxes))
    face_boxes = transform(face_boxes, scale, shift_xy)
    kept, blank = np.flatnonzero(track.accepted), ~track.accepted | (False if drop is None else drop)
    for index, (frame, packed) in enumerate(zip_longest(source, track.masks)):
        if frame is None or packed is None:
            raise ValueError(f"the driving video has not the {len(blank)} frames that were analysed")
        mask = track.mask(kept[np.abs(kept - index).argmin()])
        if ratio != 1:
            mask = resize(np.uint8(mask) * 255, *size) > 127
        pose, face = nothing, nothing
        if not blank[index] and options.pose != "none":
            pose = pose_cue(frame, mask, options, moved)
        body, face_mask = warp(mask, scale, shift_xy).astype(np.float32), np.zeros(size, np.float32)
        if options.location == "soft":
            body = grid_soften(body, options.cell, options.statistic)
        if options.face != "none" and np.isfinite(squares[index]).all():
            face = face_cue(frame, squares[index], options, size)
            face_mask[pixels(face_boxes[index])] = 1
        located = options.location != "none"
        yield pose, face, body[None] * located, face_mask[None] * located


@dataclass
class Cues:
    """The triplet of a short clip, stacked; ranges as in `render`."""
    pose: np.ndarray               # (T, 3, H, W)
    face: np.ndarray               # (T, 3, H, W)
    body_mask: np.ndarray          # (T, 1, H, W)
    face_mask: np.ndarray          # (T, 1, H, W)


def extract(frames, reference: np.ndarray, find: Finder, options: CueOptions = CueOptions()) -> Cues:
    """Both passes over frames that fit in memory.

    `extract(reference[None], reference, find.reference)` is slot 0, the reference's own cues; its mask is
    fitted to itself, so the alignment is the identity.
    """
    track = analyse(frames, reference, find, options)
    return Cues(*map(np.stack, zip(*render(frames, track, options=options))))


# ---- python cues.py preview ----

INK, DIM, GREEN, RED = (235, 235, 235), (150, 150, 150), (90, 210, 120), (255, 90, 80)
AMBER, TEAL, WIDTH, GAP = (255, 190, 60), (0, 190, 190), 1600, 8


def panel(rows: int, columns: int, lines: Iterable[tuple] = ()) -> np.ndarray:
    """A dark panel with lines of (text, x, y, colour)."""
    picture = np.full((rows, columns, 3), 28, np.uint8)
    for text, x, y, colour in lines:
        cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return picture


def strip(width: int, cells: dict[str, np.ndarray]) -> np.ndarray:
    """Pictures side by side at one height, so that they fill `width`, each under its title."""
    aspect = sum(cell.shape[1] / cell.shape[0] for cell in cells.values())
    rows = int((width - GAP * (len(cells) + 1)) / aspect)
    shown = [resize(cell, rows, rows * cell.shape[1] // cell.shape[0]) for cell in cells.values()]
    lefts = np.cumsum([GAP] + [cell.shape[1] + GAP for cell in shown]).tolist()
    out = panel(rows + 26, width, [(title, x, 18, DIM) for title, x in zip(cells, lefts)])
    for cell, x in zip(shown, lefts):
        out[26:, x:x + cell.shape[1]] = cell
    return out


def draw_box(picture: np.ndarray, box, colour) -> None:
    if np.isfinite(box).all():
        x0, y0, x1, y1 = np.round(box).astype(int).tolist()
        cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 1, cv2.LINE_AA)


def draw_frame(index, frame, cues, track: Track, reference, rejected: dict, fps, width: int) -> np.ndarray:
    """Driving frame with mask and boxes, Pose Cue, Face Cue, Location Cue on the reference, the scores."""
    pose, face, body, face_mask = cues
    reasons = [reason for reason, bad in rejected.items() if bad[index]]
    state, colour = ("REJECTED: " + ", ".join(reasons), RED) if reasons else ("accepted", GREEN)
    driving, edge = letterbox(frame, *track.canvas), np.ones((3, 3), np.uint8)
    driving[cv2.morphologyEx(np.uint8(track.mask(index)), cv2.MORPH_GRADIENT, edge) > 0] = colour
    draw_box(driving, track.body_boxes[index], INK)
    draw_box(driving, track.face_boxes[index], AMBER)
    placed = reference.astype(np.float32)
    for mask, tint in ((body, TEAL), (face_mask, AMBER)):
        placed += 0.6 * mask.transpose(1, 2, 0) * (np.float32(tint) - placed)
    placed = placed.astype(np.uint8)
    draw_box(placed, track.reference_box, INK)
    pose, face = (np.round((cue.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8) for cue in (pose, face))
    words = "predicted IoU {:.2f}   stability {:.2f}   area x{:.2f}   overlap {:.2f}"
    words = words.format(*track.scores[index])
    words += "   face" if np.isfinite(track.face_boxes[index]).all() else "   NO FACE"
    return np.vstack((strip(width, {"driving, mask, boxes": driving, "Pose Cue": pose, "Face Cue": face,
                                    "Location Cue on reference": placed}),
                      panel(50, width, [(f"frame {index}   {index / fps:.2f} s   {state}", GAP, 18, colour),
                                        (words, GAP, 38, DIM)])))


def draw_filter(frame, mask, options: CueOptions) -> np.ndarray:
    """Fig. 7: foreground, gray, low-passed, the patch that loses most detail, log spectra of both."""
    foreground = letterbox(frame, *mask.shape) * mask[..., None]
    gray = cv2.cvtColor(foreground, cv2.COLOR_RGB2GRAY).astype(np.float32)
    smooth, side = low_pass(gray, options.cutoff, options.kind), min(mask.shape) // 6
    lost = np.square(gray - smooth) * cv2.erode(np.uint8(mask), np.ones((9, 9), np.uint8))
    lost = cv2.blur(lost, (side, side), anchor=(0, 0))[:-side, :-side]
    y, x = np.unravel_index(lost.argmax(), lost.shape)
    window = np.outer(np.hanning(mask.shape[0]), np.hanning(mask.shape[1]))      # or the border draws a cross
    spectra = [np.fft.fftshift(np.log1p(np.abs(np.fft.fft2(p * window)))) for p in (gray, smooth)]
    spectra = [cv2.applyColorMap(np.uint8(255 * s / spectra[0].max()), cv2.COLORMAP_VIRIDIS)[..., ::-1]
               for s in spectra]
    shown = [np.repeat(p.clip(0, 255).astype(np.uint8)[..., None], 3, -1) for p in (gray, smooth)]
    patches = [p[y:y + side, x:x + side].repeat(4, 0).repeat(4, 1) for p in shown]
    for picture in shown:
        draw_box(picture, np.array([x, y, x + side, y + side]), AMBER)
    detail = [np.square(p - low_pass(p, options.cutoff, "ideal")).sum() for p in (gray, smooth)]
    return strip(WIDTH, {"foreground": foreground, "gray": shown[0],
                         f"{options.kind} low-pass, {options.cutoff:g}": shown[1],
                         "before, after": np.vstack(patches), "log spectrum": spectra[0],
                         f"after: {1 - detail[1] / max(detail[0], 1e-9):.0%} of detail gone": spectra[1]})


def draw_header(title: str, track: Track, rejected: dict) -> np.ndarray:
    """Scale, shift, warnings, rejected frames by reason, and a bar with one column a frame."""
    lines = [(line, AMBER if line.startswith("Warning") else INK)
             for line in [title, *track.summary().split("\n")]]
    for reason, bad in rejected.items():
        if bad.any():
            frames = ", ".join(map(str, np.flatnonzero(bad)[:25])) + (", ..." if bad.sum() > 25 else "")
            lines.append((f"Rejected for {reason}: {bad.sum()} ({frames})", RED))
    out = panel(26 * len(lines) + 58, WIDTH,
                [(text, GAP, 30 + 26 * k, colour) for k, (text, colour) in enumerate(lines)]
                + [("above: accepted; below: face", WIDTH - 215, 26 * len(lines) + 38, DIM)])
    accepted = np.where(track.accepted[:, None], GREEN, RED)
    faces = np.where(np.isfinite(track.face_boxes[:, :1]), AMBER, (60,) * 3)
    bar = np.stack((accepted, faces)).astype(np.uint8)
    out[-36:-16, GAP:-230] = cv2.resize(bar, (WIDTH - 230 - GAP, 20), interpolation=cv2.INTER_NEAREST)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that makes cues (and has --fps); `finder.from_arguments` and `options` read them."""
    group = finder.add_arguments(parser, "folder, video or picture of masks, one a driving frame")
    group.add_argument("--reference-mask", metavar="FILE", help="the same for the reference")
    group = parser.add_argument_group("cues")
    for entry in fields(CueOptions):
        about = entry.metadata
        group.add_argument(about["flag"], dest=entry.name, type=type(entry.default), default=entry.default,
                           choices=about["choices"], help=about["help"])


def options(args: argparse.Namespace) -> CueOptions:
    """ValueError for a flag that nothing would read."""
    found = CueOptions(**{entry.name: getattr(args, entry.name) for entry in fields(CueOptions)})
    entries = {entry.name: entry for entry in fields(CueOptions)}
    changed = {name for name, entry in entries.items() if getattr(found, name) != entry.default}
    for name, cue in {"cutoff": "pose", "kind": "pose", "cell": "location", "statistic": "location"}.items():
        if {name, cue} <= changed:
            flag, reader = (entries[n].metadata["flag"] for n in (name, cue))
            raise ValueError(f"{flag} is read by {reader} {entries[cue].default} only: drop it")
    return found


def previews(args: argparse.Namespace) -> None:
    """A sheet for one driving video, or a folder with a sheet for each of several; a clip that fails does not stop the rest."""
    if len(args.drive) == 1:
        return preview(argparse.Namespace(**vars(args) | {"drive": args.drive[0]}))
    if args.output.suffix or args.masks:
        raise ValueError(f"{len(args.drive)} driving videos: -o {args.output} must be a folder, and --masks fits one video")
    if len({drive.stem for drive in args.drive}) < len(args.drive):
        raise ValueError("two of the driving videos have one name, and their sheets would too: rename one of them")
    args.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for drive in args.drive:
        try:
            print(f"{drive.name}: ", end="", flush=True)
            preview(argparse.Namespace(**vars(args) | {"drive": drive, "output": args.output / f"{drive.stem}.png"}))
        except (ValueError, OSError) as error:
            print(f"no sheet: {error}")
            failed.append(drive.name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(args.drive)} videos have no sheet: {', '.join(failed)}")


def preview(args: argparse.Namespace) -> None:
    from tqdm import tqdm
    check_output(args.output, *filter(None, (args.reference, args.drive, args.masks, args.reference_mask)))
    chosen, find = options(args), finder.from_arguments(args)
    picture, source = read_image(args.reference), Video(args.drive, fps=args.fps)
    reference = cover(picture, *output_size(*picture.shape[:2], args.area))
    bar = lambda frames, what: tqdm(frames, what, total=source.frames, unit="frame")
    track = analyse(source, reference, find, chosen, lambda frames: bar(frames, "analyse"))
    print(track.summary())
    rejected, count, film = faults(track, chosen), len(track.masks), args.output.suffix.lower() == ".mp4"
    sampled = range(count) if film else np.unique(np.linspace(0, count - 1, args.rows).round().astype(int))
    across = 2 if reference.shape[0] > 1.2 * reference.shape[1] and not film else 1
    middle, panels = np.flatnonzero(track.accepted)[track.accepted.sum() // 2], []

    def cells() -> Iterator[np.ndarray]:
        stream = zip(bar(source, "draw"), render(source, track, options=chosen))
        for index, (frame, cues) in enumerate(stream):
            if index == middle:
                panels.append(draw_filter(frame, track.mask(middle), chosen))
            if index in sampled:
                image = draw_frame(index, frame, cues, track, reference, rejected, float(source.fps),
                                   WIDTH // across)
                yield image[:len(image) // 2 * 2]                  # H.264 wants even sizes
    if film:
        write_video(args.output, cells(), source.fps, comment="cues of a clip")
    else:
        drawn = list(cells())
        drawn += [panel(*drawn[0].shape[:2])] * (-len(drawn) % across)
        rows = [np.hstack(drawn[k:k + across]) for k in range(0, len(drawn), across)]
        title = f"{args.reference.name} <- {args.drive.name}, {reference.shape[1]} x {reference.shape[0]}"
        write_image(args.output, np.vstack([draw_header(title, track, rejected), *rows, *panels]))
    print(f"wrote {args.output}")


def main() -> None:
    parser = Parser(__doc__)
    command = parser.add_subparsers(required=True, metavar="preview").add_parser(
        "preview", help="draw all cues of a clip, for a person to judge")
    command.add_argument("reference", type=Path, help="picture of the person to animate")
    command.add_argument("drive", type=Path, nargs="+", help="driving videos, or folders of numbered frames")
    command.add_argument("-o", "--output", type=Path, default="sheet.png",
                         help=".png or .jpg: a sheet; .mp4: every frame; for several videos a folder of sheets")
    command.add_argument("--rows", type=natural, default=8, metavar="N", help="frames on the sheet")
    command.add_argument("--fps", type=rate, help="pick driving frames at this rate; all if not given")
    command.add_argument("--area", type=area, default=512 * 512,
                         help="pixels of the canvas, which has the reference's aspect")
    add_arguments(command)
    args = parser.parse_args()
    try:
        previews(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; nothing was written\n")


if __name__ == "__main__":
    main()
