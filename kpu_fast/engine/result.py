"""What a finished run leaves: the student, a picture of its features, the loss curves."""

import logging
import resource
from pathlib import Path

import torch

from kpu_fast.config import Config
from kpu_fast.data.pipeline import Stream
from kpu_fast.engine.curve import save_curve
from kpu_fast.engine.distributed import World
from kpu_fast.engine.monitor import read_metrics
from kpu_fast.engine.picture import Panel, save_feature_picture
from kpu_fast.models.features import Features
from kpu_fast.models.hf_files import front_matter
from kpu_fast.models.hub import HUB_ID
from kpu_fast.models.student import Student
from kpu_fast.objectives.objective import Objective

_LOG = logging.getLogger(__name__)

PICTURED = 3  # images per teacher in features.png


def write_result(cfg: Config, folder: Path, world: World, objective: Objective, teachers: dict, indexes: dict) -> None:
    """Write student/, features.png and losses.png into the run's folder, print where they are; all ranks call it."""
    from deepspeed import zero

    rows = read_metrics(folder) if world.rank == 0 else []
    # ZeRO 3 holds a share of each parameter on every rank; elsewhere this gathers nothing.
    with zero.GatheredParameters(list(objective.student.parameters())):
        if world.rank == 0:
            objective.in_own_spaces().save_pretrained(folder / "student", card=student_card(cfg, rows, cfg.steps))
    if world.rank != 0:
        return
    print(f"student  {folder / 'student'}")
    torch.cuda.empty_cache()  # decoding takes memory of its own
    try:
        # From the export, not from memory: what is pictured is what the user gets.
        exported = Student.from_pretrained(folder / "student").to(world.device).eval()
        with torch.compiler.set_stance("force_eager"):  # compiled teachers would be compiled anew for the few images
            panels = [_panel(cfg, name, net, exported, indexes, world.device) for name, net in teachers.items()]
    except (OSError, RuntimeError, MemoryError) as error:  # images that went away or were damaged; a full GPU
        _LOG.warning("features.png could not be made: %s", " ".join(str(error).split())[:300])
    else:
        save_feature_picture(folder / "features.png", panels, title=f"{cfg.name}: features after {cfg.steps} steps")
        print(f"picture  {folder / 'features.png'}")
    if rows:
        print(f"curve    {save_curve(folder, rows)}")
    print(f"peak     {peak_memory(world.device)}", flush=True)


def peak_memory(device: torch.device) -> str:
    """The most memory this process held so far, in words."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device) / 2**30
        return f"{allocated:.2f} GiB allocated on {torch.cuda.get_device_name(device)}"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident on the CPU"


@torch.no_grad()
def _panel(cfg: Config, name: str, teacher, student: Student, indexes: dict, device: torch.device) -> Panel:
    changes = {"batch_size": PICTURED, "crop_scale": (1.0, 1.0), "flip": False, "buckets": []}
    whole = cfg.teachers[name].data.model_copy(update=changes)
    index = indexes[cfg.teachers[name].images_of or name]
    batch = next(Stream(whole, index, rank=0, world_size=1, device=device, seed=cfg.seed))
    target: Features = teacher(batch.images)
    features = student(batch.images)
    projected = None
    if name in student.head_specs:
        projected = student.project(features, name, [(v.shape[1], v.shape[2]) for v in target.maps]).maps[0]
    level = student.level_for(teacher.spec.strides[0])
    return Panel(name, batch.images, batch.valid, target.maps[0], projected, features.maps[level])


def student_card(cfg: Config, rows: list[dict], steps: int) -> str:
    """The README.md of an exported student. rows: of the run's metrics.jsonl, up to the last of the `steps`."""
    first, last = (rows[0], rows[-1]) if rows else ({}, {})
    terms = [key for key in last if "/" in key and not key.endswith("/share") and key in first]
    losses = "\n".join(f"| {key} | {first[key]:.4f} | {last[key]:.4f} |" for key in terms)
    adapter = "none, the whole ViT is trained"
    if cfg.student.adapter:
        adapter = cfg.student.adapter.cross_attention + ", with x_injector" * cfg.student.adapter.x_injector
    teachers = "\n".join(f"- {name}: {t.kind}, weights `{t.weights}`" for name, t in cfg.teachers.items())
    recipe, paper = {"kpu": ("KPU", "2508.14707"), "gkd": ("GKD", "2603.02554")}[cfg.objective.recipe]
    project, teacher = "", next(iter(cfg.teachers))
    if cfg.objective.recipe == "kpu":
        project = f'\n    features = student.project(features, "{teacher}")  # in that teacher\'s space'
    sides = 32 if cfg.student.adapter else 16
    vit = cfg.student.vit.weights
    on_hub = HUB_ID.fullmatch(vit) and not Path(vit).is_dir()
    return f"""{front_matter(vit if on_hub else None, paper)}
# {cfg.name}

A vision student trained with kpu_fast by {recipe} (arXiv {paper}).

- ViT: weights `{vit}`, {"frozen" if cfg.student.freeze_vit else "trained"}; adapter: {adapter}
- {steps} steps, {cfg.precision}, seed {cfg.seed}
{teachers}

```python
import torch
from kpu_fast.models import Student

student = Student.from_pretrained("path/to/this/folder")
with torch.no_grad():
    features = student(images)  # (B, 3, H, W) in [0, 1], H and W multiples of {sides}{project}
```

or, beside kpu_fast, `transformers.AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)`.

| loss term | step {first.get("step", "–")} | step {last.get("step", "–")} |
|---|---|---|
{losses}
"""
