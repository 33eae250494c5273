"""evaluate.py against worlds whose truth is known, closed forms, and brute force."""
import dataclasses
import functools
import inspect
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import sample
import worlds
from checkpoint import load_checkpoint, save_checkpoint
from conftest import ROOT, fewer_drawn
from text import WordTokenizer

DRAW = inspect.signature(evaluate.sampled)

# ---------------------------------------------------------------- the reader


@pytest.fixture
def read_once(monkeypatch):
    """In this test each tensor of pictures is read once, with as many captions as it may meet."""
    monkeypatch.setattr(evaluate, "read_shapes", functools.cache(evaluate.read_shapes))


def world(name, count=250):
    """Test renders as float [-1, 1], their captions and labels."""
    drawn = data.load(name, 32, "test", count=count, seed=7)
    return data.to_float(drawn.images), drawn.captions, drawn.labels


def noisy(x, sigma, seed=0):
    """Gaussian noise, sigma on the 0..1 scale."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + 2 * sigma * noise).clamp(-1, 1)


def box_blur(x, width):
    return F.avg_pool2d(F.pad(x, (width // 2,) * 4, mode="replicate"), width, stride=1)


def picture(*objects, background="black", size=32):
    """One render (1, 3, size, size) of objects (shape, color, cx, cy, r)."""
    shapes = worlds.SHAPES
    shape, color, cx, cy, r = zip(*objects)
    return worlds.render_shapes(
        torch.tensor([[shapes.index(s) for s in shape]]),
        torch.tensor([[worlds.COLORS[c] for c in color]], dtype=torch.uint8),
        torch.tensor([cx]), torch.tensor([cy]), torch.tensor([r]),
        torch.tensor([worlds.BACKGROUNDS[background]], dtype=torch.uint8), size)


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_clean_and_noisy_renders_are_read(name):
    # The bounds leave about 1 % of the pictures; the table in evaluate.py has what is measured.
    x, captions, _ = world(name)
    clean = evaluate.prompt_accuracy(x, captions)
    assert set(clean) >= ({"shape", "color", "count", "all"} if name == "shapes" else
                          {"shape", "color", "size", "place", "background", "count", "relation",
                           "all"})
    assert min(rate for rate, _ in clean.values()) >= 0.99, clean   # each axis, legible, each group
    strong = evaluate.prompt_accuracy(noisy(x, 0.1), captions)
    assert strong["all"][0] >= 0.99, strong
    assert evaluate.read_shapes(noisy(x, 0.05))["legible"].double().mean() >= 0.97


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_soft_and_tinted_renders_are_read(name):
    # What a small autoencoder does: a soft edge, noise, a colour cast per image; 24 dB in all.
    x, captions, _ = world(name)
    cast = 0.1 * torch.randn(len(x), 3, 1, 1, generator=torch.Generator().manual_seed(1))
    soft = (noisy((x + box_blur(x, 3)) / 2, 0.03) + cast).clamp(-1, 1)
    assert 10 * math.log10(4 / (soft - x).square().mean()) < 26
    # A part of 2 pixels and its object blur into one: of `scenes` less is read.
    for pictures, bound in ((soft, 0.96), (box_blur(x, 3), 0.84)):
        scores = evaluate.prompt_accuracy(pictures, captions)
        bound = 0.98 if name == "shapes" else bound
        assert scores["all"][0] >= bound and scores["legible"][0] >= bound, scores


@pytest.mark.parametrize("sigma", [0, 0.05])
def test_everything_in_scenes_is_read_back(sigma):
    """What plan_world says of the pictures; objects in the order of the plan."""
    plan = worlds.plan_world("scenes", "test", 250, seed=7)
    read = evaluate.read_shapes(noisy(world("scenes")[0], sigma))
    there, near = plan["shape"] >= 0, torch.stack([plan["cx"], plan["cy"]], 2)       # (N, 2, 2)
    swapped = (read["center"] - near)[:, 0].norm(dim=1) > (read["center"] - near.flip(1))[
        :, 0].norm(dim=1).where(there[:, 1], torch.tensor(torch.inf))
    for key in ("shape", "color", "part", "part_color"):
        seen = torch.where(swapped[:, None], read[key].flip(1), read[key])
        assert (seen == plan[key])[there].double().mean() >= 0.99, key
        if key.startswith("part"):
            none = there & (plan["part"] < 0)
            assert none.sum() > 100 and (seen[none] == -1).all()
    for key in ("background", "size", "place", "relation"):
        rows = plan[key] >= 0
        seen = read[key] if read[key].dim() == 1 else read[key][:, 0]
        turned = torch.where(swapped & (key == "relation"), seen ^ 1, seen)  # left of <-> right of
        assert (turned == plan[key])[rows].double().mean() >= 0.99, key


def test_a_part_in_every_shape():
    """What has a quarter of a part's contrast is none."""
    pairs = [(shape, part) for shape in worlds.SHAPES for part in worlds.PARTS]
    x = torch.cat([picture((shape, "red", 16.0, 16.0, 10.0),
                           (part, "white", 16.0, 16.0 + 3.5 * (shape == "triangle"),
                            10.0 * (worlds.HUB_RADIUS if shape == "ring" else 0.47)))
                   for shape, part in pairs])
    read = evaluate.read_shapes(x)
    for row, (shape, part) in enumerate(pairs):
        assert read["shape"][row].tolist() == [worlds.SHAPES.index(shape), -1]
        assert read["legible"][row]
        assert read["part"][row].tolist() == [worlds.SHAPES.index(part), -1]
        assert read["part_color"][row].tolist() == [list(worlds.COLORS).index("white"), -1]
    whole = picture(("square", "red", 16.0, 16.0, 10.0)).float()
    with_part = picture(("square", "red", 16.0, 16.0, 10.0), ("circle", "white", 16.0, 16.0, 4.7))
    for share, there in ((0.25, False), (0.75, True)):
        x = (whole + share * (with_part - whole)).round().byte()
        assert (evaluate.read_shapes(x)["part"][0, 0] >= 0) == there


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_shuffled_captions_do_not_match(name, read_once):
    x, captions, labels = world(name)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    assert evaluate.prompt_accuracy(x, [captions[i] for i in order])["all"][0] <= 0.05  # 1 in 48
    if name == "shapes":
        assert evaluate.class_accuracy(x, labels) == evaluate.prompt_accuracy(x, captions)
        assert evaluate.class_accuracy(x, labels[order])["all"][0] <= 0.05


def test_smears_are_not_legible():
    x, _, labels = world("shapes", 144)
    generator = torch.Generator().manual_seed(0)
    # by color, then shape: 18 of each color, 3 of each shape
    order = torch.argsort(labels % 8 * 6 + labels // 8, stable=True)
    a, b = order, order.view(8, 18).roll(3, 1).reshape(-1)      # same color, next shape
    assert bool((labels[a] % 8 == labels[b] % 8).all() and (labels[a] // 8 != labels[b] // 8).all())
    low = torch.randn(144, 3, 4, 4, generator=generator)
    dots = torch.randn(144, 3, 4, 4, generator=generator).abs() - 0.9
    blobs, on_black = (F.interpolate(z, 32, mode="bicubic").clamp(-1, 1) for z in (low, dots))
    smears = {"wide blur": box_blur(x, 9), "two shapes": (x[a] + x[b]) / 2,
              "two shapes and colors": (x + x.flip(0)) / 2, "blobs": blobs,
              "blobs on black": on_black,
              "noise": torch.rand(x.shape, generator=generator) * 2 - 1}
    for name, smear in smears.items():
        share = evaluate.read_shapes(smear)["legible"].double().mean()
        assert share <= 0.12, f"{name}: {share:.3f} legible"


def test_empty_pictures_hold_nothing():
    colors = torch.tensor(list(worlds.BACKGROUNDS.values()), dtype=torch.uint8)
    empty = data.to_float(colors.view(4, 3, 1, 1).expand(4, 3, 32, 32))
    for x in (empty, noisy(empty, 0.1)):
        read = evaluate.read_shapes(x)
        assert read["count"].tolist() == [0] * 4 and not read["legible"].any()
        assert read["background"].tolist() == [0, 1, 2, 3]
        assert (read["shape"] == -1).all() and read["radius"].isnan().all()
        assert read["residual"].isinf().all()


def test_dust_is_not_an_object_and_not_legible():
    for specks, legible in ((1, True), (8, False)):     # 8 specks of 2 x 2 are 32 pixels of dust
        x = picture(("circle", "red", 16.0, 16.0, 8.0))
        for k in range(specks):
            x[:, :, 2 + 26 * (k // 4):4 + 26 * (k // 4), 3 + 7 * (k % 4):5 + 7 * (k % 4)] = 250
        read = evaluate.read_shapes(x)
        assert read["count"].tolist() == [1] and read["shape"].tolist() == [[0, -1]]
        assert read["legible"].tolist() == [legible]


@pytest.mark.parametrize("size", [32, 64])
def test_centre_and_radius_of_every_shape(size):
    for k, shape in enumerate(worlds.SHAPES):
        one = picture((shape, "cyan", 14.3, 17.6, 9.2), background="brown", size=size)
        read = evaluate.read_shapes(one)
        assert read["shape"].tolist() == [[k, -1]] and read["count"].item() == 1
        assert read["legible"].item()
        # a tenth of a pixel: more than 8-bit colours, at most 1/255 per pixel of the edge, can move
        center, radius = read["center"][0, 0], read["radius"][0, 0]
        torch.testing.assert_close(center, torch.tensor([14.3, 17.6]), atol=0.1, rtol=0)
        torch.testing.assert_close(radius, torch.tensor(9.2), atol=0.1, rtol=0)


def test_a_picture_reads_the_same_alone_and_in_a_batch():
    x, _, _ = world("scenes", 130)      # more than one chunk
    whole, last = evaluate.read_shapes(x), evaluate.read_shapes(x[-1:])
    for key, value in last.items():
        torch.testing.assert_close(whole[key][-1:], value, atol=1e-3, rtol=1e-3, equal_nan=True)


def judge(x, caption):
    """{axis: bool} of one picture and its caption, without `legible` and the groups."""
    return {axis: rate == 1 for axis, (rate, _) in evaluate.prompt_accuracy(x, [caption]).items()
            if not axis.startswith("legible") and ":" not in axis}


def test_places_and_sizes_of_one_object(read_once):
    places = {"in the middle": (16.0, 16.0), "on the left": (9.0, 16.5),
              "on the right": (23.0, 15.5), "at the top": (16.5, 9.0),
              "at the bottom": (15.5, 23.0)}
    for place, (cx, cy) in places.items():
        for size, r in (("small", 5.0), ("large", 8.6)):
            x = picture(("ring", "white", cx, cy, r), background="navy")
            for other in places:
                right = judge(x, f"a {size} white ring {other} on navy")
                assert right["place"] == right["all"] == (other == place)
                assert right["size"] and right["background"]
            swapped = {"small": "large", "large": "small"}[size]
            assert not judge(x, f"a {swapped} white ring {place} on navy")["size"]


def test_roles_of_two_objects(read_once):
    x = picture(("circle", "red", 8.0, 16.0, 5.5), ("square", "blue", 24.0, 16.5, 5.0),
                background="gray")
    right = dict.fromkeys(("count", "relation", "shape", "color", "background", "all"), True)
    assert judge(x, "a red circle left of a blue square on gray") == right
    assert judge(x, "a blue square right of a red circle on gray") == right
    assert judge(x, "a blue square left of a red circle on gray") == right | {
        "relation": False, "shape": False, "color": False, "all": False}
    assert judge(x, "a blue circle left of a red square on gray") == right | {
        "color": False, "all": False}
    above = judge(x, "a red circle above a blue square on navy")
    assert not (above["relation"] or above["background"] or above["all"]) and above["count"]
    alone = judge(x, "a small red circle on the left on gray")
    assert not (alone["count"] or alone["all"]) and alone["background"]
    turned = x.transpose(2, 3)          # the circle is above the square
    assert judge(turned, "a red circle above a blue square on gray") == right
    assert judge(turned, "a blue square below a red circle on gray") == right
    assert not judge(turned, "a red circle below a blue square on gray")["relation"]
    views = torch.cat([x, x.flip(3), turned, turned.flip(2)])
    read = evaluate.read_shapes(views)          # object 0 is the circle, whose area is larger
    assert read["shape"].tolist() == [[0, 1]] * 4 and read["relation"].tolist() == [0, 1, 2, 3]
    one = judge(picture(("circle", "red", 8.0, 16.0, 5.5), background="gray"),
                "a red circle left of a blue square on gray")
    assert not any(one[axis] for axis in ("count", "relation", "shape", "color", "all"))


def test_captions_are_also_scored_in_groups():
    scenes = data.load("scenes", split="test", count=200)
    captions = list(scenes.captions)
    wrong = next(i for i, caption in enumerate(captions) if "of a" in caption)  # two objects
    captions[wrong] = captions[wrong].replace("left of", "@").replace("right of", "left of")
    captions[wrong] = captions[wrong].replace("@", "right of")
    rates = evaluate.prompt_accuracy(scenes.images, captions)
    one, two, held_out = (rates[f"{group}: all"]
                          for group in ("one object", "two objects", "held-out pair"))
    things = [worlds.parse_caption(caption)["objects"] for caption in captions]
    assert one[1] == sum(len(objects) == 1 for objects in things) == 200 - two[1]
    assert held_out[1] == sum(any((thing["shape"], thing.get("color")) in worlds.HELD_OUT
                                  for thing in objects) for objects in things)
    assert one[0] * one[1] + two[0] * two[1] == pytest.approx(rates["all"][0] * 200)
    assert two[0] <= 1 - 1 / two[1] and rates["two objects: relation"] == rates["relation"]
    assert "one object: relation" not in rates


def test_reader_refuses_what_it_cannot_read():
    for bad in (torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 16), torch.zeros(3, 32, 32),
                torch.zeros(2, 3, 32, 32, dtype=torch.int64)):
        with pytest.raises(ValueError, match="images"):
            evaluate.read_shapes(bad)
    x = torch.zeros(2, 3, 32, 32)
    for labels, word in ((torch.tensor([0]), "2 images"), (torch.tensor([0, 48]), "48"),
                         (torch.tensor([-1, 0]), "-1")):
        with pytest.raises(ValueError, match=word):
            evaluate.class_accuracy(x, labels)
    with pytest.raises(ValueError, match="captions"):
        evaluate.prompt_accuracy(x, ["a red circle"])
    with pytest.raises(ValueError, match="hello"):
        evaluate.prompt_accuracy(x, ["a red circle", "hello"])


# ---------------------------------------------------------------- distances


def white(n, d, seed):
    """(n, d) float64 with mean exactly 0 and sample covariance exactly the identity."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (n - 1))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


def test_frechet_distance_closed_form():
    # Tolerances: float64 has 2e-16, the terms are below 100, and sqrt is taken of values above 0.5.
    d, generator = 6, torch.Generator().manual_seed(0)
    v1, v2 = torch.arange(1.0, 7.0).double(), torch.linspace(0.5, 9, d).double()
    m1, m2 = torch.zeros(d).double(), torch.linspace(-1, 1, d).double()
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    means, spreads = (m1 - m2).square(), (v1.sqrt() - v2.sqrt()).square()
    expected = (means + spreads).sum().item()
    a, b = white(50, d, 1) * v1.sqrt() + m1, white(80, d, 2) * v2.sqrt() + m2
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)
    turned = evaluate.frechet_distance(a @ turn, b @ turn)      # commuting, not diagonal
    assert turned == pytest.approx(expected, abs=1e-10)
    assert evaluate.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    one = evaluate.frechet_distance(a[:, :1], b[:, :1])
    assert one == pytest.approx((means + spreads)[0].item(), abs=1e-10)


def test_frechet_distance_general():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, 8, generator=generator).double()
            @ torch.randn(8, 8, generator=generator).double() for n in (200, 150))
    b = b + 1
    S1, S2 = torch.from_numpy(np.cov(a.numpy().T)), torch.from_numpy(np.cov(b.numpy().T))
    Y, Z = S1 @ S2, torch.eye(8).double()   # Denman-Beavers iteration: Y -> (S1 S2)^(1/2)
    for _ in range(60):
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    torch.testing.assert_close(Y @ Y, S1 @ S2, rtol=1e-6, atol=1e-6)
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = (means + (S1 + S2 - 2 * Y).trace()).item()
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    # Fewer samples than dimensions: singular covariances, and the eigenvalues of S1 S2 still
    # give the trace. The square root of a zero that is 1e-16 is 1e-8; there are about ten.
    a, b = a[:5], b[:4]
    S1, S2 = torch.from_numpy(np.cov(a.numpy().T)), torch.from_numpy(np.cov(b.numpy().T))
    cross = np.sqrt(np.linalg.eigvals((S1 @ S2).numpy()).real.clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)).square().sum() + (S1 + S2).trace()).item() - 2 * cross
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def brute_force(a, b, k=3):
    """Precision by plain loops: vectors of a that are in the ball of some vector of b."""
    def apart(u, v):
        return sum((p - q) ** 2 for p, q in zip(u, v)) ** 0.5
    radius = [sorted(apart(u, v) for j, v in enumerate(b) if j != i)[k - 1]
              for i, u in enumerate(b)]
    return sum(any(apart(u, v) <= r for v, r in zip(b, radius)) for u in a) / len(a)


def test_precision_and_recall_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    for n, m, d, shift in ((40, 40, 3, 1.0), (30, 45, 2, 2.0), (45, 20, 6, 0.4), (22, 19, 1, 2.5)):
        a, b = (torch.randn(count, d, generator=generator) for count in (n, m))
        a = a + shift
        found = evaluate.precision_recall(a, b)
        pairs = a.double().tolist(), b.double().tolist()
        assert found == {"precision": (brute_force(*pairs), n),
                         "recall": (brute_force(*pairs[::-1]), m)}
        assert all(0 < share < 1 for share, _ in found.values())


def test_precision_and_recall_by_hand():
    """On a line: the third neighbours of b are 3, 2, 2, 3 and 99 away."""
    b = torch.tensor([[0.0], [1], [2], [3], [100]])
    a = torch.tensor([[-2.9], [6.5], [198.9], [-4], [199.1]])       # of -4 and 199.1 no ball
    assert evaluate.precision_recall(a, b)["precision"] == (3 / 5, 5)
    assert evaluate.precision_recall(b, a)["recall"] == (3 / 5, 5)
    edge = torch.tensor([[-3.0], [-3.01]])                          # a ball has its edge
    assert evaluate.precision_recall(edge, b[:4])["precision"] == (1 / 2, 2)
    two = evaluate.precision_recall(torch.tensor([[0.5], [3]]), torch.tensor([[0.0], [1]]))
    assert two == {"precision": (1 / 2, 2), "recall": (1, 2)}       # fewer than three neighbours
    four = 10 * torch.randn(15, 128, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    assert evaluate.precision_recall(four[:30], four) == {          # each four times: balls of no
        "precision": (1, 30), "recall": (1, 60)}                    # size, and each in its own


@pytest.mark.parametrize("seed", range(3))
def test_recall_falls_without_a_mode_and_precision_with_noise(seed):
    """Two clouds of 200 pictures each, far apart."""
    generator = torch.Generator().manual_seed(seed)
    def clouds(*centers, scale=1.0):
        return torch.cat([scale * torch.randn(400 // len(centers), 8, generator=generator) + center
                          for center in centers])
    real = clouds(0.0, 50.0)
    def rates(a):
        return [rate for rate, _ in evaluate.precision_recall(a, real).values()]
    (p, r), (p_one, r_one), (p_noisy, r_noisy) = (
        rates(x) for x in (clouds(0.0, 50.0), clouds(0.0), clouds(0.0, 50.0, scale=3.0)))
    assert min(p, r) > 0.8
    assert p_one > 0.8 and 0.4 < r_one <= 0.5               # half of the real ones have no sample
    assert p_noisy < 0.1                                    # samples are where no picture is
    p_narrow, r_narrow = rates(clouds(0.0, 50.0, scale=0.2))
    assert p_narrow > 0.95 and r_narrow < 0.1               # all good, and all alike
    assert rates(real) == [1, 1]


# ---------------------------------------------------------------- the classifier


@pytest.fixture(scope="module")
def stripes():
    """600 gray pictures 16 x 16 of stripes with noise, lying or standing: no mean can tell them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    phase = 6.3 * torch.rand(600, 1, generator=generator)
    wave = torch.sin(torch.arange(16) * 1.6 + phase)        # (N, 16)
    x = torch.where(labels.view(-1, 1, 1) == 0, wave.unsqueeze(1), wave.unsqueeze(2))
    x = 128 + 60 * x + 30 * torch.randn(600, 16, 16, generator=generator)   # (N, 16, 16)
    images = x.clamp(0, 255).byte().unsqueeze(1)
    return data.Dataset("stripes", images, labels, None, ["lying", "standing"], False)


def rows(dataset, chosen):
    """The chosen rows of a data set."""
    return dataclasses.replace(dataset, images=dataset.images[chosen],
                               labels=dataset.labels[chosen])


def test_classifier_learns_and_its_distance_sees(stripes):
    state = torch.random.get_rng_state()
    model, accuracy = evaluate.train_classifier(stripes, steps=30)
    assert torch.equal(state, torch.random.get_rng_state())     # the global generator is left alone
    assert accuracy >= 0.9
    images, labels = stripes.images, stripes.labels
    vectors = evaluate.features(model, images)
    assert vectors.shape == (600, 128)
    real = rows(stripes, slice(150, None))
    same = evaluate.score_pictures(model, images[:150], real, labels[:150])
    half = evaluate.score_pictures(model, images[:300:2], real, labels[:300:2])     # one class
    assert same["n_real"] == 300 and same["rates"]["class"][1] == 150
    assert same["rates"]["class"][0] >= 0.9
    wrong = evaluate.score_pictures(model, images[:150], real, 1 - labels[:150])
    assert wrong["rates"]["class"][0] == pytest.approx(1 - same["rates"]["class"][0])
    assert same["fid_floor"] == half["fid_floor"] and same["fid"] < 3 * same["fid_floor"]
    assert half["fid"] > 10 * same["fid_floor"]
    names = [side + whose for whose in ("", ", real pictures") for side in ("precision", "recall")]
    assert [*same["rates"]] == [*names, "class"]
    assert all(same["rates"][name][0] > 0.8 and same["rates"][name][1] == 150 for name in names)
    assert half["rates"]["precision"][0] > 0.8 and half["rates"]["recall"][0] < 0.6
    assert [same["rates"][name] == half["rates"][name] for name in names] == [
        False, False, True, True]
    few = evaluate.score_pictures(model, images[:400], real)["rates"]   # 50 are left to compare
    assert {number for _, number in few.values()} == {50}
    # the floor is other pictures than the reference: together they are the data set, once each
    order = torch.randperm(450, generator=torch.Generator().manual_seed(0))
    floor, rest = (evaluate.features(model, real.images[i]) for i in (order[:150], order[150:]))
    assert same["fid_floor"] == pytest.approx(evaluate.frechet_distance(floor, rest), rel=1e-6)


def test_the_classifier_is_tested_on_pictures_that_it_has_not_seen(monkeypatch):
    """Picture i holds the number i; a tenth of them is for the test."""
    images = torch.arange(200).byte().view(200, 1, 1, 1).repeat(1, 1, 4, 4)
    numbers = data.Dataset("numbers", images, torch.arange(200) % 2, None, ["even", "odd"], False)
    read, whole = [], data.to_float
    monkeypatch.setattr(data, "to_float", lambda x: read.append(
        {*x[:, 0, 0, 0].tolist()}) or whole(x))
    evaluate.train_classifier(numbers, steps=9)
    *trained, tested = read
    assert len(tested) == 20 and tested.isdisjoint(set().union(*trained))
    assert len(set().union(*trained)) > 150


def test_mirrored_copies_only_where_the_data_set_allows_them():
    # Two classes that are each other's mirror image: with mirrored copies nobody can learn them.
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(400) % 2
        images = torch.randint(0, 100, (400, 1, 8, 8), generator=generator).byte()
        images[0::2, :, :, :4] += 100
        images[1::2, :, :, 4:] += 100
        for flip in (False, True):
            sides = data.Dataset("sides", images, labels, None, ["left", "right"], flip)
            model, _ = evaluate.train_classifier(sides, steps=20, seed=seed)
            with torch.no_grad():
                chance = model(data.to_float(images)).softmax(1)[torch.arange(400), labels].mean()
            assert chance > 0.8 if not flip else chance < 0.7, (seed, flip, chance)



def test_without_classes_the_classifier_tells_quarter_turns(tmp_path, monkeypatch, capsys):
    """Picture i is turned by i % 4 quarters; and no copy is mirrored, as a mirrored quarter turn is
    three quarters of the mirrored picture."""
    images = torch.arange(7 * 9).view(7, 1, 3, 3).byte()
    seen, saved = [], evaluate.make_classifier(1, 4)
    monkeypatch.setattr(evaluate, "train_classifier", lambda real, *given: (
        seen.append(real), (saved, 0.5))[1])
    for names in ([], ["one"]):
        bare = data.Dataset("folder:bare", images, torch.zeros(7).long(), ["some words"] * 7, names,
                            True)
        model, accuracy, path = evaluate.kept_classifier(bare, tmp_path, steps=1)
    assert len(seen) == 1 and not seen[0].flip and len(seen[0].class_names) == 4
    for picture, turn in zip(seen[0].images, seen[0].labels.tolist(), strict=True):
        i = picture.min().item() // 9
        assert turn == i % 4 and np.array_equal(picture[0], np.rot90(images[i, 0], turn))
    assert sorted((seen[0].images.flatten(1).amin(1) // 9).tolist()) == list(range(7))
    assert accuracy == 0.5 and "-turned-" in path.name and model[-1].out_features == 4
    said = capsys.readouterr().out
    assert said.count("folder:bare has no classes: the classifier tells quarter turns") == 2


def test_distances_without_classes_see_what_is_upside_down(stripes, tmp_path):
    """Pictures that are brighter at the top: other means, the same turns, far in features."""
    shade = torch.linspace(40, -40, 16).view(1, 1, 16, 1)
    images = (stripes.images[:400, :, ::2, ::2].float() / 2 + 60 + shade[:, :, ::2]).byte()
    bare = data.Dataset("bare", images, torch.zeros(400).long(), None, [], False)
    model, accuracy, _ = evaluate.kept_classifier(bare, tmp_path, steps=30)
    assert accuracy >= 0.9
    real, some = rows(bare, slice(100, None)), torch.zeros(100, dtype=torch.int64)
    same, upside = (evaluate.score_pictures(model, x[:100], real, some)
                    for x in (images, images.flip(2)))
    assert same["fid"] < 3 * same["fid_floor"] and upside["fid"] > 10 * same["fid_floor"]
    assert same["rates"]["precision"][0] > 0.7 > 0.3 > upside["rates"]["precision"][0]
    assert "class" not in same["rates"]         # 0 is no class, so it has no rate


def test_only_like_is_compared_with_like(stripes):
    shape = stripes.images.shape[1:]
    evaluate.check_comparable((300, *shape), stripes)
    for bad in ((1, *shape), (301, *shape), (10, 3, 16, 16), (10, 1, 32, 32)):
        with pytest.raises(ValueError, match="stripes"):
            evaluate.check_comparable(bad, stripes)
    with pytest.raises(ValueError, match="float32"):
        latents = dataclasses.replace(stripes, images=stripes.images.float())
        evaluate.check_comparable((10, *shape), latents)


def test_a_classifier_is_kept_and_found_again(stripes, tmp_path, capsys):
    model, accuracy, path = evaluate.kept_classifier(stripes, tmp_path, steps=2)
    assert "training" in capsys.readouterr().out and path.parent == tmp_path
    again, same, found = evaluate.kept_classifier(stripes, tmp_path, steps=2)
    assert not capsys.readouterr().out and found == path and same == accuracy
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    long = "folder:" + "/ordner" * 40 + "/글자"                # 290 bytes, Hangul at its end
    others = [dataclasses.replace(stripes, name=name)
              for name in (long, "folder:a/b", "folder:a-b")]
    others.append(rows(stripes, slice(0, 500)))               # a folder that has changed
    others += [dataclasses.replace(stripes, class_names=["standing", "lying"]),     # as has another
               dataclasses.replace(stripes, labels=1 - stripes.labels),
               dataclasses.replace(stripes, images=255 - stripes.images)]       # other pictures
    files = [evaluate.kept_classifier(other, tmp_path, steps=1)[2] for other in others]
    files.append(evaluate.kept_classifier(stripes, tmp_path, steps=1)[2])
    assert len({path, *files}) == 9 and all(len(file.name.encode()) < 200 for file in files)
    assert "글자" in files[0].name
    broken = tmp_path / "a file"
    broken.write_text("x")
    with pytest.raises((ValueError, OSError)):
        evaluate.kept_classifier(stripes, broken, steps=1)
    assert "training" not in capsys.readouterr().out.split("1 steps")[-1]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_the_nearest_training_picture(tmp_path, monkeypatch, flip, channels):
    """Of 300 pictures of noise: pictures 0, 7, ... with a little noise, also mirrored ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (300, channels, 8, 8), generator=generator).byte()
    real = data.Dataset("noise", images, torch.zeros(300).long(), None, [], flip)
    asked = images[::7][:20]
    seen = torch.cat([asked[:10], asked[10:].flip(-1) if flip else asked[10:]])
    samples = seen + 8 * torch.randint(2, seen.shape, generator=generator).byte()
    away = (samples.double() - seen.double()).square().mean((1, 2, 3)).sqrt()
    said, strips = [], data._strips
    monkeypatch.setattr(data, "_strips", lambda words, width: said.extend(words) or strips(
        words, width))
    evaluate.save_sheet(tmp_path / "s.png", samples, real)
    assert said == [word for d in away for word in ("sample", f"{d:.0f} away")]
    sheet, height = np.array(Image.open(tmp_path / "s.png")), 64 + 15 + 2
    assert sheet.shape == (5 * height + 2, 8 * 66 + 2, 3)
    for place, picture in enumerate(torch.stack([samples, asked], 1).flatten(0, 1)):
        top, left = 2 + place // 8 * height, 2 + place % 8 * 66
        tile = sheet[top:top + 64:8, left:left + 64:8]
        assert np.array_equal(tile, picture.expand(3, -1, -1).permute(1, 2, 0)), place
    evaluate.save_sheet(tmp_path / "s.png", images[-3:], real)
    assert said[-6:] == ["sample", "0 away"] * 3                # copies


def test_mirrored_training_pictures_only_where_training_mirrors(tmp_path, monkeypatch):
    images, said = torch.zeros(2, 1, 4, 4).byte(), []
    images[0, :, :, 0] = 255
    monkeypatch.setattr(data, "save_grid", lambda pairs, path, captions, made_by: said.append(
        captions[1]))
    for flip in (False, True):
        sides = data.Dataset("sides", images, torch.zeros(2).long(), None, [], flip)
        evaluate.save_sheet("", images[:1].flip(-1), sides)
    assert said == ["128 away", "0 away"]       # of 255 in a quarter of the pixels; the same


# ---------------------------------------------------------------- command line


def save(path, images, **arrays):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)      # (N, H, W, C)
    return str(path)


def refuse(capsys, *call):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(call)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, (call, error)
    return error


def run_of(path, images, **config):
    """A checkpoint as train.py writes it, as far as evaluate.py reads it."""
    drawn = config["data"] in ("shapes", "scenes")
    info = {"name": config["data"], "channels": images.shape[1], "image_size": images.shape[-1],
            "class_names": [*worlds.CLASS_NAMES] if drawn else ["lying", "standing"]}
    save_checkpoint(path, {"format": 2, "config": config, "info": info})
    return str(path)


def sampled(monkeypatch, images, labels=None, captions=None, **expected):
    """Let `sampled` return these; its call must fit the real one, and have these arguments."""
    def draw(*args, **options):
        given = DRAW.bind(*args, **options).arguments
        given |= given.pop("options")
        assert {key: given[key] for key in expected} == expected
        n = given["n"]
        assert n in (1, len(images))                        # one picture to try, then all
        return images[:n], labels if labels is None else labels[:n], captions
    monkeypatch.setattr(evaluate, "sampled", draw)


def one_alone(monkeypatch, image):
    """Let evaluate.sampled return one picture, and fail if more are asked for."""
    def draw(path, n, *where, **options):
        assert n == 1, "sampled"
        return image[None], None, None
    monkeypatch.setattr(evaluate, "sampled", draw)


def test_command_line_on_drawn_worlds(tmp_path, capsys, monkeypatch):
    drawn = data.load("shapes", 32, "test", count=96, seed=3)
    labels = drawn.labels.clone()
    labels[:24] = (labels[:24] + 1) % 48        # a quarter was not asked for
    out = str(tmp_path / "a.json")
    file = save(tmp_path / "a.npz", drawn.images, labels=labels.numpy())
    evaluate.main(["--images", file, "--data", "shapes", "--json", out])
    text, scores = capsys.readouterr().out, json.load(open(out))
    assert scores["rates"]["all"] == [0.75, 96] and scores["rates"]["legible"] == [1.0, 96]
    assert scores["n"] == 96 and scores["source"] == file
    assert f"0.750 +- {math.sqrt(0.75 * 0.25 / 96):.3f}" in text

    scene = data.load("scenes", 32, "test", count=60, seed=3)
    file = save(tmp_path / "b.npz", scene.images, captions=np.array(scene.captions))
    evaluate.main(["--images", file, "--data", "scenes"])
    assert "two objects: relation" in capsys.readouterr().out
    file = save(tmp_path / "c.npz", scene.images)
    fewer_drawn(monkeypatch, 200)
    evaluate.main(["--images", file, "--data", "scenes", "--json", out, "--sheet",
                   str(tmp_path / "s.png")])
    assert json.load(open(out))["rates"] == {"legible": [1.0, 60]}      # nothing was asked for
    assert Image.open(tmp_path / "s.png").size[0] == 8 * 66 + 2
    monkeypatch.undo()

    ckpt = run_of(tmp_path / "ckpt.pt", drawn.images, data="shapes")
    sampled(monkeypatch, drawn.images, drawn.labels, path=ckpt, cfg_scale=2.0, steps=None,
            seed=5, device="cpu")
    evaluate.main(["--ckpt", ckpt, "--n", "96", "--cfg-scale", "2", "--seed", "5",
                   "--device", "cpu", "--json", out])
    scores = json.load(open(out))
    assert scores["rates"]["all"] == [1.0, 96]
    assert (scores["cfg_scale"], scores["steps"], scores["seed"]) == (2, None, 5)


def folder_of(path, stripes, count):
    """Pictures of the stripes as a folder with one sub-folder per class -> its --data name."""
    for k, (image, label) in enumerate(zip(stripes.images[:count, 0], stripes.labels)):
        folder = path / stripes.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).convert("RGB").save(folder / f"{k}.png")
    return f"folder:{path}"


def test_command_line_on_pictures(tmp_path, capsys, monkeypatch, stripes):
    monkeypatch.chdir(tmp_path)
    name = folder_of(tmp_path / "real", stripes, 300)
    fake = stripes.images[300:360].expand(-1, 3, -1, -1)
    file = save("s.npz", fake, labels=stripes.labels[300:360].numpy())
    call = ["--images", file, "--data", name, "--classifier-steps", "30", "--device", "cpu",
            "--json", "s.json"]
    evaluate.main(call)
    first, text = json.load(open("s.json")), capsys.readouterr().out
    assert "classifier-FID" in text and "floor" in text and " FID" not in text
    assert first["n"] == 60 and first["fid"] < 5 * first["fid_floor"]
    assert first["rates"]["class"][0] >= 0.9 and first["rates"]["precision"][0] > 0.5
    assert "  precision, real pictures  " in text and "  recall  " in text
    assert load_checkpoint(first["classifier"])["accuracy"] == first["classifier_accuracy"]
    evaluate.main(call)
    assert "training" not in capsys.readouterr().out and json.load(open("s.json")) == first

    # A run of the same folder: what cannot be compared is refused before anything is sampled.
    ckpt = run_of("ckpt.pt", fake, data=name)
    one_alone(monkeypatch, fake[0])
    many = refuse(capsys, "--ckpt", ckpt, "--n", "290", *call[4:])
    assert name in many and "290" in many
    assert "nothing" in refuse(capsys, "--ckpt", ckpt, "--n", "60", "--data", "folder:nothing")
    sampled(monkeypatch, fake, stripes.labels[300:360])
    shown = []
    monkeypatch.setattr(evaluate, "save_sheet", lambda *given: shown.append(given))
    evaluate.main(["--ckpt", ckpt, "--n", "60", *call[4:], "--sheet", "new/s.png"])
    (path, pictures, training), = shown
    assert path == "new/s.png" and torch.equal(pictures, fake[:24])
    assert torch.equal(training.images, data.load(name, 16).images)     # all of them
    second = json.load(open("s.json"))
    assert {key: second[key] for key in ("fid", "rates", "classifier")} == {
        key: first[key] for key in ("fid", "rates", "classifier")}


def captioned(path, images):
    """Pictures with captions and no classes -> their --data name."""
    path.mkdir()
    for i, image in enumerate(images[:, 0]):
        Image.fromarray(image.numpy()).convert("RGB").save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"stripes {i}")
    return f"folder:{path}"


def test_captioned_photographs_are_scored(tmp_path, capsys, monkeypatch, stripes):
    """Distances, precision, recall and the sheet, of a run and of an npz; features are named."""
    monkeypatch.chdir(tmp_path)
    name, fake = captioned(tmp_path / "real", stripes.images[:60]), stripes.images[300:310]
    fake = fake.expand(-1, 3, -1, -1)
    sampled(monkeypatch, fake, None, [f"stripes {i}" for i in range(10)])
    info = {"name": name, "channels": 3, "image_size": 16, "class_names": []}
    save_checkpoint("ckpt.pt", {"format": 2, "config": {"data": name}, "info": info})
    short = ["--classifier-steps", "1", "--device", "cpu", "--json", "s.json"]
    evaluate.main(["--ckpt", "ckpt.pt", "--n", "10", *short, "--sheet", "s.png"])
    scores, said = json.load(open("s.json")), capsys.readouterr().out
    assert "has no classes: the classifier tells quarter turns" in said
    assert "classifier-FID" in said and "-turned-" in scores["classifier"]
    assert scores["rates"].keys() == {side + whose for side in ("precision", "recall")
                                      for whose in ("", ", real pictures")}
    assert Image.open("s.png").width == 8 * 66 + 2
    file = save("s.npz", fake, captions=np.array(["a word", *["stripes"] * 9]))     # any captions
    evaluate.main(["--images", file, "--data", name, *short])
    assert "training" not in capsys.readouterr().out
    found = json.load(open("s.json"))
    assert found["fid"] == scores["fid"] and found["rates"] == scores["rates"]
    labelled = save("l.npz", fake, labels=np.zeros(10, int))
    assert "classes" in refuse(capsys, "--images", labelled, "--data", name, *short)


def test_skip_bad_and_data_dir_are_handed_on(tmp_path, capsys, monkeypatch, stripes):
    monkeypatch.chdir(tmp_path)
    fake = stripes.images[300:310].expand(-1, 3, -1, -1)
    name, file = folder_of(tmp_path / "real", stripes, 100), save("s.npz", fake)
    (tmp_path / "real" / "lying" / "broken.png").write_text("no picture")
    few = ["--classifier-steps", "1", "--device", "cpu"]
    assert "--skip-bad" in refuse(capsys, "--images", file, "--data", name, *few)
    evaluate.main(["--images", file, "--data", name, "--skip-bad", *few])
    sampled(monkeypatch, fake)
    ckpt = run_of("ckpt.pt", fake, data=name, skip_bad=True)
    evaluate.main(["--ckpt", ckpt, "--n", "10", *few])
    assert "broken" in refuse(capsys, "--ckpt", ckpt, "--n", "10", "--no-skip-bad", *few)

    asked = []

    def load(name, image_size, split, data_dir, count, seed, hold_out, skip_bad):
        asked.append((name, image_size, data_dir, skip_bad))
        return dataclasses.replace(stripes, images=stripes.images.expand(-1, 3, -1, -1))
    monkeypatch.setattr(data, "load", load)
    ckpt = run_of("ckpt.pt", fake, data="cifar10", data_dir="there", seed=3)
    for flags in ([], ["--data", "mnist", "--data-dir", "here"]):
        evaluate.main(["--ckpt", ckpt, "--n", "10", *flags, *few])
    evaluate.main(["--images", file, "--data", "fashion", *few])
    assert asked == [("cifar10", 16, "there", False), ("mnist", 16, "here", False),
                     ("fashion", 16, "data", False)]


def test_outputs_are_checked_before_anything_is_sampled(tmp_path, capsys, monkeypatch):
    drawn = data.load("shapes", 32, "test", count=4)
    ckpt = run_of(tmp_path / "ckpt.pt", drawn.images, data="shapes")
    before = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(evaluate, "sampled", lambda *args, **options: pytest.fail("sampled"))
    for bad in ("ckpt.pt/x.json", "folder.json", "ckpt.pt", "x" * 300 + ".json"):
        for flag in ("--json", "--sheet"):
            assert bad[:100] in refuse(capsys, "--ckpt", ckpt, flag, str(tmp_path / bad))
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "folder.json"}


def test_command_line_errors_are_one_line(tmp_path, capsys):
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 32, 32, 3), np.float32))
    save(tmp_path / "words.npz", x, captions=np.array(["a red circle"] * 3 + ["hello"]))
    save(tmp_path / "range.npz", x, labels=np.array([0, 1, 2, 99]))
    save(tmp_path / "gray.npz", x[:, :1], labels=np.array([0, 1, 2, 3]))
    save(tmp_path / "fine.npz", x)
    for name, word in (("missing", "missing.npz"), ("text", "text.npz"), ("other", "arr_0"),
                       ("float", "uint8"), ("words", "hello"), ("range", "99"), ("gray", "images")):
        call = ["--images", str(tmp_path / f"{name}.npz"), "--data", "shapes"]
        assert word in refuse(capsys, *call)
    fine = str(tmp_path / "fine.npz")
    assert "--data" in refuse(capsys, "--images", fine)
    assert "cifar10" in refuse(capsys, "--images", fine, "--data", "cifar11")
    (tmp_path / "bad.pt").write_text("not a checkpoint")
    assert "bad.pt" in refuse(capsys, "--ckpt", str(tmp_path / "bad.pt"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "official.pt")
    assert "train.py" in refuse(capsys, "--ckpt", str(tmp_path / "official.pt"))
    assert "--n" in refuse(capsys, "--images", fine, "--n", "0")
    assert "--images" in refuse(capsys) and "--images" in refuse(capsys, "--images", fine,
                                                                 "--ckpt", fine)


@pytest.mark.parametrize("flags,words", [
    (["--n", "0"], "--n 0: give"), (["--n", "4"], "--n needs --ckpt"), (["--seed", "0"], "--ckpt"),
    (["--cfg-scale", "2"], "--cfg-scale needs --ckpt"), (["--steps", "5"], "--steps needs --ckpt"),
    (["--classifier-steps", "9"], "--classifier-steps is not read for --data shapes"),
    (["--skip-bad"], "--skip-bad is not read"), (["--no-skip-bad"], "--skip-bad is not read"),
    (["--data-dir", "data"], "--data-dir is not read"), (["--device", "cpu"], "--device is not"),
    (["--data", "folder:x", "--data-dir", "data"], "--data-dir is not read for --data folder:x"),
    (["--data", "mnist", "--skip-bad"], "--skip-bad is not read for --data mnist"),
    (["--json="], "--json is empty"), (["--ckpt", "x.pt"], "--images is not read beside --ckpt")])
def test_what_nobody_reads_is_refused(tmp_path, capsys, flags, words):
    fine = save(tmp_path / "fine.npz", torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert words in refuse(capsys, "--images", fine, "--data", "shapes", *flags)


def test_what_nobody_reads_beside_a_checkpoint_is_refused(tmp_path, capsys, monkeypatch):
    ckpt = run_of(tmp_path / "ckpt.pt", torch.zeros(1, 3, 32, 32), data="shapes")
    monkeypatch.setattr(evaluate, "sampled", lambda *args, **options: pytest.fail("sampled"))
    for flags in (["--classifier-steps", "9"], ["--skip-bad"], ["--data-dir", "data"]):
        assert f"{flags[0]} is not read for" in refuse(capsys, "--ckpt", ckpt, *flags)


def test_classes_must_be_those_of_the_data(tmp_path, capsys, monkeypatch, stripes):
    """Else label 3 of the samples is another class than label 3 of the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "kept_classifier", lambda *args, **how: pytest.fail("trained"))
    name, fake = folder_of(tmp_path / "real", stripes, 100), stripes.images[:10]
    fake = fake.expand(-1, 3, -1, -1)
    many = torch.arange(10) * 9
    file = save("s.npz", fake, labels=many.numpy())
    assert "classes" in refuse(capsys, "--images", file, "--data", name)
    for classes, data_name in ((["b", "a"], name), (["circle", "square"], "shapes")):
        info = {"name": "", "channels": 3, "image_size": 16, "class_names": classes}
        save_checkpoint("run.pt", {"format": 2, "config": {"data": data_name}, "info": info})
        sampled(monkeypatch, fake, torch.zeros(10, dtype=torch.int64))
        assert "classes" in refuse(capsys, "--ckpt", "run.pt", "--n", "10")


def test_scores_replace_only_scores(tmp_path, capsys):
    file = save(tmp_path / "a.npz", data.load("scenes", 32, "test", count=4).images)
    call = ["--images", file, "--data", "scenes", "--json"]
    for _ in range(2):
        evaluate.main([*call, str(tmp_path / "new" / "a.json")])
    assert json.load(open(tmp_path / "new" / "a.json"))["n"] == 4
    (tmp_path / "mine.json").write_text('{"n": 4}')
    for name, said in (("mine.json", "not made by this command"), ("a.npz", "ends in .json"),
                       ("new", "ends in .json")):
        before = (tmp_path / "mine.json").read_bytes()
        assert said in refuse(capsys, *call, str(tmp_path / name))
        assert (tmp_path / "mine.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "mine.json", "new"]


def test_a_sheet_replaces_only_a_sheet(tmp_path, capsys, monkeypatch):
    fewer_drawn(monkeypatch, 100)
    file = save(tmp_path / "a.npz", data.load("shapes", 32, "test", count=4).images)
    call = ["--images", file, "--data", "shapes"]
    scores, sheet, grid = (str(tmp_path / name) for name in ("s.json", "s.png", "grid.png"))
    data.save_grid(torch.zeros(1, 3, 8, 8), grid, made_by=sample.MADE_BY)
    for _ in range(2):
        evaluate.main([*call, "--json", scores, "--sheet", sheet])
    for flags, said in ((["--json", sheet], "ends in .json"), (["--sheet", scores], "ends in .png"),
                        (["--sheet", file], "ends in .png"),
                        (["--sheet", grid], "not made by this command")):
        before = (tmp_path / flags[1]).read_bytes()
        assert said in refuse(capsys, *call, *flags)
        assert (tmp_path / flags[1]).read_bytes() == before
    monkeypatch.setattr(evaluate, "save_sheet", lambda *given: pytest.fail("not asked for"))
    evaluate.main(call)


@pytest.mark.parametrize("hold_out", [False, True])
def test_a_sheet_is_of_what_the_run_was_trained_on(tmp_path, monkeypatch, hold_out):
    """Drawn worlds: with the seed of the run, and without the pairs that it never saw."""
    drawn, shown = data.load("shapes", 32, "test", count=4), []
    fewer_drawn(monkeypatch, 300)
    ckpt = run_of(tmp_path / "ckpt.pt", drawn.images, data="shapes", seed=5, hold_out=hold_out)
    sampled(monkeypatch, drawn.images, drawn.labels)
    monkeypatch.setattr(evaluate, "save_sheet", lambda path, images, real: shown.append(real))
    evaluate.main(["--ckpt", ckpt, "--n", "4", "--sheet", str(tmp_path / "s.png")])
    expected = data.load("shapes", 32, seed=5, hold_out=hold_out)
    assert torch.equal(shown[0].images, expected.images)
    monkeypatch.setattr(data, "load", lambda *given, **how: pytest.fail("drawn for nobody"))
    evaluate.main(["--ckpt", ckpt, "--n", "4"])


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    file = save(tmp_path / "a.npz", data.load("scenes", 32, "test", count=2).images)
    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    said = refuse(capsys, "--images", file, "--data", "scenes", "--json", str(tmp_path / "b.json"))
    assert "No space left" in said and "b.json" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("stop,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_a_classifier_trains_leaves_nothing(
        tmp_path, capsys, monkeypatch, stripes, stop, code):
    monkeypatch.chdir(tmp_path)
    name = folder_of(tmp_path / "real", stripes, 100)
    file = save("s.npz", stripes.images[:10].expand(-1, 3, -1, -1))
    train, before = evaluate.train_classifier, sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(evaluate, "train_classifier", lambda *args: (
        os.kill(os.getpid(), stop), train(*args)))
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--images", file, "--data", name, "--json", "s.json"])
    assert stopped.value.code == code and capsys.readouterr().err.endswith("stopped\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_captions_are_those_of_the_data_that_are_named(tmp_path, monkeypatch):
    """A text-to-image run is asked for held-out captions of --data, read as --data-dir says."""
    path, asked = str(ROOT / "assets" / "unet-scenes.pt"), []
    task = sample.load(path)[0]
    monkeypatch.setattr(sample, "load", lambda path, device: (task, task.model))
    monkeypatch.setattr(sample, "sample_all", lambda task, model, y, *args, **how: [y, y])
    world = data.load("scenes", 32, "test", count=3)

    def load(name, image_size, data_dir, skip_bad, **how):
        asked.append((name, data_dir, skip_bad))
        assert how == {"split": "test", "count": 5, "seed": 0}
        return dataclasses.replace(world, captions=None if name == "mnist" else world.captions)
    monkeypatch.setattr(data, "load", load)
    config = {"data": "scenes", "data_dir": "data", "skip_bad": False, "image_size": 32, "seed": 0}
    monkeypatch.setattr(sample, "load_checkpoint", lambda path: {"config": config})
    evaluate.sampled(path, 5)
    config = {**config, "data": "folder:mine", "data_dir": "there", "skip_bad": True}
    # in their order, and again from the first
    assert evaluate.sampled(path, 5, config)[2] == [world.captions[i] for i in (0, 1, 2, 0, 1)]
    assert asked == [("scenes", "data", False), ("folder:mine", "there", True)]
    with pytest.raises(ValueError, match="mnist has none"):
        evaluate.sampled(path, 5, {**config, "data": "mnist"})


def test_unseen_words_of_held_out_captions_share_a_row(monkeypatch, capsys):
    task = SimpleNamespace(tokenizer=WordTokenizer.from_captions(["a red dog", "a cat"]))
    captions = ["a red bird", "A blue CAT!", "a " * 50]
    monkeypatch.setattr(data, "load", lambda *args, **how: SimpleNamespace(captions=captions))
    config = dict.fromkeys(("data", "image_size", "data_dir", "seed", "skip_bad"))
    ids, again = sample.held_out(task, config, 4)
    assert "one word (2): " in (said := capsys.readouterr().out) and "bird, blue" in said
    known, free = task.tokenizer.ids, 3 + len(task.tokenizer.words)
    assert known.keys() == {"a", "cat", "dog", "red"} and again == [*captions, captions[0]]
    assert ids[0].tolist()[:5] == [1, known["a"], known["red"], free, 2] and free < (
        task.tokenizer.vocab_size)
    assert ids[1].tolist()[:5] == [1, known["a"], free, known["cat"], 2]
    assert torch.equal(ids[3], ids[0]) and ids[2].tolist() == [
        1, *[known["a"]] * (ids.shape[1] - 2), 2]                   # as much as fits
    captions[:] = ["a red dog"]
    sample.held_out(task, config, 1)
    assert not capsys.readouterr().out
