"""A teacher that no kind of the configs covers: here any of timm's networks, beside the teachers of a config.

    python examples/own_teacher.py [TIMM_MODEL] [CONFIG] [STEPS] [FOLDER]        # pip install timm

A teacher is a function from images to `Features` with a `spec` that says what they look like. The rest is `loop.py`.
"""

import sys
from pathlib import Path

import torch
from loop import train
from torch import Tensor, nn

from kpu_fast.config import load_config
from kpu_fast.models import Features, FeatureSpec, Student
from kpu_fast.models.teachers import build_teacher
from kpu_fast.objectives.recipe import build_objective


class TimmTeacher(nn.Module):
    """`timm.create_model(name, features_only=True)` as a teacher: a map for each of its levels, and no x."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        channels, strides = net.feature_info.channels(), net.feature_info.reduction()
        self.spec = FeatureSpec(x_dim=None, map_dims=tuple(channels), strides=tuple(strides))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W) in [0, 1] → maps (B, H/stride, W/stride, C), finest first."""
        maps = self.net((images - self.mean) / self.std)
        return Features(None, tuple(m if self.channels_last else m.permute(0, 2, 3, 1) for m in maps))


def main(
    model: str = "resnet50",
    config: str = "configs/zoo.json",
    steps: str = "10",
    folder: str = "runs/own_teacher/student",
) -> None:
    """Train the student of a config from its teachers and, on the first one's images, from one of timm."""
    import timm

    net = timm.create_model(model, pretrained=True, features_only=True, out_indices=(-2, -1))
    usual = timm.data.resolve_model_data_config(net)
    distil(TimmTeacher(net, usual["mean"], usual["std"]), config, steps, folder)


def distil(teacher: nn.Module, config: str, steps: str, folder: str) -> None:
    """`main` with any teacher."""
    cfg = load_config(config, [f"steps={steps}", "optimizer.warmup_steps=1", "precision=fp32"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = {"device": device, "dtype": torch.float32}
    teachers = {name: build_teacher(name, t, image_size=t.data.size, **place) for name, t in cfg.teachers.items()}
    teachers["own"] = teacher.to(device)
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    objective = build_objective(cfg.objective, specs, lambda heads: Student.from_config(cfg.student, heads)).to(device)
    shared = cfg.streams()  # {"clip": ["clip"], "gdino": ["gdino"]}
    first = next(iter(shared))
    train(cfg, device, teachers, objective, shared | {first: [*shared[first], "own"]})
    objective.in_own_spaces().save_pretrained(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
