"""A student as a model of transformers: AutoModel.from_pretrained(folder or hub id, trust_remote_code=True).

Importing this module makes trust_remote_code unnecessary. The folder is the one that `Student.save_pretrained` writes.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput

from kpu_fast.models.features import Features
from kpu_fast.models.hf_files import MODEL_TYPE, front_matter
from kpu_fast.models.student import Student


class KPUStudentConfig(PretrainedConfig):
    """student: keyword arguments of `Student`."""

    model_type = MODEL_TYPE

    def __init__(self, student: dict | None = None, **kwargs):
        self.student = student
        super().__init__(**kwargs)


@dataclass
class KPUStudentOutput(ModelOutput):
    """A student's features under the names that transformers has for them.

    last_hidden_state: (B, H·W, C), the cells of the map closest to stride 16, row by row. pooler_output: x (B, C), or
    None in the space of a teacher without one. feature_maps: (B, C, H, W) each, finest first, views of
    channels-last memory.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    feature_maps: tuple[Tensor, ...] | None = None


class KPUStudentModel(PreTrainedModel):
    """`Student`, held as `student`, with what transformers' users expect around it."""

    config_class = KPUStudentConfig
    base_model_prefix = "student"  # a student's weights have no prefix; transformers adds this one
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: KPUStudentConfig):
        super().__init__(config)
        self.student = Student(**config.student)
        self.post_init()

    def _init_weights(self, module) -> None:
        """Nothing: `Student` has done it."""

    def forward(self, pixel_values: Tensor, teacher: str | None = None) -> KPUStudentOutput:
        """pixel_values: (B, 3, H, W) in [0, 1], not normalised; H and W as `Student` takes them.

        teacher: None for the student's own features, or the name of the teacher in whose space and on whose grids.
        """
        features, spec = self.student(pixel_values), self.student.spec
        if teacher is not None:
            features, spec = self.student.project(features, teacher), self.student.head_specs[teacher]
        return _output(features, spec.strides)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, *, max_shard_size=None) -> None:
        """Write what `Student.save_pretrained` writes: weights in one file, whatever max_shard_size says."""
        if is_main_process:
            self.student.save_pretrained(save_directory, card=front_matter())

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but raises ValueError for weights that are missing or too many, instead of a warning."""
        model, info = super().from_pretrained(*args, **{**kwargs, "output_loading_info": True})
        faults = [f"{key} is missing" for key in info["missing_keys"]]
        faults += [f"{key} is not expected" for key in info["unexpected_keys"]]
        if faults:
            raise ValueError(
                f"{args[0]}: model.safetensors does not fit config.json in {len(faults)} tensors "
                f"({'; '.join(sorted(faults)[:3])}); the two files must come from one export."
            )
        model.student.freeze()  # transformers marks every weight as trained
        return (model, info) if kwargs.get("output_loading_info") else model


def _output(features: Features, strides: tuple[float, ...]) -> KPUStudentOutput:
    nearest = min(range(len(strides)), key=lambda i: abs(strides[i] - 16))
    return KPUStudentOutput(
        last_hidden_state=features.maps[nearest].flatten(1, 2),
        pooler_output=features.x,
        feature_maps=tuple(m.permute(0, 3, 1, 2) for m in features.maps),
    )


AutoConfig.register(MODEL_TYPE, KPUStudentConfig)
AutoModel.register(KPUStudentConfig, KPUStudentModel)
