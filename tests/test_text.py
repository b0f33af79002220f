"""T5 and its tokenizer: the position table, padding and truncation, bf16. Compared with transformers in test_parity.py."""

import math
import random

import pytest
import torch

from text import (
    EOS,
    PAD,
    T5_PRESETS,
    TEXT_LENGTH,
    UNKNOWN,
    RMSNorm,
    T5Config,
    T5Encoder,
    Tokenizer,
    bucket,
    empty_prompt,
)

CONFIG = T5Config(vocab=60, dim=40, num_heads=3, head_dim=16, ff_dim=56, depth=2)

# T5's bucket of every relative position (key minus query) from -140 to 140, by transformers 5.23.0, as (bucket, how often)
GOLDEN_BUCKETS = [(15, 50), (14, 27), (13, 18), (12, 14), (11, 9), (10, 7), (9, 4), (8, 4)]
GOLDEN_BUCKETS += [(b, 1) for b in (7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23)]
GOLDEN_BUCKETS += [(24, 4), (25, 4), (26, 7), (27, 9), (28, 14), (29, 18), (30, 27), (31, 50)]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A small sentencepiece model with T5's first three ids, trained on these lines."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "lines.txt").write_text(
        "a woman in a red dress dances on a terrace\nthe dancer turns and the dress follows\n" * 20
    )
    paths = dict(input=str(folder / "lines.txt"), model_prefix=str(folder / "spiece"))
    SentencePieceTrainer.train(**paths, vocab_size=28, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return folder


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def test_ids_are_pieces_then_the_end_mark_then_padding(spiece):
    """Exactly `length` of each prompt, int64, the folder or the file as path. Catches a missing end mark and left padding."""
    prompts = ["a woman dances", "", "the red dress " * 100]
    for path in (spiece, str(spiece / "spiece.model")):
        ids = Tokenizer(path)(prompts)
        assert ids.shape == (3, TEXT_LENGTH) == (3, 226) and ids.dtype == torch.int64
    pieces = Tokenizer(spiece).pieces(prompts[0])
    assert len(pieces) > 3 and ids[0].tolist() == pieces + [EOS] + [PAD] * (225 - len(pieces))


def test_long_prompts_keep_225_pieces_and_the_end_mark(spiece):
    """Truncation must not cut the end mark off; 225 pieces fit exactly, 226 do not."""
    tokenizer = Tokenizer(spiece)
    pieces = tokenizer.pieces("the red dress " * 100)
    assert len(pieces) > 226
    assert tokenizer(["the red dress " * 100])[0].tolist() == pieces[:225] + [EOS]
    for length in (1, 5, len(pieces), len(pieces) + 1, len(pieces) + 2):
        ids = tokenizer(["the red dress " * 100], length)[0].tolist()
        assert ids == (pieces[: length - 1] + [EOS] + [PAD])[:length]


def test_empty_prompt_is_the_tokenizers_and_needs_none(spiece):
    """The null text of guidance and dropout is the same whether a tokenizer is at hand or not."""
    assert torch.equal(Tokenizer(spiece)(["", " \n"]), empty_prompt().repeat(2, 1))
    assert empty_prompt().tolist() == [[EOS] + [PAD] * 225]
    assert empty_prompt().dtype == torch.int64


def test_marks_written_in_a_prompt_are_marks(spiece):
    """As in transformers: "</s>" in a prompt is the end mark's id, not four unknown letters."""
    tokenizer = Tokenizer(spiece)
    assert tokenizer.pieces("the</s>dress<pad><unk>") == [
        *tokenizer.pieces("the"),
        EOS,
        *tokenizer.pieces("dress"),
        PAD,
        UNKNOWN,
    ]


def test_odd_text_gives_transformers_ids(assets):
    """300 prompts of marks, spaces, controls, accents, ligatures, CJK and emoji in random order, with CogVideoX's own tokenizer."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5Tokenizer.from_pretrained(assets / "weights" / "tokenizer")
    atoms = [
        "</s>",
        "<pad>",
        "<unk>",
        "<s>",
        "<",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\x00",
        "\u202e",
    ]
    atoms += [
        "▁",
        "_",
        "a",
        "dancer",
        "The",
        "é",
        "e\u0301",
        "ß",
        "İ",
        "ﬁ",
        "½",
        "…",
        "“",
        "'",
        ".",
        "123",
        "日本",
        "💃🏽",
        "\ufffd",
    ]
    chosen = random.Random(0)
    prompts = ["".join(chosen.choices(atoms, k=chosen.randint(0, 9))) for _ in range(300)]
    expected = theirs(prompts, padding="max_length", max_length=226, truncation=True, return_tensors="pt").input_ids
    for prompt, a, b in zip(prompts, Tokenizer(assets / "weights" / "tokenizer")(prompts), expected):
        assert torch.equal(a, b), repr(prompt)


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere/spiece.model"])
def test_a_missing_tokenizer_is_named_in_one_sentence(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such tokenizer.*spiece.model") as error:
        Tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_tokenizer_is_named_in_one_sentence(tmp_path):
    """A cut-off download. Catches sentencepiece's own message, which names a C++ file instead."""
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x0fhalf a model")
    with pytest.raises(ValueError, match="not a sentencepiece model") as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ---- T5 ------------------------------------------------------------------------------------------------------------


def test_bucket_table_equals_the_golden_values():
    """All 281, and far beyond. Catches a swapped direction, an off-by-one at the logarithmic edges, a missing cap."""
    golden = [b for b, times in GOLDEN_BUCKETS for _ in range(times)]
    assert bucket(torch.arange(-140, 141), 32, 128).tolist() == golden
    assert bucket(torch.tensor([-5000, 5000]), 32, 128).tolist() == [15, 31]


def test_bucket_equals_a_loop():
    """T5's rule in plain Python, for its own table and another one: half the buckets a direction, half of these exact, then logarithmic."""
    for buckets, max_distance in ((32, 128), (16, 50)):
        half, exact = buckets // 2, buckets // 4
        for relative in range(-60, 61):
            distance = abs(relative)
            b = distance
            if distance >= exact:
                b = min(
                    exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (half - exact) + 1e-6),
                    half - 1,
                )
            expected = b + (half if relative > 0 else 0)
            assert bucket(torch.tensor([relative]), buckets, max_distance).item() == expected


def random_t5():
    t5 = T5Encoder(CONFIG).requires_grad_(False)
    for p in t5.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5)
    return t5


def test_padding_is_read_like_any_word():
    """CogVideoX masks nothing: the states of a prompt depend on how far it is padded. Catches a well-meant attention mask."""
    t5 = random_t5()
    prompt = torch.tensor([[7, 9, 11, EOS]])
    padded = torch.cat([prompt, torch.zeros(1, 9, dtype=torch.int64)], 1)
    assert (t5(padded)[:, :4] - t5(prompt)).abs().max() > 1e-2


def test_attention_has_no_scale_and_a_bias_by_direction():
    """softmax(q k + bias) v by loops in float64 for one block. Catches 1/sqrt(d), and key minus query turned round."""
    t5 = random_t5().double()
    block, L = t5.blocks[0], 5
    x = torch.randn(1, L, CONFIG.dim, dtype=torch.float64)
    seen = []
    block.out.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    table = t5.bias.weight
    bias = torch.stack(
        [torch.stack([table[bucket(torch.tensor(k - q), 32, 128)] for k in range(L)]) for q in range(L)]
    ).permute(2, 0, 1)
    block(x, bias)
    h = block.norm1(x)[0]
    q, k, v = ((h @ layer.weight.T).view(L, 3, 16) for layer in (block.q, block.k, block.v))
    for head in range(3):
        for i in range(L):
            dots = [sum(q[i, head, d] * k[j, head, d] for d in range(16)) for j in range(L)]
            weights = torch.stack([dots[j] + table[bucket(torch.tensor(j - i), 32, 128), head] for j in range(L)]).exp()
            weights = weights / weights.sum()
            expected = sum(weights[j] * v[j, head] for j in range(L))
            torch.testing.assert_close(seen[0][0, i, head * 16 : (head + 1) * 16], expected)


def test_the_encoder_gives_each_block_the_same_bias_by_key_minus_query():
    """Block 0 owns the table on disk, all blocks add it. Catches a transposed bias."""
    t5, seen = random_t5(), []
    for block in t5.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    t5(torch.randint(0, 60, (2, 7)))
    assert torch.equal(seen[0], seen[1]) and seen[0].shape == (3, 7, 7)
    assert torch.equal(seen[0][:, 2, 6], t5.bias.weight[20]) and torch.equal(seen[0][:, 6, 2], t5.bias.weight[4])


def test_rms_norm_equals_a_loop_and_squares_in_float32():
    """x / sqrt(mean x^2 + 1e-6) * weight, no mean taken off; in bf16 the squares of large states would lose their sum."""
    norm = RMSNorm(6).double()
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for b in range(2):
        for n in range(3):
            rms = math.sqrt(sum(v * v for v in x[b, n].tolist()) / 6 + 1e-6)
            assert norm(x)[b, n].tolist() == pytest.approx(
                [v / rms * w for v, w in zip(x[b, n].tolist(), norm.weight.tolist())]
            )
    wide = torch.full((1, 6), 3e4, dtype=torch.float16)  # its square is past float16's range
    torch.testing.assert_close(norm.half()(wide), norm.weight[None])


def test_bf16_states_are_finite_and_close():
    """Also for "", whose states are the null text; and no tokenizer is needed for those."""
    t5 = random_t5()
    ids = torch.cat([empty_prompt(), torch.randint(0, 60, (1, 226))])
    wide, half = t5(ids), T5Encoder(CONFIG).requires_grad_(False)
    half.load_state_dict(t5.state_dict())
    states = half.bfloat16()(ids)
    assert states.shape == (2, 226, 40) and states.dtype == torch.bfloat16 and states.isfinite().all()
    assert (states.float() - wide).abs().mean() < 0.03 * wide.abs().mean()


def test_golden_parameter_count():
    """The encoder of T5 v1.1 XXL (fact sheet 2.1)."""
    with torch.device("meta"):
        assert sum(p.numel() for p in T5Encoder(T5_PRESETS["t5-v1_1-xxl"]).parameters()) == 4_762_310_656
