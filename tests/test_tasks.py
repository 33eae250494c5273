"""tasks.py: what a task makes of a data set, and the files of a run."""
import math

import pytest
import torch
from matplotlib.axes import Axes

import data
from diffusion import GaussianDiffusion, RectifiedFlow
from tasks import AutoencoderTask, DiffusionTask, plot_loss
from vae import Pixels, TinyAutoencoder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_mirrored_picture_keeps_its_label():
    """Latents cannot be mirrored, so prepare encodes every picture and its mirror image."""
    x = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    y = torch.tensor([0, 1, 2, 2, 3])
    stage, info = TinyAutoencoder(3, 4, factor=2, width=8), {"channels": 3, "image_size": 8}
    task = DiffusionTask(None, info, None, None, stage)
    made = task.prepare(data.Dataset("five", x, y, None, [*"abcd"], flip=True), "cpu")
    assert len(made) == 10 and not made.flip            # or a step would mirror the latents
    both = data.to_float(torch.cat([x, x.flip(-1)]))
    distance = torch.cdist(made.images.flatten(1), stage.encode(both).flatten(1))
    row = distance.argmin(1)                            # which picture each latent is of
    assert sorted(row.tolist()) == [*range(10)] and distance.amin(1).max() < 1e-3
    assert torch.equal(made.labels, y[row % 5])


def test_latents_as_large_as_the_pictures_are_latents():
    """A first stage of factor 1 with three channels: it encodes, and is saved with the model."""
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    stage, info = TinyAutoencoder(3, 3, factor=1, width=8), {"channels": 3, "image_size": 8}
    task = DiffusionTask(None, info, None, None, stage)
    made = task.prepare(data.Dataset("four", x, torch.zeros(4).long(), None, [], flip=False), "cpu")
    assert torch.equal(made.images, stage.encode(data.to_float(x))) and task.state()


@pytest.mark.parametrize("classes,each,count", [
    (0, 40, 40), (1, 40, 40), (2, 20, 40), (9, 4, 36), (41, 1, 41), (48, 1, 48), (100, 1, 48)])
def test_a_preview_shows_a_few_of_each_class_in_turn(classes, each, count):
    """A whole number of each, together at most 40; of more than 40 classes the first 48."""
    info = {"channels": 3, "image_size": 8, "class_names": [f"c{k}" for k in range(classes)]}
    y, names = DiffusionTask(None, info, None, None, Pixels()).examples()
    assert y.tolist() == (list(range(max(1, classes)))[:count] * each)
    assert names == ([f"c{k}" for k in y.tolist()] if classes else None)


def test_latents_that_nothing_decodes_are_shown_in_false_colours():
    """Three channels of four, three standard deviations to each end of the scale."""
    info = {"channels": 4, "image_size": 1}
    task = DiffusionTask(None, info, None, None, Pixels())
    x = torch.tensor([[3.0, -3.0, 0.0, 9.0], [1.5, -1.5, 6.0, 0.0]])[..., None, None]
    assert task.to_pictures(x).flatten(1).tolist() == [[255, 0, 128], [191, 64, 255]]


@pytest.mark.parametrize("channels,stage,clipped", [
    (3, Pixels(), True), (1, Pixels(), True), (4, Pixels(), False),
    (3, TinyAutoencoder(3, 3, factor=2, width=8), False)])
def test_estimates_stay_within_the_range_of_pixels_but_not_of_latents(channels, stage, clipped):
    """A latent is a number of any size, also if it has three channels as a picture has. The first
    estimate of DPM-Solver++ counts as well: its second step extrapolates from it."""
    info, model = {"channels": channels, "image_size": 4, "class_names": []}, lambda x, t, y: 9 * x
    model.can_guide, model.null_condition = False, lambda count, device: torch.zeros(count)
    for process, sampler in ((RectifiedFlow(), "heun"), (GaussianDiffusion(), "dpm++")):
        task, found = DiffusionTask(None, info, None, process, stage), []
        task.sample(model, torch.zeros(2), steps=3, sampler=sampler, generator=seeded(),
                    callback=found.append)
        assert [bool(x0.abs().max() <= 1) for x0 in found] == [clipped] * 3, sampler


def test_the_plotted_mean_is_not_late_and_leaves_out_what_is_not_finite(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *how, label, **more: drawn.update(
        {label: (x.tolist(), torch.stack([*y]))}))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    losses = [100.0 - s for s in range(40)]                     # a straight line is its own mean
    rows = lambda column: "".join(f"{s},{x}{column(s)}\n" for s, x in enumerate(losses))
    (tmp_path / "log.csv").write_text("step,loss\n" + rows(lambda s: ""))
    plot_loss(tmp_path / "log.csv", tmp_path / "loss.png")
    assert drawn["running mean"][1][:35].tolist() == pytest.approx(losses[:35])
    assert len(drawn) == 2
    losses[10], losses[20] = math.inf, math.nan
    (tmp_path / "log.csv").write_text("step,loss,held_out\n" + rows(
        lambda s: ",50.5" if s % 13 == 12 else ",nan"))
    plot_loss(tmp_path / "log.csv", tmp_path / "loss.png")
    means = drawn["running mean"][1]
    assert means.isfinite().all() and means[[10, 20]].tolist() == pytest.approx([90, 80])
    steps, held_out = drawn["held-out data, averaged weights"]
    assert steps == [12, 25, 38] and held_out.tolist() == [50.5] * 3


def test_scales_are_those_of_the_whole_data_set(monkeypatch):
    """A folder of classes begins with one class alone."""
    images = torch.cat([torch.full((n, 3, 4, 4), value, dtype=torch.uint8)
                        for n, value in ((3000, 0), (3000, 255))])
    dataset = data.Dataset("sorted", images, torch.zeros(6000).long(), None, [], False)
    info = {"channels": 3, "image_size": 4, "class_names": []}
    means = []
    for task, go in ((AutoencoderTask(None, info, TinyAutoencoder(3, 4)), "finish"),
                     (DiffusionTask(None, info, None, None, TinyAutoencoder(3, 4)), "prepare")):
        stage = task.model if go == "finish" else task.first_stage
        monkeypatch.setattr(stage, "standardise", lambda x: means.append(x.mean().item()))
        task.finish(stage, dataset, "cpu") if go == "finish" else task.prepare(dataset, "cpu")
    assert max(map(abs, means)) < 0.01 and len(means) == 2
