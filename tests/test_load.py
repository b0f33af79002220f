"""Weights in and out: the full-size models' every key and shape, refusals on the command line, our own files, memory.

Outputs of loaded networks are compared with diffusers and transformers in test_parity.py.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import load_cogvideox
from load_cogvideox import (
    check_dit,
    CUE_NAMES,
    T5_ALIAS,
    dit_config,
    dit_name,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    load_weights,
    read_header,
    save_weights,
    t5_config,
    t5_name,
    vae_config,
    vae_name,
)
from model import DIT_PRESETS, DiT
from text import T5_PRESETS, T5Encoder
from vae import VAE_PRESETS, CausalVAE

diffusers = pytest.importorskip(
    "diffusers", reason="the source format is diffusers': pip install -r requirements-dev.txt"
)
transformers = pytest.importorskip(
    "transformers", reason="the source format is transformers': pip install -r requirements-dev.txt"
)

ROOT = Path(__file__).parent.parent


def their_transformer(heads=48, head_dim=64, layers=42, text_dim=4096, time_dim=512, **changes):
    fields = dict(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, in_channels=32, out_channels=16
    )
    fields |= dict(patch_size=2, patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True)
    fields |= dict(ofs_embed_dim=time_dim, time_embed_dim=time_dim, text_embed_dim=text_dim)
    fields |= dict(sample_frames=81, sample_height=96, sample_width=170)
    return diffusers.CogVideoXTransformer3DModel(**fields | changes)


def their_vae(channels=(128, 256, 256, 512), layers=3, groups=32):
    down, up = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=16,
        scaling_factor=0.7,
    )


def their_t5(vocab=32128, dim=4096, head_dim=64, ff_dim=10240, layers=24, heads=64):
    fields = dict(vocab_size=vocab, d_model=dim, d_kv=head_dim, d_ff=ff_dim, num_layers=layers, num_heads=heads)
    return transformers.T5EncoderModel(
        transformers.T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **fields)
    )


# ---- full size, without weights ------------------------------------------------------------------------------------

FULL = {
    "transformer": (their_transformer, DiT, DIT_PRESETS["cogvideox1.5-5b"], dit_config, dit_name, 1028, 5_571_594_880),
    "vae": (their_vae, CausalVAE, VAE_PRESETS["cogvideox1.5"], vae_config, vae_name, 436, 215_583_907),
    "text_encoder": (their_t5, T5Encoder, T5_PRESETS["t5-v1_1-xxl"], t5_config, t5_name, 219, 4_762_310_656),
}


@pytest.mark.parametrize("part", FULL)
def test_every_key_and_shape_of_the_full_model_maps_one_to_one(tmp_path, part):
    """On the meta device: their names -> ours is a bijection, shapes equal, and their config.json gives our preset.

    Catches a preset off by one number and a pattern that misses a layer which small test models do not have."""
    make, network, preset, read_config, to_ours, tensors, parameters = FULL[part]
    with torch.device("meta"):
        theirs, ours = make(), network(preset)
    source = {name: tuple(p.shape) for name, p in theirs.state_dict().items() if name != T5_ALIAS}
    target = {name: tuple(p.shape) for name, p in ours.named_parameters() if not re.fullmatch(CUE_NAMES, name)}
    mapped = {to_ours(name): shape for name, shape in source.items()}
    assert len(source) == len(mapped) == tensors
    assert mapped == target
    assert sum(torch.Size(shape).numel() for shape in target.values()) == parameters
    (theirs.save_config if part != "text_encoder" else theirs.config.save_pretrained)(tmp_path)
    assert read_config(tmp_path) == preset


def test_text_to_video_config_is_read_too(tmp_path):
    """CogVideoX1.5-5B (T2V): 16 input channels, no ofs embedding, 1024 tensors."""
    with torch.device("meta"):
        theirs = their_transformer(in_channels=16, ofs_embed_dim=None)
        theirs.save_config(tmp_path)
        config = dit_config(tmp_path)
        ours = DiT(config)
    assert config == replace(DIT_PRESETS["cogvideox1.5-5b"], in_channels=16, ofs=False)
    assert {dit_name(name) for name in theirs.state_dict()} == {
        n for n, _ in ours.named_parameters() if not re.fullmatch(CUE_NAMES, n)
    }
    assert len(theirs.state_dict()) == 1024


# ---- a small folder, whole and broken ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A whole small checkpoint in the hub's layout, its transformer in shards that split blocks. Read only."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("cogvideox")
    torch.manual_seed(0)
    models = {"transformer": their_transformer(3, 32, 2, 56, 40), "vae": their_vae((8, 16, 16, 24), 1, 4)}
    models["text_encoder"] = their_t5(64, 48, 8, 72, 2, 4)
    for name, model in models.items():
        for p in model.parameters():
            p.data = torch.randn(p.shape) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
        model.save_pretrained(folder / name, max_shard_size="300KB" if name == "transformer" else "1GB")
    (folder / "tokenizer").mkdir()
    (folder / "lines.txt").write_text("a woman in a red dress dances on a terrace\n" * 20)
    paths = dict(input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer/spiece"))
    SentencePieceTrainer.train(**paths, vocab_size=20, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "copy")


def command(folder) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "load_cogvideox.py", str(folder)], cwd=ROOT, capture_output=True, text=True)


def refusal(folder, monkeypatch, capsys) -> str:
    """What `python load_cogvideox.py FOLDER` says on stderr when it ends with exit code 2; any other end fails the test."""
    monkeypatch.setattr(sys, "argv", ["load_cogvideox.py", str(folder)])
    with pytest.raises(SystemExit) as end:
        load_cogvideox.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def edit_shard(path, change):
    """Rewrite one safetensors file with its dict of tensors changed."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(folder, name) -> Path:
    index = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    return folder / "transformer" / index["weight_map"][name]


def test_command_says_that_a_whole_folder_is_whole(whole):
    """Exit 0, one line a part with exact counts, nothing on stderr."""
    shards = list((whole / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    done = command(whole)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["transformer", "68"],
        ["vae", "244"],
        ["text_encoder", "21"],
        ["tokenizer", "whole"],
    ]
    count = sum(p.numel() for p in their_transformer(3, 32, 2, 56, 40).parameters())
    assert f"{count:,} parameters: all used, all filled, all shapes equal" in lines[0]


def test_command_refuses_without_a_traceback(folder):
    """As a subprocess once: exit 2, the parts that are whole on stdout, the fault on stderr."""
    (folder / "vae/config.json").unlink()
    done = command(folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and f"{folder}/vae/config.json: missing" in done.stderr
    assert "transformer" in done.stdout and "vae" not in done.stdout


Q = "transformer_blocks.1.attn1.to_q.weight"


def test_a_missing_tensor_is_named_with_the_closest_name_in_the_file(folder, monkeypatch, capsys):
    edit_shard(shard_of(folder, Q), lambda tensors: tensors.pop(Q))
    error = refusal(folder, monkeypatch, capsys)
    assert "0 tensors unused, 1 missing, 0 of another shape" in error
    assert "missing  blocks.1.attn.q.weight (96, 96), closest in the file: transformer_blocks.1.attn1." in error


def test_an_unused_tensor_is_named_with_the_closest_name_here(folder, monkeypatch, capsys):
    """A renamed tensor shows on both sides, each naming the other."""
    name = "transformer_blocks.1.attn1.to_query.weight"
    edit_shard(shard_of(folder, Q), lambda tensors: tensors.update({name: tensors.pop(Q)}))
    error = refusal(folder, monkeypatch, capsys)
    assert "1 tensors unused, 1 missing, 0 of another shape" in error
    assert f"unused   {name} (96, 96), closest here: blocks.1.attn.q.weight" in error
    assert f"missing  blocks.1.attn.q.weight (96, 96), closest in the file: {name}" in error


def test_an_extra_tensor_is_refused(folder, monkeypatch, capsys):
    """Nothing of a checkpoint is dropped in silence: a LoRA or a third layer's weight would be lost."""
    edit_shard(shard_of(folder, Q), lambda tensors: tensors.update({Q.replace("1", "2", 1): torch.zeros(96, 96)}))
    assert "1 tensors unused, 0 missing" in refusal(folder, monkeypatch, capsys)


def test_two_tensors_for_one_place_are_refused(folder, monkeypatch, capsys):
    """Both the old and the new spelling of a norm: whichever came last would win in silence."""
    name = "decoder.norm_out.norm_layer.weight"
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    edit_shard(path, lambda tensors: tensors.update({"decoder.norm_out.weight": tensors[name].clone()}))
    assert "1 tensors unused, 0 missing" in refusal(folder, monkeypatch, capsys)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder, monkeypatch, capsys):
    """Also a transposed one of the right size."""
    path, name = folder / "text_encoder/model.safetensors", "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    edit_shard(path, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    error = refusal(folder, monkeypatch, capsys)
    assert "0 tensors unused, 0 missing, 1 of another shape" in error
    assert f"shape    {name} is (72, 48), needs (48, 72)" in error


def test_a_foreign_checkpoint_is_refused_at_once_and_in_a_few_lines(whole, tmp_path, monkeypatch, capsys):
    """Every name wrong: ten of each side are shown, the rest counted. Catches a minute spent on closest names that nobody sees."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    for path in (folder / "transformer").glob("*.safetensors"):
        edit_shard(
            path, lambda tensors: [tensors.update({f"model.{name}": tensors.pop(name)}) for name in list(tensors)]
        )
    error = refusal(folder, monkeypatch, capsys)
    assert "68 tensors unused, 68 missing" in error
    assert error.count("unused   ") == error.count("missing  ") == 10 and "and 116 more" in error


def test_a_truncated_shard_is_named(folder, monkeypatch, capsys):
    path = shard_of(folder, Q)
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path}: not a whole safetensors file" in refusal(folder, monkeypatch, capsys)


def test_a_git_lfs_pointer_is_named(folder, monkeypatch, capsys):
    """What git clone leaves without git-lfs: 130 bytes of text with the right name."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n"
    weights, tokenizer = shard_of(folder, Q), folder / "tokenizer/spiece.model"
    weights.write_text(pointer), tokenizer.write_text(pointer)
    error = refusal(folder, monkeypatch, capsys)
    assert f"{weights}: not a whole safetensors file" in error and f"{tokenizer}: not a sentencepiece model" in error


def test_a_shard_that_the_index_names_but_is_not_there_is_named(folder, monkeypatch, capsys):
    path = shard_of(folder, Q)
    path.unlink()
    assert f"{path}: no such weights file" in refusal(folder, monkeypatch, capsys)


def test_shards_without_their_index_are_refused(folder, monkeypatch, capsys):
    next((folder / "transformer").glob("*.index.json")).unlink()
    assert (
        f"{folder}/transformer: {len(list((folder / 'transformer').glob('*.safetensors')))} .safetensors files and no index"
        in refusal(folder, monkeypatch, capsys)
    )


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_config_is_named_and_all_faults_come_at_once(folder, monkeypatch, capsys, part):
    (folder / part / "config.json").unlink()
    shutil.rmtree(folder / "tokenizer")
    error = refusal(folder, monkeypatch, capsys)
    assert f"{folder}/{part}/config.json: missing" in error and f"{folder}/tokenizer" in error


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize(
    "content, message", [('{"patch_size_t": 2', "not a whole JSON file"), ('{"patch_size_t": 2}', "no field")]
)
def test_a_broken_or_foreign_config_is_named(folder, monkeypatch, capsys, part, content, message):
    """Catches a bare KeyError or a JSON message without a file."""
    (folder / part / "config.json").write_text(content)
    assert f"{folder}/{part}/config.json: {message}" in refusal(folder, monkeypatch, capsys)


def test_a_1_0_model_is_refused_by_name(folder, monkeypatch, capsys):
    edit_json(folder / "transformer/config.json", patch_size_t=None)
    error = refusal(folder, monkeypatch, capsys)
    assert "patch_size_t is None, a CogVideoX 1.0 model; use CogVideoX1.5-5B-I2V" in error


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("transformer", "norm_eps", 1e-6),
        ("transformer", "use_learned_positional_embeddings", True),
        ("transformer", "activation_fn", "gelu"),
        ("vae", "temporal_compression_ratio", 8),
        ("text_encoder", "feed_forward_proj", "relu"),
    ],
)
def test_a_setting_that_this_network_does_not_implement_is_refused(folder, monkeypatch, capsys, part, field, value):
    """Keys and shapes would all agree and every output be wrong."""
    edit_json(folder / part / "config.json", **{field: value})
    assert f"{part}/config.json: {field} is {value!r}, but this implementation" in refusal(folder, monkeypatch, capsys)


def test_a_missing_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    assert (
        refusal(tmp_path / "nowhere", monkeypatch, capsys) == f"load_cogvideox.py: {tmp_path}/nowhere: no such folder\n"
    )


# ---- loading -------------------------------------------------------------------------------------------------------

LOADERS = [load_transformer, load_vae, load_text_encoder]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_loading_casts_every_tensor_and_leaves_none_on_meta(whole, load, dtype):
    network = load(whole, dtype)
    assert {p.dtype for p in network.parameters()} == {dtype or torch.float32}
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    wide = load(whole)
    names = [name for name, _ in network.named_parameters() if not re.fullmatch(CUE_NAMES, name)]
    for name in names:  # the mask channel of the cue embeddings is drawn anew
        assert torch.equal(network.get_parameter(name), wide.get_parameter(name).to(dtype or torch.float32))


def test_loading_keeps_the_files_dtype(folder):
    """bfloat16 on the hub stays bfloat16; dtype None does not mean float32."""
    for path in (folder / "transformer").glob("*.safetensors"):
        edit_shard(path, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert {p.dtype for p in load_transformer(folder).parameters()} == {torch.bfloat16}


def test_frozen_networks_are_frozen_and_the_transformer_trains(whole):
    for load in (load_vae, load_text_encoder):
        network = load(whole)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert all(p.requires_grad for p in load_transformer(whole).parameters())


def test_loaded_vae_weights_are_channels_last(whole):
    """Assignment takes the file's layout over; catches a loader that forgets to lay them out anew."""
    for p in load_vae(whole).parameters():
        if p.ndim >= 4:
            assert p.is_contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)


def cue_inputs(config):
    torch.manual_seed(5)
    pose, face = 100 * torch.randn(2, 1, 2, config.cue_channels, 6, 4)
    return (
        torch.randn(1, 2, config.in_channels, 6, 4),
        torch.tensor([321]),
        torch.randn(1, 7, config.text_dim),
        pose,
        face,
    )


@pytest.mark.parametrize("injection", ["cuefusion", "cross", "concat"])
def test_a_loaded_model_with_cues_equals_cogvideox_bit_for_bit(whole, injection):
    """Its new layers were made on the meta device: each must be given real values, LayerNorm weights of 1 among them."""
    model = load_transformer(whole, cue_injection=injection)
    assert model.config.cue_injection == injection
    latents, step, text, pose, face = cue_inputs(model.config)
    with torch.no_grad():
        plain = model(latents, step, text)
        assert plain.std() > 0.1
        assert torch.equal(model(latents, step, text, pose, face), plain)
    assert not any(p.is_meta for p in model.parameters())
    for block in model.blocks if injection != "concat" else ():
        for norm in (block.cues.norm_pose, block.cues.norm_face):
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
    if injection == "cross":
        scale = model.config.dim**-0.5  # PyTorch's own initialisation: uniform up to 1/sqrt(D)
        layers = [
            layer for block in model.blocks for layer in (block.cues.attn.q, block.cues.attn.k, block.cues.attn.v)
        ]
        assert all(0.4 * scale < layer.weight.std() < 0.7 * scale for layer in layers)


def test_load_transformer_makes_the_cue_layers_of_a_fresh_model(whole):
    model = load_transformer(whole)
    with torch.no_grad():
        latents, step, text, pose, face = cue_inputs(model.config)
        assert torch.equal(model(latents, step, text, pose, face), model(latents, step, text))
    for block in model.blocks:
        scale_p, shift_p, gate_p, scale_f, shift_f, gate_f = block.cues.mlp.bias.chunk(6)
        assert (scale_p == -1).all() and (scale_f == -1).all()
        assert not any(part.any() for part in (shift_p, gate_p, shift_f, gate_f, block.cues.mlp.weight))
        assert (block.cues.norm_pose.weight == 1).all() and not block.cues.norm_pose.bias.any()
    for embed in (model.pose_embed, model.face_embed):
        mine, trunk = embed.weight.unflatten(1, (17, 8)), model.patch_embed.weight.unflatten(1, (32, 8))
        assert (
            torch.equal(mine[:, :16], trunk[:, :16])
            and mine[:, 16].any()
            and torch.equal(embed.bias, model.patch_embed.bias)
        )


def test_load_tokenizer_reads_the_folders_tokenizer(whole):
    assert load_tokenizer(whole)([""])[0, :2].tolist() == [1, 0]


# ---- our own files -------------------------------------------------------------------------------------------------


def small(network_class):
    presets = {DiT: DIT_PRESETS, CausalVAE: VAE_PRESETS}
    config = presets[network_class]["tiny"] if network_class in presets else replace(T5_PRESETS["tiny"], vocab=40)
    network = network_class(config)
    for p in network.parameters():
        p.data = torch.randn_like(p)
    return network


@pytest.mark.parametrize("network_class", [DiT, CausalVAE, T5Encoder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_files_round_trip_bit_for_bit_with_their_header(tmp_path, network_class, dtype):
    network = small(network_class).to(dtype)
    path = tmp_path / "model.safetensors"
    save_weights(path, network, preset="tiny", stage=2, step=1200)
    loaded, header = load_weights(path, config=network.config)
    assert type(loaded) is network_class and loaded.config == network.config
    assert [header[k] for k in ("network", "preset", "stage", "step")] == [network_class.__name__, "tiny", 2, 1200]
    assert header == read_header(path)
    ours, theirs = dict(loaded.named_parameters()), dict(network.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in ours)


def test_our_files_can_be_written_and_read_in_another_dtype(tmp_path):
    network = small(DiT)
    save_weights(tmp_path / "half.safetensors", network, dtype=torch.bfloat16)
    assert {p.dtype for p in load_weights(tmp_path / "half.safetensors")[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_weights(tmp_path / "half.safetensors", torch.float32)[0].parameters()} == {
        torch.float32
    }
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_loaded_vae_of_ours_is_channels_last(tmp_path):
    save_weights(tmp_path / "vae.safetensors", small(CausalVAE))
    for p in load_weights(tmp_path / "vae.safetensors")[0].parameters():
        if p.ndim >= 4:
            assert p.is_contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)


def one_sentence(error, *parts):
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


def test_a_config_that_differs_is_refused_by_field(tmp_path):
    """Both values are named. Catches loading a toy checkpoint into another network."""
    path = tmp_path / "model.safetensors"
    save_weights(path, small(DiT))
    with pytest.raises(ValueError, match="depth is 2, but 3 is needed") as error:
        load_weights(path, config=replace(DIT_PRESETS["tiny"], depth=3))
    one_sentence(error, path)
    with pytest.raises(ValueError, match="holds a DiT") as error:
        load_weights(path, config=VAE_PRESETS["tiny"])
    one_sentence(error, path)


def test_files_that_are_not_ours_are_refused_in_one_sentence(tmp_path, whole):
    """A foreign safetensors file, a text file, a cut-off one, a folder, none at all."""
    foreign = whole / "vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="no DirectAnimator header") as error:
        load_weights(foreign)
    one_sentence(error, foreign)
    text, cut, empty = tmp_path / "text.safetensors", tmp_path / "cut.safetensors", tmp_path / "empty.safetensors"
    save_weights(cut, small(DiT))
    cut.write_bytes(cut.read_bytes()[:-1]), text.write_text("not weights"), empty.touch()
    for path in (text, cut, empty):
        with pytest.raises(ValueError, match="not a whole safetensors file") as error:
            load_weights(path)
        one_sentence(error, path)
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="no such weights file") as error:
            load_weights(path)
        one_sentence(error, path)


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(load_cogvideox, "FORMAT", 2)
    save_weights(tmp_path / "new.safetensors", small(DiT))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="weights format 2, this version reads format 1") as error:
        load_weights(tmp_path / "new.safetensors")
    one_sentence(error)


def test_weights_that_do_not_fit_their_own_config_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, small(DiT))
    metadata = {"directanimator": json.dumps(read_header(path))}
    tensors = load_file(path)
    del tensors["blocks.1.cues.mlp.bias"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="missing  blocks.1.cues.mlp.bias"):
        load_weights(path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file_whole_and_nothing_else(tmp_path, monkeypatch, stop):
    """Ctrl-C or a full disk half way through writing. Catches writing in place."""
    path, old = tmp_path / "model.safetensors", small(DiT)
    save_weights(path, old, step=1)

    def half(tensors, to, metadata):
        Path(to).write_bytes(b"half a file")
        raise stop("no space left on device")

    monkeypatch.setattr(load_cogvideox, "save_file", half)
    with pytest.raises(stop):
        save_weights(path, small(DiT), step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    loaded, header = load_weights(path)
    assert header["step"] == 1 and torch.equal(loaded.patch_embed.weight, old.patch_embed.weight)


def test_weights_in_use_survive_a_save_to_their_own_file(tmp_path):
    """Loaded tensors are maps of the file: saving over it must not change or kill them."""
    path = tmp_path / "model.safetensors"
    network = small(DiT)
    save_weights(path, network)
    loaded, _ = load_weights(path)
    save_weights(path, small(DiT))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters()))
    with torch.no_grad():
        loaded.patch_embed.weight.zero_()  # training in place touches memory, not the file
    assert load_weights(path)[0].patch_embed.weight.any()


# ---- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
from load_cogvideox import load_text_encoder

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 2**20

before, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
start = time.time()
t5 = load_text_encoder(sys.argv[1], dtype=torch.bfloat16)
seconds = time.time() - start
running = False
thread.join()
size = sum(p.numel() * p.element_size() for p in t5.parameters()) / 2**30
print(f"{size:.3f} {before:.3f} {peak:.3f} {seconds:.0f}")
"""


@pytest.mark.slow
def test_full_size_fp32_t5_loads_as_bf16_without_a_second_copy(tmp_path):
    """19 GB of float32 on disk: peak anonymous memory is the finished module plus less than 1.5 GiB. Needs 20 GB of free disk.

    Catches reading a whole shard, or the whole model, before casting: 16 GB machines could then not load it."""
    if shutil.disk_usage(tmp_path).free < 22e9:
        pytest.skip(f"{tmp_path} has less than 22 GB free")
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    try:
        with torch.device("meta"):
            theirs = their_t5()
        theirs.config.save_pretrained(folder)
        files = {}
        for name, p in theirs.state_dict().items():
            if name != T5_ALIAS:
                block = re.search(r"block\.(\d+)\.", name)
                files.setdefault(f"model-{int(block[1]) // 6 if block else 4}.safetensors", {})[name] = p.shape
        for file, shapes in files.items():  # four shards of six blocks, 4.6 GB each, and one of the rest
            save_file({name: torch.empty(shape).uniform_(-1, 1) for name, shape in shapes.items()}, folder / file)
        weight_map = {name: file for file, shapes in files.items() for name in shapes}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        size, before, peak, seconds = (float(v) for v in done.stdout.split())
        print(
            f"T5 XXL: {size:.2f} GiB finished, peak anonymous {peak:.2f} GiB ({before:.2f} before loading), {seconds:.0f} s"
        )
        assert size == pytest.approx(4_762_310_656 * 2 / 2**30, abs=1e-3)
        assert peak <= size + 1.5
    finally:
        shutil.rmtree(tmp_path)


def test_a_model_gets_the_cues_that_it_was_trained_with(tmp_path):
    """Location and Face Cue are in the header; a file without them, or a face in place of centred, passes."""
    save_weights(tmp_path / "plain.safetensors", DiT(DIT_PRESETS["tiny"]), preset="tiny", stage="2", step=1)
    save_weights(tmp_path / "hard.safetensors", DiT(DIT_PRESETS["tiny"]), preset="tiny", location="hard", face="none")
    width = DIT_PRESETS["tiny"].text_dim
    check_dit(tmp_path / "plain.safetensors", width, "none", "none")
    assert check_dit(tmp_path / "hard.safetensors", width, "hard", "none")["location"] == "hard"
    with pytest.raises(ValueError, match="was trained with --location hard, not soft"):
        check_dit(tmp_path / "hard.safetensors", width, "soft", "none")
    with pytest.raises(ValueError, match=r"was trained with --face none, not centered.*sample.py: --face-cue none"):
        check_dit(tmp_path / "hard.safetensors", width, "hard", "inplace")


@pytest.mark.parametrize("header", [{}, {"network": "Nothing"}, {"config": 5}, {"config": {"width": 3}}, []])
def test_a_damaged_header_is_named(tmp_path, header):
    path, whole = tmp_path / "w.safetensors", tmp_path / "whole.safetensors"
    save_weights(whole, small(DiT), preset="tiny", stage="1", step=1)
    bad = read_header(whole) | header if header else header
    save_file({"a": torch.zeros(1)}, path, {"directanimator": json.dumps(bad)})
    with pytest.raises(ValueError, match="w.safetensors: a damaged header"):
        read_header(path)
