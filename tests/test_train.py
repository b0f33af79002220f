"""Both training stages on a tiny data folder: Eq. 4, the teacher, resume, ranks, mistakes."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cues
import load_cogvideox
import ranks
import train
from load_cogvideox import checkpoints, load_weights, newest_weights, save_weights
from model import DIT_PRESETS, DiT
from vae import VAE_PRESETS, CausalVAE
from video import read_image

from conftest import ROOT


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data folder of random latents, 6x4 latents a frame, in the layout of data.py: 6 training and 2 test clips."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "cache").mkdir()
    lines = []
    for n in range(8):
        rng = np.random.default_rng(n)
        z = lambda *shape: torch.from_numpy(rng.standard_normal((*shape, 16, 6, 4)).astype(np.float32)).bfloat16()  # noqa: E731,B023
        bits = lambda: torch.from_numpy(rng.integers(0, 256, (33, 48, 4), dtype=np.uint8))  # noqa: E731,B023
        tensors = dict(mean=z(9), logvar=z(9) - 4, pose=z(2, 9), face=z(2, 9), pseudo_pose=z(2, 9), pseudo_face=z(2, 9))
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
        "-o",
        run,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--eval-every",
        0,
    ]
    given += [] if stage == "vae" else ["--data", folder]
    return [str(a) for a in [*given, *extra]]


def run_training(*args, **kwargs):
    parser, parsed = train.parse_args(arguments(*args, **kwargs))
    torch.use_deterministic_algorithms(False)
    train.train(parsed)
    return parsed.output


def weights_of(run, name="model"):
    return load_file(checkpoints(run)[-1] / f"{name}.safetensors")


def distance(a, b):
    """The largest relative difference of two runs' weights; where the true gradient is 0, a weight of 1e-14 is itself rounding."""
    return max((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12) for k in a)


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


# ---- Eq. 4 ---------------------------------------------------------------------------------------------------------


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
    """Of Denoising, step by step: what the teacher is fed, Same2X of both features, and only the student learns."""
    _, args = train.parse_args(arguments(folder, tmp_path, "--teacher", teacher, stage="2"))
    frozen, student = train.load_teacher(args, torch.float32, "cpu"), train.build(args)
    assert len(frozen.blocks) == args.align_depth
    before = {name: p.clone() for name, p in frozen.named_parameters()}
    asked, features = [], frozen.features
    frozen.features = lambda *inputs: asked.append(inputs) or features(*inputs)
    student.register_forward_pre_hook(lambda module, inputs: asked.append(inputs))
    batch = train.data.Clips(folder, args, 0.7).batch(3, range(8), 8)
    losses = train.Denoising(student, args.align_depth, frozen)(batch)
    (x, step, text, pose, _), (x_t, step_t, text_t, pose_t, face_t, depth) = asked
    assert x is x_t and step is step_t and text is text_t and depth == args.align_depth
    assert pose is batch["pose"] and pose_t is batch["teacher_pose"] and face_t is batch["teacher_face"]
    own = student.features(x, step, text, batch["pose"], batch["face"], depth)
    torch.testing.assert_close(losses["s2x"], train.same2x(own, features(*asked[1])))
    losses["s2x"].mean().backward()
    torch.optim.SGD([*student.parameters(), *frozen.parameters()], 1.0).step()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in frozen.named_parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_the_student_starts_from_the_teacher_the_backbone_or_a_file(folder, teacher, tmp_path):
    """Weights of each start are told apart: the teacher's, those of tiny's random backbone, another student's."""
    start = lambda *flags: train.build(  # noqa: E731
        train.parse_args(arguments(folder, tmp_path, "--teacher", teacher, *flags, stage="2"))[1]
    )
    other = run_training(folder, tmp_path / "other", "--teacher", teacher, "--steps", 1, stage="2")
    for flags, source in (((), teacher), (("--init", str(other)), other)):
        found, expected = start(*flags).state_dict(), weights_of(source, "ema")
        assert all(torch.equal(found[name], expected[name]) for name in expected), flags
    assert all((block.cues.mlp.weight == 0).all() for block in start("--init", "backbone").blocks)
    assert "nowhere" in mistake(folder, tmp_path / "r", "--teacher", teacher, "--init", "nowhere", stage="2")


def test_teacher_sees_the_same_noisy_latents_step_text_and_reference_but_its_own_cues(folder, tmp_path):
    """A.3 and Fig. 4b; the Location Cue, last channel of each cue, is shared."""
    _, args = train.parse_args(arguments(folder, tmp_path, "--teacher", "x", stage="2"))
    batch = train.data.Clips(folder, args, 0.7).batch(3, range(8), 8)
    assert batch["pose"].shape == batch["teacher_pose"].shape == (8, 6, 17, 6, 4)
    assert torch.equal(batch["pose"][:, :, 16], batch["teacher_pose"][:, :, 16])
    kept = batch["pose"].flatten(1).any(1)
    assert kept.any() and not torch.equal(batch["pose"][kept][:, 1:, :16], batch["teacher_pose"][kept][:, 1:, :16])
    assert torch.equal(batch["pose"][:, 0], batch["teacher_pose"][:, 0]), "slot 0 is the reference's own for both"


def test_the_vaes_losses_equal_the_page():
    """With a network that codes a picture as itself: the error is the noise drawn, its edges, and its mean over 2x2."""

    class Copy(torch.nn.Module):
        def encode(self, video):
            return video, torch.full_like(video, -1.0)

        def decode(self, latents):
            return latents

    video, noise = (
        torch.randn(2, 3, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    )
    losses = train.Autoencoding(Copy())({"video": video, "noise": noise})
    assert "half" not in losses, "a decoder alone cannot make latents smooth"
    losses = train.Autoencoding(Copy())({"video": video.requires_grad_(), "noise": noise})
    video = video.detach()
    for b in range(2):
        e = np.exp(-0.5) * noise[b].numpy()
        small = [e[t, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for t, c, y, x in np.ndindex(3, 4, 3, 4)]
        expected = {
            "pixels": np.abs(e).mean(),
            "edges": sum(np.abs(np.diff(e, axis=axis)).mean() for axis in (0, 2, 3)),
            "kl": np.mean(0.5 * (video[b].numpy() ** 2 + np.exp(-1) - 1 + 1)),
            "half": np.abs(small).mean(),
        }
        assert {name: loss[b].item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-6)


# ---- resume, ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, optimizer", [("1", "adamw"), ("2", "adamw"), ("1", "muon")])
def test_resume_after_a_stop_equals_one_straight_run_bit_for_bit(folder, teacher, tmp_path, stage, optimizer):
    """Weights, average and optimizer after 10 steps; catches lost optimizer state, repeated batches and reset warm-up."""
    extra = ["--optimizer", optimizer, *(["--teacher", teacher] if stage == "2" else [])]
    straight = run_training(folder, tmp_path / "a", "--steps", 10, *extra, stage=stage)
    run_training(folder, tmp_path / "b", "--steps", 5, *extra, stage=stage)
    resumed = run_training(folder, tmp_path / "b", "--steps", 10, "--resume", *extra, stage=stage)
    for name in ("model", "ema"):
        a, b = weights_of(straight, name), weights_of(resumed, name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = ((checkpoints(r)[-1] / "optimizer" / "__0_0.distcp").read_bytes() for r in (straight, resumed))
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


@pytest.fixture(scope="session")
def one_rank(folder, teacher, tmp_path_factory):
    """Runs on one rank with 8 samples a step, each made once."""
    runs = tmp_path_factory.mktemp("one")

    @cache
    def make(stage, dtype, steps, optimizer="adamw"):
        extra = ["--teacher", teacher] if stage == "2" else []
        common = ["--steps", steps, "--dtype", dtype, "--log-every", 1, "--batch", 8, "--optimizer", optimizer]
        return run_training(folder, runs / f"{stage}-{dtype}-{steps}-{optimizer}", *common, *extra, stage=stage)

    return make


FAST = [("1", 2, "none", "float64", 2, 6, "adamw"), ("2", 2, "full", "float64", 2, 6, "muon")]
ALL = product(("1", "2"), (2, 4), ("none", "optimizer", "full"), ("float64", "float32"), (1, 2), (20,), ("adamw",))


@pytest.mark.parametrize(
    "stage, ranks, shard, dtype, accumulate, steps, optimizer",
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_any_ranks_and_shards_equal_one_rank(
    folder, teacher, one_rank, tmp_path, stage, ranks, shard, dtype, accumulate, steps, optimizer
):
    """float64: losses and weights to 1e-9; float32: losses to 1e-5. Catches wrong sample indices, averaging and slices."""
    extra = ["--teacher", teacher] if stage == "2" else []
    common = ["--steps", steps, "--dtype", dtype, "--log-every", 1, "--optimizer", optimizer, *extra]
    split = ["--batch", 8 // ranks // accumulate, "--accumulate", accumulate, "--shard", shard, "--checkpointing"]
    one, many = one_rank(stage, dtype, steps, optimizer), tmp_path / "many"
    torchrun(ranks, arguments(folder, many, *common, *split, stage=stage))
    assert losses_of(one) == pytest.approx(losses_of(many), rel=1e-9 if dtype == "float64" else 1e-5)
    for name in ("model", "ema") if dtype == "float64" else ():
        assert distance(weights_of(one, name), weights_of(many, name)) < 1e-9


@pytest.mark.parametrize("ema", [pytest.param(0, marks=pytest.mark.slow), 0.9])
def test_reports_leave_sharded_weights_as_they_were(folder, tmp_path, ema):
    """--shard optimizer keeps whole weights after a forward pass without a backward: checkpoints after it failed."""
    held = shutil.copytree(folder, tmp_path / "data")
    lines = [json.loads(line) for line in (held / "clips.jsonl").read_text().splitlines()]
    lines = [line | {"split": "test" if k < 2 else "train"} for k, line in enumerate(lines)]
    (held / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--steps", 2, "--save-every", 1, "--ema", ema, "--dtype", "float64"]
    torchrun(2, arguments(held, tmp_path / "a", *common, "--batch", 1, "--shard", "optimizer", "--eval-every", 1))
    run_training(held, tmp_path / "b", *common, "--batch", 2)
    assert any("held_out" in line for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines())
    assert distance(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("ranks, shard", [(1, "none"), (2, "none"), (2, "full")])
def test_compiled_blocks_train_as_eager_ones(folder, teacher, one_rank, tmp_path, ranks, shard):
    """Same losses to 1e-5 over 6 steps of stage 2, with checkpointing, on one rank and on two; a report in between."""
    common = ["--steps", 6, "--log-every", 1, "--teacher", teacher, "--compile", "--checkpointing", "--shard", shard]
    torchrun(ranks, arguments(folder, tmp_path / "run", *common, "--batch", 8 // ranks, "--eval-every", 4, stage="2"))
    assert losses_of(one_rank("2", "float32", 6)) == pytest.approx(losses_of(tmp_path / "run"), rel=1e-5)


def test_compiling_without_a_compiler_is_refused_in_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile needs a C.. compiler on a CPU"):
        run_training(folder, tmp_path, "--compile")


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


def test_cue_layers_learn_faster_and_biases_do_not_decay():
    """Each parameter in one group; 8 x for CueFusion and the cue embeddings alone."""
    model = DiT(DIT_PRESETS["tiny"])
    groups = train.parameter_groups(model.named_parameters(), 0.1, 8.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["rate"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    fresh = {name for name, (rate, _) in found.items() if rate == 8}
    assert fresh == {n for n in found if ".cues." in n or n.startswith(("pose_embed.", "face_embed."))} and fresh
    decayed = {name for name, (_, decay) in found.items() if decay}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}


def test_learning_rate_warms_up_stays_and_cools_down(folder, tmp_path):
    _, args = train.parse_args(
        arguments(folder, tmp_path, "--steps", 100, "--warmup", 10, "--cooldown", 0.2, "--lr", 1)
    )
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)]) and set(rates[10:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - 0.05 * k for k in range(20)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_sharded_runs_resume_on_another_number_of_ranks(folder, teacher, tmp_path, stage):
    """4 slices to 2: same samples and noise, equal to rounding; the run is as if nothing had happened."""
    extra = ["--teacher", teacher] if stage == "2" else []
    common = ["--dtype", "float64", "--log-every", 1, "--cooldown", 0, *extra]
    straight = run_training(folder, tmp_path / "a", "--steps", 4, *common, "--batch", 4, stage=stage)
    run, common = tmp_path / "b", [*common, "--shard", "full"]
    torchrun(4, arguments(folder, run, "--steps", 2, *common, "--batch", 1, stage=stage))
    torchrun(2, arguments(folder, run, "--steps", 4, *common, "--batch", 2, "--resume", stage=stage))
    assert distance(weights_of(straight), weights_of(run)) < 1e-9


def test_a_decoder_is_trained_alone_and_the_encoder_stays(tmp_path, monkeypatch):
    """So that a better picture needs no new latents."""
    monkeypatch.setattr(train.data.Pictures.__init__, "__defaults__", (2,))
    torch.manual_seed(0)
    save_weights(tmp_path / "vae.safetensors", CausalVAE(VAE_PRESETS["tiny"]))
    before = load_file(tmp_path / "vae.safetensors")
    run = tmp_path / "run"
    words = [
        "--preset",
        "tiny",
        "--stage",
        "vae",
        "--backbone",
        tmp_path / "vae.safetensors",
        "--decoder-only",
        "--steps",
        2,
    ]
    _, args = train.parse_args(
        [str(w) for w in [*words, "--batch", 1, "-o", run, "--device", "cpu", "--dtype", "float32"]]
    )
    train.train(args)
    after = weights_of(run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_teacher_may_be_a_run_a_safetensors_or_a_pt_file(folder, teacher, tmp_path):
    """All are the same teacher and the same start of the student, bit for bit; of a .pt file only weights are read."""
    averaged = checkpoints(teacher)[-1] / "ema.safetensors"
    torch.save(load_file(averaged), tmp_path / "plain.pt")
    torch.save({"model": load_file(averaged)}, tmp_path / "nested.pt")
    results = []
    for given in (teacher, averaged, tmp_path / "plain.pt", tmp_path / "nested.pt"):
        _, args = train.parse_args(arguments(folder, tmp_path / "r", "--teacher", given, stage="2"))
        networks = {"student": train.build(args), "teacher": train.load_teacher(args, torch.float32, "cpu")}
        results.append({(name, k): v for name, net in networks.items() for k, v in net.state_dict().items()})
    assert all(torch.equal(results[0][k], other[k]) for other in results[1:] for k in results[0])
    run_training(folder, tmp_path / "pt", "--steps", 1, "--teacher", tmp_path / "plain.pt", stage="2")
    torch.save({"model": print}, tmp_path / "code.pt")
    assert "weights only" in mistake(folder, tmp_path / "r", "--teacher", tmp_path / "code.pt", stage="2")
    torch.save({"model": {}}, tmp_path / "empty.pt")
    assert "missing" in mistake(folder, tmp_path / "r", "--teacher", tmp_path / "empty.pt", stage="2")


def test_only_the_first_blocks_of_a_teacher_are_read(teacher, monkeypatch):
    """And they say what the whole model says there."""
    path, read = newest_weights(teacher), []
    whole_model, _ = load_weights(path)
    real = load_cogvideox.fill
    monkeypatch.setattr(
        load_cogvideox,
        "fill",
        lambda net, plan, dtype: (read.extend(n for _, n, _ in plan), real(net, plan, dtype)),
    )
    short, _ = load_weights(path, depth=1)
    assert len(short.blocks) == 1 and not [name for name in read if name.startswith("blocks.1")]
    x, cue, text, step = (
        torch.randn(1, 4, 32, 4, 4),
        torch.randn(1, 4, 17, 4, 4),
        torch.randn(1, 3, 32),
        torch.tensor([7]),
    )
    assert torch.equal(short.features(x, step, text, cue, cue, 1), whole_model(x, step, text, cue, cue, tap=1)[1])


def test_export_writes_the_averaged_weights_in_bfloat16(folder, teacher, tmp_path):
    train.export(teacher, tmp_path / "out.safetensors")
    exported, header = load_weights(tmp_path / "out.safetensors")
    averaged = weights_of(teacher, "ema")
    assert header["stage"] == "1" and header["step"] == 3 and header["window"] == 5
    assert all(torch.equal(p, averaged[name].bfloat16()) for name, p in exported.named_parameters())
    with pytest.raises(ValueError, match=".safetensors"):
        train.export(teacher, tmp_path / "out.bin")


@pytest.mark.parametrize("test_split", [True, False])
def test_strips_and_plots_are_written_while_it_runs(folder, tmp_path, test_split, capsys):
    """A strip a report, as high as four clips, and one loss plot; the log has every term, by noise level too.

    Without a test split the strips show training clips, and nothing is called held out.
    """
    torch.manual_seed(0)
    save_weights(tmp_path / "vae.safetensors", CausalVAE(VAE_PRESETS["tiny"]))
    data = shutil.copytree(folder, tmp_path / "data")
    if not test_split:
        (data / "clips.jsonl").write_text((data / "clips.jsonl").read_text().replace("test", "train"))
    often = "--steps", 4, "--eval-every", 2, "--log-every", 1
    run = run_training(data, tmp_path / "run", *often, "--vae", tmp_path / "vae.safetensors")
    strips = [read_image(run / f"samples-{step:07d}.png") for step in (2, 4)]
    assert all(strip.shape == (4 * 48, 32 + 3 * 3 * 32, 3) for strip in strips) and not np.array_equal(*strips)
    assert read_image(run / "loss.png").std() > 10
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == ([2, 4] if test_split else [])
    assert ("the sample strips show training clips" in capsys.readouterr().out) != test_split
    assert all(len(line["denoise_by_step"]) == 10 for line in lines if "denoise" in line)


def test_a_resumed_log_has_every_step_once(folder, tmp_path):
    run = run_training(folder, tmp_path / "run", "--steps", 4, "--log-every", 1, "--save-every", 2)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 5, "denoise": 1.0}\n{"step": 6, "den')  # beyond the checkpoint, and cut by a kill
    run_training(folder, run, "--steps", 6, "--log-every", 1, "--resume")
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_that_goes_on_otherwise_says_so_and_a_finished_one_too(folder, tmp_path, capsys):
    run = run_training(folder, tmp_path / "run", "--steps", 2, "--lr", 1e-4)
    run_training(folder, run, "--steps", 3, "--resume")
    assert "goes on with other settings than before: steps 2 -> 3, lr 0.0001 -> 0.001\n" in capsys.readouterr().out
    run_training(folder, run, "--steps", 3, "--resume")
    said = capsys.readouterr().out
    assert f"{run} goes on\n" in said and "is at step 3 of 3: nothing to do" in said


def test_batches_made_by_processes_are_the_same(folder, tmp_path):
    """And so are the weights, bit for bit."""
    runs = [run_training(folder, tmp_path / w, "--steps", 4, "--accumulate", 2, "--workers", w) for w in "02"]
    a, b = map(weights_of, runs)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("keep, kept", [(0, [1, 2, 3]), (2, [2, 3])])
def test_the_newest_checkpoints_are_kept_and_with_0_all(folder, tmp_path, keep, kept):
    run = run_training(folder, tmp_path / "run", "--steps", 3, "--save-every", 1, "--keep", keep)
    assert [path.name for path in checkpoints(run)] == [f"step-{step:07d}" for step in kept]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_much_is_needed(folder, tmp_path, monkeypatch):
    run = run_training(folder, tmp_path / "run", "--steps", 2)
    before = weights_of(run)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in ((ranks, "save_weights"), (ranks.dcp, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            said = mistake(folder, run, "--steps", 4, "--resume")
        assert "disk is full" in said and "MiB" in said
        assert all(torch.equal(before[k], weights_of(run)[k]) for k in before)
        assert [p.name for p in run.glob(".part*")] == [], "nothing half-written"


def test_a_checkpoint_written_while_training_goes_on_is_that_of_its_step(folder, tmp_path, monkeypatch):
    """Writing waits until the weights have moved on: what is written must be the copy, bit for bit."""
    common = "--steps", 6, "--save-every", 3, "--keep", 0
    straight = run_training(folder, tmp_path / "a", *common)
    save = ranks.dcp.save
    monkeypatch.setattr(ranks.dcp, "save", lambda *args, **kwargs: (time.sleep(0.3), save(*args, **kwargs)))
    saves = ranks.save_weights
    monkeypatch.setattr(ranks, "save_weights", lambda *args, **kwargs: (time.sleep(0.3), saves(*args, **kwargs)))
    behind = run_training(folder, tmp_path / "b", *common, "--async-save")
    for file in ("model.safetensors", "ema.safetensors", "optimizer/__0_0.distcp"):
        a, b = ((run / "step-0000003" / file).read_bytes() for run in (straight, behind))
        assert a == b and len(a) > 1e5, file
    assert [p.name for p in checkpoints(behind)] == ["step-0000003", "step-0000006"]


@pytest.mark.parametrize("shard, count, GiB", [("none", 4, 1 + 8), ("full", 4, 1 + 2), ("none", 1, 1 + 2)])
def test_copies_for_a_checkpoint_are_made_where_the_host_has_room(shard, count, GiB, monkeypatch, tmp_path, capsys):
    """Weights once, moments on each rank: with less room training waits for the disk, and says so."""
    model = torch.nn.Linear(2**14, 2**14, bias=False, device="meta")  # 1 GiB in float32
    here = SimpleNamespace(here=count, count=count, rank=0, device=torch.device("cuda"), least=lambda n: n, print=print)
    args = SimpleNamespace(async_save=None, ema=0.0, shard=shard)
    assert ranks.copies_bytes(model, False, shard, here) == GiB * 2**30
    assert ranks.copies_bytes(model, True, shard, here) == (GiB + 1) * 2**30
    monkeypatch.setattr(ranks.dist, "new_group", lambda backend: None)
    for room, background in ((GiB * 2**30, True), (GiB * 2**30 - 1, False)):
        monkeypatch.setattr(ranks.budget, "capacity", lambda device, ranks_here, room=room: room)
        assert (ranks.Saver(args, here, model).pool is not None) == background
        assert (f"would take {GiB} of {GiB} GiB of host memory" in capsys.readouterr().out) != background


def test_more_ranks_than_gpus_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 ranks on a machine with 2 GPUs: give torchrun --nproc_per_node 2"):
        ranks.Ranks(None)


def test_a_disk_that_fills_in_the_background_is_said_too(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ranks, "save_weights", full)
    assert "disk is full" in mistake(folder, tmp_path / "run", "--steps", 2, "--async-save")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_ranks_that_save_in_the_background_write_what_they_would_have_written(folder, tmp_path, shard):
    runs = tmp_path / "a", tmp_path / "b"
    for run, flag in zip(runs, ("--no-async-save", "--async-save")):
        torchrun(2, arguments(folder, run, "--steps", 20, "--save-every", 2, "--keep", 0, "--shard", shard, flag))
    for a in checkpoints(runs[0]):
        for name in ("model.safetensors", "ema.safetensors", "optimizer/__0_0.distcp", "optimizer/__1_0.distcp"):
            assert (a / name).read_bytes() == (runs[1] / a.name / name).read_bytes(), f"{a.name}/{name}"


def kill_at(folder, run, seconds, *extra):
    """Start a training and kill -9 it so many seconds after a further checkpoint, or let it finish; its exit code."""
    command, before = [sys.executable, "train.py", *arguments(folder, run, *extra)], checkpoints(run)[-1:]
    alike = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: two threads may round otherwise
    process = subprocess.Popen(
        command, cwd=ROOT, env=alike, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and checkpoints(run)[-1:] == before:  # starting takes longer than a step, and varies
        time.sleep(0.02)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return -9
    assert process.returncode == 0, said
    return 0


@pytest.mark.slow
def test_kill_9_at_20_random_moments_always_leaves_a_whole_checkpoint(folder, tmp_path):
    """Saving at every step, so that most kills fall into a save; each time --resume goes on, and the end is the straight run's."""
    straight = run_training(folder, tmp_path / "straight", "--steps", 4000, "--save-every", 4000, "--log-every", 1000)
    rng, run = np.random.default_rng(0), tmp_path / "run"
    extra = ["--steps", 4000, "--save-every", 1, "--log-every", 1000, "--resume"]
    for _ in range(20):
        assert kill_at(folder, run, 2 * rng.random(), *extra) == -9, "faster than the test expects: raise --steps"
        for path in checkpoints(run):
            step = load_weights(path / "model.safetensors")[1]["step"]
            assert path.name == f"step-{step:07d}"
    assert kill_at(folder, run, 1000, *extra[:2], "--save-every", 4000, "--resume") == 0
    a, b = weights_of(straight), weights_of(run)
    assert all(torch.equal(a[k], b[k]) for k in a)


def workers_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(launcher), "-f", "train.py"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_torchrun_restarts_after_kill_9_of_a_rank_20_times_and_ends_as_if_nothing_had_happened(folder, tmp_path, shard):
    """One of two ranks killed at random; the job finds its run folder by itself. Bit for bit the undisturbed run."""
    rng, steps = np.random.default_rng(0), 1500
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "20",
    ]  # not one more: a restart that finds dead ranks' addresses would fail
    launch += ["--monitor-interval", "0.2", "--master_port", str(29900 + os.getpid() % 90)]
    common = ["--steps", steps, "--shard", shard, "--log-every", 500]
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    straight, run = tmp_path / "straight", tmp_path / "run"
    torchrun(2, arguments(folder, straight, *common, "--save-every", steps))
    words = [*launch, "train.py", *arguments(folder, run, *common, "--save-every", 2)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, **quiet)
        killed, dead, before = 0, set(), []
        while killed < 20 and process.poll() is None:
            time.sleep(3 * rng.random())
            alive = [pid for pid in workers_of(process.pid) if pid not in dead]
            if len(alive) == 2 and (checkpoints(run)[-1:] != before or killed % 4 == 3):  # some while it starts
                os.kill(alive[rng.integers(2)], signal.SIGKILL)
                killed, dead, before = killed + 1, dead | set(alive), checkpoints(run)[-1:]
        assert process.wait(timeout=900) == 0, (tmp_path / "said").read_text()[-3000:]
    assert killed == 20, "finished before it was killed 20 times: raise steps"
    a, b = weights_of(straight), weights_of(run)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_restart_goes_on_with_its_own_run_and_with_no_other(folder, tmp_path, monkeypatch):
    """A folder that the first attempt refused is refused by torchrun's second; ours is resumed without a word."""
    run = run_training(folder, tmp_path / "run", "--steps", 2, "--save-every", 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "holds a run" in mistake(folder, run, "--steps", 2, "--save-every", 1, "--seed", 5)
    (run / "step-0000002").rename(tmp_path / "lost")
    run_training(folder, run, "--steps", 2, "--save-every", 1)
    assert (run / "step-0000002" / "model.safetensors").read_bytes() == (
        tmp_path / "lost" / "model.safetensors"
    ).read_bytes()


def test_a_checkpoint_that_cannot_be_read_is_named(folder, tmp_path):
    run = run_training(folder, tmp_path / "run", "--steps", 1)
    (run / "step-0000001" / "optimizer" / ".metadata").write_bytes(b"")
    said = mistake(folder, run, "--steps", 2, "--resume")
    assert "step-0000001: cannot be read" in said and "optimizer adamw" not in said


# ---- data faults and buckets ---------------------------------------------------------------------------------------


def test_damaged_clips_are_named_counted_and_replaced(folder, tmp_path, capsys):
    """A cut file, a missing pseudo cue, a clip of another size; a sample of the next whole clip stands in for each."""
    broken = shutil.copytree(folder, tmp_path / "data")
    cut, bare, small = (broken / "cache" / f"{n}.safetensors" for n in (0, 1, 2))
    cut.write_bytes(cut.read_bytes()[:1000])
    save_file({k: v for k, v in load_file(bare).items() if not k.startswith("pseudo")}, bare)
    save_file({k: v[..., :2].contiguous() if v.ndim > 3 else v for k, v in load_file(small).items()}, small)
    _, args = train.parse_args(arguments(broken, tmp_path, "--teacher", "x", stage="2"))
    clips = train.data.Clips(broken, args, 0.7)
    batch = clips.batch(0, range(6), 6)
    assert clips.skipped == 6 and clips.named == {"0", "1", "2"}, "0 tries 0, 1, 2; 1 tries 1, 2; 2 tries 2"
    said = capsys.readouterr().err
    assert all(f"{n}.safetensors" in said for n in "012") and "3.safetensors" not in said
    assert batch["latents"].shape == (6, 6, 16, 6, 4) and batch["latents"].isfinite().all()
    teacher = run_training(folder, tmp_path / "teacher", "--steps", 1)
    run = run_training(
        broken,
        tmp_path / "run",
        "--steps",
        3,
        "--batch",
        6,
        "--log-every",
        1,
        "--teacher",
        teacher,
        stage="2",
    )
    counts = [json.loads(line)["skipped_samples"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert sum(counts) == 18, "each line counts those since the line before"
    for n in range(3, 6):
        (broken / "cache" / f"{n}.safetensors").unlink()
    assert "check" in mistake(broken, tmp_path / "r", "--teacher", teacher, stage="2")


@pytest.fixture
def mixed(folder, tmp_path):
    """A data folder of two sizes: 2 training clips of 48x16, 4 of 48x32."""
    mixed = shutil.copytree(folder, tmp_path / "data")
    lines = [json.loads(line) for line in (mixed / "clips.jsonl").read_text().splitlines()]
    for line in lines[:2]:
        path = mixed / "cache" / f"{line['id']}.safetensors"
        tensors = {
            k: v[..., :2] if v.ndim > 3 else v[..., :2] if k in ("body", "face_mask") else v
            for k, v in load_file(path).items()
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        line["width"] = 16
    (mixed / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return mixed


def test_the_plan_is_made_for_the_largest_clips(mixed, tmp_path, capsys):
    for seed in range(4):  # which say what step 0 sees
        run_training(mixed, tmp_path / "run", "--dry-run", "--seed", seed)
        assert "18 video" in capsys.readouterr().out, "6 slots of 6x4 latents in patches of 2x2x2"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_the_drawn_world_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.train(train.parse_args(["--preset", "toy", "--dry-run", "--device", "cpu"])[1])
    assert "432 video" in capsys.readouterr().out and not list(tmp_path.iterdir())


def planned(folder, run, *flags, room=None, count=4, peak=None, monkeypatch=None):
    """(--shard as `plan` leaves it, what it prints) for so many ranks that have `room` bytes each."""
    _, args = train.parse_args(arguments(folder, run, *flags))
    said, clips = [], train.data.Clips(folder, args, 0.7)
    monkeypatch.setattr(train.budget, "capacity", lambda device, ranks_here: room)
    stub = SimpleNamespace(
        count=count, here=1, device=torch.device("cpu"), least=lambda n: n, peak=lambda: peak, print=said.append
    )
    train.plan(args, clips, stub, torch.float32, torch.float32)
    return args.shard, "\n".join(said)


def test_the_plan_shards_as_little_as_fits_and_refuses_what_cannot(folder, tmp_path, monkeypatch):
    """Against the sums of budget.memory, a byte above and below; the refusal names what would fit."""
    config = replace(DIT_PRESETS["tiny"], depth=6)  # of two blocks `full` has both in memory, as `optimizer` does
    monkeypatch.setitem(DIT_PRESETS, "tiny", config)
    plan = partial(planned, folder, tmp_path / "r", monkeypatch=monkeypatch)
    needed = {
        mode: sum(train.budget.memory(config, 4, mode, True, 0, 18, 4, 2, False, 4, 4).values())
        for mode in ("none", "optimizer", "full")
    }
    assert needed["full"] < needed["optimizer"] < needed["none"]
    assert plan()[0] == plan(room=needed["none"])[0] == plan(room=1e15, count=1)[0] == "none"
    assert plan(room=needed["none"] - 1)[0] == plan(room=needed["optimizer"])[0] == "optimizer"
    shard, said = plan(room=needed["optimizer"] - 1)
    assert shard == "full" and "Adam's moments" in said and "--shard full: " in said
    with pytest.raises(ValueError, match="this needs .* GiB a rank: .*what would fit: --shard full"):
        plan("--shard", "none", room=needed["full"])
    with pytest.raises(ValueError, match="nothing, on ranks like these"):
        plan(room=10)


def test_the_plan_says_how_long_a_step_takes(folder, tmp_path, monkeypatch):
    """FLOPs over 30 % of the GPU's peak; of an H100's where a dry run has no GPU; else nothing."""
    plan = partial(planned, folder, tmp_path / "r", monkeypatch=monkeypatch)
    flops = train.budget.step_flops(DIT_PRESETS["tiny"], 18, 4, 2, 0)
    assert f"about {flops / 0.3e12:.2g} s a step at 30% of the peak" in plan(peak=1e12)[1]
    assert f"about {flops / 0.3 / 989e12:.2g} s a step at 30% of an H100's peak" in plan("--dry-run")[1]
    assert "s a step" not in plan()[1]


def test_the_terminal_shows_losses_speed_use_and_time_left(folder, tmp_path):
    _, args = train.parse_args(arguments(folder, tmp_path, "--steps", 5000))
    record = {"step": 1000, "denoise": 0.5, "grad": 1.25, "steps_per_s": 0.5, "waiting_for_data": 0.02}
    line = lambda peak: train.progress(args, SimpleNamespace(peak=lambda: peak), record, {"denoise": 0}, 3e12)  # noqa: E731
    assert line(1e13) == (
        "stage 1 | step 1000/5000 | denoise 0.5000 | grad 1.25 | 0.50 it/s | MFU 30% | 2% waiting | 2:13 left"
    )
    assert "| 3 TFLOP/s |" in line(None)


def test_a_step_sees_one_bucket_and_an_epoch_every_clip(mixed, tmp_path):
    """Two sizes, 4 and 2 clips, batches of 2: three steps an epoch; every clip once, never two sizes in a step."""
    _, args = train.parse_args(arguments(mixed, tmp_path))
    clips = train.data.Clips(mixed, args, 0.7)
    for epoch in range(3):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            bucket, places = clips.places(step, 2)
            assert len({bucket[p]["width"] for p in places}) == 1
            seen += [bucket[p]["id"] for p in places]
            assert clips.batch(step, range(2), 2)["pose"].shape[-1] == bucket[places[0]]["width"] // 8
        assert sorted(seen) == ["0", "1", "2", "3", "4", "5"]


def test_conditions_are_dropped_as_often_as_the_architecture_says(folder, tmp_path):
    """Text 0.1, reference 0.05, all cues 0.1, face 0.05 of 2,000 samples, within 4 standard deviations; what is dropped is 0,
    in slot 0 too, and the test split drops nothing."""
    _, args = train.parse_args(arguments(folder, tmp_path))
    clips, count = train.data.Clips(folder, args, 0.7), 2000
    (bucket,) = clips.buckets.values()
    dropped = dict.fromkeys(("text", "reference", "cues", "face"), 0)
    for n in range(count):
        sample = clips.sample(bucket, n % len(bucket), train.data.keyed(n))
        gone = {name: not sample[name].any() for name in ("text", "condition", "pose", "face")}
        slot_0 = {name: not sample[name][0].any() for name in ("pose", "face")}
        assert slot_0["pose"] == (gone["condition"] or gone["pose"]) and slot_0["face"] >= slot_0["pose"]
        dropped["text"] += gone["text"]
        dropped["reference"] += gone["condition"]
        dropped["cues"] += gone["pose"]
        dropped["face"] += gone["face"] and not gone["pose"]
    for name, rate in dict(text=0.1, reference=0.05, cues=0.1, face=0.05 * 0.9).items():
        assert abs(dropped[name] - rate * count) < 4 * (count * rate * (1 - rate)) ** 0.5, (name, dropped[name])
    held_out = train.data.Clips(folder, args, 0.7, split="test")
    (bucket,) = held_out.buckets.values()
    for n in range(100):
        sample = held_out.sample(bucket, n % len(bucket), train.data.keyed(n))
        assert (
            all(sample[name].flatten(1).any(1).all() for name in ("text", "pose", "face")) and sample["condition"].any()
        )


# ---- mistakes ------------------------------------------------------------------------------------------------------


def mistake(*args, **kwargs) -> str:
    stderr = io.StringIO()
    with pytest.raises((ValueError, OSError, SystemExit)) as error, contextlib.redirect_stderr(stderr):
        run_training(*args, **kwargs)
    return stderr.getvalue() + str(error.value)


def test_apples_gpus_are_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ranks.pick_device", lambda device: (torch.device("mps"), torch.bfloat16, "it is there"))
    assert "use --device cpu" in mistake(folder, tmp_path / "r", "--device", "mps")


def test_mistakes_are_named_in_one_sentence(folder, teacher, tmp_path):
    assert "--teacher" in mistake(folder, tmp_path / "r", stage="2")
    assert "nowhere" in mistake(folder, tmp_path / "r", "--teacher", tmp_path / "nowhere", stage="2")
    assert "nowhere" in mistake(tmp_path, tmp_path / "r", "--teacher", tmp_path / "nowhere", stage="2"), "before data"
    copy = run_training(folder, tmp_path / "copy", "--steps", 1, "--ref-slot", "copy")
    assert "--ref-slot copy: give the same" in mistake(folder, tmp_path / "r", "--teacher", copy, stage="2")
    hard = "--teacher", teacher, "--location", "hard", "--lambda", 0
    assert "--location soft: give the same" in mistake(folder, tmp_path / "r", *hard, stage="2")
    assert "data.py" in mistake(tmp_path, tmp_path / "r")
    assert "--compile is read by stage 0 and 1 and 2 only" in mistake(folder, tmp_path / "r", "--compile", stage="vae")
    for flags, stage in ((["--lambda", 1], "1"), (["--face", "none"], "0"), (["--shard", "full"], "vae")):
        assert f"{flags[0]} is read by" in mistake(folder, tmp_path / "r", *flags, stage=stage)
    for flag, value in (("--batch", 0), ("--steps", -1), ("--log-every", 0), ("--accumulate", 0)):
        assert f"{flag}: {value}: give a whole number" in mistake(folder, tmp_path / "r", flag, value)
    assert "--stage 0 trains a small backbone" in mistake(
        folder, tmp_path / "r", "--preset", "cogvideox1.5-5b", stage="0"
    )
    for flag, value in (
        ("--window", 1),
        ("--ema", 1.5),
        ("--clip", 0),
        ("--keep", -1),
        ("--lr", -1),
        ("--cooldown", 7),
        ("--lr", "nan"),
        ("--cue-lr", -1),
        ("--noise-shift", 0),
        ("--weight-decay", "inf"),
        ("--seed", -1),
    ):
        assert f"{flag}: {value}: give a" in mistake(folder, tmp_path / "r", flag, value)
    assert "--window 4" in mistake(folder, tmp_path / "r", "--window", 4)
    assert "--align-depth 3: the blocks count from 1 to 2" in mistake(
        folder, tmp_path / "r", "--teacher", teacher, "--align-depth", 3, stage="2"
    )
    assert "nowhere" in mistake(folder, tmp_path / "r", "--vae", tmp_path / "nowhere", "--eval-every", 1), (
        "before step 1"
    )
    narrow = shutil.copytree(folder, tmp_path / "narrow")
    for path in narrow.glob("cache/*.safetensors"):
        save_file(load_file(path) | {"text": torch.zeros(4, 16)}, path)
    assert "texts of 16 numbers a token, --preset tiny reads 32" in mistake(narrow, tmp_path / "r")
    assert "holds a run" in mistake(folder, teacher), "whose checkpoints would be deleted as the oldest"
    other = tmp_path / "other.safetensors"
    save_weights(other, DiT(DIT_PRESETS["toy"]), preset="toy", stage="1", step=1)
    assert "dim" in mistake(folder, tmp_path / "r", "--teacher", other, stage="2")
    run_training(folder, tmp_path / "s2", "--teacher", teacher, "--steps", 1, stage="2")
    assert "stage-1" in mistake(folder, tmp_path / "r", "--teacher", tmp_path / "s2", stage="2")
    assert "is a run of stage 2" in mistake(folder, tmp_path / "s2", "--resume")
    assert "not of --optimizer muon" in mistake(folder, teacher, "--resume", "--optimizer", "muon", "--steps", 4)
    assert "finite" in mistake(folder, tmp_path / "r", "--lr", 100, "--steps", 8, "--clip", 1e30, "--warmup", 0)


@pytest.mark.parametrize("full", [True, False])
def test_sharded_gradients_are_summed_in_float32_and_blocks_dropped_if_asked(monkeypatch, full):
    """--shard full drops a block's weights after its forward pass, optimizer does not; RoPE is not cast to bfloat16."""
    asked = []
    monkeypatch.setattr(ranks, "fully_shard", lambda part, **how: asked.append(how))
    source = DiT(DIT_PRESETS["tiny"])
    here = SimpleNamespace(mesh=None, device=torch.device("cpu"))
    model = ranks.shard(source, full, here, torch.bfloat16, torch.float32)
    assert len(asked) == len(source.blocks) + 1
    for how in asked:
        policy = how["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) == (
            torch.bfloat16,
            torch.float32,
            False,
        )
        assert how["reshard_after_forward"] == full
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))


def test_the_poorest_rank_decides(monkeypatch):
    """What fits is planned for the rank with the least memory."""
    asked = []
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda value, op: asked.append(op))
    assert ranks.Ranks.least(SimpleNamespace(count=2, device="cpu"), 5.0) == 5.0
    assert asked == [ranks.dist.ReduceOp.MIN]


def test_swapped_weights_come_back_after_an_error():
    model, ema = torch.nn.Linear(2, 2), {}
    ema = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), ranks.swapped(model, ema):
        assert not any(p.any() for p in model.parameters())
        1 / 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(value.any() for value in ema.values())


def test_the_denoising_loss_equals_the_page():
    """Noisy latents first, the condition behind them; the mean squared error of v, a number a sample. A loop, float64."""
    seen = []

    class Constant(torch.nn.Module):
        def forward(self, x, step, text, pose, face, tap):
            seen.append(x)
            return torch.full_like(x[:, :, :16], 0.3), None

    latents, noise, condition = torch.randn(3, 2, 2, 16, 3, 4, dtype=torch.float64)
    batch = dict(latents=latents, noise=noise, condition=condition, step=torch.tensor([37, 800]), text=None)
    loss = train.Denoising(Constant(), 1)(batch)["denoise"]
    for b, step in enumerate((37, 800)):
        alpha = train.Schedule().alphas_cumprod[step].item()
        x0, eps = latents[b].numpy(), noise[b].numpy()
        np.testing.assert_allclose(seen[0][b, :, :16], alpha**0.5 * x0 + (1 - alpha) ** 0.5 * eps)
        np.testing.assert_array_equal(seen[0][b, :, 16:], condition[b])
        v = alpha**0.5 * eps - (1 - alpha) ** 0.5 * x0
        assert loss[b].item() == pytest.approx(((0.3 - v) ** 2).mean(), rel=1e-12)


def test_one_training_at_a_time_writes_into_a_run_folder(folder, tmp_path):
    (tmp_path / "run").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('mine', flush=True); input()"
    command = [sys.executable, "-c", code, tmp_path / "run" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        assert "another train.py writes there" in mistake(folder, tmp_path / "run", "--steps", 1)
        other.communicate("\n")
    run_training(folder, tmp_path / "run", "--steps", 1)


def test_a_file_system_without_locks_is_no_other_training(tmp_path, monkeypatch):
    def absent(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", absent)
    assert train.Ranks("cpu").alone_in(tmp_path)


def test_a_run_that_went_on_while_another_started_is_left_alone(folder, tmp_path, monkeypatch):
    """The second looks for checkpoints before it builds its model, and has the lock after the first has ended."""
    wrap = train.wrap

    def late(*given):
        monkeypatch.setattr(train, "wrap", wrap)
        run_training(folder, tmp_path / "run", "--steps", 3)
        return wrap(*given)

    monkeypatch.setattr(train, "wrap", late)
    with pytest.raises(ValueError, match="another train.py writes there, or just did"):
        run_training(folder, tmp_path / "run", "--steps", 2)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-0000003"]


def test_ctrl_c_while_a_checkpoint_is_written_is_no_fault(folder, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise ranks.CheckpointException("write", {0: (KeyboardInterrupt(), None)})

    monkeypatch.setattr(ranks.dcp, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, tmp_path / "run", "--steps", 1)
    assert not list((tmp_path / "run").glob(".part*"))


def test_a_log_that_was_spoiled_stops_nothing(folder, tmp_path):
    """Lines that are no record are left out of plots and judgements, and dropped by --resume."""
    run = run_training(folder, tmp_path / "run", "--steps", 2, "--log-every", 1)
    records = ranks.read_log(run)
    with open(run / "log.jsonl", "a") as file:
        file.write('garbage\n5\n{}\n{"step": 3, "den')
    assert ranks.read_log(run) == records
    run_training(folder, run, "--steps", 3, "--log-every", 1, "--eval-every", 3, "--resume")
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()][:2] == [1, 2]
    assert (run / "loss.png").exists()


def test_weights_name_the_window_that_they_were_trained_on(folder, tmp_path):
    run = run_training(folder, tmp_path / "run", "--steps", 1, "--window", 101)
    assert load_cogvideox.read_header(newest_weights(run))["window"] == 9, "no clip is longer"


def test_an_export_spares_the_run(folder, tmp_path):
    run = run_training(folder, tmp_path / "run", "--steps", 1)
    for output, words in (
        (newest_weights(run), "also an input"),
        (tmp_path / "no" / "w.safetensors", "does not exist"),
        (run / "w.pt", "must end in .safetensors"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            train.export(run, output)


def test_a_strip_ends_with_the_true_clip(folder, tmp_path):
    """Decoded at the latents' own scale: its first, middle and last frame; at the left the reference."""
    _, args = train.parse_args(arguments(folder, tmp_path))
    clips, vae = train.data.Clips(folder, args, 0.7, "test"), CausalVAE(VAE_PRESETS["tiny"]).eval()
    model, here = train.build(args).eval(), train.Ranks("cpu")
    strip = train.sample_strip(model, vae, clips, here, contextlib.nullcontext(), torch.float32, count=1, steps=1)
    latents = clips.batch(0, range(1), 1)["latents"] / 0.7
    with torch.no_grad():
        reference, video = (train.data.to_picture(vae.decode(z))[0] for z in (latents[:, :1], latents[:, 1:]))
    truth = np.concatenate([video[0], video[len(video) // 2], video[-1]], axis=1)
    np.testing.assert_array_equal(strip[:, -truth.shape[1] :], truth)
    np.testing.assert_array_equal(strip[:, : reference.shape[2]], reference[0])


def test_lambda_weighs_same2x():
    losses = {"denoise": torch.tensor([1.0, 3.0]), "s2x": torch.tensor([-1.0, 0.0])}
    assert train.total_loss(losses, SimpleNamespace(s2x_weight=0.25)).item() == pytest.approx(2 - 0.25 * 0.5)


def test_an_update_clips_steps_at_each_groups_rate_and_averages(folder, tmp_path):
    """Plain gradient descent, written out: the second of four warm-up steps, a gradient of norm 10 clipped to 2."""
    flags = "--lr", 0.5, "--warmup", 4, "--clip", 2, "--ema", 0.75, "--steps", 10, "--cooldown", 0
    _, args = train.parse_args(arguments(folder, tmp_path, *flags))
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    ema = {"weight": torch.tensor([[2.0, 2.0]], dtype=torch.float64)}
    optimizer = torch.optim.SGD([{"params": [model.weight], "rate": 3.0}], lr=99)
    model.weight.grad = torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    assert train.update(model, ema, [optimizer], 1, args) == pytest.approx(10)
    after = [w - 0.5 * 2 / 4 * 3 * g * 2 / 10 for w, g in ((3, 6), (-1, 8))]
    assert model.weight[0].tolist() == pytest.approx(after, rel=1e-6) and model.weight.grad is None
    assert ema["weight"][0].tolist() == pytest.approx([0.75 * 2 + 0.25 * w for w in after], rel=1e-6)


def test_accumulated_batches_have_the_gradient_of_one_large_batch(folder, tmp_path):
    """By the norm in the log: a sum in place of the mean would be clipped, and so go unseen."""
    norms = []
    for batch, accumulate in ((4, 1), (2, 2)):
        flags = "--batch", batch, "--accumulate", accumulate, "--dtype", "float64", "--steps", 2, "--log-every", 1
        run = run_training(folder, tmp_path / str(batch), *flags)
        norms.append([json.loads(line)["grad"] for line in (run / "log.jsonl").read_text().splitlines()])
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


def test_the_log_has_means_and_the_loss_by_noise_level():
    meter, alone = train.Meter("cpu"), SimpleNamespace(sum=lambda value: value)
    meter.add({"denoise": torch.tensor([1.0, 3.0])}, torch.tensor([50, 999]))
    meter.add({"denoise": torch.tensor([5.0])}, torch.tensor([99]))
    assert meter.read(alone) == {"denoise": 3.0, "denoise_by_step": [3.0, *[None] * 8, 3.0]}
    assert meter.read(alone) == {}, "a line counts what came since the line before"


def test_a_seed_is_of_the_weights_too(folder, tmp_path):
    build = lambda seed: train.build(train.parse_args(arguments(folder, tmp_path, "--seed", seed))[1])  # noqa: E731
    a, b, c = (build(seed).patch_embed.weight for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_exported_vae_has_latents_that_need_no_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "latent_statistics", lambda vae: (torch.zeros(16), torch.full((16,), 2.0)))
    torch.manual_seed(0)
    save_weights(tmp_path / "run.safetensors", CausalVAE(VAE_PRESETS["tiny"]), stage="vae", step=1)
    train.export(tmp_path / "run.safetensors", tmp_path / "out.safetensors")
    before, after = (load_weights(tmp_path / name, torch.float32)[0] for name in ("run.safetensors", "out.safetensors"))
    assert before.config.scaling_factor == 0.7 and after.config.scaling_factor == 1
    video = torch.rand(1, 1, 3, 16, 16)
    torch.testing.assert_close(2 * after.encode(video)[0], before.encode(video)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("flag", ["--checkpointing", "--no-checkpointing"])
def test_checkpointing_reaches_the_model(folder, tmp_path, flag):
    _, args = train.parse_args(arguments(folder, tmp_path, flag))
    objective, _, _ = train.wrap(args, train.Ranks("cpu"), torch.float32, torch.float32)
    assert objective.model.checkpointing == (flag == "--checkpointing")


def test_reports_are_made_with_the_averaged_weights(folder, tmp_path, monkeypatch):
    seen = []

    def look(objective, *_):
        seen.append({name: p.detach().clone() for name, p in objective.model.named_parameters()})
        return 0.0

    monkeypatch.setattr(train, "held_out_loss", look)
    run = run_training(folder, tmp_path / "run", "--steps", 2, "--eval-every", 2)
    averaged, trained = weights_of(run, "ema"), weights_of(run)
    assert all(torch.equal(seen[0][name], averaged[name]) for name in averaged)
    assert not all(torch.equal(seen[0][name], trained[name]) for name in averaged)


def test_noise_and_targets_stay_float32_beside_a_bfloat16_network(folder, tmp_path, monkeypatch):
    """bfloat16 noise would lose the small noise of the first steps, and the target half of its digits."""
    seen, forward = [], train.Denoising.forward
    monkeypatch.setattr(train.Denoising, "forward", lambda self, batch: (seen.append(batch), forward(self, batch))[1])
    run = run_training(folder, tmp_path / "run", "--steps", 1, "--dtype", "bfloat16")
    assert {seen[0][name].dtype for name in ("latents", "noise", "condition", "pose")} == {torch.float32}
    assert {value.dtype for value in weights_of(run).values()} == {torch.float32}


def test_training_clips_in_a_report_are_shown_without_dropouts(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "clips.jsonl").write_text((data / "clips.jsonl").read_text().replace("test", "train"))
    _, args = train.parse_args([*arguments(data, tmp_path), "--eval-every", "1"])
    clips, shown = train.open_data(args, SimpleNamespace(print=lambda *words: None))
    assert clips.training and not shown.training and len(shown) == len(clips) == 8


def test_a_resumed_run_has_the_rates_of_its_own_flags(folder, tmp_path):
    run = run_training(folder, tmp_path / "run", "--steps", 1)
    _, args = train.parse_args(arguments(folder, run, "--cue-lr", 3, "--weight-decay", 0.5))
    model = train.build(args)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = train.make_optimizers(model, args)
    train.load_checkpoint(checkpoints(run)[-1], args, train.Ranks("cpu"), model, ema, optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert {(group["rate"], group["weight_decay"]) for group in groups} == {(1, 0), (1, 0.5), (3, 0), (3, 0.5)}


def samples(folder, run, count, *flags, split="test", stage="1"):
    """(clip's tensors, sample) of so many samples, read one by one."""
    _, args = train.parse_args(arguments(folder, run, *flags, stage=stage))
    clips = train.data.Clips(folder, args, 0.7, split)
    (bucket,) = clips.buckets.values()
    for n in range(count):
        clip = bucket[n % len(bucket)]
        yield (
            load_file(folder / "cache" / f"{clip['id']}.safetensors"),
            clips.sample(bucket, n % len(bucket), train.data.keyed(n)),
        )


def test_a_sample_is_what_the_cache_says(folder, tmp_path):
    """Nothing dropped: the reference's picture clean and noisy, cues and masks of one frame outside the window; the window
    starts at an even latent; its latents have the posterior's mean and deviation; its masks are those of its own frames."""
    starts, apart = set(), []
    for tensors, sample in samples(folder, tmp_path, 24, "--location", "hard"):
        cached = {name: tensor.float() for name, tensor in tensors.items()}
        (r,) = (r for r in range(3) if torch.equal(sample["condition"][0], cached["ref_noisy"][r]))
        (start,) = (s for s in range(5) if torch.equal(sample["pose"][1:, :16], 0.7 * cached["pose"][0, s : s + 5]))
        starts.add(start)
        assert not sample["condition"][1:].any() and torch.equal(sample["latents"][0], 0.7 * cached["ref_clean"][r])
        assert torch.equal(sample["pose"][0, :16], 0.7 * cached["ref_pose"][r])
        assert torch.equal(sample["face"][0, :16], 0.7 * cached["ref_face"][r])
        assert torch.equal(sample["face"][1:, :16], 0.7 * cached["face"][0, start : start + 5])
        mean, deviation = cached["mean"][start : start + 5], (cached["logvar"][start : start + 5] / 2).exp()
        apart.append((sample["latents"][1:] / 0.7 - mean) / deviation)
        groups = [[0] if k == 0 else range(4 * k - 3, 4 * k + 1) for k in range(start, start + 5)]
        reference = int(tensors["ref_frame"][r])
        assert reference not in {t for group in groups for t in group}
        for name, cue in (("body", "pose"), ("face_mask", "face")):
            bits = np.unpackbits(tensors[name].numpy(), axis=-1)
            for slot, group in enumerate([[reference], *groups]):
                cells = np.mean([bits[t].reshape(6, 8, 4, 8).mean((1, 3)) for t in group], axis=0)
                np.testing.assert_allclose(sample[cue][slot, 16], cells, atol=1e-6)
    assert starts == {0, 2, 4}
    assert torch.stack(apart).mean().abs() < 0.01 and torch.stack(apart).std().item() == pytest.approx(1, abs=0.01)


def test_the_location_cue_of_a_held_out_sample_is_softened_by_one_token(folder, tmp_path):
    """Cells of 16 pixels from the corner, the face's mask as it is; with `none` no mask at all, in training neither."""
    for tensors, sample in samples(folder, tmp_path, 4):
        (r,) = (r for r in range(3) if torch.equal(sample["condition"][0], tensors["ref_noisy"][r].float()))
        mask = np.unpackbits(tensors["body"][int(tensors["ref_frame"][r])].numpy(), axis=-1)
        soft = cues.grid_soften(np.float32(mask), 16).reshape(6, 8, 4, 8).mean((1, 3))
        np.testing.assert_allclose(sample["pose"][0, 16], soft, atol=1e-6)
    for split in ("train", "test"):
        for _, sample in samples(folder, tmp_path, 4, "--location", "none", split=split):
            assert not sample["pose"][:, 16].any() and not sample["face"][:, 16].any()
        for _, sample in samples(folder, tmp_path, 4, "--face", "none", split=split):
            assert not sample["face"].any()
    assert any(sample["pose"].any() for _, sample in samples(folder, tmp_path, 4, "--face", "none", split="train"))


def test_training_uses_every_cue_variant_and_the_softening_of_every_size(folder, tmp_path, monkeypatch):
    found, cells, soften = set(), set(), cues.grid_soften
    monkeypatch.setattr(cues, "grid_soften", lambda mask, cell, *how: cells.add(cell) or soften(mask, cell, *how))
    for tensors, sample in samples(folder, tmp_path, 60, split="train"):
        for k in range(2):
            windows = [0.7 * tensors["pose"][k, s : s + 5].float() for s in (0, 2, 4)]
            found |= {k} if any(torch.equal(sample["pose"][1:, :16], w) for w in windows) else set()
    assert found == {0, 1} and cells == {8, 16, 32}


def test_a_dropped_text_becomes_the_null_text(folder, tmp_path):
    """Not zeros: sampling is guided away from T5's states of the empty prompt."""
    data = shutil.copytree(folder, tmp_path / "data")
    save_file({"text": torch.full((4, 32), 0.5).bfloat16()}, data / "null_text.safetensors")
    texts = [
        (sample["text"], tensors["text"].float()) for tensors, sample in samples(data, tmp_path, 60, split="train")
    ]
    dropped = [text for text, own in texts if not torch.equal(text, own)]
    assert dropped and all((text == 0.5).all() for text in dropped)


def test_epochs_and_steps_draw_anew(folder, tmp_path):
    """Another order of the clips in each epoch; another window, reference and noise of a clip in each step."""
    _, args = train.parse_args(arguments(folder, tmp_path))
    clips = train.data.Clips(folder, args, 0.7)
    orders = {tuple(clips.places(epoch, 6)[1]) for epoch in range(4)}
    assert len(orders) > 2 and all(sorted(order) == list(range(6)) for order in orders)
    noises = [clips.batch(step, [0], 6)["noise"] for step in range(4)]
    assert not any(torch.equal(noises[0], noise) for noise in noises[1:])


def test_a_noise_shift_moves_every_level_as_its_flag_says_but_not_held_out_ones(folder, tmp_path):
    """s u / (1 + (s - 1) u), which is monotone: between the images of both ends of a step's interval."""
    steps = {}
    for shift in (1, 4):
        _, args = train.parse_args(arguments(folder, tmp_path, "--noise-shift", shift))
        for split in ("train", "test"):
            steps[split, shift] = train.data.Clips(folder, args, 0.7, split).batch(3, range(8), 8)["step"].tolist()
    shifted = lambda u: 4 * u / (1 + 3 * u)  # noqa: E731
    for plain, moved in zip(steps["train", 1], steps["train", 4]):
        assert int(1000 * shifted(plain / 1000)) <= moved <= 1000 * shifted((plain + 1) / 1000)
    assert steps["test", 1] == steps["test", 4]


def test_a_backbone_of_ours_gets_cue_layers_that_read_as_it_reads(tmp_path):
    """Copied after its weights are there: of fresh ones they would be a copy of noise. In step 0 nothing shows it."""
    config = train.DIT_PRESETS["tiny"]
    backbone = train.DiT(train.replace(config, cue_channels=0))
    save_weights(tmp_path / "b.safetensors", backbone, preset="tiny", stage="0", step=1)
    model = train.load_backbone(tmp_path / "b.safetensors", config)
    read = backbone.patch_embed.weight.unflatten(1, (32, -1))[:, :16]
    for embed in (model.pose_embed, model.face_embed):
        assert torch.equal(embed.bias, backbone.patch_embed.bias)
        assert torch.equal(embed.weight.unflatten(1, (17, -1))[:, :16], read)


def test_held_out_losses_are_of_several_batches_each_with_its_own_noise(folder):
    """The same ones in every report."""
    asked = []

    class Loss(torch.nn.Module):
        def forward(self, batch):
            return {"denoise": batch["x"]}

    clips = SimpleNamespace(
        batch=lambda k, indices, G: asked.append((k, list(indices), G)) or {"x": torch.tensor([float(k)])}
    )
    ranks = SimpleNamespace(count=2, rank=1, device="cpu", sum=lambda value: value)
    value = train.held_out_loss(Loss(), clips, ranks, torch.autocast("cpu", enabled=False), torch.float32)
    assert value == 1.5 and asked == [(k, list(range(1, 16, 2)), 16) for k in range(4)]


def test_cue_injection_reaches_the_network(folder, tmp_path):
    for kind in ("cuefusion", "concat", "cross"):
        _, args = train.parse_args(arguments(folder, tmp_path, "--cue-injection", kind))
        assert train.build(args).config.cue_injection == kind
