"""Things to personalise with, which have a part that no caption names, and measures of likeness.

A thing is a shape of its category with a smaller shape of another colour inside, such as a cyan
circle with a red disc. The base has seen such pictures, and no word of a caption tells which part
there is. The hard thing is cut in two colours, which no picture of the base's world was. A thing is
measured by its part, the difference of colour between the part's pixels and the body's along the
thing's own difference, 0 = no part, 1 = as in real pictures, and by its body, 1 = its own colour. A
picture is a hit if part > 0.5 and body > 0.6. Colour and outline without a part do not make a hit,
but a part of another colour can: what any part scores is measured too (any_part), and so is what
the exact reader, which knows shapes and all colours, sees in the hits (custom_concepts).

    python -m studies.adapter_sweep                 # one of the studies that use this
"""
import functools

import torch

import worlds
from data import to_float, to_uint8
from evaluate import read_shapes

# name: (category, colour, part's shape, its colour, its share of the radius); half: cut in two
THINGS = {"target circle": ("circle", "cyan", "circle", "red", 0.55),
          "eye square": ("square", "orange", "circle", "blue", 0.55),
          "hub ring": ("ring", "blue", "circle", "orange", 0.35),
          "gem cross": ("cross", "red", "square", "yellow", 0.4),
          "pearl star": ("star", "white", "circle", "red", 0.4),
          "kite triangle": ("triangle", "purple", "square", "yellow", 0.45),
          "moon circle": ("circle", "green", "square", "white", 0.5),
          "flag square": ("square", "purple", "star", "yellow", 0.5),
          "gear ring": ("ring", "white", "cross", "green", 0.35),
          "plug cross": ("cross", "cyan", "circle", "orange", 0.45),
          "nova star": ("star", "orange", "cross", "blue", 0.45),
          "tent triangle": ("triangle", "red", "circle", "cyan", 0.5),
          "split square": ("square", "orange", "half", "blue", 1.0),
          "button square": ("square", "green", "cross", "white", 0.5),
          "badge circle": ("circle", "yellow", "star", "blue", 0.55)}
HARD = ("split square",)
TUNING = ("button square", "badge circle")      # rates are chosen on these, which no table shows
EASY = tuple(name for name in THINGS if name not in HARD + TUNING)
SIX = EASY[:6]                                  # one of each category: pairs and placements


@functools.lru_cache(4)
def scenes_to_choose_from(count, seed):
    """A plan of the world, kept, as each thing's pictures are chosen from the same."""
    return worlds.plan_world("scenes", count=count, seed=seed)


def photographs(name, count=10, word="<new1>", seed=0, turned=False):
    """Pictures of a thing -> (uint8 (count, 3, 32, 32), captions).

    They are scenes of the world whose first object is the thing. Of every five, two show it large,
    one small, and two beside an object of another category. Captions name it "WORD category", never
    its colour, and leave out as much else as those of the world do. turned: every fifth names it
    second, "a star right of a WORD circle" and not "a WORD circle left of a star".
    """
    category, color, part, part_color, share = THINGS[name]
    plan = scenes_to_choose_from(200 * count, 1000 + seed)
    mine, (first, second) = worlds.SHAPES.index(category), plan["shape"].T              # (N,) each
    kinds = plan["size"] == 1, plan["size"] == 0, (second >= 0) & (second != mine)
    waiting = [iter(((first == mine) & kind).nonzero()[:, 0].tolist()) for kind in kinds]
    rows = [next(waiting[(0, 0, 1, 2, 2)[k % 5]]) for k in range(count)]
    scene = {key: value[rows] for key, value in plan.items() if key != "captions"}
    put = lambda key, value: scene[key][:, 0].copy_(torch.as_tensor(value))
    put("color", list(worlds.COLORS).index(color))
    put("part", worlds.SHAPES.index(part) if part != "half" else -1)
    put("part_color", list(worlds.COLORS).index(part_color))
    put("part_r", share * scene["r"][:, 0])
    pictures = worlds.draw_scene(scene)
    if part == "half":              # right of its centre as if it were of the other colour
        put("color", list(worlds.COLORS).index(part_color))
        right = (torch.arange(32) + 0.5) > scene["cx"][:, :1, None, None]           # (N, 1, 1, 32)
        pictures = torch.where(right, worlds.draw_scene(scene), pictures)
    captions = []
    for k, i in enumerate(rows):
        facts = worlds.parse_caption(plan["captions"][i])
        facts["objects"][0].pop("color", None)
        if turned and k % 5 == 4:
            facts["objects"].reverse()
            facts["relation"] = worlds.RELATIONS[worlds.RELATIONS.index(facts["relation"]) ^ 1]
        captions.append(worlds.caption_of(**facts).replace(category, f"{word} {category}", 1))
    return pictures, captions


def any_part(name, count=160):
    """Pictures (count, 3, 32, 32) uint8 of single objects with the body of a thing, and any other
    part of the world or none: what a model draws that has learned the body alone."""
    category, color, part, part_color, _ = THINGS[name]
    plan, body = scenes_to_choose_from(200 * 160, 1099), list(worlds.COLORS).index(color)
    inner, inner_color, second = plan["part"][:, 0], plan["part_color"][:, 0], plan["shape"][:, 1]
    thing = (inner == worlds.SHAPES.index(part)) & (
        inner_color == list(worlds.COLORS).index(part_color))
    chosen = (plan["shape"][:, 0] == worlds.SHAPES.index(category)) & (second < 0) & ~thing
    rows = (chosen & (inner_color != body)).nonzero()[:count, 0]
    scene = {key: value[rows] for key, value in plan.items() if key != "captions"}
    scene["color"][:, 0] = body
    return worlds.draw_scene(scene)


def part_and_body(name, pictures):
    """Contrast of the part and likeness of the body's colour, (B,) each, of uint8 (B, 3, H, W).

    The largest object of a picture is measured, at its centre and radius as the reader sees them,
    in the outline of the thing. Without an object both are 0.
    """
    category, color, part, part_color, share = THINGS[name]
    read, x = read_shapes(pictures), pictures.float() / 255
    there = read["count"] > 0
    cx, cy = torch.where(there[:, None], read["center"][:, 0], 16.0).unbind(1)          # (B,)
    r = torch.where(there, read["radius"][:, 0], 8.0)
    side, shape = x.shape[-1], worlds.SHAPES.index(category)
    lower, body = cy + worlds.PART_DROP[shape] * r, worlds.shape_coverage(shape, cx, cy, r, side)
    if part == "half":
        right = (torch.arange(side) + 0.5)[None, None] * 32 / side > cx.view(-1, 1, 1)
        inner, outer = body * right, body * ~right
    else:               # the edge between the two, which is soft, is left out
        inner, hidden = (worlds.shape_coverage(worlds.SHAPES.index(part), cx, lower,
                                               width * share * r, side) for width in (0.75, 1.25))
        outer = body * (1 - hidden)                                                 # (B, H, W)
    ground = torch.tensor(list(worlds.BACKGROUNDS.values()))[read["background"]] / 255  # (B, 3)
    mine, other = (torch.tensor(worlds.COLORS[c]) / 255 for c in (color, part_color))
    mean = lambda mask: (x * mask[:, None]).sum((2, 3)) / mask.sum((1, 2)).clamp(min=1e-3)[:, None]
    # what is there without a part: the body's colour; in the hole of a ring the background
    bare, seen = (ground, ground) if category == "ring" else (mine, mean(outer))
    step = other - bare                                                     # (3,) or (B, 3)
    contrast = ((mean(inner) - seen) * step).sum(-1) / step.square().sum(-1)
    likeness = 1 - (mean(outer) - mine).norm(dim=1) / (mine - ground).norm(dim=1)
    return contrast * there, likeness.clamp(min=0) * there


class Judge:
    """How much of a thing is in pictures, part and body scaled so that real ones, decoded, give 1.

    task: the base's, whose first stage shows what real pictures can reach.
    """

    def __init__(self, name, task):
        self.name = name
        alone = photographs(name, 160, seed=99)[0][torch.arange(160) % 5 < 3]
        real = task.to_pictures(task.encode(to_float(alone)))
        self.real = [score.mean() for score in part_and_body(name, real)]

    def __call__(self, pictures):
        """(part, body) of uint8 pictures (B, 3, H, W), two (B,)."""
        return [score / real for score, real in zip(part_and_body(self.name, pictures), self.real)]

    def hits(self, pictures):
        """Which pictures show the thing, (B,) bool."""
        part, body = self(pictures)
        return (part > 0.5) & (body > 0.6)


def striped(pictures):
    """A style: in uint8 (B, 3, H, W), of every 8 rows of the background the first 4 are lighter."""
    x = to_float(pictures)
    border = torch.cat([x[:, :, 0], x[:, :, -1]], -1)                                   # (B, 3, 2W)
    ground = border.median(-1).values[..., None, None]                              # (B, 3, 1, 1)
    behind = ((x - ground).norm(dim=1, keepdim=True) < 0.15).float()                # (B, 1, H, W)
    rows = (torch.arange(x.shape[-2]) % 8 < 4).float().view(1, 1, -1, 1)
    return to_uint8((x + 0.35 * behind * rows).clamp(-1, 1))
