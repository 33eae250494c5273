"""worlds.py: two worlds of drawn pictures, so that the first run needs no download.

    python train.py --data scenes --image-size 32
    images = draw_scene(plan := plan_world("scenes", count=1000), image_size=32)
    parse_caption(plan["captions"][0])         # {"objects": [{"shape": "ring", ...}], ...}

`shapes` shows one object on black, in 48 classes.  `scenes` shows one or two objects with sizes,
places, relations, backgrounds and a caption.  Captions leave things out, and none names the part,
a smaller shape that most objects have inside: a model of `scenes` can draw what it has no word for,
and so learn a new word for it from a few pictures.
An object is the signed distance d to its outline, in pixels; it covers clamp(0.5 - d, 0, 1) of a
pixel: soft edges at any image size.  As the program draws the pictures, it knows what is true of
each, and evaluate.py can read a sampled one back and compare it with its caption, exactly.
A world is a function of (name, image size, split, count, seed, hold_out) and of nothing else."""
import math
import re

import torch

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {"red": (230, 40, 40), "green": (50, 180, 60), "blue": (60, 100, 255),
          "yellow": (250, 220, 40), "orange": (255, 125, 10), "purple": (160, 60, 220),
          "cyan": (40, 215, 230), "white": (250, 250, 250)}
# Dull colours, so that every object can be seen: at RGB distance >= 90 from each colour above.
BACKGROUNDS = {"black": (20, 20, 26), "gray": (110, 110, 115), "navy": (20, 30, 90),
               "brown": (90, 55, 25)}
SIZES = ("small", "large")
PLACES = ("in the middle", "on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below")
# The share of "right of", else "left of", and of "below", else "above". With even shares only order
# and relation together tell which object is where, which a U-Net did not learn in 4,000 steps.
CONVERSE = {"train": 0.2, "test": 0.5}
# Pairs that hold_out removes from training: can a model combine what it has seen apart?
HELD_OUT = (*zip(SHAPES, ("purple", "cyan", "orange", "blue", "yellow", "red")),)

PARTS = ("circle", "square", "cross", "star")   # inside an object, smaller; no caption names it
PART_SHARE = 0.6                # of the objects have one
PART_RADIUS = (0.4, 0.55)       # of the object's r
HUB_RADIUS = 0.35               # in the hole of a ring
# How far below the object's centre the part's is, in units of r: a triangle is wider there.
PART_DROP = torch.tensor([0.35 if shape == "triangle" else 0.0 for shape in SHAPES])
# What a caption leaves out, each by itself: the share of captions, or of the two objects' colours.
UNSAID = {"color": 0.3, "size": 0.5, "place": 0.5, "background": 0.4}

CLASS_NAMES = [f"{color} {shape}" for shape in SHAPES for color in COLORS]  # shape * 8 + color
OBJECTS = [{"shape": shape, "color": color} for shape in SHAPES for color in COLORS]  # the same
CANVAS = 32.0  # cx, cy, r are pixels of a 32-pixel picture, whatever the image size

# ---------------------------------------------------------------- outlines to pixels
def _star(x, y):
    # Fold the plane into one wedge of 36 degrees: there the outline is a single straight edge.
    tip, notch, wedge = 1.05, 0.55, math.pi / 5
    y = y - 0.1                                              # the bounding box is centred
    angle = torch.remainder(torch.atan2(x, -y) + wedge, 2 * wedge).sub_(wedge).abs_()
    radius = torch.hypot(x, y)
    edge = (notch * math.cos(wedge) - tip, notch * math.sin(wedge))  # from the tip to the notch
    dx, dy = (side / math.hypot(*edge) for side in edge)                # its direction
    return (radius * angle.cos() - tip) * dy - radius * angle.sin() * dx


# Signed distance, negative inside, of a shape of r = 1 around the origin.  x (n, 1, W),
# y (n, H, 1), y points down.  Every shape lies in the square |x|, |y| <= 1 and has an area between
# 1.7 and 2.4.  Beyond a sharp corner it is the distance to the extended edges, a little too small.
OUTLINES = (
    lambda x, y: torch.hypot(x, y) - 0.86,                   # circle
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.76,     # square
    # triangle: apex (0, -0.95), base from (-1, 0.95) to (1, 0.95)
    lambda x, y: torch.maximum((1.9 * x.abs() - (y + 0.95)) / math.hypot(1.9, 1.0), y - 0.95),
    _star,
    lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.36, y.abs() - 0.98),   # cross: two bars
                               torch.maximum(x.abs() - 0.98, y.abs() - 0.36)),
    lambda x, y: (torch.hypot(x, y) - 0.77).abs_() - 0.22)   # ring: radii 0.55 to 0.99


def shape_coverage(shape_index, cx, cy, r, image_size=32):
    """How much of each pixel a shape covers -> (B, H, W) float32 in [0, 1].
    shape_index: (B,) int64 into SHAPES, or one int; -1 = absent, covers nothing.
    cx, cy, r: (B,) float, centre and half extent in pixels of a 32-pixel picture, [0, 32]."""
    shape_index = torch.as_tensor(shape_index, device=cx.device).expand_as(cx)       # (B,)
    scale = image_size / CANVAS
    grid = (torch.arange(image_size, device=cx.device) + 0.5) / scale                # (W,) centres
    coverage = torch.zeros(len(cx), image_size, image_size, device=cx.device)        # (B, H, W)
    for index, outline in enumerate(OUTLINES):
        rows = (shape_index == index).nonzero()[:, 0]                                # (n,)
        size = r[rows, None, None].float()                                           # (n, 1, 1)
        x = (grid - cx[rows, None].float())[:, None, :] / size                       # (n, 1, W)
        y = (grid - cy[rows, None].float())[:, :, None] / size                       # (n, H, 1)
        coverage[rows] = (0.5 - outline(x, y) * (size * scale)).clamp_(0, 1)         # (n, H, W)
    return coverage


def render_shapes(shape, color, cx, cy, r, background, image_size=32):
    """Draw B pictures of up to K objects each, later over earlier ones -> (B, 3, H, W) uint8.
    shape, cx, cy, r (B, K): see shape_coverage; color (B, K, 3), background (B, 3): uint8."""
    side, chunk = image_size, max(1, 256 * 1024 // image_size ** 2)  # a chunk fits into the cache
    images = torch.empty(len(shape), 3, side, side, dtype=torch.uint8, device=shape.device)
    for i in range(0, len(shape), chunk):
        rows = slice(i, i + chunk)
        canvas = background[rows, :, None, None].float().repeat(1, 1, side, side)    # (b, 3, H, W)
        for k in range(shape.shape[1]):
            alpha = shape_coverage(*(v[rows, k] for v in (shape, cx, cy, r)), side)  # (b, H, W)
            canvas.lerp_(color[rows, k, :, None, None].float(), alpha[:, None])      # (b, 3, H, W)
        images[rows] = canvas.add_(0.5).to(torch.uint8)  # + 0.5: conversion to uint8 rounds down
    return images


# ---------------------------------------------------------------- facts to a caption, and back
def caption_of(objects, relation=None, background=None):
    """The caption of a scene, e.g. "a red circle left of a blue square on gray".
    objects: one or two dicts with shape, optionally color and, for a single object, size and place;
    relation: between two, not said of one.  Inverse: caption_of(**parse_caption(text)) == text."""
    said = [" ".join(thing[key] for key in ("size", "color", "shape", "place") if key in thing)
            for thing in objects]
    said = [f"an {words}" if words.startswith("orange") else f"a {words}" for words in said]
    return f" {relation} ".join(said) + (f" on {background}" if background else "")


def parse_caption(caption):
    """The facts that a caption of `shapes` or `scenes` states ("?": if it does), else ValueError:
    {"objects": [{"shape", "color"?, "size"?, "place"?}, ...], "relation"?, "background"?}."""
    colors, shapes = "|".join(COLORS), "|".join(SHAPES)
    one = (rf"an? (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{colors}) )?(?P<shape>{shapes})"
           rf"(?: (?P<place>{'|'.join(PLACES)}))?")
    two = (rf"an? (?:(?P<color>{colors}) )?(?P<shape>{shapes}) (?P<relation>{'|'.join(RELATIONS)}) "
           rf"an? (?:(?P<color2>{colors}) )?(?P<shape2>{shapes})")
    ground = rf"(?: on (?P<background>{'|'.join(BACKGROUNDS)}))?"
    match = re.fullmatch(one + ground, caption) or re.fullmatch(two + ground, caption)
    if match is None:
        raise ValueError(f"{caption!r} is not a caption such as 'a red ring above a blue star'")
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    keys = ("shape", "color", "size", "place")
    facts = {"objects": [{key: found[key + n] for key in keys if key + n in found}
                         for n in ("", "2") if "shape" + n in found]}
    return facts | {key: found[key] for key in ("relation", "background") if key in found}


def draw_scene(scene, image_size=32):
    """The pictures (N, 3, H, W) uint8 of what plan_world planned."""
    palette = torch.tensor(list(COLORS.values()), dtype=torch.uint8)                 # (8, 3)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.uint8)            # (4, 3)
    shape, color, cx, cy, r = (scene[key] for key in ("shape", "color", "cx", "cy", "r"))
    if "part" in scene:             # in the order of drawing: object, its part, object, its part
        parts = scene["part"], scene["part_color"], cx, cy + PART_DROP[shape] * r, scene["part_r"]
        shape, color, cx, cy, r = (torch.stack(pair, 2).flatten(1)                   # (N, 4)
                                   for pair in zip((shape, color, cx, cy, r), parts))
    return render_shapes(shape, palette[color], cx, cy, r, grounds[scene["background"]], image_size)


def plan_world(name, split="train", count=None, seed=0, hold_out=False):
    """All that is to be seen in pictures of the world `shapes` or `scenes`: a dict of label (N,)
    into CLASS_NAMES (of the first object), captions, background (N,), and for K objects shape,
    color (N, K), -1 = absent; cx, cy, r (N, K) in pixels of a 32-pixel picture.  `scenes`, K = 2,
    also has size, place (of a single object, else -1), relation (N,), -1 for one object, and of the
    parts part, part_color (N, 2), -1 = no part, and part_r (N, 2).  Each is an index into SHAPES,
    COLORS, ...  count: how many; None: see data.load.  hold_out: split "train" without HELD_OUT."""
    count = count or (48_000 if split == "train" else 2_000)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    removed = {f"{c} {s}" for s, c in HELD_OUT} if hold_out and split == "train" else {}
    allowed = torch.tensor([name not in removed for name in CLASS_NAMES])            # (48,)
    classes = allowed.nonzero()[:, 0]   # (42,) or (48,): as the first object, all equally often
    first = torch.randperm(count, generator=generator) % len(classes)
    distance = torch.randint(1, len(classes), (count,), generator=generator)    # never the same two
    first, second = classes[first], classes[(first + distance) % len(classes)]
    return {"label": first, **(_shapes_world(first, generator) if name == "shapes" else
                               _scenes_world(first, second, allowed, generator, split))}


def _uniform(generator, shape, low, high):
    """Uniform draws in [low, high) of this shape; the ends may be tensors."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def _shapes_world(first, generator):
    """One large object near the centre."""
    cx, cy = (_uniform(generator, (len(first), 1), 13.0, 19.0) for _ in range(2))
    r = _uniform(generator, (len(first), 1), 8.0, 11.0)
    return {"shape": first[:, None] // 8, "color": first[:, None] % 8, "cx": cx, "cy": cy, "r": r,
            "background": torch.zeros_like(first),
            "captions": [caption_of([OBJECTS[label]]) for label in first.tolist()]}


def _scenes_world(first, second, allowed, generator, split):
    """One object (60 %) or two, with parts."""
    count, uniform = len(first), lambda *given: _uniform(generator, *given)
    two = torch.rand(count, generator=generator) < 0.4                               # (N,)
    small, place, upright, ground = (torch.randint(n, (count,), generator=generator)
                                     for n in (2, 5, 2, 4))
    small, turned = small.bool(), torch.rand(count, generator=generator) < CONVERSE[split]
    relation = 2 * upright + turned                                     # (N,), as RELATIONS
    # One object: a small one has more room, so it goes further to the side.
    r1 = torch.where(small | two, uniform(count, 4.5, 6.0), uniform(count, 8.5, 10.5))
    side = torch.tensor([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])[place]  # (N, 2), as PLACES
    jitter = uniform((count, 2), -1.0, 1.0) * torch.where(small, 1.5, 1.0)[:, None]
    alone = 16.0 + side * torch.where(small, 8.0, 5.0)[:, None] + jitter             # (N, 2) x, y
    alone = alone.clamp(r1[:, None], CANVAS - r1[:, None])  # fully inside
    r2 = uniform(count, 4.5, 6.0)
    pair_x, pair_y = _place_pair(relation, r1, r2, uniform)                          # (N, 2) each
    classes = torch.stack([first, torch.where(two, second, -1)], 1)                  # (N, 2)
    scene = {"shape": classes // 8,                                                  # -1 stays -1
             "color": torch.where(classes < 0, -1, classes % 8), "background": ground,
             "cx": torch.where(two[:, None], pair_x, alone[:, :1]),     # (N, 2); an absent object's
             "cy": torch.where(two[:, None], pair_y, alone[:, 1:]),     # is not used
             "r": torch.stack([r1, r2], 1), "relation": torch.where(two, relation, -1),
             "size": torch.where(two, -1, 1 - small.long()), "place": torch.where(two, -1, place)}
    scene |= _parts(classes, scene["r"], allowed, generator)
    return scene | {"captions": _scene_captions(scene, generator)}


def _parts(classes, r, allowed, generator):
    """Parts of objects (N, 2): any of PARTS, in any other colour, of the pairs that are allowed."""
    fits = allowed & torch.tensor([thing["shape"] in PARTS for thing in OBJECTS])    # (48,)
    other = torch.arange(48) % 8 != torch.arange(8)[:, None]            # (8, 48), per own colour
    known = (fits & other).cumsum(1)[classes % 8]                       # (N, 2, 48), counts them
    chosen = (torch.rand(classes.shape, generator=generator) * known[..., -1]).long()
    inner = (known > chosen[..., None]).long().argmax(2)    # (N, 2), the first of the highest
    there = (torch.rand(classes.shape, generator=generator) < PART_SHARE) & (classes >= 0)
    share = _uniform(generator, classes.shape, *PART_RADIUS)
    return {"part": torch.where(there, inner // 8, -1),
            "part_color": torch.where(there, inner % 8, -1),
            "part_r": torch.where(classes // 8 == SHAPES.index("ring"), HUB_RADIUS, share) * r}


def _place_pair(relation, r1, r2, uniform):
    """Centres x (N, 2), y (N, 2) of two objects: along the axis of their relation each is in its
    half, at least one pixel apart; on the other axis they nearly agree."""
    near, far = (uniform(len(r), r + 0.5, 15.5 - r) for r in (r1, r2))
    level = uniform(len(r1), 10.0, 22.0)[:, None] + uniform((len(r1), 2), -1.0, 1.0)     # (N, 2)
    along = torch.stack([near, CANVAS - far], 1)     # (N, 2): first object low, second object high
    along = torch.where((relation % 2 == 0)[:, None], along, CANVAS - along)  # right of, below
    sideways = (relation < 2)[:, None]
    return torch.where(sideways, along, level), torch.where(sideways, level, along)


def _scene_captions(scene, generator):
    """Captions of N scenes, which leave things out as UNSAID says."""
    names = {"color": tuple(COLORS), "size": SIZES, "place": PLACES, "shape": SHAPES}
    rows = {key: value.tolist() for key, value in scene.items()}
    count, captions = len(rows["shape"]), []
    said = {key: (torch.rand(count, 2, generator=generator) >= share).tolist()
            for key, share in UNSAID.items()} | {"shape": [[True, True]] * count}
    for i in range(count):
        objects = []
        for k in range(2 if rows["shape"][i][1] >= 0 else 1):
            facts = {key: rows[key][i][k] for key in ("shape", "color")}
            facts |= {key: rows[key][i] for key in ("size", "place")}       # -1 of two objects
            objects.append({key: names[key][index] for key, index in facts.items()
                            if index >= 0 and said[key][i][k]})
        ground = tuple(BACKGROUNDS)[rows["background"][i]] if said["background"][i][0] else None
        captions.append(caption_of(objects, RELATIONS[rows["relation"][i]], ground))
    return captions
