"""All tokens at once, again and again, or one after another?

Claim (Gu et al. 2022, Tables 5 and 6): at equal quality VQ-Diffusion samples 15 times as fast as an
autoregressive model, because it needs a few dozen calls of the network for any number of tokens,
the other one call per token. Here: a causal transformer of the same width, depth and number of
parameters learns the same 8x8 tokens of `scenes`, 2,000 steps of 32 (it learns from all tokens of a
picture at once; VQ-Diffusion has 3,000 steps). It keeps keys and values, so a call computes one
token; the paper's rival computes the whole prefix anew. Seconds are CPU time on one thread, without
decoding, for one picture and for 48 at once. About 6 CPU-minutes a seed, and the full runs that
studies.vq_chain leaves behind.

    python -m studies.vq_autoregressive
"""
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from cli import one_line
from diffusion import check_options, seeds
from models import FAMILIES, TOKENS, Family, text_conditional
from studies.common import (Table, compared, markdown, mean_se, notice, parser, run, setup, shown,
                            train_and_watch)
from studies.vq_chain import AXES, CAPTIONS, OUT, accuracy, base, first_stage
from vqdiffusion import GELU2, Attention, race, rand

STEPS, CALLS = 2000, (100, 25, 10, 5)
TABLE = Table("vq_autoregressive", ["model", "seed"])


class NextToken:
    """Autoregression as a process: tokens row by row, each given those before it.

    The first input is a start sign, code K; so inputs are the tokens shifted by one.
    """
    samplers, default_sampler, default_steps = ("in-turn",), "in-turn", {"in-turn": None}
    options = {"in-turn": frozenset({"cfg_scale", "generator", "device"})}

    def __init__(self, num_codes):
        self.num_codes = num_codes

    def draw(self, shape, generator=None, device="cpu"):
        """A step needs no random numbers."""
        return {}

    def loss(self, model, x0, cond=None):
        """Cross-entropy of every token of x0 (B, N) given those before it, nats per token."""
        logits, _ = model(F.pad(x0[:, :-1], (1, 0), value=self.num_codes), None, cond)  # (B, N, K)
        loss = F.cross_entropy(logits.float().flatten(0, 1), x0.flatten())
        return loss, {"ce": loss.detach()}

    def trajectory(self, model, shape, cond=None, uncond=None, sampler=None, steps=None, **options):
        """Yield (tokens so far,) * 2, after every token; guidance acts on log-probabilities."""
        check_options(self, sampler or self.default_sampler, options)
        cfg_scale, generator, device = (options.get(name, default) for name, default in (
            ("cfg_scale", 1.0), ("generator", None), ("device", "cpu")))
        context = torch.cat([cond, uncond])                                 # (2B, L, D_ctx)
        token = torch.full((shape[0], 1), self.num_codes, device=device)
        tokens, past = token[:, :0], None
        for _ in range(shape[1]):
            logits, past = model(token.repeat(2, 1), past, context)         # (2B, 1, K)
            with_text, without = logits.float().log_softmax(-1).chunk(2)
            p = (without + cfg_scale * (with_text - without)).softmax(-1)   # (B, 1, K)
            token = race(p, rand(p.shape, generator, device))               # (B, 1)
            tokens = torch.cat([tokens, token], 1)                          # (B, n)
            yield tokens, tokens


class CausalAttention(Attention):
    """Every token reads itself and those before it.

    x (B, N, D); past: (keys, values) of earlier calls, or None -> (x, (keys, values) so far), keys
    and values (B, h, N, d) each.
    """

    def forward(self, x, past=None):
        B, N, D = x.shape
        heads = lambda y: y.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))    # (B, h, N, d)
        if past is not None:                    # one new token, which may read everything
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.proj(x.transpose(1, 2).reshape(B, N, D)), (k, v)


class CausalBlock(nn.Module):
    """Causal self-attention, cross-attention to the words, MLP: VQ-Diffusion's without a time."""

    def __init__(self, hidden_size, num_heads, context_dim, mlp_hidden):
        super().__init__()
        self.ln1, self.ln1_1, self.ln2 = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.attn1 = CausalAttention(hidden_size, num_heads)
        self.attn2 = Attention(hidden_size, num_heads, context_dim)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_hidden), GELU2(),
                                 nn.Linear(mlp_hidden, hidden_size))

    def forward(self, x, context, past=None):
        out, past = self.attn1(self.ln1(x), past)
        x = x + out
        x = x + self.attn2(self.ln1_1(x), context)
        return x + self.mlp(self.ln2(x)), past


class CausalTransformer(nn.Module):
    """Shifted tokens (B, n), words (B, L, C) -> logits (B, n, K), and the keys and values.

    The MLP is wider than VQTransformer's, to make up for the tables and layers of its time.
    """
    matrices = r"blocks\.\d+\.(attn\d|mlp)"                                 # Muon's share

    def __init__(self, num_codes, length, hidden_size=128, depth=4, num_heads=4, context_dim=64,
                 mlp_hidden=861):
        super().__init__()
        self.emb = nn.Embedding(num_codes + 1, hidden_size)
        self.places = nn.Embedding(length, hidden_size)
        self.blocks = nn.ModuleList(CausalBlock(hidden_size, num_heads, context_dim, mlp_hidden)
                                    for _ in range(depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_codes))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens, past, context):
        """past: None (all tokens at once), or (how many came before, their keys and values)."""
        first, memory = past or (0, [None] * len(self.blocks))
        x = self.emb(tokens) + self.places.weight[first:first + tokens.shape[1]]    # (B, n, D)
        new = []
        for block, kv in zip(self.blocks, memory):
            x, kv = block(x, context, kv)
            new.append(kv)
        return self.to_logits(x), (first + tokens.shape[1], new)


def build(sizes, settings, info, stage):
    """The task of the causal transformer."""
    causal = CausalTransformer(stage.num_codes, stage.grid ** 2, **sizes)
    return text_conditional(causal, 64, NextToken(stage.num_codes), settings, info, stage)


def autoregressive(seed, steps=STEPS, **flags):
    """(task, averaged model) of the rival, as a family of its own in train.py's table."""
    FAMILIES["causal"] = Family(TOKENS, build, {"causal-tiny": {}}, "vq-vae", True, 1, "needed")
    flags = {"first_stage": first_stage(), **flags} if "first_stage" not in flags else flags
    config, dataset, task = setup("causal-tiny", OUT, data="scenes", steps=steps, batch_size=32,
                                  seed=seed, cfg_scale=3.0, **flags)
    return task, train_and_watch(config, dataset, task, steps, lambda ema: {})[1]


def seconds(task, model, count, rounds=5, **options):
    """Median CPU seconds of sampling the tokens of `count` pictures."""
    y, times = task.tokenizer(["a large red circle on gray"] * count), []
    for seed in range(rounds):
        begin = time.process_time()
        task.sample(model, y, generator=seeds(seed, count, "cpu"), **options)
        times.append(time.process_time() - begin)
    return statistics.median(times)


def run_cell(cell, captions):
    """Train a model, unless its file is there; its quality and speed, a row per way to sample."""
    rival = cell["model"] == "autoregressive"
    task, model = autoregressive(cell["seed"]) if rival else base(cell["seed"])
    params = sum(p.numel() for p in model.parameters())
    return [{**cell, "calls": way.get("steps", task.shape[0]), "params": params,
             **accuracy(task, model, captions, **way), "s_one": seconds(task, model, 1, **way),
             "s_48": seconds(task, model, 48, **way)}
            for way in ([{}] if rival else [{"steps": n} for n in CALLS])]


def report():
    """The table, and times and quality beside the rival's."""
    lines, rival, text = [], {"model": "autoregressive", "calls": 64}, ""
    for where in (rival, *({"model": "VQ-Diffusion", "calls": n} for n in CALLS)):
        if not TABLE.column("all", **where):
            return ""
        times = {key: mean_se(TABLE.column(key, **where))[0] for key in ("s_one", "s_48")}
        lines.append([*where.values(), f"{TABLE.column('params', **where)[0] / 1e6:.3f}",
                      *(shown(TABLE.column(axis, **where), 1, 100) for axis in AXES),
                      *(f"{value:.3f}" for value in times.values())])
        if where is not rival:
            slower = [value / mean_se(TABLE.column(key, **rival))[0]
                      for key, value in times.items()]
            gap = compared(*(TABLE.by("seed", "all", **w) for w in (where, rival)), 1, 100)
            text += (f"- {where['calls']} calls take {slower[0]:.2f} times as long as the rival "
                     f"for one picture, {slower[1]:.2f} times for 48; `all` minus the rival's: "
                     f"{gap}\n")
    count = 240 if TABLE.first_edition else TABLE.column("captions")[0]
    return (notice(TABLE, "The seeds of the autoregressive model hid the same captions, so its "
                          "standard errors are too small; those of VQ-Diffusion are runs of "
                          "train.py.")
            + markdown(["model", "calls", "M params", *AXES, "CPU-s, one picture",
                        "CPU-s, 48 at once"], lines)
            + f"\nPer cent of {count} captions. VQ-Diffusion against the autoregressive model:\n\n"
            + text + "\nThe two differ in quality, so this does not test speed at equal quality.\n")


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    captions = [] if args.summary else data.load("scenes", split="test", count=CAPTIONS).captions
    cells = [{"model": model, "seed": seed} for seed in range(args.seeds)
             for model in ("autoregressive", "VQ-Diffusion")]
    run(args, TABLE, cells, lambda cell: run_cell(cell, captions))
    print(report())


if __name__ == "__main__":
    main()
