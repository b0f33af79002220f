"""The causal VAE: causality, streams in constant memory, tiles without seams, refusals, gradients.

What it computes is compared with diffusers in test_parity.py; the claims here are about how. Sizes are all different:
B=2, 17 frames (5 latents), 40 x 24 pixels (5 x 3 latents).
"""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae as vae_module
from machine import pick_device
from vae import OVERLAP, TILE, VAE_PRESETS, CausalConv3d, CausalVAE, Norm, Tiles, VAEConfig, tile_starts

CONFIG = VAEConfig(channels=(4, 8, 12, 16), layers=1, latent_channels=16, norm_groups=2, scaling_factor=0.7)
CHANNELS_LAST = torch.channels_last_3d


def random_vae(config=CONFIG, seed=0) -> CausalVAE:
    torch.manual_seed(seed)
    vae = CausalVAE(config).requires_grad_(False)
    for p in vae.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return vae


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae():
    return random_vae()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Convolutions go through a chunk two frames at a time, as they do where frames are large."""
    monkeypatch.setattr(vae_module, "PIECE", 1)


def a_video(frames=17, height=40, width=24, batch=2):
    return torch.rand(batch, frames, 3, height, width) * 2 - 1


def causal_convolutions(net) -> set:
    return {m for m in net.modules() if isinstance(m, CausalConv3d)}


# ---- causality -----------------------------------------------------------------------------------------------------


def test_causal_convolution_never_looks_ahead_and_chunks_equal_the_whole():
    """Frame t's output is the same whatever follows, and cutting a clip anywhere changes nothing. Catches symmetric time padding."""
    conv = CausalConv3d(6, 4)
    x = torch.randn(2, 6, 9, 5, 7)
    whole = conv(x, {})
    changed = x.clone()
    changed[:, :, 4:] += 1
    after = conv(changed, {})
    assert torch.equal(after[:, :, :4], whole[:, :, :4]) and not torch.equal(after[:, :, 4], whole[:, :, 4])
    cache = {}
    pieces = [conv(part, cache) for part in x.split([3, 1, 2, 3], dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
@pytest.mark.parametrize("dims", [(6, 6), (6, 4)])
def test_a_convolution_in_place_finds_what_it_finds_in_one_go(monkeypatch, frames, dims):
    """With gradients a chunk is convolved whole, without them two frames at a time. Catches reading what was just overwritten."""
    conv, x, cache = CausalConv3d(*dims, inplace=True).double(), torch.randn(2, 6, frames, 5, 7).double(), {}
    with torch.enable_grad():
        whole, before = conv(x, cache), {conv: torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)[:, :, -2:]}
    assert torch.equal(cache[conv], before[conv])
    input, cache = x.clone(), {}
    with torch.no_grad():
        found = conv(input, cache)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(cache[conv], before[conv])
    monkeypatch.setattr(vae_module, "PIECE", 2**22)
    with torch.no_grad():
        torch.testing.assert_close(conv(x.clone(), {}), whole, rtol=1e-12, atol=1e-12)
    assert (found.data_ptr() == input.data_ptr()) == (dims[0] == dims[1])


def test_coding_leaves_its_input_as_it_is_and_gradients_change_nothing(vae):
    """The decoder reads its latents again in every norm. Catches a first convolution that overwrites them."""
    video, latents = a_video(9), torch.randn(2, 3, 16, 5, 3)
    for run, given in ((lambda x: vae.encode(x)[0], video), (vae.decode, latents)):
        kept = given.clone()
        with torch.no_grad():
            found = run(given)
        assert torch.equal(given, kept)
        with torch.enable_grad():
            torch.testing.assert_close(run(given), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_gpu_group_norm_equals_pytorchs_and_stays_channels_last(dtype, tolerance, frames):
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 12).to(dtype)
    x = (3 + 2 * torch.randn(2, 12, frames, 5, 6)).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    exact = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)
    found = vae_module.normalize(x, 4, weight, bias, 1e-6)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_vae_takes_that_group_norm_and_gives_what_the_cpu_gives(vae):
    video = torch.rand(1, 9, 3, 64, 48) * 2 - 1
    there = vae_module.CausalVAE(vae.config).eval().cuda()
    there.load_state_dict(vae.state_dict())
    with torch.no_grad():
        for found, exact in zip(there.encode(video.cuda()), vae.encode(video)):
            torch.testing.assert_close(found.cpu(), exact, rtol=1e-2, atol=1e-2)  # convolutions in TF32


def test_causal_convolution_before_a_clip_sees_the_first_frame_standing_still():
    """Catches zero padding in time: a still clip would flicker at its start."""
    conv = CausalConv3d(6, 4)
    still = torch.randn(2, 6, 1, 5, 7).expand(-1, -1, 4, -1, -1)
    out = conv(still, {})
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first_changed", [9, 17])
def test_later_chunks_never_change_earlier_latents(vae, first_changed):
    """Bit for bit: what was encoded stays encoded, so a stream may be cut off or go on."""
    video = a_video(25)
    changed = video.clone()
    changed[:, first_changed:] = a_video(25 - first_changed)
    before = (first_changed - 1) // 4 + 1
    for a, b in zip(vae.encode(video), vae.encode(changed)):
        assert torch.equal(a[:, :before], b[:, :before])
        assert not torch.equal(a[:, before], b[:, before])


@pytest.mark.parametrize("first_changed", [3, 5])
def test_later_chunks_never_change_earlier_frames(vae, first_changed):
    latents = torch.randn(2, 7, 16, 5, 3)
    changed = latents.clone()
    changed[:, first_changed:] += 1
    a, b = vae.decode(latents), vae.decode(changed)
    before = 4 * first_changed - 3
    assert torch.equal(a[:, :before], b[:, :before])
    assert not torch.equal(a[:, before], b[:, before])


def test_the_end_of_a_chunk_reaches_the_next(vae):
    """Chunks are one clip: catches a cache that is filled and never read."""
    video = a_video()
    mean, _ = vae.encode(video)
    for frame in (7, 8):  # the last two of the first chunk
        changed = video.clone()
        changed[:, frame] += 0.5
        assert (vae.encode(changed)[0][:, 3:] - mean[:, 3:]).abs().max() > 1e-4


# ---- streams -------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Bytes of tensors made inside, counted from creation to release: `peak` is what a machine would have needed."""

    def __init__(self, *outside: torch.Tensor):
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in outside}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return out

    def release(self, address, size):
        self.seen.discard(address)
        self.now -= size


def peak_of(run, *outside) -> int:
    with Memory(*outside) as memory:
        run()
    return memory.peak


@pytest.mark.parametrize("tiling", [False, True])
def test_decode_stream_needs_the_same_memory_for_any_number_of_frames(vae, small_tiles, tiling):
    """Peak bytes, frames dropped as they come, equal at 9 and 21 latents. Catches a list of chunks and a cache that views its chunk."""

    def stream(latents):
        frames = vae.decode_stream(latents)
        while next(frames, None) is not None:
            pass

    short, long = torch.randn(2, 9, 16, 2, 13), torch.randn(2, 21, 16, 2, 13)
    vae.tile(tiling)
    peaks = [peak_of(lambda: stream(latents), latents) for latents in (short, long)]
    whole = peak_of(lambda: vae.decode(long), long)
    vae.tile(False)
    assert peaks[0] == peaks[1]
    assert whole > peaks[1] + 50 * (4 * 2 * 3 * 16 * 104)  # the measure does see frames that are kept


@pytest.mark.parametrize("height, width", [(64, 64), (96, 48)])
def test_memory_says_what_decoding_takes(height, width):
    """Within 0.7 and 1 of what is said, which has room for the workspace of convolutions. Depth and shape as at full size."""
    vae = CausalVAE(VAEConfig((16, 32, 32, 64), layers=3, norm_groups=8, scaling_factor=0.7)).eval()
    latents = torch.randn(1, 7, 16, height // 8, width // 8)
    with torch.inference_mode():
        peak = peak_of(lambda: [None for _ in vae.decode_stream(latents)], latents)
    assert 0.7 < peak / vae.memory(height, width) < 1


def test_encode_stream_needs_the_same_memory_for_any_number_of_frames(vae):
    def stream(frames):
        for _ in vae.encode_stream(torch.rand(2, 3, 16, 104) for _ in range(frames)):
            pass

    assert peak_of(lambda: stream(33)) == peak_of(lambda: stream(161))


def test_decode_stream_equals_decode_and_starts_before_the_end(vae):
    """Bit for bit, 4f-3 frames, the first chunk's nine after three latents only. Catches a stream that decodes all first."""
    latents = torch.randn(2, 7, 16, 5, 3)
    video = vae.decode(latents)
    assert video.shape == (2, 25, 3, 40, 24)
    cut = latents.clone()
    cut[:, 3:] = torch.nan
    frames = vae.decode_stream(cut)
    for t in range(9):
        assert torch.equal(next(frames), video[:, t])
    assert next(frames).isnan().any()
    assert torch.equal(torch.stack(list(vae.decode_stream(latents)), 1), video)


@pytest.mark.parametrize("frames", [1, 9, 25])
def test_encode_stream_from_a_generator_equals_encode(vae, frames):
    """It reads one chunk ahead, to know a clip's last, and no further. Catches a list() of the whole clip."""
    video, taken = a_video(frames), 0

    def reader():
        nonlocal taken
        for frame in video.unbind(1):
            taken += 1
            yield frame

    means, logvars, after = [], [], []
    for mean, logvar in vae.encode_stream(reader()):
        means.append(mean), logvars.append(logvar), after.append(taken)
    assert after == [min(t + 8, frames) for t in range(9 if frames > 1 else 1, frames + 1, 8)]
    mean, logvar = vae.encode(video)
    assert mean.shape == logvar.shape == (2, (frames - 1) // 4 + 1, 16, 5, 3)
    assert torch.equal(torch.cat(means, 1), mean) and torch.equal(torch.cat(logvars, 1), logvar)
    assert logvar.min() >= -30 and logvar.max() <= 20


def test_log_variance_is_clamped(vae):
    """To [-30, 20], as diffusers does: exp(logvar / 2) of an untrained or broken network stays finite."""
    wild = random_vae()
    wild.encoder.conv_out.weight *= 1e4
    _, logvar = wild.encode(a_video(9))
    assert logvar.min() == -30 and logvar.max() == 20


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_caches_hold_two_frames_per_causal_convolution_and_nothing_else(vae, part):
    """1x1x1 convolutions keep nothing (diffusers clones their whole input: 5.6 GiB at 768x1360), and no cache is a view of more."""
    net = getattr(vae, part)
    down, channels, first, later = (8, 3, 9, 8) if part == "encoder" else (1, 16, 3, 2)
    tiles = Tiles(net, 5, 3, False, down, 8 // down)
    sizes = []
    for t in (first, later, later, later):
        tiles(torch.randn(2, channels, t, 5 * down, 3 * down), last=False)
        (cache,) = tiles.caches.values()
        assert set(cache) == causal_convolutions(net)
        assert all(past.shape[2] == 2 and past.untyped_storage().nbytes() == past.nbytes for past in cache.values())
        sizes.append(sum(past.nbytes for past in cache.values()))
    assert len(set(sizes)) == 1
    tiles(torch.randn(2, channels, later, 5 * down, 3 * down), last=True)
    assert list(tiles.caches.values()) == [{}]  # nothing follows


# ---- tiles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 10 latents overlapping by 4: the same code as 48 and 12, at a tenth of the work."""
    monkeypatch.setattr(vae_module, "TILE", 10)
    monkeypatch.setattr(vae_module, "OVERLAP", 4)


def test_tile_starts_cover_every_size_with_equal_overlapping_tiles():
    """Catches a gap, a tile over the border, a thin overlap that would show a seam, and a tile more than needed."""
    for size in range(1, 400):
        starts = tile_starts(size)
        assert starts[0] == 0 and starts == sorted(set(starts))
        if size <= TILE:
            assert starts == [0]
            continue
        assert starts[-1] + TILE == size
        steps = [b - a for a, b in zip(starts, starts[1:])]
        assert max(steps) <= TILE - OVERLAP and max(steps) - min(steps) <= 1
        assert len(starts) == 1 + -(-(size - TILE) // (TILE - OVERLAP))


def test_pictures_up_to_one_tile_are_untouched_by_tiling(vae, small_tiles):
    """Bit-equal: tiling is safe to leave on."""
    video, latents = a_video(9, 80, 72), torch.randn(2, 3, 16, 10, 9)
    plain = *vae.encode(video), vae.decode(latents)
    vae.tile(True)
    tiled = *vae.encode(video), vae.decode(latents)
    vae.tile(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, tiled))
    first = latents[:, :3].transpose(1, 2).contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(
        Tiles(vae.decoder, 10, 9, True, 1, 8)(first, last=True), vae.decoder(first, {})
    )  # not multiplied and divided by weights


def smooth(frames, channels, height, width, cell):
    """(2, frames, channels, height, width) with structure as large as `cell`, and a slope from left to right: tiles differ in their
    statistics, which is hard for GroupNorm."""
    noise = torch.randn(2 * frames, channels, height // cell + 2, width // cell + 2)
    return F.interpolate(noise, size=(height, width), mode="bicubic").unflatten(0, (2, frames)) + torch.linspace(
        -1, 1, width
    )


def tiled_and_plain(vae, run):
    plain = run()
    vae.tile(True)
    tiled = run()
    vae.tile(False)
    return tiled, plain


def jumps(field, axis, borders):
    """Mean step of a picture across given borders, and its median step anywhere, along the last axis (-1) or the one before (-2)."""
    step = field.diff(dim=axis).abs().movedim(axis, -1).flatten(0, -2).mean(0)
    return torch.stack([step[b - 1] for b in borders]).mean().item(), step.median().item()


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_tiling_leaves_no_visible_seam(vae, small_tiles, monkeypatch, part):
    """Tiles differ from the untiled result, but smoothly: at their borders the difference jumps less than an eighth (latents, whose
    overlap has few steps: a third) of what unblended tiles do, and less than the picture itself. Two chunks, both axes, 13 x 22 latents."""
    if part == "encode":
        video = smooth(17, 3, 104, 176, 24)
        run, scale, tolerance = lambda: vae.encode(video)[0], 1, 0.2
    else:
        latents = smooth(5, 16, 13, 22, 3)
        run, scale, tolerance = lambda: vae.decode(latents), 8, 0.2
    tiled, plain = tiled_and_plain(vae, run)
    monkeypatch.setattr(vae_module, "ramp", lambda n, overlap, device: torch.ones(n))
    unblended, _ = tiled_and_plain(vae, run)
    assert tiled.shape == plain.shape
    assert (tiled - plain).std() < tolerance * plain.std()
    for axis, size in ((-2, 13), (-1, 22)):
        starts = tile_starts(size)
        borders = [scale * b for start in starts for b in (start, start + 10) if 0 < b < size]
        seam, _ = jumps(tiled - plain, axis, borders)
        raw_seam, _ = jumps(unblended - plain, axis, borders)
        _, picture = jumps(plain, axis, borders)
        print(f"{part} axis {axis}: seam {seam:.1e}, unblended {raw_seam:.1e}, the picture's steps {picture:.1e}")
        assert seam < raw_seam / (3 if part == "encode" else 8)
        assert seam < picture


def test_tiling_weights_sum_to_one(vae, small_tiles):
    """Where all tiles agree the blend is that value, up to the corners. Catches weights that do not add up."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, z, cache):
            return torch.full((z.shape[0], 3, z.shape[2], 8 * z.shape[3], 8 * z.shape[4]), 0.7)

    out = Tiles(Constant(), 13, 22, True, 1, 8)(torch.zeros(1, 16, 1, 13, 22), last=True)
    assert out.shape == (1, 3, 1, 104, 176)
    torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=1e-6, atol=0)


def test_tiles_stream_too(vae, small_tiles):
    """Each tile keeps its own caches: streams equal the whole bit for bit. Catches a cache shared between tiles."""
    video, latents = a_video(17, 104, 88), torch.randn(2, 5, 16, 13, 11)
    vae.tile(True)
    mean = torch.cat([mean for mean, _ in vae.encode_stream(iter(video.unbind(1)))], 1)
    assert torch.equal(mean, vae.encode(video)[0]) and mean.shape == (2, 5, 16, 13, 11)
    tiles = Tiles(vae.decoder, 13, 11, True, 1, 8)
    tiles(latents[:, :3].transpose(1, 2), last=False)
    assert len(tiles.caches) == 4 and all(
        set(cache) == causal_convolutions(vae.decoder) for cache in tiles.caches.values()
    )
    assert torch.equal(torch.stack(list(vae.decode_stream(latents)), 1), vae.decode(latents))
    vae.tile(False)
    corner = vae.decode(latents[..., :10, :10])  # a corner pixel is in one tile only, in every chunk
    vae.tile(True)
    torch.testing.assert_close(vae.decode(latents)[..., :24, :8], corner[..., :24, :8], rtol=1e-5, atol=1e-5)
    vae.tile(False)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, nearest",
    [(0, "1 or 9"), (2, "1 or 9"), (8, "1 or 9"), (10, "9 or 17"), (16, "9 or 17"), (18, "17 or 25"), (50, "49 or 57")],
)
def test_frame_counts_other_than_8k_plus_1_are_refused(vae, frames, nearest):
    """Padded or cut in silence, sound and picture would part. `encode` refuses at once, a stream when it learns the count: at its end."""
    video, runs = torch.zeros(1, frames, 3, 8, 16), []
    hook = vae.encoder.register_forward_hook(lambda *_: runs.append(1))
    for run, at_most in (
        (lambda: vae.encode(video), 0),
        (lambda: list(vae.encode_stream(iter(video.unbind(1)))), frames // 8),
    ):
        with pytest.raises(ValueError, match=f"^{frames} frames: .* 8k\\+1, for example {nearest}$"):
            run()
        assert len(runs) <= at_most
    hook.remove()


@pytest.mark.parametrize("f, nearest", [(2, "1 or 3"), (4, "3 or 5"), (14, "13 or 15")])
def test_even_latent_counts_are_refused(vae, f, nearest):
    """CogVideoX decodes 14 latents to 56 frames, not 53: the first-frame rule fails in silence (fact sheet 3.3)."""
    with pytest.raises(ValueError, match=f"^{f} latents: .*odd number, for example {nearest}$"):
        vae.decode(torch.zeros(1, f, 16, 2, 3))


@pytest.mark.parametrize("height, width, nearest", [(20, 16, "16x16"), (16, 30, "32x16"), (3, 101, "104x8")])
def test_sizes_that_are_no_multiple_of_8_are_refused(vae, height, width, nearest):
    with pytest.raises(ValueError, match=f"^{width}x{height} pixels: .*multiples of 8, for example {nearest}$"):
        vae.encode(torch.zeros(1, 1, 3, height, width))


# ---- precision, layout, gradients ----------------------------------------------------------------------------------


def test_bf16_is_close_to_fp32(vae):
    """Within bf16's rounding through some forty layers; and the dtype of the weights is the dtype that comes out."""
    half = random_vae().bfloat16()
    video, latents = a_video(9), torch.randn(2, 3, 16, 5, 3)
    for a, b in ((half.encode(video)[0], vae.encode(video)[0]), (half.decode(latents), vae.decode(latents))):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().mean() < 0.03 * b.abs().mean()


def is_channels_last(p) -> bool:
    return p.is_contiguous(memory_format=torch.channels_last if p.ndim == 4 else CHANNELS_LAST)


def test_weights_are_channels_last_also_after_assignment():
    """Loading assigns the file's layout; `channels_last()` puts it right. Catches a loader that silently loses a factor in speed."""
    vae = CausalVAE(CONFIG)
    kernels = [p for p in vae.parameters() if p.ndim >= 4]
    assert all(is_channels_last(p) for p in kernels)
    vae.load_state_dict(
        {name: p.clone(memory_format=torch.contiguous_format) for name, p in vae.state_dict().items()}, assign=True
    )
    assert not all(is_channels_last(p) for p in vae.parameters() if p.ndim >= 4)
    vae.channels_last()
    assert all(is_channels_last(p) for p in vae.parameters() if p.ndim >= 4)


class ConvolutionInputs(TorchDispatchMode):
    """Records the inputs of all 3x3x3 and 3x3 convolutions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[1].shape[-2:] == (3, 3):
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    pick_device("cpu")[1] != torch.bfloat16, reason="PyTorch's bf16 kernels for other CPUs know no channels-last"
)
def test_every_convolution_reads_channels_last_memory_in_every_chunk():
    """The module's claim. `expand` or nothing in a `cat`, and repeat_interleave, lose the layout: then every second convolution of
    the decoder's largest levels takes 1.6 times as long in bf16.

    bf16, because PyTorch hands small float32 inputs of one sample to a kernel that knows no channels-last.
    """
    vae = random_vae().bfloat16()
    with ConvolutionInputs() as inputs:
        vae.encode(a_video(17, batch=1))
        vae.decode(torch.randn(1, 5, 16, 5, 3))
    assert len(inputs.seen) == 2 * (
        len(causal_convolutions(vae)) + 6
    )  # two chunks; three 2-D convolutions down, three up
    assert all(is_channels_last(x) for x in inputs.seen)


def resized(z, shape):
    """As CogVideoX's SpatialNorm3D: nearest, the first of an odd number of frames by itself."""
    T, H, W = shape
    if T > 1 and T % 2:
        first = F.interpolate(z[:, :, :1], (1, H, W))
        return torch.cat([first, F.interpolate(z[:, :, 1:], (T - 1, H, W))], dim=2)
    return F.interpolate(z, (T, H, W))


@pytest.mark.parametrize("t, T", [(1, 1), (3, 3), (3, 5), (3, 9), (2, 2), (2, 4), (2, 8)])
def test_spatial_norm_in_place_equals_the_formula_and_its_gradients(t, T):
    """GN(x) * conv_y(z) + conv_b(z) with z resized, out of place, float64: value, and gradients of x, z and all weights."""
    norm = Norm(12, replace(CONFIG, latent_channels=6), decoder=True).double()
    for p in norm.parameters():
        p.data.normal_()
    args = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 12, T, 4, 6), (2, 6, t, 2, 3))
    ]

    def formula(x, z):
        z = resized(z, x.shape[2:])
        return F.group_norm(x, 2, norm.norm.weight, norm.norm.bias, 1e-6) * norm.conv_y(z) + norm.conv_b(z)

    ours, theirs = norm(*args), formula(*args)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(ours)
    inputs = [*args, *norm.parameters()]
    for a, b in zip(torch.autograd.grad(ours, inputs, probe), torch.autograd.grad(theirs, inputs, probe)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_whole_round_trip_match_finite_differences():
    """float64, two chunks each way, every weight along one random direction: in-place activations must not eat what backward needs."""
    vae = random_vae().double().requires_grad_(True)
    video = a_video(17, 16, 24).double()

    def loss():
        mean, logvar = vae.encode(video)
        return (vae.decode(mean + (logvar / 2).exp()) - video).square().mean()

    grads = torch.autograd.grad(loss(), list(vae.parameters()))
    assert all(g.abs().max() > 0 for g in grads)
    direction, eps = [torch.randn_like(p) * p.abs().mean() for p in vae.parameters()], 1e-6
    values = []
    with torch.no_grad():
        for step in (eps, -2 * eps):
            for p, d in zip(vae.parameters(), direction):
                p += step * d
            values.append(loss().item())
    slope = sum((g * d).sum().item() for g, d in zip(grads, direction))
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(slope, rel=1e-5)


def test_golden_parameter_count():
    """CogVideoX's VAE: 92,215,456 in the encoder, 123,368,451 in the decoder (fact sheet 2.1)."""
    with torch.device("meta"):
        vae = CausalVAE(VAE_PRESETS["cogvideox1.5"])
    assert [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)] == [
        92_215_456,
        123_368_451,
    ]


def test_whitened_latents_have_mean_0_and_deviation_1_and_decode_to_the_same_pictures():
    """Float64. Equal but near the border, where the decoder's first convolution was padded with zeros and now sees the mean."""
    vae = CausalVAE(VAE_PRESETS["tiny"]).double()
    for p in vae.parameters():  # also those that start at zero
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    video = torch.rand(1, 9, 3, 96, 96, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        (mean, logvar), shape = vae.encode(video), (1, 1, -1, 1, 1)
        before, middle, deviation = vae.decode(mean), mean.mean((0, 1, 3, 4)), mean.std((0, 1, 3, 4))
        vae.whiten(middle, deviation)
        white, white_logvar = vae.encode(video)
        error = (vae.decode(white) - before).abs() / before.std()
    assert torch.allclose(white, (mean - middle.view(shape)) / deviation.view(shape), atol=1e-9)
    assert torch.allclose(white_logvar, logvar - 2 * deviation.log().view(shape), atol=1e-9)
    assert error.max() < 0.05 and error[..., 32:64, 32:64].max() < 0.005


def test_a_fresh_vae_has_a_narrow_posterior():
    """Noise of e^-3 in a latent, not of 1, which would hide it."""
    vae = CausalVAE(VAE_PRESETS["tiny"]).requires_grad_(False)
    assert (vae.encode(torch.rand(1, 1, 3, 16, 16))[1] == -6).all()


def test_the_norms_of_a_fresh_decoder_are_plain_group_norms():
    """Whatever the latents: a random conv_y would drown x in noise."""
    vae = CausalVAE(VAE_PRESETS["tiny"]).requires_grad_(False)
    norms = [m for m in vae.decoder.modules() if isinstance(m, Norm)]
    for norm in norms:
        x, z = torch.randn(1, norm.norm.num_channels, 1, 4, 4), torch.randn(1, 16, 1, 2, 2)
        torch.testing.assert_close(norm(x, z), norm.norm(x))
    assert norms
