"""Real data: videos to a data folder (Sec. 4.1), pseudo cues of other identities (A.3), a check of both.

    python data.py prepare VIDEOS -o DATA --backbone DIR      # resumable; torchrun shares the videos out
    python data.py add-pseudo DATA --body DIR --face DIR      # other people performing the clips, filtered
    python data.py check DATA                                 # every file of it, and a contact sheet

Beside clips.jsonl and cache/:

    DATA/videos/ID.mp4         the clip, for the programs that make pseudo videos of it
    DATA/cues/ID/track.npz     masks, boxes and scores of every frame: cues.Track
    DATA/cues/ID/clip.json     the clip's line of clips.jsonl, or why it was skipped; written last
    DATA/cues/ID/pseudo.json   what became of each of its pseudo videos
    DATA/skipped.jsonl, DATA/pseudo.jsonl      all that was skipped; all pseudo videos, kept or why not
    DATA/prepare.json          what all clips of the folder share
    DATA/null_text.safetensors   T5's states of "", which a dropped prompt becomes
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import cues
import finder
from align import centre, warp
from data import (
    ASSETS,
    DAMAGED,
    OWN_PLACE,
    encode_clip,
    keyed,
    pseudo_latents,
    read_lines,
    remember,
    save_cache,
    toy_text,
)
from data import write_text
from load_cogvideox import load_text_encoder, load_tokenizer, load_vae, load_weights, read_json
from machine import lock, pick_device
from text import T5_PRESETS, T5Encoder, empty_prompt
from vae import VAE_PRESETS, CausalVAE, frame_count_error
from video import PICTURES, Video, area, check_output, letterbox, natural, real, output_size, rate, resize, write_image
from video import write_video

ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2)  # width / height of the buckets


# ---- files ----------------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks) of this process; torchrun sets both."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def hold(folder: Path, rank: int):
    """The lock of a data folder, one for each rank: two programs at once would pull clips from under each other."""
    held = lock(folder / f".lock-{rank}")
    if held is None:
        raise ValueError(f"{folder}: another data.py works there; wait until it is done")
    return held


def assemble(folder: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """clips.jsonl, skipped.jsonl and pseudo.jsonl from the clips' own files -> their lines.

    Every rank does this when it is done and waits for nobody: the last one has it all. One that was overtaken
    while it wrote would leave an old list behind, so it looks again.
    """
    read = lambda name: [read_json(p) for p in sorted(folder.glob(f"cues/*/{name}"))]
    found = None
    while found != (found := (read("clip.json"), read("pseudo.json"))):
        clips = [line for line in found[0] if "skipped" not in line]
        skipped = [line for line in found[0] if "skipped" in line]
        verdicts = [line for file in found[1] for line in file["verdicts"]]
        for name, lines in (("clips", clips), ("skipped", skipped), ("pseudo", verdicts)):
            if lines or name == "clips" or (folder / f"{name}.jsonl").exists():
                write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return clips, skipped, verdicts


def inputs(path: Path) -> Iterator[tuple[str, Path, Path]]:
    """(name, video, caption file) of a file, or of all in a folder. A folder of pictures is one video, and so
    is NAME/images, as the TikTok data set has it."""
    if not path.is_dir():
        yield path.stem, path, path.with_suffix(".txt")
        return
    path = path.resolve()
    files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    pictures = sum(p.suffix.lower() in PICTURES for p in files)
    frames = path if pictures > len(files) / 2 else path / "images"
    if frames.is_dir():
        yield path.name, frames, path.with_name(path.name + ".txt")
        return
    captions = {p.with_suffix(".txt") for p in files if p.suffix != ".txt"}
    captions |= {p.with_name(p.name + ".txt") for p in files if p.is_dir()}
    for file in files:
        if file not in captions:
            yield from inputs(file)


def all_inputs(paths: list[Path]) -> list[tuple[str, Path, Path]]:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give videos, or folders of them")
    videos = [video for path in paths for video in inputs(path)]
    names = {}
    for name, source, _ in videos:
        if names.setdefault(name, source) != source:
            raise ValueError(f"{names[name]} and {source} would make clips of one name: rename one of them")
        if name.encode(errors="replace").decode() != name:
            raise ValueError(f"{ascii(str(source))}: its name is not UTF-8, as the names of clips are: rename it")
    return sorted(set(videos))


def volume(source: Path) -> int:
    """Bytes of a video, or pictures of a folder: enough to tell two films of one name apart."""
    return sum(1 for _ in source.iterdir()) if source.is_dir() else source.stat().st_size


def check_taken(folder: Path, name: str, source: Path) -> None:
    """ValueError if clips of this name are of another video, which an earlier run saw: its own would never be made."""
    for id in (name, f"{name}_000000"):  # it could not be read; or it could, then something begins at its first frame
        record = folder / "cues" / id / "clip.json"
        line = json.loads(record.read_text()) if record.exists() else {}
        if line.get("volume", volume(source)) != volume(source):
            raise ValueError(
                f"{source} and {line['video']}, of which {folder} has clips, share a name: rename one of them"
            )


def named(folder: Path, name: str) -> Path:
    """The file or folder NAME or NAME.* in `folder`."""
    found = [p for p in sorted(folder.iterdir()) if name in (p.name, p.stem)]
    if not found:
        raise ValueError(f"{folder} has no masks called {name}")
    return found[0]


def split_of(name: str, held_out: float) -> str:
    """The paper's split of the TikTok data set, folders 00001 to 00340: 1-334 train, 335-340 test. Of other
    videos a share is held out, chosen by their names, so that more videos do not move the old ones."""
    if re.fullmatch(r"\d{5}", name) and 1 <= int(name) <= 340:
        return "test" if int(name) > 334 else "train"
    return "test" if crc32(name.encode()) / 2**32 < held_out else "train"


# ---- networks -------------------------------------------------------------------------------------------


def open_vae(backbone, preset, device, dtype) -> CausalVAE:
    """The VAE of a backbone, or of a preset: the drawn world's, or random weights."""
    if preset == "toy":
        vae = load_weights(ASSETS / "toy-vae.safetensors")[0]
    elif preset == "tiny":
        torch.manual_seed(0)
        vae = CausalVAE(VAE_PRESETS["tiny"])
    else:
        vae = load_vae(backbone, dtype)
    return vae.to(device, dtype).eval()


def open_text_encoder(backbone, preset, device, dtype) -> Callable:
    """A function from a prompt to its T5 states (L, D); the presets have no tokenizer: null text."""
    if preset == "toy":
        return lambda prompt: toy_text()
    torch.manual_seed(1)
    t5 = T5Encoder(T5_PRESETS["tiny"]) if preset == "tiny" else load_text_encoder(backbone, dtype)
    tokenizer = None if preset == "tiny" else load_tokenizer(backbone)
    t5 = t5.to(device, dtype).eval()

    @lru_cache(maxsize=8)
    @torch.inference_mode()
    def encode_text(prompt: str) -> Tensor:
        ids = tokenizer([prompt]) if tokenizer and prompt else empty_prompt()
        return t5(ids.to(device))[0].cpu()

    return encode_text


def place(args) -> tuple[torch.device, torch.dtype]:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return pick_device(args.device, args.dtype)[:2]


def make_finder(args) -> finder.Finder:
    """Who finds person and face; masks, if there are any, come with each video."""
    if not args.masks:
        return finder.from_arguments(argparse.Namespace(**vars(args), reference_mask=None))
    if not Path(args.masks).is_dir():
        raise ValueError(f"--masks {args.masks}: give a folder that has masks for each video, under its name")
    if args.segmenter or args.sam or args.person:
        raise ValueError("--masks leaves nothing to find: drop --segmenter, --sam and --person")
    return finder.Finder(face_finder=finder.load_face_finder(args.face_model) if args.face_model else None)


def replay(track: cues.Track, matrix: np.ndarray) -> Callable:
    """A finder that has seen the clip already, for frames of the track's canvas that `matrix` (2, 3) stretched sideways."""
    stretch, _, shift = matrix[0]

    def find(frames: Iterable[np.ndarray]) -> Iterator[tuple]:
        for index, frame in enumerate(frames):
            mask = cv2.warpAffine(np.uint8(track.mask(index)), matrix, track.canvas[::-1], flags=cv2.INTER_NEAREST) > 0
            box = track.face_boxes[index] * [stretch, 1, stretch, 1] + [shift, 0, shift, 0]
            yield frame, finder.Person(mask, *track.scores[index, :2]), box

    return find


# ---- prepare: videos to clips ---------------------------------------------------------------------------


def bucket(height: int, width: int, area: int) -> tuple[int, int]:
    """(H, W) of the bucket whose aspect is nearest: about `area` pixels, multiples of 16."""
    aspect = min(ASPECTS, key=lambda aspect: abs(math.log(aspect * height / width)))
    return output_size(1, aspect, area)


def middle(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part of a picture with the aspect of height x width, at its own resolution."""
    fit = min(picture.shape[0] / height, picture.shape[1] / width)
    h, w = round(height * fit), round(width * fit)
    y, x = (picture.shape[0] - h) // 2, (picture.shape[1] - w) // 2
    return picture[y : y + h, x : x + w]


def pieces(pairs: Iterable[tuple], longest: int) -> Iterator[tuple[int, bool, list[tuple]]]:
    """Cut a stream of (frame, mask) where the scene changes, and after `longest` frames -> (index of the
    first frame, whether a scene begins there, the pairs)."""
    piece, start, fresh, last = [], 0, True, None
    for index, pair in enumerate(pairs):
        colours = cues.colours(pair[0])
        cut = last is not None and cues.is_cut(last, colours)
        if piece and (cut or len(piece) == longest):
            yield start, fresh, piece
            piece, start, fresh = [], index, cut
        piece.append(pair)
        last = colours
    if piece:
        yield start, fresh, piece


def read_pieces(args, name: str, source: Path) -> Iterator[tuple[int, float, bool, list[tuple]]]:
    """The pieces of a video at about --fps: (first source frame, frames a second, scene begins, pairs).

    Paper silent: every n-th frame, so that no frame is shown twice and motion stays even.
    """
    video, masks = Video(source, fps=args.folder_fps if source.is_dir() else None), repeat(None)
    if args.masks:
        masks = Video(named(Path(args.masks), name))
        if masks.frames != video.frames:
            raise ValueError(f"{source} has {video.frames} frames, {masks.path} {masks.frames} masks")
        finder.check_shape((masks.height, masks.width), video.height, video.width)
    stride = max(1, round(float(video.fps) / args.fps))
    for start, fresh, piece in pieces(islice(zip(video, masks), 0, None, stride), args.max_frames):
        yield start * stride, float(video.fps) / stride, fresh, piece


def prepare_clip(args, line: dict, piece: list[tuple], find: finder.Finder, vae, encode_text) -> str | None:
    """Write everything of one clip, clip.json last; or return why it is of no use.

    The person is looked for at native resolution. A run killed half-way leaves its files in .part; the next clears them.
    """
    folder, home = args.output, args.output / "cues" / line["id"]
    size = line["height"], line["width"]
    frames, masks = ([None if p is None else middle(p, *size) for p in part] for part in zip(*piece))
    video = np.stack([resize(frame, *size) for frame in frames])
    try:
        track = cues.analyse(frames, video[0], replace(find, masks=masks if args.masks else None), OWN_PLACE)
    except ValueError as error:
        return f"no person ({error})"
    kept = int(track.accepted.sum())
    if kept < len(frames) / 2:
        return f"{len(frames) - kept} of {len(frames)} frames are rejected"
    line |= {"accepted": kept, "faces": int(np.isfinite(track.face_boxes[:, 0]).sum()), "pseudo": []}

    key = (crc32(line["id"].encode()),)
    text = encode_text(line["prompt"])
    tensors = encode_clip(vae, video, ((frames, track),) * 2, [], text, key, args.variants, args.refs)
    part = home / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_cache(tensors, part / "cache")
    write_video(part / "clip.mp4", video, line["fps"], comment="a clip cut for training")
    track.save(part / "track.npz")
    (part / "clip.json").write_text(json.dumps(line) + "\n")
    os.replace(part / "cache", folder / "cache" / f"{line['id']}.safetensors")
    os.replace(part / "clip.mp4", folder / "videos" / f"{line['id']}.mp4")
    os.replace(part / "track.npz", home / "track.npz")
    os.replace(part / "clip.json", home / "clip.json")
    part.rmdir()


def prepare_video(args, name: str, source: Path, caption: Path, *networks) -> None:
    """Every clip of one video that is not there yet; what cannot be used is named with its reason."""

    record = lambda id: args.output / "cues" / id / "clip.json"

    def skip(id: str, reason: str) -> None:
        tqdm.write(f"skipped {id}: {reason}", file=sys.stderr)
        record(id).parent.mkdir(parents=True, exist_ok=True)
        line = {"id": id, "video": str(source), "volume": volume(source), "skipped": reason}
        write_text(record(id), json.dumps(line) + "\n")

    stream = read_pieces(args, name, source)
    while not (record(name).exists() and "skipped" in json.loads(record(name).read_text())):  # it could not be read
        try:
            start, fps, fresh, piece = next(stream)
            prompt = caption.read_text().strip() if caption.is_file() else args.caption
        except StopIteration:
            return
        except (ValueError, OSError) as error:
            return skip(name, str(error))
        id, frames = f"{name}_{start:06d}", (len(piece) - 1) // 8 * 8 + 1
        if record(id).exists():
            continue
        if frames < args.frames:
            if fresh:  # else it is what a long scene leaves over
                skip(id, f"too short: {len(piece)} of {args.frames} frames")
            continue
        height, width = bucket(*piece[0][0].shape[:2], args.area)
        line = {"id": id, "video": str(source), "volume": volume(source)}
        line |= {"split": split_of(name, args.held_out), "prompt": prompt}
        line |= {"start": start, "fps": fps, "frames": frames, "height": height, "width": width}
        if reason := prepare_clip(args, line, piece[:frames], *networks):
            skip(id, reason)


SHARED = ("backbone", "preset", "area", "frames", "max_frames", "fps", "held_out", "variants", "refs")


def prepare(args) -> None:
    """`python data.py prepare`: cut, find, encode, cache; run it again to go on, or with more videos."""
    if (args.preset is None) == (args.backbone is None):
        raise ValueError("give --backbone DIR (a local copy of CogVideoX1.5-5B-I2V) or --preset")
    if args.frames % 8 != 1:
        raise ValueError(f"--frames: {frame_count_error(args.frames)}")
    if args.max_frames < args.frames:
        raise ValueError(f"--max-frames {args.max_frames} must be at least --frames, {args.frames}")
    videos, (rank, world) = all_inputs(args.videos), rank_and_world()
    if not videos:
        raise ValueError(f"{', '.join(map(str, args.videos))}: no video there")
    for name, source, _ in videos:
        check_taken(args.output, name, source)
    for name in ("cache", "videos", "cues"):
        (args.output / name).mkdir(parents=True, exist_ok=True)
    held = hold(args.output, rank)  # noqa: F841
    device = place(args)  # first: what follows goes to this rank's GPU
    find = make_finder(args)
    vae = open_vae(args.backbone, args.preset, *device)
    encode_text = open_text_encoder(args.backbone, args.preset, *device)
    remember(args.output / "prepare.json", args, SHARED)  # not before: a folder need not keep a mistyped --backbone
    if rank == 0:
        save_cache({"text": encode_text("").to(torch.bfloat16)}, args.output / "null_text.safetensors")
    for video in tqdm(videos[rank::world], desc="prepare", unit="video", disable=rank > 0):
        prepare_video(args, *video, find, vae, encode_text)
    clips, skipped, _ = assemble(args.output)
    tests = sum(clip["split"] == "test" for clip in clips)
    print(f"{len(clips) - tests} training and {tests} test clips in {args.output}")
    if skipped:
        print(f"{len(skipped)} skipped, see {args.output}/skipped.jsonl; to try one again, delete cues/ID")


# ---- add-pseudo: other identities, the same motion (A.3) ------------------------------------------------


def sampled(where: np.ndarray, count: int = 8) -> np.ndarray:
    """Up to `count` of the frames where `where` holds, evenly spread."""
    frames = np.flatnonzero(where)
    return frames[np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int))]


def pose_agreement(own: cues.Track, other: cues.Track) -> float:
    """Mean IoU of both masks, centres aligned, over the clip's accepted frames; 0 where only it is."""
    overlaps = []
    for index in np.flatnonzero(own.accepted):
        a, b = own.mask(index), other.mask(index)
        if other.accepted[index]:
            b = warp(b, 1.0, centre(own.body_boxes[index]) - centre(other.body_boxes[index]))
        overlaps.append((a & b).sum() / (a | b).sum() * other.accepted[index])
    return float(np.mean(overlaps))


def sharpness(frames: list, track: cues.Track, kind: str) -> float:
    """Median variance of the Laplacian in the body's mask or the face's box, on the canvas; NaN: none."""
    values = []
    for index in sampled(track.accepted if kind == "body" else np.isfinite(track.face_boxes[:, 0])):
        gray = cv2.cvtColor(letterbox(frames[index], *track.canvas), cv2.COLOR_RGB2GRAY)
        inside = track.mask(index) if kind == "body" else finder.pixels(track.face_boxes[index])
        values.append(cv2.Laplacian(gray, cv2.CV_32F)[inside].var())
    return float(np.median(values)) if values else math.nan


def load_recogniser(args) -> Callable | None:
    """picture (H, W, 3) -> ArcFace embedding (D,), None without a face; None without an insightface model."""
    if str(args.face_model).endswith(".onnx") or args.masks and not args.face_model:
        print("no insightface model, so whether the identity has changed is not judged")
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it lists its files
        app = finder.load_insightface(Path(args.face_model or "buffalo_l"), "detection", "recognition")
    if "recognition" not in app.models:
        raise ValueError(f"--face-model {args.face_model} has no ArcFace network: take another, or a YuNet .onnx")

    def embed(picture: np.ndarray) -> np.ndarray | None:
        faces = app.get(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        return max(faces, key=lambda face: face.det_score).normed_embedding if faces else None

    return embed


def identity(frames: list, track: cues.Track, embed: Callable) -> np.ndarray:
    """Mean embedding of up to 8 faces, of unit length; NaN if none is recognised."""
    found = []
    for index in sampled(np.isfinite(track.face_squares[:, 0])):
        square = cues.to_canvas(track.face_squares[index], frames[index].shape, track.canvas, back=True)
        found.append(embed(cues.crop(frames[index], square, 256)))
    mean = np.mean([f for f in found if f is not None] or [[math.nan]], axis=0)
    return mean / np.linalg.norm(mean)


def verdict_on(args, kind: str, path: Path, own: tuple, find: finder.Finder, embed) -> tuple[dict, tuple | None]:
    """Is a pseudo video of use? -> its verdict ("reason" is None if so) and (frames, Track).

    Differs: the paper filters by hand. Here: as many frames as the clip, the same pose (bodies), a face
    nearly always where the clip shows one (faces), another identity, and no blur.
    """
    verdict = {"kind": kind, "video": path.name, "reason": None}
    try:
        frames, masks = list(Video(path)), None
        if len(frames) != len(own[0]):
            raise ValueError(f"{len(frames)} frames, the clip has {len(own[0])}")
        if args.masks:
            masks = Video(named(Path(args.masks) / kind, path.stem))
        elif kind == "face":  # it may show the face alone, which no person segmenter knows: look everywhere
            everywhere = [finder.Person(np.ones(frames[0].shape[:2], bool), 1.0, 1.0)]
            find = replace(find, person=None, segmenter=lambda frame, previous: everywhere)
        track = cues.analyse(frames, own[0][0], replace(find, masks=masks), OWN_PLACE)
    except (ValueError, OSError) as error:
        return verdict | {"reason": f"unusable: {error}"}, None
    scores = {"detail": sharpness(frames, track, kind) / (sharpness(*own, kind) or math.nan)}
    lowest, seen = {"detail": args.min_detail}, np.isfinite(own[1].face_boxes[:, 0])
    if kind == "body":
        scores["pose"], lowest["pose"] = pose_agreement(own[1], track), args.min_pose
    else:
        found = np.isfinite(track.face_boxes[seen, 0])
        scores["faces"], lowest["faces"] = float(found.mean()) if len(found) else 1.0, args.min_faces
    low = [name for name in lowest if scores[name] < lowest[name]]
    faults = [f"{name}: {scores[name]:.2f} is below {lowest[name]:g}" for name in low]
    if embed:
        scores["identity"] = float((identity(*own, embed) * identity(frames, track, embed)).sum())
        if scores["identity"] > args.max_identity:
            faults.append(f"identity: {scores['identity']:.2f} is above {args.max_identity:g}")
    scores = {name: None if math.isnan(score) else round(score, 4) for name, score in scores.items()}
    return verdict | scores | {"reason": "; ".join(faults) or None}, (frames, track)


def augmented(own: tuple, generator: np.random.Generator) -> tuple[list, cues.Track]:
    """The clip as if performed by somebody of other colours and width: (frames, Track).

    Differs: not the paper's pseudo cues; the person, her face and her clothes remain.
    """
    frames, track = own
    stretch, gamma, gain = np.exp(generator.uniform(np.log([0.8, 0.6, 0.7]), np.log([1.25, 1.6, 1.3])))
    x0, order = centre(track.body_boxes[track.accepted]).mean(0)[0], generator.permutation(3)
    table = np.uint8(np.clip(gain * 255 * (np.arange(256) / 255) ** gamma, 0, 255))
    matrix, size = np.float64([[stretch, 0, (1 - stretch) * x0], [0, 1, 0]]), track.canvas[::-1]
    warped = (cv2.warpAffine(frame, matrix, size, borderMode=cv2.BORDER_REPLICATE) for frame in frames)
    frames = [cv2.LUT(frame, table)[..., order] for frame in warped]
    return frames, cues.analyse(frames, frames[0], replay(track, matrix), OWN_PLACE)


def find_pairs(args, files: dict[str, list[Path]], own: tuple, find, embed) -> tuple[list, list, list]:
    """Judge a clip's pseudo videos -> verdicts, pairs of a body and a face that passed, the pairs' names.

    A body goes with the face video of its own name, else with any.
    """
    verdicts, kept = [], {"body": {}, "face": {}}
    for kind, paths in files.items():
        for path in paths:
            verdict, content = verdict_on(args, kind, path, own, find, embed)
            verdicts.append(verdict)
            if verdict["reason"] is None:
                kept[kind][path.stem] = path.name, content
    pairs, names, faces = [], [], list(kept["face"].values())
    for p, (stem, (body, content)) in enumerate(kept["body"].items() if faces else ()):
        face, face_content = kept["face"].get(stem, faces[p % len(faces)])
        pairs.append((content, face_content))
        names.append({"body": body, "face": face})
    return verdicts, pairs, names


def masks_of(args, kind: str, path: Path) -> list[Path]:
    """The mask file of a pseudo video, or the pictures in its folder; none if there are none."""
    try:
        found = named(Path(args.masks) / kind, path.stem) if args.masks else None
    except (OSError, ValueError):
        found = None
    return [] if found is None else sorted(found.iterdir()) if found.is_dir() else [found]


def pseudo_clip(args, line: dict, files: dict[str, list[Path]], vae, variants: int, find, embed) -> None:
    """Give one clip its pseudo cues, in place of those that it has; not again with the same files and thresholds."""
    if files and not any(files.values()):
        return  # none of them is of this clip
    home, cache = args.data / "cues" / line["id"], args.data / "cache" / f"{line['id']}.safetensors"
    tried = {k: getattr(args, k) for k in ("augment", "max_identity", "min_pose", "min_faces", "min_detail")}
    tried |= {name: str(getattr(args, name)) for name in ("masks", "segmenter", "sam", "face_model", "person")}
    for kind, paths in files.items():
        masks = [p for path in paths for p in masks_of(args, kind, path)]
        tried[kind] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in (*paths, *masks)]
    if (home / "pseudo.json").exists() and read_json(home / "pseudo.json")["tried"] == tried:
        return
    own = list(Video(args.data / "videos" / f"{line['id']}.mp4")), cues.Track.load(home / "track.npz")
    key = (crc32(line["id"].encode()), 1)  # 1: not the draws of the clip's own cues
    if args.augment:
        verdicts, names = [], [{"augmented": p} for p in range(args.augment)]
        copies = [augmented(own, keyed(*key, p)) for p in range(args.augment)]
        pairs = [(copy, copy) for copy in copies]
    else:
        verdicts, pairs, names = find_pairs(args, files, own, find, embed)
    tensors = {name: t for name, t in load_file(cache).items() if not name.startswith("pseudo_")}
    if pairs:
        tensors |= pseudo_latents(vae, pairs, key, variants)
    save_cache(tensors, cache)
    write_text(home / "clip.json", json.dumps(line | {"pseudo": names}) + "\n")
    verdicts = [{"clip": line["id"]} | verdict for verdict in verdicts]
    write_text(home / "pseudo.json", json.dumps({"tried": tried, "verdicts": verdicts}) + "\n")


def shares(paths: list[Path], ids: list[str]) -> dict[str, list[Path]]:
    """Clip id -> its pseudo videos ID*.mp4. A file is of the longest id that its name begins with and no digit follows."""
    found, ids = {}, set(ids)
    for path in paths:
        ends = (end for end in range(len(path.name), 0, -1) if not path.name[end : end + 1].isdigit())
        if id := next((path.name[:end] for end in ends if path.name[:end] in ids), None):
            found.setdefault(id, []).append(path)
    return found


def add_pseudo(args) -> None:
    """`python data.py add-pseudo`: filter pseudo videos, cache their cues, report what was rejected."""
    if bool(args.augment) == bool(args.body or args.face) or bool(args.body) != bool(args.face):
        raise ValueError("give --body DIR and --face DIR (the same one twice, if need be) or --augment N")
    if not (args.data / "prepare.json").is_file():
        raise FileNotFoundError(f"{args.data}: no data folder there that data.py prepare made")
    settings, (rank, world) = read_json(args.data / "prepare.json"), rank_and_world()
    held = hold(args.data, rank)  # noqa: F841
    folders = {} if args.augment else {"body": args.body, "face": args.face}
    listed = {kind: sorted(p for p in folder.iterdir() if p.suffix) for kind, folder in folders.items()}
    device = place(args)  # first: what follows goes to this rank's GPU
    find, embed = (None, None) if args.augment else (make_finder(args), load_recogniser(args))
    vae = open_vae(settings["backbone"], settings["preset"], *device)
    (clips, _, _), failed = assemble(args.data), 0
    mine = {kind: shares(paths, [line["id"] for line in clips]) for kind, paths in listed.items()}
    for line in tqdm(clips[rank::world], desc="add-pseudo", unit="clip", disable=rank > 0):
        files = {kind: found.get(line["id"], []) for kind, found in mine.items()}
        try:
            pseudo_clip(args, line, files, vae, settings["variants"], find, embed)
        except DAMAGED as error:
            failed += 1
            tqdm.write(f"skipped {line['id']}: {error}", file=sys.stderr)
    clips, _, verdicts = assemble(args.data)
    pairs = [pair for clip in clips for pair in clip["pseudo"]]
    given = sum(bool(clip["pseudo"]) for clip in clips)
    print(f"{given} of {len(clips)} clips have pseudo cues, {len(pairs)} in all" + f"; {failed} skipped" * bool(failed))
    if any("augmented" in pair for pair in pairs):
        print("Those of --augment show the clips' own performers: good to try stage 2, not the paper's cues")
    for kind in folders:
        reasons = [verdict["reason"] for verdict in verdicts if verdict["kind"] == kind]
        counts = Counter(fault.split(":")[0] for reason in reasons if reason for fault in reason.split("; "))
        words = "".join(f"; {n} {fault}" for fault, n in counts.most_common())
        print(f"{kind}: {reasons.count(None)} of {len(reasons)} kept{words}; see {args.data}/pseudo.jsonl")


# ---- check: every file, and a contact sheet -------------------------------------------------------------


def expected(line: dict, tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """Name -> (shape, dtype) of what a clip's cache must hold; K, P*K, R and L, D are the file's own."""
    T, H, W = line["frames"], line["height"], line["width"]
    count = lambda name: tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0
    f, R, P = (T - 1) // 4 + 1, count("ref_frame"), count("pseudo_pose")
    leading = {"mean": (f,), "logvar": (f,), "pose": (count("pose"), f), "face": (count("pose"), f)}
    leading |= {f"ref_{name}": (R,) for name in ("clean", "noisy", "pose", "face")}
    leading |= {"pseudo_pose": (P, f), "pseudo_face": (P, f)} if line["pseudo"] else {}
    table = {name: ((*n, 16, H // 8, W // 8), torch.bfloat16) for name, n in leading.items()}
    table |= {name: ((T, H, W // 8), torch.uint8) for name in ("body", "face_mask")}
    text = tuple(tensors["text"].shape) if "text" in tensors else ()
    return table | {"ref_frame": ((R,), torch.int64), "text": (text, torch.bfloat16)}


def faults(folder: Path, line: dict) -> Iterator[str]:
    """What is wrong with a clip, in words."""
    try:
        tensors = load_file(folder / "cache" / f"{line['id']}.safetensors")
    except (OSError, SafetensorError) as error:
        yield f"the cache file cannot be read ({error})"
        return
    wanted = expected(line, tensors)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        yield f"{name} is {'missing' if name in wanted else 'not expected'}"
    for name in sorted(wanted.keys() & tensors.keys()):
        tensor = tensors[name]
        found = tuple(tensor.shape), tensor.dtype
        if found != wanted[name] or not tensor.numel():
            yield f"{name} is {found[1]} {found[0]}, expected {wanted[name][1]} {wanted[name][0]}"
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            yield f"{name} is not finite"
        elif name == "ref_frame" and not 0 <= tensor.min() <= tensor.max() < line["frames"]:
            yield "ref_frame is beyond the clip"
    home = folder / "cues" / line["id"]
    if home.is_dir():  # the drawn world has none
        try:
            video = Video(folder / "videos" / f"{line['id']}.mp4")
            frames = len(cues.Track.load(home / "track.npz").masks), sum(1 for _ in video)
            if frames != (line["frames"],) * 2:
                yield f"track and video have {frames[0]} and {frames[1]} frames, not {line['frames']}"
        except DAMAGED as error:
            yield f"track or video: {error}"


def latent_picture(z: Tensor) -> np.ndarray:
    """(16, h, w) -> (8h, 8w, 3) uint8: how far each place is from the commonest latent; needs no VAE."""
    z = z.float()
    far = (z - z.flatten(1).median(1).values[:, None, None]).norm(dim=0)
    picture = (255 * far / far.max().clamp(min=1e-6)).byte().numpy()
    return picture.repeat(8, 0).repeat(8, 1)[..., None].repeat(3, 2)


def sheet_row(folder: Path, line: dict) -> np.ndarray:
    """The middle of a clip: its picture, latent, masks and the latents of its cues."""
    tensors = load_file(folder / "cache" / f"{line['id']}.safetensors")
    video = folder / "videos" / f"{line['id']}.mp4"
    latent = len(tensors["mean"]) // 2
    body, face = (np.unpackbits(tensors[name][4 * latent].numpy(), -1) for name in ("body", "face_mask"))
    cells = {line["id"]: next(islice(Video(video), 4 * latent, None))} if video.exists() else {}
    cells[f"latent {latent}"] = latent_picture(tensors["mean"][latent])
    cells["masks"] = np.where(face[..., None], cues.AMBER, body[..., None] * cues.TEAL).astype(np.uint8)
    for name in ("pose", "face", "pseudo_pose", "pseudo_face"):
        if name in tensors:
            cells[name] = latent_picture(tensors[name][0, latent])
    return cues.strip(cues.WIDTH, cells)


def check(args) -> None:
    """`python data.py check`: read every file; a line on stderr for each fault, and a contact sheet."""
    path, sheet = args.data / "clips.jsonl", args.output or args.data / "sheet.png"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no data folder there; make one with data.py prepare or toy")
    if args.output:
        check_output(sheet, suffixes=PICTURES)
    lines = read_lines(path)
    named_twice = [id for id, n in Counter(line["id"] for line in lines).items() if n > 1]
    strays = {p.stem for p in (args.data / "cache").glob("[!.]*.safetensors")} - {line["id"] for line in lines}
    found = [f"{id}: more than one line in clips.jsonl" for id in named_twice]
    found += [f"{id}: in the cache, not in clips.jsonl" for id in sorted(strays)]
    whole = []
    for line in tqdm(lines, desc="check", unit="clip"):
        wrong = [f"{line['id']}: {words}" for words in faults(args.data, line)]
        whole += [] if wrong else [line]
        found += wrong
    if whole:
        shown = [whole[k] for k in sampled(np.ones(len(whole), bool), args.rows)]
        rows = np.vstack([sheet_row(args.data, line) for line in shown])
        write_image(sheet, rows, comment="contact sheet of a data folder")
        print(f"wrote {sheet}, {len(shown)} of {len(whole)} clips")
    if found or not lines:
        raise ValueError("\n".join([*found, f"{args.data}: {len(found)} faults, {len(lines)} clips"]))
    print(f"all {len(lines)} clips are whole")


# ---- command line ---------------------------------------------------------------------------------------


# fmt: off
def add_commands(commands) -> None:
    masks = "masks for each video, one a frame, under its name"
    command = commands.add_parser("prepare", help="cut, cue and cache real videos")
    add = command.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEOS", help="videos, folders of frames, folders of both")
    add("-o", "--output", type=Path, required=True, help="data folder to make or extend")
    add("--backbone", type=Path, metavar="DIR", help="local copy of the CogVideoX1.5-5B-I2V repository")
    add("--preset", choices=["tiny", "toy"], help="null text and a random VAE, or the drawn world's")
    add("--frames", type=natural, default=49, help="fewest frames of a clip, 8k+1: the training window")
    add("--max-frames", type=natural, default=97, help="most; what exceeds the window gives references")
    add("--fps", type=rate, default=16.0, help="take every n-th frame, for about this rate")
    add("--folder-fps", type=rate, default=30.0, help="rate of videos that are folders of frames")
    add("--area", type=area, default=512 * 512, help="pixels of a frame; its aspect is one of nine")
    add("--caption", default="", help="prompt of a video without NAME.txt beside it")
    add("--held-out", type=real(0, 1), default=0.0, help="share of the videos for the test split")
    add("--variants", type=natural, default=4, help="cue variants a clip, the first without augmentation")
    add("--refs", type=natural, default=8, help="references a clip, each with pixel noise of its own")
    add_device(add)
    finder.add_arguments(command, "folder with " + masks)

    command = commands.add_parser("add-pseudo", help="cues of other identities")
    add = command.add_argument
    add("data", type=Path, metavar="DATA", help="folder that data.py prepare made")
    add("--body", type=Path, metavar="DIR", help="ID*.mp4: others move as in videos/ID.mp4 (StableAnimator)")
    add("--face", type=Path, metavar="DIR", help="ID*.mp4: other faces move as in it (Face-Adapter)")
    add("--augment", type=natural, metavar="N", help="instead: N recoloured, stretched copies of the clip")
    add("--max-identity", type=real(-1, 1), default=0.4, help="highest ArcFace cosine with the clip's person")
    add("--min-pose", type=real(0, 1), default=0.6, help="least overlap of body and clip masks, centred")
    add("--min-faces", type=real(0, 1), default=0.8, help="least share of the clip's faces to be shown")
    add("--min-detail", type=real(0), default=0.1, help="least sharpness, as a share of the clip's")
    add_device(add)
    finder.add_arguments(command, "folder with body/ and face/, in each " + masks)

    command = commands.add_parser("check", help="verify a data folder")
    add = command.add_argument
    add("data", type=Path, metavar="DATA", help="data folder")
    add("-o", "--output", type=Path, help="contact sheet; DATA/sheet.png, if not given")
    add("--rows", type=natural, default=24, help="clips on the contact sheet")


def add_device(add) -> None:
    add("--device", help="cuda, mps or cpu; the best one present, if not given")
    add("--dtype", choices=["bfloat16", "float32"], help="of the networks; bfloat16 where fast, if not given")
# fmt: on


COMMANDS = {"prepare": prepare, "add-pseudo": add_pseudo, "check": check}
