"""sample.py end to end on small random networks, and every user mistake that should end in one sentence."""

import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import cues
import finder
import sample
import toy
from data import to_picture, to_tensor
from diffusion import Schedule, ddim
from load_cogvideox import save_weights
from model import DIT_PRESETS, DiT
from vae import VAE_PRESETS, CausalVAE
from video import Video, read_image, write_image, write_video

from conftest import ROOT


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A drawn reference, a 10-frame driving clip with sound, and their masks."""
    folder = tmp_path_factory.mktemp("example")
    clip, other = toy.render(1, 2, frames=10, size=64), toy.render(3, 4, frames=1, size=(96, 64))
    write_image(folder / "ref.png", other.video[0])
    write_image(folder / "ref_mask.png", finder.paint_mask(other.body[0], other.face[0]))
    write_sound(folder / "sound.mp4", seconds=3)
    write_video(folder / "drive.mp4", clip.video, Fraction(8), audio=folder / "sound.mp4")
    (folder / "masks").mkdir()
    for i, (body, face) in enumerate(zip(clip.body, clip.face)):
        write_image(folder / "masks" / f"{i:03d}.png", finder.paint_mask(body, face))
    return folder


def write_sound(path, seconds):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        tone = np.sin(np.arange(16000 * seconds) / 10)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def arguments(example, *extra, reference="ref.png", drive="drive.mp4", masks="masks"):
    given = [
        example / reference,
        example / drive,
        "--preset",
        "tiny",
        "--area",
        64 * 96,
        "--steps",
        2,
        "--device",
        "cpu",
        "--cache",
        example / "cache",
    ]
    given += ["--masks", example / masks, "--reference-mask", example / "ref_mask.png"] if masks else []
    return [str(a) for a in [*given, *extra]]


def run(example, *extra, **files):
    sample.main(*sample.parse_args(arguments(example, *extra, **files)))


def test_whole_pipeline_writes_a_playable_video(example, tmp_path, capsys):
    """Every driving frame at the driving rate, the reference's shape, sound kept, H.264 yuv420p, marked as generated."""
    out = tmp_path / "out.mp4"
    run(example, "-o", out, "--guidance", 3)
    printed = capsys.readouterr().out
    assert "noise" in printed, "random weights must be admitted"
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (64, 96)
        assert stream.average_rate == 8
        assert len(container.streams.audio) == 1
        assert "AI-generated" in container.metadata["comment"]
        assert sum(1 for _ in container.decode(video=0)) == 10
    assert out.read_bytes().index(b"moov") < out.read_bytes().index(b"mdat"), "faststart"


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(example, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(example, "-o", tmp_path / f"{name}.mp4", "--seed", seed, "--guidance", 1)
    a, b, c = ((tmp_path / f"{n}.mp4").read_bytes() for n in "abc")
    assert a == b != c


def test_guidance_1_is_the_prompt_alone_and_batched_guidance_is_the_formula(example):
    """v = null + g (cond - null), from one call with both branches; catches swapped branches."""
    import torch

    class Recorder:
        def __call__(self, x, step, text, pose, face):
            assert len(x) == len(text) and len(pose) == len(step) == 1
            return text.mean((1, 2)).view(-1, 1, 1, 1, 1).expand(len(text), x.shape[1], 16, *x.shape[3:])

    cue, image = torch.zeros(1, 4, 17, 2, 2), torch.zeros(1, 16, 2, 2)
    text = torch.stack([torch.full((3, 5), 0.2), torch.full((3, 5), 0.1)])
    _, args = sample.parse_args(arguments(example, "--sampler", "ddim", "--steps", 1, "--guidance", 3, masks=None))
    latents, _ = sample.denoise(args, Recorder(), "cpu", text, image, cue, cue, 13)
    assert torch.allclose(latents, torch.full_like(latents, -(0.1 + 3 * (0.2 - 0.1))), atol=1e-6), "x0 = -v at step 999"
    latents, _ = sample.denoise(args, Recorder(), "cpu", text[:1], image, cue, cue, 13)
    assert torch.allclose(latents, torch.full_like(latents, -0.2), atol=1e-6)
    args.sequential = True
    one_by_one, _ = sample.denoise(args, Recorder(), "cpu", text, image, cue, cue, 13)
    assert torch.allclose(one_by_one, torch.full_like(latents, -0.4), atol=1e-6)
    args.guidance_interval = (0.5, 1.0)  # the only step, 999, lies before it
    unguided, _ = sample.denoise(args, Recorder(), "cpu", text, image, cue, cue, 13)
    assert torch.allclose(unguided, torch.full_like(latents, -0.2), atol=1e-6)


def test_guidance_is_for_its_interval_of_the_steps_only(example):
    """Two steps, 999 and 499: how many branches run in each. Catches a bound that is ignored."""
    import torch

    branches = []

    def dit(x, step, text, pose, face):
        branches.append(len(text))
        return x[:, :, :16]

    cue, image, text = torch.zeros(1, 4, 17, 2, 2), torch.zeros(1, 16, 2, 2), torch.zeros(2, 3, 5)
    _, args = sample.parse_args(arguments(example, "--sampler", "ddim", "--steps", 2, "--guidance", 3, masks=None))
    for args.guidance_interval, expected in (((0, 1), [2, 2]), ((0, 0.5), [2, 1]), ((0.5, 1), [1, 2])):
        branches.clear()
        sample.denoise(args, dit, "cpu", text, image, cue, cue, 13)
        assert branches == expected, args.guidance_interval


def test_a_second_run_on_the_same_files_looks_for_nobody(example, tmp_path, monkeypatch):
    """Masks and prompt states are remembered; another option or file, and they are made anew."""
    run(example, "-o", tmp_path / "a.mp4", "--cache", tmp_path / "cache")

    def forbidden(*args, **kwargs):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        for module, name in ((cues, "analyse"), (finder, "from_arguments"), (sample, "open_text_encoder")):
            patch.setattr(module, name, forbidden)
        run(example, "-o", tmp_path / "b.mp4", "--cache", tmp_path / "cache")
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
        run(example, "-o", tmp_path / "b.mp4", "--cache", tmp_path / "cache", "--soften-cell", 8)  # where she is stays
        write_image(tmp_path / "half.png", read_image(example / "ref_mask.png") * (np.arange(96) < 48)[:, None, None])
        for extra in (
            ["--align", "none"],
            ["--fps", 4],
            ["--guidance", 1],
            ["--reference-mask", tmp_path / "half.png"],
        ):
            with pytest.raises(AssertionError, match="again"):
                run(example, "-o", tmp_path / "c.mp4", "--cache", tmp_path / "cache", *extra)


def test_pose_and_face_of_other_videos_and_the_place_of_the_driver(example, tmp_path):
    """With DRIVE itself as both nothing changes; with another clip the output does; a clip of another length is refused."""
    other = toy.render(7, 9, frames=10, size=64)
    write_video(tmp_path / "other.mp4", other.video, Fraction(8))
    (tmp_path / "masks").mkdir()
    for i, (body, face) in enumerate(zip(other.body, other.face)):
        write_image(tmp_path / "masks" / f"{i:03d}.png", finder.paint_mask(body, face))
    same = ["--pose", example / "drive.mp4", "--pose-masks", example / "masks"]
    same += ["--face", example / "drive.mp4", "--face-masks", example / "masks"]
    pose = ["--pose", tmp_path / "other.mp4", "--pose-masks", tmp_path / "masks"]
    made = {}
    for name, extra in (("plain", []), ("same", same), ("pose", pose)):
        run(example, "-o", tmp_path / f"{name}.mp4", "--guidance", 1, *extra)
        made[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert made["plain"] == made["same"] != made["pose"]
    rows = {}
    for name, extra in (("plain", []), ("pose", pose)):
        _, args = sample.parse_args(arguments(example, *extra))
        options, video = cues.options(args), Video(args.drive)
        reference = sample.cover(read_image(args.reference), 96, 64)
        track = cues.analyse(video, reference, finder.from_arguments(args), options)
        rows[name] = list(sample.driving_rows(args, video, track, reference, options)())
    _, args = sample.parse_args(arguments(example, "--pose-place", "aligned", *pose))
    by_itself = vars(args) | {"masks": str(tmp_path / "masks")}
    own = cues.analyse(Video(args.pose_video), reference, finder.from_arguments(Namespace(**by_itself)), options)
    moved = (scale, shift) = own.scale, own.shift_xy
    assert abs(scale - 1) > 0.05 or np.abs(shift).max() > 2
    aligned = sample.driving_rows(args, video, track, reference, cues.options(args))()
    for row, (expected, *_) in zip(aligned, cues.render(Video(args.pose_video), own, misalign=moved), strict=True):
        assert np.array_equal(row[0], expected)  # each video by its own similarity
    for plain, row in zip(rows["plain"], rows["pose"], strict=True):
        assert not np.array_equal(plain[0], row[0]) and all(map(np.array_equal, plain[1:], row[1:])), (
            "DRIVE gives face and place"
        )
    write_video(tmp_path / "long.mp4", np.concatenate([other.video] * 2), Fraction(8))
    assert "20 frames" in mistake(example, "-o", tmp_path / "x.mp4", "--pose", tmp_path / "long.mp4")


def test_a_pose_video_without_masks_is_segmented_though_the_driver_has_some(example, tmp_path, monkeypatch, capsys):
    everything = lambda frame, previous: [finder.Person(np.ones(frame.shape[:2], bool), 1.0, 1.0)]  # noqa: E731
    monkeypatch.setattr(finder, "Sam", lambda weights: everything)
    monkeypatch.setattr(finder, "load_face_finder", lambda path: None)
    drive = example / "drive.mp4"
    run(
        example, "-o", tmp_path / "a.mp4", "--guidance", 1, "--steps", 1, "--pose", drive, "--cache", tmp_path / "cache"
    )
    assert f"--pose {drive}: 10 of 10 frames accepted" in capsys.readouterr().out


def test_every_step_shows_what_each_step_predicts(example, tmp_path):
    run(example, "-o", tmp_path / "out.mp4", "--guidance", 1, "--steps", 3, "--every-step")
    strip = read_image(tmp_path / "out_steps.png")
    assert strip.shape == (96, 3 * 64, 3) and not np.array_equal(strip[:, :64], strip[:, 128:])


def test_offloaded_blocks_are_on_the_device_only_while_they_run(example):
    """The same output; each block's weights are its own again afterwards."""
    import torch

    _, args = sample.parse_args(arguments(example, "--offload", masks=None))
    dit = sample.random_weights(sample.DiT, sample.DIT_PRESETS["tiny"], torch.float32)
    x, cue = torch.randn(1, 2, 32, 4, 4), torch.randn(1, 2, 17, 4, 4)
    inputs = x, torch.tensor([5]), torch.randn(1, 3, 32), cue, cue
    plain = dit(*inputs)
    homes = [p.data_ptr() for p in dit.blocks.parameters()]
    copies = []
    placed = sample.move(args, dit, torch.device("cpu"), torch.float32)
    dit.blocks[0].register_forward_pre_hook(lambda block, _: copies.append(block))
    assert torch.equal(placed(*inputs), plain) and copies
    assert [p.data_ptr() for p in dit.blocks.parameters()] == homes


def test_offloaded_blocks_are_cast_when_they_run_and_wait_as_they_are_in_their_file(example):
    import torch

    _, args = sample.parse_args(arguments(example, "--offload", masks=None))
    half, waiting = (sample.random_weights(sample.DiT, sample.DIT_PRESETS["tiny"], torch.float32) for _ in range(2))
    x, cue = torch.randn(1, 2, 32, 4, 4), torch.randn(1, 2, 17, 4, 4)
    inputs = x, torch.tensor([5]), torch.randn(1, 3, 32), cue, cue
    placed = sample.move(args, waiting, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(placed(*inputs), half.bfloat16()(*inputs))
    assert next(waiting.blocks.parameters()).dtype == torch.float32


def test_blocks_are_offloaded_where_they_do_not_fit_unless_told(example, monkeypatch, capsys):
    import torch

    def waiting(room, *extra, device="meta"):
        monkeypatch.setattr(sample.budget, "capacity", lambda device, ranks: room)
        args = sample.parse_args(arguments(example, *extra))[1]
        dit = sample.random_weights(sample.DiT, sample.DIT_PRESETS["tiny"], torch.float32)
        placed = sample.move(args, dit, torch.device(device), torch.float32)
        assert str(placed.patch_embed.weight.device) == device
        return bool(dit.blocks[0]._forward_pre_hooks)

    needed = 4 * sum(p.numel() for p in sample.DiT(sample.DIT_PRESETS["tiny"]).parameters())
    assert waiting(needed - 1)
    assert "--offload: DiT's weights would take 0.0 of 0.0 GiB" in capsys.readouterr().out
    assert not waiting(needed) and not waiting(None) and not waiting(1, device="cpu")
    assert not waiting(1, "--no-offload") and waiting(needed, "--offload")
    assert not capsys.readouterr().out


def test_guidance_branches_run_one_by_one_where_both_do_not_fit_unless_told(example, monkeypatch, capsys):
    import torch

    config, pose, text = sample.DIT_PRESETS["tiny"], torch.zeros(1, 4, 17, 12, 8), torch.zeros(2, 226, 32)
    needed = 2 * 14 * 64 * (4 * 12 * 8 // 8 + 226) * 4  # 14 numbers of width 64, for every token of both branches

    def sequential(room, *extra, text=text):
        monkeypatch.setattr(sample.budget, "capacity", lambda device, ranks: room)
        args = sample.parse_args(arguments(example, *extra))[1]
        return sample.sequential(args, config, pose, text, 13, torch.device("cpu"), torch.float32)

    assert sequential(needed - 1)
    assert "--sequential: both guidance branches would take" in capsys.readouterr().out
    assert not sequential(needed) and not sequential(None) and not sequential(1, text=text[:1])
    assert not sequential(1, "--no-sequential") and sequential(needed, "--sequential")
    assert not capsys.readouterr().out


def test_the_vae_runs_in_tiles_where_it_does_not_fit_unless_told(example, monkeypatch, capsys):
    import torch

    def tiled(room, *extra):
        monkeypatch.setattr(sample.budget, "capacity", lambda device, ranks: room)
        args = sample.parse_args(arguments(example, *extra))[1]
        return sample.open_vae(args, torch.float32, torch.device("cpu"), (512, 768)).tiling

    needed = 50 * 8 * 512 * 768 * 4  # the tiny VAE's widest layer at full size has 8 channels
    assert tiled(needed - 1)
    assert "--tile: decoding 768x512 at once would take 0.6 of 0.6 GiB" in capsys.readouterr().out
    assert not tiled(needed) and not tiled(None) and not tiled(needed - 1, "--no-tile") and tiled(needed, "--tile")
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("offload", ["--offload", "--no-offload"])
def test_compiled_blocks_give_the_same_picture(example, tmp_path, offload):
    """Also where each block's weights are fetched for as long as it runs."""
    for name, flags in (("a", []), ("b", ["--compile"])):
        run(example, "-o", tmp_path / f"{name}.mp4", offload, "--dtype", "float32", *flags)
    a, b = (np.stack(list(Video(tmp_path / f"{n}.mp4"))).astype(int) for n in "ab")
    assert abs(a - b).mean() < 0.1 and a.std() > 10


def test_comparison_shows_reference_driver_cues_and_output(example, tmp_path):
    """One row of six pictures a frame; catches a lost frame, a wrong order and cues of another size."""
    out = tmp_path / "out.mp4"
    run(example, "-o", out, "--guidance", 1, "--compare")
    frames, made = list(Video(tmp_path / "out_compare.mp4")), list(Video(out))
    assert len(frames) == 10 and frames[0].shape == (96, 6 * 64, 3)
    reference = read_image(example / "ref.png").astype(int)
    assert np.abs(frames[3][:, :64] - reference).mean() < 8
    assert np.abs(frames[3][:, 320:].astype(int) - made[3]).mean() < 8
    assert frames[3][:, 128:192].std() > 10, "a pose cue"


def test_a_gif_has_every_frame_and_says_what_it_is(example, tmp_path):
    run(example, "-o", tmp_path / "out.gif", "--guidance", 1, "--compare")
    for name, width in (("out.gif", 64), ("out_compare.gif", 6 * 64)):
        clip = Video(tmp_path / name)
        assert (len(list(clip)), clip.height, clip.width) == (10, 96, width) and clip.fps == pytest.approx(8, rel=0.2)
        assert b"AI-generated" in (tmp_path / name).read_bytes()
    assert "must end in .mp4 or .gif" in mistake(example, "-o", tmp_path / "out.avi")


def test_nothing_given_means_the_example_and_half_of_it_is_a_mistake(capsys):
    _, args = sample.parse_args([])
    assert args.reference.name == "ref.png" and args.drive.name == "drive.mp4" and args.preset == "toy"
    places = [
        sample.parse_args(["--preset", *given])[1].pose_place
        for given in (["toy"], ["toy", "--pose-place", "kept"], ["tiny"])
    ]
    assert places == ["aligned", "kept", "kept"]
    assert all(path.exists() for path in sample.EXAMPLE.values()) and args.area == 96 * 96
    for words, named in (
        (["ref.png"], "DRIVE"),
        (["--prompt", "a dancer"], "--backbone"),
        (["--masks", "mine"], "--masks is of clips of yours"),
        (["--guidance", "0"], "--guidance needs a --backbone"),
        (["--no-sequential"], "--sequential needs a --backbone"),
        (["--preset", "tiny", "--guidance", "1", "--guidance-interval", "0", "0.5"], "--guidance 1 turns guidance off"),
        (["--steps", "0"], "--steps: 0: give a whole number, 1 to 1000"),
        (["--area", "-1"], "--area: -1: give a whole number"),
        (["--preset", "tiny", "--backbone", "x"], "--preset"),
    ):
        with pytest.raises(SystemExit) as end:
            sample.parse_args(words)
        assert end.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize(
    "fps, frames, said", [(4, 5, "5 frames, picked from 10, at 4/s"), (None, 10, "10 frames at 8/s")]
)
def test_frames_are_picked_at_the_rate_that_is_asked_for(example, tmp_path, capsys, fps, frames, said):
    """10 frames at 8/s last 1.25 s: 5 frames at 4/s, every other one."""
    (tmp_path / "masks").mkdir()
    for i in range(0, 10, 10 // frames):
        shutil.copy(example / f"masks/{i:03d}.png", tmp_path / "masks")
    run(example, "-o", tmp_path / "out.mp4", *(("--fps", fps) if fps else ()), masks=tmp_path / "masks")
    assert said in capsys.readouterr().out
    made = Video(tmp_path / "out.mp4")
    assert made.fps == (fps or 8) and len(list(made)) == frames


def test_the_picture_follows_the_cues_and_the_reference(example, tmp_path):
    """Slot 0 and windows arrive where they should: changing only the driver, or only the reference, changes the output."""
    run(example, "-o", tmp_path / "a.mp4")
    clip = toy.render(1, 9, frames=10, size=64)
    write_video(tmp_path / "other.mp4", clip.video, Fraction(8))
    run(example, "-o", tmp_path / "b.mp4", drive=tmp_path / "other.mp4")
    write_image(tmp_path / "ref2.png", toy.render(8, 4, frames=1, size=(96, 64)).video[0])
    run(example, "-o", tmp_path / "c.mp4", reference=tmp_path / "ref2.png")
    a, b, c = (np.stack(list(Video(tmp_path / f"{n}.mp4"))).astype(int) for n in "abc")
    assert abs(a - b).max() > 8 and abs(a - c).max() > 8
    assert a.shape == b.shape == c.shape


def test_one_frame_clip_and_odd_counts(example, tmp_path):
    """1, 2 and 9 frames: padding to 8k+1 is never shown."""
    for n in (1, 2, 9):
        clip = toy.render(1, 2, frames=n, size=64)
        folder = tmp_path / str(n)
        for i in range(n):
            (folder / "masks").mkdir(parents=True, exist_ok=True)
            (folder / "frames").mkdir(parents=True, exist_ok=True)
            write_image(folder / "masks" / f"{i}.png", finder.paint_mask(clip.body[i], clip.face[i]))
            write_image(folder / "frames" / f"{i}.png", clip.video[i])
        run(
            example,
            "-o",
            folder / "out.mp4",
            "--steps",
            1,
            "--guidance",
            1,
            drive=folder / "frames",
            masks=folder / "masks",
        )
        assert sum(1 for _ in Video(folder / "out.mp4")) == n


def mistake(example, *extra, **files) -> str:
    """What is printed on stderr by a run that must fail with exit code 2."""
    import contextlib
    import io

    stderr = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(stderr):
        run(example, *extra, **files)
    assert stop.value.code == 2
    sentence = stderr.getvalue().split("\r")[-1].strip()
    assert "Traceback" not in sentence
    return sentence.splitlines()[-1]


def test_a_full_gpu_and_a_missing_compiler_are_said_in_a_sentence(example, tmp_path, monkeypatch, capsys):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nand much more")

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--compile needs a C++ compiler" in mistake(example, "-o", tmp_path / "a.mp4", "--compile")
    monkeypatch.setattr(sample, "encode_text", full)
    said = mistake(example, "-o", tmp_path / "a.mp4")
    assert "CUDA out of memory. Tried to allocate 20.00 MiB. Use --offload" in said and "more" not in said
    assert not (tmp_path / "a.mp4").exists()


def test_user_mistakes_end_in_one_sentence(example, tmp_path):
    """What was given and what to do, exit code 2, nothing half-written."""
    out = tmp_path / "out.mp4"
    assert "nowhere.png" in mistake(example, "-o", out, reference="nowhere.png")
    (tmp_path / "text.mp4").write_text("not a video")
    assert "text.mp4" in mistake(example, "-o", out, drive=tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "empty.mp4" in mistake(example, "-o", out, drive=tmp_path / "empty.mp4")
    whole = (example / "drive.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert "cut.mp4" in mistake(example, "-o", out, drive=tmp_path / "cut.mp4")
    assert "steps" in mistake(example, "-o", out, "--steps", 0)
    wrong = {
        "toy-vae": "holds a CausalVAE",
        "toy": "text states 64 wide, these are 32",
        "toy-backbone": "knows no cues",
    }
    for name, said in wrong.items():
        assert said in mistake(example, "-o", out, "--checkpoint", ROOT / f"assets/{name}.safetensors")
    (tmp_path / "model.pt").write_bytes(b"")
    assert "model.pt" in mistake(example, "-o", out, "--checkpoint", tmp_path / "model.pt")
    assert "steps" in mistake(example, "-o", out, "--steps", 1001)
    assert "nofolder" in mistake(example, "-o", tmp_path / "nofolder" / "out.mp4")
    assert "text.mp4" in mistake(example, "-o", out, "--cache", tmp_path / "text.mp4"), (
        "no folder, and none can be made"
    )
    save_weights(tmp_path / "copy.safetensors", DiT(DIT_PRESETS["tiny"]), stage="2", ref_slot="copy", window=3)
    assert "at most 9 frames, not 10" in mistake(example, "-o", out, "--checkpoint", tmp_path / "copy.safetensors")
    assert "--backbone" in mistake(example, "-o", out, "--backbone", tmp_path)
    assert "tokenizer" in mistake(example, "-o", out, "--prompt", "a dancer")
    assert "--device" in mistake(example, "-o", out, "--device", "quantum")
    nobody = np.zeros((96, 64, 3), np.uint8)
    write_image(tmp_path / "nobody.png", nobody)
    assert "reference" in mistake(example, "-o", out, "--reference-mask", tmp_path / "nobody.png")
    assert list(tmp_path.glob("*out*")) == [] and list(tmp_path.glob(".*")) == []


def test_a_photograph_without_a_backbone_is_told_what_it_will_become(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample.main(
            *sample.parse_args([str(tmp_path / "photo.jpg"), str(tmp_path / "drive.mp4"), "--cache", str(tmp_path)])
        )
    assert "the embedded toy model knows only drawn figures" in capsys.readouterr().out


def test_no_output_takes_the_place_of_an_input(example, tmp_path):
    """The side by side video and the strip of steps are outputs too; pose and face videos and masks are inputs."""
    for name in ("out.mp4", "out_compare.mp4"):
        shutil.copy(example / "drive.mp4", tmp_path / name)
    shutil.copy(example / "ref.png", tmp_path / "x_steps.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    own = ["-o", tmp_path / "out.mp4"]
    pose = ["--pose", tmp_path / "out.mp4", "--pose-masks", example / "masks"]
    assert "out.mp4 is also an input" in mistake(example, *own, *pose)
    assert "out_compare.mp4 is also an input" in mistake(example, *own, "--compare", drive=tmp_path / "out_compare.mp4")
    strip = "-o", tmp_path / "x.mp4", "--every-step"
    assert "x_steps.png is also an input" in mistake(example, *strip, reference=tmp_path / "x_steps.png")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_ctrl_c_leaves_nothing_behind_and_says_so(example, tmp_path):
    """Stopped in the middle of denoising: exit code 130, one sentence, no file in the output's folder."""
    command = [sys.executable, "sample.py", *arguments(example, "-o", tmp_path / "out.mp4", "--steps", 1000)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    said = b""
    while not re.search(rb"denoise: +[1-9]+%", said):
        part = process.stderr.read1()
        assert part, said.decode()
        said += part
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and said.endswith("stopped; no half-written file is left\n")
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_help_answers_before_torch_is_imported():
    """--help in well under the 1.5 s that torch alone takes to import."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "reference" in done.stdout
    assert " torch\n" not in done.stderr and time.perf_counter() - began < 20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip_and_no_frame_is_lost(tmp_path):
    """The embedded model, 1,000 driving frames against 100: peak anonymous memory within 10 %, as many frames out as in."""
    from test_full_size import run_watched

    write_image(tmp_path / "ref.png", (other := toy.render(3, 4, frames=1)).video[0])
    write_image(tmp_path / "ref_mask.png", finder.paint_mask(other.body[0], other.face[0]))
    peaks = {}
    for frames in (100, 1000):
        clip, masks = toy.render(1, 2, frames=frames), tmp_path / f"masks{frames}"
        masks.mkdir()
        for i, (body, face) in enumerate(zip(clip.body, clip.face)):
            write_image(masks / f"{i:04d}.png", finder.paint_mask(body, face))
        write_video(tmp_path / f"{frames}.mp4", clip.video, Fraction(16))
        command = [sys.executable, "sample.py", tmp_path / "ref.png", tmp_path / f"{frames}.mp4", "--masks", masks]
        command += ["--reference-mask", tmp_path / "ref_mask.png", "--steps", 4, "--device", "cpu"]
        printed, peaks[frames], seconds = run_watched([*command, "--cache", tmp_path, "-o", tmp_path / "out.mp4"])
        print(f"\n{frames} frames: peak anonymous memory {peaks[frames]:.3f} GiB, {seconds:.0f} s")
        assert len(list(Video(tmp_path / "out.mp4"))) == frames
    assert peaks[1000] < 1.1 * peaks[100]


def test_cues_are_scaled_and_the_reference_is_not(example):
    """The reference's own cues in slot 0, the driver's behind them, times the VAE's factor of 0.7; and back in `pictures`."""
    vae = CausalVAE(VAE_PRESETS["tiny"]).eval()
    rng = np.random.default_rng(0)
    row = lambda: (*rng.uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32), *np.ones((2, 1, 16, 24), np.float32))  # noqa: E731
    own, drive = [row()], [row() for _ in range(9)]
    reference = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    with torch.no_grad():
        image, *streams = sample.encode(None, vae, "cpu", reference, own, drive)
        assert torch.equal(image, vae.encode(to_tensor(reference)[None, None])[0][:, 0])
        for k, cue in enumerate(streams):
            expected = [vae.encode(torch.from_numpy(np.stack([r[k] for r in rows]))[None])[0] for rows in (own, drive)]
            torch.testing.assert_close(cue[:, :, :16], 0.7 * torch.cat(expected, 1))
        latents = torch.randn(1, 3, 16, 2, 3)
        shown = list(sample.pictures(vae, latents, 7, "cpu"))
        np.testing.assert_array_equal(np.stack(shown), to_picture(vae.decode(latents / 0.7)[0])[:7])


def constant(seen):
    """A network that answers 0.1 everywhere and notes what it was given."""

    def dit(x, step, text, pose, face):
        seen.append(x)
        return torch.full_like(x[:, :, :16], 0.1)

    return dit


def denoised(args, dit, latents=7, window=13, ref_slot="reference"):
    cue, image = torch.zeros(1, 1 + latents, 17, 2, 2), torch.zeros(1, 16, 2, 2)
    return sample.denoise(args, dit, "cpu", torch.zeros(1, 3, 5), image, cue, cue, window, ref_slot)[0]


def test_long_clips_are_sampled_in_the_windows_of_the_training(example, tmp_path):
    seen = []
    _, args = sample.parse_args(arguments(example, "--steps", 1, masks=None))
    assert denoised(args, constant(seen), window=3).shape[1] == 7
    assert [x.shape[1] for x in seen] == [4, 4, 4], "windows of 3 at 0, 2 and 4, each with slot 0"
    save_weights(tmp_path / "w.safetensors", DiT(DIT_PRESETS["tiny"]), stage="2", step=1, window=3, ref_slot="copy")
    _, args = sample.parse_args(arguments(example, "--checkpoint", tmp_path / "w.safetensors", masks=None))
    assert sample.open_transformer(args, torch.float32)[1] == {"window": 3, "ref_slot": "copy"}


def test_the_seed_is_of_all_noise_and_the_sampler_the_one_that_is_asked_for(example):
    """dpm keeps nothing of its start where the answer is constant: what differs are its later draws. ddim, by itself."""
    seeded = lambda seed, *flags: denoised(  # noqa: E731
        sample.parse_args(arguments(example, "--steps", 3, "--seed", seed, *flags, masks=None))[1], constant([])
    )
    a, b, c = (seeded(seed) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=0.01)
    start = torch.randn(1, 8, 16, 2, 2, generator=torch.Generator().manual_seed(5))
    expected = ddim(lambda x, step: torch.full_like(x, 0.1), start, Schedule(), 3)[:, 1:]
    torch.testing.assert_close(seeded(5, "--sampler", "ddim"), expected)


def test_the_prompt_comes_first_the_null_text_second_and_each_backbone_has_its_own(example, tmp_path, monkeypatch):
    """As `denoise` reads them; remembered under prompt, backbone and dtype."""

    class T5(torch.nn.Module):
        blocks = torch.nn.ModuleList()

        def forward(self, ids):
            return ids[..., None].float()

    made = []
    tokenizer = lambda prompts: torch.full((1, 226), len(prompts[0]))  # noqa: E731
    monkeypatch.setattr(
        sample, "open_text_encoder", lambda args, dtype: made.append(args.backbone) or (tokenizer, T5())
    )
    ask = lambda backbone, prompt: sample.encode_text(  # noqa: E731
        Namespace(preset=None, prompt=prompt, guidance=3, backbone=backbone, cache=tmp_path / "cache", offload=False),
        torch.device("cpu"),
        torch.float32,
    )
    prompt, null = ask(tmp_path / "a", "a dancer")
    assert (prompt == 8).all() and torch.equal(null[:, 0], sample.empty_prompt()[0].float())
    for backbone, prompt in (("a", "a dancer"), ("a", "a man"), ("b", "a dancer")):
        ask(tmp_path / backbone, prompt)
    assert [path.name for path in made] == ["a", "a", "b"]


@pytest.mark.parametrize("name, k", [("pose", 0), ("face", 1)])
def test_a_cue_of_another_video_replaces_that_cue_alone(example, tmp_path, name, k):
    """The other video is picked at --fps as the driver is."""
    other = toy.render(7, 9, frames=10, size=64)
    write_video(tmp_path / "other.mp4", other.video, Fraction(8))
    for folder, clip in (("own", toy.render(1, 2, frames=10, size=64)), ("others", other)):
        (tmp_path / folder).mkdir()
        for i in range(0, 10, 2):
            write_image(tmp_path / folder / f"{i:03d}.png", finder.paint_mask(clip.body[i], clip.face[i]))
    flags = ["--fps", 4, f"--{name}", tmp_path / "other.mp4", f"--{name}-masks", tmp_path / "others"]
    rows = []
    for extra in ([], flags[2:]):
        _, args = sample.parse_args(arguments(example, *flags[:2], *extra, masks=tmp_path / "own"))
        options, video = cues.options(args), Video(args.drive, fps=args.fps)
        reference = sample.cover(read_image(args.reference), 96, 64)
        track = cues.analyse(video, reference, finder.from_arguments(args), options)
        rows.append(list(sample.driving_rows(args, video, track, reference, options)()))
    assert len(rows[0]) == len(rows[1]) == 5
    for plain, row in zip(*rows):
        assert [not np.array_equal(a, b) for a, b in zip(plain, row)] == [j == k for j in range(4)]


def test_another_person_is_another_track(example, tmp_path, monkeypatch):
    """--person must not find the cached masks of whom was followed before."""
    found = []
    monkeypatch.setattr(cues, "analyse", lambda *_: found.append(1) or Namespace(save=lambda path: path.touch()))
    monkeypatch.setattr(cues.Track, "load", lambda path: path.stat())
    for person in (1, 2, 2):
        _, args = sample.parse_args(arguments(example, "--person", person, masks=None))
        args.cache = tmp_path
        sample.analysed(
            args, Video(args.drive), np.zeros((16, 16, 3), np.uint8), lambda: None, None, cues.options(args)
        )
    assert len(found) == 2


def test_slot_0_is_dropped_and_the_frames_stay_in_order(example):
    """A network that answers with minus a slot's number: of one step of DDIM, which takes v at 999 for -x0, the number is left."""
    count = lambda x, *_: -torch.arange(x.shape[1]).view(1, -1, 1, 1, 1).expand(1, -1, 16, 2, 2).float()  # noqa: E731
    _, args = sample.parse_args(arguments(example, "--steps", 1, "--sampler", "ddim", masks=None))
    assert denoised(args, count)[0, :, 0, 0, 0].tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7])


def test_a_damaged_memory_is_made_anew(example, tmp_path):
    """A cut or empty file in --cache is as good as none."""
    run(example, "-o", tmp_path / "a.mp4", "--cache", tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:100])
    run(example, "-o", tmp_path / "b.mp4", "--cache", tmp_path / "cache")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    (path,) = (tmp_path / "cache" / "text").iterdir()
    path.write_bytes(b"")
    run(example, "-o", tmp_path / "b.mp4", "--cache", tmp_path / "cache")


def test_latents_that_are_not_finite_are_no_video(example, tmp_path):
    """Decoded, they would be black, and tagged as the result."""
    dit = DiT(DIT_PRESETS["tiny"])
    dit.patch_embed.bias.data.fill_(float("nan"))
    save_weights(tmp_path / "w.safetensors", dit, stage="2", step=1)
    assert "latents are not finite" in mistake(
        example, "-o", tmp_path / "a.mp4", "--checkpoint", tmp_path / "w.safetensors"
    )
    assert not (tmp_path / "a.mp4").exists()
