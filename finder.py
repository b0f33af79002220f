"""Who is where: one person, her mask and her face in every frame, by networks that others trained, or by given masks.

Two callables do the finding: segmenter(frame, previous mask or None) -> [Person], and face_finder(frame) ->
(n, 4) boxes. Boxes are (x0, y0, x1, y1) in pixel centres, as in align.py.
"""

import argparse
import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from align import centre, tight_box, without_strays
from video import PICTURES, Video, cover, natural, read_image, resize

SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
DETECTOR_URL = "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"


# ---- boxes and blobs ----

def pixels(box) -> tuple[slice, slice]:
    """The pixels whose centres lie in a box, as an index; what hangs over the frame is left out."""
    x0, y0 = np.ceil(box[:2]).clip(0).astype(int)
    x1, y1 = np.floor(box[2:]).clip(-1).astype(int) + 1
    return np.s_[y0:y1, x0:x1]


def grown(box: np.ndarray, share: float) -> np.ndarray:
    pad = share * (box[2:] - box[:2])
    return np.concatenate((box[:2] - pad, box[2:] + pad))


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them is NaN."""
    area = lambda low, high: np.prod(np.maximum(high - low, 0))
    shared = area(np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:]))
    return float(np.nan_to_num(shared / (area(a[:2], a[2:]) + area(b[:2], b[2:]) - shared + 1e-9)))


def blobs(mask: np.ndarray, share: float) -> list[np.ndarray]:
    """Connected components of at least `share` of the largest one's area, largest first."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(np.uint8(mask))
    area = stats[1:, cv2.CC_STAT_AREA]                             # label 0 is the background
    return [labels == k + 1 for k in np.argsort(-area) if area[k] >= share * area.max()]


# ---- persons ----

class Person(NamedTuple):
    mask: np.ndarray           # (H0, W0) bool, native pixels
    predicted_iou: float       # the segmenter's own opinion of the mask, 0 to 1
    stability: float           # IoU of the masks cut a little above and a little below the threshold


class PersonNet:
    """A segmenter from a person-mask network, (1, 3, h, w) RGB in [0, 1] -> (1, 1, h, w) in [0, 1]: a .tflite
    of 256 x 256, such as MediaPipe's selfie_segmentation, run by cv2.dnn, or an .onnx, run by onnxruntime at its
    own size, or 256 where it takes any.

    Every frame is looked at whole and cropped to the person, and averaged: the crop sees limbs of a small
    person that the whole frame loses. Such nets mark pixels, not persons; people who touch are kept apart by
    giving each pixel to the nearest of the masks of the frame before.
    """

    def __init__(self, path: str | Path):
        path, self.size, self.people = Path(path), (256, 256), []
        try:
            if path.suffix == ".tflite":
                net = cv2.dnn.readNetFromTFLite(str(path))
                self.run = lambda x: (net.setInput(x), net.forward())[1]
            else:
                import onnxruntime as ort
                session = ort.InferenceSession(str(path), providers=providers())
                entry = session.get_inputs()[0]
                self.size = tuple(n if isinstance(n, int) else 256 for n in entry.shape[2:])
                self.run = lambda x: session.run(None, {entry.name: x})[0]
            self.look(np.zeros((16, 16, 3), np.uint8))             # another network fails here
        except Exception as error:                                 # cv2, onnxruntime: own classes
            raise ValueError(f"--segmenter {path} is no person-mask network, .tflite or .onnx ({brief(error)})") from None

    def look(self, frame) -> np.ndarray:
        """(H0, W0, 3) -> (H0, W0), how sure each pixel is a person's."""
        small = resize(frame, *self.size).astype(np.float32).transpose(2, 0, 1) / 255
        chance = self.run(np.ascontiguousarray(small[None])).reshape(self.size)
        return cv2.resize(chance, frame.shape[1::-1])

    def __call__(self, frame, previous=None) -> list[Person]:
        chance = self.look(frame)
        where = tight_box(chance > 0.5 if previous is None else previous)
        if np.isfinite(where).all():
            near = pixels(grown(where, 0.15))
            chance[near] = (chance[near] + self.look(frame[near])) / 2
        marked, rows = chance > 0.5, lambda mask: mask.any(1).sum()
        # Sure cores, each nearly as tall as all there is, are different people; chest and legs are one.
        tall = 0.6 * rows(without_strays(marked))
        cores = [core for core in blobs(chance > 0.9, 0.2) if rows(core) > tall]
        known = [] if previous is None else self.people
        seeds = cores if len(cores) > 1 and len(cores) >= len(known) else known
        owner = np.zeros(marked.shape, int)
        if len(seeds) > 1:
            owner = np.argmin([cv2.distanceTransform(np.uint8(~seed), cv2.DIST_L2, 3) for seed in seeds], 0)
        reach = np.ones((len(frame) // 100 + 1,) * 2, np.uint8)    # bridges a lost wrist, not far dirt
        people = []
        for k in range(max(1, len(seeds))):
            mask = marked & (owner == k)
            if mask.any():
                mask &= blobs(cv2.dilate(np.uint8(mask), reach), 1)[0]
                sure, perhaps = ((chance[owner == k] > level).sum() for level in (0.55, 0.45))
                people.append(Person(mask, float(chance[mask].mean()), float(sure / perhaps)))
        self.people = [person.mask for person in people]
        return people


def brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:100] or type(error).__name__


def fetched(url: str, sha256: str) -> Path:
    """The file of `url` in torch's hub cache, downloaded once: progress bar, temporary name, rename."""
    import torch
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path.name} cannot be fetched ({brief(error)}): put {url} at {path}, or give "
                          "masks with --masks DIR and --reference-mask FILE") from None
    return path


def load_sam(checkpoint: str | Path | None = None):
    import torch
    from segment_anything import SamPredictor, sam_model_registry
    path, model = Path(checkpoint or fetched(SAM_URL, "ec2df627")), sam_model_registry["vit_b"]()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                                     # unpickling fails in many ways
        raise ValueError(f"--sam {path} does not hold segment-anything's ViT-B ({brief(error)})") from None
    return SamPredictor(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"))


def load_person_detector() -> Callable:
    """frame -> (n, 4) boxes of people, COCO's class 1, by torchvision's Faster R-CNN."""
    import torch
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    weights = torch.load(fetched(DETECTOR_URL, "258fb6c6"), map_location=device, weights_only=True)
    model.load_state_dict(weights)
    model.eval().to(device)

    @torch.inference_mode()
    def detect(frame) -> np.ndarray:
        found = model([torch.from_numpy(frame).to(device).permute(2, 0, 1) / 255])[0]
        return found["boxes"][(found["labels"] == 1) & (found["scores"] > 0.5)].cpu().numpy() - 0.5
    return detect


class Sam:
    """The default segmenter: segment-anything ViT-B, prompted with a person box, one mask a box.

    Differs: the paper's is Grounded SAM, whose boxes come from words; these come from torchvision's Faster R-CNN.

    Boxes come from the detector on every `every`-th frame, in between from the previous mask, grown by 10 %.
    """

    def __init__(self, checkpoint: str | Path | None = None, every: int = 8, predictor=None, detector=None):
        self.every, self.calls = every, 0
        self.predictor = predictor or load_sam(checkpoint)
        self.detector = detector or load_person_detector()

    def __call__(self, frame, previous=None) -> list[Person]:
        self.calls = 0 if previous is None else self.calls + 1
        boxes = list(self.detector(frame)) if self.calls % self.every == 0 else []
        if previous is not None:
            last = tight_box(previous)
            near = [box for box in boxes if box_iou(box, last) > 0.3]      # the others are somebody else
            boxes = [max(near, key=lambda box: box_iou(box, last), default=grown(last, 0.1))]
        if boxes:
            self.predictor.set_image(frame)
        people = []
        for box in boxes:
            logits, iou, _ = self.predictor.predict(box=box, multimask_output=False, return_logits=True)
            stability = (logits > 1).sum() / max((logits > -1).sum(), 1)
            people.append(Person(without_strays(logits[0] > 0), float(iou[0]), float(stability)))
        return people


# ---- faces ----

def load_yunet(path: Path) -> Callable:
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)    # OpenCV 5 warns of itself
    net = cv2.FaceDetectorYN.create(str(path), "", (320, 320), 0.6, 0.3)
    cv2.utils.logging.setLogLevel(level)

    def detect(bgr) -> np.ndarray:
        net.setInputSize(bgr.shape[1::-1])
        found = net.detect(bgr)[1]                                 # (n, 15): x, y, width, height, ...
        return np.empty((0, 4)) if found is None else np.hstack((found[:, :2], found[:, :2] + found[:, 2:4]))
    detect(np.zeros((64, 64, 3), np.uint8))                        # another network fails here
    return detect


def providers() -> list:
    """onnxruntime's, on the GPU of this process: torchrun's ranks have one each."""
    import onnxruntime
    import torch
    card = torch.cuda.current_device() if torch.cuda.is_available() else 0
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return [("CUDAExecutionProvider", {"device_id": card})] * cuda + ["CPUExecutionProvider"]


def fetched_pack(name: str) -> Path:
    """The folder of insightface's model pack `name`, fetched once; renamed into place, for other ranks want it too."""
    from insightface.utils.storage import ensure_available
    home = Path("~/.insightface").expanduser()
    folder = home / "models" / name
    if not folder.is_dir():
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as root:
            found = ensure_available("models", name, root)
            folder.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):                     # another rank was sooner
                os.replace(found, folder)
    return folder


def load_insightface(path: Path, *modules: str):
    from insightface.app import FaceAnalysis
    folder, found = path if path.is_dir() else fetched_pack(str(path)), providers()
    app = FaceAnalysis(str(folder.resolve()), allowed_modules=list(modules), providers=found)
    app.prepare(ctx_id=0 if len(found) > 1 else -1, det_thresh=0.5, det_size=(640, 640))
    return app


def load_scrfd(path: Path) -> Callable:
    app = load_insightface(path, "detection")
    return lambda bgr: np.array([face.bbox for face in app.get(bgr)]).reshape(-1, 4)


def load_face_finder(model: str | Path | None = None) -> Callable:
    """(H0, W0, 3) uint8 RGB -> (n, 4) face boxes, by YuNet for an .onnx file, else by insightface's SCRFD.

    model: an insightface model folder or the name of a pack; the default, buffalo_l, is fetched once by
    insightface and for non-commercial research only.
    """
    path = Path(model or "buffalo_l")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detect = load_yunet(path) if path.suffix == ".onnx" else load_scrfd(path)
    except Exception as error:                                     # insightface asserts, cv2: own class
        raise OSError(f"the face detector {path} can be neither loaded nor fetched ({brief(error)}): give "
                      "--face-model an insightface model folder or a YuNet .onnx") from None
    return lambda frame: detect(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)) - 0.5      # edges to pixel centres


def find_face(face_finder: Callable, frame, mask: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The face that lies on the person's mask and on her last face; NaN where the best hardly does.

    Detectors miss a face that fills the frame, so they get a second look with a margin; not if the last face was
    small, since a second look also finds faces in hair.
    """
    boxes, pad = face_finder(frame), max(frame.shape) // 4
    if not len(boxes) and not last[2] - last[0] < min(frame.shape[:2]) / 4:
        boxes = face_finder(cv2.copyMakeBorder(frame, pad, pad, pad, pad, cv2.BORDER_CONSTANT)) - pad
    score = [mask[pixels(box)].sum() / max(mask[pixels(box)].size, 1) + box_iou(box, last) for box in boxes]
    return boxes[np.argmax(score)].astype(float) if score and max(score) > 0.5 else np.full(4, np.nan)


# ---- one of them, through all frames ----

def paint_mask(body: np.ndarray, face: np.ndarray | None = None) -> np.ndarray:
    """Bool masks (H, W) -> the picture that --masks reads, (H, W, 3) uint8: person white, face red."""
    picture = np.repeat(np.uint8(body)[..., None] * 255, 3, -1)
    if face is not None:
        picture[face] = 255, 0, 0
    return picture


def check_shape(mask: tuple, rows: int, columns: int) -> None:
    """ValueError for a mask (H, W, ...) of quite another shape than its picture."""
    if not 0.8 < mask[1] * rows / (mask[0] * columns) < 1.25:
        raise ValueError(f"a mask is {mask[1]}x{mask[0]} but its picture {columns}x{rows}: give it that shape")


def read_mask(picture: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of `paint_mask` -> body mask, face box (NaN: no red); half-way levels, for lossy codecs."""
    check_shape(picture.shape, rows, columns)
    picture = cover(picture, rows, columns).astype(int)            # cut as the reference was
    return picture[..., 0] > 127, tight_box(picture[..., 0] - picture[..., 1:].max(-1) > 127)


@dataclass
class Finder:
    """finder(frames) yields (frame, Person, face box or NaN) and keeps ONE person through all frames.

    person: the Nth from the left, from 1, of the first frame with anybody; default the largest, most central.
    masks: mask pictures, one per frame, re-iterable, used instead of the segmenter; red marks the face. Where there
    is no red, the face finder, if there is one, looks for it. reference_mask: the reference's.
    """
    segmenter: Callable | None = None
    face_finder: Callable | None = None
    person: int | None = None
    masks: Iterable[np.ndarray] | None = None
    reference_mask: np.ndarray | None = None

    @property
    def reference(self) -> "Finder":
        """The finder for the reference image, or for a clip of it alone."""
        mask = self.reference_mask
        if mask is None and self.segmenter is None:
            raise ValueError("the reference has no mask: give --reference-mask FILE beside --masks")
        return Finder(self.segmenter, self.face_finder, None, None if mask is None else [mask], mask)

    def __call__(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Person, np.ndarray]]:
        previous, last_face = None, np.full(4, np.nan)
        pairs = zip_longest(frames, self.masks) if self.masks is not None else ((f, None) for f in frames)
        for index, (frame, mask) in enumerate(pairs):
            face = np.full(4, np.nan)
            if self.masks is None:
                person = choose(self.segmenter(frame, previous), previous, frame.shape, self.person)
            elif frame is None or mask is None:
                raise ValueError(f"masks and driving frames part after {index}: give one mask for each frame that --fps, if given, picks")
            else:
                body, face = read_mask(mask, *frame.shape[:2])
                person = Person(body, 1.0, 1.0)
            if self.face_finder is not None and np.isnan(face).any():
                face = find_face(self.face_finder, frame, person.mask, last_face)
            previous = person.mask if person.mask.any() else previous
            last_face = face if np.isfinite(face).all() else last_face
            yield frame, person, face


def choose(people: list[Person], previous, shape, number: int | None) -> Person:
    """The person of the frame before; at first the Nth from the left, or the largest and most central."""
    if not people:
        return Person(np.zeros(shape[:2], bool), 0.0, 0.0)
    if previous is not None:
        return max(people, key=lambda person: (person.mask & previous).sum())
    if number is None:
        away = lambda mask: np.abs(centre(tight_box(mask)) / shape[1::-1] - 0.5).max()
        return max(people, key=lambda person: person.mask.sum() * (1 - away(person.mask)))
    if number > len(people):
        raise ValueError(f"--person {number}: the first frame with anybody shows {len(people)}")
    return sorted(people, key=lambda person: tight_box(person.mask)[0])[number - 1]


# ---- command line ----

def add_arguments(parser: argparse.ArgumentParser, masks: str):
    """The flags of every command that looks for people, and their group; `from_arguments` reads them."""
    group = parser.add_argument_group("who drives")
    for flag, metavar, text in (
            ("--segmenter", "FILE", "person-mask network (.tflite or .onnx) in place of segment-anything"),
            ("--sam", "FILE", "segment-anything's ViT-B weights; fetched once if not given"),
            ("--masks", "PATH", f"{masks}, in place of both networks: person white, face red"),
            ("--face-model", "PATH", "insightface folder or YuNet .onnx; buffalo_l, fetched, if not given")):
        group.add_argument(flag, metavar=metavar, help=text)
    group.add_argument("--person", type=natural, metavar="N", help="follow the Nth from the left")
    return group


def from_arguments(args: argparse.Namespace) -> Finder:
    if args.segmenter and args.sam:
        raise ValueError("--segmenter and --sam are two segmenters: give one")
    if args.masks and args.person is not None:
        raise ValueError("--person chooses among people, and --masks has chosen already: give one")
    if args.masks and args.reference_mask and (args.segmenter or args.sam):
        raise ValueError("--masks and --reference-mask leave nothing to segment: drop --segmenter and --sam")
    for flag, path in (("--segmenter", args.segmenter), ("--sam", args.sam)):
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{flag} {path}: no such file")
    masks = reference_mask = segmenter = face_finder = None
    if args.masks:
        single = Path(args.masks).suffix.lower() in PICTURES
        masks = [read_image(args.masks)] if single else Video(args.masks, fps=args.fps)
    if args.reference_mask:
        reference_mask = read_image(args.reference_mask)
    if masks is None or reference_mask is None:
        segmenter = PersonNet(args.segmenter) if args.segmenter else Sam(args.sam)
    if segmenter or args.face_model:
        face_finder = load_face_finder(args.face_model)
    return Finder(segmenter, face_finder, args.person, masks, reference_mask)
