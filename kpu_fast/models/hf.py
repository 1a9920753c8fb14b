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
from kpu_fast.models.hf_files import MODEL_TYPE, front_matter, usual_size
from kpu_fast.models.student import Student
from kpu_fast.models.vit import ViT

_PREFIX = "student."  # of the weights in the model, not in a student's file
# Keywords of transformers' save_pretrained: those that make no difference to one file, and the one value of others.
_IDLE = ("max_shard_size", "save_function", "save_original_format", "save_peft_format", "token")
_ONLY = {"push_to_hub": False, "safe_serialization": True, "variant": None, "distributed_checkpoint": False}


class KPUStudentConfig(PretrainedConfig):
    """student: keyword arguments of `Student`.

    What transformers' users read of a vision model follows from `student`, so config.json does not hold it again.
    image_size and patch_size are those of the images given to the model, not of the ViT inside: a square image of
    image_size, the processor's, gives a last_hidden_state of (image_size / patch_size)² cells, hidden_size wide.
    """

    model_type = MODEL_TYPE

    def __init__(self, student: dict | None = None, **kwargs):
        self.student = student
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        return self._vit["dim"]

    @property
    def image_size(self) -> int:
        return usual_size(self._vit)

    @property
    def patch_size(self) -> int:
        return 16  # the student resizes its images so that a patch of any size lies on 16 × 16 of their pixels

    @property
    def num_channels(self) -> int:
        return 3

    @property
    def _vit(self) -> dict:
        if self.student is None:  # transformers makes such a config to look for defaults
            raise AttributeError("KPUStudentConfig: has no student; give student, the keyword arguments of `Student`.")
        return {**ViT.__init__.__kwdefaults__, **self.student["vit"]}


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
        """A subclass's own layers as transformers does; nothing in the student, which `Student` has initialised."""
        if all(module is not part for part in self.student.modules()):
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        teacher: str | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> KPUStudentOutput | tuple:
        """pixel_values: (B, 3, H, W) in [0, 1], not normalised; H and W as `Student` takes them.

        teacher: None for the student's own features, or the name of the teacher in whose space and on whose grids.
        return_dict: False for a tuple of what is not None. None, here and in the other two: as the config says.
        Raises ValueError where output_attentions or output_hidden_states is True: a student gives neither.
        """
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        for key, value in asked.items():
            if getattr(self.config, key) if value is None else value:
                raise ValueError(f"{key}=True: a student has none to give; leave it out (its maps are feature_maps).")
        features, spec = self.student(pixel_values), self.student.spec
        if teacher is not None:
            features, spec = self.student.project(features, teacher), self.student.head_specs[teacher]
        out = _output(features, spec.strides)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: dict | None = None, **kwargs
    ) -> None:
        """Write what `Student.save_pretrained` writes: weights in one safetensors file, whatever max_shard_size says.

        state_dict: weights to write instead of the model's own, under the model's names. Raises ValueError where they
        do not fit, and for keywords that ask for another form. A subclass is saved as transformers saves any model.
        """
        if type(self) is not KPUStudentModel:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        for key, value in kwargs.items():
            if key not in _IDLE and (key not in _ONLY or value != _ONLY[key]):
                raise ValueError(
                    f"save_pretrained: {key}={value!r} is not possible, a student is one safetensors file in a folder; "
                    "leave it out (model.push_to_hub(name) uploads)."
                )
        if is_main_process:
            if state_dict is not None:
                state_dict = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
            self.student.save_pretrained(save_directory, card=front_matter(), state=state_dict)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As any module's, but takes the names in a student's file too: transformers' Trainer goes on from it so."""
        if type(self) is KPUStudentModel and not any(name.startswith(_PREFIX) for name in state_dict):
            state_dict = {_PREFIX + name: tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args, **kwargs):
        """As in transformers, but raises ValueError for weights that are missing, too many, or of another shape though
        ignore_mismatched_sizes lets them be, instead of a warning.

        In a subclass that holds for the student's weights only: its own layers may be new.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, **{**kwargs, "output_loading_info": True}
        )
        faults = [(key, "is missing") for key in info["missing_keys"]]
        faults += [(key, "is not expected") for key in info["unexpected_keys"]]
        # ignore_mismatched_sizes lets these through, and would leave them as memory was.
        faults += [(key, f"is {tuple(has)}, expected {tuple(wants)}") for key, has, wants in info["mismatched_keys"]]
        faults = sorted(f"{key} {what}" for key, what in faults if cls is KPUStudentModel or key.startswith(_PREFIX))
        if faults:
            raise ValueError(
                f"{pretrained_model_name_or_path}: model.safetensors does not fit config.json in {len(faults)} tensors "
                f"({'; '.join(faults[:3])}); the two files must come from one export."
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
