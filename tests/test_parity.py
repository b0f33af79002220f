"""Our networks equal CogVideoX1.5's: small random models of diffusers and transformers, saved in the hub's layout, read by our load_*.

Sizes are all different, so that no transposed axis can pass. When outputs differ, the failure names the first layer
that does.
"""

import pytest
import torch

from diffusion import Schedule, ddim, dpm_solver
from load_cogvideox import load_text_encoder, load_tokenizer, load_transformer, load_vae
from text import empty_prompt

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install -r requirements-dev.txt")
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers: pip install -r requirements-dev.txt"
)


def error(ours, theirs) -> float:
    """Largest difference, relative to the reference's largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_equal(run_ours, run_theirs, pairs, tolerance):
    """Compare two runs; `pairs` are (name, our module, their module), in the order of the computation."""
    seen = {}

    def record(name, side):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, {}).setdefault(side, output.detach().clone())

        return hook

    hooks = [
        module.register_forward_hook(record(n, side)) for n, a, b in pairs for side, module in (("a", a), ("b", b))
    ]
    with torch.no_grad():
        ours, theirs = run_ours(), run_theirs()
    for hook in hooks:
        hook.remove()
    assert ours.shape == theirs.shape
    if error(ours, theirs) > tolerance:
        broken = [
            n
            for n, _, _ in pairs
            if seen[n]["a"].shape != seen[n]["b"].shape or error(seen[n]["a"], seen[n]["b"]) > tolerance
        ]
        pytest.fail(
            f"error {error(ours, theirs):.1e} > {tolerance}; first layer that differs: {(broken or ['the output head'])[0]}"
        )


def randomize(model, seed=0):
    """Every parameter random, also those that start at 0 or 1: an ignored weight must show."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return model.eval()


# ---- the transformer -----------------------------------------------------------------------------------------------


def save_transformer(folder, image_to_video: bool):
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=3,
        in_channels=32 if image_to_video else 16,
        out_channels=16,
        patch_size=2,
        patch_size_t=2,
        patch_bias=False,
        ofs_embed_dim=40 if image_to_video else None,
        time_embed_dim=40,
        text_embed_dim=56,
        max_text_seq_length=10,
        sample_frames=81,
        sample_height=300,
        sample_width=300,
        use_rotary_positional_embeddings=True,
    )
    randomize(theirs).save_pretrained(folder / "transformer", max_shard_size="300KB")
    return theirs


def reference_rope(theirs, grid):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    f, h, w = grid
    return get_3d_rotary_pos_embed(32, None, (h, w), f, grid_type="slice", max_size=(150, 150))


@pytest.mark.parametrize("image_to_video", [True, False])
@pytest.mark.parametrize("f, h, w", [(4, 6, 10), (2, 14, 8)])
def test_transformer_equals_diffusers(tmp_path, image_to_video, f, h, w):
    """Both CogVideoX1.5 configs, landscape and portrait; catches token order, adaLN order, RoPE, qk-norm, eps and mapping faults."""
    theirs = save_transformer(tmp_path, image_to_video)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3, (
        "shards must be small enough to split a block"
    )
    ours = load_transformer(tmp_path)
    torch.manual_seed(1)
    latents, text = torch.randn(2, f, 32 if image_to_video else 16, h, w), torch.randn(2, 10, 56)
    step = torch.tensor([999, 37])
    ofs = torch.full((2,), 2.0) if image_to_video else None
    rope = reference_rope(theirs, (f // 2, h // 2, w // 2))
    pairs = [
        ("text_embed", ours.text_embed, theirs.patch_embed.text_proj),
        ("patch_embed", ours.patch_embed, theirs.patch_embed.proj),
    ]
    pairs += [("time_embed", ours.time_embed, theirs.time_embedding)]
    for i, (a, b) in enumerate(zip(ours.blocks, theirs.transformer_blocks)):
        pairs += [
            (f"blocks.{i}.norm1", a.norm1, b.norm1),
            (f"blocks.{i}.norm2", a.norm2, b.norm2),
            (f"blocks.{i}", a, b),
        ]
    pairs += [
        ("norm_final", ours.norm_final, theirs.norm_final),
        ("norm_out", ours.norm_out, theirs.norm_out),
    ]
    assert_equal(
        lambda: ours(latents, step, text),
        lambda: theirs(latents, text, step, ofs=ofs, image_rotary_emb=rope, return_dict=False)[0],
        pairs,
        1e-5,
    )


# ---- the VAE -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    theirs = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16, 24),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.7,
    )
    randomize(theirs, seed=2).save_pretrained(folder / "vae")
    return load_vae(folder), theirs


def vae_pairs(ours, theirs, encoder: bool):
    a, b = (ours.encoder, theirs.encoder) if encoder else (ours.decoder, theirs.decoder)
    levels = list(zip(a.levels, b.down_blocks if encoder else b.up_blocks))
    pairs = [("conv_in", a.conv_in, b.conv_in)]
    pairs += [(f"levels.{i}", x, y) for i, (x, y) in enumerate(levels)]
    middle = [("mid", a.mid, b.mid_block)]
    return pairs + middle if encoder else pairs[:1] + middle + pairs[1:]


@pytest.mark.parametrize("frames", [1, 9, 17, 25])
def test_vae_encode_equals_diffusers(vaes, frames):
    """Mean and log-variance over one to three chunks; catches cache, pooling, padding and chunk-size faults."""
    ours, theirs = vaes
    video = torch.rand(2, frames, 3, 40, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def run_theirs():
        posterior = theirs.encode(video.transpose(1, 2)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar]).transpose(2, 3)

    assert_equal(lambda: torch.stack(ours.encode(video)), run_theirs, vae_pairs(ours, theirs, encoder=True), 2e-5)


@pytest.mark.parametrize("latent_frames", [1, 3, 5, 7])
def test_vae_decode_equals_diffusers(vaes, latent_frames):
    """One to three chunks; catches faults of the cache, of the norms' resizing and of the first frame's special case."""
    ours, theirs = vaes
    latents = torch.randn(2, latent_frames, 16, 5, 3, generator=torch.Generator().manual_seed(4))
    assert_equal(
        lambda: ours.decode(latents),
        lambda: theirs.decode(latents.transpose(1, 2)).sample.transpose(1, 2),
        vae_pairs(ours, theirs, encoder=False),
        2e-5,
    )


# ---- text ----------------------------------------------------------------------------------------------------------


def test_t5_equals_transformers(tmp_path):
    """No mask, unscaled attention, gated GELU, shared position bias, 226 tokens with padding."""
    config = transformers.T5Config(
        vocab_size=128,
        d_model=48,
        d_kv=8,
        d_ff=72,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    theirs = randomize(transformers.T5EncoderModel(config), seed=5)
    theirs.save_pretrained(tmp_path / "text_encoder", max_shard_size="40KB")
    ours = load_text_encoder(tmp_path)
    ids = torch.cat([torch.randint(0, 128, (1, 226), generator=torch.Generator().manual_seed(6)), empty_prompt()])
    pairs = [("embed", ours.embed, theirs.encoder.embed_tokens)]
    pairs += [(f"blocks.{i}", a, b) for i, (a, b) in enumerate(zip(ours.blocks, theirs.encoder.block))]
    assert_equal(lambda: ours(ids), lambda: theirs(ids).last_hidden_state, pairs, 1e-5)


PROMPTS = [
    "",
    "a woman in a red dress dances on a terrace",
    "line one\nline two\ttabbed   spaces ",
    "Ünïcödé — “quotes”, ﬁ ligature, ½, 日本語の文章, emoji 💃🏽, zero\u200bwidth",
    "word " * 400,
    "x" * 3000,
    "a mark </s> in the middle and <unk> too",
]


def test_tokenizer_ids_equal_transformers(assets):
    """Unicode, newlines, empty, too long, marks in the text; always exactly 226 ids."""
    folder = assets / "weights" / "tokenizer"
    theirs = transformers.T5Tokenizer.from_pretrained(folder)
    ours = load_tokenizer(assets / "weights")
    expected = theirs(
        PROMPTS,
        padding="max_length",
        max_length=226,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    ).input_ids
    ids = ours(PROMPTS)
    for prompt, a, b in zip(PROMPTS, ids, expected):
        assert torch.equal(a, b), f"ids differ for {prompt[:40]!r}"
    assert torch.equal(ids[0], empty_prompt()[0])


# ---- samplers ------------------------------------------------------------------------------------------------------

SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    snr_shift_scale=1.0,
    timestep_spacing="trailing",
    clip_sample=False,
    set_alpha_to_one=True,
)


def denoiser(latents, step):
    """Any smooth function of both: a network's stand-in."""
    return torch.sin(3 * latents + step / 100) + 0.1 * latents.flip(-1)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50])
def test_ddim_trajectory_equals_diffusers(steps):
    """Step counts that do and do not divide 1000."""
    scheduler = diffusers.CogVideoXDDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    start = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(7))
    theirs = start
    for step in scheduler.timesteps:
        theirs = scheduler.step(denoiser(theirs, step), step, theirs, return_dict=False)[0]
    assert error(ddim(denoiser, start, Schedule(), steps), theirs) <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 24, 30, 50])
def test_dpm_solver_equals_diffusers_given_the_same_noise(steps):
    """diffusers draws noise twice in a second-order step and uses the second draw; we replay what it used."""
    scheduler = diffusers.CogVideoXDPMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    start = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(8))
    theirs, old, used = start, None, []
    for i, step in enumerate(scheduler.timesteps):
        last = scheduler.timesteps[i - 1] if i else None
        generator = torch.Generator().manual_seed(i)
        theirs, old = scheduler.step(
            denoiser(theirs, step), old, step, last, theirs, generator=generator, return_dict=False
        )
        replay = torch.Generator().manual_seed(i)
        first, second = (torch.randn(start.shape, generator=replay) for _ in range(2))
        used.append(second if i and step - 1000 // steps >= 0 else first)  # the last step may end at 0, short of clean
    noise = iter(used)
    ours = dpm_solver(denoiser, start, Schedule(), steps, noise=lambda: next(noise))
    assert error(ours, theirs) <= 1e-6


def test_schedule_equals_diffusers_and_golden_numbers():
    """All 1000 values of alpha_bar, and a few read off CogVideoX1.5's own configuration."""
    ours = Schedule().alphas_cumprod
    theirs = diffusers.CogVideoXDDIMScheduler(**SCHEDULER).alphas_cumprod
    assert (ours - theirs).abs().max() < 1e-7
    golden = {
        0: 0.99915,
        1: 0.9982334461401823,
        100: 0.886761,
        500: 0.241019,
        750: 0.032799,
        998: 1.968e-7,
        999: 0.0,
    }
    for step, value in golden.items():
        assert ours[step].item() == pytest.approx(value, rel=1e-4, abs=1e-12)
