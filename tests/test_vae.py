"""vae.py: first stages of one contract; the codebook's averages; the official AutoencoderKL."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import data
import evaluate
from conftest import fill_by_recipe, golden_case
from vae import FIRST_STAGES, VQVAE, AutoencoderKL, Codebook, Pixels, TinyAutoencoder

TRAINED = {         # one small stage of each kind that trains
    "tiny-ae": lambda: TinyAutoencoder(3, 5, factor=2, width=16, latent_noise=0.2),
    "kl-ae": lambda: AutoencoderKL(32, (1, 2), 1, 3, z_channels=5, scale=1.0),
    "vq-vae": lambda: VQVAE(image_size=8, num_codes=6, factor=2, dim=5, width=16, beta=0.3,
                            warmup=2, decay=0.9, restart=0.01)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pictures(count=4, side=8, channels=3, seed=0):
    return torch.rand(count, channels, side, side, generator=seeded(seed)) * 2 - 1


def built(kind, started=True):
    torch.manual_seed(0)
    stage = TRAINED[kind]()
    if kind == "vq-vae" and started:
        stage.codebook.started.fill_(True)
    return stage


def tensors(module):
    """A copy of every tensor of a module, buffers that are not saved included."""
    return {name: t.detach().clone() for name, t in
            [*module.named_parameters(), *module.named_buffers()]}


def same(a, b):
    """Two collections of `tensors` are equal bit for bit, NaN included."""
    as_bytes = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    return a.keys() == b.keys() and all(torch.equal(as_bytes(a[k]), as_bytes(b[k])) for k in a)


# --------------------------------------------------------------------------------------------------
# the contract

def test_table_of_kinds():
    assert {kind: stage.kind for kind, stage in FIRST_STAGES.items()} == {
        k: k for k in ("none", "tiny-ae", "kl-ae", "vq-vae")}
    assert FIRST_STAGES["tiny-ae"] is TinyAutoencoder and FIRST_STAGES["none"] is Pixels


def test_pixels_are_the_identity():
    stage, x = Pixels(), pictures()
    assert stage.encode(x) is x and stage.decode(x) is x and stage.shrink_mask(x) is x
    assert stage.latent_shape((3, 8, 6)) == (3, 8, 6) and stage.factor == 1 and stage.standardised
    assert stage.draw(4, (3, 8, 8)) == {} == stage.sizes and not stage.state_dict()
    stage.standardise(x)


@pytest.mark.parametrize("kind", TRAINED)
def test_shapes_of_latents_draws_and_pictures(kind):
    stage, x = built(kind), pictures()
    shape = stage.latent_shape((3, 8, 8))
    assert shape == ((16,) if kind == "vq-vae" else (5, 4, 4)) and stage.factor == 2
    z = stage.encode(x)
    assert z.shape == (4, *shape) and stage.decode(z).shape == x.shape
    draws = stage.draw(4, (3, 8, 8), seeded(1))
    if kind == "vq-vae":
        assert draws == {}
    else:
        assert torch.equal(draws["noise"], torch.randn(4, 5, 4, 4, generator=seeded(1)))
        wide = torch.zeros(2, 3, 6, 10)             # H and W are not mixed up
        assert stage.latent_shape((3, 6, 10)) == (5, 3, 5) == tuple(stage.encode(wide).shape[1:])
        assert stage.decode(stage.encode(wide)).shape == wide.shape
    for bad in ((3, 9, 8), (3, 8, 9), (1, 8, 8)):
        with pytest.raises(ValueError, match="reads pictures"):
            stage.latent_shape(bad)
        with pytest.raises(ValueError, match="reads pictures"):
            stage.encode(torch.zeros(2, *bad))


@pytest.mark.parametrize("kind", TRAINED)
def test_sizes_and_weights_build_the_stage_again(kind):
    """Saved as plain values and tensors, built again: the same latents, in the same units."""
    stage, x = built(kind), pictures()
    stage.standardise(x)
    assert stage.standardised
    again = FIRST_STAGES[stage.kind](**stage.sizes)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(again.encode(x), stage.encode(x)) and again.standardised
    assert torch.equal(again.decode(again.encode(x)), stage.decode(stage.encode(x)))
    assert again.sizes == stage.sizes
    draws = stage.draw(4, (3, 8, 8), seeded(1))
    assert torch.equal(again.objective(x, draws)[0], stage.objective(x, draws)[0])
    if kind == "vq-vae":
        book = again.codebook
        assert (book.warmup, book.decay, book.restart, again.beta) == (2, 0.9, 0.01, 0.3)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("started", [False, True])
def test_forward_is_the_objective_and_changes_no_state(kind, started):
    stage, x = built(kind, started).train(), pictures()
    draws, before = stage.draw(4, (3, 8, 8), seeded(1)), tensors(stage)
    loss, metrics = stage(x, draws)
    again, _ = stage.objective(x, draws)
    assert torch.equal(loss, again) and same(before, tensors(stage))
    assert not any(m.requires_grad for m in metrics.values())
    assert all(m.dim() == 0 for name, m in metrics.items() if name != "vectors")
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stage.parameters())


@pytest.mark.parametrize("kind", TRAINED)
def test_a_row_of_latents_does_not_depend_on_its_batch(kind):
    stage, x = built(kind), pictures()
    assert_close(stage.encode(x)[1:2], stage.encode(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("started", [False, True])
def test_objective_is_one_graph(kind, started):
    stage, x = built(kind, started), pictures()
    draws = stage.draw(4, (3, 8, 8), seeded(1))
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    want, got = stage(x, draws), compiled(x, draws)
    assert_close(got[0], want[0], rtol=1e-4, atol=1e-6)
    assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_cell_is_painted_if_any_of_its_pixels_is(kind):
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, 3, 4], mask[1, 0, 7, 0] = 1, 1
    small = built(kind).shrink_mask(mask)
    want = torch.zeros(2, 1, 4, 4)
    want[0, 0, 1, 2], want[1, 0, 3, 0] = 1, 1
    if kind == "vq-vae":                                                # token = row * 4 + column
        assert small.shape == (2, 16) and small[0].nonzero().flatten().tolist() == [6]
        want = want.flatten(1)
    assert torch.equal(small, want)


def test_muon_trains_the_convolutions_of_the_residual_blocks():
    for kind, count in (("tiny-ae", 6), ("vq-vae", 6), ("none", 0)):
        stage = Pixels() if kind == "none" else built(kind)
        names = [n for n, p in stage.named_parameters() if p.dim() > 1 and
                 re.match(stage.matrices, n)]
        assert len(names) == count and all(".conv" in name for name in names)
    names = [n for n, _ in built("kl-ae").named_parameters() if re.match(AutoencoderKL.matrices, n)]
    assert "decoder.mid.attn_1.q.weight" in names and "decoder.conv_in.weight" not in names


# --------------------------------------------------------------------------------------------------
# tiny-ae

def test_tiny_objective_is_squares_with_noise_and_a_pull():
    """By hand in float64; the noise is a share of the latents' spread, which gets no gradient."""
    stage, x = built("tiny-ae").double(), pictures().double()
    noise = torch.randn(4, 5, 4, 4, generator=seeded(2)).double()
    loss, metrics = stage.objective(x, {"noise": noise})
    z = stage.encoder(x)
    spread = ((z - z.mean()).square().sum() / (z.numel() - 1)).sqrt().detach()
    recon = stage.decoder(z + 0.2 * spread * noise).float()
    mse = (recon.double() - x).square().sum() / x.numel()
    assert_close(loss.double(), mse + 1e-4 * z.square().mean(), rtol=1e-6, atol=0)
    weights = list(stage.parameters())
    got = torch.autograd.grad(loss, weights)
    want = torch.autograd.grad(mse + 1e-4 * z.square().mean(), weights)
    assert_close(got, want, rtol=1e-4, atol=1e-8)
    assert_close(metrics["mse"].double(), mse, rtol=1e-6, atol=0)
    assert metrics["psnr"].item() == pytest.approx(10 * torch.log10(4 / mse).item(), rel=1e-6)


def test_standardise_changes_units_and_not_pictures():
    torch.manual_seed(0)
    stage, x = TinyAutoencoder(3, 5).double(), torch.rand(20, 3, 32, 16).double() * 2 - 1
    assert not stage.standardised
    before = stage.decode(stage.encode(x))
    stage.standardise(x)
    z = stage.encode(x)
    for channel in range(5):                                            # each by itself
        assert z[:, channel].mean().abs() < 1e-9
        assert z[:, channel].std().item() == pytest.approx(1, abs=1e-9)
    assert_close(stage.decode(z), before, atol=1e-9, rtol=0)
    assert stage.standardised and stage.mean.unique().numel() == 5
    sizes = []
    stage.encoder.register_forward_pre_hook(lambda net, given: sizes.append(len(given[0])))
    stage.standardise(x.repeat(6, 1, 1, 1))             # 2,000 large pictures at once are gigabytes
    assert sum(sizes) == 120 and max(sizes) <= 50


def test_tiny_autoencoder_learns_readable_shapes():
    """A tenth of the default first stage: the exact reader reads what comes out."""
    torch.manual_seed(0)
    train, test = (data.load("shapes", split=split, count=n)
                   for split, n in (("train", 2400), ("test", 100)))
    stage = TinyAutoencoder(3, 4, 4, latent_noise=0.1)
    opt = torch.optim.AdamW(stage.parameters(), lr=4e-3)
    for step in range(100):
        x = data.to_float(train.images[step * 24:(step + 1) * 24])
        loss, _ = stage.objective(x, stage.draw(24, x.shape[1:]))
        opt.zero_grad(), loss.backward(), opt.step()
    with torch.no_grad():
        x = data.to_float(test.images)
        recon = stage.decode(stage.encode(x))
    psnr = 10 * torch.log10(4 / (recon - x).square().mean())
    assert psnr > 17, psnr                                  # a grey picture: 12.4; here: 19.7
    assert evaluate.class_accuracy(data.to_uint8(recon), test.labels)["color"][0] > 0.9


# --------------------------------------------------------------------------------------------------
# the codebook

def book_of(num_codes=5, dim=3, started=True, **options):
    torch.manual_seed(1)
    book = Codebook(num_codes, dim, **options).double()
    book.started.fill_(started)
    return book


def cloud(count=40, dim=3, seed=0):
    return torch.randn(count, dim, generator=seeded(seed), dtype=torch.float64)


KEEP, SKIP = torch.tensor(1.0), torch.tensor(0.0)


def test_codebook_matches_official():
    d, g = golden_case("vqd_quantizer")
    c = d["config"]
    stage = VQVAE(image_size=16, num_codes=c["K"], dim=c["D"])
    stage.codebook = book = Codebook(c["K"], c["D"], c["decay"], c["eps"])
    start = {k: g[k] for k in ("embedding", "cluster_size", "embedding_avg")}
    book.load_state_dict(start | {"started": torch.tensor(True)})
    for step in range(3):
        z = g[f"z{step}"]                                               # (B, D, h, w)
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
        ids = book.nearest(vectors).view(2, -1)
        assert torch.equal(ids.view(2, 4, 4), g[f"idx{step}"])
        z_q = stage.look_up(ids)
        assert_close(z_q, g[f"zq{step}"], rtol=1e-5, atol=1e-6)
        assert_close((z_q - z).square().mean(), g[f"loss{step}"], rtol=1e-5, atol=1e-6)
        assert_close(2 * (z - z_q) / z.numel(), g[f"grad_loss{step}"], rtol=1e-5, atol=1e-6)
        book.update(vectors, KEEP, step)
        for key in start:
            assert_close(getattr(book, key), g[f"{key}{step}"], rtol=1e-5, atol=1e-5,
                         msg=lambda m: f"{key}{step}: {m}")


def test_nearest_is_the_nearest_far_from_the_origin():
    """||a||^2 + ||b||^2 - 2ab in float32 would lose these differences to rounding."""
    codes = 1000 + torch.randn(30, 4, generator=seeded(0))
    book = Codebook(30, 4)
    book.embedding.copy_(codes)
    vectors = codes[torch.arange(60) % 30] + 0.01 * torch.randn(60, 4, generator=seeded(1))
    distance = (vectors.double()[:, None] - codes.double()).square().sum(-1)        # (60, 30)
    assert torch.equal(book.nearest(vectors), distance.argmin(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(vectors), distance.argmin(1))


@pytest.mark.parametrize("restart", [0.0, 0.5])
def test_running_averages_are_the_papers(restart):
    """Two steps of Eq. 6-8 with Laplace smoothing, code by code, vector by vector."""
    book = book_of(decay=0.9, eps=0.01, restart=restart)
    book.embedding[3] = 50.0                                            # far from everything
    book.cluster_size.copy_(torch.tensor([2.0, 1.0, 3.0, 0.55, 1.5]))
    size, average = book.cluster_size.tolist(), book.embedding_avg.clone()
    for step in range(2):
        vectors, codes = cloud(seed=step), book.embedding.clone()
        owner = [min(range(5), key=lambda k: (v - codes[k]).square().sum()) for v in vectors]
        loss = [(v - codes[k]).square().sum().item() for v, k in zip(vectors, owner)]
        for k in range(5):
            mine = [v for v, o in zip(vectors, owner) if o == k]
            size[k] = 0.9 * size[k] + 0.1 * len(mine)
            average[k] = 0.9 * average[k] + 0.1 * sum(mine, torch.zeros(3))
        if restart:
            unused = [k for k in range(5) if size[k] < restart]
            assert unused or step
            for k, row in zip(unused, sorted(range(40), key=lambda i: -loss[i])):
                size[k], average[k] = 1.0, vectors[row]
        book.update(vectors, KEEP, step)
        n = sum(size)
        for k in range(5):
            smooth = (size[k] + 0.01) / (n + 5 * 0.01) * n
            assert book.cluster_size[k].item() == pytest.approx(size[k], rel=1e-6)
            assert_close(book.embedding_avg[k], average[k], rtol=1e-6, atol=1e-9)
            assert_close(book.embedding[k], average[k] / smooth, rtol=1e-6, atol=1e-9)


def test_codes_start_where_brute_force_kmeans_ends():
    """Lloyd's iterations with lists, including codes that lose all their vectors."""
    vectors = torch.cat([cloud(30), 6 + 0.1 * cloud(30, seed=1), cloud(4, seed=2).repeat(5, 1)])
    book, K = book_of(12, started=False, warmup=3), 12
    rows = [int(k * (len(vectors) - 1) / (K - 1)) for k in range(K)]
    centres, replaced = [vectors[r] for r in rows], 0
    for _ in range(20):
        distance = [[(v - c).square().sum().item() for c in centres] for v in vectors]
        owner = [row.index(min(row)) for row in distance]
        far = sorted(range(len(vectors)), key=lambda i: -min(distance[i]))
        for k in range(K):
            mine = [v for v, o in zip(vectors, owner) if o == k]
            if not mine:
                replaced += 1
            centres[k] = sum(mine) / len(mine) if mine else vectors[far.pop(0)]
    assert replaced > 0
    before = tensors(book)
    for step in range(2):                                               # steps 0 and 1: warm-up
        book.update(vectors, KEEP, step)
        assert same(before, tensors(book))
    book.update(vectors, SKIP, 2)                                       # not finite: wait
    assert same(before, tensors(book))
    book.update(vectors, KEEP, 3)
    assert book.started and (book.cluster_size == 10).all()
    assert_close(book.embedding, torch.stack(centres), rtol=0, atol=1e-9)
    assert_close(book.embedding_avg, 10 * book.embedding)


@pytest.mark.parametrize("seed", range(5))
def test_start_finds_clusters(seed):
    """In order, the evenly spaced rows meet every cluster once: no local optimum is in the way."""
    centres = 10 * torch.eye(6)
    z = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(300, 6, generator=seeded(seed))
    book = Codebook(6, 6)
    book.start(z)
    assert_close(book.embedding, z.view(6, 50, 6).mean(1), rtol=1e-5, atol=1e-5)


def test_unused_codes_move_to_vectors_that_are_far_from_their_codes():
    z = 10 * torch.eye(6).repeat_interleave(50, 0) + 0.1 * torch.randn(300, 6, generator=seeded(0))
    book = Codebook(6, 6, restart=0.5)
    book.start(z)
    book.embedding[2], book.embedding[4] = 1e3, -1e3                    # two codes, far from all
    book.cluster_size[2] = book.cluster_size[4] = 0.1
    lost = book.embedding.clone()
    book.update(z, KEEP, 0)
    distance = lambda a, b: (a[:, None] - b).norm(dim=-1)
    moved = book.embedding[[2, 4]]
    # each is a vector of the batch, up to the smoothing of counts (eps / 1 of a length of 10)
    assert distance(moved, z).min(1).values.max() < 1e-3
    assert distance(moved, lost[[0, 1, 3, 5]]).min() > 1                # far from its code
    assert not torch.equal(moved[0], moved[1])


def test_restart_0_moves_no_code_not_even_one_that_was_never_used():
    book = book_of(decay=0.9, restart=0.0)
    book.embedding[3], book.cluster_size[3], book.embedding_avg[3] = 50.0, 0.0, 2.0
    book.update(cloud(), KEEP, 0)
    assert book.cluster_size[3] == 0
    assert_close(book.embedding_avg[3], torch.full((3,), 0.9 * 2).double(), rtol=1e-6, atol=0)


def test_halves_of_a_batch_count_as_one():
    """--accum 2, or two processes: the caller concatenates; the order does not matter."""
    one, two = book_of(restart=0.3), book_of(restart=0.3)
    vectors = cloud(60)
    one.update(vectors, KEEP, 0)
    two.update(torch.cat([vectors[30:], vectors[:30]]), KEEP, 0)
    for a, b in zip(tensors(one).values(), tensors(two).values()):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep", [SKIP, torch.tensor(False)])
def test_a_step_that_is_not_taken_changes_nothing(keep):
    vectors = cloud()
    vectors[3, 1], vectors[7] = float("nan"), float("inf")
    for started in (False, True):
        book = book_of(started=started, restart=0.5)
        book.update(cloud(seed=1), torch.tensor(started), 0)
        before = tensors(book)
        book.update(vectors, keep, 1)
        assert same(before, tensors(book))
    book.update(cloud(seed=2), keep.logical_not(), 2)                   # and the next one counts
    assert not same(before, tensors(book)) and book.embedding.isfinite().all()


# --------------------------------------------------------------------------------------------------
# vq-vae

def test_straight_through_and_commitment():
    stage, x = built("vq-vae"), pictures()
    grads = {}
    stage.encoder.register_forward_hook(
        lambda m, i, o: (o.retain_grad(), grads.update(z=o)) and None)
    stage.decoder.register_forward_pre_hook(
        lambda m, i: (i[0].retain_grad(), grads.update(read=i[0])) and None)
    stage.decoder.register_forward_hook(lambda m, i, o: grads.update(recon=o))
    loss, metrics = stage.objective(x, {})
    z, read, mse = grads["z"], grads["read"], (grads["recon"] - x).square().mean()
    codes = stage.look_up(stage.encode(x))
    assert_close(read, codes, rtol=0, atol=1e-5)                        # the decoder reads codes
    assert_close(loss, mse + 0.3 * (z - codes).square().mean(), rtol=1e-5, atol=0)
    assert metrics["psnr"].item() == pytest.approx(10 * torch.log10(4 / mse).item(), rel=1e-5)
    loss.backward()
    pull = 0.3 * 2 * (z - codes).detach() / z.numel()                   # towards the codes
    assert_close(z.grad, read.grad + pull, rtol=1e-4, atol=1e-7)        # and its gradient, as it is
    assert read.grad.abs().max() > 0 and pull.abs().max() > 0
    assert torch.equal(metrics["vectors"], z.detach().permute(0, 2, 3, 1).reshape(-1, 5))
    assert not any("codebook" in name for name, _ in stage.named_parameters())


def test_before_the_start_the_decoder_reads_the_encoder():
    stage, x = built("vq-vae", started=False), pictures()
    loss, metrics = stage.objective(x, {})
    plain = (stage.decoder(stage.encoder(x)) - x).square().mean()
    assert_close(loss, plain, rtol=1e-6, atol=0)                        # and no commitment
    for step in range(2):                                               # warmup=2
        assert not stage.codebook.started
        stage.codebook.update(metrics["vectors"], KEEP, step)
    assert stage.codebook.started
    assert (stage.objective(x, {})[0] - plain).abs() > 1e-6


def test_tokens_are_row_by_row_and_decode_to_what_training_sees():
    stage, x = built("vq-vae"), pictures()
    ids = stage.encode(x)
    assert ids.dtype == torch.int64 and ids.max() < 6
    z = stage.encoder(x)
    assert ids[1, 6] == stage.codebook.nearest(z[1:2, :, 1, 2])[0]      # token 6: row 1, column 2
    recon = []
    stage.decoder.register_forward_hook(lambda m, i, o: recon.append(o))
    stage.objective(x, {})
    assert_close(stage.decode(ids), recon[0], rtol=1e-4, atol=1e-5)


def test_perplexity_and_number_of_codes(monkeypatch):
    stage = VQVAE(image_size=8, num_codes=12, width=16)
    few = torch.tensor([0, 0, 0, 5])                                    # 3/4 and 1/4
    for ids, codes, want in ((torch.arange(12), 12, 12), (torch.zeros(4, dtype=torch.int64), 1, 1),
                             (few, 2, 4 / 3 ** 0.75)):
        monkeypatch.setattr(stage.codebook, "nearest", lambda vectors: ids)
        metrics = stage.objective(pictures(len(ids) // 4), {})[1]       # 4 tokens a picture
        assert metrics["codes"].item() == codes
        assert metrics["perplexity"].item() == pytest.approx(want, rel=1e-5)


def test_the_batch_must_bring_enough_vectors():
    stage = VQVAE(image_size=8, num_codes=12, width=16)                 # 4 tokens a picture
    stage.check_batch(3)
    with pytest.raises(ValueError, match="12 codes cannot start from the 8 vectors.*--batch-size"):
        stage.check_batch(2)


def test_vqvae_names_wrong_input():
    stage = VQVAE(image_size=8, num_codes=12, width=16)
    for call, words in ((lambda: VQVAE(image_size=30), "divisible by 4, not 3 x 30 x 30"),
                        (lambda: stage.encode(torch.zeros(1, 3, 16, 16)), r"not \(3, 16, 16\)")):
        with pytest.raises(ValueError, match=words):
            call()


def test_bfloat16_autocast_trains():
    """As on a GPU: the networks in bfloat16, the codebook in float32."""
    stage, x = built("vq-vae"), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = stage.objective(x, {})
        loss.backward()
        ids = stage.encode(x)
        z = stage.encoder(x).float().permute(0, 2, 3, 1).flatten(0, 2)
    assert loss.dtype == metrics["vectors"].dtype == torch.float32
    assert torch.equal(stage.codebook.nearest(z).view(4, -1), ids)
    stage.codebook.update(metrics["vectors"], KEEP, 0)
    assert stage.codebook.embedding.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in stage.parameters())


def test_vqvae_learns_scenes():
    """120 steps across the warm-up: better than a grey picture by far, most codes in use."""
    torch.manual_seed(0)
    train = data.load("scenes", count=1600)
    stage = VQVAE(num_codes=32, width=32, warmup=50)
    opt = torch.optim.AdamW(stage.parameters(), lr=4e-3)
    for step in range(120):
        x = data.to_float(train.images[torch.arange(step * 16, step * 16 + 16) % 1600])
        loss, metrics = stage(x, {})
        opt.zero_grad(), loss.backward(), opt.step()
        stage.codebook.update(metrics["vectors"], KEEP, step)
    assert metrics["psnr"] > 18 and metrics["codes"] > 16   # grey: 13; here: 19.9, 31


# --------------------------------------------------------------------------------------------------
# kl-ae

def test_kl_decoder_matches_official():
    d, g = golden_case("unet_vae_decoder")
    c = d["config"]
    stage = fill_by_recipe(AutoencoderKL(c["ch"], tuple(c["ch_mult"]), c["num_res_blocks"]))
    shapes = {k: list(v.shape) for k, v in stage.state_dict().items()
              if k.startswith(("decoder.", "post_quant_conv."))}
    assert shapes == dict(d["params"])
    stages = {}
    stage.post_quant_conv.register_forward_hook(lambda m, i, o: stages.update(post_quant=o))
    stage.decoder.mid.register_forward_hook(lambda m, i, o: stages.update(mid=o))
    with torch.no_grad():
        stages["out"] = stage.decode(g["in_z"])
    for k, v in stages.items():
        assert_close(v, g[f"out_{k}"], rtol=1e-4, atol=1e-4)


def test_kl_sizes():
    with torch.device("meta"):
        stage = AutoencoderKL()
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(stage) == 83_653_863
    assert (count(stage.encoder), count(stage.decoder)) == (34_163_592, 49_490_179)
    assert stage.latent_shape((3, 256, 256)) == (4, 32, 32)


def test_kl_objective_samples_latents_and_stays_near_the_normal():
    stage, x = built("kl-ae"), pictures()
    noise = stage.draw(4, (3, 8, 8), seeded(3))["noise"]
    with torch.no_grad():                                               # far from the normal:
        stage.quant_conv.bias[:5] += 30                                 # the mean
        stage.quant_conv.bias[5:] += 3                                  # the log-variance
    loss, metrics = stage.objective(x, {"noise": noise})
    mean, logvar = stage.moments(x)
    recon = stage.decoder(stage.post_quant_conv(mean + logvar.exp().sqrt() * noise))
    normal, unit = torch.distributions.Normal, torch.tensor(1.0)
    posterior = normal(mean.double(), (logvar.double() / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, normal(0 * unit, unit)).mean()
    assert_close(loss.double(), (recon - x).abs().mean().double() + 1e-4 * kl, rtol=1e-5, atol=0)
    assert 1e-4 * kl > 0.03 * loss                                      # large enough to be seen
    assert_close(metrics["mse"], (recon - x).square().mean(), rtol=1e-4, atol=0)


def test_kl_encoder_layer_by_layer():
    """Plain formulas of the official encoder, in float64, from the weights' official names."""
    stage = built("kl-ae").double()
    x, w = pictures().double(), stage.state_dict()

    def conv(h, name, **options):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def norm(h, name):
        groups = h.reshape(len(h), 32, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        h = ((groups - mean) / (var + 1e-6).sqrt()).reshape(h.shape)
        return h * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def block(h, name):
        inner = conv(F.silu(norm(h, f"{name}.norm1")), f"{name}.conv1", padding=1)
        inner = conv(F.silu(norm(inner, f"{name}.norm2")), f"{name}.conv2", padding=1)
        changed = f"{name}.nin_shortcut.weight" in w
        return inner + (conv(h, f"{name}.nin_shortcut") if changed else h)

    def attention(h, name):
        q, k, v = (conv(norm(h, f"{name}.norm"), f"{name}.{n}").flatten(2) for n in "qkv")
        share = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(2)
        return h + conv(torch.einsum("bij,bcj->bci", share, v).view(h.shape), f"{name}.proj_out")

    h = block(conv(x, "encoder.conv_in", padding=1), "encoder.down.0.block.0")
    h = conv(F.pad(h, (0, 1, 0, 1)), "encoder.down.0.downsample.conv", stride=2)
    h = block(block(h, "encoder.down.1.block.0"), "encoder.mid.block_1")
    h = block(attention(h, "encoder.mid.attn_1"), "encoder.mid.block_2")
    h = conv(F.silu(norm(h, "encoder.norm_out")), "encoder.conv_out", padding=1)
    want = conv(h, "quant_conv")
    assert_close(torch.cat(stage.moments(x), 1), want, rtol=0, atol=1e-10)
    with torch.no_grad():
        stage.quant_conv.bias[5:] += torch.tensor([100.0, -100, 0, 0, 0])
    logvar = stage.moments(x)[1]
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()


def test_kl_encoder_is_the_mean_and_pads_like_the_official_one():
    torch.manual_seed(0)
    stage = fill_by_recipe(AutoencoderKL(32, (1, 2), 1))
    x = torch.randn(2, 3, 8, 8)
    mean, logvar = stage.moments(x)
    assert mean.shape == logvar.shape == (2, 4, 4, 4)
    assert_close(stage.encode(x), 0.18215 * mean)
    # halving pads right and bottom only: output (0, 0) sees input rows 0..2
    halve = stage.encoder.down[0].downsample
    impulse = torch.zeros(1, 32, 6, 6)
    impulse[..., 0, 0] = 1
    response = halve(impulse) - halve(torch.zeros_like(impulse))
    assert response[..., 0, 0].abs().max() > 0 and response[..., 1:, :].abs().max() == 0
    assert_close(response[0, :, 0, 0], halve.conv.weight[:, :, 0, 0].sum(1))


def test_kl_standardise_measures_the_scale():
    stage, x = built("kl-ae"), pictures(60)                             # more than one piece of 50
    assert not stage.standardised
    before = stage.decode(stage.encode(x))
    stage.standardise(x)
    assert stage.standardised and stage.sizes["scale"] == stage.scale != 1
    assert stage.encode(x).std().item() == pytest.approx(1, rel=1e-4)
    assert_close(stage.decode(stage.encode(x)), before, rtol=1e-3, atol=1e-4)
    assert AutoencoderKL(32, (1,), 1).standardised                      # the published scale


def test_kl_weights_may_be_half_precision():
    stage, x = built("kl-ae"), pictures()
    half = copy.deepcopy(stage).bfloat16()
    z = half.encode(x)
    assert z.dtype == half.decode(z).dtype == torch.float32
    assert_close(z, stage.encode(x), rtol=0.1, atol=0.1)
