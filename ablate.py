"""The paper's ablations in the drawn world: train as a row of a table says, measure against the truth.

    python ablate.py score runs/toy-stage2 --sheet sheet.png      # one model
    python ablate.py run full S1 S8 --seeds 3                     # rows: data, stage 1, stage 2, results/ROW-SEED.json

A pair is a person A, a motion, and another person B who performs it. The model gets one picture of A (another moment
of the clip), Pose and Face Cue of B, and the Location Cue of A's own clip, as the paper evaluates (pose and face from
pseudo drivers, place from the clip). Truth is A performing the motion: a drawn world has it, real data never do.

    masked L1, masked PSNR   over A's silhouette, two pixels wider
    joint error              how far, in pixels, what surrounds a visible joint has to be moved to fit best: see `locate`
    identity                 is the nearest of 16 people by the colours of the silhouette A? One of the 16 is B

The trivial answers they are compared with: A's picture standing still, and the driver's own frames.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cues
import data
import toy
from data import (
    ASSETS,
    TOY_SIZE,
    encode_cues,
    encode_image,
    image_condition,
    to_picture,
    to_tensor,
    toy_text,
    write_text,
)
from diffusion import Schedule, dpm_solver
from evaluate import masked_l1, masked_psnr
from load_cogvideox import load_weights, pick_device
from video import write_image

FIRST = 2_000_000  # pairs from this number on; data.py draws none of them
FRAMES, REFERENCE_FRAME = 17, 32  # one window of 5 latents; the reference is a later moment
REACH, PATCH = 16, 6  # pixels that `locate` searches to each side, and half a patch
PEOPLE = 16


class Pair(NamedTuple):
    reference: np.ndarray  # (H, W, 3) uint8
    truth: toy.Clip  # A performs the motion
    driver: toy.Clip  # B performs it
    others: list[toy.Clip]  # 14 more who do, a few frames of each


def draw_pair(number: int) -> Pair:
    seed = FIRST + number
    whole = toy.render(seed, seed, frames=REFERENCE_FRAME + 1, size=TOY_SIZE)
    people = [
        toy.render(FIRST + 10_000 * k + number, seed, frames=FRAMES if k < 2 else 3, size=TOY_SIZE)
        for k in range(PEOPLE)
    ]
    return Pair(whole.video[REFERENCE_FRAME], people[0], people[1], people[2:])


# ---- measures ------------------------------------------------------------------------------------------------------


def locate(truth: np.ndarray, mask: np.ndarray, joint: np.ndarray, picture: np.ndarray) -> float:
    """Distance in pixels between a joint of the true picture and the place in `picture` that looks most like it.

    The 13 x 13 pixels around the joint, inside the person's mask, are moved up to 16 pixels each way over `picture`;
    the place with the least squared difference wins. truth, picture (H, W, 3) uint8; mask (H, W) bool; joint (x, y),
    inside the mask's box.
    """
    x, y = np.rint(joint).astype(int) + PATCH + REACH
    pad = lambda p: cv2.copyMakeBorder(p, *[PATCH + REACH] * 4, cv2.BORDER_REPLICATE)  # noqa: E731
    around = lambda p, r: p[y - r : y + r + 1, x - r : x + r + 1]  # noqa: E731
    patch, search = around(pad(truth), PATCH), around(pad(picture), PATCH + REACH)
    inside = around(pad(mask.astype(np.uint8)), PATCH).astype(np.float32)
    cost = cv2.matchTemplate(
        np.float32(search), np.float32(patch), cv2.TM_SQDIFF, mask=np.repeat(inside[..., None], 3, 2)
    )
    away = np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1])
    return float(away.flat[np.argmin(cost + 1e-3 * away * max(inside.sum(), 1))])  # of equal places the nearest


def joint_errors(truth: toy.Clip, video: np.ndarray) -> list[float]:
    """`locate` for every joint that can be seen, over all frames."""
    errors = []
    for frame in range(len(video)):
        for joint in truth.joints[frame][truth.visible[frame]]:
            errors.append(locate(truth.video[frame], truth.body[frame], joint, video[frame]))
    return errors


def clothes(video: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(4, 3): the mean colour, in CIE Lab, of four bands of the silhouettes (T, H, W), from head to feet."""
    bands = [[] for _ in range(4)]
    for frame, mask in zip(video, masks):
        lab = cv2.cvtColor(np.float32(frame) / 255, cv2.COLOR_RGB2Lab)
        rows = np.nonzero(mask)[0]
        for band, part in zip(bands, np.array_split(np.sort(rows), 4)):  # a quarter of the silhouette's pixels each
            inside = mask.copy()
            inside[: part[0]], inside[part[-1] + 1 :] = False, False
            band.append(lab[inside].mean(0))
    return np.array([np.mean(band, axis=0) for band in bands])


def nearest_person(video: np.ndarray, pair: Pair) -> int:
    """Index, among A, B and the 14 others, of the one whose colours are nearest; 0 is right."""
    found = clothes(video, pair.truth.body)
    people = [pair.truth, pair.driver, *pair.others]
    return int(np.argmin([np.linalg.norm(found - clothes(c.video, c.body), axis=1).sum() for c in people]))


def measure(pair: Pair, video: np.ndarray) -> dict:
    """One clip (T, H, W, 3) uint8 against the truth."""
    masks = [cv2.dilate(body.astype(np.uint8), np.ones((5, 5), np.uint8)) for body in pair.truth.body]
    frames = list(zip(video, pair.truth.video, masks))
    return {
        "masked_l1": float(np.mean([masked_l1(*frame) for frame in frames])),
        "masked_psnr": float(np.mean([masked_psnr(*frame) for frame in frames])),
        "joint_error": joint_errors(pair.truth, video),
        "identity": float(nearest_person(video, pair) == 0),
    }


def summary(rows: list[dict]) -> dict:
    """Means over clips; of the joint error the median over all joints of all clips."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "joint_error"}
    return means | {"joint_error": float(np.median(np.concatenate([row["joint_error"] for row in rows])))}


# ---- sampling ------------------------------------------------------------------------------------------------------


def conditions(vae, pair: Pair, args, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's latent (1, 16, h, w), and pose and face cues (1, 6, 17, h, w) with the reference's own at slot 0."""
    looks = replace(data.toy_looks(args), location=args.location)
    draw = data.keyed(FIRST, number)
    seed = FIRST + number
    still = toy.render(seed, seed, frames=1, size=TOY_SIZE, start=REFERENCE_FRAME)
    streams = []
    for place, motion in ((still, still), (pair.truth, pair.driver)):
        body, face = data.toy_pair(motion, args, draw)
        _, own = data.toy_pair(place, args, draw)
        rows = zip(*(cues.render(*source, None, looks) for source in (body, face, own)))
        mixed = ((pose[0], face[1], *own[2:]) for pose, face, own in rows)
        streams.append(encode_cues(vae, mixed, "cpu", vae.config.scaling_factor))
    pose, face = (torch.cat(two, 1) for two in zip(*streams))
    return encode_image(vae, to_tensor(pair.reference)[None]), pose, face * (args.face != "none")


@torch.inference_mode()
def generate(model, vae, pairs: list[Pair], numbers: list[int], args, seed: int) -> list[np.ndarray]:
    """Videos (T, H, W, 3) uint8, one a pair; the noise of a pair depends on its number and the seed."""
    image, pose, face = (
        torch.cat(part) for part in zip(*(conditions(vae, p, args, n) for p, n in zip(pairs, numbers)))
    )
    generators = [torch.Generator().manual_seed(1000 * seed + n) for n in numbers]
    draw = lambda: torch.stack([torch.randn(pose[0, :, :16].shape, generator=g) for g in generators])  # noqa: E731
    condition, text = image_condition(image, pose.shape[1]), toy_text().expand(len(pairs), -1, -1)

    def velocity(latents: Tensor, step: int) -> Tensor:
        x = torch.cat([latents, condition], dim=2)
        return model(x, torch.tensor([step]), text, pose, face).float()

    latents = dpm_solver(velocity, draw(), Schedule(), args.steps, noise=draw)[:, 1:]
    video = torch.cat([vae.decode(z[None]).float() for z in latents / vae.config.scaling_factor])
    return list(to_picture(video))


def score(args) -> dict:
    """`python ablate.py score`: numbers of the model and of the trivial answers, means over pairs, for each sampling seed."""
    dtype = pick_device("cpu")[1]
    model, header = load_weights(args.checkpoint, dtype)
    vae = load_weights(args.vae, dtype)[0].eval()
    rows: dict[str, list] = {
        "still reference": [],
        "driver's frames": [],
        **{f"seed {s}": [] for s in range(args.seeds)},
    }
    sheet = []
    for first in tqdm(range(0, args.pairs, 8), desc="score", unit="batch"):
        numbers = list(range(first, min(first + 8, args.pairs)))
        pairs = [draw_pair(n) for n in numbers]
        rows["still reference"] += [measure(p, np.stack([p.reference] * FRAMES)) for p in pairs]
        rows["driver's frames"] += [measure(p, p.driver.video) for p in pairs]
        for seed in range(args.seeds):
            videos = generate(model.eval(), vae, pairs, numbers, args, seed)
            rows[f"seed {seed}"] += [measure(p, video) for p, video in zip(pairs, videos)]
            if seed == 0 and len(sheet) < args.rows:
                sheet += [sheet_row(p, video) for p, video in zip(pairs, videos)]
    result = {
        "checkpoint": str(args.checkpoint),
        "stage": header.get("stage"),
        "step": header.get("step"),
        "pairs": args.pairs,
    }
    result |= {
        "sampling_steps": args.steps,
        "answers": {name: summary(values) for name, values in rows.items()},
    }
    print(table(result["answers"]))
    if args.sheet:
        write_image(args.sheet, np.concatenate(sheet[: args.rows]), comment="AI-generated: drawn figures")
        print(f"wrote {args.sheet}")
    if args.output:
        write_text(args.output, json.dumps(result, indent=1) + "\n")
    return result


def sheet_row(pair: Pair, video: np.ndarray) -> np.ndarray:
    """reference | driver, output, truth at three moments, each twice its size."""
    moments = [pair.reference]
    for frame in (0, FRAMES // 2, FRAMES - 1):
        moments += [
            np.full((TOY_SIZE, 4, 3), 255, np.uint8),
            pair.driver.video[frame],
            video[frame],
            pair.truth.video[frame],
        ]
    return np.concatenate(moments, axis=1).repeat(2, 0).repeat(2, 1)


def table(answers: dict[str, dict]) -> str:
    """Markdown, a line an answer."""
    names = list(next(iter(answers.values())))
    lines = ["| answer | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    cells = {a: " | ".join(f"{row[n]:.3f}" for n in names) for a, row in answers.items()}
    return "\n".join(lines + [f"| {answer} | {row} |" for answer, row in cells.items()])


# ---- rows: what a table of the paper changes -----------------------------------------------------------------------


class Row(NamedTuple):
    table: str  # of the paper
    what: str
    looks: tuple = ()  # flags of data.py toy and of score
    data: tuple = ()  # flags of data.py toy alone
    both: tuple = ()  # flags of both stages
    second: tuple = ()  # flags of stage 2 alone
    judge: tuple = ()  # flags of score alone


ROWS = {
    "full": Row("", "DirectAnimator"),
    "S1": Row("3", "without Face Cue", both=("--face", "none"), judge=("--face", "none")),
    "S2": Row("3", "Face Cue not enlarged and centred", looks=("--face-cue", "inplace")),
    "S3": Row("3", "Pose Cue in colour", looks=("--pose-cue", "rgb")),
    "S4": Row("3", "Pose Cue gray, no low-pass", looks=("--pose-cue", "gray")),
    "S5": Row("3", "skeleton, exact joints", looks=("--pose-cue", "skeleton")),
    "S5-2px": Row("3", "skeleton, 2 px error", looks=("--pose-cue", "skeleton", "--joint-noise", "2")),
    "S5-4px": Row("3", "skeleton, 4 px error", looks=("--pose-cue", "skeleton", "--joint-noise", "4")),
    "S6": Row("3", "without Location Cue", both=("--location", "none"), judge=("--location", "none")),
    "S7": Row("3", "Location Cue, hard mask", both=("--location", "hard"), judge=("--location", "hard")),
    "S8": Row("3", "without Same2X, from the teacher", second=("--lambda", "0")),
    "S8-backbone": Row("3", "without Same2X, from the backbone", second=("--lambda", "0", "--init", "backbone")),
    "full-backbone": Row("Fig. 1", "with Same2X, from the backbone", second=("--init", "backbone")),
    "D2": Row("4", "aligned at block 2 of 4 (paper: 20 of 42)", second=("--align-depth", "2")),
    "D3": Row("4", "aligned at block 3 of 4 (paper: 30 of 42)", second=("--align-depth", "3")),
    "lambda0.1": Row("4", "lambda 0.1", second=("--lambda", "0.1")),
    "lambda1": Row("4", "lambda 1", second=("--lambda", "1")),
    "concat": Row("5", "DC injection", both=("--cue-injection", "concat")),
    "cross": Row("5", "CA injection", both=("--cue-injection", "cross")),
    "unfiltered": Row("6", "3 of 10 pseudo performers do another motion", data=("--pseudo-faults", "0.3")),
}


def slug(*flags: str) -> str:
    return "".join(flag.lstrip("-") + ("-" if flag.startswith("--") else ".") for flag in flags).rstrip(".-") or "base"


class Pieces:
    """What `run` has to do for some rows and seeds: data, stage 1, stage 2, scores; each a command by what it makes."""

    # fmt: off
    def __init__(self, args):
        self.stages: tuple[dict, dict, dict, dict] = {}, {}, {}, {}
        python, work = sys.executable, args.work
        steps = ["--save-every", "500", "--eval-every", str(args.eval_every), "--device", "cpu", "--resume"]
        for name, row in ((name, ROWS[name]) for name in args.rows):
            folder = work / f"data-{slug(*row.looks, *row.data)}"
            self.stages[0][folder / "clips.jsonl"] = [
                python, "data.py", "toy", "-o", folder, "--clips", args.clips, *row.looks, *row.data]
            for seed in range(args.seeds):
                first = work / f"stage1-{slug(*row.looks, *row.data, *row.both)}-{seed}"
                second, result = work / f"stage2-{name}-{seed}", args.results / f"{name}-{seed}.json"
                common = [python, "train.py", "--preset", "toy", "--data", folder, "--seed", seed, *steps, *row.both]
                self.stages[1][first / f"step-{args.steps[0]:07d}"] = [
                    *common, "--stage", "1", "-o", first, "--steps", args.steps[0]]
                self.stages[2][second / f"step-{args.steps[1]:07d}"] = [
                    *common, "--stage", "2", "-o", second, "--steps", args.steps[1], "--teacher", first, *row.second]
                self.stages[3][result] = [
                    python, "ablate.py", "score", second, "--seeds", "1", "-o", result, *row.looks, *row.judge]
    # fmt: on

    def missing(self) -> int:
        return sum(not target.exists() for stage in self.stages for target in stage)


def run(args) -> None:
    """`python ablate.py run`: all that is missing for the rows, as many pieces at a time as there are cores; start it again to go on."""
    args.rows = args.rows or list(ROWS)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        raise ValueError(f"no row {unknown[0]}; there are {', '.join(ROWS)}")
    if args.quick:
        args.steps, args.seeds, args.clips, args.eval_every = (20, 20), 1, 16, 10
    args.work, args.results = args.work.resolve(), args.results.resolve()
    args.results.mkdir(parents=True, exist_ok=True)
    for name in args.rows:
        print(f"{name}: {ROWS[name].what}" + f" (Table {ROWS[name].table})" * ROWS[name].table.isdigit())
    pieces = Pieces(args)
    trainings = sum(not target.exists() for stage in pieces.stages[1:3] for target in stage)
    hours = trainings * sum(args.steps) / 2 * 0.4 / args.jobs / 3600
    print(
        f"{pieces.missing()} pieces are missing, {trainings} of them trainings: about {hours:.1f} h at 0.4 s a step and core"
    )
    bar = tqdm(total=pieces.missing(), desc="ablate", unit="piece")
    for stage in pieces.stages:
        alone = stage is pieces.stages[0]  # data.py uses all cores by itself
        todo = [(target, command) for target, command in stage.items() if not target.exists()]
        with ThreadPoolExecutor(1 if alone else args.jobs) as pool:
            for _ in pool.map(lambda piece: execute(args.work, *piece), todo):
                bar.update()


def execute(work: Path, target: Path, command: list) -> None:
    """One piece, on one thread; what it says goes to a log beside what it makes."""
    log = work / "logs" / f"{target.parent.name}-{target.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        here = Path(__file__).parent
        done = subprocess.run([str(c) for c in command], stdout=file, stderr=file, env=environment, cwd=here)
    if done.returncode or not target.exists():
        raise OSError(f"{' '.join(map(str, command))} failed, see {log}")


# fmt: off
def parse_args(argv=None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=show)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("score", help="measure one model against the truth", formatter_class=show).add_argument
    add("checkpoint", type=Path, nargs="?", default=ASSETS / "toy.safetensors", help="run folder or weights file of stage 1 or 2")
    add("--vae", type=Path, default=ASSETS / "toy-vae.safetensors", help="weights of the drawn world's VAE")
    add("--pairs", type=int, default=64, help="pairs of a person and a motion, none of them in any training data")
    add("--seeds", type=int, default=3, help="sampling seeds")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--pose-cue", choices=["lowpass", "gray", "rgb", "skeleton"], default="lowpass", help="as the model was trained")
    add("--joint-noise", type=float, default=0.0, help="as the model was trained")
    add("--face-cue", choices=["centered", "inplace"], default="centered", help="as the model was trained")
    add("--face", choices=["centered", "none"], default="centered", help="as the model was trained")
    add("--location", choices=["soft", "hard", "none"], default="soft", help="as the model was trained")
    add("--sheet", type=Path, metavar="PNG", help="draw reference, driver, output and truth of the first pairs")
    add("--rows", type=int, default=6, help="pairs on the sheet")
    add("-o", "--output", type=Path, metavar="JSON", help="write the numbers")
    add = commands.add_parser("run", help="train and measure rows of the paper's tables", formatter_class=show).add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    add("--seeds", type=int, default=3, help="trainings of each row")
    add("--steps", type=int, nargs=2, default=(2500, 2000), metavar=("FIRST", "SECOND"), help="steps of stage 1 and 2")
    add("--clips", type=int, default=800, help="training clips")
    add("--eval-every", type=int, default=100, help="steps between held-out losses")
    add("--jobs", type=int, default=os.cpu_count(), help="pieces at a time, a core each")
    add("--work", type=Path, default=Path("runs/ablate"), help="folder for data and runs")
    add("--results", type=Path, default=Path("results"), help="folder for the numbers")
    add("--quick", action="store_true", help="a few steps of everything: does it run?")
    for command in (parser, *commands.choices.values()):
        command.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    return parser, parser.parse_args(argv)
# fmt: on


def main(argv=None) -> None:
    parser, args = parse_args(argv)
    try:
        {"score": score, "run": run}[args.command](args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
