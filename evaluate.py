"""The paper's metrics (Tables 1-6, A.4), each with its definition, and how many clips each number stands on.

    python evaluate.py generated.mp4 truth.mp4 --metrics ssim,psnr,l1
    python evaluate.py GENERATED TRUTH --reference pictures/ --i3d i3d_torchscript.pt -o results.json

GENERATED and TRUTH are two clips, or two folders of clips paired by name; a clip is a video or a folder of
numbered frames. A number is the mean over frames, then over clips, except FID and FVD, which pool all frames.
What cannot run is reported as `not run` with the reason. Across identities there is no truth: give the
driving clips as TRUTH, with --reference, --cross-id and --metrics fis,fts,plc,flc.

Numbers of different papers are rarely comparable: test clips, sizes and even the PSNR differ. Picture metrics
see uint8 RGB at the truth's size, the generated frame resized bilinearly, as the scripts of DisCo do, which
most of the field copied; L1 is scaled by the picture size and therefore always taken at 256 x 256.
"""

import argparse
import contextlib
import difflib
import io
import json
import sys
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cues import to_canvas
from finder import brief, load_insightface, read_mask
from video import PICTURES, Parser, Video, atomic, check_output, read_image, resize, whole

FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
KIND = {"plc": "body", "flc": "face"}  # whose points each compares
WINDOW = 16  # frames that FVD looks at together
SEEN = 0.3  # keypoints of a lower score are not compared
I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"


# ---- Pictures: a and b are (H, W, 3), uint8 or float, 0..255, of one size ----


def l1(a: np.ndarray, b: np.ndarray) -> float:
    """mean |a - b| / (H W): the field's "L1 (E-04)", 0 best. At 256 x 256, 2.12E-04 is 13.9 gray levels."""
    return float(np.abs(np.float64(a) - b).mean() / (a.shape[-3] * a.shape[-2]))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """20 log10(255 / sqrt(mean (a - b)^2)) in dB; inf for equal pictures."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.square(np.float64(a) - b).mean()))


def psnr_overflow(a: np.ndarray, b: np.ndarray) -> float:
    """The "PSNR" of many published tables: as `psnr`, but a - b and its square wrap around in uint8.

    About 28 dB for almost anything, inf for pictures 16 levels apart: to compare with print, not to judge.
    """
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"psnr_overflow is a fault of uint8 and was given {a.dtype} and {b.dtype}: use psnr")
    difference = a - b
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / (difference * difference).mean()))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of the gray (Rec. 601) pictures, uint8 only, 7 x 7 uniform window, in [-1, 1]."""
    from skimage.metrics import structural_similarity

    if min(a.shape[:2]) < 7:
        raise ValueError(f"a frame is {a.shape[1]}x{a.shape[0]} and SSIM's window 7x7: give larger ones")
    gray = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (a, b)]
    return float(structural_similarity(*gray, data_range=255))


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float:
    weight = np.broadcast_to(np.float64(mask)[..., None], values.shape)
    return float((weight * values).sum() / weight.sum()) if weight.any() else float("nan")


def masked_l1(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """sum m |a - b| / sum m in gray levels, 0..255. mask: (H, W), bool or weights in [0, 1]; all 0: NaN."""
    return masked_mean(np.abs(np.float64(a) - b), mask)


def masked_psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """20 log10(255 / sqrt(sum m (a - b)^2 / sum m)) in dB; inf if equal where the mask is, NaN if it is 0."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.float64(masked_mean(np.square(np.float64(a) - b), mask))))


# ---- Features and points ----


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|mean x - mean y|^2 + tr(Sx + Sy - 2 (Sx Sy)^1/2), S the sample covariance; 0 best.

    x: (n, D), y: (m, D), n and m > 1. With X = centred x / sqrt(n - 1), tr (Sx Sy)^1/2 is the sum of the
    singular values of X Y^T: exact for singular covariances too, where a matrix square root turns complex.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs at least 2 features and there are {len(x)} and {len(y)}")
    x, y = np.float64(x), np.float64(y)
    a, b = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (x, y))
    a, b = np.linalg.qr(a, mode="r"), np.linalg.qr(b, mode="r")  # at most D rows, the same X^T X
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(np.square(x.mean(0) - y.mean(0)).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def mean(values: list[float]) -> float:
    """Of those that are no NaN; NaN if none is left."""
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def face_identity(embeddings: list, reference: np.ndarray | None) -> float:
    """FIS: mean over frames of cos(embedding, reference), in [-1, 1]. Embeddings (D,), None where no face is.

    Paper silent: frames without a face are skipped; NaN if all are, or if the reference has none.
    """
    return mean([cosine(e, reference) for e in embeddings if e is not None and reference is not None])


def face_stability(embeddings: list) -> float:
    """FTS: mean of cos(embedding, next frame's); pairs that lack a face are skipped, NaN if all do."""
    return mean([cosine(a, b) for a, b in pairwise(embeddings) if a is not None and b is not None])


def shared_points(driver: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """(T, K) bool: the keypoints (x, y, score), (T, K, 3), whose score is above 0.3 in both."""
    return (driver[..., 2] > SEEN) & (generated[..., 2] > SEEN)


def keypoint_consistency(driver: np.ndarray, generated: np.ndarray, diagonal: float | None = None) -> float:
    """PLC, FLC: mean over frames of (mean distance of shared points / diagonal); 0 best, NaN if none shared.

    driver, generated: (T, K, 3), x, y in pixels of one canvas, and a score; points below 0.3 are left out.
    Paper silent: the diagonal is that of the box of the driver's points, frame by frame, or the one given.
    """
    both, distances = shared_points(driver, generated), []
    for ours, theirs, shared in zip(driver, generated, both):
        box = np.ptp(ours[ours[:, 2] > SEEN, :2], axis=0) if shared.any() else np.zeros(2)
        unit = diagonal or np.hypot(*box)
        if shared.any() and unit > 0:  # one visible point spans no box
            distances.append(np.linalg.norm((ours - theirs)[shared, :2], axis=1).mean() / unit)
    return mean(distances)


def remove_similarity(driver: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """`generated` moved onto `driver`, (T, K, 3), by the one scale and shift a clip that make size and centre equal.

    Differs: A.4 compares the points as they are; but another person has another size and place, which is no error of
    motion. Over all shared points, scale^2 = sum |p - mean p|^2 / sum |q - mean q|^2. Least squares would be wrong: it
    shrinks someone who moves differently to a point. NaN if all points coincide.
    """
    shared = shared_points(driver, generated)
    if not shared.any():
        return generated
    p, q = driver[shared, :2], generated[shared, :2]
    p0, q0 = p.mean(0), q.mean(0)
    spread = np.square(q - q0).sum()
    scale = np.sqrt(np.square(p - p0).sum() / spread) if spread else np.nan
    return np.concatenate((scale * (generated[..., :2] - q0) + p0, generated[..., 2:]), -1)


# ---- Networks: each loader gives a function of pictures (H, W, 3) uint8 RGB ----


def on_device(network) -> tuple:
    """-> the network, and uint8 (..., H, W, 3) -> (1, 3, ..., H, W) in [0, 1] beside it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.eval().to(device), lambda x: torch.from_numpy(x).to(device).movedim(-1, 0)[None] / 255


def load_lpips() -> Callable:
    """(a, b) -> LPIPS of inputs in [0, 1], as most papers feed them, and in [-1, 1], as it was trained."""
    import torch
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network, unit = on_device(LearnedPerceptualImagePatchSimilarity(net_type="vgg"))

    @torch.inference_mode()
    def distances(a, b) -> tuple[float, float]:
        a, b = unit(a), unit(b)
        return float(network(a, b)), float(network(2 * a - 1, 2 * b - 1))

    return distances


def load_inception() -> Callable:
    """picture -> (2048,), by pytorch-fid's Inception, which resizes to 299 x 299."""
    import torch
    from pytorch_fid.inception import InceptionV3

    network, unit = on_device(InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]))
    return torch.inference_mode()(lambda picture: network(unit(picture))[0].flatten().cpu().numpy())


def load_i3d(path: Path | None) -> Callable:
    """(16, 224, 224, 3) -> (400,), logits of Kinetics-400; ValueError if `path` holds another network."""
    import torch

    if path is None:
        raise FileNotFoundError("no --i3d FILE is given")
    try:
        network, unit = on_device(torch.jit.load(str(path), map_location="cpu"))
        options = {"rescale": False, "resize": False, "return_features": True}
        run = torch.inference_mode()(lambda clip: network(2 * unit(clip) - 1, **options)[0].cpu().numpy())
        if run(np.zeros((WINDOW, 224, 224, 3), np.uint8)).ndim != 1:
            raise ValueError("its features are not vectors")
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"--i3d {path} is not the torchscript of {I3D_URL} ({brief(error)})") from None
    return run


def i3d_picture(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (224, 224, 3), uint8, by PIL's antialiased bicubic, as the field's FVD."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC))


def load_face(model: str | None) -> Callable:
    """picture -> (embedding (D,) or None, landmarks (K, 3)) of the largest face, by an insightface pack.

    K = 68 if the pack has a 68-point model, else the detector's 5; all 0 where no face is. Faces that fill
    the frame are looked for once more with a margin, since detectors miss them.
    """
    name = model or "buffalo_l"
    try:
        app = load_insightface(Path(name), "detection", "recognition", "landmark_3d_68")
        if "recognition" not in app.models:
            raise ValueError("it has no ArcFace network")
        dense = "landmark_3d_68" in app.models
    except Exception as error:  # noqa: BLE001  insightface asserts, onnxruntime has its own
        kind = ValueError if model else OSError
        raise kind(f"--face-model {name} is not an insightface pack ({brief(error)})") from None

    def look(picture) -> tuple[np.ndarray | None, np.ndarray]:
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        for pad in (0, max(picture.shape) // 4):
            faces = app.get(cv2.copyMakeBorder(bgr, pad, pad, pad, pad, cv2.BORDER_CONSTANT))
            if faces:
                face = max(faces, key=lambda f: np.prod(f.bbox[2:] - f.bbox[:2]))
                xy = (face.landmark_3d_68 if dense else face.kps)[:, :2] - pad
                return face.normed_embedding, np.column_stack((xy, np.ones(len(xy))))
        return None, np.zeros((68 if dense else 5, 3))

    return look


def load_body() -> Callable:
    """picture -> (None, joints (17, 3)) of the largest person, COCO's, by torchvision's Keypoint R-CNN.

    Differs: the paper's are DWPose's. All 0 where nobody is. Scores are 1 or 0: the network's are logits, which Detectron cuts at 2.
    """
    import torch
    from torchvision.models import detection

    weights = detection.KeypointRCNN_ResNet50_FPN_Weights.DEFAULT
    network, unit = on_device(detection.keypointrcnn_resnet50_fpn(weights=weights))

    @torch.inference_mode()
    def look(picture) -> tuple[None, np.ndarray]:
        found = {name: value.cpu().numpy() for name, value in network(unit(picture))[0].items()}
        area = np.prod(found["boxes"][:, 2:] - found["boxes"][:, :2], axis=1) * (found["scores"] > 0.5)
        if not area.any():
            return None, np.zeros((17, 3))
        k = area.argmax()
        return None, np.column_stack((found["keypoints"][k, :, :2], found["keypoints_scores"][k] > 2))

    return look


# ---- The rows of the table ----

PYTORCH = "https://download.pytorch.org/models/"
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
NETWORKS = {  # loader of args, the metrics that need it, where its weights are
    "skimage": (lambda args: __import__("skimage.metrics"), "ssim", "pip install -r requirements-eval.txt"),
    "lpips": (lambda args: load_lpips(), "lpips", f"{PYTORCH}vgg16-397923af.pth"),
    "inception": (lambda args: load_inception(), "fid", INCEPTION),
    "i3d": (lambda args: load_i3d(args.i3d), "fvd", I3D_URL),
    "face": (lambda args: load_face(args.face_model), "fis fts flc", "give --face-model a folder"),
    "body": (lambda args: load_body(), "plc", f"{PYTORCH}keypointrcnn_resnet50_fpn_coco-fc266e95.pth"),
}
FACELESS = "no face in any frame, or none in the reference"
APART = "no frame shows a point of both"
OURS = "ours, as the paper's needs DWPose: mean distance / diagonal of the driver's points"
SIZE = "at the truth's size or --size; the field prints 256x256"
ROWS = {  # row: the metrics that ask for it, name, definition, why a clip may lack it
    "ssim": ("ssim", "SSIM ↑", f"skimage, gray uint8, 7x7 window, {SIZE}", ""),
    "psnr": ("psnr", "PSNR ↑", f"dB, float64, {SIZE}; inf if one frame is equal", ""),
    "psnr_uint8": ("psnr", "PSNR, uint8 overflow", "dB, wraps around, as in many papers' tables", ""),
    "l1": ("l1", "L1 (E-04) ↓", "mean of abs(a - b), 0..255, / 256^2, both squeezed to 256x256", ""),
    "lpips": ("lpips", "LPIPS ↓", f"VGG, inputs in [0, 1], as in most papers' tables, {SIZE}", ""),
    "lpips_normalized": ("lpips", "LPIPS, normalized ↓", "VGG, inputs in [-1, 1], as it was trained", ""),
    "fid": ("fid", "FID ↓", "pytorch-fid, 2048-d, all frames pooled", "fewer than 2 frames"),
    "fvd": (
        "fvd",
        "FVD ↓",
        "I3D 400-d logits, all runs of 16 frames, pooled",
        "fewer than 2 runs of 16 frames",
    ),
    "fis": ("fis", "FIS ↑", "cos(ArcFace(frame), ArcFace(reference))", FACELESS),
    "fts": ("fts", "FTS ↑", "cos(ArcFace(frame), ArcFace(next frame))", "no two faces in a row"),
    "face_rate": ("fis fts", "faces found", "share of generated frames; FIS and FTS skip the others", ""),
    "plc": ("plc", "PLC, our variant ↓", f"{OURS}, 17 COCO joints or those of --keypoints", APART),
    "plc_image": ("plc", "PLC / frame ↓", "the same / diagonal of the frame", APART),
    "plc_rate": ("plc", "joints compared", "share of those seen in the driver", APART),
    "flc": ("flc", "FLC, our variant ↓", f"{OURS}, insightface's landmarks or those of --keypoints", APART),
    "flc_image": ("flc", "FLC / frame ↓", "the same / diagonal of the frame", APART),
    "flc_rate": ("flc", "landmarks compared", "share of those seen in the driver", APART),
    "masked_l1": ("masked", "L1 in the mask ↓", "gray levels, 0..255", "the masks are empty"),
    "masked_psnr": ("masked", "PSNR in the mask ↑", "dB, float64", "the masks are empty"),
}
METRICS = tuple(dict.fromkeys(metric for row in ROWS.values() for metric in row[0].split()))


def load_networks(args) -> tuple[dict, dict]:
    """-> {network: function}, {metric: why it cannot run}; ValueError where a file the user gave is wrong."""
    networks, why = {}, {} if args.masks else {"masked": "no --masks"}
    for name, (loader, metrics, weights) in NETWORKS.items():
        needed = [m for m in metrics.split() if m in args.metrics and not (m in KIND and args.keypoints)]
        if not needed:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # insightface chats
                networks[name] = loader(args)
        except ImportError as error:
            why |= dict.fromkeys(needed, f"{error.name} is missing: pip install -r requirements-eval.txt")
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001  urllib, requests, torch and pickle each have their own
            reason = f"its weights can be neither read nor fetched ({brief(error)}): {weights}"
            why |= dict.fromkeys(needed, reason)
    return networks, why


# ---- One clip ----


class Clip(NamedTuple):
    name: str
    paths: dict[str, Path]  # generated, truth, and if given driver (else the truth drives) and masks
    reference: np.ndarray  # (H, W, 3), whom FIS expects
    points: dict[str, np.ndarray] | None  # given keypoints (T, K, 3): driver_body, generated_body, ..._face


def together(clip: Clip) -> Iterator[dict[str, np.ndarray]]:
    """{"generated", "truth", "driver", "masks": picture} frame by frame; ValueError if one ends early."""
    for index, pictures in enumerate(zip_longest(*map(Video, clip.paths.values()))):
        frame = dict(zip(clip.paths, pictures))
        ended = [str(clip.paths[role]) for role in frame if frame[role] is None]
        if ended:
            raise ValueError(f"{ended[0]} ends after {index} frames, the others go on: give all the same length")
        yield {"driver": frame["truth"], **frame}


def compare(a, b, mask, metrics, networks) -> dict[str, float]:
    """The picture rows of one frame: generated and true picture and perhaps mask (H, W), of one size."""
    rows = {}
    if "ssim" in metrics:
        rows["ssim"] = ssim(a, b)
    if "psnr" in metrics:
        rows["psnr"], rows["psnr_uint8"] = psnr(a, b), psnr_overflow(a, b)
    if "l1" in metrics:
        rows["l1"] = l1(resize(a, 256, 256), resize(b, 256, 256))
    if "lpips" in metrics:
        rows["lpips"], rows["lpips_normalized"] = networks["lpips"](a, b)
    if "masked" in metrics:
        rows["masked_l1"], rows["masked_psnr"] = masked_l1(a, b, mask), masked_psnr(a, b, mask)
    return rows


def point_rows(driver, generated, driver_size, size, cross_id: bool) -> dict[str, float]:
    """PLC or FLC, for keypoints (T, K, 3), each in pixels of its own video, whose (H, W) follow."""
    xy = to_canvas(np.tile(driver[..., :2], 2), driver_size, size)[..., :2]  # letterboxed as by sample.py
    driver = np.concatenate((xy, driver[..., 2:]), -1)
    rate = shared_points(driver, generated).sum() / max((driver[..., 2] > SEEN).sum(), 1)
    if cross_id:
        generated = remove_similarity(driver, generated)
    by_image = keypoint_consistency(driver, generated, np.hypot(*size))
    return {"": keypoint_consistency(driver, generated), "_image": by_image, "_rate": float(rate)}


def person_rows(clip: Clip, looks: dict, frame: dict, metrics, networks, cross_id: bool) -> dict[str, float]:
    """FIS, FTS, PLC and FLC. looks: {"driver_body", ...: what a network said of each frame}."""
    rows = {}
    if "fis" in metrics or "fts" in metrics:
        embeddings = [embedding for embedding, _ in looks["generated_face"]]
        rows["face_rate"] = mean([embedding is not None for embedding in embeddings])
        if "fis" in metrics:
            rows["fis"] = face_identity(embeddings, networks["face"](clip.reference)[0])
        if "fts" in metrics:
            rows["fts"] = face_stability(embeddings)
    found = clip.points or {key: np.stack([points for _, points in look]) for key, look in looks.items()}
    for metric in KIND.keys() & set(metrics):
        pair = [found.get(f"{role}_{KIND[metric]}") for role in ("driver", "generated")]
        if all(points is not None for points in pair):
            sizes = frame["driver"].shape[:2], frame["generated"].shape[:2]
            rows |= {metric + row: value for row, value in point_rows(*pair, *sizes, cross_id).items()}
    return rows


def measure(clip: Clip, metrics, networks: dict, size: int | None = None, cross_id: bool = False) -> tuple:
    """-> {row: number, NaN where the clip lacks it}, {"fid", "fvd": (generated, true features (n, D))}."""
    rows, looks, recent = defaultdict(list), defaultdict(list), deque(maxlen=WINDOW)
    features = {metric: ([], []) for metric in ("fid", "fvd") if metric in metrics}
    looked = {"generated_face"} if "fis" in metrics or "fts" in metrics else set()
    if not clip.points:
        looked |= {f"{role}_{KIND[m]}" for m in KIND if m in metrics for role in ("driver", "generated")}
    for index, frame in enumerate(together(clip)):
        height, width = (size, size) if size else frame["truth"].shape[:2]
        pair = [cv2.resize(frame[role], (width, height)) for role in ("generated", "truth")]  # bilinear
        mask = None
        if "masked" in metrics:
            mask = np.uint8(read_mask(frame["masks"], *frame["truth"].shape[:2])[0])
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        for row, value in compare(*pair, mask, metrics, networks).items():
            rows[row].append(value)
        for side, picture in zip(features.get("fid", ()), pair):
            side.append(networks["inception"](picture))
        if "fvd" in metrics:
            recent.append([i3d_picture(picture) for picture in pair])
            if len(recent) == WINDOW:
                for side, window in zip(features["fvd"], zip(*recent)):
                    side.append(networks["i3d"](np.stack(window)))
        for key in looked:
            role, kind = key.split("_")
            looks[key].append(networks[kind](frame[role]))
    for key, points in (clip.points or {}).items():
        if len(points) != index + 1:
            raise ValueError(f"{key} of {clip.name} has {len(points)} frames and its video {index + 1}")
    numbers = {row: mean(values) for row, values in rows.items()}
    return numbers | person_rows(clip, looks, frame, metrics, networks, cross_id), features


# ---- Which clips ----


def members(folder: Path, suffixes: tuple) -> dict[str, Path]:
    """{name without suffix: path} of the folders, and of the files with one of the suffixes, in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() in suffixes):
            name = path.name if path.is_dir() else path.stem
            if name in found:
                raise ValueError(f"{folder} has both {found[name].name} and {path.name}: rename one")
            found[name] = path
    if not found:
        raise ValueError(f"{folder} holds nothing to evaluate: fill it with {', '.join(suffixes)} files")
    return found


def is_many(path: Path, suffixes: tuple = FILMS) -> bool:
    """Whether `path` is a folder to search by name; a folder of pictures, and no films, is one clip, its frames."""
    found = {f.suffix.lower() for f in path.iterdir()} if path.is_dir() else set()
    frames = suffixes == FILMS and found & set(PICTURES) and not found & set(FILMS)
    return path.is_dir() and not frames


def partners(flag: str, path: Path, names: dict, many: bool, suffixes: tuple = FILMS) -> dict[str, Path]:
    """{name: path} for the generated clips' names: one file serves all of them, but as TRUTH."""
    if is_many(path, suffixes) != many and (flag == "TRUTH" or not many):
        kind = "a folder of clips" if many else "one clip"
        raise ValueError(f"GENERATED is {kind} and {flag} {path} is not: give two of a kind")
    if not is_many(path, suffixes):
        return dict.fromkeys(names, path)
    found = members(path, suffixes)
    lone = sorted(set(names) - set(found)) + sorted(set(found) - set(names)) * (flag == "TRUTH")
    if lone:
        raise ValueError(f"GENERATED and {flag} {path} pair by name, and no partner has {', '.join(lone)}")
    return {name: found[name] for name in names}


def read_points(path: Path) -> dict[str, np.ndarray]:
    """.npz of driver_body and generated_body, or driver_face and generated_face, or all: see --keypoints."""
    try:
        with np.load(path) as file:
            names, wanted = file.files, [f"{role}_{kind}" for kind in KIND.values() for role in ("driver", "generated")]
            points = {key: np.float64(file[key]) for key in wanted if key in names}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--keypoints {path} is not an .npz of arrays ({brief(error)})") from None
    for kind in KIND.values():
        shapes = [points[key].shape for key in (f"driver_{kind}", f"generated_{kind}") if key in points]
        if len(shapes) == 1 or shapes and (shapes[0] != shapes[1] or shapes[0][2:] != (3,)):
            raise ValueError(f"--keypoints {path}: driver_{kind} and generated_{kind} must both be (T, K, 3)")
    if not points.keys() & {"driver_body", "driver_face"}:
        raise ValueError(f"--keypoints {path} has neither driver_body nor driver_face, only {names}")
    return points


def find_clips(args) -> list[Clip]:
    many = is_many(args.generated)
    name = args.generated.name if args.generated.is_dir() else args.generated.stem
    names = members(args.generated, FILMS) if many else {name: args.generated}
    given = {"generated": names, "truth": partners("TRUTH", args.truth, names, many)}
    for role in ("driver", "masks"):
        if getattr(args, role):
            given[role] = partners(f"--{role}", getattr(args, role), names, many)
    pictures = given["truth"]
    if args.reference:
        pictures = partners("--reference", args.reference, names, many, PICTURES + FILMS)
    points = partners("--keypoints", args.keypoints, names, many, (".npz",)) if args.keypoints else {}
    clips = []
    for name in names:
        still = pictures[name].suffix.lower() in PICTURES
        reference = read_image(pictures[name]) if still else next(iter(Video(pictures[name])))
        paths = {role: found[name] for role, found in given.items()}
        lengths = {path: Video(path).frames for path in paths.values()}  # before hours of work, not amid them
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{path} {length} frames" for path, length in lengths.items())
            raise ValueError(f"clips of one name must be of one length, not {said}")
        clips.append(Clip(name, paths, reference, read_points(points[name]) if points else None))
    return clips


# ---- All clips ----


def summarise(numbers: dict, features: dict, metrics, why: dict) -> dict:
    """{row: {"mean", "clips": names, "definition"} or {"not_run": why}}, rows in the table's order.

    numbers: {clip: {row: number}}; features: {"fid", "fvd": {clip: (generated, true features (n, D))}}.
    """
    summary = {}
    for row, (asking, _, definition, lacking) in ROWS.items():
        asked = [metric for metric in asking.split() if metric in metrics]
        clips = [name for name, rows in numbers.items() if not np.isnan(rows.get(row, np.nan))]
        value = mean([numbers[name][row] for name in clips])
        if row in features:
            clips = [name for name, sides in features[row].items() if sides[0]]
            x, y = ([v for name in clips for v in features[row][name][side]] for side in (0, 1))
            value = frechet_distance(x, y) if len(x) > 1 else np.nan
            definition += f"; {len(x)} features" + ", too few: biased upwards" * (len(x) <= np.size(x[:1]))
        if asked and np.isnan(value):
            summary[row] = {"not_run": why.get(asked[0], lacking)}
        elif asked:
            summary[row] = {"mean": value, "clips": clips, "definition": definition}
    return summary


def table(summary: dict) -> str:
    """Markdown; beside each mean the clips it stands on, the first ten by name."""
    lines = ["| metric | mean | clips | definition |", "|---|---|---|---|"]
    for row, entry in summary.items():
        value, names = entry.get("mean", 0) * (1e4 if row == "l1" else 1), entry.get("clips", [])
        listed = ", ".join(names[:10]).replace("|", "\\|") + ", ... (all with -o)" * (len(names) > 10)
        cells = [f"{value:.4g}", f"{len(names)}: {listed}", entry.get("definition")]
        cells = [f"not run: {entry['not_run']}", "0", ROWS[row][2]] if "not_run" in entry else cells
        lines.append(f"| {' | '.join([ROWS[row][1], *cells])} |")
    return "\n".join(lines)


def save(result: dict, path: Path) -> None:
    """Strict JSON, which has neither NaN nor inf: they become null (the clip lacks the number) and "inf"."""
    text = json.dumps(result, default=str)
    plain = json.loads(text, parse_constant=lambda name: None if name == "NaN" else "inf")
    with atomic(path, ".json") as part:
        part.write_text(json.dumps(plain, indent=1, ensure_ascii=False), encoding="utf-8")


def check_flags(args) -> None:
    """ValueError for a flag that nothing would read, OSError for a path that leads nowhere."""
    readers = {"driver": "plc flc", "cross_id": "plc flc", "keypoints": "plc flc", "reference": "fis",
               "face_model": "fis fts" + " flc" * (not args.keypoints), "i3d": "fvd", "masks": "masked"}  # fmt: skip
    for flag, metrics in readers.items():
        if getattr(args, flag) and not set(metrics.split()) & set(args.metrics):
            raise ValueError(f"--{flag.replace('_', '-')} serves only {metrics}: drop it or add to --metrics")
    if args.cross_id and (true := [m for m in args.metrics if m not in ("fis", "fts", "plc", "flc")]):
        raise ValueError(f"across identities there is no truth for {','.join(true)}: give --metrics fis,fts,plc,flc")
    if args.cross_id and "fis" in args.metrics and not args.reference:
        raise ValueError("across identities the truth's face is the driver's: give FIS the person by --reference")
    for name in ("generated", "truth", "driver", "masks", "reference", "keypoints", "i3d"):
        path = getattr(args, name)
        if path and not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give another {name}")
    least, metric = (16, "LPIPS") if "lpips" in args.metrics else (7, "SSIM")
    if args.size is not None and args.size < least:
        raise ValueError(f"--size {args.size} is below what {metric} can see: give at least {least}")
    if args.output:
        check_output(args.output, args.generated, args.truth, suffixes=(".json",))


def evaluate(args) -> None:
    from tqdm import tqdm

    check_flags(args)
    clips = find_clips(args)
    networks, why = load_networks(args)
    if args.keypoints:
        held = set().union(*(clip.points for clip in clips))
        why |= {m: f"--keypoints has no driver_{part}" for m, part in KIND.items() if f"driver_{part}" not in held}
    runnable = [metric for metric in args.metrics if metric not in why]
    numbers, features = {}, {metric: {} for metric in ("fid", "fvd") if metric in runnable}
    skipped = {}
    for clip in tqdm(clips, unit="clip"):
        try:
            numbers[clip.name], found = measure(clip, runnable, networks, args.size, args.cross_id)
        except (ValueError, OSError) as error:
            if len(clips) == 1:
                raise
            skipped[clip.name] = str(error)
            tqdm.write(f"{clip.name}: skipped, {error}", file=sys.stderr)
            continue
        for metric, sides in found.items():
            features[metric][clip.name] = sides
    if not numbers:
        raise ValueError(f"none of the {len(clips)} clips can be measured")
    summary = summarise(numbers, features, args.metrics, why)
    print(table(summary))
    if skipped:
        print(f"{len(skipped)} of {len(clips)} clips skipped: {', '.join(skipped)}")
    if args.output:
        paths = {clip.name: clip.paths for clip in clips}
        save(
            {"arguments": vars(args), "mean": summary, "clips": numbers, "skipped": skipped, "paths": paths},
            args.output,
        )


def metric_names(text: str) -> list[str]:
    for name in text.split(","):
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1, 0)[0]
            raise argparse.ArgumentTypeError(f"{name!r} is none of {','.join(METRICS)}: try {near}")
    return text.split(",")


def parse_args(argv=None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(__doc__, formatter_class=argparse.HelpFormatter)
    add = parser.add_argument
    path = {"type": Path, "metavar": "PATH"}
    add("generated", type=Path, help="video, folder of numbered frames, or folder of such clips")
    add("truth", type=Path, help="the same for the true clips, paired by name")
    add("-o", "--output", type=Path, metavar="FILE", help="JSON: all numbers, clip by clip (default: none)")
    add("--metrics", type=metric_names, default=list(METRICS), help=f"default: {','.join(METRICS)}")
    add("--size", type=whole(1, 4096), metavar="N", help="squeeze to N x N before all picture metrics (default: not)")
    add("--masks", **path, help="mask pictures, white where the person is, for the numbers in the mask")
    add("--driver", **path, help="driving clips, for PLC and FLC (default: the truth)")
    add("--reference", **path, help="picture of the person, for FIS (default: the truth's first frame)")
    add("--cross-id", action="store_true", help="PLC, FLC: remove one scale and shift a clip first")
    arrays = "driver_body, generated_body, driver_face, generated_face, each (T, K, 3) of x, y in pixels, score"
    add("--keypoints", **path, help=f"NAME.npz of {arrays}: for PLC, FLC without networks (default: none)")
    add("--face-model", metavar="PACK", help="insightface folder or name (default: buffalo_l, fetched once)")
    add("--i3d", **path, help=f"FVD's network, a torchscript file: {I3D_URL} (default: no FVD)")
    return parser, parser.parse_args(argv)


def main(argv=None) -> None:
    parser, args = parse_args(argv)
    try:
        evaluate(args)
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: {error.name} is missing: pip install -r requirements-eval.txt\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped; nothing was written\n")


if __name__ == "__main__":
    main()
