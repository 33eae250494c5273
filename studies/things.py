"""Things to personalise with, which have a part that no caption names, and measures of likeness.

A thing is a shape of its category with a smaller shape of another colour on it, such as a cyan
circle with a red disc. The base knows the category, the size and place words and the backgrounds,
but has never seen the part. The hard ones are cut in two colours. Alignment compares a picture with
the thing itself, both through the autoencoder, and is scaled: 0 is what the base samples for the
bare category, 1 is a real picture of the thing.

    python -m studies.adapter_sweep                 # one of the studies that use this
"""
import torch
import torch.nn.functional as F

import worlds
from data import to_float, to_uint8

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


def crop(pictures, side=24):
    """The object in each picture, cut out at its own size -> colours (B, 3, s, s), mask (B, s, s).

    pictures: uint8 (B, 3, H, W). The background is the median of the border; the box is 2.2 times
    the object's spread around its centre.
    """
    x = pictures.float() / 255
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], -1)    # (B, 3, 4W)
    ground = border.median(-1).values[..., None, None]                              # (B, 3, 1, 1)
    mask = ((x - ground).norm(dim=1) > 0.25).float()                                    # (B, H, W)
    axis = (torch.arange(x.shape[-1]) + 0.5) / x.shape[-1] * 2 - 1
    mass = mask.sum((1, 2)).clamp(min=1)                                                # (B,)
    cx, cy = (mask.sum(1) * axis).sum(1) / mass, (mask.sum(2) * axis).sum(1) / mass
    away = (axis - cx.view(-1, 1, 1)) ** 2 + (axis[:, None] - cy.view(-1, 1, 1)) ** 2   # (B, H, W)
    spread = ((mask * away).sum((1, 2)) / mass).sqrt().clamp(min=0.05)                  # (B,)
    steps = 2.2 / 2 ** 0.5 * spread[:, None] * ((torch.arange(side) + 0.5) / side * 2 - 1)  # (B, s)
    grid = torch.stack([(cx[:, None] + steps)[:, None].expand(-1, side, -1),
                        (cy[:, None] + steps)[:, :, None].expand(-1, -1, side)], -1)
    cut = F.grid_sample(torch.cat([x, mask[:, None]], 1), grid, align_corners=False)
    return cut[:, :3], (cut[:, 3] > 0.5).float()


def likeness(pictures, reference):
    """How like the reference (1, 3, H, W) each picture is, (B,) in [0, 1].

    Overlap x (1 - mean colour difference in the overlap).
    """
    (a, m), (b, n) = crop(pictures), crop(reference)
    both = (m * n).sum((1, 2))                                                          # (B,)
    either = torch.maximum(m, n.expand_as(m)).sum((1, 2)).clamp(min=1)
    gap = ((a - b).abs().mean(1) * m * n).sum((1, 2)) / both.clamp(min=1)
    return both / either * (1 - gap)


class Judge:
    """Alignment with one thing: 0 the base's bare category, 1 real pictures, both as decoded.

    task: the base's; base_pictures: what it samples; hit: nearer to the thing than to those.
    """

    def __init__(self, name, task, base_pictures, ground=1):
        again = lambda pictures: task.to_pictures(task.encode(to_float(pictures)))
        middle = torch.tensor([16.0])
        thing = render(name, middle, middle, torch.tensor([9.5]), torch.tensor([ground]))
        self.reference = again(thing)
        real, _ = photographs(name, 64, seed=99)
        self.high = likeness(again(real), self.reference).mean().item()
        self.low = likeness(base_pictures, self.reference).mean().item()

    def __call__(self, pictures):
        """(B,) alignment of uint8 pictures (B, 3, H, W)."""
        return (likeness(pictures, self.reference) - self.low) / (self.high - self.low)

    def hits(self, pictures):
        """Share of the pictures that are nearer to the thing than to what the base samples."""
        return (self(pictures) > 0.5).float().mean().item()


def striped(pictures):
    """A style: in uint8 (B, 3, H, W), of every 8 rows of the background the first 4 are lighter."""
    x = to_float(pictures)
    border = torch.cat([x[:, :, 0], x[:, :, -1]], -1)                                   # (B, 3, 2W)
    ground = border.median(-1).values[..., None, None]                              # (B, 3, 1, 1)
    behind = ((x - ground).norm(dim=1, keepdim=True) < 0.15).float()                # (B, 1, H, W)
    rows = (torch.arange(x.shape[-2]) % 8 < 4).float().view(1, 1, -1, 1)
    return to_uint8((x + 0.35 * behind * rows).clamp(-1, 1))
