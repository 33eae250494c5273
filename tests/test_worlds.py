"""Tests of worlds.py: drawing against a brute-force rasteriser, captions against pixels."""
import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

import worlds


# ---------------------------------------------------------------- drawing


def polygon(x, y, corners):
    """Are the points inside?  Even-odd rule."""
    hit = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
        if y1 != y2:
            hit ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return hit


def inside(name, x, y):
    """Is the point (x, y), in units of r, y down, in the shape?  Corner lists and circles only."""
    def disc(cx, cy, radius):
        return (x - cx) ** 2 + (y - cy) ** 2 < radius ** 2

    def box(w, h):
        return (abs(x) < w) & (abs(y) < h)

    if name == "circle":
        return disc(0, 0, 0.86)
    if name == "square":
        return box(0.76, 0.76)
    if name == "triangle":
        return polygon(x, y, [(0, -0.95), (1, 0.95), (-1, 0.95)])
    if name == "star":
        radii, angles = [1.05, 0.55] * 5, [math.radians(36 * i) for i in range(10)]
        return polygon(x, y, [(r * math.sin(a), 0.1 - r * math.cos(a))
                              for r, a in zip(radii, angles)])
    if name == "cross":
        return box(0.36, 0.98) | box(0.98, 0.36)
    return disc(0, 0, 0.99) & ~disc(0, 0, 0.55)             # ring


def brute_force(name, cx, cy, r, size):
    """Coverage by 8 x 8 points a pixel."""
    points = (np.arange(8 * size) + 0.5) / 8 * 32 / size
    x, y = np.meshgrid((points - cx) / r, (points - cy) / r)
    return inside(name, x, y).reshape(size, 8, size, 8).mean((1, 3))


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("size", [32, 64])
def test_coverage_matches_brute_force(index, size):
    random = np.random.default_rng(index)
    for r in (4.5, 5.0, 8.0, 11.0):
        cx, cy = random.uniform(12, 20, 2)
        got = worlds.shape_coverage(index, *(torch.tensor([v]) for v in (cx, cy, r)), size)[0]
        got, want = got.numpy(), brute_force(worlds.SHAPES[index], cx, cy, r, size)
        assert abs(got - want).sum() / want.sum() < 0.07, r  # of the area; all of it at the outline
        assert abs(got.sum() / want.sum() - 1) < 0.04, r
        assert abs(got - want).max() < 0.5, r


def test_shapes_are_comparable_and_distinct():
    five = torch.full((6,), 5.0)
    masks = worlds.shape_coverage(torch.arange(6), five * 3.2, five * 3.2, five)
    area = masks.sum((1, 2))
    assert area.max() / area.min() < 1.5
    for a, b in itertools.combinations(range(6), 2):
        assert (masks[a] - masks[b]).abs().sum() / area.mean() > 0.15, (a, b)


def test_render_places_colours_and_layers():
    shape = torch.tensor([[1, 1], [1, -1], [-1, -1]])
    color = torch.tensor([[[200, 10, 30], [7, 250, 90]]] * 3, dtype=torch.uint8)
    cx, cy, r = torch.tensor([[10.0, 14.0]] * 3), torch.full((3, 2), 12.0), torch.full((3, 2), 5.0)
    ground = torch.tensor([[1, 2, 3]] * 3, dtype=torch.uint8)
    images = worlds.render_shapes(shape, color, cx, cy, r, ground)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8

    def pixel(i, x, y):
        return images[i, :, y, x].tolist()

    assert pixel(0, 7, 12) == [200, 10, 30]      # only the first square reaches here
    assert pixel(0, 12, 12) == [7, 250, 90]      # both do, the later one lies on top
    assert pixel(1, 12, 12) == [200, 10, 30] and pixel(1, 16, 12) == [1, 2, 3]
    assert pixel(0, 12, 25) == [1, 2, 3]         # x is not y
    assert (images[2] == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()


def test_edges_are_blended_and_rounded():
    """A square of half side 0.76 * 5 = 3.8 at 16 ends at 12.2 and covers 0.8 of column 12."""
    one = torch.ones(1, 1)
    image = worlds.render_shapes(one.long(), torch.full((1, 1, 3), 202).byte(), 16 * one, 16 * one,
                                 5 * one, torch.zeros(1, 3).byte())
    assert image[0, 0, 16, 10:15].tolist() == [0, 0, 162, 202, 202]  # 0.8 * 202 = 161.6


def test_chunks_do_not_show():
    """Drawing 600 at once equals drawing them one by one."""
    args = [torch.arange(600)[:, None] % 8, torch.randint(256, (600, 1, 3)).byte(),
            *torch.rand(2, 600, 1) * 32, torch.rand(600, 1) * 6 + 4,
            torch.randint(256, (600, 3)).byte()]
    whole = worlds.render_shapes(*args)
    for i in (0, 255, 256, 511, 512, 599):
        assert torch.equal(whole[i:i + 1], worlds.render_shapes(*(a[i:i + 1] for a in args)))


def test_palette_is_well_apart():
    def distance(a, b):
        a, b = (np.array(list(names.values()), float) for names in (a, b))
        apart = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
        return apart[apart > 0].min()

    assert len(worlds.COLORS) == 8 and len(worlds.BACKGROUNDS) == 4
    assert distance(worlds.COLORS, worlds.BACKGROUNDS) >= 90
    assert distance(worlds.BACKGROUNDS, worlds.BACKGROUNDS) >= 45
    assert distance(worlds.COLORS, worlds.COLORS) >= 90


# ---------------------------------------------------------------- the worlds


def draw_world(name, image_size=32, *plan, **options):
    """Pictures, labels and captions of a world."""
    scene = worlds.plan_world(name, *plan, **options)
    return worlds.draw_scene(scene, image_size), scene["label"], scene["captions"]


@pytest.fixture(scope="module")
def scenes():
    """Pictures, and the plan that they were drawn from."""
    plan = worlds.plan_world("scenes", count=2000)
    return worlds.draw_scene(plan), plan


def test_shapes_world():
    images, labels, captions = draw_world("shapes", count=480)
    assert images.shape == (480, 3, 32, 32)
    assert Counter(labels.tolist()) == dict.fromkeys(range(48), 10)
    for label, caption, image in zip(labels.tolist(), captions, images):
        shape, color = worlds.SHAPES[label // 8], list(worlds.COLORS)[label % 8]
        assert worlds.CLASS_NAMES[label] == f"{color} {shape}"
        assert caption == f"{'an' if color == 'orange' else 'a'} {color} {shape}"
        distance = (image.float() - torch.tensor(worlds.COLORS[color]).view(3, 1, 1)).abs().amax(0)
        assert (distance < 1).sum() > 60     # an area of 1.7 * 8^2 = 109 at least, less its edges
    assert len(worlds.plan_world("shapes", "test")["label"]) == 2000


def test_the_worlds_do_not_change():
    """The default run's data, once for all: captions and labels hold no rounding."""
    for name, split, want in (
            ("shapes", "train", "b1b8eb483c3cdc33"), ("shapes", "test", "215ab2b8c033c057"),
            ("scenes", "train", "b2e5acf5ea12316f"), ("scenes", "test", "fdb2df5442984baa")):
        plan = worlds.plan_world(name, split, count=300)
        text = f"{plan['label'].tolist()} {plan['captions']}"
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == want, (name, split)
    for split, want in (("train", "a4c76705fa5e8a9c"), ("test", "a7378c51aa5406e2")):
        plan = worlds.plan_world("scenes", split, count=300)
        text = f"{plan['part'].tolist()} {plan['part_color'].tolist()}"
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == want, split


def facts_of(plan, i):
    """All that is true of picture i: what a caption that leaves nothing out would say."""
    two = plan["shape"][i, 1] >= 0
    objects = [{"shape": worlds.SHAPES[s], "color": list(worlds.COLORS)[c]} for s, c in
               zip(plan["shape"][i].tolist(), plan["color"][i].tolist()) if s >= 0]
    facts = {"objects": objects, "background": list(worlds.BACKGROUNDS)[plan["background"][i]]}
    if two:
        return facts | {"relation": worlds.RELATIONS[plan["relation"][i]]}
    objects[0] |= {"size": worlds.SIZES[plan["size"][i]], "place": worlds.PLACES[plan["place"][i]]}
    return facts


def seen(image, plan, i):
    """Masks of the objects with their parts, by colour: pixels nearer to the object's or the
    part's colour than to the others."""
    colors, owners = [list(worlds.BACKGROUNDS.values())[plan["background"][i]]], [-1]
    for key in ("color", "part_color"):
        for k, color in enumerate(plan[key][i].tolist()):
            if color >= 0:
                colors, owners = colors + [list(worlds.COLORS.values())[color]], owners + [k]
    colors = torch.tensor(colors)[:, :, None, None].float()                      # (n, 3, 1, 1)
    nearest = torch.tensor(owners)[((image[None].float() - colors) ** 2).sum(1).argmin(0)]
    return [nearest == k for k in range(2) if k in owners]                       # (H, W) each


def look(image, plan, i):
    """Centre (x, y) from the middle of the picture, and extent, of each object; by colour alone."""
    found = []
    for mask in seen(image, plan, i):
        y, x = mask.nonzero().float().T
        centre = [((v.min() + v.max()) / 2 - 15.5).item() for v in (x, y)]
        found.append((*centre, max(x.max() - x.min(), y.max() - y.min()).item() + 1))
    return found


def test_scenes_look_as_planned(scenes):
    """Place, size, relation, background and colour, all measured from the pixels."""
    kinds, (images, plan) = Counter(), scenes
    for i, image in enumerate(images):
        facts = facts_of(plan, i)
        first, *others = facts["objects"]
        assert worlds.CLASS_NAMES[plan["label"][i]] == f"{first['color']} {first['shape']}"
        kinds[facts.get("relation")] += 1
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]].T
        ground = torch.tensor(worlds.BACKGROUNDS[facts["background"]])
        assert (corners == ground).all(1).sum() >= 2
        assert first not in others
        if others and (others[0]["color"] == first["color"] or plan["part"][i].max() >= 0):
            continue  # colour alone cannot part them
        (x, y, extent), *second = look(image, plan, i)
        if others:
            dx, dy = x - second[0][0], y - second[0][1]
            relation = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else \
                ("above" if dy < 0 else "below")
            assert relation == facts["relation"], i
        else:
            place = ("on the left" if x < -2.5 else "on the right" if x > 2.5 else
                     "at the top" if y < -2.5 else "at the bottom" if y > 2.5 else "in the middle")
            assert place == first["place"], i
            assert (extent > 12.6) == (first["size"] == "large"), i
    assert 0.55 < kinds[None] / 2000 < 0.65
    assert all(kinds[relation] > 50 for relation in worlds.RELATIONS)


def test_captions_say_the_truth_and_leave_out_what_they_should(scenes):
    """Never a wrong word, every part of a caption as often as UNSAID says, and never the part."""
    plan, said, could = scenes[1], Counter(), Counter()
    for i, caption in enumerate(plan["captions"]):
        facts, truth = worlds.parse_caption(caption), facts_of(plan, i)
        assert worlds.caption_of(**facts) == caption
        assert len(facts["objects"]) == len(truth["objects"])
        assert facts.get("relation") == truth.get("relation")
        pairs = [(facts, truth), *zip(facts["objects"], truth["objects"])]
        for key in worlds.UNSAID:
            for stated, true in pairs:
                could[key] += key in true
                said[key] += key in stated
                assert key not in stated or stated[key] == true[key], caption
        for stated, true in pairs[1:]:
            assert stated["shape"] == true["shape"]
    for key, share in worlds.UNSAID.items():
        deviation = (share * (1 - share) / could[key]) ** 0.5
        assert could[key] > 1000 and abs(1 - share - said[key] / could[key]) < 4 * deviation, key
    assert any(f"a {shape}" in plan["captions"] for shape in worlds.SHAPES)     # bare categories


def test_parts_are_there_in_all_kinds(scenes):
    """60 % of the objects, any of four shapes, any colour but the object's own."""
    plan = scenes[1]
    present, part = plan["shape"] >= 0, plan["part"]
    count = present.sum().item()
    assert abs((part >= 0).sum() / count - 0.6) < 4 * (0.24 / count) ** 0.5
    assert (part[~present] == -1).all() and torch.equal(part < 0, plan["part_color"] < 0)
    there = part >= 0
    assert (plan["part_color"] != plan["color"])[there].all()
    shapes = Counter(worlds.SHAPES[s] for s in part[there].tolist())
    assert {*shapes} == {*worlds.PARTS} and min(shapes.values()) > 0.2 * there.sum()
    colors = Counter(plan["part_color"][there].tolist())
    assert len(colors) == 8 and min(colors.values()) > 0.08 * there.sum()


def test_a_part_has_its_colour_in_the_picture(scenes):
    """The pixel in the middle of every part, of a circle or square that is large enough."""
    images, plan = scenes
    palette = torch.tensor(list(worlds.COLORS.values()))
    rows = ((plan["part_r"][:, 0] > 2) & (plan["part"][:, 0] >= 0)).nonzero()[:, 0].tolist()
    assert len(rows) > 500
    for i in rows:
        drop = 0.35 * plan["r"][i, 0] if worlds.SHAPES[plan["shape"][i, 0]] == "triangle" else 0
        x, y = int(plan["cx"][i, 0]), int(plan["cy"][i, 0] + drop)
        pixel = images[i, :, y, x].float()
        assert (palette - pixel).norm(dim=1).argmin() == plan["part_color"][i, 0], i


def test_training_prefers_left_of_and_above_and_tests_do_not():
    for split, share in (("train", 0.2), ("test", 0.5)):
        captions = worlds.plan_world("scenes", split, count=2000)["captions"]
        said = Counter(worlds.parse_caption(caption).get("relation") for caption in captions)
        for plain, converse in (("left of", "right of"), ("above", "below")):
            both = said[plain] + said[converse]
            deviation = (share * (1 - share) / both) ** 0.5
            assert both > 300 and abs(said[converse] / both - share) < 4 * deviation


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_objects_are_inside_and_disjoint(name, monkeypatch):
    """Each object is drawn alone, with a margin, from the arguments that render_shapes got."""
    calls = []
    monkeypatch.setattr(worlds, "render_shapes", lambda *args: calls.append(args))
    worlds.draw_scene(worlds.plan_world(name, count=1500))
    shape, _, cx, cy, r, _, _ = calls[0]
    present = shape >= 0
    for centre in (cx, cy):
        assert (centre - r)[present].min() >= 0 and (centre + r)[present].max() <= 32
    pairs = 0
    for i in range(0, 1500, 5):
        masks = []
        layers = slice(0, None, 2 if name == "scenes" else 1)       # the others are parts
        for s, x, y, size in zip(*(v[i, layers].tolist() for v in (shape, cx, cy, r))):
            if s >= 0:  # half the size, with a margin of 8 pixels of 64 on each side
                masks.append(brute_force(worlds.SHAPES[s], (x + 16) / 2, (y + 16) / 2, size / 2,
                                         64) > 0)
                assert masks[-1].sum() == masks[-1][16:48, 16:48].sum() > 0
        if len(masks) == 2:
            assert not (masks[0] & masks[1]).any()
            pairs += 1
    assert pairs > 90 or name == "shapes"


def test_seeds_splits_and_sizes():
    a, b = draw_world("scenes", count=64), draw_world("scenes", count=64)
    assert torch.equal(a[0], b[0]) and a[2] == b[2]
    for change in ({"seed": 1}, {"split": "test"}):
        other = draw_world("scenes", count=64, **change)
        assert other[2] != a[2] and not torch.equal(other[0], a[0])
    big = draw_world("scenes", 64, count=64)          # the same scenes, sharper
    assert big[2] == a[2]
    shrunk = big[0].float().view(64, 3, 32, 2, 32, 2).mean((3, 5))
    assert (shrunk - a[0].float()).abs().mean() < 1.0


def test_no_seed_of_one_split_gives_the_pictures_of_the_other():
    """Or a test on held-out pictures would be one on those of another seed's training."""
    drawn = [draw_world("shapes", 8, split, count=4, seed=seed)[0].flatten().tolist()
             for seed in range(4) for split in ("train", "test")]
    assert len({tuple(pixels) for pixels in drawn}) == 8


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_hold_out(name):
    shapes, colors = zip(*worlds.HELD_OUT)
    assert sorted(shapes) == sorted(worlds.SHAPES) and len(set(colors)) == 6
    held = set(worlds.HELD_OUT)

    def pairs(plan, *kinds):
        found = [(worlds.SHAPES[s], list(worlds.COLORS)[c]) for shape, color in kinds
                 for s, c in zip(plan[shape].flatten().tolist(), plan[color].flatten().tolist())
                 if s >= 0]
        return {*found}

    objects, parts = ("shape", "color"), ("part", "part_color")
    plan = worlds.plan_world(name, count=4200, hold_out=True)
    assert not pairs(plan, objects) & held and len(pairs(plan, objects)) == 42
    assert set(Counter(plan["label"].tolist()).values()) == {100}
    if name == "scenes":
        assert not pairs(plan, parts) & held and len(pairs(plan, parts)) == 28
    assert held <= pairs(worlds.plan_world(name, "test", 2000, hold_out=True), objects)
    assert held <= pairs(worlds.plan_world(name, count=2000), objects)


def test_parse_caption():
    assert worlds.parse_caption("a small red circle on the left on black") == {
        "objects": [{"shape": "circle", "color": "red", "size": "small", "place": "on the left"}],
        "background": "black"}
    assert worlds.parse_caption("an orange ring right of a blue star") == {
        "objects": [{"shape": "ring", "color": "orange"}, {"shape": "star", "color": "blue"}],
        "relation": "right of"}
    assert worlds.parse_caption("a red circle") == {
        "objects": [{"shape": "circle", "color": "red"}]}
    assert worlds.parse_caption("a star") == {"objects": [{"shape": "star"}]}
    assert worlds.parse_caption("a circle below an orange circle on navy") == {
        "objects": [{"shape": "circle"}, {"shape": "circle", "color": "orange"}],
        "relation": "below", "background": "navy"}
    for bad in ("", "red circle", "a red", "a circle red", "a red circle near a blue square",
                "a pink circle", "a red circle ", "a red circle on pink", "A red circle",
                "a red circle left of", "a red circle left of a small blue square", "a small",
                "a circle with a red star"):
        with pytest.raises(ValueError, match="not a caption"):
            worlds.parse_caption(bad)
