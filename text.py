"""Captions to vectors: words become token ids, and a causal transformer turns ids into states for an image model.

Papers: CLIP (Radford et al. 2021, arXiv 2103.00020) for the transformer; Sennrich et al. 2016 (1508.07909) for
byte-pair encoding; LDM (Rombach et al. 2022) for the use made of it; Custom Diffusion (Kumari et al. 2022,
2212.04488) for V*.

The idea. A caption is a row of tokens: start, words, end, padding. Each token has a learned vector, each place in the
row another; their sum goes through pre-norm transformer layers in which token i sees tokens 0..i only (causal), and a
last LayerNorm. The image model reads every row of the result, padding included: the rows from the end token on have
seen it all.
  Which tokens? A small world has some fifty words: one word, one token, and a word never seen is an error that names
  its neighbours (WordTokenizer). The real world needs every string: CLIP starts from single bytes and glues the pair
  that comes first in a published list of 48,894 merges, until none applies (CLIPTokenizer). No string is unknown to
  it.
  What can it tell apart? Word and place enter at equal size and every layer starts as the identity, so a fresh state
  is its own word in its own place, and mixing is what training adds. Width 64 and two layers (one can find a
  neighbour by its place, the next relates phrases) read every slot of unseen recombinations from the end token alone
  within 200 steps, as the test shows.
  A new word (V*)? It is a parameter of its own, outside the table: forward(ids, modifiers={id: row}) puts `row`
  wherever `id` stands. No other row can change, whatever the optimizer does, and weight decay has nothing else to
  pull.

Contents: WordTokenizer, CLIPTokenizer, attention, MLP and layer, TextEncoder, the named sizes.
Both tokenizers: encode(caption) -> ids without start and end, tokenizer([captions]) -> (B, L) int64, add_token,
vocab_size, max_length.

    tokenizer = WordTokenizer.from_captions(dataset.captions)
    encoder = TextEncoder(tokenizer.vocab_size, tokenizer.max_length)
    context = encoder(tokenizer(["a red circle", ""]))              # (2, L, 64); "" is the null caption
    python -m pytest tests/test_text.py                             # all that is promised here

Differences from the official code (openai/CLIP, and CLIPTextModel of transformers; state_dict names and numbers are
the same):
1. Python's own `re` instead of the package `regex`: \\p{L} and \\p{N} are rebuilt from unicodedata, once per
   tokenizer.
2. The package ftfy is absent: of its repairs only Unicode's NFC form is kept. Curly quotes, full-width letters,
   ligatures and garbled encodings are tokenised as they stand, and may get other ids than in the official code.
3. Initialisation, for training from scratch (table in initialize_weights): the own word explains 62 % of the variance
   of a fresh state, 30 % with CLIP's. A head start, no more: on the test's toy task both were right within 200 steps.
4. No pooled vector and no projection: Stable Diffusion uses neither. `embeddings.position_ids` of older files is not
   a weight.
"""
import difflib
import gzip
import html
import re
import sys
import unicodedata
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


def _frame(rows, start, end, pad, length):
    """Lists of ids -> (B, length) int64: start, ids, end, then pad."""
    framed = torch.full((len(rows), length), pad)                                           # (B, L)
    for row, ids in zip(framed, rows):
        row[:len(ids) + 2] = torch.tensor([start, *ids, end])
    return framed


def _several(captions):
    if isinstance(captions, str):
        raise ValueError(f"a tokenizer takes a list of captions, not one string: write [{captions!r}]")
    return list(captions)


# ----------------------------------------------------------------------------------------------------------------------
# one word, one token

class WordTokenizer:
    """Tokenizer of a small world: pad 0, start 1, end 2, then the words from a to z, then rows kept free for new ones.

    words: list of known words; reserved: free rows after them; max_length: L of every row, start and end included.
    A word is a run of letters or digits in lower case, or a modifier such as <new1> or V*; all else separates words.
    Source: Custom Diffusion §3.2 (modifier tokens); the rest is the simplest thing that works.
    """
    PAD, START, END = 0, 1, 2
    WORD = re.compile(r"<\w+>|\b[^\W\d_]\*(?!\w)|[^\W_]+")
    ROOM = 4                # a caption may be 4 words longer than the longest seen, as in "a very small V* ..."

    def __init__(self, words, reserved, max_length):
        self.words, self.reserved, self.max_length = list(words), reserved, max_length
        self.ids = {word: 3 + i for i, word in enumerate(self.words)}

    @classmethod
    def from_captions(cls, captions, reserved=8, max_length=None):
        """A tokenizer that knows every word of `captions`, a list of N strings; max_length None = longest + 2 + ROOM.

        Raises ValueError if a caption does not fit max_length. Source: Custom Diffusion §3.2 (reserved rows).
        """
        captions = _several(captions)
        split = [cls.WORD.findall(caption.lower()) for caption in captions]
        longest = max(map(len, split), default=0)
        tokenizer = cls(sorted(set().union(*split)), reserved, max_length or longest + 2 + cls.ROOM)
        for caption, words in zip(captions, split):
            tokenizer._check_length(caption, len(words))
        return tokenizer

    @property
    def vocab_size(self):
        """Rows of the embedding table, named and free; add_token does not change it. Source: Custom Diffusion §3.2."""
        return 3 + len(self.words) + self.reserved

    def _check_length(self, caption, count):
        if count > self.max_length - 2:
            raise ValueError(f"caption of {count} words, only {self.max_length - 2} fit (max_length {self.max_length} "
                             f"with start and end): shorten it, or build the tokenizer with a larger one: {caption!r}")

    def add_token(self, name):
        """Give the next free row a name, such as "<new1>" or "V*" -> its id.

        Raises ValueError if it is known already, could not be read back from a caption, or no row is free.
        Source: Custom Diffusion §3.2.
        """
        name = name.lower()
        if name in self.ids:
            raise ValueError(f"token {name!r} exists already, as id {self.ids[name]}: choose another name")
        if not self.WORD.fullmatch(name):
            raise ValueError(f"{name!r} is not a single word: write it like <new1> or V*, or in letters and digits")
        if not self.reserved:
            raise ValueError(f"no row left for {name!r}: this vocabulary was built with too few reserved rows")
        self.ids[name] = 3 + len(self.words)
        self.words.append(name)
        self.reserved -= 1
        return self.ids[name]

    def encode(self, caption):
        """Caption -> list of word ids, without start and end; "" gives [].

        Raises ValueError for an unknown word, with the nearest known ones. Source: none, one word is one token.
        """
        words = self.WORD.findall(caption.lower())
        for word in words:
            if word not in self.ids:
                near = ", ".join(difflib.get_close_matches(word, self.words, n=3, cutoff=0.0))
                raise ValueError(f"unknown word {word!r} in the caption {caption!r}: the nearest known words are "
                                 f"{near} (a new word needs add_token first)")
        return [self.ids[word] for word in words]

    def __call__(self, captions):
        captions = _several(captions)
        rows = [self.encode(caption) for caption in captions]
        for caption, row in zip(captions, rows):
            self._check_length(caption, len(row))
        return _frame(rows, self.START, self.END, self.PAD, self.max_length)

    def state(self):
        """The vocabulary as plain builtins, for a checkpoint; from_state is its inverse. Source: none."""
        return {"words": list(self.words), "reserved": self.reserved, "max_length": self.max_length}

    @classmethod
    def from_state(cls, state):
        """The tokenizer whose `state()` this is. Source: none."""
        return cls(**state)


# ----------------------------------------------------------------------------------------------------------------------
# every string: byte-level byte-pair encoding

def _byte_symbols():
    """256 printable characters, one per byte, as {byte: character} in the order of CLIP's ids.

    Printable Latin-1 bytes stand for themselves and come first; the other 68 become chr(256), chr(257), ...
    """
    symbols = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = [b for b in range(256) if b not in symbols]
    return symbols | {b: chr(256 + i) for i, b in enumerate(rest)}


class CLIPTokenizer:
    """CLIP's byte-level BPE: any string -> ids below 49,408; start 49406, end 49407, which is the padding too.

    path: the published list of merges, bpe_simple_vocab_16e6.txt.gz, or Stable Diffusion's tokenizer/merges.txt.
    Raises ValueError if it is missing or no such list. Source: CLIP §2.4; Sennrich et al. 2016, algorithm 1.
    """
    MERGES = 48_894                                         # 49,408 ids - 2 x 256 single bytes - start and end

    def __init__(self, path="data/bpe_simple_vocab_16e6.txt.gz"):
        self.symbols, self.max_length = _byte_symbols(), 77
        merges = self._read(Path(path))
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        single = list(self.symbols.values())
        # "</w>" marks the end of a word: "at</w>" ends one, "at" does not
        vocab = single + [s + "</w>" for s in single] + ["".join(pair) for pair in merges]
        vocab += ["<|startoftext|>", "<|endoftext|>"]
        self.vocab, self.ids = vocab, {token: i for i, token in enumerate(vocab)}
        self.vocab_size, self.start, self.end = len(vocab), len(vocab) - 2, len(vocab) - 1
        self.special = {token: self.ids[token] for token in vocab[-2:]}
        # Python's \w is L + N + "_" and its \d is Nd: missing are the numbers of Nl and No (Roman numerals, fractions)
        other = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
        self.pieces = rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{other}]+|[\d{other}]|(?:[^\s\w]|_)+"
        self.pattern = self._compile()

    def _read(self, path):
        if not path.is_file():
            raise ValueError(f"no list of BPE merges at {path}: fetch bpe_simple_vocab_16e6.txt.gz, 1.4 MB, from "
                             "clip/ of the GitHub repository openai/CLIP; save it as data/bpe_simple_vocab_16e6.txt.gz")
        data = path.read_bytes()
        try:
            lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged or no list of BPE merges: {error}") from error
        # line 1 is a version; the public file goes on far beyond the merges that CLIP uses
        merges = [tuple(line.split()) for line in lines[1:self.MERGES + 1] if line]
        if "version" not in lines[0] or any(len(pair) != 2 for pair in merges):
            raise ValueError(f"{path} is no list of BPE merges: expected a version line, then two symbols a line")
        return merges

    def _compile(self):
        names = sorted(self.special, key=len, reverse=True)  # the longest first: <new1>0 must not hide in <new1>
        return re.compile("|".join([*map(re.escape, names), self.pieces]))

    def add_token(self, name):
        """Make `name`, such as "<new1>", one token -> its id, the first free one from vocab_size on (beyond the table).

        The encoder has no row for it: pass one as forward(..., modifiers={id: row}).
        Raises ValueError if it exists or holds spaces. Source: Custom Diffusion §3.2.
        """
        name = name.lower()
        if name in self.special or not name or re.search(r"\s", name):
            raise ValueError(f"token {name!r} exists already, is empty, or contains a space: choose another name")
        self.special[name] = len(self.vocab)
        self.vocab.append(name)
        self.pattern = self._compile()
        return self.special[name]

    def _merge(self, symbols):
        """Glue the neighbours whose merge comes first in the list, everywhere, until no pair is in the list."""
        while len(symbols) > 1:
            first = min(zip(symbols, symbols[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if first not in self.ranks:
                break
            merged = []
            for symbol in symbols:
                # from the left: once glued, merged[-1] is longer than first[0] and cannot match again
                if merged and (merged[-1], symbol) == first:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return symbols

    def encode(self, caption):
        """Caption -> list of ids, without start and end. Source: CLIP §2.4 and its released tokenizer."""
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", caption)))
        text = " ".join(text.split()).lower()
        ids = []
        for piece in self.pattern.findall(text):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                symbols = [self.symbols[b] for b in piece.encode()]
                symbols[-1] += "</w>"
                ids += [self.ids[token] for token in self._merge(symbols)]
        return ids

    def decode(self, ids):
        """Ids -> text, single spaces between words, no start and end tokens. Source: CLIP's released tokenizer."""
        tokens = [self.vocab[i] for i in map(int, ids) if i not in (self.start, self.end)]
        text = "".join(token if token not in self.special else token + "</w>" for token in tokens).replace("</w>", " ")
        back = {symbol: bytes([b]) for b, symbol in self.symbols.items()}
        return b"".join(back.get(c, c.encode()) for c in text).decode(errors="replace").strip()

    def __call__(self, captions, length=77):
        """Captions -> (B, length) int64: start, ids, end, then end again; too many ids are cut, the end token stays."""
        rows = [self.encode(caption)[:length - 2] for caption in _several(captions)]
        return _frame(rows, self.start, self.end, self.end, length)


# ----------------------------------------------------------------------------------------------------------------------
# the transformer

class CausalAttention(nn.Module):
    """Multi-head self-attention in which token i sees tokens 0..i, (B, L, D) -> (B, L, D). Source: CLIP §2.4."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = (proj(x).view(B, L, self.num_heads, -1).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))                     # 3x (B, h, L, d)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)                         # (B, h, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))                            # (B, L, D)


class Mlp(nn.Module):
    """Two linear layers and quick GELU x sigmoid(1.702 x) between, (B, L, D) -> same. Source: CLIP's released code."""

    def __init__(self, hidden_size, mlp_hidden):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x):
        x = self.fc1(x)                                                                     # (B, L, 4D)
        return self.fc2(x * torch.sigmoid(1.702 * x))                                       # (B, L, D)


class Layer(nn.Module):
    """Pre-norm transformer layer, (B, L, D) -> (B, L, D). Source: CLIP §2.4; GPT-2."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.self_attn = CausalAttention(hidden_size, num_heads)
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=1e-5)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """Token ids to states, one per token: what cross-attention reads.

    vocab_size, max_length: of the tokenizer; hidden_size: D, the image model's context width; depth: layers.
    Raises ValueError for sizes that do not fit together. Source: CLIP §2.4; LDM §3.3.
    """

    def __init__(self, vocab_size, max_length, hidden_size=64, depth=2, num_heads=4, mlp_ratio=4.0):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}: change one of them")
        self.vocab_size, self.max_length, self.hidden_size = vocab_size, max_length, hidden_size
        # the nesting is that of the official names, text_model.encoder.layers.0. ...
        layers = nn.ModuleList(Layer(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, hidden_size),
                                         "position_embedding": nn.Embedding(max_length, hidden_size)}),
            "encoder": nn.ModuleDict({"layers": layers}),
            "final_layer_norm": nn.LayerNorm(hidden_size, eps=1e-5)})
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: CLIP's released code, but for difference 3.

        | what                     | how             | why                                                    |
        | token and position table | normal(0, 0.02) | equal: the place of a word is as visible as the word   |
        | out_proj, fc2            | 0               | each layer starts as the identity                      |
        | all other Linear layers  | Xavier uniform  | unit scale in, unit scale out                          |
        | all biases               | 0               | LayerNorms stay as PyTorch makes them: weight 1, bias 0 |
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.text_model.encoder.layers:
            nn.init.zeros_(layer.self_attn.out_proj.weight)
            nn.init.zeros_(layer.mlp.fc2.weight)

    def embed(self, ids, modifiers=None):
        """Token + place vectors, (B, L) -> (B, L, D); see forward. Source: CLIP §2.4; Custom Diffusion §3.2."""
        table = self.text_model.embeddings.token_embedding
        places = self.text_model.embeddings.position_embedding.weight                       # (max_length, D)
        modifiers, known = modifiers or {}, ids
        for token in modifiers:
            known = torch.where(ids == token, 0, known)     # it may lie beyond the table: look up row 0, then overwrite
        x = table(known)                                                                    # (B, L, D)
        for token, row in modifiers.items():
            x = torch.where((ids == token)[..., None], row.to(x.dtype), x)                  # (B, L, D)
        return x + places[:ids.shape[1]]                                                    # (B, L, D)

    def forward(self, ids, modifiers=None):
        """ids (B, L) int64 -> states (B, L, D), after the final LayerNorm.

        modifiers: {token id: row (D,)}. `row` stands in for the table's row of that id: V* is its own Parameter,
        and no gradient reaches the row that it hides. The id may lie beyond the table.
        Raises ValueError if L > max_length. Source: CLIP §2.4; Custom Diffusion §3.2.
        """
        if ids.shape[1] > self.max_length:
            raise ValueError(f"{ids.shape[1]} tokens, this encoder has {self.max_length} positions: "
                             "use the tokenizer it was built for")
        x = self.embed(ids, modifiers)                                                      # (B, L, D)
        for layer in self.text_model.encoder.layers:
            x = layer(x)                                                                    # (B, L, D)
        return self.text_model.final_layer_norm(x)                                          # (B, L, D)


TEXT_CONFIGS = {
    # small worlds: on the test's task as good as width 128; vocab_size and max_length come from the tokenizer
    "text-64x2": dict(hidden_size=64, depth=2, num_heads=4),
    # the text encoder of Stable Diffusion v1: 123,060,480 parameters
    "CLIP-ViT-L/14": dict(vocab_size=49_408, max_length=77, hidden_size=768, depth=12, num_heads=12),
}
