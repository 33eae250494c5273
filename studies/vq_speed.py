"""How much do probabilities save? Time and memory of one training step of the mask-and-replace loss, two ways.

Claim: the loss of vqdiffusion.py takes at most half the time and half the memory of the formulas as they were
published, on log-one-hot tensors. One step is: draw t, noise the tokens, loss, gradient with respect to the logits; no
network. The size is the paper's: batch 4, 2886 codes, 1024 tokens, 100 steps.

    python -m studies.vq_speed          # a minute; writes studies/results/vq_speed.csv

Each way runs in a process of its own, so that its peak memory is its own: what the operating system counts at the end,
less what it counted once the logits were there. On a GPU the peak is torch's count of allocated memory.
"""
import argparse
import csv
import multiprocessing
import pathlib
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from vqdiffusion import MaskReplace

BATCH, CODES, TOKENS, STEPS = 4, 2886, 1024, 100


class LogOneHot:
    """The published formulas: every distribution is a tensor of log-probabilities (B, K+1, L), one-hot ones too."""

    def __init__(self, chain):
        self.K, self.T, self.weight = chain.num_codes, chain.steps, chain.aux_weight
        t = torch.arange(chain.steps)
        single = dict(zip(("a", "b", "g"), chain.transition(t, t - 1)))
        total = {"a_bar": chain.alpha_bar, "b_bar": chain.beta_bar, "g_bar": chain.gamma_bar}
        self.tables = {k: v.log().float() for k, v in {**single, **total}.items()}
        self.tables |= {"not_g": (1 - single["g"]).log().float(), "not_g_bar": (1 - chain.gamma_bar).log().float()}

    def at(self, name, t):
        return self.tables[name].to(t.device)[t].view(-1, 1, 1)                             # (B, 1, 1)

    def one_hot(self, tokens):
        return F.one_hot(tokens, self.K + 1).movedim(-1, 1).float().clamp(min=1e-30).log()  # (B, K+1, L)

    def forward_step(self, log_x, t, suffix):
        """log q(x_t | x) with the tables of one step ("") or of all steps so far ("_bar")."""
        codes = torch.logaddexp(log_x[:, :-1] + self.at("a" + suffix, t), self.at("b" + suffix, t))
        mask = torch.logaddexp(log_x[:, -1:] + self.at("not_g" + suffix, t), self.at("g" + suffix, t))
        return torch.cat([codes, mask], dim=1)

    def posterior(self, log_x0, xt, t):
        """log q(x_{t-1} | x_t, x_0) for a one-hot or a guessed x_0."""
        log_xt, masked = self.one_hot(xt), (xt == self.K)[:, None]
        nothing = torch.full_like(log_x0[:, :1], -69.0776)
        reach = torch.where(masked, self.at("g_bar", t), self.forward_step(log_xt, t, "_bar")[:, :-1])
        step = torch.cat([self.forward_step(log_xt, t, "")[:, :-1], nothing], dim=1)
        masked_step = torch.cat([self.at("g", t).expand(-1, self.K, -1), torch.zeros_like(self.at("g", t))], dim=1)
        step = torch.where(masked, masked_step, step)
        ratio = torch.cat([log_x0[:, :-1] - reach, nothing], dim=1)
        scale = ratio.logsumexp(1, keepdim=True)
        return (self.forward_step(ratio - scale, t - 1, "_bar") + step + scale).clamp(-70, 0)

    def loss(self, model, x0, generator=None):
        t = torch.randint(self.T, (len(x0),), device=x0.device)
        log_x0 = self.one_hot(x0)
        log_q = self.forward_step(log_x0, t, "_bar")
        gumbel = -(-(torch.rand_like(log_q) + 1e-30).log() + 1e-30).log()
        xt = (log_q + gumbel).argmax(1)
        log_p0 = F.log_softmax(model(xt, t, None).double(), dim=1).float()
        log_p0 = torch.cat([log_p0, torch.full_like(log_p0[:, :1], -70)], dim=1).clamp(-70, 0)
        guess, truth = self.posterior(log_p0, xt, t), self.posterior(log_x0, xt, t)
        kl = (truth.exp() * (truth - guess)).sum(1).sum(1)                                  # (B,)
        nll = -(log_x0.exp() * guess).sum(1).sum(1)
        aux = (log_x0[:, :-1].exp() * (log_x0[:, :-1] - log_p0[:, :-1])).sum(1).sum(1)
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
    loss = (lambda: chain.loss(model, x0)[0]) if way == "ours" else (lambda: LogOneHot(chain).loss(model, x0))
    if cuda:
        loss().backward()                                       # kernels load at first use
        logits.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, clock = [], time.perf_counter if cuda else time.process_time     # one thread: not what others take
    for _ in range(repeats):
        logits.grad, start = None, clock()
        loss().backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    after = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queue.put((statistics.median(seconds), after - before))


def main(argv=None):
    """Measure both ways, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median time counts")
    args, rows, spawn = parser.parse_args(argv), {}, multiprocessing.get_context("spawn")
    for way in ("log-one-hot", "ours"):
        queue = spawn.Queue()
        process = spawn.Process(target=measure, args=(way, args.device, args.repeats, queue))
        process.start()
        rows[way] = queue.get()
        process.join()
    path = pathlib.Path(__file__).parent / "results" / "vq_speed.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["way", "device", "seconds per step", "peak MiB"])
        for way, (seconds, peak) in rows.items():
            table.writerow([way, args.device, f"{seconds:.3f}", round(peak / 2**20)])
            print(f"{way:12} {seconds:7.3f} s per step, {peak / 2**20:6.0f} MiB at the peak")
    time_ratio, memory_ratio = (ours / theirs for ours, theirs in zip(rows["ours"], rows["log-one-hot"]))
    print(f"ours / log-one-hot: time {time_ratio:.2f}, memory {memory_ratio:.2f}")


if __name__ == "__main__":
    main()
