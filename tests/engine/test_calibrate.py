"""The statistics for `objective.standardize` are of every batch that is read for them, whoever reads it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kpu_fast.engine import loop
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.objectives.standardize import FeatureStandardizer

SPECS = {"clip": FeatureSpec(6, (5,), (16.0,)), "gdino": FeatureSpec(None, (4, 7), (16.0, 32.0))}


def teacher(spec):
    """One whose features are of the images."""

    def see(images):
        x = None if spec.x_dim is None else images.mean((2, 3)).repeat(1, spec.x_dim)[:, : spec.x_dim]
        maps = (F.avg_pool2d(images, int(stride)).permute(0, 2, 3, 1) for stride in spec.strides)
        return Features(x, tuple(v.repeat(1, 1, 1, c)[..., :c] for v, c in zip(maps, spec.map_dims, strict=True)))

    return see


def batch(seed):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    valid = torch.ones(2, 64, 96, dtype=torch.bool)
    valid[1, 40:] = False
    return SimpleNamespace(images=images, valid=valid)


@pytest.mark.parametrize("streams", [{"clip": ["clip"], "gdino": ["gdino"]}, {"gdino": ["gdino", "clip"]}], ids=str)
def test_all_batches_of_a_stream_count_for_each_of_its_teachers(streams, monkeypatch):
    seen = {name: [batch(3 * i + j) for j in range(3)] for i, name in enumerate(streams)}
    opened = []

    def open_streams(*_, seed):
        opened.append(seed)
        return {name: iter(some) for name, some in seen.items()}

    monkeypatch.setattr(loop, "open_streams", open_streams)
    monkeypatch.setattr(loop, "together", lambda _: nullcontext())
    found, expected = (
        torch.nn.ModuleDict({name: FeatureStandardizer(name, spec, "meanstd") for name, spec in SPECS.items()})
        for _ in range(2)
    )
    teachers = {name: teacher(spec) for name, spec in SPECS.items()}
    engine = SimpleNamespace(module=SimpleNamespace(standardize=found))
    parts = SimpleNamespace(indexes={}, streams=streams, teachers=teachers, engine=engine)
    cfg = SimpleNamespace(objective=SimpleNamespace(standardize_batches=3), seed=2, teachers=SPECS)
    loop._calibrate(cfg, SimpleNamespace(rank=0), parts)
    assert opened == [2 * 2 + loop.CALIBRATION_SEED]
    for stream, names in streams.items():
        for name in names:
            expected[name].fit(expected[name].look((teachers[name](b.images), b.valid) for b in seen[stream]))
            for key, value in found[name].state_dict().items():
                torch.testing.assert_close(value, expected[name].state_dict()[key])
