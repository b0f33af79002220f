"""Weights in and out: Hugging Face checkpoint folders of CogVideoX1.5 and our own files, both strictly.

Every tensor of the source must be used, every tensor of the network filled, every shape equal; otherwise one error
lists both sides and the closest names. Tensors are read one at a time from memory-mapped files and cast as they come,
so that loading needs no second copy of the model; a block may straddle two shards.

    python load_cogvideox.py DIR        # check a copy of CogVideoX1.5-5B-I2V: every key, every shape, no weights read
"""

import difflib
import json
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import DiT, DiTConfig
from text import T5Config, T5Encoder, Tokenizer
from vae import CausalVAE, VAEConfig
from video import Parser, atomic

FORMAT = 1  # of our own weights files
KINDS = {"DiT": (DiT, DiTConfig), "CausalVAE": (CausalVAE, VAEConfig), "T5Encoder": (T5Encoder, T5Config)}

# Names on the hub -> names here, as whole-name patterns. Nothing is split, fused or transposed: each tensor maps to one.
DIT_NAMES = [
    (r"patch_embed\.proj\.(.*)", r"patch_embed.\1"),
    (r"patch_embed\.text_proj\.(.*)", r"text_embed.\1"),
    (r"(time|ofs)_embedding\.linear_1\.(.*)", r"\1_embed.0.\2"),
    (r"(time|ofs)_embedding\.linear_2\.(.*)", r"\1_embed.2.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_(q|k|v)\.(.*)", r"blocks.\1.attn.\2.\3"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.(.*)", r"blocks.\1.attn.out.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.(norm_[qk]\..*)", r"blocks.\1.attn.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(.*)", r"blocks.\1.ff.0.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(.*)", r"blocks.\1.ff.2.\2"),
    (r"transformer_blocks\.(\d+)\.(norm[12]\..*)", r"blocks.\1.\2"),
    (r"((?:norm_final|norm_out|proj_out)\..*)", r"\1"),
]
CUE_NAMES = r"pose_embed\..*|face_embed\..*|blocks\.\d+\.cues\..*"  # ours alone: no CogVideoX file has them

VAE_NAMES = [
    (r"(.*\.(?:norm[12]|norm_out))\.norm_layer\.(.*)", r"\1.norm.\2"),  # the decoder's, with conv_y and conv_b
    (r"(.*\.(?:norm[12]|norm_out))\.(conv_[yb])\.conv\.(.*)", r"\1.\2.\3"),
    (r"(.*\.(?:norm[12]|norm_out))\.(weight|bias)", r"\1.norm.\2"),
    (r"(.*)\.conv_shortcut\.(.*)", r"\1.shortcut.\2"),
    (r"(.*)\.(?:down|up)samplers\.0\.conv\.(.*)", r"\1.resample.conv.\2"),
    (r"(.*\.(?:conv1|conv2|conv_in|conv_out))\.conv\.(.*)", r"\1.\2"),
]
VAE_PREFIXES = [
    (r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.levels.\2.blocks.\3"),
    (r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resample", r"\1.levels.\2.resample"),
    (r"(encoder|decoder)\.mid_block\.resnets\.(\d+)", r"\1.mid.blocks.\2"),
]

T5_NAMES = [
    (r"shared\.weight", "embed.weight"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "bias.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.(q|k|v)\.weight", r"blocks.\1.\2.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.o\.weight", r"blocks.\1.out.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.gate.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.up.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.down.weight"),
    (r"encoder\.final_layer_norm\.weight", "norm_out.weight"),
]
T5_ALIAS = "encoder.embed_tokens.weight"  # some files store the embedding twice


def rename(name: str, patterns: list[tuple[str, str]]) -> str | None:
    for pattern, target in patterns:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, target, name)
    return None


def dit_name(name: str) -> str | None:
    return rename(name, DIT_NAMES)


def vae_name(name: str) -> str | None:
    name = rename(name, VAE_NAMES)
    for pattern, prefix in VAE_PREFIXES if name else ():
        name = re.sub(pattern, prefix, name)
    return name


def t5_name(name: str) -> str | None:
    return rename(name, T5_NAMES)


# ---- config.json -> our config -------------------------------------------------------------------------------------


class Config(dict):
    """The fields of a config.json; asking for one that it does not have names the file."""

    def __init__(self, path: Path):
        super().__init__(read_json(path))
        self.path = path

    def __missing__(self, name):
        raise ValueError(f"{self.path}: no field {name}; FOLDER is a local copy of a CogVideoX1.5 repository")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); get it or make it again") from None


def read_config(folder: Path, fixed: dict) -> Config:
    """The folder's config.json, whose `fixed` fields must have the values that these networks implement."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; FOLDER is a local copy of a CogVideoX1.5 repository with {folder.name}/ in it"
        )
    config = Config(path)
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name} is {config[name]!r}, but this implementation is CogVideoX1.5's: {name}={value!r}"
            )
    return config


def dit_config(folder: Path) -> DiTConfig:
    fixed = {
        "patch_size": 2,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": False,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_eps": 1e-5,
        "norm_elementwise_affine": True,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    c = read_config(folder, fixed)
    if c.get("patch_size_t") != 2:
        raise ValueError(
            f"{folder}/config.json: patch_size_t is {c.get('patch_size_t')}, a CogVideoX 1.0 model; use CogVideoX1.5-5B-I2V"
        )
    if c.get("ofs_embed_dim") not in (None, c["time_embed_dim"]):
        raise ValueError(
            f"{folder}/config.json: ofs_embed_dim {c['ofs_embed_dim']} must equal time_embed_dim {c['time_embed_dim']}"
        )
    return DiTConfig(
        dim=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        num_heads=c["num_attention_heads"],
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        text_dim=c["text_embed_dim"],
        time_dim=c["time_embed_dim"],
        ofs=bool(c.get("ofs_embed_dim")),
        cue_channels=c["out_channels"] + 1,
        cue_injection="cuefusion",
    )


def vae_config(folder: Path) -> VAEConfig:
    c = read_config(folder, {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "temporal_compression_ratio": 4})
    return VAEConfig(
        channels=tuple(c["block_out_channels"]),
        layers=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        norm_groups=c["norm_num_groups"],
        scaling_factor=c["scaling_factor"],
        norm_eps=c["norm_eps"],
    )


def t5_config(folder: Path) -> T5Config:
    c = read_config(folder, {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6})
    return T5Config(
        vocab=c["vocab_size"],
        dim=c["d_model"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        ff_dim=c["d_ff"],
        depth=c["num_layers"],
        buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
    )


# ---- strict loading ------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    """The folder's safetensors files: those its index names, or the only one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return [folder / name for name in sorted(set(read_json(indices[0])["weight_map"].values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder}: {len(files)} .safetensors files and no index among them; download the folder again"
        )
    return files


def open_weights(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from None


def compare(title: str, source: dict[str, tuple], target: dict[str, tuple], names: dict[str, str | None]) -> None:
    """Raise ValueError listing unused, missing and misshapen tensors with the closest names, unless all agree one to one.

    source: name -> shape on disk; target: name -> shape in the network; names: disk name -> network name.
    """
    reverse = {ours: theirs for theirs, ours in names.items()}
    unused = [name for name in source if names[name] not in target or reverse[names[name]] != name]
    missing = [name for name in target if name not in reverse]
    misshapen = [
        (theirs, ours) for ours, theirs in reverse.items() if ours in target and source[theirs] != target[ours]
    ]

    def closest(name, among):
        return (difflib.get_close_matches(name, among, n=1, cutoff=0) or ["nothing"])[0]

    # finding the closest names is slow: only for what is shown
    lines = [
        f"  unused   {name} {source[name]}, closest here: {closest(names[name] or name, missing or target)}"
        for name in unused[:10]
    ]
    lines += [
        f"  missing  {name} {target[name]}, closest in the file: {closest(name, unused or source)}"
        for name in missing[:10]
    ]
    lines += [f"  shape    {theirs} is {source[theirs]}, needs {target[ours]}" for theirs, ours in misshapen[:10]]
    more = len(unused) + len(missing) + len(misshapen) - len(lines)
    if lines:
        shown = "\n".join(lines + [f"  and {more} more"] * (more > 0))
        raise ValueError(
            f"{title}: {len(unused)} tensors unused, {len(missing)} missing, {len(misshapen)} of another shape\n{shown}"
        )


def check_files(folder: Path, network: nn.Module, to_ours, optional: str = r"$^", ignore: tuple = ()) -> list[tuple]:
    """(file, name on disk, name here) of every tensor, after `compare`; only headers are read. `network` may be on meta."""
    plan, source = [], {}
    for path in shards(folder):
        with open_weights(path) as file:
            for name in file.keys():
                if name not in ignore:
                    source[name] = tuple(file.get_slice(name).get_shape())
                    plan.append((path, name, to_ours(name)))
    target = {name: tuple(p.shape) for name, p in network.named_parameters() if not re.fullmatch(optional, name)}
    compare(str(folder), source, target, {name: to_ours(name) for name in source})
    return plan


def fill(network: nn.Module, plan: list[tuple], dtype: torch.dtype | None) -> None:
    """Put the planned tensors into a network on the meta device, one by one."""
    parameters = dict(network.named_parameters())
    for path in dict.fromkeys(path for path, _, _ in plan):
        with open_weights(path) as file:
            for _, theirs, ours in (entry for entry in plan if entry[0] == path):
                tensor = file.get_tensor(theirs)  # memory-mapped: a cast is the only copy
                module, _, leaf = ours.rpartition(".")
                parameter = nn.Parameter(tensor.to(dtype or tensor.dtype), parameters[ours].requires_grad)
                setattr(network.get_submodule(module), leaf, parameter)


def load_transformer(folder: str | Path, dtype: torch.dtype | None = None, cue_injection: str = "cuefusion") -> DiT:
    """CogVideoX1.5's transformer with freshly made cue layers, which leave its output unchanged.

    folder: a local copy of the Hugging Face repository (with transformer/ in it). dtype None keeps the file's
    (bfloat16 on the hub). Raises FileNotFoundError or ValueError: see `compare`.
    """
    folder = Path(folder) / "transformer"
    with torch.device("meta"):
        model = DiT(replace(dit_config(folder), cue_injection=cue_injection))
    fill(model, check_files(folder, model, dit_name, optional=CUE_NAMES), dtype)
    add_cues(model)
    return model


def add_cues(model: DiT) -> None:
    """Give real memory to cue layers that are still on the meta device, and initialise them."""
    like = model.patch_embed.weight
    for part in [
        model.pose_embed,
        model.face_embed,
        *(block.cues for block in model.blocks if block.cues is not None),
    ]:
        part.to_empty(device=like.device).to(like.dtype)
        for layer in (m for m in part.modules() if hasattr(m, "reset_parameters")):
            layer.reset_parameters()
    model.init_cues()


def load_vae(folder: str | Path, dtype: torch.dtype | None = None) -> CausalVAE:
    """The causal VAE of FOLDER/vae (float32 on the hub), frozen, in eval mode."""
    folder = Path(folder) / "vae"
    with torch.device("meta"):
        vae = CausalVAE(vae_config(folder))
    fill(vae, check_files(folder, vae, vae_name), dtype)
    return vae.channels_last().requires_grad_(False).eval()


def load_text_encoder(folder: str | Path, dtype: torch.dtype | None = None) -> T5Encoder:
    """The T5 encoder of FOLDER/text_encoder (float32 on the hub), frozen, in eval mode."""
    folder = Path(folder) / "text_encoder"
    with torch.device("meta"):
        t5 = T5Encoder(t5_config(folder))
    fill(t5, check_files(folder, t5, t5_name, ignore=(T5_ALIAS,)), dtype)
    return t5.requires_grad_(False).eval()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    return Tokenizer(Path(folder) / "tokenizer")


# ---- our own files: safetensors with a JSON header -----------------------------------------------------------------


def save_weights(
    path: str | Path,
    network: nn.Module,
    state: dict | None = None,
    dtype: torch.dtype | None = None,
    **header,
) -> None:
    """Write a network's weights, or other tensors of the same names, with its config and a header (preset, stage, step, ...)."""
    path = Path(path)
    state = dict(network.named_parameters()) if state is None else state
    state = {name: p.detach().to("cpu", dtype or p.dtype).contiguous() for name, p in state.items()}
    kind = next(name for name, (cls, _) in KINDS.items() if isinstance(network, cls))  # FSDP2 renames classes
    header = {"format": FORMAT, "network": kind, "config": asdict(network.config)} | header
    try:
        with atomic(path) as part:
            save_file(state, part, metadata={"directanimator": json.dumps(header)})
    except SafetensorError as error:  # a full disk: no OSError of its own
        raise OSError(f"{path} cannot be written ({error})") from None


def stored_config(header: dict) -> DiTConfig | VAEConfig | T5Config:
    """The sizes of the network that a file with this header holds."""
    _, config_class = KINDS[header["network"]]
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()})


def read_header(path: str | Path) -> dict:
    """The JSON header of one of our own weights files."""
    with open_weights(Path(path)) as file:
        header = (file.metadata() or {}).get("directanimator")
    if header is None:
        raise ValueError(
            f"{path}: no DirectAnimator header; give a weights file that train.py wrote, or a backbone folder with --backbone"
        )
    try:
        header = json.loads(header)
        if header["format"] != FORMAT:
            raise ValueError(f"{path}: weights format {header['format']}, this version reads format {FORMAT}")
        stored_config(header)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: a damaged header ({error}); make the file again") from None
    return header


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first; what a kill left half-written has a temporary name."""
    return sorted(run.glob("step-*[0-9]"))


def newest_weights(path: Path) -> Path:
    """A weights file as it is; a run folder's newest checkpoint, its moving average first."""
    steps = checkpoints(path) if path.is_dir() else []
    if path.is_file():
        return path
    if not steps:
        raise FileNotFoundError(f"{path}: no such weights file, and no run folder with a checkpoint in it")
    averaged = steps[-1] / "ema.safetensors"
    return averaged if averaged.is_file() else steps[-1] / "model.safetensors"


def check_dit(path: Path, text_dim: int, location: str | None = None, face: str | None = None) -> dict:
    """The header of a file or run folder. ValueError if it holds no DiT for text states of this width, or one that was
    trained with another Location Cue, or without the Face Cue that it would get."""
    header = read_header(newest_weights(path))
    if header["network"] != "DiT":
        raise ValueError(f"{path}: holds a {header['network']}, a DiT is needed: give stage 1 or 2")
    if not header["config"]["cue_channels"]:
        raise ValueError(f"{path}: holds a backbone, which knows no cues: give stage 1 or 2")
    if (width := header["config"]["text_dim"]) != text_dim:
        raise ValueError(
            f"{path}: reads text states {width} wide, these are {text_dim}: give the backbone it was trained on"
        )
    face = "centered" if face == "inplace" else face  # in place or not is a matter of the data
    for name, value in {"location": location, "face": face}.items():
        if value and header.get(name, value) != value:
            raise ValueError(
                f"{path} was trained with --{name} {header[name]}, not {value}: give the same (to sample.py: "
                f"--{name}-cue {header[name]})"
            )
    return header


def load_weights(
    path: str | Path, dtype: torch.dtype | None = None, config=None, depth: int | None = None
) -> tuple[nn.Module, dict]:
    """(network, header) from one of our own files, or a run folder's newest. With `config`, every field must agree with the file's.

    depth: build a DiT of only the first `depth` blocks; the tensors of the others are never read. A .pt file, a plain
    state dict, needs `config` and has an empty header. Raises FileNotFoundError or ValueError: see `compare`.
    """
    path = newest_weights(Path(path))
    if path.suffix in (".pt", ".pth"):
        if not isinstance(config, DiTConfig):
            raise ValueError(f"{path}: does not say how large its network is; give a .safetensors file or a run folder")
        return load_state_dict(path, dtype, config, depth), {}
    header = read_header(path)
    network_class, config_class = KINDS[header["network"]]
    stored = stored_config(header)
    if config and type(config) is not config_class:
        raise ValueError(f"{path}: holds a {header['network']}, which has no {type(config).__name__}")
    for name, value in asdict(config).items() if config else ():
        if getattr(stored, name) != value:
            raise ValueError(f"{path}: {name} is {getattr(stored, name)}, but {value} is needed")
    with torch.device("meta"):
        network = network_class(replace(stored, depth=depth) if depth else stored)
    with open_weights(path) as file:
        source = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys() if not beyond(n, depth)}
    compare(str(path), source, shapes(network), {name: name for name in source})
    fill(network, [(path, name, name) for name in source], dtype)
    return (network.channels_last() if isinstance(network, CausalVAE) else network), header


def load_state_dict(path: Path, dtype: torch.dtype | None, config: DiTConfig, depth: int | None) -> DiT:
    """A DiT of `config` from a .pt file: our names to tensors, alone or under "model"; loaded as weights only."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a file of weights only ({str(error).splitlines()[0]})") from None
    state = state.get("model", state) if isinstance(state, dict) else {}
    state = {name: value for name, value in state.items() if not beyond(name, depth)}
    with torch.device("meta"):
        network = DiT(replace(config, depth=depth) if depth else config)
    source = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    compare(str(path), source, shapes(network), {name: name for name in source})
    network.load_state_dict({n: t.to(dtype or t.dtype) for n, t in state.items()}, assign=True)
    return network


def beyond(name: str, depth: int | None) -> bool:
    """Whether a tensor belongs to a block after the first `depth`."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return bool(depth and block and int(block[1]) >= depth)


def shapes(network: nn.Module) -> dict[str, tuple]:
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


# ---- python load_cogvideox.py DIR ----------------------------------------------------------------------------------


def check(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    parts = [
        ("transformer", lambda f: DiT(dit_config(f)), dit_name, CUE_NAMES),
        ("vae", lambda f: CausalVAE(vae_config(f)), vae_name, r"$^"),
        ("text_encoder", lambda f: T5Encoder(t5_config(f)), t5_name, r"$^"),
    ]
    errors = []
    for name, build, to_ours, optional in parts:
        try:
            with torch.device("meta"):
                network = build(folder / name)
            plan = check_files(folder / name, network, to_ours, optional, ignore=(T5_ALIAS,))
            loaded = {ours for _, _, ours in plan}
            count = sum(p.numel() for n, p in network.named_parameters() if n in loaded)
            print(f"{name:13s} {len(plan):5d} tensors, {count:,} parameters: all used, all filled, all shapes equal")
        except (ValueError, OSError) as error:
            errors.append(str(error))
    try:
        load_tokenizer(folder)
        print("tokenizer     whole")
    except (ValueError, OSError) as error:
        errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))


def main():
    parser = Parser("Check a local copy of CogVideoX1.5-5B-I2V: every key, every shape.")
    parser.add_argument("folder", type=Path, help="the folder with transformer/, vae/, text_encoder/ and tokenizer/")
    args = parser.parse_args()
    try:
        check(args.folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
