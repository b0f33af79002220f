"""prepare, add-pseudo and check: real video files in, a data folder out, whatever happens on the way."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from itertools import islice

import av
import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cues
import finder
import data
import prepare
import toy
import train
from video import Video, read_image, write_image, write_video

from conftest import ROOT


def put(videos, masks, name, *clips, fps=16):
    """Clips of the drawn world, one after the other, as videos/NAME.mp4 and masks/NAME/."""
    write_video(videos / f"{name}.mp4", np.concatenate([clip.video for clip in clips]), fps)
    (masks / name).mkdir(parents=True)
    pairs = [pair for clip in clips for pair in zip(clip.body, clip.face)]
    for index, pair in enumerate(pairs):
        write_image(masks / name / f"{index:03d}.png", finder.paint_mask(*pair))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """One video to train on, one to test on with a cut; a broken one, a text, one of 3 frames."""
    root = tmp_path_factory.mktemp("world")
    videos, masks = root / "in", root / "masks"
    videos.mkdir()
    put(videos, masks, "dance", toy.render(1, 1, frames=20, size=64))
    put(videos, masks, "00336", toy.render(2, 2, frames=9, size=64), toy.render(3, 3, frames=12, size=64))
    put(videos, masks, "short", toy.render(4, 4, frames=3, size=64))
    (videos / "dance.txt").write_text("a woman dances\n")
    (videos / "notes.txt").write_text("not a video")
    (videos / "broken.mp4").write_bytes((videos / "dance.mp4").read_bytes()[:300])
    return root


def run(*words):
    """The command line -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.main([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def prepared(world, folder, *extra, videos=None):
    small = ["--preset", "tiny", "--frames", 9, "--area", 64 * 64, "--variants", 2, "--refs", 2]
    place = ["--device", "cpu", "--dtype", "float32", "--masks", world / "masks"]
    return run("prepare", videos or world / "in", "-o", folder, *small, *place, *extra)


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    code, _, err = prepared(world, folder)
    assert code == 0, err
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "data")


def bytes_of(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".lock"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- prepare -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_in_a_sentence(world, tmp_path, monkeypatch):
    """safetensors' own error is no OSError."""

    def full(*args, **kwargs):
        raise data.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(data, "save_file", full)
    code, _, err = prepared(world, tmp_path / "data")
    assert code == 2 and "cannot be written (No space left" in err and "Traceback" not in err


def test_the_tiktok_data_set_is_split_as_in_the_paper():
    """1-334 train, 335-340 test, whatever --held-out says; other names are held out by their hash alone."""
    splits = {n: prepare.split_of(f"{n:05d}", 1.0) for n in range(1, 341)}
    assert [n for n, split in splits.items() if split == "test"] == list(range(335, 341))
    assert prepare.split_of("00341", 1.0) == "test", "not of the data set"
    share = np.mean([prepare.split_of(f"clip {n}", 0.2) == "test" for n in range(1000)])
    assert 0.15 < share < 0.25


def test_tiktok_folders_files_and_captions_are_found(tmp_path):
    """A folder NAME/images is one video; masks and captions are none; two of one name are refused."""
    for name in (
        "00002/images/1.png",
        "00002/images/2.png",
        "00002/masks/1.png",
        "b/1.jpg",
        "a.mp4",
        "a.txt",
        "c.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "00002.txt").write_text("a caption")
    found = {name: (str(path.relative_to(tmp_path)), text.name) for name, path, text in prepare.inputs(tmp_path)}
    assert found == {
        "00002": ("00002/images", "00002.txt"),
        "a": ("a.mp4", "a.txt"),
        "b": ("b", "b.txt"),
        "c": ("c.txt", "c.txt"),
    }
    with pytest.raises(FileNotFoundError, match="nowhere.mp4 does not exist"):
        prepare.all_inputs([tmp_path / "nowhere.mp4"])
    with pytest.raises(ValueError, match="one name"):
        prepare.all_inputs([tmp_path, tmp_path / "b" / "1.jpg", tmp_path / "00002" / "images" / "1.png"])


def test_videos_are_cut_where_the_scene_changes_and_what_is_broken_is_named(folder, world):
    clips = {line["id"]: line for line in lines_of(folder / "clips.jsonl")}
    assert {id: (c["start"], c["frames"]) for id, c in clips.items()} == {
        "00336_000000": (0, 9), "00336_000009": (9, 9), "dance_000000": (0, 17)
    }  # fmt: skip
    assert {id: c["split"] for id, c in clips.items()} == dict(zip(clips, ("test", "test", "train")))
    assert clips["dance_000000"]["prompt"] == "a woman dances" and clips["00336_000000"]["prompt"] == ""
    skipped = {line["id"]: line["skipped"] for line in lines_of(folder / "skipped.jsonl")}
    assert list(skipped) == ["broken", "notes", "short_000000"]
    assert "too short: 3 of 9" in skipped["short_000000"] and "broken.mp4" in skipped["broken"]
    first = next(iter(Video(folder / "videos" / "00336_000009.mp4")))
    source = list(Video(world / "in" / "00336.mp4"))
    assert np.abs(first.astype(int) - source[9]).mean() < 4 < np.abs(first.astype(int) - source[8]).mean()


def test_long_scenes_are_cut_at_the_longest_length_and_their_rest_is_not_a_fault():
    """A cut that falls on the longest length begins a scene; 1 frame left over does not."""
    grey = lambda level: np.full((16, 16, 3), level, np.uint8)
    frames = [(grey(10), None)] * 9 + [(grey(200), None)] * 4
    found = [(start, fresh, len(piece)) for start, fresh, piece in prepare.pieces(iter(frames), 4)]
    assert found == [(0, True, 4), (4, False, 4), (8, False, 1), (9, True, 4)]


@pytest.mark.parametrize("rate, stride", [(8, 1), (16, 1), (25, 2), (30, 2), (60, 4)])
def test_every_nth_frame_gives_about_16_frames_a_second(tmp_path, rate, stride):
    bars = np.zeros((12, 32, 96, 3), np.uint8)
    for n in range(12):
        bars[n, :, 8 * n : 8 * n + 8] = 255
    write_video(tmp_path / "v.mp4", bars, rate)
    args = Namespace(fps=16.0, folder_fps=30.0, masks=None, max_frames=97)
    ((_, fps, _, piece),) = prepare.read_pieces(args, "v", tmp_path / "v.mp4")
    assert fps == rate / stride
    assert [frame.mean((0, 2)).argmax() // 8 for frame, _ in piece] == list(range(0, 12, stride))


def test_buckets_hold_the_area_and_multiples_of_16():
    for height, width in ((1080, 1920), (1920, 1080), (480, 480), (1280, 720), (540, 414)):
        H, W = prepare.bucket(height, width, 512 * 512)
        assert H % 16 == W % 16 == 0 and 0.93 < H * W / 512**2 < 1.07
        assert 0.85 < (W / H) / (width / height) < 1.18
    tall = prepare.middle(np.arange(40 * 20).reshape(40, 20, 1), 24, 24)
    assert tall.shape[:2] == (20, 20) and tall[0, 0, 0] == 10 * 20, "the middle rows"


def test_masks_are_cropped_with_their_pictures(world, tmp_path):
    """80 x 64 pixels go into the bucket of 80 x 48: the middle rows, of video and masks alike."""
    (tmp_path / "in").mkdir()
    clip = toy.render(1, 1, frames=9, size=(64, 80))
    put(tmp_path / "in", tmp_path / "masks", "wide", clip)
    code, _, err = prepared(world, tmp_path / "data", "--masks", tmp_path / "masks", videos=tmp_path / "in")
    assert code == 0, err
    cache = load_file(tmp_path / "data" / "cache" / "wide_000000.safetensors")
    assert cache["mean"].shape == (3, 16, 6, 10) and cache["text"].shape == (226, 32)
    assert (np.unpackbits(cache["body"].numpy(), axis=-1) == clip.body[:, 8:56]).mean() > 0.995
    frames = np.stack(list(Video(tmp_path / "data" / "videos" / "wide_000000.mp4")))
    error = [np.abs(frames.astype(int) - clip.video[:, top : top + 48]).mean() for top in range(16)]
    assert np.argmin(error) == 8 and error[8] < 6, "compressed twice"


class Killed(BaseException):
    pass


def test_a_killed_run_resumed_equals_an_unkilled_one(folder, world, tmp_path, monkeypatch):
    """Killed at every rename in turn, also within a clip: in the end the same files, byte for byte."""
    rename, data = os.replace, tmp_path / "data"

    def killing(allowed):
        def replaced(*paths):
            nonlocal allowed
            allowed -= 1
            if allowed < 0:
                raise Killed
            return rename(*paths)

        return replaced

    for kills in range(40):
        monkeypatch.setattr(os, "replace", killing(allowed=kills))
        try:
            code, _, _ = prepared(world, data)
            break
        except Killed:
            for part in data.glob("cues/*/.part"):
                (part / "torn").write_text("what a harder death leaves behind")
    assert kills > 7 and code == 0
    assert bytes_of(data) == bytes_of(folder)


def test_two_ranks_make_the_same_folder_as_one(folder, world, tmp_path, monkeypatch):
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert prepared(world, tmp_path / "data")[0] == 0
    assert bytes_of(tmp_path / "data") == bytes_of(folder)


def test_a_list_overtaken_while_it_is_written_is_written_again(copied, monkeypatch):
    """Rank 0 collects, rank 1 finishes its last clip, rank 0 writes: the clip must not be missing."""
    late = (copied / "cues" / "00336_000009" / "clip.json").read_text()
    (copied / "cues" / "00336_000009" / "clip.json").unlink()
    rename = os.replace

    def replaced(*paths):
        (copied / "cues" / "00336_000009" / "clip.json").write_text(late)
        return rename(*paths)

    monkeypatch.setattr(os, "replace", replaced)
    prepare.assemble(copied)
    assert len(lines_of(copied / "clips.jsonl")) == 3


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--frames", 17], "has --frames 9, not 17"),
        (["--frames", 10], "the VAE needs 8k+1"),
        (["--max-frames", 8], "at least --frames"),
        (["--refs", 0], "1 or more"),
        (["--segmenter", "x.onnx"], "drop --segmenter"),
        (["--backbone", "DIR"], "or --preset"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(copied, world, extra, message):
    code, _, err = prepared(world, copied, *extra)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert message in err


def test_a_mistyped_backbone_is_not_remembered(world, tmp_path):
    """The folder can be made after all; catches settings that are written before the networks are there."""
    words = "prepare", world / "in", "-o", tmp_path / "data", "--masks", world / "masks", "--device", "cpu"
    code, _, err = run(*words, "--backbone", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err and not (tmp_path / "data" / "prepare.json").exists()


def test_a_video_named_like_a_clip_of_another_is_not_lost(world, tmp_path):
    """dance_000000.mp4 beside dance.mp4, whose first clip has that name."""
    videos, masks = tmp_path / "in", tmp_path / "masks"
    videos.mkdir()
    put(videos, masks, "dance", toy.render(1, 1, frames=9, size=64))
    put(videos, masks, "dance_000000", toy.render(2, 2, frames=9, size=64))
    code, _, err = prepared(tmp_path, tmp_path / "data")
    assert code == 0, err
    assert [line["id"] for line in lines_of(tmp_path / "data" / "clips.jsonl")] == [
        "dance_000000",
        "dance_000000_000000",
    ]


def test_another_film_of_a_known_name_is_refused_not_dropped(world, copied, tmp_path):
    """A second camera's IMG_0001; the same film from another folder is the same, and a kept fault too."""
    code, _, err = prepared(world, copied, videos=shutil.copytree(world / "in", tmp_path / "moved"))
    assert code == 0, err
    for name in ("dance", "broken"):
        videos = tmp_path / name
        videos.mkdir()
        write_video(videos / f"{name}.mp4", toy.render(9, 9, frames=20, size=64).video, 16)
        code, _, err = prepared(world, copied, videos=videos)
        assert code == 2 and err.count("\n") == 1 and f"{name}.mp4" in err and "rename one of them" in err


def test_names_that_are_not_utf8_are_refused_before_anything_is_made(world, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(world / "in" / "dance.mp4", os.fsencode(tmp_path / "in") + b"/caf\xe9.mp4")
    code, _, err = prepared(world, tmp_path / "data", videos=tmp_path / "in")
    assert code == 2 and "is not UTF-8" in err and not (tmp_path / "data").exists()


def test_masks_of_another_shape_are_refused_though_they_are_cropped(world, tmp_path):
    """Squashed to a square, then cropped as their pictures are, they would fit and be wrong."""
    (tmp_path / "in").mkdir()
    put(tmp_path / "in", tmp_path / "masks", "wide", toy.render(1, 1, frames=9, size=(64, 128)))
    for path in (tmp_path / "masks" / "wide").iterdir():
        write_image(path, cv2.resize(read_image(path), (64, 64)))
    prepared(world, tmp_path / "data", "--masks", tmp_path / "masks", videos=tmp_path / "in")
    (line,) = lines_of(tmp_path / "data" / "skipped.jsonl")
    assert "a mask is 64x64 but its picture 128x64" in line["skipped"]


def test_references_show_the_person():
    """Frames whose segmentation is rejected are never references, at inference an error."""
    clip, vae = toy.render(1, 1, frames=9, size=32), prepare.CausalVAE(prepare.VAE_PRESETS["tiny"]).eval()
    track = cues.analyse(clip.video, clip.video[0], data.toy_finder(clip), data.OWN_PLACE)
    track.accepted[[0, 1, 2, 5]] = False
    tensors = data.encode_clip(vae, clip.video, ((clip.video, track),) * 2, [], torch.zeros(1, 4), (0,), 1, 6)
    assert tensors["ref_frame"].tolist() == [3, 4, 6, 7, 8]


# ---- add-pseudo ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def performers(tmp_path_factory):
    """Pseudo videos of dance_000000, bodies and faces: one good pair and one of every kind of bad."""
    root = tmp_path_factory.mktemp("pseudo")
    other = toy.render(501, 1, frames=17, size=64)
    wrong = toy.render(501, 9, frames=17, size=64)
    blurred = toy.render(502, 1, frames=17, size=64)
    blurred.video[:] = [cv2.GaussianBlur(frame, (0, 0), 4) for frame in blurred.video]
    faceless = toy.render(503, 1, frames=17, size=64)
    faceless.face[:] = False
    for kind in ("body", "face"):
        (root / kind).mkdir()
        place = root / kind, root / "masks" / kind
        put(*place, "dance_000000_good", other)
        put(*place, "dance_000000_blur", blurred)
        put(*place, "dance_000000_long", toy.render(501, 1, frames=20, size=64))
    put(root / "body", root / "masks" / "body", "dance_000000_pose", wrong)
    put(root / "face", root / "masks" / "face", "dance_000000_faceless", faceless)
    put(root / "body", root / "masks" / "body", "00336_000000_alone", toy.render(501, 2, frames=9, size=64))
    return root


def add(data, root, *extra):
    given = ["--body", root / "body", "--face", root / "face", "--masks", root / "masks"]
    return run("add-pseudo", data, *given, "--device", "cpu", "--dtype", "float32", *extra)


def test_pseudo_videos_are_filtered_with_a_report_and_the_good_pair_is_cached(copied, performers):
    """Each bad video is rejected for its own fault, and a clip without a face video gets nothing."""
    code, out, err = add(copied, performers)
    assert code == 0, err
    verdicts = lines_of(copied / "pseudo.jsonl")
    reasons = {(v["kind"], v["video"].split("_")[2][:-4]): v["reason"] for v in verdicts}
    assert reasons.pop(("body", "good")) is reasons.pop(("face", "good")) is reasons.pop(("body", "alone")) is None
    assert {key: reason.split(":")[0] for key, reason in reasons.items()} == {
        ("body", "blur"): "detail", ("face", "blur"): "detail", ("body", "long"): "unusable",
        ("face", "long"): "unusable", ("body", "pose"): "pose", ("face", "faceless"): "faces",
    }  # fmt: skip
    assert "body: 2 of 5 kept" in out and "face: 1 of 4 kept" in out and "1 of 3 clips have pseudo cues" in out
    clips = {line["id"]: line["pseudo"] for line in lines_of(copied / "clips.jsonl")}
    good = {"body": "dance_000000_good.mp4", "face": "dance_000000_good.mp4"}
    assert clips == {"dance_000000": [good], "00336_000000": [], "00336_000009": []}
    cache = load_file(copied / "cache" / "dance_000000.safetensors")
    assert cache["pseudo_pose"].shape == cache["pseudo_face"].shape == (2, 5, 16, 8, 8)
    before = bytes_of(copied)
    assert add(copied, performers)[0] == 0 and bytes_of(copied) == before
    assert run("check", copied, "-o", copied / "sheet.png")[0] == 0


def test_what_has_changed_is_judged_again_and_what_is_not_given_stays(copied, performers, tmp_path):
    """Masks that were missing, a video made anew under its old name; videos of other clips take nothing away."""
    root = shutil.copytree(performers, tmp_path / "pseudo")
    pairs = lambda: {line["id"]: len(line["pseudo"]) for line in lines_of(copied / "clips.jsonl")}["dance_000000"]  # noqa: E731
    hidden = root / "masks" / "face" / "dance_000000_good"
    hidden.rename(tmp_path / "later")
    assert add(copied, root)[0] == 0 and pairs() == 0
    (tmp_path / "later").rename(hidden)
    assert add(copied, root)[0] == 0 and pairs() == 1
    for path in root.glob("*/dance_000000*.mp4"):
        path.rename(path.with_name(path.name.replace("dance_000000", "somebody")))
    assert add(copied, root)[0] == 0 and pairs() == 1
    for kind in ("body", "face"):
        shutil.copy(root / kind / "somebody_blur.mp4", root / kind / "dance_000000_good.mp4")
    assert add(copied, root)[0] == 0 and pairs() == 0


def test_a_pseudo_video_is_of_the_longest_name_that_it_begins_with():
    paths = [prepare.Path(f"{name}.mp4") for name in ("a_000000", "a_000000_x", "a_000000_000000", "a_0000001", "b")]
    found = prepare.shares(paths, ["a_000000", "a_000000_000000", "a_0000001"])
    assert {id: [path.stem for path in files] for id, files in found.items()} == {
        "a_000000": ["a_000000", "a_000000_x"], "a_000000_000000": ["a_000000_000000"], "a_0000001": ["a_0000001"],
    }  # fmt: skip


def test_each_rank_has_its_gpu_before_a_network_is_loaded(copied, world, monkeypatch):
    order = []
    place, make = prepare.place, prepare.make_finder
    monkeypatch.setattr(prepare, "place", lambda args: order.append("place") or place(args))
    monkeypatch.setattr(prepare, "make_finder", lambda args: order.append("finder") or make(args))
    assert prepared(world, copied)[0] == 0 and order == ["place", "finder"]


def test_a_pose_cue_of_add_pseudo_is_misaligned_and_a_face_cue_is_not(monkeypatch):
    """A.2: the pose moves, face and masks stay; variant 0 has no blank frames."""
    clip = toy.render(1, 1, frames=9, size=64)
    masks = [finder.paint_mask(*pair) for pair in zip(clip.body, clip.face)]
    track = cues.analyse(clip.video, clip.video[0], finder.Finder(masks=masks), prepare.OWN_PLACE)
    monkeypatch.setattr(data, "misalignment", lambda presence, generator, strength: (1.0, np.array([8.0, 0.0])))
    plain, moved = (
        data.cue_variant(*[(clip.video, track)] * 2, 0, prepare.keyed(0), misaligned, prepare.OWN_PLACE)
        for misaligned in (False, True)
    )
    assert np.abs(moved[0][..., 8:] - plain[0][..., :-8]).mean() < 0.02 < np.abs(moved[0] - plain[0]).mean()
    assert all(np.array_equal(a, b) for a, b in zip(plain[1:], moved[1:]))


def test_replayed_tracks_are_the_tracks(folder):
    """What is found once in native pixels is what encode_clip sees; stretched, the boxes follow the masks."""
    track = cues.Track.load(folder / "cues" / "dance_000000" / "track.npz")
    frames = list(Video(folder / "videos" / "dance_000000.mp4"))
    again = cues.analyse(frames, frames[0], prepare.replay(track, np.eye(2, 3)), prepare.OWN_PLACE)
    assert again.masks == track.masks
    for name in ("body_boxes", "face_boxes", "face_squares", "scores", "accepted"):
        assert np.array_equal(getattr(again, name), getattr(track, name), equal_nan=True), name
    wide = cues.analyse(
        frames, frames[0], prepare.replay(track, np.float64([[1.25, 0, -8], [0, 1, 0]])), prepare.OWN_PLACE
    )
    whole = (wide.body_boxes[:, 0] > 0) & (wide.body_boxes[:, 2] < 63)
    sides = lambda t: (t.body_boxes[:, 2] - t.body_boxes[:, 0])[whole]
    assert whole.any() and np.allclose(sides(wide) / sides(track), 1.25, atol=0.1)
    faces = lambda t: np.nanmean(t.face_boxes[:, [0, 2]], 1)
    assert np.allclose(faces(wide), 1.25 * faces(track) - 8, equal_nan=True)


def test_augmented_copies_are_marked_and_told(copied):
    code, out, _ = run("add-pseudo", copied, "--augment", 2, "--device", "cpu", "--dtype", "float32")
    assert code == 0 and "not the paper's" in out
    assert all(c["pseudo"] == [{"augmented": 0}, {"augmented": 1}] for c in lines_of(copied / "clips.jsonl"))
    cache = load_file(copied / "cache" / "00336_000000.safetensors")
    assert cache["pseudo_pose"].shape[0] == 4
    assert not torch.equal(cache["pseudo_pose"][0], cache["pose"][0])


def test_both_or_neither_of_body_and_face(copied):
    for extra in ([], ["--body", "x"], ["--augment", 1, "--body", "x", "--face", "x"]):
        code, _, err = run("add-pseudo", copied, *extra)
        assert code == 2 and "--augment N" in err


@pytest.mark.parametrize(
    "damaged", ["cache/dance_000000.safetensors", "cues/dance_000000/track.npz", "videos/dance_000000.mp4"]
)
def test_one_damaged_clip_does_not_stop_add_pseudo(copied, damaged):
    """It is named and counted, and the other clips get their cues; catches an error type that nobody expects."""
    path = copied / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, out, err = run("add-pseudo", copied, "--augment", 1, "--device", "cpu", "--dtype", "float32")
    assert code == 0 and "2 of 3 clips have pseudo cues, 2 in all; 1 skipped" in out
    assert "skipped dance_000000: " in err and "Traceback" not in err


def test_held_out_samples_of_stage_2_and_copied_slots(copied):
    """The test split reads the variant without augmentation; --ref-slot copy repeats latent 1's target, cues and masks."""
    run("add-pseudo", copied, "--augment", 3, "--device", "cpu", "--dtype", "float32")
    options = dict(stage="2", window=3, seed=0, noise_shift=1, location="soft", face="centered")
    for slot, same in (("reference", False), ("copy", True)):
        clips = data.Clips(copied, Namespace(**options, ref_slot=slot), 0.7, "test")
        for step in range(4):
            batch = clips.batch(step, range(2), 2)
            for name in ("latents", "pose", "face", "teacher_pose", "teacher_face"):
                assert torch.equal(batch[name][:, 0], batch[name][:, 1]) == same
    cached = {
        id: load_file(copied / f"cache/{id}.safetensors")["pseudo_pose"] for id in ("00336_000000", "00336_000009")
    }
    for step in range(8):
        for pose in clips.batch(step, range(2), 2)["pose"]:
            windows = [
                0.7 * z[k, 1:3].float() for z in cached.values() for k in range(0, 6, 2)
            ]  # 3 pairs of 2 variants
            assert any(torch.equal(pose[2:4, :16], w) or torch.equal(pose[1:3, :16], w) for w in windows)


# ---- check ---------------------------------------------------------------------------------------------------------


def spoil(data, change):
    path = data / "cache" / "dance_000000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def line_changed(data):
    path = data / "clips.jsonl"
    path.write_text(path.read_text().replace('"frames": 17', '"frames": 25'))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: os.truncate(d / "cache" / "dance_000000.safetensors", 5000), "cannot be read"),
        (lambda d: (d / "cache" / "dance_000000.safetensors").unlink(), "cannot be read"),
        (lambda d: spoil(d, lambda t: t["mean"][0].fill_(torch.nan)), "mean is not finite"),
        (lambda d: spoil(d, lambda t: t.pop("ref_face")), "ref_face is missing"),
        (
            lambda d: spoil(d, lambda t: t.update(pseudo_pose=t["pose"].clone())),
            "pseudo_pose is not expected",
        ),
        (lambda d: spoil(d, lambda t: t.update(face=t["face"][:1].clone())), "face is torch.bfloat16"),
        (lambda d: spoil(d, lambda t: t["ref_frame"].fill_(17)), "ref_frame is beyond"),
        (line_changed, "mean is"),
        (lambda d: os.truncate(d / "cues" / "dance_000000" / "track.npz", 900), "track or video"),
        (lambda d: (d / "videos" / "dance_000000.mp4").unlink(), "track or video"),
        (
            lambda d: shutil.copy(d / "cache" / "dance_000000.safetensors", d / "cache" / "x.safetensors"),
            "x: in the",
        ),
    ],
)
def test_check_names_every_fault(copied, change, words):
    assert run("check", copied)[0] == 0 and read_image(copied / "sheet.png").shape[1] == cues.WIDTH
    change(copied)
    code, _, err = run("check", copied)
    assert code == 2 and words in err and "Traceback" not in err
    assert "dance_000000" in err or "x: in" in err


# ---- training on it ------------------------------------------------------------------------------------------------


def trained(data, run, *extra):
    common = [
        "--preset",
        "tiny",
        "--data",
        data,
        "--window",
        3,
        "--steps",
        3,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    _, args = train.parse_args([str(a) for a in [*common, "--eval-every", 0, "-o", run, *extra]])
    train.train(args)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return lines


def test_both_stages_train_on_prepared_clips(copied, tmp_path):
    assert run("add-pseudo", copied, "--augment", 1, "--device", "cpu", "--dtype", "float32")[0] == 0
    first = trained(copied, tmp_path / "stage1", "--stage", 1, "--log-every", 1)
    second = trained(copied, tmp_path / "stage2", "--stage", 2, "--teacher", tmp_path / "stage1", "--log-every", 1)
    assert any("denoise" in line for line in first)
    assert all(np.isfinite(line["s2x"]) for line in second if "s2x" in line) and any("s2x" in line for line in second)


@pytest.mark.slow
def test_a_real_clip_with_real_networks(assets, tmp_path):
    """A dancer: nearly all frames accepted, her face found; and she is no other identity than herself."""
    weights, data, pseudo = assets / "weights", tmp_path / "data", tmp_path / "pseudo"
    nets = ["--segmenter", weights / "selfie_segmentation.tflite", "--face-model", weights / "face"]
    small = ["--preset", "tiny", "--frames", 17, "--max-frames", 17, "--area", 256 * 256, "--variants", 2]
    video = tmp_path / "dancer.mp4"
    write_video(video, islice(Video(assets / "video" / "liveportrait_s13.mp4"), 36), 25)
    code, _, err = run("prepare", video, "-o", data, *small, *nets, "--device", "cpu")
    assert code == 0, err
    (clip,) = lines_of(data / "clips.jsonl")
    assert (clip["fps"], clip["frames"]) == (12.5, 17) and clip["accepted"] > 14 and clip["faces"] > 14
    pseudo.mkdir()
    shutil.copy(data / "videos" / "dancer_000000.mp4", pseudo)
    code, _, err = run("add-pseudo", data, "--body", pseudo, "--face", pseudo, *nets, "--device", "cpu")
    assert code == 0, err
    for verdict in lines_of(data / "pseudo.jsonl"):
        assert verdict["reason"].startswith("identity") and ";" not in verdict["reason"], verdict
        assert verdict["identity"] > 0.9 and verdict["detail"] > 0.8
        assert verdict.get("pose", 1) > 0.9 and verdict.get("faces", 1) > 0.8
    assert run("check", data)[0] == 0


@pytest.mark.slow
def test_two_real_clips_are_learned_by_heart_in_both_stages(assets, tmp_path):
    """Two dancers through prepare, add-pseudo --augment and both stages: on the run's strips the output is the truth,
    not the reference standing still. The pictures are of the drawn world's VAE, which has been trained; tiny's has not."""
    videos, folder, weights = tmp_path / "in", tmp_path / "data", assets / "weights"
    videos.mkdir()
    for name in ("steadydancer_00002", "musepose_dance"):
        write_video(videos / f"{name}.mp4", islice(Video(assets / "video" / f"{name}.mp4"), 50), 24)
    nets = ["--segmenter", weights / "selfie_segmentation.tflite", "--face-model", weights / "yunet_n_640_640.onnx"]
    small = ["--preset", "toy", "--frames", 17, "--max-frames", 25, "--area", 96 * 96, "--variants", 1, "--fps", 12]
    assert run("prepare", videos, "-o", folder, *small, *nets, "--device", "cpu")[0] == 0
    assert run("add-pseudo", folder, "--augment", 1, "--device", "cpu")[0] == 0
    assert run("check", folder)[0] == 0
    for stage, extra in (("1", []), ("2", ["--teacher", tmp_path / "stage1"])):
        common = [
            "--stage",
            stage,
            "--preset",
            "toy",
            "--data",
            folder,
            "--steps",
            600,
            "--eval-every",
            600,
            "--ema",
            0.98,
        ]
        _, args = train.parse_args([str(w) for w in [*common, "-o", tmp_path / f"stage{stage}", *extra]])
        train.train(args)
        strip = read_image(tmp_path / f"stage{stage}" / "samples-0000600.png").astype(float)
        reference, _, output, truth = np.split(strip, np.cumsum([1, 3, 3]) * strip.shape[1] // 10, axis=1)
        still = np.abs(np.tile(reference, (1, 3, 1)) - truth).mean()
        assert np.abs(output - truth).mean() < 0.5 * still, (stage, still)


def start(inputs, folder, assets, ranks=1):
    """`data.py prepare` as a process, or as two under torchrun."""
    nets = ["--segmenter", assets / "weights" / "selfie_segmentation.tflite"]
    nets += ["--face-model", assets / "weights" / "yunet_n_640_640.onnx"]
    small = [
        "--preset",
        "tiny",
        "--frames",
        17,
        "--max-frames",
        33,
        "--area",
        96 * 96,
        "--variants",
        2,
        "--refs",
        2,
    ]
    words = [
        "data.py",
        "prepare",
        inputs,
        "-o",
        folder,
        *small,
        *nets,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        ranks,
        "--master_port",
        29600 + os.getpid() % 300,
    ]
    command = [sys.executable, *(launch if ranks > 1 else []), *words]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(w) for w in command],
        cwd=ROOT,
        env=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_all_real_clips_killed_ten_times_or_on_two_ranks_make_the_same_folder(assets, tmp_path):
    """kill -9 at random moments, then to the end: byte for byte one straight run; what is broken is named and skipped."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    for video in (assets / "video").glob("*.mp4"):
        os.symlink(video, inputs / video.name)
    whole = (assets / "video" / "scail_001.mp4").read_bytes()
    (inputs / "broken.mp4").write_bytes(whole[: len(whole) // 3])
    (inputs / "words.txt").write_text("no video")
    write_video(inputs / "blink.mp4", toy.render(1, 1, frames=3, size=64).video, 16)
    with av.open(str(inputs / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame)), container.mux(stream.encode(None))

    began = time.monotonic()
    straight = start(inputs, tmp_path / "straight", assets)
    said, _ = straight.communicate()
    assert straight.returncode == 0, said[-3000:]
    assert all(f"skipped {name}" in said for name in ("broken", "words", "blink_000000", "sound")), said[-3000:]
    took, rng = time.monotonic() - began, np.random.default_rng(0)
    for _ in range(10):
        process = start(inputs, tmp_path / "killed", assets)
        try:
            process.communicate(timeout=6 + took / 8 * rng.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    for folder, ranks in ((tmp_path / "killed", 1), (tmp_path / "two", 2)):
        process = start(inputs, folder, assets, ranks)
        said, _ = process.communicate()
        assert process.returncode == 0, said[-3000:]
    expected = bytes_of(tmp_path / "straight")
    for name in ("killed", "two"):
        found = bytes_of(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [path for path in expected if found[path] != expected[path]] == []
    assert run("check", tmp_path / "killed")[0] == 0


def tracked(clip):
    return list(clip.video), cues.analyse(clip.video, clip.video[0], data.toy_finder(clip), prepare.OWN_PLACE)


def asked(**changes):
    return Namespace(**dict(masks=None, min_detail=0.0, min_pose=0.0, min_faces=0.0, max_identity=0.4) | changes)


@pytest.mark.parametrize("cosine, reason", [(0.3, None), (0.5, "identity: 0.50 is above 0.4")])
def test_a_pseudo_video_of_the_clips_own_person_is_rejected(tmp_path, monkeypatch, cosine, reason):
    """By the cosine of both faces' embeddings: 1 is the same face."""
    clip = toy.render(1, 1, frames=9, size=64)
    write_video(tmp_path / "other.mp4", clip.video, 16)
    faces = iter([np.array([1.0, 0.0]), np.array([cosine, (1 - cosine**2) ** 0.5])])
    monkeypatch.setattr(prepare, "identity", lambda frames, track, embed: next(faces))
    own = tracked(clip)
    monkeypatch.setattr(cues, "analyse", lambda *_: own[1])
    found, _ = prepare.verdict_on(asked(), "body", tmp_path / "other.mp4", own, data.toy_finder(clip), print)
    assert found["reason"] == reason and found["identity"] == cosine


def test_a_body_goes_with_the_face_of_its_own_name_else_with_any(monkeypatch):
    kept = lambda args, kind, path, *_: ({"reason": None}, (kind, path.stem))  # noqa: E731
    monkeypatch.setattr(prepare, "verdict_on", kept)
    files = {
        kind: [prepare.Path(f"{name}.mp4") for name in names] for kind, names in (("body", "abc"), ("face", "xba"))
    }
    _, pairs, names = prepare.find_pairs(None, files, None, None, None)
    assert [(body, face) for (_, body), (_, face) in pairs] == [("a", "a"), ("b", "b"), ("c", "a")]
    assert names[1] == {"body": "b.mp4", "face": "b.mp4"}


def test_where_the_pseudo_person_is_lost_the_poses_do_not_agree():
    """Half of the frames rejected: half of the agreement, whatever their masks are."""
    _, own = tracked(toy.render(1, 1, frames=8, size=64))
    _, other = tracked(toy.render(1, 1, frames=8, size=64))
    assert prepare.pose_agreement(own, other) == 1
    other.accepted[::2] = False
    assert prepare.pose_agreement(own, other) == 0.5
    moved = [np.roll(own.mask(k), 3, 1) for k in range(8)]
    assert not any(mask[:, :3].any() for mask in moved)
    other.masks, other.body_boxes = [zlib.compress(np.packbits(m)) for m in moved], own.body_boxes + [3, 0, 3, 0]
    other.accepted[:] = True
    assert prepare.pose_agreement(own, other) == 1, "wherever she stands"


def test_a_clip_starts_at_its_frame_of_the_source(tmp_path):
    """At every second frame of 32 a second: the scene that begins at frame 24 is piece 12, of 16 frames a second."""
    video = np.concatenate([np.full((24, 16, 16, 3), 10, np.uint8), np.full((12, 16, 16, 3), 240, np.uint8)])
    write_video(tmp_path / "v.mp4", video, 32)
    args = Namespace(fps=16.0, folder_fps=30.0, masks=None, max_frames=97)
    found = [(start, fps, len(piece)) for start, fps, _, piece in prepare.read_pieces(args, "v", tmp_path / "v.mp4")]
    assert found == [(0, 16, 12), (24, 16, 6)]


def test_of_a_clip_most_frames_must_be_accepted_and_its_own_prompt_is_encoded(tmp_path, monkeypatch):
    clip, prompts = toy.render(1, 1, frames=9, size=64), []
    for folder in ("cache", "videos", "cues"):
        (tmp_path / folder).mkdir()
    vae = prepare.CausalVAE(prepare.VAE_PRESETS["tiny"]).eval()
    args = Namespace(output=tmp_path, masks=None, variants=1, refs=1)
    line = dict(id="a_000000", height=64, width=64, fps=16, prompt="a dancer")
    _, track = tracked(clip)
    monkeypatch.setattr(cues, "analyse", lambda *_: track)
    encode = lambda prompt: prompts.append(prompt) or torch.zeros(1, 4)  # noqa: E731
    make = lambda: prepare.prepare_clip(  # noqa: E731
        args, line, [(frame, None) for frame in clip.video], finder.Finder(), vae, encode
    )
    track.accepted[:5] = False
    assert make() == "5 of 9 frames are rejected" and not prompts
    track.accepted[0] = True
    assert make() is None and prompts == ["a dancer"]
    assert json.loads((tmp_path / "cues/a_000000/clip.json").read_text())["accepted"] == 5


def test_the_null_text_is_t5s_of_the_empty_prompt(folder):
    """Without a tokenizer every prompt is that."""
    null = load_file(folder / "null_text.safetensors")["text"]
    assert null.any() and torch.equal(null, load_file(folder / "cache" / "00336_000000.safetensors")["text"])


def test_pseudo_cues_that_are_rejected_now_leave_the_cache(copied, performers, tmp_path):
    root = shutil.copytree(performers, tmp_path / "pseudo")
    cached = lambda: [n for n in load_file(copied / "cache" / "dance_000000.safetensors") if n.startswith("pseudo")]  # noqa: E731
    assert add(copied, root)[0] == 0 and len(cached()) == 2
    assert add(copied, root, "--min-pose", 1)[0] == 0 and not cached()


def test_sharpness_is_judged_where_the_person_or_the_face_is_seen():
    """Frames that are rejected, or show no face, do not blur the verdict."""
    frames, track = tracked(toy.render(1, 1, frames=8, size=64))
    for kind in ("body", "face"):
        seen = np.arange(8) < 3
        track.accepted, track.face_boxes = seen, np.where(seen[:, None], [20.0, 5.0, 40.0, 25.0], np.nan)
        few = prepare.sharpness(frames[:3] + [np.zeros_like(frames[0])] * 5, track, kind)
        assert few == prepare.sharpness(frames, track, kind) > 0
    track.face_boxes = np.full((8, 4), np.nan)
    assert np.isnan(prepare.sharpness(frames, track, "face"))


def test_one_program_at_a_time_works_on_a_data_folder(copied):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('mine', flush=True); input()"
    command = [sys.executable, "-c", code, copied / ".lock-0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="another data.py works there"):
            prepare.hold(copied, 0)
        assert prepare.hold(copied, 1), "another rank of the same program"
        other.communicate("\n")
    assert prepare.hold(copied, 0)
