"""What the network eats: mask pooling, padding, cue encoding, training samples."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

import cues
import data
import toy
from data import encode_cues, encode_image, image_condition, padded, pool_masks, to_tensor
from vae import VAE_PRESETS, CausalVAE

from conftest import ROOT


@pytest.mark.parametrize("n", range(1, 20))
def test_padding_mirrors_the_end_to_8k_plus_1(n):
    """Against a loop that walks back and forth; catches a repeated end frame and a wrong count."""
    frames, expected, place, way = list(range(n)), list(range(n)), n - 1, -1
    while len(expected) % 8 != 1:
        if not 0 <= place + way < n:
            way = -way
        place += way
        expected.append(frames[place])
    assert list(padded(iter(frames))) == expected


@pytest.mark.parametrize(
    "T, groups", [(1, [[0]]), (9, [[0], [1, 2, 3, 4], [5, 6, 7, 8]]), (8, [[0, 1, 2, 3], [4, 5, 6, 7]])]
)
def test_masks_are_pooled_over_their_own_frames_and_cells(T, groups):
    """Loop oracle, float64; catches trilinear sampling, and frames that go to the wrong latent."""
    masks = np.random.default_rng(0).random((T, 1, 24, 40))
    pooled = pool_masks(torch.from_numpy(masks))
    assert pooled.shape == (len(groups), 1, 3, 5)
    for k, group in enumerate(groups):
        for i in range(3):
            for j in range(5):
                cell = [
                    masks[t, 0, y, x] for t in group for y in range(8 * i, 8 * i + 8) for x in range(8 * j, 8 * j + 8)
                ]
                assert pooled[k, 0, i, j].item() == pytest.approx(sum(cell) / len(cell), rel=1e-12)


def rows(T, H=24, W=40, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(T):
        yield (
            *(rng.uniform(-1, 1, (3, H, W)).astype(np.float32) for _ in range(2)),
            *(rng.random((1, H, W)).astype(np.float32) for _ in range(2)),
        )


def test_encoded_cues_equal_encoding_the_whole_clip():
    """Streamed in chunks, pose and face side by side; catches streams that run out of step and a forgotten scale."""
    vae = CausalVAE(VAE_PRESETS["tiny"]).eval()
    pose, face = encode_cues(vae, rows(17), "cpu", 0.7)
    assert pose.shape == face.shape == (1, 5, 17, 3, 5)
    parts = [torch.from_numpy(np.stack(part)) for part in zip(*rows(17))]
    with torch.no_grad():
        for cue, picture, mask in ((pose, parts[0], parts[2]), (face, parts[1], parts[3])):
            assert torch.allclose(cue[0, :, :16], 0.7 * vae.encode(picture[None])[0][0], atol=1e-6)
            assert torch.allclose(cue[0, :, 16:], pool_masks(mask), atol=1e-6)


def test_image_condition_is_unscaled_and_only_in_slot_0():
    image = torch.randn(2, 16, 3, 5)
    condition = image_condition(image, 4)
    assert torch.equal(condition[:, 0], image) and not condition[:, 1:].any()
    vae = CausalVAE(VAE_PRESETS["tiny"]).eval()
    picture = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encode_image(vae, picture), vae.encode(picture[:, None])[0][:, 0])


def test_draws_depend_on_their_key_alone():
    assert data.keyed(1, 2, 3).random() == data.keyed(1, 2, 3).random() != data.keyed(1, 2, 4).random()
    assert data.keyed(1, 2).random() != data.keyed(1, 2, 0).random(), "numpy pads keys with zeros"


def test_blank_runs_are_short_and_rare():
    """At most 15 % of a clip and in about 3 clips of 10, over 1000 clips."""
    drops = [data.blank_runs(49, data.keyed(k)) for k in range(1000)]
    assert max(d.mean() for d in drops) <= 0.15
    assert 0.25 < np.mean([d.any() for d in drops]) < 0.35


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_keeps_order_and_passes_errors_on(workers):
    """With processes too the words of an error are its own, without DataLoader's traceback in them."""
    assert list(data.prefetched(lambda n: n * n, 5, workers)) == [0, 1, 4, 9, 16]

    def broken(n):
        if n == 1:
            raise ValueError("bad clip")
        return n

    items = data.prefetched(broken, 5, workers)
    assert next(items) == 0
    with pytest.raises(ValueError, match="^bad clip$"):
        list(items)


def test_most_pieces_that_a_vae_learns_from_show_the_person():
    """A person of a few pixels in a corner: 3 of 4 pieces show some of her, and none leaves the clip."""
    body = np.zeros((33, 96, 96), bool)
    body[:, 88:96, :6] = True
    corners = [data.Pictures.corner(body, 9, 48, np.random.default_rng(seed)) for seed in range(400)]
    assert all(0 <= t <= 24 and 0 <= y <= 48 and 0 <= x <= 48 for t, y, x in corners)
    shown = np.mean([body[t, y : y + 48, x : x + 48].any() for t, y, x in corners])
    assert 0.68 < shown < 0.85
    empty = np.zeros_like(body)  # nobody there: anywhere
    assert len({data.Pictures.corner(empty, 9, 48, np.random.default_rng(seed)) for seed in range(20)}) > 10


@pytest.mark.slow
def test_workers_that_draw_end_when_their_program_is_killed(tmp_path):
    """kill -9 while clips are drawn: within seconds its process group is empty; what is there is whole."""
    command = [sys.executable, "data.py", "toy", "-o", str(tmp_path), "--clips", "1000"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("cache/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_folder_of_drawn_clips_keeps_its_settings(tmp_path, capsys):
    """Other flags on a folder that has clips are refused: the cached ones would silently stay; so is a count of 0."""
    words = [
        "toy",
        "-o",
        str(tmp_path),
        "--clips",
        "1",
        "--held-out",
        "1",
        "--variants",
        "1",
        "--refs",
        "1",
        "--workers",
        "1",
    ]
    data.main(words)
    assert len((tmp_path / "clips.jsonl").read_text().splitlines()) == 2
    for flags, message in (
        (["--pose-cue", "skeleton"], f"{tmp_path} has --pose-cue lowpass, not skeleton: take another -o"),
        (["--workers", "0"], "--workers: 0: give a whole number, 1 or more"),
    ):
        with pytest.raises(SystemExit) as end:
            data.main(words + flags)
        assert end.value.code == 2 and message in capsys.readouterr().err
    before = (tmp_path / "clips.jsonl").read_text()
    ids = [(line["id"], line["split"]) for line in map(json.loads, before.splitlines())]
    assert ids == [("000000", "train"), ("1000000", "test")]
    (tmp_path / "clips.jsonl").write_text(before + "{\n")  # damaged, and of a killed run that had drawn more
    shutil.copy(tmp_path / "cache/000000.safetensors", tmp_path / "cache/000001.safetensors")
    data.main(words)
    assert len((tmp_path / "clips.jsonl").read_text().splitlines()) == 3, "asked for fewer, a folder keeps what it has"
    (tmp_path / "clips.jsonl").write_text(before + "{\n")
    with pytest.raises(ValueError, match="clips.jsonl, line 3: no clip"):
        data.read_lines(tmp_path / "clips.jsonl")


def test_a_skeleton_and_a_vae_are_asked_for(tmp_path, capsys):
    for flags, message in (
        (["--joint-noise", "3"], "--joint-noise 3 is of skeletons"),
        (["--joint-noise", "-1", "--pose-cue", "skeleton"], "--joint-noise: -1: give a number, 0 or more"),
        (["--vae", str(data.ASSETS / "toy.safetensors")], "holds a DiT, give a VAE's weights"),
    ):
        with pytest.raises(SystemExit) as end:
            data.main(["toy", "-o", str(tmp_path / "d"), *flags])
        assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_a_folder_of_another_vae_is_named_even_if_it_does_not_say_which(tmp_path):
    """Folders that were made before the VAE was remembered."""
    (tmp_path / "toy.json").write_text('{"variants": 1}')
    with pytest.raises(ValueError, match="has --vae None, not toy-vae"):
        data.remember(tmp_path / "toy.json", argparse.Namespace(variants=1, vae="toy-vae"), ("variants", "vae"))


@pytest.mark.parametrize("ref_slot", ["reference", "copy"])
def test_a_window_reads_the_reference_and_its_own_part_of_the_cues(ref_slot):
    """Slot by slot: latents and condition side by side; the cues of slot 0 are the reference's, or the window's first."""
    B, f, n, start = 2, 7, 3, 2
    latents, image = torch.randn(B, n + 1, 16, 4, 4), torch.randn(B, 16, 4, 4)
    pose, face = torch.randn(2, B, 1 + f, 17, 4, 4)
    x, *cue_streams = data.window_inputs(latents, start, image, pose, face, ref_slot)
    for b in range(B):
        for slot in range(n + 1):
            condition = image[b] if slot == 0 else torch.zeros(16, 4, 4)
            assert torch.equal(x[b, slot], torch.cat([latents[b, slot], condition]))
            source = slot + start if slot else {"reference": 0, "copy": start + 1}[ref_slot]
            assert torch.equal(cue_streams[0][b, slot], pose[b, source])
            assert torch.equal(cue_streams[1][b, slot], face[b, source])


def test_pictures_are_clamped_and_rounded():
    """Decoded pixels overshoot: uint8 would wrap white to black; cut off, a picture would darken by half a level."""
    video = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.3, 99.6 / 127.5 - 1]).view(1, 1, 6).expand(3, 1, 6)
    assert data.to_picture(video)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 100]
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(data.to_picture(to_tensor(every)), every)


def test_references_are_cached_clean_and_noisy_each_with_its_own_cues():
    """The clip's own cues are never misaligned, whatever the strength for pseudo ones."""
    clip, vae = toy.render(1, 1, frames=9, size=32), CausalVAE(VAE_PRESETS["tiny"]).eval()
    track = cues.analyse(clip.video, clip.video[0], data.toy_finder(clip), data.OWN_PLACE)
    own = (clip.video, track), (clip.video, track)
    found = data.encode_clip(vae, clip.video, own, [], torch.zeros(1, 4), (0,), 2, 3, misalign=1.0)
    frame = found["ref_frame"].numpy()
    pose, face = (np.stack(part) for part in list(zip(*cues.render(*own[0], options=data.OWN_PLACE)))[:2])
    one = lambda pictures: data.encode_means(vae, torch.as_tensor(pictures)[:, None])[:, 0]  # noqa: E731
    assert len(frame) == 3 and frame.max() > 2
    assert torch.equal(found["ref_clean"], one(to_tensor(clip.video[frame])))
    assert torch.equal(found["ref_pose"], one(pose[frame])) and torch.equal(found["ref_face"], one(face[frame]))
    apart = (found["ref_noisy"].float() - found["ref_clean"]).abs().flatten(1).mean(1)
    assert (apart > 0.001).all() and (apart < found["ref_clean"].float().abs().mean()).all()
    assert torch.equal(found["pose"][0], data.encode_means(vae, pose[None])[0])


def test_failed_pseudo_drivers_show_another_motion_and_good_ones_the_clips():
    ask = lambda faults, people=None: data.toy_pseudo(  # noqa: E731
        3, Namespace(pseudo_faults=faults, pseudo_people=people), data.keyed(0)
    )
    drawn = lambda who, what: toy.render(who, what, frames=data.TOY_FRAMES, size=data.TOY_SIZE).video  # noqa: E731
    assert np.array_equal(ask(0.0).video, drawn(500_003, 3))
    assert np.array_equal(ask(1.0).video, drawn(500_003, 700_003))
    assert np.array_equal(ask(0.0, people=2).video, drawn(500_001, 3))


def test_joint_noise_moves_the_skeleton_by_so_many_pixels(monkeypatch):
    clip, drawn = toy.render(1, 2, frames=9, size=data.TOY_SIZE), []
    monkeypatch.setattr(
        toy, "draw_skeleton", lambda joints, *_: drawn.append(joints) or np.zeros((96, 96, 3), np.uint8)
    )
    for noise in (0.0, 3.0):
        data.toy_pair(clip, Namespace(pose_cue="skeleton", joint_noise=noise), data.keyed(0))
    assert np.array_equal(drawn[:9], clip.joints)
    assert np.std(np.array(drawn[9:]) - clip.joints) == pytest.approx(3, rel=0.1)


def test_a_cache_that_is_cut_off_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "0.safetensors"
    data.save_cache({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def torn(tensors, where):
        where.write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        data.save_cache({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_text_may_have_any_ending(tmp_path):
    """`-o REPORT.JSON` passes the check at the start, so it must be written at the end."""
    for name in ("REPORT.JSON", "config.json", "notes"):
        data.write_text(tmp_path / name, "{}")
        assert (tmp_path / name).read_text() == "{}"


def test_cue_variants_have_a_cut_off_and_blank_runs_of_their_own(monkeypatch):
    """Variant 0 is plain; a pseudo Pose Cue is moved as strongly as its folder says."""
    clip, asked = toy.render(1, 1, frames=33, size=32), []
    track = cues.analyse(clip.video, clip.video[0], data.toy_finder(clip), data.OWN_PLACE)
    row = (np.zeros((3, 8, 8), np.float32),) * 2 + (np.zeros((1, 8, 8), np.float32),) * 2
    monkeypatch.setattr(
        cues,
        "render",
        lambda *_, options, drop=None, misalign=None: asked.append((options.cutoff, drop)) or iter([row]),
    )
    pair = ((clip.video, track),) * 2
    for k in range(20):
        data.cue_variant(*[pair[0]] * 2, k, data.keyed(k), 0, data.OWN_PLACE)
    (plain, drop), *others = asked
    assert plain == data.OWN_PLACE.cutoff and drop is None
    assert len({cutoff for cutoff, _ in others}) == 19 and all(0.08 <= cutoff <= 0.2 for cutoff, _ in others)
    assert 0 < sum(drop.any() for _, drop in others) < 19


def test_the_drawn_worlds_folder_keeps_its_flags(tmp_path, monkeypatch):
    """--misalign, --variants and --refs reach the coder."""
    got = []
    monkeypatch.setattr(data, "encode_clip", lambda *_, **settings: got.append(settings) or {})
    monkeypatch.setattr(data, "save_cache", lambda *_: None)
    _, args = data.parse_args(["toy", "-o", str(tmp_path), "--misalign", "0.3", "--variants", "2", "--refs", "5"])
    data.cache_toy_clip(None, 1, args)
    assert {name: got[0][name] for name in ("misalign", "variants", "refs")} == dict(misalign=0.3, variants=2, refs=5)


def test_pieces_that_a_vae_learns_from_are_mirrored_but_never_upside_down():
    """A clip that grows brighter downwards in red, to the right in green: one of two pieces is a mirror image."""
    y, x = np.mgrid[:96, :96].astype(np.uint8)
    ramp = np.stack([y, x, 0 * x], -1)[None].repeat(33, 0)
    pictures = data.Pictures(Namespace(seed=0), clips=0)
    pictures.pool = [([ramp], np.ones((33, 96, 96), bool))]
    ways = []
    for step in range(12):
        batch = pictures.batch(step, range(2), 2)
        red, green = batch["video"][:, 0, 0], batch["video"][:, 0, 1]
        assert (red.diff(dim=1) > 0).all(), "upside down"
        ways += (green.diff(dim=2) > 0).all((1, 2)).tolist()
        f, h, w = batch["noise"].shape[1], *batch["noise"].shape[3:]
        assert batch["video"].shape[1:] == (4 * f - 3, 3, 8 * h, 8 * w)
    assert 0.25 < np.mean(ways) < 0.75
