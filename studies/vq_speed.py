"""Time and memory of the mask-and-replace loss in probabilities and on log-one-hot tensors

Claim, ours: the loss of vqdiffusion.py takes at most half the time and half the memory of the
formulas as they were published, on log-one-hot tensors. One step is: random numbers, noised tokens,
loss, gradient of the logits; no network. The size is the paper's: batch 4, 2886 codes, 1024 tokens,
100 steps. Each way runs in a process of its own, so that its peak memory is its own: what the
operating system counts at the end, less what it counted once the logits were there. On a GPU the
peak is torch's count of allocated memory. A minute.

    python -m studies.vq_speed
    python -m studies.vq_speed --device cuda
"""
import multiprocessing
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from cli import one_line, resolve_device
from studies.common import Table, markdown, parser, whole
from vqdiffusion import MaskReplace

BATCH, CODES, TOKENS, STEPS = 4, 2886, 1024, 100
TABLE = Table("vq_speed", ["way", "device"])


class LogOneHot:
    """The published formulas: every distribution is a tensor of log-probabilities (B, K+1, L)."""

    def __init__(self, chain):
        self.K, self.T, self.weight = chain.num_codes, chain.steps, chain.aux_weight
        t = torch.arange(chain.steps)
        single = dict(zip(("a", "b", "g"), chain.transition(t, t - 1)))
        total = {"a_bar": chain.alpha_bar, "b_bar": chain.beta_bar, "g_bar": chain.gamma_bar}
        self.tables = {k: v.log().float() for k, v in {**single, **total}.items()}
        self.tables |= {"not_g": (1 - single["g"]).log().float(),
                        "not_g_bar": (1 - chain.gamma_bar).log().float()}

    def at(self, name, t):
        """A table's values at t (B,), (B, 1, 1)."""
        return self.tables[name].to(t.device)[t].view(-1, 1, 1)

    def one_hot(self, tokens):
        """Tokens (B, L) -> log-probabilities (B, K+1, L)."""
        return F.one_hot(tokens, self.K + 1).movedim(-1, 1).float().clamp(min=1e-30).log()

    def forward_step(self, log_x, t, suffix):
        """log q(x_t | x) with the tables of one step ("") or of all steps so far ("_bar")."""
        a, b, g, not_g = (self.at(name + suffix, t) for name in ("a", "b", "g", "not_g"))
        codes = torch.logaddexp(log_x[:, :-1] + a, b)
        mask = torch.logaddexp(log_x[:, -1:] + not_g, g)
        return torch.cat([codes, mask], dim=1)

    def posterior(self, log_x0, xt, t):
        """log q(x_{t-1} | x_t, x_0) for a one-hot or a guessed x_0."""
        log_xt, masked = self.one_hot(xt), (xt == self.K)[:, None]
        nothing = torch.full_like(log_x0[:, :1], -69.0776)
        reach = self.forward_step(log_xt, t, "_bar")[:, :-1]
        reach = torch.where(masked, self.at("g_bar", t), reach)
        step = torch.cat([self.forward_step(log_xt, t, "")[:, :-1], nothing], dim=1)
        g = self.at("g", t)
        masked_step = torch.cat([g.expand(-1, self.K, -1), torch.zeros_like(g)], dim=1)
        step = torch.where(masked, masked_step, step)
        ratio = torch.cat([log_x0[:, :-1] - reach, nothing], dim=1)
        scale = ratio.logsumexp(1, keepdim=True)
        return (self.forward_step(ratio - scale, t - 1, "_bar") + step + scale).clamp(-70, 0)

    def loss(self, model, x0):
        """The bound plus the auxiliary loss of x0 (B, L), a scalar."""
        t = torch.randint(self.T, (len(x0),), device=x0.device)
        log_x0 = self.one_hot(x0)
        log_q = self.forward_step(log_x0, t, "_bar")
        gumbel = -(-(torch.rand_like(log_q) + 1e-30).log() + 1e-30).log()
        xt = (log_q + gumbel).argmax(1)
        log_p0 = F.log_softmax(model(xt, t, None).double(), dim=1).float()
        log_p0 = torch.cat([log_p0, torch.full_like(log_p0[:, :1], -70)], dim=1).clamp(-70, 0)
        guess, truth = self.posterior(log_p0, xt, t), self.posterior(log_x0, xt, t)
        kl = (truth.exp() * (truth - guess)).sum((1, 2))                        # (B,)
        nll = -(log_x0.exp() * guess).sum((1, 2))
        aux = (log_x0[:, :-1].exp() * (log_x0[:, :-1] - log_p0[:, :-1])).sum((1, 2))
        base, aux = torch.where(t == 0, nll, kl), torch.where(t == 0, nll, aux)
        return self.T * (base + (2 - t / self.T) * self.weight * aux).sum() / x0.numel()


def measure(way, device, repeats, queue):
    """Put (median seconds, peak bytes) of one training step into queue."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuda, chain = device == "cuda", MaskReplace(STEPS, CODES)
    layout = (TOKENS, CODES) if way == "ours" else (CODES, TOKENS)
    logits = torch.randn(BATCH, *layout, device=device).requires_grad_()
    x0 = torch.randint(CODES, (BATCH, TOKENS), device=device)
    model = lambda x, t, cond: logits
    ours = lambda: chain.loss(model, x0, **chain.draw(x0.shape, device=device))[0]
    loss = ours if way == "ours" else lambda: LogOneHot(chain).loss(model, x0)
    if cuda:
        loss().backward()                                       # kernels load at first use
        logits.grad = None
        torch.cuda.reset_peak_memory_stats()
    most = lambda: (torch.cuda.max_memory_allocated() if cuda else
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    before = torch.cuda.memory_allocated() if cuda else most()
    # one thread's CPU time, so that other programs do not count
    seconds, clock = [], time.perf_counter if cuda else time.process_time
    for _ in range(repeats):
        logits.grad, begin = None, clock()
        loss().backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    queue.put((statistics.median(seconds), most() - before))


def report():
    """The table, and the ratios of its rows."""
    rows = {row["way"]: row for row in TABLE.rows()}
    if len(rows) < 2:
        return ""
    time_, memory = (rows["ours"][key] / rows["log-one-hot"][key]
                     for key in ("seconds per step", "peak MiB"))
    lines = [[row[key] for key in ("way", "device", "seconds per step", "peak MiB")]
             for row in rows.values()]
    return (markdown(["way", "device", "seconds per step", "peak MiB"], lines)
            + f"\nOurs takes {time_:.2f} times the time and {memory:.2f} times the memory.\n")


@one_line
def main(argv):
    """Measure both ways, one after another, and replace the table."""
    p = parser(__doc__, ["summary"])
    p.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    p.add_argument("--repeats", type=whole, default=5, help="steps of which the median time counts")
    args, spawn = p.parse_args(argv), multiprocessing.get_context("spawn")
    rows, device = [], resolve_device(args.device)
    for way in () if args.summary else ("log-one-hot", "ours"):
        queue = spawn.Queue()
        process = spawn.Process(target=measure, args=(way, device, args.repeats, queue))
        process.start()
        seconds, peak = queue.get()
        process.join()
        rows.append({"way": way, "device": device, "seconds per step": round(seconds, 3),
                     "peak MiB": round(peak / 2 ** 20)})
    if rows:
        TABLE.path.unlink(missing_ok=True)
        TABLE.add(*rows)
    print(report())


if __name__ == "__main__":
    main()
