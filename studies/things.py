"""Things to personalise with: objects with a part that no caption names, and exact measures of how well one is drawn.

A thing is a shape of its category with a smaller shape of another colour on it, a cyan circle with a red disc, say. The
base knows the category, the size and place words and the backgrounds, but has never seen the part. The hard ones are
cut in two colours. Alignment compares a picture with the thing itself, both through the autoencoder, and is scaled so
that 0 is what the base draws for the bare category and 1 is a real picture of the thing.

    python -m studies.adapter_sweep                 # one of the studies that stand on this
"""
import torch
import torch.nn.functional as F

import worlds
from data import to_float, to_uint8

# name: (category, colour, part's shape, part's colour, part's radius as a share); "half" cuts the thing in two
THINGS = {"target circle": ("circle", "cyan", "circle", "red", 0.55),
          "eye square": ("square", "orange", "circle", "blue", 0.55),
          "hub ring": ("ring", "blue", "circle", "orange", 0.35),
          "gem cross": ("cross", "red", "square", "yellow", 0.4),
          "pearl star": ("star", "white", "circle", "red", 0.4),
          "split square": ("square", "orange", "half", "blue", 1.0)}
HARD = ("split square",)
SHAPE = {name: i for i, name in enumerate(worlds.SHAPES + worlds.NEW_SHAPES)}


def render(name, cx, cy, r, ground):
    """Pictures of a thing at cx, cy (B,), of radius r (B,), on backgrounds ground (B,) -> (B, 3, 32, 32) uint8."""
    category, color, part, part_color, share = THINGS[name]
    palette = {key: torch.tensor(rgb, dtype=torch.uint8) for key, rgb in worlds.COLORS.items()}
    grounds = torch.tensor(list(worlds.BACKGROUNDS.values()), dtype=torch.uint8)
    whole = lambda c: worlds.render_shapes(torch.full((len(cx), 1), SHAPE[category]), palette[c].expand(len(cx), 1, 3),
                                         cx[:, None], cy[:, None], r[:, None], grounds[ground])
    if part == "half":                                          # the same shape twice; the right half of the second
        right = (torch.arange(32) + 0.5)[None, None, None] > cx.view(-1, 1, 1, 1)
        return torch.where(right, whole(part_color), whole(color))
    two = lambda a, b: torch.stack([a, b], 1)
    return worlds.render_shapes(torch.tensor([[SHAPE[category], SHAPE[part]]]).expand(len(cx), -1),
                              torch.stack([palette[color], palette[part_color]]).expand(len(cx), -1, -1),
                              two(cx, cx), two(cy, cy), two(r, share * r), grounds[ground])


def photographs(name, count, word="<new1>", seed=0):
    """`count` pictures of a thing, large and near the middle -> (uint8 (count, 3, 32, 32), captions).

    Every second caption states size and background; so "a WORD category" alone does not come to mean the thing.
    """
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=g)
    ground = torch.randint(4, (count,), generator=g)
    pictures = render(name, uniform(14, 18), uniform(14, 18), uniform(8.5, 10.5), ground)
    full = [f"a large {word} {THINGS[name][0]} on {tuple(worlds.BACKGROUNDS)[k]}" for k in ground.tolist()]
    return pictures, [full[k] if k % 2 else f"a {word} {THINGS[name][0]}" for k in range(count)]


def crop(pictures, side=24):
    """The object in each picture, cut out at its own size: uint8 (B, 3, H, W) -> colours (B, 3, s, s), mask (B, s, s).

    The background is the median of the border; the box is 2.2 times the object's spread around its centre.
    """
    x = pictures.float() / 255
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], -1)        # (B, 3, 4W)
    mask = ((x - border.median(-1).values[..., None, None]).norm(dim=1) > 0.25).float()     # (B, H, W)
    axis = (torch.arange(x.shape[-1]) + 0.5) / x.shape[-1] * 2 - 1
    mass = mask.sum((1, 2)).clamp(min=1)
    cx, cy = (mask.sum(1) * axis).sum(1) / mass, (mask.sum(2) * axis).sum(1) / mass          # (B,)
    away = (axis - cx.view(-1, 1, 1)) ** 2 + (axis[:, None] - cy.view(-1, 1, 1)) ** 2        # (B, H, W)
    half = 2.2 / 2 ** 0.5 * ((mask * away).sum((1, 2)) / mass).sqrt().clamp(min=0.05)        # (B,)
    steps = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.stack([(cx[:, None] + half[:, None] * steps)[:, None].expand(-1, side, -1),
                        (cy[:, None] + half[:, None] * steps)[:, :, None].expand(-1, -1, side)], -1)
    cut = F.grid_sample(torch.cat([x, mask[:, None]], 1), grid, align_corners=False)         # (B, 4, s, s)
    return cut[:, :3], (cut[:, 3] > 0.5).float()


def likeness(pictures, reference):
    """How like the reference (1, 3, H, W) each picture is, (B,) in [0, 1]: overlap x (1 - mean colour difference)."""
    (a, m), (b, n) = crop(pictures), crop(reference)
    both, either = (m * n).sum((1, 2)), torch.maximum(m, n.expand_as(m)).sum((1, 2)).clamp(min=1)
    gap = ((a - b).abs().mean(1) * m * n).sum((1, 2)) / both.clamp(min=1)                    # (B,)
    return both / either * (1 - gap)


class Judge:
    """Alignment with one thing, on a scale of the base's own: 0 its bare category, 1 real pictures, both as decoded.

    task, model: the base; hit: halfway between the two.
    """

    def __init__(self, name, task, base_pictures, ground=1):
        again = lambda pictures: task.to_pictures(task.encode(to_float(pictures)))
        middle = torch.tensor([16.0])
        self.reference = again(render(name, middle, middle, torch.tensor([9.5]), torch.tensor([ground])))
        real, _ = photographs(name, 64, seed=99)
        self.high = likeness(again(real), self.reference).mean().item()
        self.low = likeness(base_pictures, self.reference).mean().item()

    def __call__(self, pictures):
        """(B,) alignment of uint8 pictures (B, 3, H, W)."""
        return (likeness(pictures, self.reference) - self.low) / (self.high - self.low)

    def hits(self, pictures):
        """Share of the pictures that are nearer to the thing than to what the base draws."""
        return (self(pictures) > 0.5).float().mean().item()


def striped(pictures):
    """A style: every fourth pair of rows of the background is lighter. uint8 (B, 3, H, W) -> the same."""
    x = to_float(pictures)
    border = torch.cat([x[:, :, 0], x[:, :, -1]], -1).median(-1).values[..., None, None]     # (B, 3, 1, 1)
    ground = ((x - border).norm(dim=1, keepdim=True) < 0.15).float()                         # (B, 1, H, W)
    rows = (torch.arange(x.shape[-2]) % 8 < 4).float().view(1, 1, -1, 1)
    return to_uint8((x + 0.35 * ground * rows).clamp(-1, 1))
