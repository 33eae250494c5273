"""Captions to vectors: tokenizers and the causal transformer whose states an image model reads.

Papers (arXiv): CLIP 2103.00020; byte pairs 1508.07909; LDM 2112.10752; V*, the new word 2212.04488

The idea. A caption becomes a row of token ids: start, words, end, padding. Every token has a
learned vector and so has every position; their sum goes through pre-norm transformer layers, in
which token i sees tokens 0..i only (causal), and a LayerNorm. The image model's cross-attention
reads the whole row of states, padding too: those from the end token on have seen every word.
  WordTokenizer, for data sets with a small vocabulary: one word is one token.
  CLIPTokenizer, for any string: a word is split into its bytes; then the pair of neighbours that
comes first in a published list of 48,894 merges is joined, until no pair is in the list.
  V*, a new word, is a parameter outside the table, so training it changes no other word's vector.

Both tokenizers: tokenizer([captions]) -> (B, L) int64; encode(caption) -> list of ids without start
and end; add_token(name) -> id; ids {word: id}; vocab_size; max_length, L; open: any word has ids.

    states = TextEncoder(60, 18)(WordTokenizer.from_captions(captions)(["a red circle", ""]))
    python -m pytest tests/test_text.py

Differences from the official code (openai/CLIP; CLIPTextModel of transformers):
1. Python's `re` instead of the package `regex`; letters and numbers come from unicodedata.
2. Without the package ftfy: text is brought into Unicode's NFC form and not repaired otherwise.
3. Initialisation for training from scratch: each layer starts as the identity.
4. No pooled vector and no projection, which Stable Diffusion does not use."""
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


class CausalAttention(nn.Module):
    """Self-attention, token i sees tokens 0..i only, (B, L, D) -> same. Source: CLIP §2.4."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)   # 3x (B, h, L, d)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)     # (B, h, L, d)
        return self.out_proj(x.transpose(1, 2).flatten(2))                          # (B, L, D)


class Layer(nn.Module):
    """Pre-norm layer with quick GELU, x sigmoid(1.702 x), (B, L, D) -> same. Source: CLIP §2.4."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        D, wide = hidden_size, int(hidden_size * mlp_ratio)
        self.self_attn = CausalAttention(D, num_heads)
        self.layer_norm1 = nn.LayerNorm(D, eps=1e-5)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, wide), "fc2": nn.Linear(wide, D)})
        self.layer_norm2 = nn.LayerNorm(D, eps=1e-5)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.mlp.fc1(self.layer_norm2(x))                                  # (B, L, 4D)
        return x + self.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))             # (B, L, D)


class TextEncoder(nn.Module):
    """Token ids (B, L) -> states (B, L, D), one per token, which cross-attention reads; vocab_size,
    max_length: the tokenizer's; D, hidden_size: the context width. Source: CLIP §2.4; LDM §3.3."""

    def __init__(self, vocab_size, max_length, hidden_size=64, depth=2, num_heads=4, mlp_ratio=4.0):
        super().__init__()
        self.vocab_size, self.max_length, self.hidden_size = vocab_size, max_length, hidden_size
        layers = nn.ModuleList(Layer(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        tables = {"token_embedding": nn.Embedding(vocab_size, hidden_size),
                  "position_embedding": nn.Embedding(max_length, hidden_size)}
        self.text_model = nn.ModuleDict({       # nested as in official names, ...encoder.layers.0.
            "embeddings": nn.ModuleDict(tables), "encoder": nn.ModuleDict({"layers": layers}),
            "final_layer_norm": nn.LayerNorm(hidden_size, eps=1e-5)})
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model. Source: CLIP's released code, except difference 3.
        | what                       | how             | why                               |
        | token and position vectors | normal(0, 0.02) | word and position weigh the same  |
        | out_proj, fc2              | 0               | each layer starts as the identity |
        | all other Linear layers    | Xavier uniform  | the variance stays about the same |
        | all biases                 | 0               | LayerNorms: PyTorch's 1 and 0     |"""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.text_model.encoder.layers:
            nn.init.zeros_(layer.self_attn.out_proj.weight)
            nn.init.zeros_(layer.mlp.fc2.weight)

    def forward(self, ids, modifiers=None):
        """ids (B, L) int64 -> states (B, L, D). modifiers: {token id: row (D,)} in place of the
        table's row, which then gets no gradient. Source: CLIP §2.4; Custom Diffusion §3.2."""
        embeddings, modifiers, known = self.text_model.embeddings, modifiers or {}, ids
        for token in modifiers:         # it may lie beyond the table: look up row 0, then overwrite
            known = torch.where(ids == token, 0, known)                             # (B, L)
        x = embeddings.token_embedding(known)                                       # (B, L, D)
        for token, row in modifiers.items():
            x = torch.where((ids == token)[..., None], row.to(x.dtype), x)          # (B, L, D)
        x = x + embeddings.position_embedding.weight[:ids.shape[1]]                 # (B, L, D)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)                                  # (B, L, D)


class TextConditional(nn.Module):
    """A text encoder and a denoiser that reads its states: model(x, t, y) with captions y.
    denoiser: denoiser(x, t, context (B, L, D)), any that reads text; text: ids (B, L) ->
    states (B, L, D); null_ids (L,): the empty caption, which replaces a share class_dropout_prob of
    the captions in training, so that guidance can use it. Source: LDM §3.3; VQ-Diffusion §4.3."""

    def __init__(self, denoiser, text, null_ids, class_dropout_prob):
        super().__init__()
        self.denoiser, self.text = denoiser, text
        self.class_dropout_prob, self.can_guide = class_dropout_prob, class_dropout_prob > 0
        self.register_buffer("null_ids", null_ids, persistent=False)
        self.matrices = rf"denoiser\.{denoiser.matrices}|text\.text_model\.encoder\.layers\."

    def forward(self, x, t, y):
        """x noised images or tokens; t (B,); y ids (B, L) int64, or encoded text (B, L, D)."""
        context = y if y.is_floating_point() else self.text(y)                      # (B, L, D)
        x = x.to(context.dtype) if x.is_floating_point() else x     # tokens stay whole numbers
        return self.denoiser(x, t, context)

    def null_condition(self, count, device="cpu"):
        return self.null_ids.to(device).expand(count, -1)                           # (count, L)

    def drop_labels(self, y, draws):
        """Captions y (B, L), the empty one where draws (B,), uniform in [0, 1), says so."""
        return torch.where((draws < self.class_dropout_prob)[:, None], self.null_ids, y)    # (B, L)


def _rows(captions, encode, start, end, pad, length):
    """Captions -> (B, length) int64: start, the ids that `encode` gives, end, then pad."""
    if isinstance(captions, str):
        raise ValueError(f"a tokenizer takes a list of captions, not a string: [{captions!r}]")
    rows = [[start, *encode(caption), end] for caption in captions]
    rows = [ids + [pad] * (length - len(ids)) for ids in rows]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), length)            # (B, length)


class WordTokenizer:
    """One word, one token. Ids: 0 padding, 1 start, 2 end, then the words, then free rows.
    words: list of known words; reserved: number of free rows, for add_token. A word is a run of
    letters or digits in lower case, or a new one such as <new1> or V*; all else separates words."""
    PAD, START, END, open = 0, 1, 2, False
    WORD = re.compile(r"<\w+>|\b[^\W\d_]\*(?!\w)|[^\W_]+")
    ROOM, RESERVED = 4, 8       # words that a prompt may have more than any caption; free rows

    def __init__(self, words, reserved, max_length):
        self.words, self.reserved, self.max_length = list(words), reserved, max_length
        self.ids = {word: 3 + i for i, word in enumerate(self.words)}
        self.vocab_size = 3 + len(self.words) + reserved        # rows of the table, named and free

    @classmethod
    def from_captions(cls, captions):
        """The tokenizer that knows every word of a list of captions."""
        split = [cls.WORD.findall(caption.lower()) for caption in captions]
        longest = max(map(len, split), default=0)
        return cls(sorted(set().union(*split)), cls.RESERVED, longest + 2 + cls.ROOM)

    def __call__(self, captions):
        return _rows(captions, self.encode, self.START, self.END, self.PAD, self.max_length)

    def encode(self, caption):
        """Raises ValueError for an unknown word, or too many."""
        words = self.WORD.findall(caption.lower())
        if unknown := [word for word in words if word not in self.ids]:
            near = ", ".join(difflib.get_close_matches(unknown[0], self.words, n=3, cutoff=0.0))
            raise ValueError(f"unknown word {unknown[0]!r} in the caption {caption!r}: the nearest "
                             f"known words are {near} (a new word needs add_token first)")
        if (n := len(words)) > (room := self.max_length - 2):
            raise ValueError(f"caption of {n} words, expected at most {room}: shorten {caption!r}")
        return [self.ids[word] for word in words]

    def add_token(self, name):
        """Give the next free row a name, such as <new1> or V*. Source: Custom Diffusion §3.2."""
        name = name.lower()
        if name in self.ids or not self.WORD.fullmatch(name):
            raise ValueError(f"{name!r} exists already or is no single word: choose another name")
        if not self.reserved:
            raise ValueError(f"no row left for {name!r}: all reserved rows are taken")
        self.ids[name], self.reserved = 3 + len(self.words), self.reserved - 1
        self.words.append(name)
        return self.ids[name]

    def state(self):
        """The vocabulary as plain values: WordTokenizer(**state) is the same again."""
        return {"words": list(self.words), "reserved": self.reserved, "max_length": self.max_length}


class CLIPTokenizer:
    """CLIP's byte pairs: any string -> ids below 49,408; 49406 starts, 49407 ends and pads.
    path: the published list of merges, or Stable Diffusion's tokenizer/merges.txt; merges: `ranks`
    of another such. Source: CLIP §2.4 and its code; Sennrich et al. 2016, algorithm 1."""
    open = True
    MERGES = 48_894                     # 49,408 ids - 2 x 256 single bytes - start and end

    def __init__(self, path="data/bpe_simple_vocab_16e6.txt.gz", merges=()):
        merges, self.max_length = merges or self._read(Path(path)), 77
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        # one character per byte: printable Latin-1 for itself, then chr(256), ... for the other 68
        self.symbols = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
        rest = [b for b in range(256) if b not in self.symbols]
        self.symbols |= {b: chr(256 + i) for i, b in enumerate(rest)}
        # "</w>" marks the end of a word: "at</w>" ends one, "at" does not
        vocab = [symbol + end for end in ("", "</w>") for symbol in self.symbols.values()]
        vocab += ["".join(pair) for pair in merges]
        self.special = ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {token: i for i, token in enumerate(vocab + self.special)}
        self.start, self.end, self.vocab_size = len(vocab), len(vocab) + 1, len(vocab) + 2
        self.pad = self.end             # of Stable Diffusion; VQ-Diffusion's files want 0
        self.pattern = self._pattern()

    def __call__(self, captions):
        """Prints what the first too long caption loses. Raises ValueError if it is a new word."""
        room, lost, symbols = self.max_length - 2, [], list(self.ids)   # start and end stay
        def cut(caption):
            ids = self.encode(caption)
            if new := [name for name in self.special[2:] if self.ids[name] in ids[room:]]:
                raise ValueError(f"{new[0]} is beyond {room} tokens: shorten {caption[:80]!r}")
            lost.extend(["".join(symbols[i] for i in ids[room:])] if ids[room:] else [])
            return ids[:room]
        rows = _rows(captions, cut, self.start, self.end, self.pad, self.max_length)
        if lost:
            print(f"{len(lost)} of {len(captions)} captions have more than {room} tokens and are "
                  f"cut; the first loses {lost[0].replace('</w>', ' ')[:80]!r}", file=sys.stderr)
        return rows

    def encode(self, caption):
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", caption)))
        return [self.ids[symbol] for piece in self.pattern.findall(" ".join(text.split()).lower())
                for symbol in ([piece] if piece in self.special else self._merge(piece))]

    def _merge(self, piece):
        """From bytes on, join everywhere the pair that comes first in the list of merges."""
        symbols = [self.symbols[byte] for byte in piece.encode()]
        symbols[-1] += "</w>"
        while known := [pair for pair in zip(symbols, symbols[1:]) if pair in self.ranks]:
            first, merged = min(known, key=self.ranks.get), []
            for symbol in symbols:
                # from the left: what has been joined is longer than first[0], it cannot join again
                if merged and (merged[-1], symbol) == first:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return symbols

    def add_token(self, name):
        """Make `name`, such as "<new1>", one token, the next one beyond the encoder's table: pass
        its row as forward(..., modifiers={id: row}). Source: Custom Diffusion §3.2."""
        name = name.lower()
        if name in self.special or not name or re.search(r"\s", name):
            raise ValueError(f"token {name!r} exists, is empty or has a space: choose another name")
        self.ids[name] = self.vocab_size + len(self.special) - 2
        self.special.append(name)
        self.pattern = self._pattern()
        return self.ids[name]

    def _pattern(self):
        """Special tokens; English endings; runs of letters; single numbers; runs of the rest."""
        # longest first, or <new1> would be found inside <new1>0
        names = map(re.escape, sorted(self.special, key=len, reverse=True))
        # Python's \w is letters, numbers and "_", and its \d only Nd: add the numbers of Nl and No
        other = "".join(c for c in map(chr, range(sys.maxunicode + 1))
                        if unicodedata.category(c) in ("Nl", "No"))
        pieces = rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{other}]+|[\d{other}]|(?:[^\s\w]|_)+"
        return re.compile("|".join([*names, pieces]))

    def _read(self, path):
        try:
            data = path.read_bytes()
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            # line 1 is a version; the public file has more merges than CLIP uses
            lines = data.decode().split("\n")[:self.MERGES + 1]
            merges = [tuple(line.split()) for line in lines[1:] if line]
            if "version" not in lines[0] or any(len(pair) != 2 for pair in merges):
                raise ValueError("not a version line, then pairs")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f"{path} is no list of BPE merges ({error}): fetch "
                             "bpe_simple_vocab_16e6.txt.gz (1.4 MB) from clip/ of "
                             "github.com/openai/CLIP, save it in data/") from error
        return merges
