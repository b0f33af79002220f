"""Read and write video and pictures: frames, fps, audio, rotation, sizes.

`Video` streams a file or a folder of frames as often as it is iterated. `write_video`, `write_gif` and
`write_image` leave a whole file or none; mp4, gif and png say in a tag, unless told otherwise, that they are
AI-generated. A picture is (H, W, 3) uint8 RGB, upright. User mistakes raise
ValueError or OSError with one sentence: what was given, what to give.

    python -c "import video; v = video.Video('drive.mp4'); print(v.frames, v.fps, v.width, v.height)"
"""
import argparse
import contextlib
import difflib
import itertools
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.stream import Disposition

COMMENT = "AI-generated with DirectAnimator"
AVX512_SKX = 256       # OpenCV's number for it
PICTURES = (".png", ".jpg", ".jpeg")
COPIED_AUDIO = ("aac", "mp3float", "ac3", "eac3", "alac")   # ffmpeg's names of what every mp4 player decodes


# ---- Sizes ----

def output_size(height: int, width: int, area: int = 512 * 512, multiple: int = 16) -> tuple[int, int]:
    """(H, W): the aspect of height x width, about `area` pixels, both positive multiples of `multiple`."""
    scale = math.sqrt(area / (height * width)) / multiple
    return max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3), uint8, uint16 or float, to height x width: area mean down, bicubic up.

    Bicubic overshoots at edges: integers saturate, floats leave their range by some per cent.
    """
    # Two steps: where one side shrinks and the other grows, INTER_AREA alone would not average.
    smaller = min(width, image.shape[1]), min(height, image.shape[0])
    resized = cv2.resize(cv2.resize(image, smaller, interpolation=cv2.INTER_AREA),
                         (width, height), interpolation=cv2.INTER_CUBIC)
    return resized.reshape(height, width, *image.shape[2:])     # cv2 drops a last axis of 1


def letterbox_box(source_height: int, source_width: int,
                  height: int, width: int) -> tuple[float, float, int, int]:
    """(scale_x, scale_y, x0, y0), the map of `letterbox`: x -> scale_x * x + x0, y -> scale_y * y + y0.

    Coordinates are continuous: pixel i covers [i, i + 1), its centre is i + 0.5, so box edges map exactly.
    The two scales differ a little, since the fitted picture's sides are whole pixels.
    """
    fit = min(height / source_height, width / source_width)
    h, w = max(1, round(source_height * fit)), max(1, round(source_width * fit))
    return w / source_width, h / source_height, (width - w) // 2, (height - h) // 2


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`image` fitted inside height x width, aspect kept, centred on black; `letterbox_box` is its map."""
    scale_x, scale_y, x0, y0 = letterbox_box(*image.shape[:2], height, width)
    h, w = round(image.shape[0] * scale_y), round(image.shape[1] * scale_x)
    canvas = np.zeros((height, width, *image.shape[2:]), image.dtype)
    canvas[y0:y0 + h, x0:x0 + w] = resize(image, h, w)
    return canvas


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`image` filling height x width, aspect kept; what hangs over is cropped, on both sides alike."""
    fill = max(height / image.shape[0], width / image.shape[1])
    h, w = max(height, round(image.shape[0] * fill)), max(width, round(image.shape[1] * fill))
    y0, x0 = (h - height) // 2, (w - width) // 2
    return resize(image, h, w)[y0:y0 + height, x0:x0 + width].copy()


# ---- Reading ----

def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise FileNotFoundError(f"{path} does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    return path


def _open(path: str | Path) -> av.container.InputContainer:
    path = _existing(path)
    # torchvision up to 0.24 turns PyAV's log on; decoder threads that want to log then wait for Python, which waits for
    # them while a file is closed: for ever.
    av.logging.set_level(None)
    try:    # absolute, or ffmpeg reads "a:b.mp4" as protocol a; metadata in Latin-1 is no reason to stop
        return av.open(str(path.absolute()), metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}): give a file that plays") from None


def _tracks(streams: Iterable) -> list:
    """The streams that can be decoded; ffmpeg shows the cover art of a song as a video stream."""
    return [s for s in streams if s.codec_context and not s.disposition & Disposition.attached_pic]


def _upright_rgb(frame: av.VideoFrame, width: int | None = None, height: int | None = None) -> np.ndarray:
    """Decoded frame -> (H, W, 3) uint8 RGB by its own matrix and range, scaled, then turned upright.

    Untagged frames count as BT.601, as swscale, hence every tool that forgets the tags, wrote them. Alpha
    goes over white: cut-outs are made for white pages, black would swallow dark hair. No HDR tone mapping.
    """
    alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    image = frame.reformat(width, height, "rgba" if alpha else "rgb24").to_ndarray()
    if alpha:
        opacity = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    turn = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}
    return cv2.rotate(image, turn[frame.rotation % 360]) if frame.rotation % 360 in turn else image


def read_image(path: str | Path) -> np.ndarray:
    """Picture file -> (H, W, 3) uint8 RGB, EXIF orientation applied, alpha over white."""
    path = _existing(path)
    data = np.frombuffer(b"" if path.is_dir() else path.read_bytes(), np.uint8)
    raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    image = None
    if raw is not None and raw.shape[2:] == (4,):       # cv2 turns a picture upright or keeps its alpha, never both
        with contextlib.suppress(av.FFmpegError), _open(path) as container:
            image = _upright_rgb(next(container.decode(video=0)))
    elif raw is not None:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"{path} is not a picture that can be read: convert it to PNG or JPEG, "
                         "or one frame of it if it is a video")
    return image


def _numbered(folder: Path) -> list[Path]:
    """PNG and JPG files of `folder` in natural order, 2 before 10."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith(".")]
    if not files:
        raise ValueError(f"{folder} holds no PNG or JPG frames: give a video or a folder of numbered frames")
    return sorted(files, key=lambda f: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", f.name)])


class Video:
    """A video file, or a folder of numbered PNG or JPG frames, as a stream of (H, W, 3) uint8 RGB.

    Each iteration opens the file anew and yields every frame once, in display order, in constant memory.
    Where the file is corrupt, or truncated if it has an index as mp4 has, ValueError follows the last whole
    frame. With `fps`, frame k is the source frame nearest to k / fps seconds, repeated if need be. A folder has
    no clock: `fps`, or 25, is its rate, and every frame is kept.

    path: Path. has_audio: bool. height, width: in pixels, upright and square.
    fps: Fraction, of the frames yielded; where durations vary it is the mean, so that sound stays in step.
    frames: how many are yielded; total: how many there are. Counted in packets, so too high for codecs with hidden
    frames (VP8).
    """

    def __init__(self, path: str | Path, fps: float | Fraction | None = None):
        if fps is not None and not 0.001 <= fps <= 1000:
            raise ValueError(f"fps={fps}: give a rate from 0.001 to 1000, such as 24")
        self.path = Path(path)
        self._files = _numbered(self.path) if self.path.is_dir() else None
        self._pick = fps is not None and not self._files
        if self._files:
            self._rate, self.total, self.has_audio = Fraction(fps or 25), len(self._files), False
            first = read_image(self._files[0])
        else:
            first = self._probe()
        self.height, self.width = first.shape[:2]
        self.fps = Fraction(fps or self._rate).limit_denominator(1001)
        self.frames = math.ceil(self.total / self._rate * self.fps) if self._pick else self.total

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._files:
            for file in self._files:
                image = read_image(file)
                if image.shape != (self.height, self.width, 3):
                    raise ValueError(f"{file} is {image.shape[1]}x{image.shape[0]}, {self._files[0].name} is "
                                     f"{self.width}x{self.height}: give all frames one size")
                yield image
            return
        with contextlib.closing(self._decode()) as frames:      # even if the consumer stops early
            for frame in self._nearest(frames) if self._pick else frames:
                yield _upright_rgb(frame, *self._size)

    def _track(self, container: av.container.InputContainer) -> av.VideoStream:
        kind = container.format.name
        if kind.endswith(("_pipe", "image2")) or self.path.suffix.lower() in (".avif", ".heic", ".heif"):
            raise ValueError(f"{self.path} is a single picture: give a video or a folder of numbered frames")
        tracks = _tracks(container.streams.video)
        if not tracks or kind == "tty":     # to ffmpeg a text file is a film of its letters
            raise ValueError(f"{self.path} has no pictures that can be decoded: give a video, such as an mp4")
        return tracks[0]

    def _probe(self) -> np.ndarray:
        """Frame 0. Sets has_audio, _rate, _size (width, height before turning), total (whole frames) and
        _lost (frames that the index places beyond the end of the file); one pass over the file's packets.
        """
        with _open(self.path) as container:
            stream, times, clocks = self._track(container), [], []
            with contextlib.suppress(av.FFmpegError):       # iterating reports it, after the frames before it
                for packet in container.demux(stream):
                    if packet.size and not (packet.is_discard or packet.is_corrupt):
                        times.append(packet.pts)
                        clocks.append(packet.dts)
            size, self.total = self.path.stat().st_size, len(times)
            self._lost = sum(entry.pos + entry.size > size for entry in stream.index_entries)
            self.has_audio = bool(_tracks(container.streams.audio))
            known = [t for t in times if t is not None] or [0]
            span, declared = (max(known) - min(known)) * stream.time_base, stream.average_rate
            aspect = stream.sample_aspect_ratio or 1
        # Declared rates are exact where timestamps are rounded (mkv: to 1 ms), guesses where durations vary.
        steps = self.total - 1
        clocks = [time for time in clocks if time is not None]
        joined = any(b < a for a, b in itertools.pairwise(clocks))      # byte by byte: each part starts its clock anew
        trusted = declared and (self._lost or joined or abs(declared * span - steps) < 0.5)
        self._rate = Fraction(declared if trusted else steps / span if span else 25).limit_denominator(1001)
        with contextlib.closing(self._decode()) as frames:
            first = next(frames)
        # One size for all, though a stream may change its own. 404:405 is a rounded square, not worth a blur.
        width = round(first.width * aspect) if abs(aspect - 1) > 0.01 else first.width
        self._size = width, first.height
        return _upright_rgb(first, *self._size)

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Whole frames in display order, then ValueError if some are not whole."""
        done = 0

        def fault() -> ValueError:
            kind = "truncated" if self._lost else "corrupt"
            return ValueError(f"{self.path} is {kind}: {done} of {self.total + self._lost} frames decode")

        with _open(self.path) as container:
            stream = self._track(container)
            stream.thread_type = "AUTO"     # adds frame threads
            try:
                for packet in container.demux(stream):
                    whole = not packet.is_corrupt       # half a packet would decode to a frame half grey
                    for frame in stream.decode(packet if whole else None):
                        if frame.is_corrupt:
                            raise fault()
                        yield frame
                        done += 1
                    if not whole:
                        raise fault()
            except av.FFmpegError:
                raise fault() from None
        if self._lost or not done:
            raise fault()

    def _nearest(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """The frame nearest to k / fps seconds after the first, for k = 0, 1, ... to the end of the last."""
        k, last = 0, None
        for index, frame in enumerate(frames):
            time = index / self._rate if frame.pts is None else frame.pts * frame.time_base
            if last is None:
                zero = last_time = time
            while k / self.fps < (last_time + time) / 2 - zero:
                yield last
                k += 1
            last, last_time = frame, time
        yield from itertools.repeat(last, self.frames - k)


# ---- Writing ----

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help names the default of each flag that has one; where it is None the help's own words say what happens."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Describes itself by a docstring's first line; a mistake ends in one sentence. So do the parsers of its commands."""

    def __init__(self, doc: str = "", **options):
        super().__init__(**{"description": doc.split("\n")[0], "formatter_class": HelpFormatter} | options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def exit(self, status: int = 0, message: str | None = None):
        if "tqdm" in sys.modules:       # a message would stand behind an open bar; --help needs no tqdm
            for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                bar.close()
        super().exit(status, message)


def real(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """The type of a flag that is a finite number, or with `kind` int a whole one, from `low` to `high`."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        span = f"{low} or more" if high >= 2 ** 62 else f"{low} to {high}"
        raise argparse.ArgumentTypeError(f"{text}: give a {'whole ' * (kind is int)}number, {span}")
    return parse


def whole(low: int, high: int = 2 ** 62) -> Callable[[str], int]:
    return real(low, high, int)


natural = whole(1)
seed = whole(0)
area = whole(256, 2 ** 26)              # pixels of a picture, at most 8192 x 8192
rate = real(0.001, 1000)                # frames a second


def check_output(path: str | Path, *inputs: str | Path,
                 suffixes: tuple[str, ...] = (".mp4", *PICTURES)) -> None:
    """Raise now, as ValueError or OSError, what would stop `path` from being written an hour later."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, such as {path}/out{suffixes[0]}")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}: use {path.with_suffix(suffixes[0])}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist, so create it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} is read-only, so name another")
    for source in (Path(source) for source in inputs if path.exists() and Path(source).exists()):
        frame = path.suffix.lower() in PICTURES and source.is_dir() and path.parent.samefile(source)
        if frame or path.samefile(source):
            raise ValueError(f"{path} is also an input: name another output")


@contextlib.contextmanager
def atomic(path: Path, *suffixes: str) -> Iterator[Path]:
    """A temporary file beside `path`: renamed to it when whole, removed on any exception, Ctrl-C included. No suffixes: any."""
    check_output(path, suffixes=suffixes or (path.suffix.lower(),))
    part = path.absolute().with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_image(path: str | Path, image: np.ndarray, comment: str = COMMENT) -> None:
    """(H, W, 3) uint8 RGB -> PNG with `comment` in a tEXt chunk, or JPEG of quality 95."""
    path = Path(path)
    with atomic(path, *PICTURES) as part:
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(path.suffix.lower(), bgr)[1].tobytes()      # cv2's own JPEG quality is 95
        if path.suffix.lower() == ".png":
            text = b"tEXtComment\0" + comment.encode("latin-1", "replace")
            chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
            data = data[:33] + chunk + data[33:]        # after the signature (8 bytes) and IHDR (25)
        part.write_bytes(data)


def write_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float, comment: str = COMMENT) -> None:
    """(H, W, 3) uint8 RGB each -> a GIF that repeats for ever, `comment` in a comment block. Dithered to 256 colours."""
    animation = cv2.Animation()
    animation.frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in frames]
    animation.durations = [round(1000 / fps)] * len(animation.frames)
    with atomic(Path(path), ".gif") as part:
        dither = [cv2.IMWRITE_GIF_DITHER, cv2.IMWRITE_GIF_FAST_FLOYD_DITHER]      # the default is three times as far off
        data = cv2.imencodeanimation(".gif", animation, dither)[1].tobytes()
        text = comment.encode("latin-1", "replace")[:255]
        part.write_bytes(data[:-1] + b"!\xfe" + bytes([len(text)]) + text + b"\0;")  # the last byte, ;, ends a GIF


def _sound(path: str | Path, sink: av.container.OutputContainer) -> Iterator[tuple[Fraction, av.Packet]]:
    """(end in seconds, packet) of the first audio stream of `path`, counted from its first frame if any.

    Packets are copied where every mp4 player knows the codec, else re-encoded to AAC.
    """
    with _open(path) as source:
        tracks = _tracks(source.streams.audio)
        if not tracks:
            raise ValueError(f"{path} has no sound that can be decoded: give a file that has, or no audio")
        stream, clock = tracks[0], (_tracks(source.streams.video) or tracks)[0]
        zero = (clock.start_time or 0) * clock.time_base
        if stream.codec_context.name in COPIED_AUDIO:
            out = sink.add_stream_from_template(stream)
            packets = (p for p in source.demux(stream) if p.size and not p.is_corrupt)
        else:
            out = sink.add_stream("aac", rate=48000, bit_rate=192_000)
            frames = itertools.chain(source.decode(stream), [None])
            packets = itertools.chain.from_iterable(map(out.encode, frames))
        with contextlib.suppress(av.FFmpegError):       # a fault in the sound ends it, not the pictures
            last = -math.inf
            for packet in packets:
                if packet.dts * packet.time_base < last:        # files joined byte by byte start their clocks anew
                    break
                last, shift = packet.dts * packet.time_base, round(zero / packet.time_base)
                packet.stream, packet.pts, packet.dts = out, packet.pts - shift, packet.dts - shift
                yield (packet.pts + (packet.duration or 0)) * packet.time_base, packet


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float | Fraction,
                audio: str | Path | None = None, comment: str = COMMENT) -> int:
    """Stream (H, W, 3) uint8 RGB frames, H and W even, into an H.264 mp4; returns how many there were.

    yuv420p at crf 17, BT.709 limited range and tagged so, index first, `comment` in the metadata.
    audio: a file whose first sound is kept, cut where the pictures end.
    """
    path, rate, count = Path(path), Fraction(fps).limit_denominator(1001), 0
    with atomic(path, ".mp4") as part, av.open(str(part), "w", "mp4", {"movflags": "faststart"}) as sink:
        sink.metadata["comment"] = comment
        options = {"crf": "17"}
        if cv2.checkHardwareSupport(AVX512_SKX):    # x264's AVX-512 code reads past small frames: equal pictures
            options["x264-params"] = "asm=avx2"     # would become unequal bytes
        stream = sink.add_stream("libx264", rate=rate, options=options)
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1   # BT.709, limited
        sound = _sound(audio, sink) if audio else iter(())
        ahead = next(sound, None)       # refuses bad audio before the first frame is made
        for count, image in enumerate(frames, 1):
            if count == 1:
                height, width = stream.height, stream.width = image.shape[:2]
                if height % 2 or width % 2:
                    raise ValueError(f"{path}: frames are {width}x{height} and yuv420p needs even sides: "
                                     f"use {width - width % 2}x{height - height % 2}")
            if image.shape != (height, width, 3) or image.dtype != np.uint8:
                raise ValueError(f"{path}: frame {count - 1} is {image.dtype} of shape {image.shape}: "
                                 f"give uint8 of shape {(height, width, 3)}")
            frame = av.VideoFrame.from_ndarray(image)
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            sink.mux(stream.encode(frame))
            while ahead and ahead[0] <= count / rate:
                sink.mux(ahead[1])
                ahead = next(sound, None)
        if not count:
            raise ValueError(f"{path}: there is no frame to write: give at least 1")
        sink.mux(stream.encode(None))
    return count
