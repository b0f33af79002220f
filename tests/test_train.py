"""Both training stages on a tiny data folder: Eq. 4, the teacher, resume, ranks, mistakes."""

import contextlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from load_cogvideox import save_weights
from model import DIT_PRESETS, DiT

from conftest import ROOT


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data folder of random latents, 6x4 latents a frame, in the layout of data.py: 6 training and 2 test clips."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "cache").mkdir()
    lines = []
    for n in range(8):
        rng = np.random.default_rng(n)
        z = lambda *shape: torch.from_numpy(
            rng.standard_normal((*shape, 16, 6, 4)).astype(np.float32)
        ).bfloat16()  # noqa: E731,B023
        bits = lambda: torch.from_numpy(rng.integers(0, 256, (33, 48, 4), dtype=np.uint8))  # noqa: E731,B023
        tensors = dict(
            mean=z(9), logvar=z(9) - 4, pose=z(2, 9), face=z(2, 9), pseudo_pose=z(2, 9), pseudo_face=z(2, 9)
        )
        tensors |= dict(
            body=bits(), face_mask=bits(), ref_frame=torch.tensor([2, 17, 30]), ref_clean=z(3), ref_noisy=z(3)
        )
        tensors |= dict(ref_pose=z(3), ref_face=z(3), text=torch.randn(4, 32).bfloat16())
        save_file(tensors, folder / "cache" / f"{n}.safetensors")
        lines.append(
            {
                "id": str(n),
                "split": "test" if n > 5 else "train",
                "frames": 33,
                "fps": 16,
                "height": 48,
                "width": 32,
                "pseudo": 1,
            }
        )
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(folder, run, *extra, stage="1"):
    given = [
        "--preset",
        "tiny",
        "--stage",
        stage,
        "--data",
        folder,
        "-o",
        run,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--eval-every",
        0,
    ]
    return [str(a) for a in [*given, *extra]]


def run_training(*args, **kwargs):
    parser, parsed = train.parse_args(arguments(*args, **kwargs))
    torch.use_deterministic_algorithms(False)
    train.train(parsed)
    return parsed.output


def weights_of(run, name="model"):
    return load_file(train.checkpoints(run)[-1] / f"{name}.safetensors")


def losses_of(run):
    return [
        json.loads(line)["denoise"]
        for line in (run / "log.jsonl").read_text().splitlines()
        if "denoise" in json.loads(line)
    ]


@pytest.fixture(scope="session")
def teacher(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "stage1"
    return run_training(folder, run, "--steps", 3)


# ---- Eq. 4 ---------------------------------------------------------------------------------------------------------------


def test_eq4_same2x_loss_equals_the_loop_oracle():
    """-1/N sum over tokens of the cosine, float64, sizes all different; -1 for equal features, 1 for opposite ones."""
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    for b in range(2):
        total = 0.0
        for n in range(5):
            dot = sum(float(student[b, n, d] * teacher[b, n, d]) for d in range(7))
            norms = [sum(float(x[b, n, d]) ** 2 for d in range(7)) ** 0.5 for x in (student, teacher)]
            total += dot / (norms[0] * norms[1])
        assert train.same2x(student, teacher)[b].item() == pytest.approx(-total / 5, rel=1e-12)
    assert torch.allclose(train.same2x(student, 3 * student), torch.full((2,), -1.0, dtype=torch.float64))
    assert torch.allclose(train.same2x(student, -student), torch.ones(2, dtype=torch.float64))
    assert train.same2x(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_no_gradient_reaches_the_teacher_and_it_never_changes(folder, teacher, tmp_path):
    before = weights_of(teacher, "ema")
    run_training(folder, tmp_path / "run", "--steps", 2, "--teacher", teacher, stage="2")
    after = weights_of(teacher, "ema")
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, args = train.parse_args(arguments(folder, tmp_path, "--teacher", teacher, stage="2"))
    frozen = train.load_teacher(args, torch.float32, "cpu")
    assert not any(p.requires_grad for p in frozen.parameters()) and len(frozen.blocks) == args.align_depth


def test_teacher_sees_the_same_noisy_latents_step_text_and_reference_but_its_own_cues(folder, tmp_path):
    """A.3 and Fig. 4b; the Location Cue, last channel of each cue, is shared."""
    _, args = train.parse_args(arguments(folder, tmp_path, "--teacher", "x", stage="2"))
    batch = train.data.Clips(folder, args, 0.7).batch(3, range(8), 8)
    assert batch["pose"].shape == batch["teacher_pose"].shape == (8, 6, 17, 6, 4)
    assert torch.equal(batch["pose"][:, :, 16], batch["teacher_pose"][:, :, 16])
    kept = batch["pose"].flatten(1).any(1)
    assert kept.any() and not torch.equal(
        batch["pose"][kept][:, 1:, :16], batch["teacher_pose"][kept][:, 1:, :16]
    )
    assert torch.equal(batch["pose"][:, 0], batch["teacher_pose"][:, 0]), (
        "slot 0 is the reference's own for both"
    )


# ---- resume, ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["1", "2"])
def test_resume_after_a_stop_equals_one_straight_run_bit_for_bit(folder, teacher, tmp_path, stage):
    """Weights, average and optimizer after 10 steps; catches lost optimizer state, repeated batches and reset warm-up."""
    extra = ["--teacher", teacher] if stage == "2" else []
    straight = run_training(folder, tmp_path / "a", "--steps", 10, *extra, stage=stage)
    run_training(folder, tmp_path / "b", "--steps", 5, *extra, stage=stage)
    resumed = run_training(folder, tmp_path / "b", "--steps", 10, "--resume", *extra, stage=stage)
    for name in ("model", "ema"):
        a, b = weights_of(straight, name), weights_of(resumed, name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (
        (train.checkpoints(r)[-1] / "optimizer" / "__0_0.distcp").read_bytes() for r in (straight, resumed)
    )
    assert len(a) > 1e5 and a == b, "moments and step counters"


def torchrun(ranks, args):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        str(29500 + os.getpid() % 1000),
    ]
    done = subprocess.run(
        [*command, "train.py", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("ranks, shard", [(2, "none"), (2, "optimizer"), (4, "full")])
@pytest.mark.parametrize("stage", ["1", "2"])
def test_any_ranks_and_shards_equal_one_rank(folder, teacher, tmp_path, stage, ranks, shard):
    """In float64: losses and weights to 1e-9, with accumulation; catches wrong sample indices, averaging and slices."""
    extra = ["--teacher", teacher] if stage == "2" else []
    common = ["--steps", 6, "--dtype", "float64", "--log-every", 1, *extra]
    one = run_training(folder, tmp_path / "one", *common, "--batch", 8, stage=stage)
    many = tmp_path / "many"
    split = ["--batch", 4 // ranks, "--accumulate", 2, "--shard", shard, "--checkpointing"]
    torchrun(ranks, arguments(folder, many, *common, *split, stage=stage))
    assert losses_of(one) == pytest.approx(losses_of(many), rel=1e-9)
    for name in ("model", "ema"):
        a, b = weights_of(one, name), weights_of(many, name)
        assert max((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-30) for k in a) < 1e-9


def test_noise_levels_cover_their_intervals_and_samples_do_not_depend_on_ranks(folder, tmp_path):
    _, args = train.parse_args(arguments(folder, tmp_path))
    clips = train.data.Clips(folder, args, 0.7)
    whole = clips.batch(7, range(8), 8)
    assert sorted(whole["step"] // 125) == list(range(8))
    halves = [clips.batch(7, range(0, 4), 8), clips.batch(7, range(4, 8), 8)]
    for name in whole:
        assert torch.equal(whole[name], torch.cat([h[name] for h in halves])), name
    orders = {tuple(clips.batch(s, range(8), 8)["step"].tolist()) for s in range(4)}
    assert len(orders) == 4


# ---- mistakes ------------------------------------------------------------------------------------------------------------


def mistake(*args, **kwargs) -> str:
    stderr = io.StringIO()
    with pytest.raises((ValueError, OSError, SystemExit)) as error, contextlib.redirect_stderr(stderr):
        run_training(*args, **kwargs)
    return stderr.getvalue() + str(error.value)


def test_mistakes_are_named_in_one_sentence(folder, teacher, tmp_path):
    assert "--teacher" in mistake(folder, tmp_path / "r", stage="2")
    assert "nowhere" in mistake(folder, tmp_path / "r", "--teacher", tmp_path / "nowhere", stage="2")
    assert "data.py" in mistake(tmp_path, tmp_path / "r")
    other = tmp_path / "other.safetensors"
    save_weights(other, DiT(DIT_PRESETS["toy"]), preset="toy", stage="1", step=1)
    assert "dim" in mistake(folder, tmp_path / "r", "--teacher", other, stage="2")
    run_training(folder, tmp_path / "s2", "--teacher", teacher, "--steps", 1, stage="2")
    assert "stage-1" in mistake(folder, tmp_path / "r", "--teacher", tmp_path / "s2", stage="2")
    assert "finite" in mistake(
        folder, tmp_path / "r", "--lr", 1e30, "--steps", 8, "--clip", 1e30, "--warmup", 0
    )
