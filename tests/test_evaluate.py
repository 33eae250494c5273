"""evaluate.py against worlds whose truth is known, closed forms, and brute force."""
import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import sample


# ---------------------------------------------------------------- the reader

def world(name, count=2000):
    """Test renders as float [-1, 1], and their captions."""
    drawn = data.load(name, 32, "test", count=count, seed=7)
    return data.to_float(drawn.images), drawn.captions, drawn.labels


def noisy(x, sigma, seed=0):
    """Gaussian noise, sigma on the 0..1 scale."""
    return (x + 2 * sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


def box_blur(x, width):
    return F.avg_pool2d(F.pad(x, (width // 2,) * 4, mode="replicate"), width, stride=1)


def picture(*objects, background="black", size=32):
    """One render (1, 3, size, size) of objects (shape, color, cx, cy, r)."""
    shapes = data.SHAPES + data.NEW_SHAPES
    shape, color, cx, cy, r = zip(*objects)
    return data.render_shapes(
        torch.tensor([[shapes.index(s) for s in shape]]),
        torch.tensor([[data.COLORS[c] for c in color]], dtype=torch.uint8), torch.tensor([cx]), torch.tensor([cy]),
        torch.tensor([r]), torch.tensor([data.BACKGROUNDS[background]], dtype=torch.uint8), size)


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_clean_and_noisy_renders_are_read(name):
    x, captions, _ = world(name)
    clean = evaluate.prompt_accuracy(x, captions)
    assert set(clean) >= ({"shape", "color", "count", "all"} if name == "shapes" else
                          {"shape", "color", "size", "place", "background", "count", "relation", "all"})
    assert min(rate for rate, _ in clean.values()) >= 0.995, clean  # every axis, all of them together, legible
    x, captions = x[:1000], captions[:1000]
    strong = evaluate.prompt_accuracy(noisy(x, 0.1), captions)
    assert strong["all"][0] >= 0.99, strong
    assert evaluate.read_shapes(noisy(x, 0.05))["legible"].double().mean() >= 0.97


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_soft_and_tinted_renders_are_read(name):
    # What a small autoencoder does: a soft edge, noise, a colour cast per image. Together about 24 dB.
    x, captions, _ = world(name, 1000)
    cast = 0.1 * torch.randn(len(x), 3, 1, 1, generator=torch.Generator().manual_seed(1))
    soft = (noisy((x + box_blur(x, 3)) / 2, 0.03) + cast).clamp(-1, 1)
    assert 10 * math.log10(4 / (soft - x).square().mean()) < 26
    for pictures in (soft, box_blur(x, 3)):
        scores = evaluate.prompt_accuracy(pictures, captions)
        assert scores["all"][0] >= 0.985 and scores["legible"][0] >= 0.98, scores


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_shuffled_captions_do_not_match(name):
    x, captions, labels = world(name, 1000)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    assert evaluate.prompt_accuracy(x, [captions[i] for i in order])["all"][0] <= 0.03
    if name == "shapes":
        assert evaluate.class_accuracy(x, labels)["match"] >= 0.995
        assert evaluate.class_accuracy(x, labels[order])["match"] <= 0.03


def test_smears_are_not_legible():
    x, _, labels = world("shapes", 480)
    generator = torch.Generator().manual_seed(0)
    order = torch.argsort(labels % 8 * 6 + labels // 8)  # by color, then shape: 60 of each color, 10 of each shape
    a, b = order, order.view(8, 60).roll(10, 1).reshape(-1)  # same color, next shape
    assert bool((labels[a] % 8 == labels[b] % 8).all() and (labels[a] // 8 != labels[b] // 8).all())
    low = F.interpolate(torch.randn(480, 3, 4, 4, generator=generator), 32, mode="bicubic").clamp(-1, 1)
    dots = torch.randn(480, 3, 4, 4, generator=generator).abs() - 0.9
    on_black = F.interpolate(dots, 32, mode="bicubic").clamp(-1, 1)
    smears = {"wide blur": box_blur(x, 9), "two shapes": (x[a] + x[b]) / 2,
              "two shapes and colors": (x + x.flip(0)) / 2, "blobs": low, "blobs on black": on_black,
              "noise": torch.rand(x.shape, generator=generator) * 2 - 1}
    for name, smear in smears.items():
        share = evaluate.read_shapes(smear)["legible"].double().mean()
        assert share <= 0.1, f"{name}: {share:.3f} legible"


def test_empty_pictures_hold_nothing():
    colors = torch.tensor(list(data.BACKGROUNDS.values()), dtype=torch.uint8)
    empty = data.to_float(colors.view(4, 3, 1, 1).expand(4, 3, 32, 32))
    for x in (empty, noisy(empty, 0.1)):
        read = evaluate.read_shapes(x)
        assert read["count"].tolist() == [0] * 4 and not read["legible"].any()
        assert read["background"].tolist() == [0, 1, 2, 3]
        assert (read["shape"] == -1).all() and read["radius"].isnan().all() and read["residual"].isinf().all()


@pytest.mark.parametrize("size", [32, 64])
def test_centre_and_radius_of_every_shape(size):
    for k, shape in enumerate(data.SHAPES + data.NEW_SHAPES):
        one = picture((shape, "cyan", 14.3, 17.6, 9.2), background="brown", size=size)
        read = evaluate.read_shapes(one, num_shapes=8)
        assert read["shape"].tolist() == [[k, -1]] and read["count"].item() == 1 and read["legible"].item()
        torch.testing.assert_close(read["center"][0, 0], torch.tensor([14.3, 17.6]), atol=0.1, rtol=0)
        torch.testing.assert_close(read["radius"][0, 0], torch.tensor(9.2), atol=0.1, rtol=0)


def test_roles_of_two_objects():
    x = picture(("circle", "red", 8.0, 16.0, 5.5), ("square", "blue", 24.0, 16.5, 5.0), background="gray")
    right = {"count": True, "relation": True, "shape": True, "color": True, "background": True, "all": True}
    def judge(caption):
        return {axis: rate == 1 for axis, (rate, _) in evaluate.prompt_accuracy(x, [caption]).items()
                if not axis.startswith("legible")}
    assert judge("a red circle left of a blue square on gray") == right
    assert judge("a blue square right of a red circle on gray") == right
    assert judge("a blue square left of a red circle on gray") == right | {
        "relation": False, "shape": False, "color": False, "all": False}
    assert judge("a blue circle left of a red square on gray") == right | {"color": False, "all": False}
    above = judge("a red circle above a blue square on navy")
    assert not (above["relation"] or above["background"] or above["all"]) and above["count"]
    alone = judge("a small red circle on the left on gray")
    assert not (alone["count"] or alone["all"]) and alone["background"]


def test_reader_is_fast():
    x, _, _ = world("scenes", 480)
    start = time.process_time()
    evaluate.read_shapes(x)
    assert (time.process_time() - start) / 480 < 0.010  # about 0.002 on a free core


def test_reader_refuses_what_it_cannot_read():
    for bad in (torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 16), torch.zeros(3, 32, 32),
                torch.zeros(2, 3, 32, 32, dtype=torch.int64)):
        with pytest.raises(ValueError):
            evaluate.read_shapes(bad)
    x = torch.zeros(2, 3, 32, 32)
    for labels in (torch.tensor([0]), torch.tensor([0, 48]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="labels"):
            evaluate.class_accuracy(x, labels)
    with pytest.raises(ValueError, match="captions"):
        evaluate.prompt_accuracy(x, ["a red circle"])


# ---------------------------------------------------------------- distances

def white(n, d, seed):
    """(n, d) float64 with mean exactly 0 and sample covariance exactly the identity."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T


def test_frechet_distance_closed_form():
    d = 6
    v1, v2 = torch.arange(1.0, 7.0).double(), torch.linspace(0.5, 9, d).double()
    m1, m2 = torch.zeros(d).double(), torch.linspace(-1, 1, d).double()
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    expected = ((m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()).item()
    a, b = white(50, d, 1) * v1.sqrt() + m1, white(80, d, 2) * v2.sqrt() + m2
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)
    # commuting, not diagonal
    assert evaluate.frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, abs=1e-10)
    assert evaluate.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    one = evaluate.frechet_distance(a[:, :1], b[:, :1])
    assert one == pytest.approx(((m1 - m2)[0] ** 2 + (v1[0].sqrt() - v2[0].sqrt()) ** 2).item(), abs=1e-10)


def test_frechet_distance_general():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(200, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    b = torch.randn(150, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double() + 1
    S1, S2 = torch.from_numpy(np.cov(a.numpy().T)), torch.from_numpy(np.cov(b.numpy().T))
    Y, Z = S1 @ S2, torch.eye(8).double()  # Denman-Beavers iteration: Y -> (S1 S2)^(1/2)
    for _ in range(60):
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    torch.testing.assert_close(Y @ Y, S1 @ S2, rtol=1e-6, atol=1e-6)
    expected = ((a.mean(0) - b.mean(0)).square().sum() + (S1 + S2 - 2 * Y).trace()).item()
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    # Fewer samples than dimensions: singular covariances, the general eigenvalues of S1 S2 still say it.
    a, b = a[:5], b[:4]
    S1, S2 = torch.from_numpy(np.cov(a.numpy().T)), torch.from_numpy(np.cov(b.numpy().T))
    cross = np.sqrt(np.linalg.eigvals((S1 @ S2).numpy()).real.clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)).square().sum() + (S1 + S2).trace()).item() - 2 * cross
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_brute_force():
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator) + 0.3
    def kernel(x, y):
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist())) / 5 + 1) ** 3
    within_a = sum(kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_b = sum(kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(kernel(x, y) for x in a for y in b) / 63
    assert evaluate.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-9)


@pytest.mark.parametrize("distance", [evaluate.frechet_distance, evaluate.kernel_distance])
def test_distances_refuse_other_shapes(distance):
    for a, b in ((torch.zeros(4, 3), torch.zeros(4, 2)), (torch.zeros(1, 3), torch.zeros(4, 3)),
                 (torch.zeros(4), torch.zeros(4))):
        with pytest.raises(ValueError):
            distance(a, b)


# ---------------------------------------------------------------- the classifier

@pytest.fixture(scope="module")
def stripes():
    """600 gray pictures 16 x 16 of stripes, lying or standing, with noise: two classes that no colour mean can tell."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    wave = torch.sin(torch.arange(16) * 1.6 + 6.3 * torch.rand(600, 1, generator=generator))  # (N, 16)
    x = torch.where(labels.view(-1, 1, 1) == 0, wave.unsqueeze(1), wave.unsqueeze(2)).expand(600, 16, 16)
    x = 128 + 60 * x + 30 * torch.randn(600, 16, 16, generator=generator)
    return data.Dataset("stripes", x.clamp(0, 255).byte().unsqueeze(1), labels, None, ["lying", "standing"], False)


def test_classifier_learns_and_its_distance_sees(stripes):
    state = torch.random.get_rng_state()
    model, accuracy = evaluate.train_classifier(stripes, steps=30)
    assert torch.equal(state, torch.random.get_rng_state())  # other people's random numbers are left alone
    assert accuracy >= 0.95
    again, _ = evaluate.train_classifier(stripes, steps=30)
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
    images = stripes.images
    assert evaluate.features(model, images).shape == (600, 128)
    lying, standing = images[::2], images[1::2]
    same = evaluate.classifier_fid(model, images[:150], images[300:], images[150:300])
    half = evaluate.classifier_fid(model, lying[:150], images[300:], images[150:300])  # one class was dropped
    assert same["n"] == 150 and same["n_real"] == 300
    assert same["fid_floor"] == half["fid_floor"] and same["fid"] < 3 * same["fid_floor"]
    assert half["fid"] > 10 * same["fid_floor"] and half["kid"] > 10 * abs(same["kid_floor"])
    with pytest.raises(ValueError, match="floor"):
        evaluate.classifier_fid(model, images[:10], images, standing[:5])


def test_classifier_needs_classes(stripes):
    bare = data.Dataset("bare", stripes.images, torch.zeros(600, dtype=torch.int64), None, [], False)
    with pytest.raises(ValueError, match="bare"):
        evaluate.train_classifier(bare, steps=1)


# ---------------------------------------------------------------- command line

def save(path, images, **arrays):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)  # (N, C, H, W) -> (N, H, W, C)
    return str(path)


def test_command_line_on_drawn_worlds(tmp_path, capsys, monkeypatch):
    drawn = data.load("shapes", 32, "test", count=96, seed=3)
    labels = drawn.labels.clone()
    labels[:24] = (labels[:24] + 1) % 48  # a quarter was not asked for
    file, out = save(tmp_path / "a.npz", drawn.images, labels=labels.numpy()), str(tmp_path / "a.json")
    assert evaluate.main(["--images", file, "--data", "shapes", "--json", out]) == 0
    text, scores = capsys.readouterr().out, json.load(open(out))
    assert scores["rates"]["match"] == [0.75, 96] and scores["rates"]["legible"] == [1.0, 96] and scores["n"] == 96
    assert f"0.750 +- {math.sqrt(0.75 * 0.25 / 96):.3f}" in text

    scene = data.load("scenes", 32, "test", count=60, seed=3)
    file = save(tmp_path / "b.npz", scene.images, captions=np.array(scene.captions))
    assert evaluate.main(["--images", file, "--data", "scenes"]) == 0
    assert "relation" in capsys.readouterr().out
    assert evaluate.main(["--images", save(tmp_path / "c.npz", scene.images), "--data", "scenes", "--json", out]) == 0
    assert list(json.load(open(out))["rates"]) == ["legible"]  # nothing was asked for

    torch.save({"format": 1, "config": {"data": "shapes"}}, tmp_path / "ckpt.pt")
    def draw(path, n, cfg_scale, steps, seed, device):
        assert (n, cfg_scale, steps, seed, device) == (96, 2.0, None, 5, "cpu")
        return drawn.images, drawn.labels, None
    monkeypatch.setattr(sample, "draw", draw)
    call = ["--ckpt", str(tmp_path / "ckpt.pt"), "--n", "96", "--cfg-scale", "2", "--seed", "5", "--device", "cpu"]
    assert evaluate.main(call + ["--json", out]) == 0
    assert json.load(open(out))["rates"]["match"] == [1.0, 96]


def test_command_line_on_pictures(tmp_path, capsys, stripes):
    for k, (image, label) in enumerate(zip(stripes.images[:240, 0], stripes.labels)):
        folder = tmp_path / "real" / stripes.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).convert("RGB").save(folder / f"{k}.png")
    run = tmp_path / "run"
    run.mkdir()
    fake = stripes.images[300:360].expand(-1, 3, -1, -1)
    file = save(run / "s.npz", fake, labels=stripes.labels[300:360].numpy())
    call = ["--images", file, "--data", f"folder:{tmp_path / 'real'}", "--classifier-steps", "30", "--device", "cpu",
            "--json", str(run / "s.json")]
    assert evaluate.main(call) == 0
    first, text = json.load(open(run / "s.json")), capsys.readouterr().out
    assert "classifier-FID" in text and "floor" in text and " FID" not in text and "n = 60" in text
    assert first["rates"]["class"][0] >= 0.9 and first["fid"] < 5 * first["fid_floor"]
    (cache,) = run.glob("classifier-*.pt")
    torch.load(cache, weights_only=True)
    assert evaluate.main(call) == 0 and "training" not in capsys.readouterr().out
    assert json.load(open(run / "s.json")) == first
    assert evaluate.main(call + ["--classifier-steps", "3", "--classifier", str(cache)]) == 2  # not that classifier
    colored = save(run / "many.npz", stripes.images[:200].expand(-1, 3, -1, -1))
    assert evaluate.main(["--images", colored, *call[2:]]) == 2
    assert "too few" in capsys.readouterr().err


def test_command_line_errors_are_one_line(tmp_path, capsys):
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 32, 32, 3), np.float32))
    np.savez(tmp_path / "chw.npz", arr_0=np.zeros((2, 3, 32, 32), np.uint8))
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((2, 32, 16, 3), np.uint8))
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}], dtype=object))
    save(tmp_path / "few.npz", x, labels=np.zeros(3, np.int64))
    save(tmp_path / "words.npz", x, captions=np.array(["a red circle"] * 3 + ["hello"]))
    save(tmp_path / "range.npz", x, labels=np.array([0, 1, 2, 99]))
    save(tmp_path / "fine.npz", x)
    (tmp_path / "bad.pt").write_text("not a checkpoint")
    calls = {name: (["--images", str(tmp_path / f"{name}.npz"), "--data", "shapes"], word) for name, word in (
        ("missing", "no such file"), ("text", "npz"), ("other", "arr_0"), ("float", "uint8"), ("chw", "uint8"),
        ("wide", "square"), ("pickle", "npz"), ("few", "labels"), ("words", "hello"), ("range", "labels"))}
    calls["no data"] = (["--images", str(tmp_path / "fine.npz")], "--data")
    calls["unknown data"] = (["--images", str(tmp_path / "fine.npz"), "--data", "cifar11"], "cifar10")
    calls["bad ckpt"] = (["--ckpt", str(tmp_path / "bad.pt")], "bad.pt")
    nowhere = ["--json", str(tmp_path / "no" / "x")]
    calls["json nowhere"] = (["--images", str(tmp_path / "fine.npz"), "--data", "shapes", *nowhere], "no")
    calls["n"] = (["--ckpt", str(tmp_path / "bad.pt"), "--n", "0"], "--n")
    for name, (call, word) in calls.items():
        assert evaluate.main(call) == 2, name
        error = capsys.readouterr().err
        assert word in error and len(error.strip().splitlines()) == 1, f"{name}: {error}"
    for call in ([], ["--images", "a", "--ckpt", "b"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(call)
        assert stop.value.code == 2


def test_prompt_groups_partition_the_captions():
    captions = ["a small red circle on the left on black", "a red circle left of a blue square on gray"]
    shape, color = data.HELD_OUT[0]
    captions.append(f"a large {color} {shape} on the right on navy")
    groups = evaluate.prompt_groups(captions)
    assert groups["two objects"] == [1] and groups["one object"] == [0, 2] and 2 in groups["held-out pair"]
    scenes = data.load("scenes", split="test", count=200)
    scores = evaluate._score_drawn("scenes", scenes.images, None, scenes.captions)["rates"]
    one, two = scores["one object: all"], scores["two objects: all"]
    assert one[1] + two[1] == 200 and min(one[0], two[0]) > 0.99
    assert one[0] * one[1] + two[0] * two[1] == pytest.approx(scores["all"][0] * 200)
