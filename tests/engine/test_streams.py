"""Which images the teachers' streams read."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kpu_fast.config import load_config
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.scan import load_or_scan
from kpu_fast.engine.build import RunError, build_models, open_streams
from kpu_fast.engine.distributed import World
from kpu_fast.engine.loop import CALIBRATION_SEED, _next_batch


def test_no_two_streams_of_one_source_read_the_same(tiny, monkeypatch, tmp_path):
    """Two teachers, and the batches that statistics are made of: the same images in another order, cut otherwise."""
    monkeypatch.setenv("KPU_FAST_CACHE", str(tmp_path))
    alike = [f"teachers.{name}.data.{key}" for name in ("clip", "gdino") for key in ("batch_size=4", "size=[64,64]")]
    cfg = load_config(tiny, [*alike, "teachers.gdino.data.fit=crop"])
    index = load_or_scan(cfg.source)
    world = World(0, 1, torch.device("cpu"), 0, None)
    place = {name: index for name in cfg.teachers}
    first, again, statistics = (
        [next(stream).images for stream in open_streams(cfg, place, world, {}, seed).values()]
        for seed in (None, None, cfg.seed * len(cfg.teachers) + CALIBRATION_SEED)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    seen = [*first, *statistics]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(("ranks", "turns"), [(1, 4), (2, 2), (4, 1)])
def test_all_batches_of_a_step_have_one_area(tiny, photos, monkeypatch, tmp_path, ranks, turns):
    monkeypatch.setenv("KPU_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shapes").mkdir()
    for number, path in enumerate(sorted(photos.iterdir())):
        size = ((90, 60), (60, 90), (60, 60))[number % 3]
        Image.open(path).resize(size).save(tmp_path / "shapes" / path.name)
    shapes = tmp_path / "shapes"
    cfg = load_config(
        tiny, [f"source={shapes}", f"gradient_accumulation_steps={turns}", "teachers.gdino.data.buckets=[[64,64]]"]
    )
    place = {name: load_or_scan(str(shapes)) for name in cfg.teachers}
    worlds = [World(rank, ranks, torch.device("cpu"), 0, None) for rank in range(ranks)]
    streams = [open_streams(cfg, place, world, {})["gdino"] for world in worlds]
    steps = [[next(s).images.shape[2:].numel() for _ in range(turns) for s in streams] for _ in range(6)]
    assert all(len(set(areas)) == 1 for areas in steps)
    assert [areas[0] for areas in steps].count(64 * 64) == 2
    looking = open_streams(cfg, place, worlds[0], {}, seed=1)["gdino"]
    assert looking._reader._sampler._step_batches == ranks


def test_memory_is_not_taken_for_damaged_images(tiny, monkeypatch, tmp_path):
    """Neither by the stream, which blames the images for what DALI says, nor by the loop."""
    monkeypatch.setenv("KPU_FAST_CACHE", str(tmp_path))
    data = load_config(tiny).teachers["clip"].data
    stream = Stream(data, load_or_scan(data.source), rank=0, world_size=1, device=torch.device("cpu"), seed=0)
    for said, expected in (
        (RuntimeError("CUDA allocation failed"), RuntimeError),
        (RuntimeError("bad file"), RunError),
    ):

        def run(said=said):
            raise said

        stream._pipe = SimpleNamespace(run=run)
        with pytest.raises(expected, match=str(said)) as told:
            _next_batch("clip", stream)
        assert (told.value is said) == (expected is RuntimeError)


def test_a_teachers_weight_reaches_its_terms(tiny):
    cfg = load_config(tiny, ["teachers.gdino.weight=4", "objective.rec_weight=0.5"])
    _, module = build_models(cfg, torch.device("cpu"))
    assert module.weights == {
        "clip/s2t": 0.5, "clip/t2s": 0.5, "clip/rec": 0.25, "gdino/s2t": 2.0, "gdino/t2s": 2.0, "gdino/rec": 1.0,
    }  # fmt: skip
