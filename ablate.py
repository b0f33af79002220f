"""The paper's ablations in the drawn world: train as a row of a table says, judge against the truth, fill the ledger.

    python ablate.py run                      # all rows, 3 seeds: data, stage 1, stage 2, results/ROW-SEED.json
    python ablate.py run full S1 --seeds 1    # some of them; what is finished is not done again
    python ablate.py table                    # results/*.json -> the ledger in README.md, results/*.png

A row differs from `full` in the flags that it names and in nothing else. Seed k of every row has the same clips, noise
and steps as seed k of `full`, and rows that differ in stage 2 alone share stage 1: so rows are compared seed by seed.
Verdict: `full` is better if the mean of the seed-by-seed differences exceeds their standard error times Student's 95 %
quantile (4.30 for three seeds), worse if it does so in the other direction; otherwise no difference is seen. Clips and
test pairs are the same for all seeds, so this is the error of training only. One verdict in twenty sees a difference by chance.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import write_text
from video import Parser, natural

README = Path(__file__).parent / "README.md"


class Row(NamedTuple):
    table: str  # of the paper
    what: str
    paper: str = ""  # its numbers for this row; for `full` beside it
    meter: str = "masked_l1"  # what the verdict looks at
    looks: tuple = ()  # flags of data.py toy and of judge.py
    data: tuple = ()  # flags of data.py toy alone
    both: tuple = ()  # flags of both stages
    second: tuple = ()  # flags of stage 2 alone
    judge: tuple = ()  # flags of judge.py alone
    against: str = "full"
    claim: str = "better than"  # what the paper says of `against` and this row; or "no different from"


def skeleton(noise: int) -> tuple:
    return "--pose-cue", "skeleton", "--joint-noise", str(noise)


# fmt: off
ROWS = {
    "full": Row("", "DirectAnimator", "FIS 0.638, FVD 180.5"),
    "S1": Row("Table 3, S1", "without Face Cue", "FIS 0.418, FVD 245.5", "face_l1", both=("--face", "none"), judge=("--face", "none")),
    "S2": Row("Table 3, S2", "Face Cue not enlarged and centred", "FIS 0.610, FVD 185.9", "face_l1", looks=("--face-cue", "inplace")),
    "S3": Row("Table 3, S3", "Pose Cue in colour", "FIS 0.591, FVD 191.9", looks=("--pose-cue", "rgb")),
    "S4": Row("Table 3, S4", "Pose Cue gray, no low-pass", "FIS 0.625, FVD 184.1", looks=("--pose-cue", "gray")),
    "S5": Row("Table 3, S5", "skeleton as Pose Cue, exact joints", "FIS 0.578, FVD 216.4", looks=skeleton(0)),
    "S5-2px": Row("Table 3, S5", "skeleton as Pose Cue, joints 2 px off", "FIS 0.578, FVD 216.4", looks=skeleton(2)),
    "S6": Row("Table 3, S6", "without Location Cue", "FIS 0.529, FVD 203.7", both=("--location", "none"), judge=("--location", "none")),
    "S7": Row("Table 3, S7", "Location Cue, hard mask", "FIS 0.582, FVD 228.5", both=("--location", "hard"), judge=("--location", "hard")),
    "S8": Row("Table 3, S8", "without Same2X, stage 2 from the teacher", "FIS 0.530, FVD 290.4", second=("--lambda", "0")),
    "full-backbone": Row("Fig. 1", "with Same2X, stage 2 from the backbone", second=("--init", "backbone")),
    "S8-backbone": Row("Table 3, S8", "without Same2X, stage 2 from the backbone", "FIS 0.530, FVD 290.4",
                       second=("--lambda", "0", "--init", "backbone"), against="full-backbone"),
    "full-placed": Row("", "DirectAnimator, placed by the driver's aligned mask", judge=("--place", "driver")),
    "S7-placed": Row("Table 3, S7", "the same with a hard mask", "FIS 0.582, FVD 228.5", both=("--location", "hard"),
                     judge=("--location", "hard", "--place", "driver"), against="full-placed"),
    "D2": Row("Table 4", "aligned at block 2 of 4 (paper: 20 of 42)", "FIS 0.591, FVD 231.0", second=("--align-depth", "2")),
    "D3": Row("Table 4", "aligned at block 3 of 4 (paper: 30 of 42)", "FIS 0.503, FVD 423.5", second=("--align-depth", "3")),
    "lambda0.1": Row("Table 4", "lambda 0.1", "FIS 0.634, FVD 189.7", second=("--lambda", "0.1"), claim="no different from"),
    "lambda1": Row("Table 4", "lambda 1", "FIS 0.627, FVD 191.8", second=("--lambda", "1"), claim="no different from"),
    "concat": Row("Table 5", "DC injection", "FIS 0.544, FVD 372.8", both=("--cue-injection", "concat")),
    "cross": Row("Table 5", "CA injection", "FIS 0.502, FVD 453.7", both=("--cue-injection", "cross")),
    "unfiltered": Row("Table 6", "3 of 10 pseudo drivers do another motion", "FIS 0.584, FVD 218.3", data=("--pseudo-faults", "0.3")),
    "single": Row("Table 6", "one pseudo driver for all clips", "FIS 0.630-0.635, FVD 187-191", data=("--pseudo-people", "1")),
    "blurred": Row("A.6", "driver with motion blur, exposed over 4 frames", "fails", judge=("--degrade", "motion_blur")),
    "dark": Row("A.6", "driver in low light", "fails", judge=("--degrade", "low_light")),
    "coarse": Row("A.6", "driver at an eighth of the resolution", "fails", judge=("--degrade", "low_resolution")),
}
# fmt: on
BASES = {row.against for row in ROWS.values()}  # what rows are compared with
BETTER_HIGH = "masked_psnr", "identity"
STUDENT = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 95 % of |t| for so many seeds
QUICK = "full", "S5", "S8", "dark"


# ---- training and judging ------------------------------------------------------------------------------------------


def slug(*flags: str) -> str:
    return "".join(flag.lstrip("-") + ("-" if flag.startswith("--") else ".") for flag in flags).rstrip(".-") or "base"


class Piece(NamedTuple):
    kind: str
    command: list
    after: tuple  # what has to be there first
    seconds: float  # about, of one core


# fmt: off
def pieces(args) -> dict[Path, Piece]:
    """What `run` has to do for some rows and seeds, row by row: what is made, and how."""
    found, work, (steps1, steps2) = {}, args.work, args.steps
    workers = max(1, args.jobs // len({ROWS[name].looks + ROWS[name].data for name in args.rows}))  # all data at once
    device = ["--device", args.device] if args.device else []
    common = ["--preset", "toy", "--ema", "0.99", "--save-every", "500", "--resume", *device]
    common += ["--compile"] * args.compile
    step = 0.5 if args.compile else 0.8

    def add(kind: str, target: Path, seconds: float, after: list, *command) -> Path:
        found.setdefault(target, Piece(kind, [sys.executable, *command], tuple(after), seconds))
        return target

    for name, row in ((name, ROWS[name]) for name in args.rows):
        folders = []
        for flags in (row.looks, row.looks + row.data):  # stage 1 sees no pseudo cues
            folder = work / f"data-{slug(*flags)}-{args.clips}"
            add("data", folder / "clips.jsonl", 1.7 * (args.clips + args.held_out), [], "data.py", "toy", "-o", folder,
                "--clips", args.clips, "--held-out", args.held_out, "--variants", "1", "--workers", workers, *device, *flags)
            folders.append(folder)
        for seed in range(args.seeds):
            trained = f"{slug(*row.looks, *row.both)}-{args.clips}-{steps1}"
            first = work / f"stage1-{trained}-{seed}"
            second = work / f"stage2-{trained}-{slug(*row.data, *row.second)}-{steps2}-{seed}"
            train = ["train.py", *common, "--seed", seed, *row.both]
            last1 = add("stage 1", first / f"step-{steps1:07d}", step * steps1, [folders[0] / "clips.jsonl"], *train,
                "--stage", "1", "--data", folders[0], "-o", first, "--steps", steps1, "--eval-every", steps1)
            last2 = add("stage 2", second / f"step-{steps2:07d}", step * steps2, [folders[1] / "clips.jsonl", last1], *train,
                "--stage", "2", "--data", folders[1], "-o", second, "--steps", steps2, "--eval-every", args.eval_every,
                "--teacher", first, *row.second)
            add("result", args.results / f"{name}-{seed}.json", 2.5 * args.pairs, [last2], "judge.py", second, "--seeds", "1",
                "--pairs", args.pairs, "--sampler", "ddim", "--steps", "10", "-o", args.results / f"{name}-{seed}.json",
                *device, *row.looks, *row.judge)
    return found
# fmt: on


def run(args) -> None:
    """`python ablate.py run`: all that is missing for the rows, as many pieces at a time as there are cores."""
    if args.quick:
        args.steps, args.seeds, args.clips, args.eval_every, args.pairs, args.held_out = (4, 4), 1, 8, 2, 2, 4
        args.work, args.results = args.work / "quick", args.results / "quick"
    args.rows = args.rows or list(QUICK if args.quick else ROWS)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        raise ValueError(f"no row {unknown[0]}; there are {', '.join(ROWS)}")
    args.work, args.results = args.work.resolve(), args.results.resolve()
    for folder in (args.work, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.rows:
        print(f"{name}: {ROWS[name].what}" + f" ({ROWS[name].table})" * bool(ROWS[name].table))
    every = pieces(args)
    check_results({target: piece.command for target, piece in every.items() if piece.kind == "result"}, args.pairs)
    todo = {target: piece for target, piece in every.items() if not target.exists()}
    counts = Counter(piece.kind for piece in todo.values())
    total = sum(piece.seconds for piece in todo.values()) / args.jobs
    print(
        f"missing: {', '.join(f'{n} x {kind}' for kind, n in counts.items()) or 'nothing'}: about {total / 3600:.1f} h"
    )
    with open(args.work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{args.work}: another ablate.py works there; wait for it, or take another --work"
            ) from None
        work_off(todo, args)


def work_off(todo: dict[Path, Piece], args) -> None:
    """The pieces in their order, `jobs` at a time, each when what it needs is there. One that fails stops only what needs it."""
    bar = tqdm(total=round(sum(piece.seconds for piece in todo.values())), desc="ablate", unit="s of a core")
    waiting, running, failed = dict(todo), {}, {}
    pool = ThreadPoolExecutor(args.jobs)
    try:
        while waiting or running:
            for target, piece in list(waiting.items()):
                if lost := [before for before in piece.after if before in failed]:
                    failed[target] = failed[lost[0]]
                    del waiting[target]
                elif len(running) < args.jobs and not any(b in waiting or b in running.values() for b in piece.after):
                    running[pool.submit(execute, args.work, target, piece.command)] = target
                    del waiting[target]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                target = running.pop(future)
                bar.update(round(todo[target].seconds))
                if future.exception():
                    failed[target] = str(future.exception())
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    if failed:
        raise OSError("; ".join(dict.fromkeys(failed.values())))


def check_results(results: dict[Path, list], pairs: int) -> None:
    """ValueError if what is there was made with other steps, clips or pairs: it would pass for finished."""
    for path, command in results.items():
        if path.exists():
            found = read_result(path)
            if (found["checkpoint"], found["pairs"]) != (command[2].name, pairs):
                made = f"{found['checkpoint']} and {found['pairs']} pairs"
                raise ValueError(f"{path} is of {made}, not {command[2].name} and {pairs}: take another --results")


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


# ---- the ledger ----------------------------------------------------------------------------------------------------


def read_result(path: Path) -> dict:
    try:
        result = json.loads(path.read_text())
        return result if result["answers"]["seed 0"] and result["training"]["held_out"] else result["no curve"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: not a result of judge.py for a run folder; remove it and run ablate.py again"
        ) from None


def read_results(folder: Path) -> dict[str, dict[int, dict]]:
    """results/ROW-SEED.json -> {row: {seed: result}}, in the order of ROWS."""
    found = {name: {} for name in ROWS}
    for path in folder.glob("*-*.json"):
        name, _, seed = path.stem.rpartition("-")
        if name in ROWS and seed.isdigit():
            found[name][int(seed)] = read_result(path)
    found = {name: dict(sorted(row.items())) for name, row in found.items() if row}
    if not found:
        raise ValueError(f"{folder}: no results there; make some with: python ablate.py run")
    made = {}
    for name, row in found.items():
        for seed, result in row.items():
            training = result["training"]
            settings = result["pairs"], result["sampling_steps"], training["steps"], training["batch"]
            made.setdefault(settings, f"{name}-{seed}.json")
    if len(made) > 1:
        raise ValueError(
            f"{folder}: {' and '.join(made.values())} differ in pairs, steps or batch: keep results of one kind"
        )
    return found


def numbers(row: dict[int, dict], meter: str) -> dict[int, float]:
    return {seed: result["answers"]["seed 0"][meter] for seed, result in row.items()}


def gain(worse: dict[int, float], better: dict[int, float], meter: str) -> tuple[float, float, str]:
    """By how much `better` is better than `worse`, seed by seed: mean, standard error, and what is seen by the rule of
    this file's first lines: "better", "worse", "no difference", or "too few seeds"."""
    sign = -1 if meter in BETTER_HIGH else 1
    gains = np.array([sign * (worse[seed] - better[seed]) for seed in worse if seed in better])
    if len(gains) < 3:
        return (gains.mean() if len(gains) else np.nan), np.nan, "too few seeds"
    error = gains.std(ddof=1) / len(gains) ** 0.5
    seen = abs(gains.mean()) > STUDENT.get(len(gains), 2.26) * error
    return gains.mean(), error, ("better" if gains.mean() > 0 else "worse") if seen else "no difference"


def verdict(row: Row, seen: str) -> str:
    """Does what the paper says of a row hold, given what `gain` sees?"""
    if seen == "too few seeds":
        return seen
    if row.claim == "no different from":
        return "holds (no difference seen)" if seen == "no difference" else f"does not hold ({seen})"
    return {"better": "holds", "worse": "does not hold", "no difference": "null"}[seen]


def spread(values: dict[int, float]) -> str:
    """mean ± standard deviation over seeds."""
    found = list(values.values())
    deviation = f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""
    return f"{np.mean(found):.2f}{deviation}"


def speed_up(slow: dict, fast: dict) -> float | None:
    """How many times as fast `fast` reaches the lowest held-out loss of `slow`, both before their cool-down; None if it never
    does, or none was measured there.

    Fig. 1, right. Between two losses the curve is a line; one that starts below counts from its first loss.
    """
    curves = []
    for training in (slow["training"], fast["training"]):
        level = (1 - training.get("cooldown", 0.3)) * training["steps"]
        curves.append([(step, loss) for step, loss in training["held_out"] if step <= level])
    if not curves[0]:
        return None
    step, target = min(curves[0], key=lambda point: point[1])
    last, last_loss = None, None
    for at, loss in curves[1]:
        if loss <= target:
            part = 1 if last is None else (last_loss - target) / (last_loss - loss)
            return step / ((last or 0) + part * (at - (last or 0)))
        last, last_loss = at, loss
    return None


def speed_ups(results: dict) -> list[str]:
    """A line for each pair of Fig. 1, right: the ratios seed by seed, and whether they differ from 1 by the rule."""
    lines = []
    for slow, fast in (("S8", "full"), ("S8-backbone", "full-backbone"), ("S8-backbone", "full")):
        if slow in results and fast in results:
            ratios = [speed_up(results[slow][s], results[fast][s]) for s in results[slow] if s in results[fast]]
            logs = {seed: np.log(ratio) if ratio else -np.inf for seed, ratio in enumerate(ratios)}
            seen = gain(logs, dict.fromkeys(logs, 0.0), "masked_l1")[2] if all(ratios) else "not reached by all"
            said = ", ".join(f"{ratio:.2f}" if ratio else "never" for ratio in ratios)
            lines.append(
                f"| `{fast}` against `{slow}` | 6.7 | {said} | {seen.replace('better', 'faster').replace('worse', 'slower')} |"
            )
    head = "| Fig. 1, right: how many times as fast to the same held-out loss of stage 2 | paper | ours, seed by seed | seen |"
    return [head, "|---" * 4 + "|", *lines] if lines else []


def sweep(results: dict) -> str:
    """S5 as a sentence: from which error of the joints on pixels beat a skeleton."""
    noisy = {"S5": 0, "S5-2px": 2}
    if "full" not in results or not all(name in results for name in noisy):
        return ""
    meter = ROWS["S5"].meter
    found = {
        px: gain(numbers(results[row], meter), numbers(results["full"], meter), meter) for row, px in noisy.items()
    }
    gains = ", ".join(f"{mean:.2f} at {px} px" for px, (mean, _, _) in found.items())
    won = [px for px, (_, _, seen) in found.items() if seen == "better"]
    said = f"from {won[0]} px on pixels win" if won else "pixels win at none of them"
    return f"By how much pixels beat a skeleton whose joints are off ({meter}): {gains}; {said}."


def provenance(results: dict) -> str:
    """On what machines, from how much training and how many pairs the ledger's numbers are."""
    every = [result for row in results.values() for result in row.values()]
    machines = " and ".join(dict.fromkeys(result["machine"] for result in every))
    minutes = np.median([r["training"]["steps"] / r["training"]["steps_per_s"] for r in every]) / 60
    one = every[0]
    return (
        f"Made on {machines}: {one['training']['steps']} steps of stage 2 at batch {one['training']['batch']} "
        f"({minutes:.1f} minutes, the median run), {one['pairs']} pairs, {one['sampler']} in {one['sampling_steps']} steps; "
        f"mean ± standard deviation over seeds, differences ± standard error."
    )


def ledger(results: dict) -> str:
    """Claim, command, the paper's numbers, ours, verdict: Markdown."""
    lines = ["| claim | command | paper | meter | claimed better | the row | better by | verdict |", "|---" * 8 + "|"]
    for name, row in ROWS.items():
        if name in BASES or name not in results or row.against not in results:
            continue
        worse, better = (numbers(results[r], row.meter) for r in (name, row.against))
        mean, error, seen = gain(worse, better, row.meter)
        cells = (
            f"`{row.against}` is {row.claim} {row.what} ({row.table})",
            f"`ablate.py run {name}`",
            row.paper,
            row.meter,
        )
        cells += spread(better), spread(worse), f"{mean:.2f} ± {error:.2f}", verdict(row, seen)
        lines.append("| " + " | ".join(cells) + " |")
    every = f"<details><summary>Every number of every row</summary>\n\n{meters(results)}\n\n</details>"
    parts = "\n".join(lines), sweep(results), "\n".join(speed_ups(results)), every, provenance(results)
    return "\n\n".join(part for part in parts if part)


METERS = ("masked_l1", "masked_psnr", "face_l1", "joint_error", "identity", "leak_color", "leak_texture", "leak_outline")  # fmt: skip


def meters(results: dict) -> str:
    """Every number of every row, Markdown; first the trivial answers."""
    lines = ["| row | seeds | " + " | ".join(METERS) + " |", "|---" * (2 + len(METERS)) + "|"]
    first = next(iter(next(iter(results.values())).values()))["answers"]
    for trivial in ("still reference", "driver's frames"):
        lines.append(f"| {trivial} | | " + " | ".join(f"{first[trivial][m]:.2f}" for m in METERS) + " |")
    for name, row in results.items():
        lines.append(f"| {name} | {len(row)} | " + " | ".join(spread(numbers(row, m)) for m in METERS) + " |")
    return "\n".join(lines)


def figures(results: dict, folder: Path) -> None:
    """rows.png: each row's seeds against full's mean. same2x.png: held-out loss of stage 2 with and without Same2X."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    blue, orange = "#0072b2", "#d55e00"  # of Okabe and Ito's palette: told apart by colour-blind readers too
    shown = "masked_l1", "face_l1", "joint_error", "leak_color"
    labels = {list(results)[-1]: "of another row", "full": "a seed of full"}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(12, 1 + 0.25 * len(results)), sharey=True)
    for axis, meter in zip(axes, shown):
        for y, (name, row) in enumerate(results.items()):
            found = list(numbers(row, meter).values())
            colour = blue if name == "full" else orange
            axis.plot(found, [y] * len(found), "o", color=colour, alpha=0.6, label=labels.get(name))
            axis.plot(np.mean(found), y, "|", color="black", markersize=12, label=None if y else "mean of the seeds")
        if "full" in results:
            mean = np.mean(list(numbers(results["full"], meter).values()))
            axis.axvline(mean, color=blue, linewidth=1, label="full, mean of its seeds")
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(meter + {"joint_error": ", px", "leak_color": ""}.get(meter, ", gray levels"))
    axes[0].set_yticks(range(len(results)), list(results))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    axes[0].invert_yaxis()
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(folder / "rows.png", dpi=100)

    panels = [p for p in (("full", "S8"), ("full-backbone", "S8-backbone")) if all(name in results for name in p)]
    figure, axes = pyplot.subplots(1, max(len(panels), 1), figsize=(10, 3.5), squeeze=False)
    for axis, names in zip(axes[0], panels):
        for name, colour, style in zip(names, (blue, orange), ("-", "--")):
            for k, result in enumerate(results[name].values()):
                label = f"{name}: {ROWS[name].what.split(',')[0]}" if k == 0 else None
                axis.plot(*zip(*result["training"]["held_out"]), style, color=colour, label=label, linewidth=1)
        axis.set(xlabel="step of stage 2", ylabel="held-out v-MSE, cross identity")
        axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "same2x.png", dpi=100)
    pyplot.close("all")


MARKS = "<!-- ledger: python ablate.py table -->", "<!-- end of ledger -->"


def tabulate(args) -> None:
    """`python ablate.py table`: the ledger into README.md between its marks, and the figures."""
    results, page = read_results(args.results), args.readme.read_text()
    if not all(mark in page for mark in MARKS):
        raise ValueError(
            f"{args.readme}: the ledger goes between the lines {MARKS[0]} and {MARKS[1]}, which are not there"
        )
    text = ledger(results)
    figures(results, args.results)
    before, rest = page.split(MARKS[0])
    write_text(args.readme, f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    print(text)


# fmt: off
def parse_args(argv=None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(__doc__, prog="ablate.py")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="train and judge rows of the paper's tables").add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    add("--seeds", type=natural, default=3, help="trainings of each row")
    add("--steps", type=natural, nargs=2, default=(1000, 800), metavar=("FIRST", "SECOND"), help="steps of stage 1 and 2")
    add("--clips", type=natural, default=500, help="training clips")
    add("--held-out", type=natural, default=64, help="test clips, for the held-out losses")
    add("--pairs", type=natural, default=32, help="pairs to judge a model by")
    add("--eval-every", type=natural, default=100, help="steps of stage 2 between held-out losses")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="train.py --compile: needs a C++ compiler")
    add("--device", help="cuda, mps or cpu (default: the best one present), shared by all jobs")
    add("--jobs", type=natural, default=os.cpu_count(), help="pieces at a time, a core each")
    add("--work", type=Path, default=Path("runs/ablate"), help="folder for data and runs")
    add("--results", type=Path, default=Path("results"), help="folder for the numbers")
    add("--quick", action="store_true", help=f"does it run? 4 steps, 8 clips, 2 pairs, seed 0, of {', '.join(QUICK)} if no row is given")
    add = commands.add_parser("table", help="the ledger and the figures, from results").add_argument
    add("--results", type=Path, default=Path("results"), help="folder of the numbers, and for the figures")
    add("--readme", type=Path, default=README, help="page whose ledger is replaced")
    return parser, parser.parse_args(argv)
# fmt: on


def main(argv=None) -> None:
    parser, args = parse_args(argv)
    try:
        {"run": run, "table": tabulate}[args.command](args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
