"""Data: from clips to the tensors that the network eats (paper Sec. 4.1, A.2, A.3).

The network sees a clip as latents [reference, window]: slot 0 holds the reference picture, the others the clip's own
latents. The image condition has the reference at slot 0 and zeros elsewhere; the cues have the reference's own cues
at slot 0: one pair of cue and appearance, in context.

Frozen networks run once: a data folder caches, for every clip, all that they say of it, and training reads only that.

    python data.py toy -o DATA              # clips of the drawn world, ready for train.py
    python data.py prepare VIDEOS -o DATA --backbone DIR            # real ones, and what follows: see prepare.py

    DATA/clips.jsonl            a line a clip: id, split, frames, fps, height, width, pseudo: the other identities that drive it
    DATA/cache/ID.safetensors   latents (f,16,h,w) as mean and logvar; pose, face (K,f,16,h,w), variant 0 plain, the others augmented;
                                pseudo_pose, pseudo_face (P*K,f,16,h,w); body, face_mask (T,H,W/8) packed bits; R
                                reference frames, clean and noisy, with their cues: ref_* (R,16,h,w), ref_frame (R,);
                                text (L,D)
"""

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import tee
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import cues
import finder
import toy
from align import misalignment
from load_cogvideox import load_weights, read_header, read_json
from machine import keep_freed_memory, pick_device
from vae import CausalVAE, chunks
from video import Parser, atomic, natural, real, write_image, write_video

# Paper silent: the released 1.5 weights saw the image condition unscaled, all other latents times 0.7
IMAGE_LATENT_SCALE = 1.0
TOY_SIZE, TOY_FRAMES, TOY_TEXT = 96, 33, (4, 64)  # pixels, frames of a cached clip, shape of the one text state
HELD_OUT = 1_000_000  # clips of the drawn world from this number on are never trained on
ASSETS = Path(__file__).parent / "assets"
DAMAGED = ValueError, OSError, KeyError, EOFError, BadZipFile, SafetensorError, zlib.error  # what a broken file raises


def keyed(*key: int) -> np.random.Generator:
    """The random generator of one thing, for example (seed, step, sample): no draw depends on what was drawn before it."""
    return np.random.default_rng((len(key), *key))  # numpy takes (1,) and (1, 0) for the same


# ---- pictures and masks to latents ---------------------------------------------------------------------------------


def to_tensor(picture: np.ndarray) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(picture).movedim(-1, -3).float() / 127.5 - 1


def to_picture(video: Tensor) -> np.ndarray:
    """The way back: (..., 3, H, W), clamped to [-1, 1] -> (..., H, W, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def padded(frames: Iterable) -> Iterator:
    """The frames, then the last ones mirrored until there are 8k+1 in all: 1, 2, 3, 4 -> 1, 2, 3, 4, 3, 2, 1, 2, 3."""
    recent, n = deque(maxlen=9), 0
    for n, frame in enumerate(frames, start=1):
        recent.append(frame)
        yield frame
    recent, last = list(recent), len(recent) - 1
    for k in range(1, -(n - 1) % 8 + 1):
        yield recent[abs(last - k % (2 * last))]


def pool_time(masks: Tensor) -> Tensor:
    """(T, ...) -> (f, ...): the mean over each latent frame's frames; of 4f-3 (the start of a clip) the first is alone, else 4f."""
    alone, rest = masks.split([masks.shape[0] % 4, masks.shape[0] // 4 * 4])
    return torch.cat([alone, rest.unflatten(0, (-1, 4)).mean(1)])


def pool_masks(masks: Tensor) -> Tensor:
    """Masks at latent size: (T, 1, H, W) -> (f, 1, H/8, W/8), the mean over 8x8 pixels and a latent frame's frames.

    Paper silent: an area mean, since trilinear resizing would read only the centre pixels of each cell.
    """
    return F.avg_pool2d(pool_time(masks), 8)


def unzip(rows: Iterable[tuple], width: int) -> list[Iterator]:
    """The columns of a stream of rows, each an iterator of its own; read them in step, or the rows in between pile up in memory."""
    return [map(lambda row, i=i: row[i], stream) for i, stream in enumerate(tee(rows, width))]


@torch.no_grad()
def encode_cues(vae: CausalVAE, rows: Iterable[tuple], device, scale: float) -> tuple[Tensor, Tensor]:
    """Cue latents and masks of a stream of `cues.render` rows, 8k+1 (or 1) of them, in constant memory.

    Returns pose, face (1, f, 17, h, w), float32 on the CPU: 16 latent channels (the VAE's mean, times `scale`), then
    the mask.
    """
    streams = [(torch.from_numpy(array)[None].to(device) for array in stream) for stream in unzip(rows, 4)]
    pose, face = vae.encode_stream(streams[0]), vae.encode_stream(streams[1])
    parts = []
    for (pose_mean, _), (face_mean, _), body, face_mask in zip(
        pose, face, chunks(streams[2], 8), chunks(streams[3], 8)
    ):
        pairs = (pose_mean, body), (face_mean, face_mask)
        parts.append(
            [torch.cat([z[0].float() * scale, pool_masks(torch.cat(masks))], dim=1).cpu() for z, masks in pairs]
        )
    pose, face = (torch.cat(part)[None] for part in zip(*parts))
    return pose, face


@torch.no_grad()
def encode_image(vae: CausalVAE, picture: Tensor) -> Tensor:
    """A picture (B, 3, H, W) in [-1, 1] -> its latent (B, 16, h, w): the mean, unscaled, float32."""
    mean, _ = vae.encode(picture[:, None])
    return mean[:, 0].float()


def image_condition(image: Tensor, slots: int) -> Tensor:
    """The latent picture (B, 16, h, w) at slot 0 of (B, slots, 16, h, w), zeros elsewhere: the DiT's channels 17-32.

    Paper silent: where the reference sits. Here in the slot that CogVideoX1.5 pads with, which is dropped after sampling.
    """
    condition = image.new_zeros(image.shape[0], slots, *image.shape[1:])
    condition[:, 0] = IMAGE_LATENT_SCALE * image
    return condition


def window_inputs(latents: Tensor, start: int, image: Tensor, pose: Tensor, face: Tensor, ref_slot: str) -> tuple:
    """What the DiT reads in sampling: latents (B, n, 16, h, w) of slot 0 and a window that starts at the clip's latent frame `start`.

    Returns x (B, n, 32, h, w) and the cues (B, n, 17, h, w) of its slots. With ref_slot "copy" slot 0 is a copy of the
    window's first latent frame, cues included.
    """
    n = latents.shape[1]
    slots = [1 + start if ref_slot == "copy" else 0, *range(1 + start, start + n)]
    return torch.cat([latents, image_condition(image, n)], dim=2), pose[:, slots], face[:, slots]


# ---- one clip into the cache ---------------------------------------------------------------------------------------


def blank_runs(frames: int, generator: np.random.Generator) -> np.ndarray:
    """(frames,) bool: frames whose Pose Cue is dropped, as those are that segmentation loses (Sec. 3.1).

    Paper silent: how many. Here runs of 1-4, at most 15 % of the clip, in 3 clips of 10.
    """
    drop = np.zeros(frames, bool)
    chance = generator.random()
    starts, lengths = generator.integers(frames, size=3), generator.integers(1, 5, size=3)
    for start, length in zip(starts, lengths) if chance < 0.3 else ():
        if drop.sum() + length <= 0.15 * frames:
            drop[start : start + length] = True
    return drop


# Differs: A.2 aligns the masks of every driver. In training they are the clip's own, which stand where the reference does
OWN_PLACE = cues.CueOptions(align="none")


def cue_variant(body: tuple, face: tuple, k: int, generator, misalign: float, looks: cues.CueOptions) -> list:
    """Variant k of a clip's cues, stacked: pose, face (T, 3, H, W), body, face mask (T, 1, H, W), float32.

    body, face: (frames, Track) that the Pose Cue and the rest come from, mostly one and the same. Variant 0 is plain,
    each other one has a cut-off (Paper silent: 0.08 to 0.20) and blank runs of its own; `misalign` > 0 moves its Pose
    Cue, see `misalignment` (A.2).
    """
    options = replace(looks, location="hard", cutoff=float(generator.uniform(0.08, 0.20)) if k else looks.cutoff)
    drop = blank_runs(len(body[1].accepted), generator) if k else None
    moved = misalignment(body[1].presence(), generator, misalign) if misalign else None
    stack = lambda rows: [np.stack(part) for part in zip(*rows)]  # noqa: E731
    found = stack(cues.render(*body, options=options, drop=drop, misalign=moved))
    return found if face is body else [found[0], *stack(cues.render(*face, options=options, drop=drop))[1:]]


@torch.no_grad()
def encode_means(vae: CausalVAE, pictures: np.ndarray | Tensor) -> Tensor:
    """(B, T, 3, H, W) -> the posterior's mean (B, f, 16, h, w), bfloat16 on the CPU, as the cache keeps it."""
    device = next(vae.parameters()).device
    return torch.cat(
        [vae.encode(torch.as_tensor(p, device=device)[None])[0].to("cpu", torch.bfloat16) for p in pictures]
    )


def pseudo_latents(
    vae: CausalVAE, pairs: list[tuple], key: tuple, variants: int, looks=OWN_PLACE, misalign: float = 1.0
) -> dict[str, Tensor]:
    """P pairs of a body and a face video, each (frames, Track) -> pseudo_pose, pseudo_face, (P*K, f, 16, h, w)."""
    latents = []
    for p, pair in enumerate(pairs):
        for k in range(variants):
            pose, face, _, _ = cue_variant(*pair, k, keyed(*key, 1000 * (p + 1) + k), misalign, looks)
            latents.append((encode_means(vae, pose[None]), encode_means(vae, face[None])))
    pose, face = map(torch.cat, zip(*latents))
    return {"pseudo_pose": pose, "pseudo_face": face}


@torch.no_grad()
def encode_clip(
    vae: CausalVAE,
    video: np.ndarray,
    own: tuple,
    pairs: list,
    text: Tensor,
    key: tuple,
    variants: int,
    refs: int,
    looks=OWN_PLACE,
    misalign: float = 1.0,
) -> dict[str, Tensor]:
    """All that training will read of one clip (T, H, W, 3) uint8, T = 8k+1; the tensors of the module docstring.

    own: the clip's own pair of body and face, see `cue_variant`, whose frames may be the video's larger original;
    pairs: those of other identities. A pseudo cue may be misaligned (A.2) in every variant, the clip's own never. `key`
    seeds every draw. Paper silent: noise on the reference's pixels; as CogVideoX's.
    """
    variant = [cue_variant(*own, k, keyed(*key, k), 0, looks) for k in range(variants)]
    pose, face, body, face_mask = variant[0]
    generator = keyed(*key, 999)
    shown = np.flatnonzero(own[0][1].accepted)  # a reference shows the person
    frame = np.sort(generator.choice(shown, size=min(refs, len(shown)), replace=False))
    pictures = to_tensor(video[frame])
    sigma = torch.from_numpy(np.exp(generator.normal(-3.0, 0.5, (len(frame), 1, 1, 1)))).float()
    noisy = pictures + sigma * torch.from_numpy(generator.standard_normal(pictures.shape)).float()
    single = lambda p: encode_means(vae, torch.as_tensor(p)[:, None])[:, 0]  # noqa: E731
    coded = vae.encode(to_tensor(video)[None].to(next(vae.parameters()).device))
    mean, logvar = (z[0].to("cpu", torch.bfloat16) for z in coded)
    tensors = {
        "mean": mean,
        "logvar": logvar,
        "pose": encode_means(vae, [v[0] for v in variant]),
        "face": encode_means(vae, [v[1] for v in variant]),
        "body": torch.from_numpy(np.packbits(body[:, 0] > 0.5, axis=-1)),
        "face_mask": torch.from_numpy(np.packbits(face_mask[:, 0] > 0.5, axis=-1)),
        "ref_frame": torch.from_numpy(frame),
        "ref_clean": single(pictures),
        "ref_noisy": single(noisy),
        "ref_pose": single(pose[frame]),
        "ref_face": single(face[frame]),
        "text": text.to(torch.bfloat16),
    }
    tensors |= pseudo_latents(vae, pairs, key, variants, looks, misalign) if pairs else {}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# ---- the drawn world as a data folder ------------------------------------------------------------------------------


def toy_finder(clip: toy.Clip) -> finder.Finder:
    """Exact masks in place of the segmenter and the face finder; everything after them is as for real video."""
    masks = [finder.paint_mask(body, face) for body, face in zip(clip.body, clip.face)]
    return finder.Finder(masks=masks, reference_mask=masks[0])


def toy_text() -> Tensor:
    """The drawn world's only text state: nobody describes it in words."""
    return torch.zeros(TOY_TEXT)


def toy_clip(number: int) -> toy.Clip:
    """Clip `number` of the drawn world."""
    return toy.render(identity=number, motion=number, frames=TOY_FRAMES, size=TOY_SIZE)


def toy_pseudo(number: int, args, generator: np.random.Generator) -> toy.Clip:
    """The same motion, expression and camera performed by somebody else, as generators would make it (A.3).

    Table 6: some of them fail and show another motion, which a filter would have dropped; all may show the same few people.
    """
    failed = generator.random() < args.pseudo_faults
    who = 500_000 + (number % args.pseudo_people if args.pseudo_people else number)
    return toy.render(identity=who, motion=number + 700_000 * failed, frames=TOY_FRAMES, size=TOY_SIZE)


def toy_looks(args) -> cues.CueOptions:
    """A skeleton is drawn in colours and shown as it is; the other Pose Cues are made of the video."""
    return replace(OWN_PLACE, pose="rgb" if args.pose_cue == "skeleton" else args.pose_cue, face=args.face_cue)


def toy_pair(clip: toy.Clip, args, generator: np.random.Generator) -> tuple:
    """(body, face) of a drawn clip for `cue_variant`: the video for both, or for the body its skeleton (Table 3, S5)."""
    face = clip.video, cues.analyse(clip.video, clip.video[0], toy_finder(clip), OWN_PLACE)
    if args.pose_cue != "skeleton":
        return face, face
    joints = clip.joints + generator.normal(0, args.joint_noise, clip.joints.shape)
    frames = np.stack([toy.draw_skeleton(j, TOY_SIZE, seen) for j, seen in zip(joints, clip.visible)])
    wide = [cv2.dilate(body.astype(np.uint8), np.ones((33, 33), np.uint8)) for body in clip.body]  # room for bad joints
    return (frames, replace(face[1], masks=[zlib.compress(np.packbits(mask)) for mask in wide])), face


def cache_toy_clip(vae: CausalVAE, number: int, args) -> None:
    generator = keyed(number, 998)
    own, other = toy_clip(number), toy_pseudo(number, args, generator)
    pair, pairs = toy_pair(own, args, generator), [toy_pair(other, args, generator)]
    settings = dict(variants=args.variants, refs=args.refs, looks=toy_looks(args), misalign=args.misalign)
    tensors = encode_clip(vae, own.video, pair, pairs, toy_text(), key=(number,), **settings)
    save_cache(tensors, args.output / "cache" / f"{number:06d}.safetensors")


def save_cache(tensors: dict[str, Tensor], path: Path) -> None:
    """Under a temporary name, then renamed: what has a clip's name is whole."""
    try:
        with atomic(path) as part:
            save_file(tensors, part)
    except SafetensorError as error:  # a full disk is no OSError of its own
        raise OSError(f"{path} cannot be written ({error})") from None


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    with atomic(path) as part:
        part.write_text(text)


def read_lines(path: Path) -> list[dict]:
    """clips.jsonl. ValueError that names the line where one is broken."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(json.loads(line))
            found[-1]["id"], found[-1]["split"], found[-1]["pseudo"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: no clip; make the list anew with the data.py command that made it"
            ) from None
    return found


def remember(path: Path, args, names: Iterable[str]) -> None:
    """Write down what the clips of a folder share, or compare with the run before."""
    settings = {name: getattr(args, name) for name in names}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    before = read_json(path) if path.exists() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{path.parent} has {flag} {before.get(name)}, not {value}: take another -o")
    write_text(path, json.dumps(settings) + "\n")


TOY_SHARED = "vae variants refs pose_cue joint_noise face_cue misalign pseudo_faults pseudo_people".split()


def draw_share(args, numbers: list[int], done) -> None:
    """What one worker of `make_toy` does: its own copy of the VAE, one thread, a clip after another."""
    torch.set_num_threads(1)
    keep_freed_memory()
    device, dtype, _ = pick_device(args.device)
    vae = load_weights(args.vae, dtype)[0].to(device).eval()
    for number in numbers:
        if not multiprocessing.parent_process().is_alive():
            return  # killed: nobody waits for the rest
        cache_toy_clip(vae, number, args)
        done.put(number)


def make_toy(args) -> None:
    """`python data.py toy`: draw, encode and cache; run it again to go on, or with more clips to add some."""
    if args.joint_noise and args.pose_cue != "skeleton":
        raise ValueError(f"--joint-noise {args.joint_noise:g} is of skeletons: give --pose-cue skeleton")
    if (found := read_header(args.vae)["network"]) != "CausalVAE":
        raise ValueError(f"--vae {args.vae}: holds a {found}, give a VAE's weights")
    if (args.output / "prepare.json").exists():
        raise ValueError(f"{args.output} holds clips of data.py prepare: name another -o")
    pick_device(args.device)  # its mistakes once, not once a worker
    (args.output / "cache").mkdir(parents=True, exist_ok=True)
    coder = f"{args.vae.name} {hashlib.sha256(args.vae.read_bytes()).hexdigest()[:16]}"  # one folder, one VAE's latents
    remember(args.output / "toy.json", argparse.Namespace(**vars(args) | {"vae": coder}), TOY_SHARED)
    # a folder never loses clips, whatever --clips says now
    cached = {int(path.stem) for path in (args.output / "cache").glob("[!.]*.safetensors")}
    numbers = sorted({*range(args.clips), *range(HELD_OUT, HELD_OUT + args.held_out), *cached})
    missing = [n for n in numbers if n not in cached]
    context = multiprocessing.get_context("spawn")
    done = context.SimpleQueue()
    shares = [missing[i :: args.workers] for i in range(min(args.workers, len(missing)))]
    workers = [context.Process(target=draw_share, args=(args, share, done), daemon=True) for share in shares]
    for worker in workers:
        worker.start()
    for _ in tqdm(missing, desc="toy clips", unit="clip"):
        while done.empty():
            if any(worker.exitcode for worker in workers):
                raise OSError(f"{args.output}: a worker failed; what is finished stays, run the command again")
            time.sleep(0.05)
        done.get()
    line = {"frames": TOY_FRAMES, "fps": toy.FPS, "height": TOY_SIZE, "width": TOY_SIZE, "pseudo": ["drawn"]}
    split = lambda n: "test" if n >= HELD_OUT else "train"  # noqa: E731
    lines = [json.dumps({"id": f"{n:06d}", "split": split(n)} | line) for n in numbers]
    write_text(args.output / "clips.jsonl", "".join(line + "\n" for line in lines))


def make_example(args) -> None:
    """`python data.py example`: the reference, driving clip and masks that the repository ships; nothing is trained on them."""
    args.output.mkdir(parents=True, exist_ok=True)
    who, what = HELD_OUT + 518, HELD_OUT + 517
    reference = toy.render(identity=who, motion=who, frames=1, size=384)
    drive = toy.render(identity=what, motion=what, camera=who, frames=TOY_FRAMES, size=384)
    write_image(args.output / "ref.png", reference.video[0])
    write_image(args.output / "ref_mask.png", finder.paint_mask(reference.body[0], reference.face[0]))
    write_video(args.output / "drive.mp4", drive.video, toy.FPS)
    (args.output / "masks").mkdir(exist_ok=True)
    for index, (body, face) in enumerate(zip(drive.body, drive.face)):
        write_image(args.output / "masks" / f"{index:03d}.png", finder.paint_mask(body, face))


# ---- training samples ----------------------------------------------------------------------------------------------


class Clips:
    """A data folder as training samples. A sample depends only on (seed, step, its index in the global batch)."""

    def __init__(self, folder: Path, args, scale: float, split: str = "train"):
        """scale: the VAE's scaling factor. The test split is read without dropouts, with each cue's first variant."""
        path = folder / "clips.jsonl"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no data folder there; make one with: python data.py toy -o {folder}, or data.py prepare"
            )
        self.folder, self.args, self.scale, self.split = folder, args, scale, split
        self.training = split == "train"
        self.buckets: dict[tuple, list] = {}  # clips of one shape: a batch is cut from one bucket
        for clip in read_lines(path):
            if clip["split"] == split and (args.stage != "2" or clip["pseudo"]):
                shape = clip["height"], clip["width"], min(args.window, (clip["frames"] - 1) // 4 + 1)
                self.buckets.setdefault(shape, []).append(clip)
        if not self.buckets:
            reason = " with pseudo cues (data.py add-pseudo)" * (args.stage == "2")
            raise ValueError(f"{folder}: no {split} clips{reason}")
        null = folder / "null_text.safetensors"  # T5's states of ""; the drawn world's are zeros
        self.null_text = load_file(null)["text"].float() if null.exists() else torch.zeros(())
        self.skipped, self.named = 0, set()  # samples replaced because their clip is damaged, and those clips

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    def places(self, step: int, G: int) -> tuple[list[dict], list[int]]:
        """The step's bucket, and the places in it of the step's G clips (G samples, over all ranks). An epoch shows every clip
        once, in a new order; a bucket's last batch is filled up from its start."""
        batches = [(shape, j) for shape, clips in self.buckets.items() for j in range(-(-len(clips) // G))]
        epoch, place = divmod(step, len(batches))
        shape, j = batches[keyed(self.args.seed, 2**31, epoch).permutation(len(batches))[place]]
        bucket = self.buckets[shape]
        order = keyed(self.args.seed, 2**31, epoch, *shape).permutation(len(bucket))
        return bucket, [int(order[(j * G + i) % len(bucket)]) for i in range(G)]

    def batch(self, step: int, indices: Iterable[int], G: int) -> dict[str, Tensor]:
        """Samples `indices` of this step's G. [0, 1) is cut into G equal intervals, which are dealt to the samples in random
        order; each sample draws its noise level from its own (CogVideoX's explicit uniform sampling)."""
        order, (bucket, places) = keyed(self.args.seed, step).permutation(G), self.places(step, G)
        samples = []
        for i in indices:
            sample = self.sample(bucket, places[i], keyed(self.args.seed, step, i))
            level = (order[i] + keyed(self.args.seed, step, i, 1).random()) / G
            shift = self.args.noise_shift if self.training else 1
            level = shift * level / (1 + (shift - 1) * level)
            samples.append(sample | {"step": torch.tensor(int(1000 * level))})
        return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}

    def sample(self, bucket: list[dict], place: int, generator: np.random.Generator) -> dict[str, Tensor]:
        """A training sample of the clip at `place`; of the next one if its cache is damaged, which is said and counted."""
        for clip in bucket[place:] + bucket[:place]:
            path = self.folder / "cache" / f"{clip['id']}.safetensors"
            try:
                with safe_open(path, "pt") as file:
                    f, _, h, w = file.get_slice("mean").get_shape()
                    if (4 * f - 3, 8 * h, 8 * w) != (clip["frames"], clip["height"], clip["width"]):
                        raise ValueError(f"{4 * f - 3} frames of {8 * w}x{8 * h} pixels, clips.jsonl says otherwise")
                    return self.read(file, copy.deepcopy(generator))
            except (OSError, ValueError, SafetensorError) as error:
                self.skipped += 1
                if clip["id"] not in self.named:
                    self.named.add(clip["id"])
                    tqdm.write(f"{path}: skipped, {error}", file=sys.stderr)
        raise ValueError(
            f"{self.folder}: no clip of {clip['width']}x{clip['height']} is whole (python data.py check {self.folder})"
        )

    def read(self, file, generator: np.random.Generator) -> dict[str, Tensor]:
        """Cut a window, choose reference and variants, drop conditions; all draws from `generator`, in a fixed order.

        Paper silent: how often conditions are dropped; which frame is the reference, here one outside the window if
        possible; which cues slot 0 has, here the reference's own, so that the model sees one matching pair of cue and
        appearance.
        """
        args, scale = self.args, self.scale
        f = file.get_slice("mean").get_shape()[0]
        n = min(args.window, f)
        start = 2 * int(generator.integers((f - n) // 2 + 1))  # even, as the windows of long clips in sampling
        frames = slice(max(4 * start - 3, 0), 4 * (start + n) - 3)
        drop_text, drop_reference, drop_cues, drop_face = self.training & (generator.random(4) < (0.1, 0.05, 0.1, 0.05))

        candidates = file.get_tensor("ref_frame").numpy()
        outside = np.flatnonzero((candidates < frames.start) | (candidates >= frames.stop))
        r = int(generator.choice(outside if len(outside) else len(candidates)))
        noise = torch.from_numpy(
            generator.standard_normal((1 + n, *file.get_slice("mean").get_shape()[1:]), np.float32)
        )
        posterior_noise = torch.from_numpy(generator.standard_normal((n, *noise.shape[1:]), np.float32))
        mean, logvar = (file.get_slice(name)[start : start + n].float() for name in ("mean", "logvar"))
        clean = mean + (0.5 * logvar).exp() * posterior_noise
        latents = torch.cat([file.get_slice("ref_clean")[r : r + 1].float(), clean])
        condition = image_condition(file.get_slice("ref_noisy")[r : r + 1].float(), 1 + n)[0] * (not drop_reference)
        text = file.get_tensor("text").float()
        sample = {
            "latents": scale * latents,
            "noise": noise,
            "condition": condition,
            "text": self.null_text.expand_as(text) if drop_text else text,
        }
        if args.stage == "0":
            return sample

        masks = self.location_cue(file, frames, int(candidates[r]), generator)

        def cue(source: str, k: int) -> list[Tensor]:
            """(1+n, 17, h, w) for pose and face: slot 0 the reference's own, then variant k of the window's."""
            streams = []
            for name, mask in zip(("pose", "face"), masks):
                own = file.get_slice(f"ref_{name}")[r : r + 1]
                window = file.get_slice(source + name)[k, start : start + n]
                slots = torch.cat([scale * torch.cat([own, window]).float(), mask], dim=1)
                if args.ref_slot == "copy":
                    slots[0] = slots[1]
                streams.append(slots * (not drop_cues))
            streams[1] *= not (drop_face or args.face == "none")
            return streams

        variants = file.get_slice("pose").get_shape()[0]
        k = int(generator.integers(variants)) * self.training
        if args.stage == "2":
            sample["teacher_pose"], sample["teacher_face"] = cue("", 0)
            k = int(generator.integers(file.get_slice("pseudo_pose").get_shape()[0]))
            k = k if self.training else k - k % variants  # the first of each pseudo driver
        sample["pose"], sample["face"] = cue("pseudo_" if args.stage == "2" else "", k)
        if drop_reference:  # slot 0's cues would still show her
            for name in ("pose", "face", "teacher_pose", "teacher_face"):
                if name in sample:
                    sample[name][0] = 0
        if args.ref_slot == "copy":
            sample["latents"][0] = sample["latents"][1]
        return sample

    def location_cue(self, file, frames: slice, reference: int, generator: np.random.Generator) -> list[Tensor]:
        """Masks of body and face, (1+n, 1, h, w): the reference frame's, then means over the frames of each of n latent frames.

        Paper silent: the softening cells; here of 8, 16 or 32 pixels, anywhere, so that no grid is learned.
        """
        masks = []
        for name in ("body", "face_mask"):
            bits = file.get_slice(name)
            packed = torch.cat([bits[reference : reference + 1], bits[frames]])
            mask = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1).astype(np.float32))
            masks.append(torch.cat([mask[:1], pool_time(mask[1:])]))
        if self.args.location == "soft":  # linear, so it may come after the mean over time, when less is left to do
            cell, phase = int(generator.choice([8, 16, 32])), generator.integers(32, size=2)
            cell, phase = (cell, phase) if self.training else (16, (0, 0))
            masks[0] = torch.from_numpy(cues.grid_soften(masks[0].numpy(), cell, "mean", phase))
        return [F.avg_pool2d(mask[:, None], 8) * (self.args.location != "none") for mask in masks]


class Pictures:
    """What the drawn world's VAE learns from: pieces of drawn clips (two of three), of pose cues and of face cues."""

    skipped = 0  # as Clips counts

    def __init__(self, args, clips: int = 500):
        self.args, self.pool = args, []
        for number in tqdm(range(clips), desc="draw", unit="clip", disable=int(os.environ.get("RANK", 0)) > 0):
            clip = toy_clip(number)
            track = cues.analyse(clip.video, clip.video[0], toy_finder(clip), cues.CueOptions(align="none"))
            pose, face, _, _ = (np.stack(part) for part in zip(*cues.render(clip.video, track)))
            small = [((part + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1) for part in (pose, face)]
            self.pool.append(([clip.video] * 4 + small, clip.body))

    def __len__(self) -> int:
        return len(self.pool)

    def batch(self, step: int, indices: Iterable[int], G: int) -> dict[str, Tensor]:
        """In most steps four small pieces a sample, each of another clip; else a whole picture, for GroupNorm sees all of
        it, or pieces of 17 frames, two chunks of which the second has a past."""
        kind = keyed(self.args.seed, step).choice(3, p=[0.7, 0.2, 0.1])
        frames, size, count = ((9, TOY_SIZE // 2, 4), (9, TOY_SIZE, 1), (17, TOY_SIZE // 2, 2))[kind]
        videos, noises = [], []
        for generator in (keyed(self.args.seed, step, i, k) for i in indices for k in range(count)):
            pieces, body = self.pool[generator.integers(len(self.pool))]
            t, y, x = self.corner(body, frames, size, generator)
            piece = pieces[generator.integers(len(pieces))][t : t + frames, y : y + size, x : x + size]
            videos.append(to_tensor(np.ascontiguousarray(piece[:, :, :: int(generator.choice([-1, 1]))])))
            latent = ((frames - 1) // 4 + 1, 16, size // 8, size // 8)
            noises.append(torch.from_numpy(generator.standard_normal(latent, np.float32)))
        return {"video": torch.stack(videos), "noise": torch.stack(noises)}

    @staticmethod
    def corner(body: np.ndarray, frames: int, size: int, generator: np.random.Generator) -> tuple[int, int, int]:
        """(t, y, x) where a piece starts: three of four show a point of the person, who is the hard part of a picture."""
        t, y, x = generator.integers(np.array(body.shape) - (frames, size, size), endpoint=True)
        person = np.argwhere(body[t])
        if len(person) and generator.random() < 0.75:
            point = person[generator.integers(len(person))] - generator.integers(size, size=2)
            y, x = np.clip(point, 0, np.array(body.shape[1:]) - size)
        return int(t), int(y), int(x)


class Made(torch.utils.data.Dataset):
    """make(n) for n = 0, 1, ...; an error is a result like any other, for DataLoader would add a traceback to its words."""

    def __init__(self, make: Callable[[int], object], count: int):
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int):
        try:
            return self.make(n)
        except Exception as error:
            return error


def ahead(items: Iterator) -> Iterator:
    """The items, each made in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # leave the cores to the step
        upcoming = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item


def prefetched(make: Callable[[int], object], count: int, workers: int = 0) -> Iterator:
    """make(0), make(1), ..., in order and made ahead of their use: in a thread, or in so many processes."""
    made = Made(make, count)
    if workers:
        pinned = torch.cuda.is_available()  # from there a copy to the GPU keeps nobody waiting
        settings = dict(batch_size=None, num_workers=workers, pin_memory=pinned, multiprocessing_context="fork")
        items = torch.utils.data.DataLoader(made, **settings)
    else:
        items = ahead(map(made.__getitem__, range(count)))
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


# fmt: off
def parse_args(argv=None) -> tuple[Parser, argparse.Namespace]:
    import prepare  # real data; it imports this file

    parser = Parser(__doc__, prog="data.py")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare.add_commands(commands)
    add = commands.add_parser("toy", help="cache clips of the drawn world").add_argument
    add("-o", "--output", type=Path, default=Path("runs/toy-data"), help="data folder to make or extend")
    add("--vae", type=Path, default=ASSETS / "toy-vae.safetensors", help="weights of the drawn world's VAE")
    add("--clips", type=natural, default=500, help="training clips")
    add("--held-out", type=natural, default=64, help="test clips, of people and motions that training never sees")
    add("--variants", type=natural, default=1, help="cue variants a clip, the first without augmentation")
    add("--refs", type=natural, default=4, help="reference frames a clip, each with pixel noise of its own")
    add("--pose-cue", choices=["lowpass", "gray", "rgb", "skeleton"], default="lowpass", help="Table 3: S4 gray, S3 rgb, S5 skeleton")
    add("--joint-noise", type=real(0), default=0.0, help="error of the skeleton's joints: pixels, one standard deviation")
    add("--face-cue", choices=["centered", "inplace"], default="centered", help="Table 3: S2 inplace")
    add("--misalign", type=real(0, 1), default=0.1, help="how far A.2 moves a pseudo Pose Cue, against the 5B model's ranges of scale and shift")
    add("--pseudo-faults", type=real(0, 1), default=0.0, help="share of pseudo drivers who do another motion (Table 6: no filter)")
    add("--pseudo-people", type=natural, help="how many people all pseudo drivers are; default: one a clip (Table 6: single source)")
    workers = min(os.cpu_count(), 16) if torch.cuda.is_available() else os.cpu_count()  # each takes half a GB of the GPU
    add("--workers", type=natural, default=workers, help="processes that draw and encode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the VAE")
    add = commands.add_parser("example", help="draw the example that README uses").add_argument
    add("-o", "--output", type=Path, default=ASSETS, help="folder to write to")
    return parser, parser.parse_args(argv)
# fmt: on


def main(argv=None):
    import prepare

    parser, args = parse_args(argv)
    commands = {"toy": make_toy, "example": make_example, **prepare.COMMANDS}
    try:
        commands[args.command](args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except torch.OutOfMemoryError as error:
        parser.exit(2, f"{parser.prog}: {str(error).splitlines()[0]} Use a smaller --area or fewer --workers\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
