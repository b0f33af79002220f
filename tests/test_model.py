"""The DiT and its CueFusion blocks: Eq. 1-3 against loops, step 0 equal to the backbone, gradients, tokens, positions, counts.

What CogVideoX itself computes is compared with diffusers in test_parity.py. Here sizes are all different, so that no
transposed axis can pass: B=2, f=4, h=6, w=10 (N=30 video tokens), L=7, D=96, 3 heads, 3 blocks.
"""

import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import (
    attend,
    CueCrossAttention,
    CueFusion,
    DIT_PRESETS,
    DiT,
    DiTConfig,
    patchify,
    rope_table,
    rotate,
    sinusoid,
)
from model import unpatchify

CONFIG = DiTConfig(
    dim=96,
    depth=3,
    num_heads=3,
    in_channels=32,
    out_channels=16,
    text_dim=40,
    time_dim=24,
    ofs=True,
    cue_channels=17,
    cue_injection="cuefusion",
)
INJECTIONS = ["cuefusion", "concat", "cross"]


def loaded(config=CONFIG, seed=0) -> DiT:
    """A DiT as after load_transformer: the backbone random (a fresh one has zero adaLN: nothing would flow), the cue layers new."""
    torch.manual_seed(seed)
    model = DiT(config)
    for name, p in model.named_parameters():
        if ".cues." not in name:
            p.data.normal_().mul_(0.3 if p.ndim == 1 else p.shape[1] ** -0.5)
    model.init_cues()
    return model


def trained(config=CONFIG, seed=1) -> DiT:
    """Every parameter random, the cue layers too: an ignored weight or stream must show."""
    model = loaded(config, seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p) * (1 if p.ndim == 1 else p.shape[1] ** -0.5)
    return model


def inputs(batch=2, cue_batch=2, config=CONFIG, seed=2):
    """latents, step, text, pose, face."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, config.in_channels, 6, 10, generator=generator)
    text = torch.randn(batch, 7, config.text_dim, generator=generator)
    pose, face = torch.randn(2, cue_batch, 4, config.cue_channels, 6, 10, generator=generator)
    return latents, torch.tensor([999, 37, 500])[:batch], text, pose, face


# ---- Eq. 1-3, as on the page ---------------------------------------------------------------------------------------

D, TIME = 6, 5
NAMES = ["alpha_p", "beta_p", "gamma_p", "alpha_f", "beta_f", "gamma_f"]  # the paper's order


def layer_norm(e, weight, bias):
    mean = sum(e) / D
    variance = sum((v - mean) ** 2 for v in e) / D
    return [(e[d] - mean) / math.sqrt(variance + 1e-5) * weight[d] + bias[d] for d in range(D)]


def random_cuefusion():
    layer = CueFusion(D, TIME).double()
    for p in layer.parameters():
        p.data.normal_()
    x, pose, face = torch.randn(3, 2, 4, D, dtype=torch.float64)
    return layer, x, pose, face, torch.randn(2, TIME, dtype=torch.float64)


def factors_of(layer, e_t) -> dict:
    """Eq. 1 for one sample: {alpha_p: [D numbers], ...}."""
    silu = [v / (1 + math.exp(-v)) for v in e_t.tolist()]
    weight, bias = layer.mlp.weight.tolist(), layer.mlp.bias.tolist()
    rows = [sum(weight[r][j] * silu[j] for j in range(TIME)) + bias[r] for r in range(6 * D)]
    return {name: rows[i * D : (i + 1) * D] for i, name in enumerate(NAMES)}


def test_eq1_six_factors_in_the_papers_order_from_silu_of_the_time_embedding():
    """Catches a missing SiLU or bias, and any swap among scale, shift, gate, pose and face: each is read off the outputs alone."""
    layer, x, pose, face, t_emb = random_cuefusion()
    got = []
    for unit_p, unit_f in ((0, 0), (1, 0), (0, 1)):  # LN replaced by a constant u: then e^M = u (1 + alpha) + beta
        for norm, unit in ((layer.norm_pose, unit_p), (layer.norm_face, unit_f)):
            norm.weight.data.zero_(), norm.bias.data.fill_(unit)
        got.append(layer(torch.zeros_like(x), pose, face, t_emb, None))
    (m00, p0, f0), (m10, p1, _), (m01, _, f1) = got
    for b in range(2):
        factor = factors_of(layer, t_emb[b])
        for n in range(4):
            for d in range(D):
                a_p, b_p, g_p, a_f, b_f, g_f = (factor[name][d] for name in NAMES)
                assert m00[b, n, d].item() == pytest.approx(b_p + b_f)
                assert (m10 - m00)[b, n, d].item() == pytest.approx(1 + a_p)
                assert (m01 - m00)[b, n, d].item() == pytest.approx(1 + a_f)
                assert (p0 - pose)[b, n, d].item() == pytest.approx(g_p * b_p)
                assert (p1 - p0)[b, n, d].item() == pytest.approx(g_p * (1 + a_p))
                assert (f0 - face)[b, n, d].item() == pytest.approx(g_f * b_f)
                assert (f1 - f0)[b, n, d].item() == pytest.approx(g_f * (1 + a_f))


@pytest.mark.parametrize("cue", ["pose", "face"])
def test_eq2_modulates_the_normalised_cue_and_adds_it_to_the_video_tokens(cue):
    """e^M = LN(e) (1 + alpha) + beta. Catches a missing 1 +, an LN without its weights, eps, or one cue using the other's."""
    layer, x, pose, face, t_emb = random_cuefusion()
    with torch.no_grad():  # silence the other cue: 1 + alpha = 0, beta = 0
        other = 3 * D if cue == "pose" else 0
        layer.mlp.weight[other : other + 2 * D] = 0
        layer.mlp.bias[other : other + D], layer.mlp.bias[other + D : other + 2 * D] = -1, 0
    x_out, _, _ = layer(x, pose, face, t_emb, None)
    norm, e, k = (layer.norm_pose, pose, "p") if cue == "pose" else (layer.norm_face, face, "f")
    for b in range(2):
        factor = factors_of(layer, t_emb[b])
        for n in range(4):
            normed = layer_norm(e[b, n].tolist(), norm.weight.tolist(), norm.bias.tolist())
            for d in range(D):
                e_m = normed[d] * (1 + factor["alpha_" + k][d]) + factor["beta_" + k][d]
                assert x_out[b, n, d].item() == pytest.approx(x[b, n, d].item() + e_m, rel=1e-9, abs=1e-9)


def test_eq3_adds_the_gated_cue_to_the_raw_cue():
    """e^G = e + gamma e^M. Catches DynamiCtrl's e^M + gamma e^M, a missing gate, and pose gated by face's factor."""
    layer, x, pose, face, t_emb = random_cuefusion()
    _, pose_out, face_out = layer(x, pose, face, t_emb, None)
    for e, out, norm, k in ((pose, pose_out, layer.norm_pose, "p"), (face, face_out, layer.norm_face, "f")):
        for b in range(2):
            factor = factors_of(layer, t_emb[b])
            for n in range(4):
                normed = layer_norm(e[b, n].tolist(), norm.weight.tolist(), norm.bias.tolist())
                for d in range(D):
                    e_m = normed[d] * (1 + factor["alpha_" + k][d]) + factor["beta_" + k][d]
                    e_g = e[b, n, d].item() + factor["gamma_" + k][d] * e_m
                    assert out[b, n, d].item() == pytest.approx(e_g, rel=1e-9, abs=1e-9)


def test_eq1_to_eq3_pass_numerical_gradients_for_all_inputs():
    """float64 finite differences for x, e_p, e_f and e_t; catches a detached or in-place corrupted stream."""
    layer, x, pose, face, t_emb = random_cuefusion()
    args = [a[:, :2].contiguous().requires_grad_() for a in (x, pose, face)] + [t_emb.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *a: layer(*a, None), args)


def record(module, store):
    return module.register_forward_hook(lambda m, args, out: store.append((args, out)))


def test_eq3_stream_of_one_block_is_the_cue_of_the_next():
    """Catches a block that passes the raw cue on: Eq. 3 would then be used nowhere."""
    model, seen = trained(), []
    for block in model.blocks:
        record(block.cues, seen)
    model(*inputs())
    for (_, (_, pose_out, face_out)), ((_, pose_in, face_in, _, _), _) in zip(seen[:-1], seen[1:]):
        assert torch.equal(pose_in, pose_out) and torch.equal(face_in, face_out)
        assert not torch.equal(pose_in, seen[0][0][1])


def test_cues_reach_attention_through_the_video_tokens_only():
    """In block 1, before attention, text is what it is without cues and video is norm1's output plus both e^M; norm2 gets nothing."""
    model, with_cues, without, added = trained(), [], [], []
    latents, step, text, pose, face = inputs()
    record(model.blocks[0].cues, added)
    hook = record(model.blocks[0].attn, with_cues)
    model(latents, step, text, pose, face)
    hook.remove()
    record(model.blocks[0].attn, without)
    model(latents, step, text)
    (joint, _), (plain, _) = with_cues[0][0], without[0][0]
    (x_in, *_), (x_out, *_) = added[0]
    assert torch.equal(joint[:, :7], plain[:, :7])
    assert torch.equal(plain[:, 7:], x_in) and torch.equal(joint[:, 7:], x_out)
    assert not torch.equal(x_in, x_out)


# ---- step 0 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_fresh_cue_layers_leave_the_backbone_bit_for_bit(injection, dtype):
    """Any cues, tiny or huge, change not one bit: surgery on pretrained weights is safe. Catches any wrong initial value."""
    model = loaded(replace(CONFIG, cue_injection=injection)).to(dtype)
    latents, step, text, _, _ = inputs()
    with torch.no_grad():
        plain = model(latents, step, text)
        assert 0.1 < plain.std() < 10, "a backbone of zeros would prove nothing"
        for draw in range(12):
            pose, face = torch.randn(2, 1 + draw % 2, 4, 17, 6, 10)
            pose_scale, face_scale = ((0, 1e-30, 1e-3, 1, 1e6, 1e12)[i % 6] for i in (draw, draw * 5 // 2))
            assert torch.equal(model(latents, step, text, pose * pose_scale, face * face_scale), plain)


def test_cue_embeddings_start_as_the_backbones_reading_of_noisy_latents():
    """With an empty mask the cue tokens equal what patch_embed makes of [cue latents, no image]; catches channel-order faults."""
    model = loaded()
    cue = torch.randn(2, 4, 17, 6, 10)
    cue[:, :, 16] = 0
    trunk = model.patch_embed(patchify(torch.cat([cue[:, :, :16], torch.zeros(2, 4, 16, 6, 10)], dim=2)))
    for embed in (model.pose_embed, model.face_embed):
        torch.testing.assert_close(embed(patchify(cue)), trunk)
        mask = embed.weight.unflatten(1, (17, 8))[:, 16]
        assert 0.01 < mask.std() < 0.03  # small, but there: a mask channel of zeros would need a step more to wake


def loss_of(model):
    latents, step, text, pose, face = inputs()
    target = torch.randn(2, 4, 16, 6, 10, generator=torch.Generator().manual_seed(3))
    return (model(latents, step, text, pose, face) - target).square().mean()


def cue_gradients(model):
    """Per block: {alpha_p: largest gradient in its rows of the cue Linear's weight, ...}; and of both cue embeddings."""
    loss_of(model).backward()
    rows = [block.cues.mlp.weight.grad.abs().amax(1).chunk(6) for block in model.blocks]
    embeds = [embed.weight.grad.abs().max().item() for embed in (model.pose_embed, model.face_embed)]
    return [{name: row.max().item() for name, row in zip(NAMES, block)} for block in rows], embeds


def test_at_step_0_gradients_reach_scale_and_shift_of_every_block_and_nothing_behind_them():
    """Catches an initialisation that stays where it is: a weight and its partner both zero would never learn."""
    blocks, embeds = cue_gradients(loaded())
    for block in blocks:
        assert all(block[name] > 1e-7 for name in ("alpha_p", "beta_p", "alpha_f", "beta_f"))
        assert block["gamma_p"] == block["gamma_f"] == 0
    assert embeds == [0, 0]


def test_after_one_step_gradients_reach_the_cue_embeddings_and_all_gates_but_the_last_blocks():
    """The second step trains everything, except the last e^G, which nothing reads. Catches a stream that is computed and dropped."""
    model = loaded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cue_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    *blocks, last = cue_gradients(model)[0]
    embeds = [embed.weight.grad.abs().max() for embed in (model.pose_embed, model.face_embed)]
    assert all(grad > 1e-7 for grad in embeds)
    for block in blocks:
        assert all(grad > 1e-7 for grad in block.values())
    assert last["gamma_p"] == last["gamma_f"] == 0


@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_weight_gets_a_gradient_within_three_steps(injection):
    """Table 5's baselines are trained too: none may start where its gradient is zero for good."""
    model = loaded(replace(CONFIG, cue_injection=injection))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asleep = {name for name, _ in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        asleep -= {name for name, p in model.named_parameters() if p.grad.any()}
        optimizer.step()
    assert not asleep


@pytest.mark.parametrize("injection", INJECTIONS)
def test_trained_cues_change_the_output_of_their_own_sample(injection):
    """Pose, face and both masks are each seen, by their own sample only. Catches a dropped stream and a cue taken from sample 0."""
    model = trained(replace(CONFIG, cue_injection=injection))
    latents, step, text, pose, face = inputs()
    with torch.no_grad():
        v = model(latents, step, text, pose, face)
        for cue in (pose, face):
            for channel in (0, 16):
                saved = cue[1, :, channel].clone()
                cue[1, :, channel] += 1
                change = (model(latents, step, text, pose, face) - v).abs().amax((1, 2, 3, 4))
                assert change[0] == 0 and change[1] > 1e-3
                cue[1, :, channel] = saved


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("make", [loaded, trained])
def test_dropped_cues_and_reference_are_finite_in_value_and_gradient(injection, make):
    """A dropped cue is all zeros, and so are its tokens if the embedding's bias is: LayerNorm then divides by eps alone."""
    model = make(replace(CONFIG, cue_injection=injection))
    model.pose_embed.bias.data.zero_(), model.face_embed.bias.data.zero_()
    latents, step, text, pose, face = inputs()
    latents[:, :, 16:] = 0
    v = model(latents, step, text, torch.zeros_like(pose), torch.zeros_like(face))
    v.square().mean().backward()
    assert v.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- one forward, many ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", INJECTIONS)
def test_batch_1_step_and_cues_equal_repeated_ones(injection):
    """Both guidance branches share one pass over the cue streams. Catches a broadcast along the wrong axis."""
    model = trained(replace(CONFIG, cue_injection=injection))
    latents, _, text, pose, face = inputs(batch=3, cue_batch=1)
    step = torch.tensor([37])
    with torch.no_grad():
        shared = model(latents, step, text, pose, face)
        repeated = model(latents, step.repeat(3), text, pose.repeat(3, 1, 1, 1, 1), face.repeat(3, 1, 1, 1, 1))
    torch.testing.assert_close(shared, repeated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_features_equal_the_tap_and_a_teacher_cut_off_there(injection):
    """Depth counts from 1. Catches an off-by-one between student's tap and teacher's features, which Eq. 4 compares."""
    config = replace(CONFIG, cue_injection=injection)
    model, leaving = trained(config), []
    for block in model.blocks:
        record(block, leaving)
    args = inputs()
    with torch.no_grad():
        v = model(*args)
        outputs = [out[0] for _, out in leaving]
        for depth in (1, 2, 3):
            tapped_v, tapped = model(*args, tap=depth)
            teacher = DiT(replace(config, depth=depth))
            teacher.load_state_dict({name: p for name, p in model.state_dict().items() if name in teacher.state_dict()})
            assert torch.equal(tapped_v, v)
            assert torch.equal(tapped, outputs[depth - 1])
            assert torch.equal(model.features(*args, depth=depth), tapped)
            assert torch.equal(teacher.features(*args, depth=depth), tapped)


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_a_depth_the_model_does_not_have_is_refused(depth):
    """Catches features(depth=10) of a 6-block model silently giving block 6, and tap=10 giving None."""
    model = loaded()
    with pytest.raises(ValueError, match=f"{depth}.*1 to 3"):
        model.features(*inputs(), depth=depth)
    with pytest.raises(ValueError, match=f"{depth}.*1 to 3"):
        model(*inputs(), tap=depth)


def test_features_run_no_block_beyond_depth():
    """The teacher costs depth blocks, not all of them."""
    model, ran = loaded(), []
    for block in model.blocks:
        record(block, ran)
    model.features(*inputs(), depth=2)
    assert len(ran) == 2


@pytest.mark.parametrize("injection", INJECTIONS)
def test_checkpointing_changes_no_gradient(injection):
    """Bit for bit. Catches a stream that recomputation loses."""
    grads = []
    for checkpointing in (False, True):
        model = trained(replace(CONFIG, cue_injection=injection))
        model.checkpointing = checkpointing
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_checkpointing_keeps_only_the_streams_between_blocks():
    """What one more block adds to memory is x, pose, face and c, nothing else; without checkpointing it is some ten times that."""

    def kept(depth, checkpointing):
        model = loaded(replace(CONFIG, depth=depth))
        model.checkpointing = checkpointing
        weights, storages = {p.data_ptr() for p in model.parameters()}, {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model)  # keeps what was packed alive, so that no address is used twice
        del loss
        return sum(size for address, size in storages.items() if address not in weights)

    B, N, L, bytes_each = 2, 30, 7, 4
    streams = bytes_each * B * (3 * N + L) * CONFIG.dim
    assert kept(3, True) - kept(2, True) == streams
    assert kept(3, False) - kept(2, False) > 8 * streams


@pytest.mark.parametrize("shape", [(3, 32, 6, 10), (4, 32, 5, 10), (4, 32, 6, 9), (4, 16, 6, 10)])
def test_odd_sizes_and_wrong_channels_are_refused_in_one_sentence(shape):
    """Never padded in silence. Catches a check that misses an axis."""
    latents, step, text, _, _ = inputs()
    with pytest.raises(ValueError, match="multiples of .2, 2, 2. and C 32") as error:
        loaded()(torch.zeros(2, *shape), step, text)
    assert str((2, *shape)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 100}, "dim=100.*multiple of 16"),
        ({"num_heads": 4}, "multiple of 16"),
        ({"cue_injection": "add"}, "'add'.*concat"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


# ---- tokens and positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(2, 2, 2), (2, 1, 1), (1, 3, 2)])
def test_patchify_orders_tokens_t_h_w_and_features_c_t_h_w(patch):
    """An index tensor against loops: the order CogVideoX1.5's patch projection was trained with (fact sheet 3.1, step 2)."""
    B, f, C, h, w = 2, 4, 3, 6, 10
    pt, ph, pw = patch
    latents = torch.arange(B * f * C * h * w).view(B, f, C, h, w)
    tokens = patchify(latents, patch)
    assert tokens.shape == (B, f * h * w // (pt * ph * pw), C * pt * ph * pw)
    for b in range(B):
        n = 0
        for t in range(f // pt):
            for row in range(h // ph):
                for column in range(w // pw):
                    k = 0
                    for c in range(C):
                        for dt in range(pt):
                            for dh in range(ph):
                                for dw in range(pw):
                                    y, x = row * ph + dh, column * pw + dw
                                    assert tokens[b, n, k] == latents[b, t * pt + dt, c, y, x]
                                    k += 1
                    n += 1


@given(st.tuples(*[st.integers(1, 4)] * 5), st.tuples(*[st.integers(1, 3)] * 3))
@settings(max_examples=40, deadline=None)
def test_unpatchify_inverts_patchify_at_any_size(sizes, patch):
    B, f, C, h, w = sizes
    latents = torch.randn(B, patch[0] * f, C, patch[1] * h, patch[2] * w)
    assert torch.equal(unpatchify(patchify(latents, patch), (f, h, w), patch), latents)


def test_rope_equals_a_loop_over_tokens_and_pairs():
    """Text first with angle 0, then t, h, w with a quarter and two times three eighths of a head; portrait grids too."""
    text, head_dim = 5, 32
    for grid in ((3, 4, 6), (2, 7, 3)):
        cos, sin = rope_table(text, grid, head_dim, "cpu")
        assert cos.shape == sin.shape == (text + math.prod(grid), head_dim // 2)
        positions = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
        for n in range(text + math.prod(grid)):
            angles = []
            for axis, share in enumerate((head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)):
                position = 0 if n < text else positions[n - text][axis]
                angles += [position * 10000 ** (-2 * i / share) for i in range(share // 2)]
            assert cos[n].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
            assert sin[n].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


def test_rope_golden_values_of_token_37():
    """diffusers 0.42.1, get_3d_rotary_pos_embed(64, None, (4, 6), 3, grid_type="slice", max_size=(4, 6)): token 37 is t=1, h=2, w=1."""
    cos, sin = rope_table(0, (3, 4, 6), 64, "cpu")
    golden_cos = {0: 0.5403023362159729, 1: 0.950415313243866}  # t
    golden_cos |= {8: -0.416146844625473, 9: 0.5991816520690918, 20: 0.5403023362159729, 21: 0.8941984176635742}  # h, w
    golden_sin = {0: 0.8414709568023682, 1: 0.3109835982322693}
    golden_sin |= {8: 0.9092974066734314, 9: 0.8006131052970886, 19: 0.0004308868374209851, 31: 0.00021544341871049255}
    for k, value in golden_cos.items():
        assert cos[37, k].item() == pytest.approx(value, abs=1e-6)
    for k, value in golden_sin.items():
        assert sin[37, k].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("compiling", [False, True])
def test_rotate_turns_neighbouring_channels(monkeypatch, compiling):
    """Both ways of computing it. Catches rotation of halves instead of neighbours, and a wrong sign; text is left alone."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    cos, sin = rope = rope_table(2, (1, 3, 2), 16, "cpu")
    x, expected = torch.randn(2, 3, 8, 16), torch.zeros(2, 3, 8, 16, dtype=torch.float64)
    for place in range(8):
        for k in range(8):
            a, b, c, s = *x[..., place, 2 * k : 2 * k + 2].double().unbind(-1), cos[place, k], sin[place, k]
            expected[..., place, 2 * k], expected[..., place, 2 * k + 1] = a * c - b * s, b * c + a * s
    turned = rotate(x, rope)
    torch.testing.assert_close(turned.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    assert rotate(x.bfloat16(), rope).dtype == torch.bfloat16


def test_attention_scores_depend_on_relative_position_only():
    """What RoPE is for: shifting q and k by the same amount along any axis leaves q.k as it was."""
    grid = (4, 5, 6)
    table = torch.stack(rope_table(0, grid, 32, "cpu")).view(2, *grid, 16)
    q, k = torch.randn(2, 1, 1, 1, 32)

    def score(a, b):
        turn = lambda x, place: rotate(x, tuple(table[(slice(None), *place)][:, None]))  # noqa: E731
        return (turn(q, a) * turn(k, b)).sum().item()

    assert score((0, 0, 0), (1, 2, 3)) == pytest.approx(score((2, 1, 2), (3, 3, 5)), abs=1e-4)
    assert score((0, 0, 0), (1, 2, 3)) != pytest.approx(score((0, 0, 0), (1, 3, 2)), abs=1e-2)


def test_sinusoid_golden_values():
    """diffusers' get_timestep_embedding with flip_sin_to_cos, freq_shift 0: cosines first. Step 500 at 3072, ofs 2.0 at 512."""
    step, ofs = sinusoid(torch.tensor([500]), 3072)[0], sinusoid(torch.tensor([2.0]), 512)[0]
    assert step[:3].tolist() == pytest.approx([-0.8838492631912231, 0.8025765419006348, -0.6898795366287231], abs=1e-4)
    assert step[1536:1539].tolist() == pytest.approx(
        [-0.4677717983722687, 0.5965491533279419, -0.7239241600036621], abs=1e-4
    )
    assert ofs[:3].tolist() == pytest.approx([-0.416146844625473, -0.3508951663970947, -0.2862854301929474], abs=1e-6)
    assert ofs[256:259].tolist() == pytest.approx(
        [0.9092974066734314, 0.9364147782325745, 0.9581443667411804], abs=1e-6
    )


# ---- counts --------------------------------------------------------------------------------------------------------


def count(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())


def test_golden_parameter_counts_of_the_5b_model():
    """CogVideoX1.5-5B-I2V has 5,571,594,880 parameters, its T2V sibling 5,570,676,352; CueFusion adds 398,493,696 (7.15 %)."""
    config = DIT_PRESETS["cogvideox1.5-5b"]
    backbone = count(replace(config, cue_channels=0))
    assert backbone == 5_571_594_880
    assert count(replace(config, cue_channels=0, in_channels=16, ofs=False)) == 5_570_676_352
    assert count(config) - backbone == 398_493_696
    per_block = 6 * 3072 * (512 + 1) + 2 * 2 * 3072  # Eq. 1's Linear, two LayerNorms
    assert 42 * per_block + 2 * 3072 * (17 * 8 + 1) == 398_493_696


def test_python_model_py_prints_the_shapes_of_one_forward(capsys):
    """The module's own command works and shows CueFusion's three outputs."""
    runpy.run_path(str(Path(__file__).parent.parent / "model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "blocks.0.cues  [(1, 432, 256), (1, 432, 256), (1, 432, 256)]" in printed
    assert "(1, 6, 16, 12, 12)" in printed and f"{count(DIT_PRESETS['toy']):,} parameters" in printed


def test_attention_written_out_for_training_is_the_fused_one():
    """Output and gradients in float64; catches a missing scale or a softmax over the wrong axis."""
    q, k, v = (torch.randn(2, 3, S, 16, dtype=torch.float64, requires_grad=True) for S in (5, 7, 7))
    weight = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    found, expected = attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(found, expected, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, expected))):
        assert torch.allclose(a, b, rtol=1e-10)
    assert torch.allclose(attend(q.detach(), k, v), expected, rtol=1e-12)


def test_cross_attention_looks_from_and_at_the_videos_own_places():
    """CA injection: the table begins with the text, whose rows are not the cues'."""
    layer = CueCrossAttention(96, 3)
    x, pose, face = torch.randn(3, 2, 30, 96)
    with_text, alone = (rope_table(length, (2, 3, 5), 32, "cpu") for length in (7, 0))
    out, *_ = layer(x, pose, face, None, with_text)
    torch.testing.assert_close(out - x, layer.attn(x, alone, context=layer.norm_pose(pose) + layer.norm_face(face)))


def test_streams_keep_their_dtype_whatever_the_factors_have():
    """On a GPU autocast computes LayerNorm in float32: the streams, kept for the backward pass, would take twice the memory."""
    layer, streams = CueFusion(32, 8), torch.randn(2, 2, 5, 32).bfloat16()
    x, *out = layer(torch.randn(2, 5, 32), *streams, torch.randn(2, 8), None)
    assert x.dtype == torch.float32 and [stream.dtype for stream in out] == [torch.bfloat16] * 2


def test_a_bfloat16_model_tells_all_steps_apart():
    """A step is turned into its embedding before it is rounded: bfloat16 knows no 999, only 1000."""
    model, seen = trained().bfloat16(), []
    model.time_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents, _, text, pose, face = inputs()
    model(latents, torch.tensor([999, 257]), text, pose, face)
    assert torch.equal(seen[0], sinusoid(torch.tensor([999, 257]), 96).bfloat16())


def test_a_fresh_model_starts_at_nothing():
    """adaLN and the output at zero, as DiT starts: every block is the identity, v is 0."""
    model = DiT(CONFIG)
    latents, step, text, pose, face = inputs()
    v, tokens = model(latents, step, text, pose, face, tap=3)
    assert not v.any() and torch.equal(tokens, model.embed(latents, step, text, pose, face)[0])


@pytest.mark.parametrize("name, heads", [("cogvideox1.5-5b", 48), ("toy", 4)])
def test_presets_have_heads_of_64(name, heads):
    """No parameter's shape tells a wrong number of heads."""
    config = DIT_PRESETS[name]
    assert config.num_heads == heads and config.dim // config.num_heads == 64


def test_rotation_is_in_float32_and_rounded_once():
    """bfloat16 has 8 bits: an angle's cosine rounded first would shift far tokens by a place."""
    x, (cos, sin) = torch.randn(1, 2, 30, 32).bfloat16(), rope_table(0, (2, 3, 5), 32, "cpu")
    assert torch.equal(rotate(x, (cos, sin)), rotate(x.double(), (cos, sin)).bfloat16())


def test_epsilons_are_cogvideox():
    """1e-6 where q and k are normalised, 1e-5 elsewhere: too small a difference for outputs of random networks."""
    norms = {name: m.eps for name, m in DiT(CONFIG).named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {eps for name, eps in norms.items() if name.endswith(("norm_q", "norm_k"))} == {1e-6}
    assert {eps for name, eps in norms.items() if not name.endswith(("norm_q", "norm_k"))} == {1e-5}
