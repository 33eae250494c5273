"""All tokens at once, again and again, or one after another?

Claim (Gu et al. 2022, Tables 5 and 6): at equal quality VQ-Diffusion samples 15 times as fast as an
autoregressive model: it needs a few dozen calls of the network for any number of tokens N, the
other one N calls. But what a call costs depends on how: the paper's rival computes the whole prefix
anew for every token; one that keeps keys and values computes one token. Time: transformers of the
same width, depth and number of parameters with random weights, N = 64, 256, 1,024 tokens, 1 and 32
pictures at once, no guidance, CPU seconds of one thread; the rival's calls are timed at eight
lengths of the prefix, evenly spaced, of which N times the mean is the whole. Quality: both learn
the 8x8 tokens of studies.vq_base, the same number of steps and pictures (the rival learns from
all tokens of a picture at once); compared only where both have at least 90 % of 600 test captions
right. Time takes 15 CPU-minutes, quality an hour a seed, beside the runs of studies.vq_base.

    python -m studies.vq_autoregressive --only time
    python -m studies.vq_autoregressive --seeds 3 --only quality    # after studies.vq_base
"""
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import one_line
from diffusion import check_options
from models import FAMILIES, TOKENS, Family, denoising_task
from studies.common import Table, interval, markdown, parser, run, setup, shown, train_and_watch
from studies.vq_base import AXES, BATCH, ON, OUT, STEPS, accuracy, base, captions_of, first_stage
from vqdiffusion import VQ_CONFIGS, GELU2, Attention, VQTransformer, race, rand

LENGTHS, AT_ONCE, CALLS, POINTS, WORDS = (64, 256, 1024), (1, 32), (100, 25, 10), 8, 16
WAYS = ("kept keys and values", "prefix anew", *(f"{n} calls" for n in CALLS))
ENOUGH = 0.9                                            # of captions right, to compare quality
TIME = Table("vq_time", ["tokens", "at_once", "way"])
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
    return denoising_task(causal, 64, NextToken(stage.num_codes), settings, info, stage)


def autoregressive(seed, steps=STEPS[-1], **flags):
    """(task, averaged model) of the rival, as a family of its own in train.py's table."""
    FAMILIES["causal"] = Family(TOKENS, build, {"causal-tiny": {}}, "vq-vae", True, 1, "needed")
    flags = {"first_stage": first_stage(), **flags} if "first_stage" not in flags else flags
    config, dataset, task = setup("causal-tiny", OUT, ON, data="scenes", hold_out=True, steps=steps,
                                  batch_size=BATCH, ema=0.998, seed=seed, cfg_scale=3.0, **flags)
    return task, train_and_watch(config, dataset, task, steps, lambda ema: {})[1]


# --------------------------------------------------------------------------------------------------
# time

def cpu_seconds(call, rounds=3):
    """Median CPU seconds of a call, after a first one that does not count."""
    times = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times[1:])


@torch.no_grad()
def time_cell(tokens, at_once, way, codes=256):
    """The row of one way to sample pictures of so many tokens, so many at once."""
    torch.manual_seed(0)
    words, grid = torch.randn(at_once, WORDS, 64), round(tokens ** 0.5)
    if way.endswith("calls"):
        model = VQTransformer(codes, grid, **VQ_CONFIGS["vq-tiny"], relative=True).eval()
        x, t = torch.full((at_once, tokens), codes), torch.full((at_once,), 50)
        calls = int(way.split()[0])
        seconds = calls * cpu_seconds(lambda: model(x, t, words))
    else:
        model, calls, times = CausalTransformer(codes, tokens).eval(), tokens, []
        for k in range(POINTS):                         # the middles of eight equal parts
            n = max(1, round(tokens * (k + 0.5) / POINTS))
            x = torch.zeros(at_once, n, dtype=torch.int64)
            if way == WAYS[0]:
                past = model(x[:, 1:], None, words)[1] if n > 1 else None
                call = lambda: model(x[:, :1], past, words)
            else:
                call = lambda: model(x, None, words)
            times.append(cpu_seconds(call))
        seconds = calls * statistics.fmean(times)
    params = sum(p.numel() for p in model.parameters())
    return {"calls": calls, "params": params, "seconds": seconds}


def run_cell(cell):
    """Train a model, unless its file is there, and judge its pictures."""
    task, model = (autoregressive if cell["model"] == "autoregressive" else base)(cell["seed"])
    return [{**cell, **accuracy(task, model, captions_of())}]


# --------------------------------------------------------------------------------------------------
# the tables

def time_report():
    """Seconds of every way, and how many times as long the rival's two ways take."""
    lines = []
    for tokens in LENGTHS:
        for at_once in AT_ONCE:
            where = {"tokens": tokens, "at_once": at_once}
            found = TIME.by("way", "seconds", **where)
            if {*WAYS} <= found.keys():
                lines.append([tokens, at_once, *(f"{found[way]:.3g}" for way in WAYS),
                              *(f"{found[way] / found['25 calls']:.2g}" for way in WAYS[:2])])
    if not lines:
        return ""
    heads = ["N", "pictures", *WAYS, "kept / 25 calls", "anew / 25 calls"]
    return ("**Time**, CPU seconds to sample so many pictures\n\n" + markdown(heads, lines)
            + "\nThe paper's factor is 15, at N = 1,024, against a prefix computed anew.\n")


def quality_report():
    """Both models, and their difference where both are good enough."""
    models = ("autoregressive", "VQ-Diffusion")
    columns = ("all", "two", "one", *(axis for axis in AXES if axis != "all"))
    lines = [[model, len(TABLE.column("seed", model=model)),
              *(shown(TABLE.column(c, model=model), 1, 100) for c in columns)]
             for model in models if TABLE.column("seed", model=model)]
    if not lines:
        return ""
    text = ("\n**Quality**, per cent of 600 captions\n\n"
            + markdown(["model", "seeds", *columns], lines))
    rival, ours = (TABLE.by("seed", "all", model=model) for model in models)
    gaps = [ours[seed] - rival[seed] for seed in ours if seed in rival]
    if gaps and min(statistics.fmean(found.values()) for found in (rival, ours)) < ENOUGH:
        return text + (f"\nNot both have {100 * ENOUGH:.0f} % right: their quality is not "
                       "compared, nor their time at equal quality.\n")
    if len(gaps) < 2:
        return text
    mean, low, high = (100 * value for value in interval(gaps))
    return text + (f"\nBoth have at least {100 * ENOUGH:.0f} % right. VQ-Diffusion, 25 calls, "
                   f"minus the rival: {mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} "
                   f"({len(gaps)} seeds).\n")


def report():
    """Both tables, those that are measured."""
    return time_report() + quality_report()


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__)
    p.add_argument("--only", choices=["time", "quality"], help="one half of the study")
    args = p.parse_args(argv)
    times = [{"tokens": tokens, "at_once": at_once, "way": way} for tokens in LENGTHS
             for at_once in AT_ONCE for way in WAYS]
    cells = [{"model": model, "seed": seed} for seed in range(args.seeds)
             for model in ("VQ-Diffusion", "autoregressive")]
    if args.only != "quality":
        run(args, TIME, times, lambda cell: [{**cell, **time_cell(**cell)}])
    if args.only != "time":
        run(args, TABLE, cells, run_cell)
    print(report())


if __name__ == "__main__":
    main()
