"""The real sizes on a small machine: random bfloat16 weights in the hub's layout, read and run by sample.py (21 GB of disk).

pytest -m slow tests/test_full_size.py -s
"""

import json
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

import finder
import toy
from video import Video, write_image, write_video

from conftest import ROOT

pytestmark = pytest.mark.slow

TRANSFORMER = dict(
    num_attention_heads=48, attention_head_dim=64, num_layers=42, in_channels=32, out_channels=16, patch_size=2, patch_size_t=2,
    patch_bias=False, ofs_embed_dim=512, time_embed_dim=512, text_embed_dim=4096, max_text_seq_length=226, sample_frames=81,
    sample_height=300, sample_width=300, use_rotary_positional_embeddings=True,
)  # fmt: skip
VAE = dict(
    block_out_channels=(128, 256, 256, 512), layers_per_block=3, latent_channels=16, norm_num_groups=32, scaling_factor=0.7,
    down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
)  # fmt: skip
T5 = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)  # fmt: skip


def reference_models():
    """diffusers' and transformers' own full-size networks, without memory."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return {
            "transformer": diffusers.CogVideoXTransformer3DModel(**TRANSFORMER),
            "vae": diffusers.AutoencoderKLCogVideoX(**VAE),
            "text_encoder": transformers.T5EncoderModel(transformers.T5Config(**T5)),
        }


def write_random_checkpoint(folder, dtype=torch.bfloat16, shard_bytes=2 * 2**30):
    """A CogVideoX1.5-5B-I2V repository of random weights: every name, shape and file as on the hub, shards of 2 GiB."""
    generator = torch.Generator().manual_seed(0)
    for part, model in reference_models().items():
        (folder / part).mkdir(parents=True)
        if part == "text_encoder":
            (folder / part / "config.json").write_text(json.dumps(model.config.to_dict()))
        else:
            model.save_config(folder / part)
        shards, shard, size = [], {}, 0
        tensors = {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}

        def flush():
            name = f"model-{len(shards) + 1:05d}.safetensors"
            save_file(shard, folder / part / name)
            shards.append((name, list(shard)))

        for name, tensor in tensors.items():
            value = torch.empty(tensor.shape, dtype=dtype)
            if tensor.ndim > 1:
                value.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
            if size and size + value.nbytes > shard_bytes:
                flush()
                shard, size = {}, 0
            shard[name], size = value, size + value.nbytes
        flush()
        weight_map = {name: file for file, names in shards for name in names}
        (folder / part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def run_watched(command) -> tuple[str, float, float]:
    """Run a command; returns what it printed, its peak anonymous memory in GiB (files mapped from disk do not count), seconds."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as status:
                peak = max([peak] + [int(line.split()[1]) for line in status if line.startswith("RssAnon")])
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.05)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    return printed, peak / 2**20, time.perf_counter() - began


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A backbone of random weights, a drawn reference and a driving clip of 9 frames at 256x256, with their masks."""
    folder = tmp_path_factory.mktemp("full")
    write_random_checkpoint(folder / "backbone")
    clip, other = toy.render(1, 2, frames=9, size=256), toy.render(3, 4, frames=1, size=256)
    write_image(folder / "ref.png", other.video[0])
    write_image(folder / "ref_mask.png", finder.paint_mask(other.body[0], other.face[0]))
    write_video(folder / "drive.mp4", clip.video, Fraction(16))
    (folder / "masks").mkdir()
    for i, (body, face) in enumerate(zip(clip.body, clip.face)):
        write_image(folder / "masks" / f"{i}.png", finder.paint_mask(body, face))
    yield folder
    shutil.rmtree(folder)  # 21 GB, which pytest would keep


@pytest.mark.parametrize("flags, gib", [([], 16), (["--offload"], 8)])
def test_full_size_networks_animate_in_little_memory(inputs, tmp_path, flags, gib):
    """T5-XXL, the 5.97 B parameter DiT and the VAE, one after another, 9 frames at 256x256, 2 steps with guidance, bfloat16."""
    words = ["ref.png", "drive.mp4", "--backbone", "backbone", "--masks", "masks", "--reference-mask", "ref_mask.png"]
    command = [sys.executable, "sample.py", *(w if w.startswith("-") else inputs / w for w in words), *flags]
    command += ["--area", 256 * 256, "--steps", 2, "--dtype", "bfloat16", "--device", "cpu"]
    _, peak, seconds = run_watched([*command, "--cache", tmp_path / "cache", "-o", tmp_path / "out.mp4"])
    how = " ".join(["full size, 9 frames at 256x256, 2 steps", *flags])
    print(f"\n{how}: peak anonymous memory {peak:.2f} GiB, {seconds:.0f} s")
    frames = list(Video(tmp_path / "out.mp4"))
    assert len(frames) == 9 and frames[0].shape == (256, 256, 3)
    assert peak < gib
