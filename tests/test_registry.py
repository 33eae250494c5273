"""What holds for every model that a table of models.py names, in every variant.

A row that is added is tested here without another word. Options that stand in no table are found
too: the legal values of an argument are those strings of its file that it accepts.
test_registry_runs.py does the same for flags, steps and runs, test_registry_tables.py for
processes, first stages, data, adapters and parts.
"""
import ast
import functools
import inspect
import itertools
import math
import re
import sys
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_recipe
from torch.testing import assert_close

import data
import models
import vae
from models import FAMILIES, FLAGS, PRESETS, find_model, make_task, settings_class
from optim import make_optimizers
from text import WordTokenizer
from train import Config


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


PICTURES = torch.randint(256, (8, 3, 16, 16), generator=seeded(1), dtype=torch.uint8)
CAPTIONS = [f"a {color} {shape} here" for color in ("red", "blue") for shape in "wxyz"]
DATA = {about: data.Dataset("toy", PICTURES, torch.arange(8) % 3 * (about != "nothing"),
                            CAPTIONS if about == "captions" else None,
                            [] if about == "nothing" else ["p", "q", "r"], False)
        for about in ("captions", "classes", "nothing")}
DENOISERS = [family for family, row in FAMILIES.items() if row.first_stage]


# --------------------------------------------------------------------------------------------------
# finding the rows

@functools.cache
def words_of(module):
    """Every string in a file that could be a name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return sorted(word for word in found if isinstance(word, str)
                  and re.fullmatch(r"[\w+-]{1,24}", word))


def alternatives(cls, make, numbers=False):
    """[(argument, value)]: each bool flipped, each string that make(argument=value) accepts instead
    of the default; numbers: also 3.0 for each float, and for what is None by default.
    """
    def accepts(name, value):
        try:
            return make(**{name: value}) is not None
        except ValueError:
            return False
    found = []
    for name, p in inspect.signature(cls).parameters.items():
        if isinstance(p.default, bool):
            found.append((name, not p.default))
        elif isinstance(p.default, str):
            assert not accepts(name, "no such name"), f"{cls.__name__}({name}=) accepts anything"
            found += [(name, word) for word in words_of(cls.__module__)
                      if word != p.default and accepts(name, word)]
        elif numbers and (isinstance(p.default, float) or p.default is None):
            found.append((name, 3.0))
    return found


def changes(options, most):
    """All dicts of at most so many [(name, value)] with different names."""
    chosen = (c for n in range(most + 1) for c in itertools.combinations(options, n))
    return [dict(c) for c in chosen if len(dict(c)) == len(c)]


def label(*things):
    said = [", ".join(f"{k}={v}" for k, v in thing.items()) if isinstance(thing, dict) else thing
            for thing in things]
    return " ".join(filter(None, said))


@functools.cache
def smallest(family):
    """Name of the model with the fewest parameters; of DiTs a smaller one than any of the paper."""
    count = lambda name: sum(p.numel() for p in built_on_meta(name).model.parameters())
    return "DiT-32x2/2" if family == "dit" else min(FAMILIES[family].sizes, key=count)


def built_on_meta(name):
    """The task of any model at its own size, without memory."""
    family, sizes = find_model(name)
    row, preset = FAMILIES[family], PRESETS.get(name, {})
    info = {"channels": 3, "image_size": preset.get("image_size", 64), "class_names": ["p", "q"]}
    if row.captions == "needed":
        info["vocabulary"] = WordTokenizer.from_captions(CAPTIONS).state()
    settings = settings_class(family)(**{k: v for k, v in preset.items() if k in row.flags})
    with torch.device("meta"), patch.object(models, "MaskReplace", lambda **_: None):   # no numbers
        new = models.NEW_STAGES.get(row.first_stage)
        stage = new(settings, info) if row.axes == 1 else vae.Pixels()
        return row.build(sizes, settings, info, stage)


def task_of(family, flags=(), sizes=(), about="captions"):
    """A small task as a run makes it, on an untrained first stage; sizes: constructor arguments."""
    arguments = {**find_model(smallest(family))[1], **dict(sizes)}
    small = {"factor": 2 if FAMILIES[family].axes == 3 else 4, "codes": 8, "first_stage": "new"}
    flags = {**{k: v for k, v in small.items() if k in FAMILIES[family].flags}, **dict(flags)}
    with patch.dict(FAMILIES[family].sizes, {"small": arguments}):
        return make_task(Config(model="small", device="cpu"), settings_class(family)(**flags),
                         DATA[about])


@functools.cache
def denoiser_cases():
    """(family, flags, sizes, data) of small denoisers: up to two flags or one argument changed."""
    found = []
    for family in DENOISERS:
        row, base = FAMILIES[family], "captions" if FAMILIES[family].captions else "classes"
        model = task_of(family, about=base).model
        network = type(getattr(model, "denoiser", model))
        options = [(name, value) for name in row.flags for kind, field in [FLAGS[name]]
                   for value in field.metadata["choices"] or [not field.default] * (kind is bool)
                   if value != field.default
                   and name not in ("schedule", "prediction", "logit_normal")]
        for flags in changes(options, 2):
            if "learn_sigma" in flags and len(flags) > 1:       # it changes the last layer alone
                continue
            gaussian = {"schedule": "linear"} if "learn_sigma" in flags else {}
            found.append((family, {**flags, **gaussian}, {}, base))

        def make(**argument):
            with torch.device("meta"):
                return network(**{**find_model(smallest(family))[1], **argument})
        found += [(family, {}, {k: v}, base) for k, v in alternatives(network, make)
                  if k not in row.flags and k != "condition"]           # that follows from the data
        found += [(family, {}, {}, other) for other in ("classes", "nothing")
                  if other != base and row.captions != "needed"]
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", denoiser_cases(), ids=lambda case: label(*case))


@functools.lru_cache(60)
def _filled(key):
    family, flags, sizes, about = key
    task = task_of(family, flags, sizes, about)
    fill_by_recipe(task.model, ("pos_embed",)).double()         # zero gates would hide faults
    return task


def filled(case):
    """(task, its model in float64 with weights that are not 0)."""
    family, flags, sizes, about = case
    task = _filled((family, tuple(flags.items()), tuple(sizes.items()), about))
    task.model.zero_grad(set_to_none=True)
    return task, task.model


def inputs(task, count=3):
    """x, t, y of a forward; conditions differ from row to row where there are any."""
    if len(task.shape) == 3:
        x = noise(count, *task.shape).to(next(task.model.parameters()).dtype)
    else:
        x = torch.randint(task.process.num_codes + 1, (count, *task.shape), generator=seeded(0))
    y = task.tokenizer(CAPTIONS) if task.tokenizer else torch.arange(8) % 3 * has_classes(task)
    return x, torch.tensor([3, 40, 77] * count)[:count], y[:count]


def has_classes(task):
    return len(task.info["class_names"]) > 0


def per_row(a, b):
    """Largest difference of each row, as a share of the largest number: (B,)."""
    return (a - b).flatten(1).abs().amax(1) / a.abs().max()


def moved(task, x, place):
    """x with another number, in all channels, or another token at (row, column)."""
    if x.dim() == 4:
        x = x.clone()
        x[(..., *place)] += 1
        return x
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, side)).clone()
    x[(..., *place)] += 1
    return x.flatten(1) % task.process.num_codes


# --------------------------------------------------------------------------------------------------
# models

def test_model_reads_everything_in_every_sample(case):
    task, model = filled(case)
    x, t, y = inputs(task)
    with torch.no_grad():
        out = model(x, t, y)
        changed = {f"{place} of x": (moved(task, x, place), t, y)
                   for place in ((0, 0), (1, -2), (-1, 1))} | {"t": (x, t + 1, y)}
        for c in range(x.shape[1] if x.dim() == 4 else 0):
            one = (torch.arange(x.shape[1]) == c)[:, None, None]        # (C, 1, 1)
            changed[f"channel {c} of x"] = x + 0.1 * one, t, y
        if task.tokenizer or has_classes(task):
            null = model.null_condition(3)
            changed |= {"y": (x, t, y.roll(1, 0)), "the null condition": (x, t, null)}
        for what, arguments in changed.items():
            assert (per_row(out, model(*arguments)) > 1e-7).all(), f"{what} is not read"
        # a row does not depend on its batch; the sinusoids of t are float32, all else is float64
        alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)])
        assert per_row(out, alone).max() < 1e-9


def test_model_answers_where_it_is_asked(case):
    """A changed corner changes the answer in that quarter more than in others: no axes are swapped
    or turned on the way. Weights are near the initial ones, so that blocks add little; all but
    VQ-Diffusion's convolutions, which begin large and see the whole of so small a grid.
    """
    task = task_of(*case)
    for name, p in task.model.named_parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=seeded(p.numel()))
        elif ".mlp.conv2." in name:
            p.data.mul_(0.1)
    x, t, y = inputs(task, 8)
    for row, column in ((0, 1), (1, 0)):
        with torch.no_grad():
            change = task.model(moved(task, x, (-row, -column)), t, y) - task.model(x, t, y)
        change = change.square().mean(0)                                # (C, h, w) or (N, K)
        if x.dim() == 2:
            change = change.T.unflatten(1, (math.isqrt(x.shape[1]), -1))
        quarters = F.adaptive_avg_pool2d(change.sum(0, keepdim=True), 2)[0]     # (2, 2)
        assert quarters.argmax() == 2 * row + column, quarters


def test_gradients_reach_every_parameter(case):
    task, model = filled(case)
    out = model(*inputs(task))
    (out * noise(*out.shape, seed=2)).sum().backward()
    # a softmax does not change if all keys do: their bias has no gradient; no caption is empty here
    dead = [name for name, p in model.named_parameters() if p.requires_grad and (
        p.grad is None or not p.grad.any() and not re.search(r"\bk\w*\.bias|null$", name))]
    assert not dead and sum(p.requires_grad for p in model.parameters()) > 5


def test_a_forward_changes_nothing(case):
    task, model = filled(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng, arguments = torch.get_rng_state(), inputs(task)
    copies = [a.clone() for a in arguments]
    with torch.no_grad():
        outs = [model.train()(*arguments), model(*arguments), model.eval()(*arguments)]
    model.train()
    assert torch.equal(torch.get_rng_state(), rng) and all(map(torch.equal, copies, arguments))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_labels_are_hidden_as_often_as_asked(case):
    task, model = filled(case)
    y, null = inputs(task, 1)[2].repeat_interleave(100, 0), model.null_condition(100)
    hidden = model.drop_labels(y, (torch.arange(100) + 0.5) / 100)
    share = round(100 * model.class_dropout_prob)
    assert torch.equal(hidden[:share], null[:share]) and torch.equal(hidden[share:], y[share:])
    with patch.object(model, "class_dropout_prob", 0.0):        # never, though a draw may be 0.0:
        assert torch.equal(model.drop_labels(y, torch.zeros(100)), y)   # there is no null class
    conditional = bool(task.tokenizer) or has_classes(task)
    assert model.can_guide == (conditional and model.class_dropout_prob > 0)


def test_norms_normalise_and_attention_is_what_it_says(case):
    task, model = filled(case)

    def kind(m):
        norm = re.match("(Layer|RMS)Norm", type(m).__name__)
        return "norm" if norm and list(m.children()) == [] else re.search(
            "(Attention|)$", type(m).__name__)[0]
    found, calls = {name: m for name, m in model.named_modules() if kind(m)}, {}
    hooks = [m.register_forward_pre_hook(lambda m, args, name=name: calls.update({name: args}))
             for name, m in found.items()]
    with torch.no_grad():
        model(*inputs(task))
        for hook in hooks:
            hook.remove()
        for name, args in calls.items():
            (check_norm if kind(found[name]) == "norm" else check_attention)(found[name], *args)
    assert calls.keys() == found.keys()                                 # every one is used


def check_norm(module, x):
    """LayerNorm, RMSNorm: mean square 1 over the last axis of every token, then a weight for each
    channel, then a bias.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    x, kept = x + 0.5, {name: p.clone() for name, p in module.state_dict().items()}
    for p, value in ((weight, 1.0), (bias, 0.0)):
        p is None or p.fill_(value)
    out = module(x)
    eps = max(getattr(module, "eps", None) or 0, 1e-6) * (1 / x.var(-1).min() + 1)
    assert_close(out.square().mean(-1), torch.ones_like(out[..., 0]), atol=2 * eps.item(), rtol=0)
    if weight is not None:
        weight.copy_(torch.linspace(0.5, 2, len(weight)))
        assert_close(module(x), out * weight)
    module.load_state_dict(kept)


def check_attention(module, *args):
    """Twice the values is twice the answer; twice the queries is as twice the keys, or, where both
    are normalised, their length does not count, head by head.
    """
    layers = {}
    for name, layer in module.named_modules():
        last = name.rsplit(".", 1)[-1].removeprefix("to_")
        if isinstance(layer, torch.nn.Linear) and last[:1] in tuple("qkv"):
            letters = last if last in ("qkv", "kv") else last[0]
            pieces = [p.chunk(len(letters)) for p in layer.parameters()]
            layers |= {letter: [p[i] for p in pieces] for i, letter in enumerate(letters)}
    out = module(*args)

    def scaled(which, factor, rows=slice(None)):
        kept = [p.clone() for p in layers[which]]
        for p in layers[which]:
            p[rows] *= factor
        new = module(*args)
        for p, value in zip(layers[which], kept):
            p.copy_(value)
        return new
    constant = scaled("v", 0.0)                                         # the last layer's bias
    assert_close(scaled("v", 2.0) - constant, 2 * (out - constant), rtol=1e-6, atol=1e-7)
    size, head = (out - constant).abs().max(), slice(0, len(layers["q"][0]) // module.num_heads)
    normed = not isinstance(getattr(module, "q_norm", torch.nn.Identity()), torch.nn.Identity)
    if normed or getattr(module, "logit_scale", None) is not None:
        for which, rows in itertools.product("qk", (head, slice(None))):
            assert (scaled(which, 3.0, rows) - out).abs().max() < 1e-3 * size, which
    else:
        assert_close(scaled("q", 2.0), scaled("k", 2.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph(family):
    task = task_of(family)
    if family in DENOISERS:
        fill_by_recipe(task.model, ("pos_embed",))
        arguments, answer = inputs(task), lambda out: out
    else:
        arguments = data.to_float(PICTURES[:3]), task.draw(3, seeded(0), "cpu")
        answer = lambda out: out[0]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(task.model, fullgraph=True, backend="eager")(*arguments)
        assert_close(answer(compiled), answer(task.model(*arguments)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for row in FAMILIES.values() for name in row.sizes])
def test_every_size_builds_and_every_parameter_has_one_optimizer(name):
    model = built_on_meta(name).model
    trained = [p for p in model.parameters() if p.requires_grad]
    names = [n for n, p in model.named_parameters() if re.match(model.matrices, n) and p.dim() > 1]
    assert names and len(names) < len(trained)                          # Muon's share
    optimizers = make_optimizers(Config(device="cpu"), model)
    stepped = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(map(id, trained))
