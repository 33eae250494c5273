"""Things to personalise with, which have a part that no caption names, and measures of likeness.

A thing is a shape of its category with a smaller shape of another colour inside, such as a cyan
circle with a red disc. The base has seen such pictures, and no word of a caption tells which part
there is. The hard thing is cut in two colours, which no picture of the base's world was. A thing is
measured by its part, the difference of colour between the part's pixels and the body's along the
thing's own difference, 0 = no part, 1 = as in real pictures, and by its body, 1 = its own colour. A
picture is a hit if part > 0.5 and body > 0.6. Colour and outline alone do not make a hit.

    python -m studies.adapter_sweep                 # one of the studies that use this
"""
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
          "split square": ("square", "orange", "half", "blue", 1.0)}
HARD = ("split square",)
SHAPE = {name: i for i, name in enumerate(worlds.SHAPES + worlds.NEW_SHAPES)}


def render(name, cx, cy, r, ground):
    """Pictures (B, 3, 32, 32) uint8 of a thing.

    cx, cy (B,): its centre; r (B,): its radius; ground (B,): index into BACKGROUNDS.
    """
    category, color, part, part_color, share = THINGS[name]
    palette = {key: torch.tensor(rgb, dtype=torch.uint8) for key, rgb in worlds.COLORS.items()}
    grounds = torch.tensor(list(worlds.BACKGROUNDS.values()), dtype=torch.uint8)[ground]    # (B, 3)

    def draw(*layers):                                          # (shape, colour, share of r) each
        shapes, colors, shares = zip(*layers)
        stack = lambda v: torch.stack([v] * len(layers), 1)                                 # (B, n)
        return worlds.render_shapes(
            torch.tensor([[SHAPE[s] for s in shapes]]).expand(len(cx), -1),
            torch.stack([palette[c] for c in colors]).expand(len(cx), -1, -1),
            stack(cx), stack(cy), stack(r) * torch.tensor(shares), grounds)
    if part == "half":                      # the shape in both colours, the second on the right
        right = (torch.arange(32) + 0.5)[None, None, None] > cx.view(-1, 1, 1, 1)
        return torch.where(right, draw((category, part_color, 1.0)), draw((category, color, 1.0)))
    return draw((category, color, 1.0), (part, part_color, share))


def photographs(name, count, word="<new1>", seed=0):
    """Pictures of a thing, large and near the middle -> (uint8 (count, 3, 32, 32), captions).

    Every second caption states size and background, so that "a WORD category" alone does not come
    to mean the thing on its background.
    """
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=g)
    ground = torch.randint(4, (count,), generator=g)
    pictures = render(name, uniform(14, 18), uniform(14, 18), uniform(8.5, 10.5), ground)
    what = f"{word} {THINGS[name][0]}"
    full = [f"a large {what} on {tuple(worlds.BACKGROUNDS)[k]}" for k in ground.tolist()]
    return pictures, [full[k] if k % 2 else f"a {what}" for k in range(count)]


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
    side, lower = x.shape[-1], cy + worlds.PART_DROP[SHAPE[category]] * r
    body = worlds.shape_coverage(SHAPE[category], cx, cy, r, side)                      # (B, H, W)
    if part == "half":
        right = (torch.arange(side) + 0.5)[None, None] * 32 / side > cx.view(-1, 1, 1)
        inner, outer = body * right, body * ~right
    else:               # the edge between the two, which is soft, is left out
        inner = worlds.shape_coverage(SHAPE[part], cx, lower, 0.75 * share * r, side)
        outer = body * (1 - worlds.shape_coverage(SHAPE[part], cx, lower, 1.25 * share * r, side))
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
        real = task.to_pictures(task.encode(to_float(photographs(name, 64, seed=99)[0])))
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
