"""The training loop: it learns, goes on exactly, and stops where it must."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kpu_fast.zoo import fit as module
from kpu_fast.zoo.fit import Fit, ZooError, fit
from kpu_fast.zoo.pixels import crop_and_flip, generator, rows_of_step

RECIPE = Fit(steps=60, batch=16, muon_lr=3e-2, lr=3e-2, warmup=5)


class Net(nn.Module):
    """A matrix for Muon (.layers. in its name), others for AdamW, and dropout, which draws from torch's generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
        self.out = nn.Linear(8, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.net["layers"][0](x.to(self.out.weight.dtype))))).float()


def regression(net, step):
    x = torch.randn(16, 8, generator=generator(7, step))
    return {"loss": (net(x)[:, 0] - torch.tanh(x.sum(1) / 2)).square().mean()}


def run(folder, loss=regression, recipe=RECIPE, **more):
    net = Net()
    common = dict(device=torch.device("cpu"), seed=3, name="toy", facts={"images": 5})
    return net, fit(net, loss, recipe, folder, **(common | more))


@pytest.mark.parametrize("bf16_copy", [True, False])
def test_training_lowers_the_loss_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, bf16_copy):
    recipe = dataclasses.replace(RECIPE, bf16_copy=bf16_copy)
    whole, told = run(tmp_path / "whole", recipe=recipe)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[2]["loss"] < 0.5 * rows[0]["loss"]
    assert told["steps"] == 60
    assert told["images"] == 60 * 16
    assert told["loss"] == rows[2]["loss"]
    assert all(p.dtype == torch.float32 for p in whole.parameters())

    class Killed(Exception):
        pass

    def until_50(net, step):
        if step == 50:
            raise Killed
        return regression(net, step)

    monkeypatch.setattr(module, "_SAVE_SECONDS", 0)  # a checkpoint at each record: at 40
    with pytest.raises(Killed):
        run(tmp_path / "broken", loss=until_50, recipe=recipe)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "loss": 9}\n{"step": 61, "lo')  # what a killed run may have left
    seen = []

    def watched(net, step):
        seen.append(step)
        return regression(net, step)

    again, told_again = run(tmp_path / "broken", loss=watched, recipe=recipe)
    assert seen == list(range(40, 60))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert told_again["loss"] == told["loss"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert losses == [row["loss"] for row in rows]


def test_what_a_checkpoint_must_agree_with(tmp_path):
    run(tmp_path)
    for change, said in (({"seed": 4}, "different seed"), ({"facts": {"images": 6}}, "different images")):
        with pytest.raises(ZooError, match=said):
            run(tmp_path, **change)
    for other in ({"net": {}, "optimizers": [], "state": {}}, [1]):
        torch.save(other, tmp_path / "checkpoint.pt")
        with pytest.raises(ZooError, match=r"checkpoint\.pt: not a checkpoint of this command; remove it to begin"):
            run(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ZooError, match=r"checkpoint\.pt: not a checkpoint"):
        run(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_os_error(tmp_path):
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint\.tmp cannot be written"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def breaks(net, step):
        loss = regression(net, step)["loss"]
        return {"loss": loss * (float("nan") if step == 30 else 1)}

    with pytest.raises(ZooError, match="toy: the loss is nan at step 40"):
        run(tmp_path, loss=breaks)


def test_minutes_become_steps(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def slow(net, step):
        clock[0] += 0.5
        return regression(net, step)

    _, told = run(tmp_path, loss=slow, minutes=1.0)
    assert told["steps"] == 120
    assert told["seconds"] == pytest.approx(60)
    rates = [json.loads(line)["rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1] < 0.02


def test_each_image_at_most_once_per_epoch_in_another_order_each_time():
    epochs = [torch.cat([rows_of_step(4 * e + s, 10, 43, seed=1) for s in range(4)]) for e in range(2)]
    assert all(len(set(epoch.tolist())) == 40 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())  # the three left out are others
    assert torch.equal(rows_of_step(5, 10, 43, seed=1), epochs[1][10:20])
    assert not torch.equal(rows_of_step(5, 10, 43, seed=2), epochs[1][10:20])
    assert len(rows_of_step(3, 10, 4, seed=1)) == 4  # fewer images than a batch


def test_crop_and_flip_takes_windows_of_the_mirrored_image():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), dtype=np.uint8))
    got = crop_and_flip(images, generator(1))
    found = set()
    for image, result in zip(images.numpy(), got.numpy(), strict=True):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="reflect")
        windows = {
            (r, c, flip): padded[r : r + 9, c : c + 9][:, :: -1 if flip else 1]
            for r in range(7)
            for c in range(7)
            for flip in (False, True)
        }
        matching = [key for key, window in windows.items() if np.array_equal(window, result)]
        assert matching
        found.add(matching[0])
    assert {flip for _, _, flip in found} == {False, True}
    assert {r for r, _, _ in found} == {c for _, c, _ in found} == set(range(7))
