"""How good are the samples? An exact reader for drawn worlds, distances for photographs.

The idea. The worlds of worlds.py are drawn by a known program. The reader runs it backwards,
without a network: take what differs from the background, split it into connected objects, fit every
known shape by least squares, then all pairs of colours and all parts. The best fit names them; if
it is good, the picture is "legible". Read rates beside that: a smear's shape is right 1 time in 6.
Of 1,000 test renders it reads all right, and of shapes and scenes 100 and 99.9 % with noise of 0.1,
100 and 91 % after a 3 x 3 box blur, 100 and 55 % (legible: 30 and 5 %) after 5 x 5, 36 and 12 %
(none legible) after 9 x 9; and 49 % (8 %) of means of two shapes of one colour.
For photographs, a small classifier learns the classes, or without any how a picture is turned. Mean
and covariance of its 128 features are compared, samples with real pictures (Heusel et al. 2017), as
are precision, samples near real pictures, and recall, the reverse (Kynkäänniemi et al. 2019).
    python evaluate.py --ckpt out/dit/ckpt.pt --n 480 --cfg-scale 2         # samples, then scores
    python evaluate.py --images samples.npz --data shapes --json scores.json    # of sample.py --npz

Differences from FID: features of our classifier, not Inception's, so the numbers compare
only under one classifier file and number of samples, beside what real pictures score, the floor."""
import dataclasses
import json
import pathlib
import re

import torch
import torch.nn.functional as F
from torch import nn

import cli
import data
import worlds
from checkpoint import fingerprint, load_checkpoint, load_weights, save_checkpoint, written_whole

# Lengths are in pixels of a 32-pixel picture, whatever its size; colours are on the 0..1 scale.
MIN_AREA = 12.0      # smaller connected pieces are dust; the smallest object has 1.7 * 4.5^2 = 34
MAX_RESIDUAL = 0.03  # legible: squared error per object area; 3 x 3 blurs: 99 % are below 0.022
MAX_TINT = 0.25      # legible: distance of the measured colour from the palette's
SIZE_SPLIT = 7.25    # small objects have a radius up to 6, large ones from 8
PLACE_SPLIT = 2.75   # "in the middle" is within 1.5 of the centre, other places are >= 4 away
RING = worlds.SHAPES.index("ring")
MADE_BY = "made by evaluate.py"


def read_shapes(images):
    """What images (B, 3, H, H) of shapes or scenes show; they are uint8, or float in [-1, 1].
    Returns tensors for the two objects of largest area; absent is -1, or nan for floats:
      background (B,) index into BACKGROUNDS; count (B,) of all objects, may be above 2;
      shape, color, size, place (B, 2) indices into SHAPES, COLORS, SIZES, PLACES;
      part, part_color (B, 2) indices into SHAPES and COLORS, of the smaller shape inside;
      center (B, 2, 2) as x, y; radius (B, 2); residual (B,) the larger squared error per object
      area, inf without objects; tint (B,) the larger distance to the palette;
      relation (B,): object 0 is RELATIONS[relation] object 1, -1 without two objects;
      legible (B,) bool: one or two clean known shapes, and no dust. Raises ValueError."""
    x, eight_bit = images.detach().cpu(), images.dtype == torch.uint8
    if x.shape[1:] != (3, *2 * x.shape[-1:]) or not (eight_bit or x.is_floating_point()):
        raise ValueError(f"images must be (B, 3, H, H), uint8 or float, not {[*x.shape]} {x.dtype}")
    x = x / 255 if eight_bit else (x.float() + 1) / 2
    chunks = [_read_chunk(chunk) for chunk in x.split(128)]         # fit the cache
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


def _read_chunk(images):
    """read_shapes for images (B, 3, H, W) on the 0..1 scale."""
    ground, step, away, coverage, area, near, count, dusty = _find_objects(images)
    present = area >= MIN_AREA                              # (B, 2)
    image_of = present.nonzero()[:, 0]                      # (P,): all objects of all images
    step, away, coverage, near = step[image_of], away[image_of], coverage[image_of], near[present]
    forms = torch.tensor([*range(6), RING])     # the last: a ring with a disc in it; fits (P, F, 4)
    fits = torch.stack([_fit(coverage, near, form, k == 6) for k, form in enumerate(forms)], 1)
    # The outline names two candidates, (P, 2), and the colours decide.
    likely, rows = fits[:, :, 3].topk(2, largest=False).indices, torch.arange(len(fits))
    one, two = (_explain(away, step, near, forms[k], *fits[rows, k].T) for k in likely.T)
    _, error, shape, cx, cy, r, color, tint, part, part_color = (       # (P,)
        torch.where(two[0] < one[0], b, a) for a, b in zip(one, two))
    def direction(dx, dy):              # left 0, right 1, up 2, down 3: the order of RELATIONS
        return torch.where(dx.abs() > dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())
    central = torch.maximum((cx - 16).abs(), (cy - 16).abs()) < PLACE_SPLIT
    place = (1 + direction(cx - 16, cy - 16)).masked_fill(central, 0)       # the order of PLACES
    def slots(found, absent):           # (P, ...) -> (B, 2, ...)
        return found.new_full((*area.shape, *found.shape[1:]), absent).index_put((present,), found)
    center, tint = slots(torch.stack([cx, cy], -1), torch.nan), slots(tint, 0.0).amax(1)
    relation = direction(*(center[:, 0] - center[:, 1]).unbind(-1))
    residual = slots(error / area[present], 0.0).amax(1).masked_fill(count == 0, torch.inf)
    backgrounds = torch.tensor(list(worlds.BACKGROUNDS.values())) / 255     # (4, 3)
    return {"background": torch.cdist(ground, backgrounds).argmin(1), "count": count,
            "shape": slots(shape, -1), "color": slots(color, -1), "place": slots(place, -1),
            "part": slots(part, -1), "part_color": slots(part_color, -1), "center": center,
            "size": slots((r > SIZE_SPLIT).long(), -1), "radius": slots(r, torch.nan), "tint": tint,
            "residual": residual, "relation": relation.masked_fill(~present.all(1), -1),
            "legible": (residual < MAX_RESIDUAL) & (tint < MAX_TINT) & ~dusty & (count <= 2)}


def _fit(coverage, near, shape, disc):
    """Least-squares centre and radius of one shape, where `near` is 1. All maps are (P, H, W).
    disc: with a disc in the middle, as in a ring. coverage: smoothed, see _find_objects.
    Area and centroid give the first guess, three steps of Gauss-Newton the rest, as a template T
    changes by dT/dcx = -T_x, dT/dcy = -T_y, dT/dr = -((x - cx) T_x + (y - cy) T_y) / r.
    Returns (P, 4): cx, cy, r, and the sum of squared errors times the area of a pixel."""
    (P, H, W), pixel = coverage.shape, 32 / coverage.shape[2]
    x = (torch.arange(W) + 0.5) * pixel                     # (W,) pixel centres
    y = x.view(H, 1)
    def moments(mass):                  # sum and centroid of maps (P, H, W): three (P,)
        total = mass.sum((1, 2)).clamp(min=1e-3)
        return total, (mass * x).sum((1, 2)) / total, (mass * y).sum((1, 2)) / total
    def drawn(*circle):                 # (P, H, W)
        inner = worlds.shape_coverage(0, *circle[:2], worlds.HUB_RADIUS * circle[2], W) * disc
        return worlds.shape_coverage(shape, *circle, W) + inner
    unit_area, unit_x, unit_y = moments(drawn(*torch.tensor([[16.0], [16.0], [10.0]])))
    area, cx, cy = moments(coverage * near)
    r = 10 * (area / unit_area).sqrt().clamp(0.2, 1.6)
    cx, cy = cx - (unit_x - 16) * r / 10, cy - (unit_y - 16) * r / 10
    for _ in range(3):
        template = _smooth(drawn(cx, cy, r))                # (P, H, W)
        T_y, T_x = torch.gradient(template, spacing=pixel, dim=(1, 2))
        T_r = ((x - cx.view(P, 1, 1)) * T_x + (y - cy.view(P, 1, 1)) * T_y) / r.view(P, 1, 1)
        J = (-torch.stack([T_x, T_y, T_r], -1) * near.unsqueeze(-1)).flatten(1, 2)  # (P, HW, 3)
        error = ((coverage - template) * near).view(P, H * W, 1)
        # 0.01 keeps the matrix from being singular
        move = torch.linalg.solve(J.mT @ J + 0.01 * torch.eye(3), J.mT @ error)     # (P, 3, 1)
        dx, dy, dr = move.clamp(-1.5, 1.5).squeeze(-1).unbind(1)
        cx, cy, r = cx + dx, cy + dy, (r + dr).clamp(2, 16)
    error = (coverage - _smooth(drawn(cx, cy, r))) * near
    return torch.stack([cx, cy, r, error.square().sum((1, 2)) * pixel ** 2], -1)


def _find_objects(images):
    """Images (B, 3, H, W) -> ground (B, 3); from there to each colour step (B, 8, 3), to a pixel
    away (B, 3, H, W); coverage (B, H, W), smoothed, 0 on the ground, 1 in a colour; of the two
    largest objects area (B, 2) and near (B, 2, H, W): round it, not in the other; count, dusty."""
    B, _, H, W = images.shape
    # Objects may touch the border but never fill half of it, so its median is the background.
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]], -1)
    ground = border.median(-1).values                       # (B, 3)
    away = images - ground.view(B, 3, 1, 1)
    step = torch.tensor(list(worlds.COLORS.values())) / 255 - ground.unsqueeze(1)   # (B, 8, 3)
    # how far a pixel has gone to each colour: not smoothed, which would mix an object and its part
    size = step.square().sum(2).view(B, 8, 1, 1)
    along = torch.einsum("bchw,bkc->bkhw", away, step) / size               # (B, 8, H, W)
    rest = -along.clamp(min=0).square() * size      # unexplained, less the pixel's own square
    coverage = _smooth(along.gather(1, rest.argmin(1, keepdim=True)).squeeze(1).clamp(0, 1))
    # An object is all that the background does not reach from the border: its hole, its part.
    solid = coverage > 0.5                                  # (B, H, W)
    outside = F.pad(torch.zeros(B, H - 2, W - 2), (1, 1, 1, 1), value=1.0) * ~solid
    while not torch.equal(outside, grown := ~solid * torch.maximum(
            F.max_pool2d(outside, (3, 1), 1, (1, 0)), F.max_pool2d(outside, (1, 3), 1, (0, 1)))):
        outside = grown
    # Every pixel of a piece takes its largest pixel number; exact in float32 up to 2^24.
    label = torch.arange(1.0, H * W + 1).view(1, H, W) * (outside == 0)
    while not torch.equal(label, grown := F.max_pool2d(label, 3, 1, 1) * (label > 0)):
        label = grown
    pixels = solid.flatten(1) * (32 / W) ** 2               # none in label 0, the background
    area = torch.zeros(B, H * W + 1).scatter_add_(1, label.flatten(1).long(), pixels)  # (B, HW + 1)
    count, dusty = (area >= MIN_AREA).sum(1), (area * (area < MIN_AREA)).sum(1) >= MIN_AREA
    area, piece = area.topk(2)                              # (B, 2)
    mask = (label.unsqueeze(1) == piece.view(B, 2, 1, 1)) & (area >= MIN_AREA).view(B, 2, 1, 1)
    near = F.max_pool2d(mask.float(), 5, stride=1, padding=2) * ~mask.flip(1)
    return ground, step, away, coverage, area, near, count, dusty


def _explain(away, step, near, shape, cx, cy, r, _):
    """What explains P objects of known outline best: the two palette colours, and the part.
    A picture is away = b (body - ground) + p (part - ground), with maps b, p of how much is seen
    of each: least squares over all pairs of colours and all maps, in one of which there is no part.
    Returns (P,) each: sum of squares; that of the sharp maps along the body's step, as a share of
    the step; shape, cx, cy, r as given; color, tint, part, part_color (-1 without a part)."""
    away, rows = (away * near.unsqueeze(1)).flatten(2).mT, torch.arange(len(shape))     # (P, WW, 3)
    parts, b, p = _maps(near, shape, cx, cy, r)                                 # (H,), (P, H, WW)
    bb, bp, pp = ((u * v).sum(2).unsqueeze(2) for u, v in ((b, b), (b, p), (p, p)))     # (P, H, 1)
    on_b, on_p, size = b @ away, p @ away, step.square().sum(2).unsqueeze(1)    # 2x (P, H, 3)
    body_cost, part_cost = bb * size - 2 * on_b @ step.mT, pp * size - 2 * on_p @ step.mT
    cost = (body_cost.unsqueeze(3) + part_cost.unsqueeze(2)                     # (P, H, 8, 8)
            + 2 * bp.unsqueeze(3) * (step @ step.mT).unsqueeze(1))
    least, best = cost.masked_fill(torch.eye(8) > 0, torch.inf).flatten(1).min(1)       # (P,)
    maps, color, part_color = best // 64, best // 8 % 8, best % 8               # never one colour
    step_b, step_p = step[rows, color], step[rows, part_color]                  # (P, 3)
    # The measured step of the body: blur shortens it without turning it, errors along count half.
    error = (on_b - bp * step_p.unsqueeze(1))[rows, maps] / bb[rows, maps].clamp(min=1e-6) - step_b
    along = (error * F.normalize(step_b, dim=1)).sum(1)                         # (P,)
    tint = (error.square().sum(1) - 0.75 * along.square()).clamp(min=0).sqrt()
    b, p = (v[rows, maps % (len(parts) // 2), :, None] for v in (b, p))         # (P, WW, 1), sharp
    left = (away - b * step_b.unsqueeze(1) - p * step_p.unsqueeze(1)) @ step_b.unsqueeze(2)
    left = _smooth(left.view_as(near)) / step_b.square().sum(1).view(-1, 1, 1)  # (P, W, W)
    residual, part = left.square().sum((1, 2)) * (32 / near.shape[2]) ** 2, parts[maps]
    return least, residual, shape, cx, cy, r, color, tint, part, part_color.where(part >= 0, -1)


def _maps(near, shape, *circle):
    """How much is seen of the body and of the part, for all parts that may be there, sharp or soft.
    near (P, W, W); shape, cx, cy, r (P,) -> parts (H,), -1 = none; (P, H, WW) of body, of part."""
    (P, W, _), (cx, cy, r) = near.shape, torch.stack(circle).unsqueeze(2)       # (P, 1)
    body = worlds.shape_coverage(shape, *circle, W).unsqueeze(1)                # (P, 1, W, W)
    shares, shape = torch.linspace(*worlds.PART_RADIUS, 3), shape.unsqueeze(1)  # that are tried
    parts = torch.tensor([-1] + [worlds.SHAPES.index(x) for x in worlds.PARTS for _ in shares])
    share = F.pad(shares.repeat(len(worlds.PARTS)), (1, 0))                     # (H,)
    share = torch.where(shape == RING, worlds.HUB_RADIUS, share)                # (P, H)
    center = cy + worlds.PART_DROP[shape] * r         # (P, 1)
    grid = (v.expand_as(share).flatten() for v in (parts, cx, center, share * r))
    inner = worlds.shape_coverage(*grid, W).view(P, len(parts), W, W)
    maps = torch.stack([body * (1 - inner), inner])                             # (2, P, H, W, W)
    maps = torch.cat([maps, _smooth(maps)], 2) * near.unsqueeze(1)
    return parts.repeat(2), *maps.flatten(3)


def _smooth(x):
    """Binomial 3 x 3 filter over the last two axes: 3/8 of the pixel noise, equally soft edges."""
    wider = F.pad(x.flatten(0, -3)[:, None], (1, 1, 1, 1), mode="replicate")    # (N, 1, H+2, W+2)
    return F.avg_pool2d(F.avg_pool2d(wider, 2, 1), 2, 1).view_as(x)         # 2 x 2 means, twice


def prompt_accuracy(images, captions):
    """How often captions are right: {axis: (rate, number of captions that mention the axis)}, for
    shape and color (of both objects, in their roles), size, place, background, count, relation, all
    of these, legible, legible_all; then by groups, as "one object: shape". Raises ValueError."""
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}")
    asked = [worlds.parse_caption(caption) for caption in captions]
    read, hits = read_shapes(images), {}
    for facts, *row in zip(asked, *(column.tolist() for column in read.values())):
        for axis, hit in _judge(dict(zip(read, row)), facts).items():
            hits.setdefault(axis, []).append(hit)
    return {axis: (sum(hits[axis]) / len(hits[axis]), len(hits[axis]))
            for axis in sorted(hits, key=lambda axis: ":" in axis)}         # groups last


def class_accuracy(images, labels):
    """prompt_accuracy for the world "shapes": labels (B,) index worlds.CLASS_NAMES."""
    labels, top = torch.as_tensor(labels).tolist(), len(worlds.CLASS_NAMES) - 1
    if wrong := {*labels} - {*range(top + 1)}:
        raise ValueError(f"labels of the world shapes are 0 to {top}, not {min(wrong)}")
    return prompt_accuracy(images, [f"a {worlds.CLASS_NAMES[label]}" for label in labels])


def _judge(seen, asked):
    """One reading against one parsed caption: {axis: bool}, for the axes that it mentions."""
    axes = dict(shape=worlds.SHAPES, color=[*worlds.COLORS], size=worlds.SIZES, place=worlds.PLACES)
    wanted, relation, n = asked["objects"], asked.get("relation"), min(seen["count"], 2)
    found = [{axis: axes[axis][seen[axis][k]] for axis in axes} if k < n else {} for k in (0, 1)]
    hits = {"count": seen["count"] == len(wanted)} | ({"relation": False} if relation else {})
    def agreements(axis, found):    # for each asked object that mentions the axis, in its role
        return [want[axis] == have.get(axis) for want, have in zip(wanted, found) if axis in want]
    if relation and n == 2:
        # In "A left of B" the object farther left has the role of A. The relation is wrong if the
        # objects differ more along the other axis, or fit better with their roles swapped.
        index = worlds.RELATIONS.index(relation)
        first, second = (center[index // 2] for center in seen["center"])   # both x, or both y
        if (first < second) != (index % 2 == 0):
            found.reverse()
        score, swapped = (sum(agreements("shape", objects) + agreements("color", objects))
                          for objects in (found, found[::-1]))
        hits["relation"] = seen["relation"] // 2 == index // 2 and score >= max(swapped, 1)
    hits |= {axis: all(agreed) for axis in axes if (agreed := agreements(axis, found))}
    if "background" in asked:
        hits["background"] = list(worlds.BACKGROUNDS)[seen["background"]] == asked["background"]
    hits["all"] = all(hits.values())
    held_out = any((want["shape"], want.get("color")) in worlds.HELD_OUT for want in wanted)
    groups = [("one object", "two objects")[len(wanted) - 1]] + ["held-out pair"] * held_out
    return hits | {"legible": seen["legible"], "legible_all": hits["all"] and seen["legible"]} | {
        f"{group}: {axis}": hits[axis] for group in groups
        for axis in ("shape", "color", "relation", "all") if axis in hits}


def frechet_distance(a, b):
    """Of features a (N, D) and b (M, D): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64.
    N, M > 1; fewer samples score worse: compare at equal N. Source: Heusel et al. 2017 Eq. 6."""
    a, b = a.cpu().double(), b.cpu().double()
    S1, S2 = (torch.atleast_2d(f.T.cov()) for f in (a, b))      # (D, D)
    # S1 S2 is no symmetric matrix, but its eigenvalues are real and not negative
    cross = torch.linalg.eigvals(S1 @ S2).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + S1.trace() + S2.trace() - 2 * cross).item()


def precision_recall(a, b):
    """Share of features a (N, D) in balls of b (M, D), and the reverse, as {name: (share, number)}.
    A ball ends at the third neighbour. Use N = M. Source: Kynkäänniemi et al. 2019 Eq. 1, 2."""
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}        # 0 between equal features
    def inside(a, b):                                   # the first of the four nearest is itself
        radius = torch.cdist(b, b, **exact).topk(min(4, len(b)), largest=False).values[:, -1]
        return (torch.cdist(a, b, **exact) <= radius).any(1).double().mean().item(), len(a)
    return {"precision": inside(a, b), "recall": inside(b, a)}


def score_pictures(model, images, real, labels=None):
    """Classifier-FID, precision, recall of uint8 images (N, C, H, W), rate of labels (N,) if given.
    real: a data.Dataset; N of its pictures make the floor, up to 10,000 others stand for it."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    floor, rest = order[:len(images)], order[len(images):][:10_000]     # enough for 128 x 128
    f, g, r = (features(model, x) for x in (images, real.images[floor], real.images[rest]))
    scores = {"fid": frechet_distance(f, r), "fid_floor": frechet_distance(g, r), "n_real": len(r)}
    scores["rates"] = {name + whose: rate for whose, x in (("", f), (", real pictures", g))
                       for name, rate in precision_recall(x[:len(r)], r[:len(x)]).items()}
    if labels is not None and len(real.class_names) > 1:
        right = model[-1](f).argmax(1).cpu() == labels.cpu()
        scores["rates"]["class"] = right.double().mean().item(), len(right)
    return scores


def check_comparable(shape, real):
    """Raise ValueError unless samples of shape (N, C, H, W) can be compared with a data.Dataset."""
    kind, (count, *side) = real.images.dtype, real.images.shape
    if kind != torch.uint8 or side != [*shape[1:]] or not 2 <= shape[0] <= count // 2:
        raise ValueError(f"{shape[0]} samples {[*shape[1:]]}, {real.name} has {count} of {kind} "
                         f"{side}: both must be uint8 of one shape, and 2 to {count // 2} samples")


def make_classifier(channels, classes):
    """Four 3 x 3 convolutions, global mean, 128 features, one linear layer; any image size."""
    layers = []
    for c_in, c_out, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


@torch.no_grad()
def features(model, images):
    """Features (N, 128) of uint8 images (N, C, H, W), on the model's device."""
    device = model[-1].weight.device
    return torch.cat([model[:-1](data.to_float(x.to(device))) for x in images.split(256)])


def train_classifier(real, steps=1000, device="cpu", seed=0):
    """Train on nine tenths of a data.Dataset, test on the rest. Returns (model, test accuracy), on
    CIFAR-10 62 % of the classes in 2.5 minutes on one core, and 62 % of quarter turns."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):                 # initialisation uses the global one
        torch.manual_seed(seed)
        model = make_classifier(real.images.shape[1], len(real.class_names)).to(device)
    test, train = torch.randperm(len(real), generator=rng).tensor_split([max(1, len(real) // 10)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        rows = train[torch.randint(len(train), (128,), generator=rng)]
        x = data.to_float(real.images[rows])                # (128, C, H, W)
        x = x.flip(-1).where(torch.rand(128, 1, 1, 1, generator=rng) < real.flip / 2, x)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device)), real.labels[rows].to(device)).backward()
        optimizer.step()
    right = model[-1](features(model, real.images[test])).argmax(1).cpu() == real.labels[test]
    return model, right.double().mean().item()


def kept_classifier(real, folder="out", steps=1000, device="cpu"):
    """A data.Dataset's (classifier, test accuracy, path): read, or else trained and written. If it
    has no classes, they are the quarter turns of a picture. Source: Gidaris et al. 2018 §2."""
    if len(real.class_names) < 2:
        print(f"{real.name} has no classes: the classifier tells quarter turns of its pictures")
        images = torch.cat([real.images[k::4].rot90(k, (2, 3)) for k in range(4)])
        turns = torch.arange(len(real)).remainder(4).sort().values              # (N,)
        real = data.Dataset(f"{real.name} turned", images, turns, None, [*"0123"], flip=False)
    trained_on = {str((real.name, real.class_names, steps)): real.images, "labels": real.labels}
    words = re.sub(r"\W", "-", real.name)[-40:]             # letters of any alphabet stay
    path = pathlib.Path(folder) / f"classifier-{words}-{fingerprint(trained_on)[:8]}.pt"
    if not path.exists():
        data.check_target(path, b"")
        print(f"training the classifier: {steps} steps")
        model, accuracy = train_classifier(real, steps, device)
        save_checkpoint(path, {"model": model.state_dict(), "accuracy": accuracy})
    saved = load_checkpoint(path, "model", "accuracy")
    model = make_classifier(real.images.shape[1], len(real.class_names))
    load_weights(model, saved["model"], path)
    return model.to(device), saved["accuracy"], path


def save_sheet(path, images, real):
    """A PNG of uint8 images (N, C, H, W), each beside the nearest picture of a data.Dataset, also
    mirrored if its flip says so, with the root mean square of their difference, 0 to 255."""
    views = torch.stack([images, images.flip(-1)][:1 + real.flip]).flatten(2).float()   # (V, N, D)
    away, nearest = torch.cat([torch.cdist(views, x.flatten(1).float()).amin(0)         # (N, M)
                               for x in real.images.split(256)], 1).min(1)
    words = [text for d in away / views.shape[2] ** 0.5 for text in ("sample", f"{d:.0f} away")]
    pairs = torch.stack([images, real.images[nearest]], 1).flatten(0, 1)        # (2N, C, H, W)
    data.save_grid(pairs, path, captions=words, made_by=MADE_BY)


@dataclasses.dataclass
class Options:
    """what is scored, and against what"""
    ckpt: str = cli.flag(None, "checkpoint of train.py to sample from; or give --images")
    images: str = cli.flag(None, "npz: uint8 arr_0 (N, H, W, C), labels, captions", needs="!ckpt")
    data: str = cli.flag(None, "what they imitate: shapes, scenes, cifar10, ...; default: --ckpt's")
    data_dir: str = cli.flag(None, "folder of official data; default: --ckpt's, else data")
    skip_bad: bool = cli.flag(None, "folder: leave out unreadable images; default: --ckpt's")
    n: int = cli.flag(None, "samples to take; default: 480", "[1, 1e6]", needs="ckpt")
    cfg_scale: float = cli.flag(None, "guidance; default: the run's", "[0, inf)", needs="ckpt")
    steps: int = cli.flag(None, "as in sample.py", "[1, inf)", needs="ckpt")
    seed: int = cli.flag(None, "of the samples; default: 0", "[0, 1e15)", needs="ckpt")
    device: str = cli.flag(None, "where to compute", "", ["auto", "cpu", "cuda", "mps"])
    classifier_steps: int = cli.flag(None, "its training steps; default: 1000", "[1, inf)")
    json: str = cli.flag(None, "also write the numbers to this file (default: not)")
    sheet: str = cli.flag(None, "a PNG of 24 samples, each beside the nearest training picture")


def sampled(path, n, config=None, device="cpu", **options):
    """n pictures of a checkpoint's classes in turn, or of held-out captions of config["data"] ->
    (uint8 (N, C, H, W), labels (N,), captions). config: None = the run's; others: see sample_all"""
    import sample           # here, because reading pictures needs no model
    task, model = sample.load(path, device)
    y, names = sample.conditions(sample.Options(ckpt=path, npz=n), task, config)
    images = sample.sample_all(task, model, y.to(device), **options)[1]
    return (images, None, names) if task.tokenizer else (images, y if names else None, None)


@cli.one_line
def main(argv):
    """Score samples, print rates with their standard errors, or distances beside their floor."""
    options, = cli.parse(argv, __doc__, Options)
    if not (path := options.ckpt or options.images):
        raise ValueError("give --ckpt FILE, to sample from, or --images FILE, an npz")
    for file, end in ((options.json, ".json"), (options.sheet, ".png")):
        if file and not file.endswith(end):
            raise ValueError(f"{file}: give a name that ends in {end}")
        if file:
            data.check_target(file, MADE_BY.encode())
    saved = load_checkpoint(path) if options.ckpt else {}
    if options.ckpt and "info" not in saved:
        raise ValueError(f"{path} is no run of train.py: use sample.py --npz, then --images FILE")
    flags = {key: getattr(options, key) for key in ("data", "data_dir", "skip_bad")}
    config = dict(data="", data_dir="data", skip_bad=False, hold_out=False, seed=0)
    config |= saved.get("config", {}) | {k: v for k, v in flags.items() if v is not None}
    if not config["data"]:
        raise ValueError("say with --data what the samples imitate, for example --data shapes")
    scores = _score(options, path, config, saved.get("info"))
    print(f"{scores['source']}: {scores['n']} images of {scores['data']}")
    for axis, (rate, n) in scores.get("rates", {}).items():
        print(f"  {axis:<24}{rate:7.3f} +- {(rate * (1 - rate) / n) ** 0.5:.3f}  of {n}")
    if "fid" in scores:
        print("  classifier-FID  {fid:9.4f}   floor {fid_floor:9.4f}\n  against {n_real} real "
              "images, with {classifier}, test accuracy {classifier_accuracy:.3f}".format(**scores))
    if options.json:
        with written_whole(options.json) as file:
            file.write(json.dumps({"made_by": MADE_BY, **scores}, indent=1).encode())


def _score(options, path, config, info):
    """What --json writes of the samples in `path`. config: what they imitate; info: of a run."""
    name, drawn = config["data"], config["data"] in ("shapes", "scenes")
    unread = "classifier_steps " * drawn + "device " * bool(drawn and options.images) + (
        "skip_bad " * (name[:7] != "folder:") + "data_dir" * (name not in data.OFFICIAL))
    cli.refuse(options, unread, f"is not read for --data {name}: leave it out")
    device, asked, found = cli.resolve_device(options.device or "auto"), {}, {}
    if options.images:
        *samples, theirs = data.read_arrays(path, "npz")
        n, side, draw = len(samples[0]), samples[0].shape[-1], lambda n: samples
    else:
        asked = {"cfg_scale": options.cfg_scale, "steps": options.steps, "seed": options.seed or 0}
        n, side, theirs = options.n or 480, info["image_size"], info["class_names"]
        draw = lambda n: sampled(path, n, config, device, **asked)
    real = None if drawn and not options.sheet else data.load(name, side, "train",
        config["data_dir"], None, config["seed"], drawn and config["hold_out"], config["skip_bad"])
    images, labels, captions = draw(1)          # what is wrong is said before all are sampled
    if drawn:
        rates(name, images, labels, captions)
    names = worlds.CLASS_NAMES if drawn else real.class_names
    other = labels is not None and ((theirs or names) != names or labels.max() >= len(names))
    if name != "scenes" and other:
        raise ValueError(f"{path}: its classes must be those of {name}, in the same order")
    if not drawn:
        check_comparable((n, *images.shape[1:]), real)
        model, rate, file = kept_classifier(real, "out", options.classifier_steps or 1000, device)
        found = {"classifier": str(file), "classifier_accuracy": rate}
    images, labels, captions = draw(n)
    found |= {"rates": rates(name, images, labels, captions)} if drawn else (
        score_pictures(model, images, real, labels))
    if options.sheet:
        save_sheet(options.sheet, images[:24], real)
    return {"source": path, "data": name, "n": len(images), **asked, **found}


def rates(name, images, labels, captions):
    """{axis: (rate, number)} of what was asked of a drawn world; legible alone if nothing was."""
    if name == "shapes" and labels is not None:
        return class_accuracy(images, labels)
    if captions is not None:
        return prompt_accuracy(images, captions)
    return {"legible": (read_shapes(images)["legible"].double().mean().item(), len(images))}


if __name__ == "__main__":
    main()
