"""All tokens at once, again and again, or one after another? VQ-Diffusion against an autoregressive model.

The claim (Gu et al. 2022, tables 5 and 6): at equal quality VQ-Diffusion samples 15 times as fast, because it needs a
few dozen calls of the network, whatever the number of tokens, and an autoregressive model one call per token.  Here a
causal transformer of the same width, depth and number of parameters learns the same 8x8 tokens of `scenes`, 2,000 steps
of 32 (it learns from all tokens of a picture at once; VQ-Diffusion has 3,000). It is the best of its kind: it keeps
keys and values, so a call computes one token.
Seconds are CPU time on one thread, decoding left out, for one picture (how long one waits) and for 48 at once.
About 6 CPU-minutes a seed, and VQ-Diffusion's full runs, which studies.vq_chain leaves behind.

    python -m studies.vq_autoregressive             # -> studies/results/vq_autoregressive.{csv,md}
"""
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import sample
from studies.common import Table, mean_se, parser, setup, todo, train_and_watch, write_markdown
from studies.vq_chain import AXES, OUT, accuracy, base, first_stage
from tasks import TASKS, TextToTokens, TokenTask
from vqdiffusion import GELU2, Attention, race, rand

STEPS, CALLS = 2000, (100, 25, 10, 5)


class CausalAttention(Attention):
    """Every token reads itself and those before it. past: (keys, values) of earlier calls, or None.

    x (B, N, D) -> (x (B, N, D), (keys, values) so far, (B, h, N, d) each).
    """

    def forward(self, x, past=None):
        B, N, D = x.shape
        heads = lambda y: y.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))            # (B, h, N, d)
        if past is not None:                                    # one new token, which may read everything
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.proj(x.transpose(1, 2).reshape(B, N, D)), (k, v)


class CausalBlock(nn.Module):
    """Causal self-attention, cross-attention to the words, MLP: VQ-Diffusion's block without a time."""

    def __init__(self, hidden_size, num_heads, context_dim, mlp_hidden):
        super().__init__()
        self.ln1, self.ln1_1, self.ln2 = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.attn1 = CausalAttention(hidden_size, num_heads)
        self.attn2 = Attention(hidden_size, num_heads, context_dim)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_hidden), GELU2(), nn.Linear(mlp_hidden, hidden_size))

    def forward(self, x, context, past=None):
        out, past = self.attn1(self.ln1(x), past)
        x = x + out
        x = x + self.attn2(self.ln1_1(x), context)
        return x + self.mlp(self.ln2(x)), past


class CausalTransformer(nn.Module):
    """Tokens so far (B, n), words (B, L, C) -> logits of token n (and, in training, of all before), (B, n, K).

    The first input is a start sign, code K: feed tokens shifted by one. The MLP is wider than VQTransformer's, to make
    up for the tables and layers of its time.
    """

    def __init__(self, num_codes, length, hidden_size=128, depth=4, num_heads=4, context_dim=64, mlp_hidden=861):
        super().__init__()
        self.emb, self.places = nn.Embedding(num_codes + 1, hidden_size), nn.Embedding(length, hidden_size)
        self.blocks = nn.ModuleList(CausalBlock(hidden_size, num_heads, context_dim, mlp_hidden) for _ in range(depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_codes))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens, past, context):
        """past: None (all tokens at once), or (how many came before, their keys and values block by block)."""
        first, memory = past or (0, [None] * len(self.blocks))
        x = self.emb(tokens) + self.places.weight[first:first + tokens.shape[1]]            # (B, n, D)
        new = []
        for block, kv in zip(self.blocks, memory):
            x, kv = block(x, context, kv)
            new.append(kv)
        return self.to_logits(x), (first + tokens.shape[1], new)


class AutoregressiveTask(TokenTask):
    """Next-token prediction, row by row, in the one loop."""

    def shifted(self, tokens):
        """A start sign, then all tokens but the last, (B, N)."""
        return F.pad(tokens[:, :-1], (1, 0), value=self.first_stage.num_codes)

    def loss(self, net, batch):
        y = self.model.drop_labels(batch["y"], batch["drop"])
        logits, _ = net(self.shifted(batch["x"]), None, y)                                  # (B, N, K)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch["x"].flatten())
        return loss, {"ce": loss.detach()}

    @torch.no_grad()
    def sample(self, model, y, cfg_scale=None, generator=None, callback=None):
        """One token after another, with guidance on the logits -> (B, N). Source: the same guidance as guided()."""
        cfg_scale = self.config.cfg_scale if cfg_scale is None else cfg_scale
        context = model.text(torch.cat([y, model.null_condition(len(y), y.device)]))        # (2B, L, D_ctx)
        token, past, tokens = torch.full((len(y), 1), self.first_stage.num_codes), None, []
        for _ in range(self.shape[0]):
            logits, past = model(token.repeat(2, 1), past, context)                         # (2B, 1, K)
            cond, uncond = logits.float().log_softmax(-1).chunk(2)
            p = (uncond + cfg_scale * (cond - uncond)).softmax(-1)                          # (B, 1, K)
            token = race(p, rand(p.shape, generator))
            tokens.append(token)
        return torch.cat(tokens, 1)


def autoregressive(seed):
    """(task, averaged model) of the baseline."""
    def build(config, info, vqvae):
        task = TASKS["vq"](config, info, vqvae)
        old = task.model
        causal = CausalTransformer(vqvae.num_codes, vqvae.grid ** 2, context_dim=old.text.hidden_size)
        model = TextToTokens(causal, old.text, old.null_ids, old.class_dropout_prob)
        return AutoregressiveTask(config, info, model, vqvae, task.tokenizer)
    config, dataset, task = setup("vq-tiny", OUT, build, data="scenes", steps=STEPS, batch_size=32, seed=seed,
                                  cfg_scale=3.0, first_stage=first_stage())
    return task, train_and_watch(config, dataset, task, STEPS, lambda ema: {})[1]


def seconds(task, model, count, rounds=5, **options):
    """Median CPU seconds of drawing the tokens of `count` pictures."""
    y, times = task.tokenizer(["a large red circle on gray"] * count), []
    for seed in range(rounds):
        start = time.process_time()
        task.sample(model, y, generator=sample.seeds(seed, count, "cpu"), **options)
        times.append(time.process_time() - start)
    return statistics.median(times)


def run_cell(cell, captions):
    """Train a model, unless its file is there, and measure how good and how fast it is -> one row per way to sample."""
    kind, seed = cell["model"], cell["seed"]
    task, model = autoregressive(seed) if kind == "autoregressive" else base(seed)
    params = sum(p.numel() for p in model.parameters())
    ways = [{}] if kind == "autoregressive" else [{"steps": n} for n in CALLS]
    return [{**cell, "calls": way.get("steps", task.shape[0]), "params": params,
             **accuracy(task, model, captions, **way), "s_one": seconds(task, model, 1, **way),
             "s_48": seconds(task, model, 48, **way)} for way in ways]


def summarise(table):
    """The table."""
    rows = []
    for kind, calls in (("autoregressive", 64), *(("VQ-Diffusion", n) for n in CALLS)):
        where = {"model": kind, "calls": calls}
        if len(table.column("all", **where)) > 1:
            show = ["{:.0f} ± {:.0f}".format(*(100 * v for v in mean_se(table.column(axis, **where))))
                    for axis in AXES]
            times = ["{:.3f}".format(mean_se(table.column(key, **where))[0]) for key in ("s_one", "s_48")]
            rows.append([kind, calls, f"{table.column('params', **where)[0] / 1e6:.3f}", *show, *times])
    header = ["model", "calls", "M params", *AXES, "CPU-s, one picture", "CPU-s, 48 at once"]
    write_markdown("vq_autoregressive", header, rows, "Per cent of 240 test captions, mean ± "
                   "standard error over seeds: `python -m studies.vq_autoregressive`")


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    table = Table("vq_autoregressive", ["model", "seed"])
    captions = data.load("scenes", split="test", count=240).captions
    cells = [{"model": m, "seed": s} for s in range(args.seeds) for m in ("autoregressive", "VQ-Diffusion")]
    for cell in [] if args.summary else todo(cells, table, args.part):
        table.add(*run_cell(cell, captions))
    summarise(table)


if __name__ == "__main__":
    main()
