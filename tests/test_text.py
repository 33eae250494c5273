"""text.py against CLIP's published ids and figures, a brute-force BPE, and what a causal encoder promises."""
import gzip
import json
import os
import pathlib
import random
import re
import sys
import unicodedata

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import GOLDEN, fill_by_recipe, golden_case
from text import TEXT_CONFIGS, CLIPTokenizer, TextEncoder, WordTokenizer

HERE = pathlib.Path(__file__).parent
TINY_MERGES = HERE / "tiny_merges.txt"
CASES = json.loads((GOLDEN / "clip_tokens.json").read_text())["cases"]
TRICKY = ["low lower lowest", "aaaa aaaaa aa a", "Banana ananas!!! ?!", "café \n DÉJÀ &amp;amp; 10",
          "don't we're it's", "½x² Ⅷ 一二 _a_", "한국 😀", ""]


@pytest.fixture(scope="module")
def public():
    name = "bpe_simple_vocab_16e6.txt.gz"
    places = [os.environ.get("CLIP_BPE", ""), HERE.parent / "data" / name]
    for place in map(pathlib.Path, filter(None, places)):
        if place.is_file():
            return CLIPTokenizer(place), place
    pytest.skip(f"CLIP's published {name} is not here (environment variable CLIP_BPE, or data/): "
                "it is too large for the repository")


# ----------------------------------------------------------------------------------------------------------------------
# byte-pair encoding

def brute_force_ids(caption, path):
    """BPE another way: pieces cut character by character by Unicode category, every merge of the file applied once,
    in its order."""
    raw = pathlib.Path(path).read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()[1:48895]
    printable = "".join(map(chr, range(256)))
    printable = [c for c in printable if unicodedata.category(c) not in ("Cc", "Zs", "Cf")]
    hidden = [chr(b) for b in range(256) if chr(b) not in printable]
    letter = {c.encode("latin-1"): c for c in printable}
    letter |= {c.encode("latin-1"): chr(256 + i) for i, c in enumerate(hidden)}
    order = printable + [letter[c.encode("latin-1")] for c in hidden]
    vocab = order + [c + "</w>" for c in order] + [line.replace(" ", "") for line in lines]
    ids = {token: i for i, token in enumerate(vocab)}
    text, pieces, last = caption.replace("&amp;", "&").replace("&amp;", "&").lower(), [], " "
    while text:
        kind = " " if text[0].isspace() else unicodedata.category(text[0])[0]
        kind = kind if kind in " LN" else "other"
        end = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s)), None)
        if end and last != "other":                         # inside a run such as !'s the run wins
            pieces, text, last = [*pieces, end], text[len(end):], " "
            continue
        if kind == last and kind in ("L", "other"):
            pieces[-1] += text[0]
        elif kind != " ":
            pieces.append(text[0])
        text, last = text[1:], kind
    out = []
    for piece in pieces:
        word = " ".join(letter[bytes([b])] for b in piece.encode()) + "</w>"
        for a, b in (line.split() for line in lines):
            if a in word and b in word:
                word = re.sub(rf"(?<!\S){re.escape(a)} {re.escape(b)}(?!\S)", lambda m: a + b, word)
        out += [ids[token] for token in word.split()]
    return out


@pytest.mark.parametrize("caption,want", CASES)
def test_clip_ids_are_the_published_ones(public, caption, want):
    assert public[0].encode(caption) == want


def test_bpe_equals_brute_force_on_a_tiny_list_of_merges():
    tokenizer, draw = CLIPTokenizer(TINY_MERGES), random.Random(0)
    captions = TRICKY + ["".join(draw.choices("aaabelnoqrstuw é1!'  ", k=draw.randrange(1, 24))) for _ in range(300)]
    for caption in captions:
        assert tokenizer.encode(caption) == brute_force_ids(caption, TINY_MERGES), caption
    assert any(len(tokenizer.encode(c)) < len(c.replace(" ", "")) for c in captions)        # merges did happen
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (512 + 48 + 2, 560, 561)
    # pairs are taken from the left
    assert tokenizer.encode("aaaaa") == [tokenizer.ids["aa"], tokenizer.ids["aaa</w>"]]


def test_bpe_equals_brute_force_on_the_public_list(public):
    for caption in TRICKY[:6]:
        assert public[0].encode(caption) == brute_force_ids(caption, public[1]), caption


def test_letters_numbers_and_the_rest_are_those_of_unicode():
    pieces = CLIPTokenizer(TINY_MERGES).pieces.split("|", 7)[7]    # what follows the seven contractions
    letters, numbers, rest = map(re.compile, pieces.split("|", 2))
    for c in map(chr, range(sys.maxunicode + 1)):
        kind = unicodedata.category(c)[0]
        assert bool(letters.fullmatch(c)) == (kind == "L") and bool(numbers.fullmatch(c)) == (kind == "N"), ascii(c)
        assert bool(rest.fullmatch(c)) == (kind not in "LN" and not c.isspace()), ascii(c)


def test_clip_rows_end_with_end_tokens(public):
    tokenizer = public[0]
    ids = tokenizer(["a photo of a cat", "", "dog " * 100])
    assert ids.shape == (3, 77) and ids.dtype == torch.int64 and tokenizer.vocab_size == 49_408
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert ids[1].tolist() == [49406] + [49407] * 76
    assert ids[2].tolist() == [49406] + [1929] * 75 + [49407]
    assert tokenizer(["dog " * 100], length=8).tolist() == [[49406] + [1929] * 6 + [49407]]
    for text in ("a red circle left of a blue square", "naïve café 😀", "한국어 프롬프트"):
        assert tokenizer.decode(tokenizer([text])[0]) == text


def test_clip_tokens_can_be_added():
    tokenizer = CLIPTokenizer(TINY_MERGES)
    plain = tokenizer.encode("a red square")
    first, second = tokenizer.add_token("<new1>"), tokenizer.add_token("V*")
    # beyond the table, which has not grown
    assert (first, second, tokenizer.vocab_size) == (562, 563, 562)
    assert tokenizer.encode("a <NEW1> red V* square") == [plain[0], first, plain[1], second, *plain[2:]]
    assert tokenizer.decode([plain[0], first, *plain[1:]]) == "a <new1> red square"
    for bad in ("<new1>", "two words", ""):
        with pytest.raises(ValueError, match="choose another name"):
            tokenizer.add_token(bad)


def test_files_that_are_no_merges_are_refused(tmp_path):
    with pytest.raises(ValueError, match="bpe_simple_vocab_16e6.txt.gz.*openai/CLIP.*save it as data/"):
        CLIPTokenizer(tmp_path / "nothing.gz")
    whole = gzip.compress(TINY_MERGES.read_bytes())
    for content in (whole[:-20], b"\xff\xfe", b"hello", b"#version\na b c\n"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match="no list of BPE merges"):
            CLIPTokenizer(tmp_path / "bad")
    (tmp_path / "good.gz").write_bytes(whole)
    good, plain = CLIPTokenizer(tmp_path / "good.gz"), CLIPTokenizer(TINY_MERGES)
    assert good.encode("a low square") == plain.encode("a low square")


# ----------------------------------------------------------------------------------------------------------------------
# words

def test_words_ids_and_rows():
    tokenizer = WordTokenizer.from_captions(["A red circle, left of a blue square!", "a ring"], reserved=3)
    assert tokenizer.words == ["a", "blue", "circle", "left", "of", "red", "ring", "square"]
    assert tokenizer.vocab_size == 3 + 8 + 3 and tokenizer.max_length == 8 + 2 + 4
    assert tokenizer.encode("RING of... red-blue") == [9, 7, 8, 4]
    ids = tokenizer(["a ring", ""])
    assert ids.dtype == torch.int64 and ids.tolist() == [[1, 3, 9, 2] + [0] * 10, [1, 2] + [0] * 12]
    assert [tokenizer.add_token(name) for name in ("<new1>", "V*", "heart")] == [11, 12, 13]
    assert tokenizer.encode("a <new1> ring, a v* heart") == [3, 11, 9, 3, 12, 13] and tokenizer.vocab_size == 14
    words = WordTokenizer.WORD.findall("5*3 a*b under_score it's <x")
    assert words == ["5", "3", "a", "b", "under", "score", "it", "s", "x"]


def test_vocabulary_travels_in_a_checkpoint(tmp_path):
    tokenizer = WordTokenizer.from_captions(["a red circle", "a blue square"], reserved=2)
    tokenizer.add_token("<new1>")
    torch.save(tokenizer.state(), tmp_path / "state.pt")
    again = WordTokenizer.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    caption = ["a <new1> square", ""]
    assert torch.equal(again(caption), tokenizer(caption)) and again.state() == tokenizer.state()
    assert again.add_token("<new2>") == tokenizer.add_token("<new2>") and again.vocab_size == tokenizer.vocab_size


def test_captions_that_cannot_be_read_are_named():
    tokenizer = WordTokenizer.from_captions(["a red circle", "a blue square"], reserved=1, max_length=7)
    with pytest.raises(ValueError, match=r"unknown word 'sqare' in the caption 'a red sqare'.* square"):
        tokenizer(["a red circle", "a red sqare"])
    with pytest.raises(ValueError, match="caption of 6 words, .*5 fit"):
        tokenizer(["a red a red a red"])
    with pytest.raises(ValueError, match="caption of 3 words, .*2 fit"):
        WordTokenizer.from_captions(["a red circle"], max_length=4)
    with pytest.raises(ValueError, match="list of captions"):
        tokenizer("a red circle")
    with pytest.raises(ValueError, match="exists already, as id"):
        tokenizer.add_token("Red")
    with pytest.raises(ValueError, match="not a single word"):
        tokenizer.add_token("my dog")
    tokenizer.add_token("<new1>")
    with pytest.raises(ValueError, match="no row left for '<new2>'"):
        tokenizer.add_token("<new2>")


# ----------------------------------------------------------------------------------------------------------------------
# the encoder

def lively(vocab_size=20, length=10):
    return fill_by_recipe(TextEncoder(vocab_size, length, hidden_size=32, num_heads=2))


def test_states_match_official():
    d, g = golden_case("clip_text_tiny")
    c = d["config"]
    model = TextEncoder(c["vocab_size"], c["max_position_embeddings"], c["hidden_size"], c["num_hidden_layers"],
                        c["num_attention_heads"])
    # official names, order and shapes
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == d["params"]
    fill_by_recipe(model).eval()
    stages, ids = {}, g["in_ids"]
    model.text_model.encoder.layers[0].register_forward_hook(lambda m, i, o: stages.update(hidden_0=i[0], hidden_1=o))
    stages["last_hidden_state"] = model(ids)
    for k, v in stages.items():
        assert_close(v.detach(), g[f"out_{k}"], rtol=1e-5, atol=2e-6, msg=lambda m: f"{k}: {m}")


def test_counts():
    with torch.device("meta"):
        big, small = TextEncoder(**TEXT_CONFIGS["CLIP-ViT-L/14"]), TextEncoder(60, 18, **TEXT_CONFIGS["text-64x2"])
    assert sum(p.numel() for p in big.parameters()) == 123_060_480                          # the released model
    assert big.text_model.encoder.layers[11].self_attn.q_proj.weight.shape == (768, 768)
    # two tables, per layer 4 D^2 + 4 D attention, 8 D^2 + 5 D MLP, 4 D norms, and the last norm
    assert sum(p.numel() for p in small.parameters()) == (60 + 18) * 64 + 2 * (12 * 64 ** 2 + 13 * 64) + 2 * 64


def test_a_state_sees_only_what_came_before():
    model, ids = lively(), torch.randint(20, (2, 10), generator=torch.Generator().manual_seed(0))
    out = model(ids)
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 20
    moved = (model(changed) - out).abs().amax(dim=(0, 2))
    assert moved[:6].max() == 0 and moved[6:].min() > 1e-4
    assert_close(model(ids[:, :6]), out[:, :6], rtol=1e-5, atol=1e-6)
    # nor does it see its neighbours in the batch
    assert_close(model(ids[1:]), out[1:], rtol=1e-5, atol=1e-6)
    swapped = ids.clone()
    swapped[:, [2, 3]] = torch.tensor([4, 5])
    other = ids.clone()
    other[:, [2, 3]] = torch.tensor([5, 4])
    assert (model(swapped) - model(other))[:, 9].abs().max() > 1e-3                         # order matters to the end


def test_a_modifier_is_a_parameter_of_its_own():
    model, ids = lively(), torch.tensor([[1, 5, 7, 5, 2], [1, 7, 2, 0, 0]])
    table = model.text_model.embeddings.token_embedding.weight
    v_star = nn.Parameter(table[5].detach().clone())
    # the same row, the same states
    assert torch.equal(model(ids, {5: v_star}), model(ids))
    model(ids, {5: v_star}).square().sum(dim=2)[0, -1].backward()
    assert v_star.grad.abs().max() > 0 and table.grad[5].abs().max() == 0 and table.grad[7].abs().max() > 0
    # an id past the table, as CLIPTokenizer hands out
    beyond = torch.where(ids == 5, 23, ids)
    assert torch.equal(model(beyond, {23: v_star}), model(ids))
    moved = (model(ids, {5: v_star + 1, 9: v_star}) - model(ids)).abs().amax(dim=2)
    # only captions that hold V*, from V* on
    assert moved[0, 0] == 0 and moved[0, 1:].min() > 0 and moved[1].max() == 0


def test_a_fresh_state_is_its_own_word_and_place():
    torch.manual_seed(0)
    model, ids = TextEncoder(20, 10), torch.randint(20, (64, 10))
    # every layer starts as the identity
    assert torch.equal(model(ids), model.text_model.final_layer_norm(model.embed(ids)))
    embeddings = model.text_model.embeddings
    table, places = embeddings.token_embedding.weight, embeddings.position_embedding.weight
    assert table.std().item() == pytest.approx(0.02, rel=0.1) and places.std().item() == pytest.approx(0.02, rel=0.1)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="num_heads 3"):
        TextEncoder(20, 10, hidden_size=64, num_heads=3)
    with pytest.raises(ValueError, match="11 tokens, this encoder has 10 positions"):
        lively()(torch.zeros(1, 11, dtype=torch.int64))


COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES, RELATIONS = ("", "small", "large"), ("left of", "right of", "above", "below")
SLOTS = (SIZES, COLORS, SHAPES, RELATIONS, SIZES, COLORS, SHAPES)


def test_word_order_and_slots_can_be_read_off_the_end_token():
    """Two objects, optional size words (so places shift): all seven slots of combinations never trained on,
    from one linear layer."""
    draw, order = random.Random(0), torch.Generator().manual_seed(0)
    labels = torch.tensor([[draw.randrange(len(slot)) for slot in SLOTS] for _ in range(4000)])
    captions = ["a {} {} {} {} a {} {} {}".format(*(slot[i] for slot, i in zip(SLOTS, row))) for row in labels.tolist()]
    # a fifth of (colour, shape, relation, colour, shape)
    held_out = (labels * torch.tensor([0, 1, 1, 1, 0, 2, 3])).sum(1) % 5 == 0
    tokenizer = WordTokenizer.from_captions(captions)
    ids = tokenizer(captions)
    torch.manual_seed(0)
    model, head = TextEncoder(tokenizer.vocab_size, tokenizer.max_length), nn.Linear(64, sum(map(len, SLOTS)))
    opt = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)

    def read(rows):
        end = (ids[rows] == tokenizer.END).int().argmax(1)
        return head(model(ids[rows])[torch.arange(len(rows)), end]).split([len(slot) for slot in SLOTS], dim=1)

    train, test = torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
    for _ in range(200):
        rows = train[torch.randint(len(train), (64,), generator=order)]
        loss = sum(F.cross_entropy(logits, labels[rows, k]) for k, logits in enumerate(read(rows)))
        opt.zero_grad(), loss.backward(), opt.step()
    with torch.no_grad():
        right = torch.stack([logits.argmax(1) == labels[test, k] for k, logits in enumerate(read(test))])
    assert len(test) > 700 and right.all(), right.float().mean(1)
