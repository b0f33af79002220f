"""video.py: files made here with PyAV and cv2, plus the real clips in ASSETS where present.

    python -m pytest tests/test_video.py
"""
import argparse
import itertools
import os
import re
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from video import (  # noqa: E402
    Video, check_output, cover, letterbox, letterbox_box, output_size, read_image, real, resize, whole, write_image,
    write_gif, write_video)

ASSETS = Path(os.environ.get("ASSETS", ROOT.parent / "shared/assets"))
CLIPS = sorted((ASSETS / "video").glob("*.mp4"))
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 150, 120), (30, 60, 90)]


# ---- Files to read -------------------------------------------------------------------------------------------------

def flat(colour, height=48, width=64):
    return np.full((height, width, 3), colour, np.uint8)


def numbered(count, height=48, width=64):
    """Grey frames that tell their number: level 20 + 4 k."""
    return [flat(20 + 4 * k, height, width) for k in range(count)]


def noisy(count):
    """Frames of many bytes, so that a cut or a fault at random hits a picture."""
    noise = np.random.default_rng(0).integers(0, 40, (48, 64, 3))
    return [np.uint8(frame + noise) for frame in numbered(count)]


def numbers(frames):
    return [round((float(frame.mean()) - 20) / 4) for frame in frames]


def corners(height=48, width=64):
    """Top left red, top right green, bottom left blue, bottom right black."""
    image, y, x = np.zeros((height, width, 3), np.uint8), height // 2, width // 2
    image[:y, :x, 0] = image[:y, x:, 1] = image[y:, :x, 2] = 255
    return image


def corner_names(image):
    """The colours at top left, top right, bottom left, bottom right."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (0, 0, 0): "k"}
    return "".join(names[tuple(int(v > 127) for v in image[y, x])] for y in (4, -5) for x in (4, -5))


def encode(path, frames, fps=24, codec="libx264", pix_fmt="yuv420p", pts=None, rotation=None, options=None,
           aspect=None, shift=0, form=None, sound=None, late=0):
    """Write RGB arrays, or ready av.VideoFrames, with every knob that Video must cope with."""
    with av.open(str(path), "w", form, options={"movflags": "faststart"}) as sink:
        stream = sink.add_stream(codec, rate=fps, options=options or {})
        stream.pix_fmt = pix_fmt
        frames = [f if isinstance(f, av.VideoFrame) else av.VideoFrame.from_ndarray(f) for f in frames]
        stream.width, stream.height = frames[0].width, frames[0].height
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, getattr(frames[0], name))
        tone = sink.add_stream("aac", rate=44100) if sound is not None else None
        for k, frame in enumerate(frames):
            frame.pts, frame.time_base = (pts[k] if pts else k) + shift, 1 / Fraction(fps)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
        if tone:
            mux_sound(sink, tone, sound, start=Fraction(shift) / Fraction(fps) + late)
    return path


def mux_sound(sink, stream, samples, rate=44100, start=0):
    """(N,) float samples -> the stereo audio stream."""
    for k in range(0, len(samples), 1024):
        block = samples[k:k + 1024].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([block, block]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, k + round(start * rate), Fraction(1, rate)
        sink.mux(stream.encode(frame))
    sink.mux(stream.encode(None))


def sound_file(path, samples, codec="aac", rate=44100):
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".m4a" else {}) as sink:
        mux_sound(sink, sink.add_stream(codec, rate=rate), samples, rate)
    return path


def click(seconds, at, rate=44100):
    """Silence with a burst of noise of 50 ms at `at` seconds."""
    samples, burst = np.zeros(round(seconds * rate)), np.random.default_rng(0).uniform(-0.9, 0.9, rate // 20)
    samples[round(at * rate):][:len(burst)] = burst
    return samples


def heard(path):
    """(seconds of the loudest 10 ms, end of the sound in seconds) as a player hears it."""
    with av.open(str(path)) as source:
        frames = list(source.decode(audio=0))
    samples = np.concatenate([f.to_ndarray().reshape(-1, f.samples)[0] for f in frames]).astype(np.float64)
    rate = frames[0].sample_rate
    first = float(frames[0].pts * frames[0].time_base)
    loud = np.convolve(np.abs(samples), np.ones(rate // 100), "valid")
    return first + int(np.argmax(loud > 0.5 * loud.max())) / rate, first + len(samples) / rate


def packets(path, kind):
    with av.open(str(path)) as source:
        return [bytes(p) for p in source.demux(getattr(source.streams, kind)[0]) if p.size]


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


# ---- Sizes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, expected", [
    (720, 1080, (416, 624)), (512, 512, (512, 512)), (1920, 1080, (688, 384)), (10, 4000, (32, 10240)),
    (1, 9999, (16, 51200))])
def test_output_size_has_the_aspect_and_about_the_area_in_multiples_of_16(height, width, expected):
    """Catches swapped sides, and a side rounded to 0 for extreme pictures."""
    assert output_size(height, width) == expected


def test_output_size_takes_another_area_and_multiple():
    """Catches a constant used in place of either argument."""
    assert output_size(100, 200, area=5000, multiple=10) == (50, 100)


def test_resize_down_is_the_exact_mean_of_the_pixels_covered():
    """Catches bilinear shrinking, which skips pixels and shimmers over time."""
    image = np.random.default_rng(0).random((24, 40, 3)).astype(np.float32)
    np.testing.assert_allclose(resize(image, 8, 8), image.reshape(8, 3, 8, 5, 3).mean((1, 3)), atol=1e-6)


def test_resize_averages_the_side_that_shrinks_while_the_other_grows():
    """Catches INTER_AREA called once: it interpolates when one side grows, and stripes alias."""
    stripes = np.tile(np.array([0, 255], np.uint8), (10, 32))
    assert np.abs(resize(stripes, 30, 16).astype(int) - 127.5).max() <= 0.5


def test_resize_up_interpolates_and_passes_through_the_pixel_centres():
    """Catches nearest or area enlargement, which shows as blocks: a ramp must stay a ramp."""
    ramp = np.tile(np.arange(16, dtype=np.float32), (6, 1))
    expected = (np.arange(48) + 0.5) / 3 - 0.5
    np.testing.assert_allclose(resize(ramp, 18, 48)[9, 6:-6], expected[6:-6], atol=0.05)     # cv2: a = -0.75


@pytest.mark.parametrize("shape", [(24, 40), (24, 40, 1), (24, 40, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("function", [resize, letterbox, cover])
def test_resizers_keep_channels_and_dtype(function, shape, dtype):
    """Catches cv2 dropping a last axis of 1."""
    result = function(np.ones(shape, dtype), 30, 36)
    assert result.shape == (30, 36, *shape[2:]) and result.dtype == dtype and result.flags.c_contiguous


@pytest.mark.parametrize("source, target", [
    ((90, 60), (48, 80)), ((37, 91), (64, 64)), ((30, 50), (100, 260)), ((24, 40), (24, 40)),
    ((301, 70), (50, 40))])
def test_letterbox_box_maps_source_coordinates_to_where_letterbox_draws_them(source, target):
    """Catches half-pixel shifts, and scales taken before rounding: a box's mass and centroid obey the map."""
    (h, w), (height, width) = source, target
    image = np.zeros((h, w), np.float64)
    y1, y2, x1, x2 = h // 3, h - h // 6, w // 7, w // 2 + 1         # edges: the box is [x1, x2) x [y1, y2)
    image[y1:y2, x1:x2] = 1
    scale_x, scale_y, x0, y0 = letterbox_box(h, w, height, width)
    canvas = letterbox(image, height, width)
    ys, xs = np.mgrid[:height, :width] + 0.5
    mass = canvas.sum()
    assert mass == pytest.approx((x2 - x1) * (y2 - y1) * scale_x * scale_y, rel=0.02)
    assert (canvas * xs).sum() / mass == pytest.approx(scale_x * (x1 + x2) / 2 + x0, abs=0.06)
    assert (canvas * ys).sum() / mass == pytest.approx(scale_y * (y1 + y2) / 2 + y0, abs=0.06)


def test_letterbox_is_centred_between_black_bars_and_keeps_the_aspect():
    """Catches stretching, and bars that are not black or not even."""
    boxed = letterbox(flat((255, 255, 255), 20, 60), 100, 120)
    assert boxed[30:70].min() == 255 and boxed[:30].max() == 0 and boxed[70:].max() == 0


@pytest.mark.parametrize("height, width", [(40, 200), (200, 40), (30, 60), (301, 203)])
def test_cover_fills_all_keeps_the_aspect_and_the_centre(height, width):
    """Catches bars left by rounding, stretching, and an off-centre crop: a disc stays round and central."""
    ys, xs = np.mgrid[:100, :150]
    image = np.where((xs - 74.5) ** 2 + (ys - 49.5) ** 2 < 80, 255, 60).astype(np.uint8)
    covered = cover(image, height, width)
    assert covered.shape == (height, width) and covered.min() > 0
    y, x = np.nonzero(covered > 158)
    assert abs(y.mean() - (height - 1) / 2) <= 0.75 and abs(x.mean() - (width - 1) / 2) <= 0.75
    assert np.ptp(x) == pytest.approx(np.ptp(y), abs=2)


# ---- Reading video -------------------------------------------------------------------------------------------------

def test_video_yields_every_frame_once_in_display_order_each_time_it_is_iterated(tmp_path):
    """Catches decode order (B-frames), frames lost in the decoder at the end, and one-shot generators."""
    clip = Video(encode(tmp_path / "a.mp4", numbered(50), options={"bf": "3"}))
    assert numbers(clip) == numbers(clip) == list(range(50)) and clip.frames == 50
    assert (clip.fps, clip.height, clip.width, clip.has_audio) == (24, 48, 64, False)
    frame = next(iter(clip))
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
    assert frame.flags.c_contiguous and frame.flags.writeable


@pytest.mark.parametrize("clip", CLIPS or [None], ids=lambda clip: clip and clip.stem)
def test_every_frame_of_a_real_clip_is_counted_and_decoded(clip):
    """Catches frames lost or doubled on files we did not write; cv2 counts independently."""
    if clip is None:
        pytest.skip(f"no clips in {ASSETS}; set ASSETS to run this")
    ours, capture = Video(clip), cv2.VideoCapture(str(clip))
    count = round(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if ours.height * ours.width < 1e6:                              # larger ones: 10 s for all
        count = sum(1 for _ in iter(capture.grab, False))
    assert ours.frames == count and sum(1 for _ in ours._decode()) == count     # without the cost of RGB
    assert ours.width == capture.get(cv2.CAP_PROP_FRAME_WIDTH)
    assert ours.height == capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    assert float(ours.fps) == pytest.approx(capture.get(cv2.CAP_PROP_FPS), abs=1e-3)


def test_frames_of_a_real_clip_equal_what_cv2_decodes():
    """Catches a wrong order, matrix or channel order on a file we did not write."""
    clip = ASSETS / "video/liveportrait_d18.mp4"
    if not clip.exists():
        pytest.skip(f"no clips in {ASSETS}; set ASSETS to run this")
    capture = cv2.VideoCapture(str(clip))
    for frame in itertools.islice(Video(clip), 60):
        assert np.abs(capture.read()[1][..., ::-1].astype(int) - frame).mean() < 1.5


@pytest.mark.parametrize("rotation, names", [(0, "rgbk"), (90, "gkrb"), (180, "kbgr"), (270, "brkg")])
def test_video_is_upright_and_swaps_its_sides_as_the_display_matrix_says(tmp_path, rotation, names):
    """Catches phone clips lying on their side, or turned the wrong way round (90 is counter-clockwise)."""
    path = encode(tmp_path / "a.mp4", [corners()] * 3, rotation=rotation, options={"crf": "1"})
    clip, by_cv2 = Video(path), cv2.VideoCapture(str(path)).read()[1][..., ::-1]
    frames = list(clip)
    assert [corner_names(f) for f in frames] == [names] * 3
    assert frames[0].shape[:2] == (clip.height, clip.width) == ((64, 48) if rotation % 180 else (48, 64))
    assert corner_names(by_cv2) == names


def test_pixels_that_are_not_square_are_made_square_and_nearly_square_ones_left_alone(tmp_path):
    """Catches people squeezed by anamorphic clips, and a needless blur for an aspect of 404:405."""
    wide = Video(encode(tmp_path / "a.mp4", numbered(2), aspect=Fraction(3, 2)))
    assert (wide.height, wide.width) == (48, 96) == next(iter(wide)).shape[:2]
    turned = Video(encode(tmp_path / "b.mp4", numbered(2), aspect=Fraction(3, 2), rotation=90))
    assert (turned.height, turned.width) == (96, 48) == next(iter(turned)).shape[:2]
    near = Video(encode(tmp_path / "c.mp4", numbered(2, 48, 404), aspect=Fraction(404, 405)))
    assert (near.height, near.width) == (48, 404)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_plays_at_frames_over_duration(tmp_path, suffix):
    """Catches a nominal rate taken from the header: sound would drift away from the picture."""
    pts = [0, 1, 2, 3, 10, 20, 21, 22, 40, 41]                      # of 1/24 s; 9 steps in 41/24 s
    clip = Video(encode(tmp_path / f"a.{suffix}", numbered(10), pts=pts, options={"bf": "0"}))
    assert float(clip.fps) == pytest.approx(9 * 24 / 41, rel=0.06) and numbers(clip) == list(range(10))


@pytest.mark.parametrize("name, fps", [
    ("a.mp4", Fraction(24000, 1001)), ("a.mkv", Fraction(24000, 1001)), ("a.mkv", 8), ("a.avi", 15),
    ("a.mov", 50), ("a.ts", 25), ("a.webm", 24)])
def test_fps_is_exact_whatever_the_container_rounds(tmp_path, name, fps):
    """Catches rates computed from timestamps that mkv rounds to 1 ms."""
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    clip = Video(encode(tmp_path / name, numbered(40), fps=fps, codec=codec))
    assert clip.fps == fps and clip.frames == 40 and numbers(clip) == list(range(40))


def test_parts_joined_byte_by_byte_keep_their_rate_and_end_no_job(tmp_path):
    """`cat a.vob a.vob`: each part starts its clock anew. Catches double speed, and an error of the muxer after hours."""
    part = encode(tmp_path / "a.vob", numbered(25), fps=25, codec="mpeg2video", form="vob").read_bytes()
    (tmp_path / "b.vob").write_bytes(part + part)
    clip = Video(tmp_path / "b.vob")
    assert clip.fps == 25 and clip.frames == 50 and numbers(clip) == [*range(25)] * 2
    sound = sound_file(tmp_path / "a.ts", click(1, 0.5)).read_bytes()
    (tmp_path / "b.ts").write_bytes(sound + sound)
    write_video(tmp_path / "c.mp4", clip, 25, audio=tmp_path / "b.ts")
    assert Video(tmp_path / "c.mp4").frames == 50 and heard(tmp_path / "c.mp4")[1] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rate, fps, expected", [
    (24, 8, list(range(0, 20, 3))), (24, 24, list(range(20))),
    (24, 16, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 19]),
    (8, 24, [k // 3 + (k % 3 == 2) for k in range(58)] + [19, 19])])
def test_fps_picks_the_frame_nearest_in_time(tmp_path, rate, fps, expected):
    """Catches drift from rounding a stride (24 to 16 is 1.5), and a last frame lost or added."""
    clip = Video(encode(tmp_path / "a.mp4", numbered(20), fps=rate), fps=fps)
    assert numbers(clip) == expected and clip.frames == len(expected) and clip.fps == fps


def test_fps_picks_by_timestamp_where_durations_vary(tmp_path):
    """Catches picking by index, which plays a held frame too fast."""
    pts = [0, 1, 2, 3, 4, 16, 17, 18, 19, 20]
    clip = Video(encode(tmp_path / "a.mp4", numbered(10), pts=pts, options={"bf": "0"}), fps=6)
    assert numbers(clip)[:6] == [0, 4, 4, 5, 5, 9]                  # at 0, 4, 8, 12, 16, 20 ticks


def test_a_clip_of_one_frame_has_a_rate(tmp_path):
    """Catches a division by the 0 steps between 1 frame."""
    for suffix in ("mp4", "mkv"):
        clip = Video(encode(tmp_path / f"a.{suffix}", numbered(1), fps=15))
        assert numbers(clip) == [0] and clip.frames == 1 and clip.fps == 15
    assert numbers(Video(tmp_path / "a.mp4", fps=30)) == [0, 0]


@pytest.mark.parametrize("matrix, kr, kb", [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (2, 0.299, 0.114)],
                         ids=["bt709", "bt601", "untagged"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_decode_by_the_streams_own_matrix_and_range(tmp_path, matrix, kr, kb, full):
    """Catches one matrix for all clips: skin off by 10 levels; oracle: the standards' equations in floats."""
    frames = []
    for r, g, b in np.array(COLOURS) / 255:
        y = kr * r + (1 - kr - kb) * g + kb * b
        planes = np.array([y, (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)])
        levels = planes * 255 + [0, 128, 128] if full else planes * [219, 224, 224] + [16, 128, 128]
        levels = np.clip(np.round(levels), 0, 255).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(np.repeat(levels, [48, 12, 12])[:, None].repeat(64, 1), "yuv420p")
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        frames.append(frame)
    clip = Video(encode(tmp_path / "a.mp4", frames, options={"crf": "0", "bf": "0"}))
    for frame, colour in zip(clip, COLOURS, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 3


def test_video_with_alpha_comes_over_white(tmp_path):
    """Catches the hidden colours of transparent pixels in cut-outs."""
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :20], rgba[:, 20:40, 3] = (255, 0, 0, 255), 128
    clip = encode(tmp_path / "a.mov", [av.VideoFrame.from_ndarray(rgba, "rgba")], codec="png", pix_fmt="rgba")
    assert next(iter(Video(clip)))[24, [5, 30, 60]].tolist() == [[255, 0, 0], [127] * 3, [255] * 3]


def test_odd_sizes_are_read(tmp_path):
    """Catches an assumption of even sides when reading."""
    clip = Video(encode(tmp_path / "a.mkv", numbered(3, 49, 65), codec="ffv1", pix_fmt="yuv444p"))
    assert numbers(clip) == [0, 1, 2] and (clip.height, clip.width) == (49, 65) == next(iter(clip)).shape[:2]


def test_a_stream_that_changes_its_size_midway_keeps_the_first_size(tmp_path):
    """Catches frames of two sizes, as browsers record them, breaking the consumer."""
    with av.open(str(tmp_path / "a.mkv"), "w") as sink:
        stream = sink.add_stream("mjpeg", rate=10)
        stream.pix_fmt, stream.width, stream.height = "yuvj420p", 64, 48
        sink.start_encoding()
        for k, image in enumerate([corners(), corners(24, 32)]):
            packet = av.Packet(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())
            packet.pts = packet.dts = k
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), True
            sink.mux(packet)
    assert [(f.shape, corner_names(f)) for f in Video(tmp_path / "a.mkv")] == [((48, 64, 3), "rgbk")] * 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to list open files")
def test_the_file_is_closed_when_the_consumer_stops_early(tmp_path):
    """Catches file handles kept by abandoned iterations: `prepare` would run out of them."""
    path = encode(tmp_path / "a.mp4", numbered(30))
    for frame in Video(path, fps=12):
        break
    frames = iter(Video(path))
    next(frames), frames.close()
    links = [Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd")]
    assert str(path) not in [os.readlink(link) for link in links if link.is_symlink()]


def test_names_with_a_colon_and_metadata_in_latin_1_open(tmp_path, monkeypatch):
    """Catches ffmpeg reading "a:" as a protocol, and a UnicodeDecodeError from a title."""
    monkeypatch.chdir(tmp_path)
    with av.open("file:a:b.mkv", "w", "matroska") as sink:
        sink.metadata["title"] = "CAFE"
        stream = sink.add_stream("ffv1", rate=10)
        stream.width, stream.height = 64, 48
        sink.mux(stream.encode(av.VideoFrame.from_ndarray(flat((9, 9, 9)))))
        sink.mux(stream.encode(None))
    Path("a:b.mkv").write_bytes(Path("a:b.mkv").read_bytes().replace(b"CAFE", b"CAF\xe9"))
    assert Video("a:b.mkv").frames == 1


# ---- Folders -------------------------------------------------------------------------------------------------------

def test_a_folder_streams_its_pictures_in_natural_order(tmp_path):
    """Catches 10 before 2, and stray files taken for frames."""
    for k in (10, 2, 1):
        write_image(tmp_path / f"frame{k}.{'jpg' if k == 2 else 'png'}", flat(20 + 4 * k))
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._frame3.png").write_bytes(b"a Mac's shadow file")
    folder = Video(tmp_path, fps=12)
    assert numbers(folder) == numbers(folder) == [1, 2, 10]
    assert (folder.frames, folder.fps, folder.has_audio) == (3, 12, False)
    assert (folder.height, folder.width) == (48, 64)
    assert Video(tmp_path).fps == 25


def test_a_folder_of_two_sizes_is_refused_at_the_odd_frame(tmp_path):
    """Catches a crash deep in the consumer; the sentence names the file."""
    write_image(tmp_path / "1.png", flat(0)), write_image(tmp_path / "2.png", flat(0, 32, 64))
    with pytest.raises(ValueError) as error:
        list(Video(tmp_path))
    one_sentence(error, "2.png", "64x32", "64x48")


# ---- Mistakes and faults -------------------------------------------------------------------------------------------

def test_what_is_not_a_video_is_refused_in_one_sentence(tmp_path):
    """Catches tracebacks, and texts that name neither the file nor what to give."""
    write_image(tmp_path / "picture.png", flat(0))
    (tmp_path / "renamed.mp4").write_bytes((tmp_path / "picture.png").read_bytes())
    [(tmp_path / name).write_text("this is a text\n" * 50) for name in ("text.mp4", "text.txt")]
    (tmp_path / "empty.mp4").touch(), (tmp_path / "empty").mkdir()
    whole = encode(tmp_path / "clip.mp4", numbered(20)).read_bytes()
    (tmp_path / "headless.mp4").write_bytes(whole.replace(b"moov", b"xxxx"))
    (tmp_path / "photo.heic").write_bytes(whole)
    sound_file(tmp_path / "song.m4a", click(0.5, 0.1))
    for name, part in [("picture.png", "single picture"), ("renamed.mp4", "single picture"),
                       ("photo.heic", "single picture"), ("text.mp4", "cannot be opened"),
                       ("text.txt", "no pictures"), ("empty.mp4", "cannot be opened"),
                       ("headless.mp4", "cannot be opened"), ("song.m4a", "no pictures"),
                       ("empty", "no PNG or JPG frames"), ("missing", "not exist"),
                       ("clip.mp5", "did you mean clip.mp4?")]:
        with pytest.raises(FileNotFoundError if name in ("missing", "clip.mp5") else ValueError) as error:
            Video(tmp_path / name)
        one_sentence(error, name, part)


@pytest.mark.parametrize("fps", [0, -3, float("nan")])
def test_a_rate_that_leaves_no_frame_is_refused_at_once(tmp_path, fps):
    """Catches an empty stream found out only after an hour of work."""
    with pytest.raises(ValueError) as error:
        Video(encode(tmp_path / "a.mp4", numbered(9)), fps=fps)
    one_sentence(error, f"fps={fps}")


@pytest.mark.parametrize("codec", ["libx264", "mjpeg"])
@pytest.mark.parametrize("place", [10, 20.5, 38.5])
def test_a_truncated_mp4_yields_its_whole_frames_then_says_how_many(tmp_path, codec, place):
    """Catches a short clip taken for whole, a half-grey last frame, and whole frames lost in the decoder."""
    pix_fmt, options = ("yuvj420p", {}) if codec == "mjpeg" else ("yuv420p", {"crf": "1"})
    path = encode(tmp_path / "a.mp4", noisy(40), codec=codec, pix_fmt=pix_fmt, options=options)
    whole = list(Video(path))
    with av.open(str(path)) as container:
        ends = [entry.pos + entry.size for entry in container.streams.video[0].index_entries]
    cut = round(np.interp(place, np.arange(1, 41), ends))           # place 10: just after the 10th packet
    path.write_bytes(path.read_bytes()[:cut])
    clip, seen = Video(path), []
    with pytest.raises(ValueError) as error:
        seen.extend(iter(clip))
    one_sentence(error, "a.mp4 is truncated", f" {int(place)} of 40 frames decode")
    assert len(seen) == clip.frames == int(place) and clip.fps == 24
    assert all(any(np.array_equal(a, b) for b in whole) for a in seen)
    assert len(list(itertools.islice(Video(path), 5))) == 5         # what was asked for is whole


@pytest.mark.parametrize("damage", [
    bytes(600), np.random.default_rng(0).bytes(600), np.random.default_rng(0).bytes(4)],
    ids=["zeros", "noise", "concealed by the decoder"])
def test_corrupt_packets_end_the_stream_and_say_where(tmp_path, damage):
    """Catches frames that the decoder patched up being taken for the driver's motion."""
    path = encode(tmp_path / "a.mp4", noisy(40), options={"crf": "1", "g": "10"})
    whole, data, seen = list(Video(path)), bytearray(path.read_bytes()), []
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle:middle + len(damage)] = damage
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        seen.extend(iter(Video(path)))
    one_sentence(error, "a.mp4 is corrupt", f"{len(seen)} of 40 frames decode")
    assert 5 < len(seen) < 35 and all(np.array_equal(a, b) for a, b in zip(seen, whole))


def test_a_container_that_breaks_off_is_corrupt_too(tmp_path):
    """Catches ffmpeg's own error leaving `Video` when the fault is met while packets are counted."""
    path, seen = encode(tmp_path / "a.y4m", numbered(9), codec="wrapped_avframe"), []
    path.write_bytes(b"FRAME".join(path.read_bytes().split(b"FRAME")[:6]) + b"FRUME" + bytes(9000))
    with pytest.raises(ValueError) as error:
        seen.extend(iter(Video(path)))
    one_sentence(error, f"a.y4m is corrupt: {len(seen)} of")
    assert 0 < len(seen) <= 5


def test_ffmpeg_writes_nothing_to_stderr(tmp_path, capfd):
    """Catches decoder and x264 chatter drowning the one sentence for the user."""
    data = encode(tmp_path / "a.mp4", numbered(40)).read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[:len(data) * 3 // 4] + bytes(50))
    with pytest.raises(ValueError):
        list(Video(tmp_path / "a.mp4"))
    write_video(tmp_path / "b.mp4", numbered(3), 24)
    assert capfd.readouterr() == ("", "")


# ---- Pictures ------------------------------------------------------------------------------------------------------

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif(orientation):
    return b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation]) + bytes(7)


def png(rgba, orientation=1):
    data = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    return data[:33] + chunk(b"eXIf", exif(orientation)) + data[33:]


@pytest.mark.parametrize("orientation, names", [
    (1, "rgbk"), (2, "grkb"), (3, "kbgr"), (6, "brkg"), (8, "gkrb")])
def test_jpeg_is_upright_by_its_exif_orientation(tmp_path, orientation, names):
    """Catches phone portraits lying on their side."""
    data, tag = cv2.imencode(".jpg", corners()[..., ::-1])[1].tobytes(), b"Exif\0\0" + exif(orientation)
    block = b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag
    (tmp_path / "a.jpg").write_bytes(data[:2] + block + data[2:])
    image = read_image(tmp_path / "a.jpg")
    assert corner_names(image) == names and image.shape == ((64, 48, 3) if orientation > 4 else (48, 64, 3))


@pytest.mark.parametrize("orientation, names", [(1, "rgbk"), (3, "kbgr"), (6, "brkg"), (8, "gkrb")])
def test_png_with_alpha_is_upright_too(tmp_path, orientation, names):
    """Catches cv2 ignoring the orientation whenever it keeps the alpha."""
    rgba = np.dstack([corners(), np.full((48, 64), 254, np.uint8)])
    (tmp_path / "a.png").write_bytes(png(rgba, orientation))
    assert corner_names(read_image(tmp_path / "a.png")) == names


def test_transparent_pixels_come_over_white(tmp_path):
    """Catches the black that cut-outs hide under alpha 0 becoming the reference's background."""
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0], rgba[:, 1, 3] = (10, 200, 30, 255), 128
    (tmp_path / "a.png").write_bytes(png(rgba))
    assert read_image(tmp_path / "a.png")[0].tolist() == [[10, 200, 30], [127, 127, 127], [255, 255, 255]]
    blocks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 8, 3, 0, 0, 0)),
              (b"PLTE", bytes([255, 0, 0, 0, 255, 0])), (b"tRNS", bytes([0])),
              (b"IDAT", zlib.compress(bytes([0, 0, 1, 0, 1]))), (b"IEND", b"")]
    palette = b"".join(chunk(*block) for block in blocks)           # red (transparent), green
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + palette)
    assert read_image(tmp_path / "b.png")[0].tolist() == [[255, 255, 255], [0, 255, 0]] * 2


def test_sixteen_bit_and_grey_pictures_become_eight_bit_rgb(tmp_path):
    """Catches 16-bit values cut to their low byte, and (H, W) arrays."""
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    deep = grey.astype(np.uint16) * 257
    for k, array in enumerate([grey, deep, np.dstack([deep] * 3)]):
        cv2.imwrite(str(tmp_path / f"{k}.png"), array)
        assert np.array_equal(read_image(tmp_path / f"{k}.png"), np.dstack([grey] * 3))


def test_what_is_not_a_picture_is_refused_in_one_sentence(tmp_path):
    """Catches None from cv2 reaching the models, and texts that do not say what to do."""
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "text.png").write_text("hello"), (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir(), encode(tmp_path / "clip.mp4", numbered(2))
    for name, part in [("a.heic", "convert it to PNG or JPEG"), ("text.png", "convert it to PNG or JPEG"),
                       ("empty.png", "convert it to PNG or JPEG"), ("folder", "convert it to PNG or JPEG"),
                       ("clip.mp4", "one frame of it if it is a video")]:
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / name)
        one_sentence(error, name, part)
    with pytest.raises(FileNotFoundError) as error:
        read_image(tmp_path / "b.heic")
    one_sentence(error, "b.heic", "did you mean a.heic?")


def test_written_pictures_read_back_and_png_says_ai_generated(tmp_path):
    """Catches BGR on disk, and a text chunk that breaks the file: its checksum is verified."""
    image = np.random.default_rng(0).integers(0, 256, (25, 41, 3), np.uint8)
    write_image(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"tEXt") - 4
    size = int.from_bytes(data[at:at + 4], "big")
    assert chunk(b"tEXt", data[at + 8:at + 8 + size]) == data[at:at + 12 + size]
    assert data[at + 8:].startswith(b"Comment\0AI-generated")
    write_image(tmp_path / "a.jpg", corners())
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - corners()).mean() < 4


# ---- Writing video -------------------------------------------------------------------------------------------------

def test_written_colours_come_back_and_are_tagged_bt709(tmp_path):
    """Catches BT.601 pixels under BT.709 tags: green skin in every player."""
    count = write_video(tmp_path / "a.mp4", (flat(c) for c in COLOURS), 10)
    assert count == len(COLOURS)
    for frame, colour in zip(Video(tmp_path / "a.mp4"), COLOURS, strict=True):
        assert np.abs(frame[16:32, 16:48].astype(int) - colour).max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert codec.colorspace == codec.color_primaries == codec.color_trc == codec.color_range == 1


def test_a_gif_has_every_frame_its_rate_and_its_comment(tmp_path):
    """Read back by another decoder (PyAV): pictures to within the 256 colours, 1/16 s a frame."""
    frames = [np.full((32, 48, 3), (20 * k, 100, 255 - 20 * k), np.uint8) for k in range(5)]
    write_gif(tmp_path / "a.gif", frames, 16, comment="AI-generated test")
    assert b"!\xfe\x11AI-generated test\0;" == (tmp_path / "a.gif").read_bytes()[-22:]
    with av.open(str(tmp_path / "a.gif")) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert abs(float(container.streams.video[0].average_rate) - 16) < 1
    assert len(found) == 5 and np.abs(np.float32(found) - frames).mean() < 8
    with pytest.raises(ValueError, match="a.webp must end in .gif"):
        write_gif(tmp_path / "a.webp", frames, 16)


def test_written_file_is_commented_ai_generated_and_starts_with_its_index(tmp_path):
    """Catches a tag that ffprobe does not show, and a file that cannot be played while it downloads."""
    write_video(tmp_path / "a.mp4", numbered(5), Fraction(24000, 1001))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"].startswith("AI-generated")
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    clip = Video(tmp_path / "a.mp4")
    assert clip.fps == Fraction(24000, 1001) and numbers(clip) == list(range(5))
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_written_pictures_stay_close(tmp_path):
    """Catches a quality setting lost on its way to the encoder: crf 17 keeps detail within 2 levels."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (48, 64, 1), np.uint8), (0, 0), 1.2)
    write_video(tmp_path / "a.mp4", [np.dstack([noise] * 3)] * 5, 24)
    assert all(np.abs(f.astype(int) - noise[..., None]).mean() < 2 for f in Video(tmp_path / "a.mp4"))


def test_any_memory_layout_is_written(tmp_path):
    """Catches flipped or transposed views read as if contiguous."""
    write_video(tmp_path / "a.mp4", [corners()[:, ::-1], corners(64, 48).transpose(1, 0, 2)], 24)
    assert [corner_names(f) for f in Video(tmp_path / "a.mp4")] == ["grkb", "rbgk"]


@pytest.mark.parametrize("seconds", [0.5, 3])
def test_aac_is_copied_packet_by_packet_and_cut_at_the_videos_end(tmp_path, seconds):
    """Catches a needless second lossy encoding, sound longer than the picture, and lost priming packets."""
    sound = sound_file(tmp_path / "song.m4a", click(seconds, 0.3))
    write_video(tmp_path / "a.mp4", iter(numbered(48)), 24, audio=sound)
    source, copied = packets(sound, "audio"), packets(tmp_path / "a.mp4", "audio")
    assert copied == source[:len(copied)] and (seconds > 2 or len(copied) == len(source))
    at, end = heard(tmp_path / "a.mp4")
    assert at == pytest.approx(heard(sound)[0], abs=1e-3) and end == pytest.approx(min(seconds, 2), abs=0.03)
    assert Video(tmp_path / "a.mp4").has_audio and len(packets(tmp_path / "a.mp4", "video")) == 48


@pytest.mark.parametrize("name, codec", [
    ("a.wav", "pcm_s16le"), ("a.ogg", "libopus"), ("a.mp3", "libmp3lame"), ("a.ts", "aac")])
def test_other_sounds_play_at_the_same_time(tmp_path, name, codec):
    """Catches a shift or stretch by resampling, encoder delay or a container that starts at 1.4 s (ts)."""
    sound = sound_file(tmp_path / name, click(1.5, 0.7, 48000), codec, 48000)
    write_video(tmp_path / "a.mp4", numbered(24), 12, audio=sound)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == ("mp3float" if name == "a.mp3" else "aac")
    at, end = heard(tmp_path / "a.mp4")
    assert at == pytest.approx(0.7, abs=0.03) and end == pytest.approx(1.5, abs=0.08)


def test_sound_counts_from_the_first_picture_of_a_video_that_starts_late(tmp_path):
    """Catches lips out of step for ts and mkv files whose clock does not start at 0."""
    late, sound = Fraction(1, 4), click(1.5, 0.7)
    source = encode(tmp_path / "a.mkv", numbered(24), fps=12, shift=12, sound=sound, late=late)
    assert heard(source)[0] == pytest.approx(1.95, abs=0.03)        # pictures from 1 s, sound from 1.25 s
    write_video(tmp_path / "b.mp4", Video(source), 12, audio=source)
    assert heard(tmp_path / "b.mp4")[0] == pytest.approx(0.95, abs=0.03)


def test_bad_sound_is_refused_before_the_first_frame_is_made(tmp_path):
    """Catches an hour of sampling lost to a silent audio file."""
    silent = encode(tmp_path / "silent.mp4", numbered(3))
    missing, frames = tmp_path / "no.mp3", (pytest.fail("a frame was made") for _ in range(1))
    for audio, kind, part in [(silent, ValueError, "no sound"), (missing, FileNotFoundError, "not exist")]:
        with pytest.raises(kind) as error:
            write_video(tmp_path / "a.mp4", frames, 24, audio=audio)
        one_sentence(error, audio.name, part)
    assert os.listdir(tmp_path) == ["silent.mp4"]


@pytest.mark.parametrize("name, codec", [("song.m4a", "aac"), ("song.mkv", "flac")])
def test_a_fault_in_the_sound_does_not_cost_the_picture(tmp_path, name, codec):
    """Catches a finished video thrown away because a copied song is cut, or a re-encoded one corrupt."""
    sound = sound_file(tmp_path / name, np.random.default_rng(0).uniform(-0.5, 0.5, 88200), codec)
    data = sound.read_bytes()
    half = len(data) // 2
    sound.write_bytes(data[:half] if codec == "aac" else data[:half] + bytes(3000) + data[half + 3000:])
    assert write_video(tmp_path / "a.mp4", numbered(48), 24, audio=sound) == 48
    assert len(packets(tmp_path / "a.mp4", "video")) == 48 and 0.3 < heard(tmp_path / "a.mp4")[1] < 1.9


@pytest.mark.parametrize("frames, parts", [
    ([], ["at least 1"]), ([flat(0, 47, 65)], ["65x47", "64x46"]),
    ([flat(0), flat(0, 32)], ["frame 1", "(48, 64, 3)"]),
    ([flat(0).astype(np.float32)], ["float32", "uint8"]), ([flat(0)[..., :1]], ["(48, 64, 1)"])])
def test_frames_that_cannot_be_written_are_refused_and_leave_nothing(tmp_path, frames, parts):
    """Catches silent rescaling, an unplayable yuv420p with odd sides, and an empty mp4."""
    with pytest.raises(ValueError) as error:
        write_video(tmp_path / "a.mp4", frames, 24)
    one_sentence(error, "a.mp4", *parts)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("done", [0, 3, 80])
def test_an_interrupted_write_leaves_the_old_file_and_no_part(tmp_path, stop, done):
    """Catches half a video under the final name, and litter beside it."""
    def frames():
        yield from numbered(50) * 2 if done > 50 else numbered(done)
        raise stop
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(stop):
        write_video(tmp_path / "a.mp4", frames(), 24)
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_an_output_that_cannot_be_written_is_refused_early(tmp_path, monkeypatch):
    """Catches a wrong -o found out after the sampling."""
    (tmp_path / "folder.mp4").mkdir(), (tmp_path / "in.mp4").touch()
    for name, kind, part in [("no/a.mp4", FileNotFoundError, "does not exist"),
                             ("folder.mp4", IsADirectoryError, "is a folder"),
                             ("a.webm", ValueError, "a.mp4"), ("a", ValueError, "a.mp4"),
                             ("in.mp4", ValueError, "also an input")]:
        with pytest.raises(kind) as error:
            check_output(tmp_path / name, tmp_path / "missing.png", tmp_path / "in.mp4")
        one_sentence(error, name, part)
    for path in ("a.mp4", "a.PNG", "a.jpg", "in.mp4"):
        check_output(tmp_path / path)
    with pytest.raises(ValueError):
        write_image(tmp_path / "a.mp4", flat(0))
    with pytest.raises(ValueError):
        write_video(tmp_path / "a.png", numbered(1), 24)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)   # root may write anywhere
    with pytest.raises(PermissionError) as error:
        check_output(tmp_path / "a.mp4")
    one_sentence(error, "read-only")
    assert sorted(os.listdir(tmp_path)) == ["folder.mp4", "in.mp4"]


def test_a_picture_that_cv2_cannot_turn_into_8_bits_is_refused_in_words(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tiff"), np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="a.tiff is not a picture that can be read"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("kind, good, bad, span", [
    (whole(1), {"1": 1, "+7": 7}, ["0", "-1", "1.5", "x", "", "nan", "9" * 30], "a whole number, 1 or more"),
    (real(0, 1), {"0": 0, "1e-3": 0.001, "1": 1}, ["-0.1", "1.01", "nan", "inf", "x"], "a number, 0 to 1"),
    (real(0), {"1e9": 1e9}, ["nan", "inf", "-1"], "a number, 0 or more")])
def test_numbers_out_of_range_are_refused_with_the_range(kind, good, bad, span):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{re.escape(text)}: give {span}"):
            kind(text)


def test_an_input_by_another_name_is_still_an_input(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"film")
    (tmp_path / "link.mp4").symlink_to("clip.mp4")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").touch()
    check_output("clip.mp4", tmp_path)  # a folder is read for its frames alone
    with pytest.raises(ValueError, match="is also an input"):
        check_output("0.png", tmp_path)
    for name in ("clip.mp4", tmp_path / "link.mp4"):
        with pytest.raises(ValueError, match="is also an input"):
            check_output(name, tmp_path / "clip.mp4")


def test_pyavs_log_is_off_while_a_file_is_read(tmp_path):
    """Some versions of torchvision turn it on, and then closing a file deadlocks now and then."""
    write_video(tmp_path / "a.mp4", numbered(3), 25)
    av.logging.set_level(av.logging.ERROR)
    Video(tmp_path / "a.mp4")
    assert av.logging.get_level() is None
