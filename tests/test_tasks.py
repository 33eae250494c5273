"""tasks.py: what a task makes of a data set, and the files of a run."""
import pytest
import torch
from matplotlib.axes import Axes

import data
from tasks import DiffusionTask, plot_loss
from vae import TinyAutoencoder


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


def test_the_plotted_mean_moves_a_tenth_of_the_way_and_forgets_what_is_not_finite(
        tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, label, **how: drawn.update({label: y}))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    (tmp_path / "log.csv").write_text("step,loss\n1,8\n2,18\n3,0\n4,inf\n5,4\n6,nan\n7,2\n8,12\n")
    plot_loss(tmp_path / "log.csv", tmp_path / "loss.png")
    means = drawn["running mean"]
    assert means[:3] == pytest.approx([8, 9, 8.1]) and drawn["loss of a batch"][:3] == (8, 18, 0)
    assert means[4] == 4 and means[6:] == pytest.approx([2, 3])     # begins anew at 4 and at 2
