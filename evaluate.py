"""How good is it? Numbers for samples: an exact reader for drawn shapes, Frechet and kernel distances for pictures.

The worlds "shapes" and "scenes" of data.py are drawn by a known program, so a sample can be read by running the
program backwards, with no network: find what differs from the background, split it into connected objects, name each
colour, and fit every known shape by least squares over (centre, radius). The smallest squared error names the shape,
and its size says whether anything was drawn at all: always read `match` beside `legible`, because a reader that
never abstains finds a shape in every smear and is right one time in six.

Pictures have no such program. For those, a small classifier is trained on the data set itself, and the mean and
covariance of its 128 features over samples are compared with those over real images (Heusel et al. 2017,
arXiv:1706.08500; kernel version Binkowski et al. 2018, arXiv:1801.01401). The results are called classifier-FID and
classifier-KID, never FID: they compare with nothing but other runs under the same classifier, and they are printed
with the floor, the distance that the same number of real images has.

Contents
    read_shapes, class_accuracy, prompt_accuracy              the reader
    frechet_distance, kernel_distance                         between sets of features
    Classifier, features, train_classifier, classifier_fid    where the features come from
    main                                                      command line

How to run
    python evaluate.py --ckpt out/dit/ckpt.pt --n 480 --cfg-scale 2          # draws the samples itself
    python evaluate.py --images samples.npz --data shapes --json scores.json # uint8 NHWC arr_0 (+ labels, captions)

How well the reader reads, on 2,000 test renders of each world (everything in the caption right / legible, in percent):
clean 100 / 100; Gaussian noise of sigma 0.1 on the 0..1 scale 100 / 99.9; a 3 x 3 box blur 99.9 / 99.8; half that blur
with a colour cast of 0.05 and noise of 0.03, 24 dB in all, 99.8 / 99.6; a 5 x 5 box blur 77 (scenes) or 100 (shapes)
/ 11 or 37; a 9 x 9 one 18 or 47 / 0. Of 50:50 mixtures of two renders of one colour 9 % are legible, of random blobs
none. MAX_RESIDUAL follows from this: its 99th percentile is 0.023 after the 3 x 3 blur, and the median of the mixtures
is 0.07. About 1.8 ms an image on one core.
"""
import argparse
import json
import math
import os
import sys
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data


# ---------------------------------------------------------------- the reader
# Lengths are in pixels of a 32-pixel image, colours on the 0..1 scale, whatever the image size.
FOREGROUND = 0.2     # a pixel this far from the background colour may belong to an object; the palette is >= 0.35 away
MIN_AREA = 12.0      # smaller connected pieces are dust; the smallest object drawn covers 1.7 * 4.5^2 = 34
MAX_RESIDUAL = 0.03  # legible: squared error of the smoothed template per unit of object area (see the docstring)
MAX_TINT = 0.25      # legible: distance of the measured colour from the palette colour
SIZE_SPLIT = 7.25    # small objects have a radius up to 6, large ones from 8
PLACE_SPLIT = 2.75   # "in the middle" is within 1.5 of the centre, every other place at least 4 away


def _smooth(x):
    """Binomial 3 x 3 filter over the last two axes: cuts pixel noise to 3/8, and hides how soft an edge exactly is."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    out = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (1, 1, 1, 1), mode="replicate")  # (..., H, W) -> (M, 1, H+2, W+2)
    out = F.conv2d(F.conv2d(out, kernel.view(1, 1, 1, 3)), kernel.view(1, 1, 3, 1))  # (M, 1, H, W)
    return out.view(x.shape)


def _components(mask):
    """Connected pieces of a mask (B, H, W) as labels: 0 outside, inside the largest pixel number of the piece.

    Flood fill for all images at once: every pixel starts with its own number and takes the largest one around it.
    """
    _, H, W = mask.shape
    label = torch.arange(1.0, H * W + 1).view(1, H, W) * mask  # (B, H, W), exact in float32 up to 2^24
    while True:
        grown = F.max_pool2d(label, 3, stride=1, padding=1) * mask
        if torch.equal(grown, label):
            return label.long()
        label = grown


def _find_objects(images):
    """Background and the two largest objects of images (B, 3, H, W). Absent objects have an area below MIN_AREA.

    Returns ground (B, 3) the background colour, distance (B, H, W) from it, area (B, 2), mask (B, 2, H, W) per object,
    near (B, 2, H, W) the pixels around an object that are not in the other one, count (B,), dusty (B,) bool.
    """
    B, _, H, W = images.shape
    # Objects may touch the border but never fill half of it, so its median is the background.
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], -1)  # (B, 3, 4H)
    ground = border.median(-1).values  # (B, 3)
    distance = _smooth(images - ground.view(B, 3, 1, 1)).norm(dim=1)  # (B, H, W)
    # An edge is where the contrast falls to half of what it is nearby: this splits a bright object from a dim one.
    half = F.max_pool2d(distance, 5, stride=1, padding=2) / 2
    label = _components((distance > FOREGROUND) & (distance > half))
    area = torch.full((B, H * W), (32 / W) ** 2)
    area = torch.zeros(B, H * W + 1).scatter_add_(1, label.flatten(1), area)  # (B, HW+1) per label
    area[:, 0] = 0
    large = area >= MIN_AREA
    count, dusty = large.sum(1), (area * ~large).sum(1) >= MIN_AREA
    area, piece = area.topk(2)  # (B, 2)
    mask = (label.unsqueeze(1) == piece.view(B, 2, 1, 1)) & (area >= MIN_AREA).view(B, 2, 1, 1)
    near = F.max_pool2d(mask.float(), 5, stride=1, padding=2) * ~mask.flip(1)
    return ground, distance, area, mask.float(), near, count, dusty


def _name_color(images, ground, weight):
    """Palette colour of P objects: index (P,), error (P,), and the step (P, 3) from the background to that colour.

    images (P, 3, H, W), ground (P, 3), weight (P, H, W) says where to look. Blur mixes the background in, which
    shortens the step but does not turn it, so an error along the step counts half.
    """
    mean = torch.einsum("phw,pchw->pc", weight, images) / weight.sum((1, 2)).view(-1, 1)  # (P, 3)
    step = _palette(data.COLORS) - ground.unsqueeze(1)  # (P, 8, 3)
    error = (mean - ground).unsqueeze(1) - step
    along = (error * F.normalize(step, dim=-1)).sum(-1)  # (P, 8)
    tint, color = (error.square().sum(-1) - 0.75 * along.square()).clamp(min=0).sqrt().min(1)
    return color, tint, step[torch.arange(len(color)), color]


def _moments(a, x, y):
    """Sum and centroid of maps a (P, H, W) with pixel centres x (W,), y (H, 1): three tensors (P,)."""
    mass = a.sum((1, 2)).clamp(min=1e-3)
    return mass, (a * x).sum((1, 2)) / mass, (a * y).sum((1, 2)) / mass


def _fit(coverage, near, shape):
    """Least-squares centre and radius of one shape for soft coverage maps (P, H, W), looking at `near` only.

    Area and centroid give the start, Gauss-Newton the rest. A template that moves or grows changes by its own spatial
    gradient: dT/dcx = -T_x, dT/dcy = -T_y, dT/dr = -((x - cx) T_x + (y - cy) T_y) / r.
    Returns (P, 4): cx, cy, r, sum of squared errors times the area of a pixel.
    """
    P, H, W = coverage.shape
    pixel = 32 / W
    x = (torch.arange(W) + 0.5) * pixel  # (W,)
    y = x.view(H, 1)
    middle, ten = torch.tensor([16.0]), torch.tensor([10.0])
    unit_area, unit_x, unit_y = _moments(data.shape_coverage(shape, middle, middle, ten, W), x, y)
    area, cx, cy = _moments(coverage * near, x, y)  # (P,)
    r = 10 * (area / unit_area).sqrt().clamp(0.2, 1.6)
    cx, cy = cx - (unit_x - 16) * r / 10, cy - (unit_y - 16) * r / 10
    target = _smooth(coverage)
    for _ in range(3):
        template = _smooth(data.shape_coverage(shape, cx, cy, r, W))  # (P, H, W)
        T_y, T_x = torch.gradient(template, spacing=pixel, dim=(1, 2))
        T_r = ((x - cx.view(P, 1, 1)) * T_x + (y - cy.view(P, 1, 1)) * T_y) / r.view(P, 1, 1)
        J = (-torch.stack([T_x, T_y, T_r], -1) * near.unsqueeze(-1)).flatten(1, 2)  # (P, HW, 3)
        error = ((target - template) * near).view(P, H * W, 1)
        move = torch.linalg.solve(J.mT @ J + 0.01 * torch.eye(3), J.mT @ error)  # (P, 3, 1); 0.01: never singular
        move = move.squeeze(-1).clamp(-1.5, 1.5)
        cx, cy, r = cx + move[:, 0], cy + move[:, 1], (r + move[:, 2]).clamp(2, 16)
    error = (target - _smooth(data.shape_coverage(shape, cx, cy, r, W))) * near
    return torch.stack([cx, cy, r, error.square().sum((1, 2)) * pixel ** 2], -1)


def _palette(names):
    """Colours of a name -> (r, g, b) table as a (K, 3) float tensor on the 0..1 scale."""
    return torch.tensor(list(names.values()), dtype=torch.float32) / 255


@torch.no_grad()
def _read(images, num_shapes):
    """read_shapes for images (B, 3, H, W) on the 0..1 scale."""
    ground, distance, area, mask, near, count, dusty = _find_objects(images)
    present = area >= MIN_AREA
    image_of, slot = present.nonzero(as_tuple=True)  # (P,) all objects of all images in one list
    images, mask, near = images[image_of], mask[image_of, slot], near[image_of, slot]  # (P, 3, H, W), 2 x (P, H, W)
    color, tint, step = _name_color(images, ground[image_of], mask * distance[image_of] ** 4)  # mostly the interior

    # Coverage: how far a pixel has gone from the background to the object's colour. The shape that explains it best.
    coverage = torch.einsum("pchw,pc->phw", images - ground[image_of].view(-1, 3, 1, 1), step)
    coverage = coverage / step.square().sum(1).view(-1, 1, 1)
    fits = torch.stack([_fit(coverage, near, shape) for shape in range(num_shapes)], 1)  # (P, num_shapes, 4)
    shape = fits[:, :, 3].argmin(1)
    cx, cy, r, error = fits[torch.arange(len(shape)), shape].unbind(-1)  # (P,)
    center = torch.stack([cx, cy], -1)

    def towards(dx, dy):  # left 0, right 1, up 2, down 3: the order of data.RELATIONS, and of data.PLACES from 1
        return torch.where(dx.abs() > dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())
    place = 1 + towards(cx - 16, cy - 16)
    place = place.masked_fill((center - 16).abs().amax(1) < PLACE_SPLIT, 0)

    def slots(values, absent):  # (P, ...) -> (B, 2, ...)
        out = torch.full((*area.shape, *values.shape[1:]), absent, dtype=values.dtype)
        out[image_of, slot] = values
        return out
    centers = slots(center, math.nan)
    relation = towards(*(centers[:, 0] - centers[:, 1]).unbind(-1)).masked_fill(~present.all(1), -1)
    residual = slots(error / area[image_of, slot], 0.0).amax(1).masked_fill(count == 0, math.inf)
    tint = slots(tint, 0.0).amax(1)
    legible = (count >= 1) & (count <= 2) & ~dusty & (residual < MAX_RESIDUAL) & (tint < MAX_TINT)
    return {"background": torch.cdist(ground, _palette(data.BACKGROUNDS)).argmin(1), "count": count,
            "shape": slots(shape, -1), "color": slots(color, -1), "size": slots((r > SIZE_SPLIT).long(), -1),
            "place": slots(place, -1), "center": centers, "radius": slots(r, math.nan), "relation": relation,
            "residual": residual, "tint": tint, "legible": legible}


def read_shapes(images, num_shapes=6):
    """Read pictures of the worlds "shapes" and "scenes" back into what they show.

    images: (B, 3, H, H) uint8, or float in [-1, 1]. num_shapes: 6, or 8 to look for data.NEW_SHAPES as well.
    Returns a dict of tensors. Objects are sorted by area; absent ones are -1, or nan where floats are due.
      background (B,) index into data.BACKGROUNDS; count (B,) objects seen, may be above 2;
      shape, color, size, place (B, 2) indices into SHAPES + NEW_SHAPES, COLORS, SIZES, PLACES of data.py;
      center (B, 2, 2) as x, y; radius (B, 2); relation (B,): object 0 is RELATIONS[relation] object 1, -1 if alone;
      residual (B,) worst squared error per object area, inf without objects; tint (B,) worst distance to the palette;
      legible (B,) bool: one or two clean known shapes, and no dust.
    Raises ValueError for any other shape or type.
    Source: data.render_shapes, inverted by least squares.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"the reader needs square RGB images (B, 3, H, H), not {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [-1, 1], not {images.dtype}")
    images = images.detach().cpu()
    images = images / 255 if images.dtype == torch.uint8 else (images.float() + 1) / 2
    parts = [_read(chunk, num_shapes) for chunk in images.split(128)]  # 128 images fit the processor's cache
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


# ---------------------------------------------------------------- accuracy against what was asked for

def class_accuracy(images, labels, num_shapes=6):
    """Does each image show the one object its class names? For the world "shapes".

    labels: (B,) with class = shape * 8 + color. Returns a dict of floats: match (exactly one object, right shape and
    color), shape and color (of the largest object), legible, legible_match, and residual (the median).
    Raises ValueError for a wrong number of labels, or labels that num_shapes does not cover.
    Source: the classes of data.CLASS_NAMES.
    """
    read, labels = read_shapes(images, num_shapes), torch.as_tensor(labels).cpu()
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images need as many labels, not {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= num_shapes * len(data.COLORS):
        raise ValueError(f"labels must be 0 to {num_shapes * len(data.COLORS) - 1}, not {labels.min()} to "
                         f"{labels.max()}")
    shape = read["shape"][:, 0] == labels // len(data.COLORS)
    color = read["color"][:, 0] == labels % len(data.COLORS)
    match = shape & color & (read["count"] == 1)
    hits = {"match": match, "shape": shape, "color": color, "legible": read["legible"],
            "legible_match": match & read["legible"]}
    rates = {key: hit.double().mean().item() for key, hit in hits.items()}
    return rates | {"residual": read["residual"].median().item()}


def prompt_accuracy(images, captions, num_shapes=6):
    """How often each axis of a caption is right, over the captions that mention the axis.

    Axes: shape, color, size, place, background, count, relation, all (every axis that the caption mentions), legible,
    and legible_all. With two objects, shape and color must be right for both, in the roles of the relation.
    Returns a dict axis -> (rate, number of captions); an axis that no caption mentions is missing.
    Raises ValueError for a wrong number of captions, or one that data.parse_caption cannot read.
    Source: the grammar of data.caption_of.
    """
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}")
    read = {key: value.tolist() for key, value in read_shapes(images, num_shapes).items()}
    hits = {}
    for i, caption in enumerate(captions):
        seen = _judge({key: value[i] for key, value in read.items()}, data.parse_caption(caption))
        for axis, hit in seen.items():
            hits.setdefault(axis, []).append(hit)
    return {axis: (sum(hit) / len(hit), len(hit)) for axis, hit in hits.items()}


def prompt_groups(captions):
    """Rows of captions (N) that belong together: {"one object": [...], "two objects": [...], "held-out pair": [...]}.

    The last holds those with a shape-colour pair of data.HELD_OUT, which `--hold-out` keeps out of training, to test
    composition. Groups without a caption are left out. Raises ValueError for a caption outside the grammar.
    """
    groups = {"one object": [], "two objects": [], "held-out pair": []}
    for row, caption in enumerate(captions):
        objects = data.parse_caption(caption)["objects"]
        groups["one object" if len(objects) == 1 else "two objects"].append(row)
        if any((thing["shape"], thing["color"]) in data.HELD_OUT for thing in objects):
            groups["held-out pair"].append(row)
    return {name: rows for name, rows in groups.items() if rows}


def _judge(read, asked):
    """One reading against one parsed caption: dict axis -> bool, for the axes that the caption mentions."""
    wanted, relation = asked["objects"], asked.get("relation")
    names = {"shape": data.SHAPES + data.NEW_SHAPES, "color": tuple(data.COLORS), "size": data.SIZES,
             "place": data.PLACES}
    found = [{axis: names[axis][read[axis][k]] for axis in names} for k in range(min(read["count"], 2))]
    hits = {"count": read["count"] == len(wanted)}

    def agree(axis, found):  # the caption's objects that mention the axis, each against the object in its role
        pairs = [(w, found[k] if k < len(found) else {}) for k, w in enumerate(wanted) if axis in w]
        return [w[axis] == f.get(axis) for w, f in pairs]
    if relation:
        hits["relation"] = False
        if len(found) == 2:
            # The subject of "left of" is whatever is farther left. The relation is wrong if the two objects differ
            # mainly along the other axis, or would fit the caption better with their roles swapped.
            index = data.RELATIONS.index(relation)
            a, b = (center[index // 2] for center in read["center"])
            if (a < b) != (index % 2 == 0):
                found.reverse()
            score, swapped = (sum(agree("shape", f) + agree("color", f)) for f in (found, found[::-1]))
            hits["relation"] = read["relation"] // 2 == index // 2 and score >= max(swapped, 1)
    for axis in names:
        if agreed := agree(axis, found):
            hits[axis] = all(agreed)
    if "background" in asked:
        hits["background"] = list(data.BACKGROUNDS)[read["background"]] == asked["background"]
    hits["all"] = all(hits.values())
    return hits | {"legible": read["legible"], "legible_all": hits["all"] and read["legible"]}


# ---------------------------------------------------------------- distances between sets of features

def _sqrt_psd(matrix):
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def _two_sets(a, b):
    """Both in float64, or ValueError."""
    a, b = (torch.as_tensor(f).double() for f in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need features (N, D) and (M, D) with N, M >= 2, not {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b


def frechet_distance(a, b):
    """Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians fitted to a (N, D) and b (M, D).

    tr (S1 S2)^(1/2) = tr (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric, so eigh suffices. In float64.
    Biased upwards when samples are few: compare only at equal N, beside the floor. Returns a float.
    Source: Heusel et al. 2017, eq. 6.
    """
    a, b = _two_sets(a, b)
    S1, S2 = (torch.atleast_2d(f.T.cov()) for f in (a, b))  # (D, D)
    root = _sqrt_psd(S1)
    cross = torch.linalg.eigvalsh(root @ S2 @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + S1.trace() + S2.trace() - 2 * cross).item()


def kernel_distance(a, b):
    """Unbiased squared maximum mean discrepancy of a (N, D) and b (M, D), kernel (x . y / D + 1)^3. Returns a float.

    Its mean is 0 for equal distributions at any N, so a single value may be below 0. In float64.
    Source: Binkowski et al. 2018, sec. 4; the estimator is Gretton et al. 2012, eq. 3.
    """
    a, b = _two_sets(a, b)
    kaa, kbb, kab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))  # (N, N) (M, M) (N, M)
    # mean over pairs of different samples
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kaa, kbb)]
    return (within[0] + within[1] - 2 * kab.mean()).item()


# ---------------------------------------------------------------- the classifier whose features are compared

class Classifier(nn.Module):
    """Four 3 x 3 convolutions, global mean, 128 features, one linear layer, at any image size. Source: none (small)."""

    def __init__(self, channels, num_classes, width=128):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((channels, 32, 1), (32, 64, 2), (64, width, 2), (width, width, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)

    def features(self, x):
        """Pictures (B, C, H, W) in [-1, 1] -> features (B, width)."""
        return self.body(x).mean((2, 3))  # (B, C, H, W) -> (B, width, H/8, W/8) -> (B, width)

    def forward(self, x):
        return self.head(self.features(x))


@torch.no_grad()
def _apply(model, function, images):
    """function(x) over uint8 images (N, C, H, W) in batches, on the model's device. Returns a CPU tensor."""
    device = next(model.parameters()).device
    return torch.cat([function(data.to_float(x.to(device))).cpu() for x in images.split(256)])


def features(model, images):
    """Features (N, 128) of uint8 images (N, C, H, W). Source: Classifier.features."""
    return _apply(model, model.features, images)


def train_classifier(dataset, steps=1000, device="cpu", seed=0):
    """Train on nine tenths of a data.Dataset with labels, test on the rest. Returns (model, test accuracy).

    Batch 128, AdamW with the rate falling linearly from 2e-3 to 0; mirrored copies if the data set allows them.
    The same seed gives the same model on the same processor. Raises ValueError without classes.
    Source: none; on CIFAR-10 it reaches 62 % in 1,000 steps, two and a half minutes on one core.
    """
    if len(dataset.class_names) < 2 or dataset.images.dtype != torch.uint8:
        raise ValueError(f"the classifier needs pictures with classes, and {dataset.name} has none")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator
        torch.manual_seed(seed)
        model = Classifier(dataset.images.shape[1], len(dataset.class_names)).to(device)
    order = torch.randperm(len(dataset.images), generator=generator)
    test, train = order[:len(order) // 10], order[len(order) // 10:]
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        pick = train[torch.randint(len(train), (128,), generator=generator)]
        x = data.to_float(dataset.images[pick])  # (128, C, H, W)
        if dataset.flip:
            x = torch.where(torch.rand(128, 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss = F.cross_entropy(model(x.to(device)), dataset.labels[pick].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    hits = _apply(model, model, dataset.images[test]).argmax(1) == dataset.labels[test]
    return model.eval(), hits.double().mean().item()


def classifier_fid(model, fake, real, floor_real):
    """Classifier-FID and classifier-KID of fake against real images, and of as many other real ones (the floor).

    All uint8 (., C, H, W). Returns {"fid", "fid_floor", "kid", "kid_floor", "n", "n_real"}. Raises ValueError if
    floor_real is shorter than fake. Source: the two distances above.
    """
    if len(floor_real) < len(fake):
        raise ValueError(f"the floor needs as many real images as there are samples: {len(floor_real)} < {len(fake)}")
    f, r, g = (features(model, x) for x in (fake, real, floor_real[:len(fake)]))
    return {"fid": frechet_distance(f, r), "fid_floor": frechet_distance(g, r),
            "kid": kernel_distance(f, r), "kid_floor": kernel_distance(g, r), "n": len(f), "n_real": len(r)}


# ---------------------------------------------------------------- command line

def _read_npz(path):
    """(images uint8 (N, C, H, H), labels (N,) or None, captions list or None) of an npz file as sample.py writes it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays ({error})")
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no array arr_0, only {', '.join(arrays) or 'nothing'}")
    images, labels, captions = arrays["arr_0"], arrays.get("labels"), arrays.get("captions")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), not {images.dtype} {images.shape}")
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"{path}: images must be square, not {images.shape[1]} x {images.shape[2]}")
    for name, array, kinds in (("labels", labels, "iu"), ("captions", captions, "U")):
        if array is not None and (array.shape != (len(images),) or array.dtype.kind not in kinds):
            raise ValueError(f"{path}: {len(images)} images need as many {name}, not {array.dtype} {array.shape}")
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)
    return (images, None if labels is None else torch.from_numpy(labels.astype(np.int64)),
            None if captions is None else captions.tolist())


def _score_drawn(name, images, labels, captions):
    """The reader's numbers for the worlds shapes and scenes: {"rates": {axis: (rate, n)}, "residual": median}."""
    if name == "shapes" and labels is not None:
        scores = class_accuracy(images, labels)
        rates = {key: (value, len(images)) for key, value in scores.items() if key != "residual"}
    elif captions is not None:
        rates = prompt_accuracy(images, captions)
        for group, rows in prompt_groups(captions).items():
            part = prompt_accuracy(images[rows], [captions[i] for i in rows])
            rates |= {f"{group}: {axis}": part[axis] for axis in ("shape", "color", "relation", "all") if axis in part}
    else:  # nothing was asked for: is anything drawn?
        rates = {"legible": (read_shapes(images)["legible"].double().mean().item(), len(images))}
    return {"rates": rates, "residual": read_shapes(images)["residual"].median().item()}


def score_pictures(name, data_dir, images, labels, cache, steps, device):
    """Distances in the features of the classifier kept in the file `cache`, trained first if the file is absent."""
    real = data.load(name, images.shape[-1], data_dir=data_dir)
    if real.images.dtype != torch.uint8 or real.images.shape[1] != images.shape[1]:
        raise ValueError(f"{images.shape[1]}-channel images cannot be compared with {name}, which holds "
                         f"{real.images.dtype} {tuple(real.images.shape[1:])}")
    if 2 * len(images) > len(real):
        raise ValueError(f"{name} has {len(real)} images: too few for {len(images)} samples and as many for the floor")
    world = {"data": name, "image_size": images.shape[-1], "steps": steps}
    if os.path.exists(cache):
        from train import load_checkpoint
        saved = load_checkpoint(cache)
        if saved.get("world") != world:
            raise ValueError(f"{cache} was trained for {saved.get('world')}, not {world}: name another file")
        model = Classifier(images.shape[1], real.num_classes)
        model.load_state_dict(saved["model"])
        model = model.to(device).eval()
    else:
        print(f"training the classifier: {steps} steps")
        model, accuracy = train_classifier(real, steps, device)
        saved = {"format": 1, "world": world, "accuracy": accuracy,
                 "model": {key: value.cpu() for key, value in model.state_dict().items()}}
        torch.save(saved, cache + ".tmp")
        os.replace(cache + ".tmp", cache)  # all or nothing
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))  # always the same real images
    floor, rest = order[:len(images)], order[len(images):][:10_000]  # 10,000 are enough for 128 x 128 covariances
    scores = classifier_fid(model, images, real.images[rest], real.images[floor])
    scores |= {"classifier": cache, "classifier_accuracy": saved["accuracy"]}
    if labels is not None:
        right = (_apply(model, model, images).argmax(1) == labels.cpu()).double().mean().item()
        scores["rates"] = {"class": (right, len(images))}
    return scores


def _parse_args(argv):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, epilog="""
shapes and scenes are read exactly: rate, binomial standard error and number of images for each thing that was asked
for. "legible" means that one or two clean known shapes were found at all. Other data sets get classifier-FID and
classifier-KID beside their floor, the value for real images: good samples are close to the floor, and only numbers
from the same classifier file and the same n compare.""", formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", metavar="FILE", help="checkpoint of train.py to draw samples from")
    source.add_argument("--images", metavar="FILE", help="npz with uint8 arr_0 (N, H, W, C); optional labels, captions")
    parser.add_argument("--data", help="what the samples imitate: shapes, scenes, cifar10, ... (default: what "
                                       "--ckpt saw)")
    parser.add_argument("--data-dir", default="data", help="folder of the downloaded data sets (default: data)")
    parser.add_argument("--n", type=int, default=480, help="samples to draw from --ckpt (default 480)")
    parser.add_argument("--cfg-scale", type=float, help="guidance scale, 1 = none (default: that of sample.py)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: that of sample.py)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    parser.add_argument("--classifier-steps", type=int, default=1000,
                        help="training steps of the classifier (default 1000)")
    parser.add_argument("--classifier", metavar="FILE", help="where it is kept (default: beside the samples)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here as well")
    return parser.parse_args(argv)


def _run(args):
    """Score what the command line names. Returns the dict that --json writes."""
    path = args.ckpt or args.images
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path}")
    if args.n < 1 or args.classifier_steps < 1:
        raise ValueError("--n and --classifier-steps must be at least 1")
    name = args.data
    import sample  # these three here, because whoever only reads shapes needs no model
    import train
    import weights
    if args.ckpt and not name:
        name = weights.load_checkpoint(path).get("config", {}).get("data")
    device = train.resolve_device(args.device)
    if not name:
        raise ValueError("say with --data what the samples imitate, for example --data shapes")
    if args.ckpt:
        images, labels, captions = sample.draw(path, n=args.n, cfg_scale=args.cfg_scale, steps=args.steps,
                                               seed=args.seed, device=device)
        images = images.cpu()
    else:
        images, labels, captions = _read_npz(path)
    if name in ("shapes", "scenes"):
        scores = _score_drawn(name, images, labels, captions)
    else:
        file = f"classifier-{name.replace('/', '_')}-{images.shape[-1]}px-{args.classifier_steps}steps.pt"
        cache = args.classifier or os.path.join(os.path.dirname(path), file)
        scores = score_pictures(name, args.data_dir, images, labels, cache, args.classifier_steps, device)
    drawn = {"cfg_scale": args.cfg_scale, "steps": args.steps, "seed": args.seed} if args.ckpt else {}
    return {"source": path, "data": name, "n": len(images)} | drawn | scores


def main(argv=None):
    """Command line. Returns the exit code: 0, or 2 after one line that says what to put right."""
    args = _parse_args(argv)
    try:
        scores = _run(args)
        print(f"{scores['source']}: {scores['n']} images of {scores['data']}")
        rates = scores.get("rates", {})
        for axis, (rate, n) in rates.items():
            print(f"  {axis:<16}{rate:7.3f} +- {math.sqrt(rate * (1 - rate) / n):.3f}  of {n}")
        if "residual" in scores:
            print(f"  {'residual':<16}{scores['residual']:7.3f} median, legible below {MAX_RESIDUAL}")
        else:
            print(f"  classifier-FID  {scores['fid']:9.4f}   floor {scores['fid_floor']:9.4f}   (n = {scores['n']})")
            print(f"  classifier-KID  {scores['kid']:9.5f}   floor {scores['kid_floor']:9.5f}")
            print(f"  against {scores['n_real']} real images; {scores['classifier']}, "
                  f"test accuracy {scores['classifier_accuracy']:.3f}")
        if args.json:
            with open(args.json, "w") as file:
                json.dump(scores, file, indent=1)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
