"""The student: a ViT, the adapter around it, and the heads h_s2t that carry its features to each teacher's space."""

import inspect
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kpu_fast.models.adapter import STRIDES, Adapter
from kpu_fast.models.attention import BackendError, activate_backend
from kpu_fast.models.features import Features, FeatureSpec, cells
from kpu_fast.models.hf_files import auto_keys, code_files
from kpu_fast.models.hub import HUB_ID, WeightsError, find_folder, read_json
from kpu_fast.models.projector import FeatureHeads
from kpu_fast.models.vit import ViT, check_images, resize_to_stride_16
from kpu_fast.models.vit_weights import KEY

_LOG = logging.getLogger(__name__)

_FORMAT = "kpu_fast.student"
_VERSIONS = 1, 2  # 2 where the ViT's config says more than a DINOv2's
_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"


class Student(nn.Module):
    """ViT (+ adapter) (+ a head per teacher).

    vit: keyword arguments of `ViT`. adapter: those of `Adapter` beyond dim and depth (heads: as many as the ViT's
    unless given), or None for the bare ViT. heads: teacher name → FeatureSpec, or its fields as a dict. head_hidden:
    hidden width of the heads. freeze_vit: the ViT gets no gradient of its own; gradient still passes through it to the
    injectors. attention: see `models.attention`. activation_checkpointing: recompute activations in backward.

    forward(images (B, 3, H, W) in [0, 1]) → Features: x (B, D) is the ViT's normed cls; maps are channels-last, at
    strides 4, 8, 16, 32 with an adapter (H, W multiples of 32), else the ViT's normed patches at stride 16 (H, W
    multiples of 16). spec describes them. masked: (B, H/16·W/16) bool, patches that a bare ViT is not to see. Raises
    ValueError for sizes that do not fit, images that are not floating point, masks with an adapter, and teacher names
    PyTorch keeps.
    """

    def __init__(
        self,
        *,
        vit: Mapping,
        adapter: Mapping | None,
        heads: Mapping[str, FeatureSpec | Mapping] | None = None,
        head_hidden: int = 1280,
        freeze_vit: bool = True,
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        runtime = {"attention": attention, "activation_checkpointing": activation_checkpointing}
        self.vit = ViT(**vit, **runtime)
        self.dim = self.vit.dim
        self._set_levels((STRIDES.index(16),) if adapter is None else tuple(range(len(STRIDES))))
        self.adapter = None
        if adapter is not None:
            adapter = {"heads": self.vit.heads, **adapter}
            try:
                self.adapter = Adapter(self.dim, self.vit.depth, **adapter, **runtime)
            except (TypeError, ArithmeticError) as error:  # a setting unknown, mistyped or infinite
                raise ValueError(f"adapter: {error}.") from error
            if self.vit.rope_theta is not None and not self.adapter.deformable:
                # Dense attention finds a place by what is in the tokens, and here no token carries one.
                raise ValueError(
                    'adapter: cross_attention "flash" needs a ViT with learned positions, such as DINOv2; with a '
                    'DINOv3 set it to "deformable".'
                )
        self.head_specs = {name: _as_spec(name, spec) for name, spec in (heads or {}).items()}
        self.heads = nn.ModuleDict()
        for name, spec in self.head_specs.items():
            if "." in name or hasattr(self.heads, name):
                raise ValueError(f"Student: {name!r} cannot be a teacher's name, PyTorch keeps it; choose another.")
            picked = FeatureSpec(self.dim, (self.dim,) * len(spec.map_dims), spec.strides)
            self.heads[name] = FeatureHeads(picked, spec, head_hidden)
        self.config = {
            "vit": self.vit.config,
            "adapter": adapter,
            "heads": {name: spec._asdict() for name, spec in self.head_specs.items()},
            "head_hidden": head_hidden,
            "freeze_vit": freeze_vit,
        }
        self.freeze()

    def freeze(self) -> None:
        """Mark what is trained and what is not, as `freeze_vit` says; a new student has this done."""
        self.vit.requires_grad_(not self.config["freeze_vit"])
        self.vit.embed.mask_token.requires_grad_(False)  # most recipes mask nothing

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Features:
        check_images(images)
        if self.adapter is not None:
            if masked is not None:
                raise ValueError("Student: only a bare ViT (adapter None) can have patches masked.")
            return self.adapter(images, self.vit, self.levels)
        x, patches = self.vit(resize_to_stride_16(images, self.vit.patch_size), masked)
        return Features(x, (patches,))

    def level_for(self, stride: float) -> int:
        """Index of the student map closest in size to a map of `stride` (log distance; on a tie, the finer one)."""
        distances = [abs(math.log(own / stride)) for own in self.strides]
        return distances.index(min(distances))

    def levels_read(self) -> list[int]:
        """Indices of the student's maps that a head reads, finest first."""
        return sorted({self.level_for(stride) for spec in self.head_specs.values() for stride in spec.strides})

    def project(self, features: Features, teacher: str, sizes: Sequence[tuple[int, int]] | None = None) -> Features:
        """h_s2t: this student's features in the space and on the grids of `teacher`, as a stand-in for its encoder.

        sizes: (H, W) of each teacher map; None: the input's size over the teacher's strides, rounded, as teachers do.
        Raises KeyError for a teacher this student has no head for.
        """
        if teacher not in self.head_specs:
            raise KeyError(f"Student: no head for teacher {teacher!r}; it has heads for {sorted(self.head_specs)}.")
        spec = self.head_specs[teacher]
        if sizes is None:
            height, width = (n * self.strides[0] for n in features.maps[0].shape[1:3])
            sizes = [(cells(height, stride), cells(width, stride)) for stride in spec.strides]
        picked = tuple(features.maps[self.level_for(stride)] for stride in spec.strides)
        return self.heads[teacher](Features(features.x, picked), sizes)

    def drop_unused_levels(self) -> None:
        """For training: neither compute nor train what no head reads. `strides` and `spec` then list what is left.

        An export has every map again; those that were dropped come with the weights they started from.
        """
        specs = self.head_specs.values()
        if self.adapter is None:
            return
        if not any(spec.x_dim for spec in specs):
            self.vit.norm.requires_grad_(False)  # it makes x only
            self.adapter.skip_x_injector()
        used = tuple(self.levels[i] for i in self.levels_read())
        for level in set(self.levels) - set(used):
            for parameter in self.adapter.level_parameters(level):
                parameter.requires_grad_(False)
        self._set_levels(used)

    def _set_levels(self, levels: tuple[int, ...]) -> None:
        self.levels = levels
        self.strides = tuple(STRIDES[level] for level in levels)
        self.spec = FeatureSpec(self.dim, (self.dim,) * len(levels), tuple(map(float, self.strides)))

    @classmethod
    def from_config(
        cls, cfg, specs: Mapping[str, FeatureSpec] | None = None, *, activation_checkpointing: bool = False
    ) -> "Student":
        """A student to train, from the `student` block of a config; its ViT's weights are loaded or random.

        cfg: has vit.weights ("random", a hub id, a folder of such a model, or that of an exported student without an
        adapter), vit.arch (keyword arguments of `ViT`, used when random), freeze_vit, adapter (None, or what makes a
        dict of `Adapter`'s settings), attention, head_hidden.
        specs: teacher name → FeatureSpec; one head each. Raises as `ViT.from_hf` does.
        """
        try:
            activate_backend(cfg.attention)  # before a long download
        except BackendError as error:
            raise BackendError(f"student.attention: {error}") from error
        weights = cfg.vit.weights
        loaded = None if weights == "random" else _load_vit(weights)
        try:
            student = cls(
                vit=cfg.vit.arch if loaded is None else loaded.config,
                adapter=_adapter_settings(cfg.adapter),
                heads=specs,
                head_hidden=cfg.head_hidden,
                freeze_vit=cfg.freeze_vit,
                attention=cfg.attention,
                activation_checkpointing=activation_checkpointing,
            )
        except (TypeError, ArithmeticError) as error:  # a keyword argument missing, unknown, mistyped or infinite
            expected = ", ".join(name for name in inspect.signature(ViT).parameters)
            raise ValueError(f"student.vit.arch: {error}; ViT takes {expected}.") from error
        except ValueError as error:  # sizes that do not divide
            raise ValueError(f"student: {error}") from error
        if loaded is None:
            frozen = ", and they are frozen" if cfg.freeze_vit else ""
            _LOG.warning('student.vit.weights is "random": the ViT starts from random weights%s.', frozen)
        else:
            student.vit.load_state_dict(loaded.state_dict())
        return student

    def save_pretrained(self, folder: str | Path, card: str = "", state: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json, model.safetensors (each tensor in its dtype) and README.md (`card`) into `folder`.

        state: weights to write instead of the student's own. Raises ValueError where their names or shapes differ.
        Two small files beside them let transformers' AutoModel and AutoImageProcessor read the folder, see `models.hf`.
        Every file is written beside its place, synced and then moved there, so a file is never half there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        own = self.state_dict()
        problems = [] if state is None else _mismatches(own, state)
        if problems:
            raise ValueError(
                f"{folder}: the given state does not fit this student in {len(problems)} tensors "
                f"({'; '.join(problems[:3])}); nothing was written."
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().contiguous() for name, tensor in (own if state is None else state).items()}
        version = 2 if "eps" in self.vit.config else 1
        config = {"format": _FORMAT, "version": version, "student": self.config}
        config.update(auto_keys(tensor.dtype for tensor in state.values()))
        code = code_files(self.vit.config)
        temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (_WEIGHTS, _CARD, *code, _CONFIG)}
        try:
            save_file(state, temporary[_WEIGHTS], metadata={"format": "pt"})
            for name, text in {_CARD: card, **code, _CONFIG: json.dumps(config, indent=2) + "\n"}.items():
                temporary[name].write_text(text, encoding="utf-8")
            # safetensors makes a file that its owner alone may read.
            temporary[_WEIGHTS].chmod(temporary[_CONFIG].stat().st_mode)
            for path in temporary.values():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            for name, path in temporary.items():
                os.replace(path, folder / name)
        except SafetensorError as error:  # what a full disk comes as
            raise OSError(f"{folder / _WEIGHTS} cannot be written ({error})") from error
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, attention: str = "auto") -> "Student":
        """The student that `save_pretrained` wrote, on the CPU, in eval mode, in the dtypes that were saved.

        folder: or "owner/name", a model of the Hugging Face hub. attention: chosen here, it is not part of an export.
        Needs torch and safetensors only, for a model of the hub transformers.
        Raises FileNotFoundError for a missing file, ValueError for one that is damaged or does not fit the other, and
        for a model that the hub does not give.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if isinstance(folder, str) and HUB_ID.fullmatch(folder) and not Path(folder).exists():
            folder = find_folder("Student.from_pretrained", folder)
        config_path, weights_path = Path(folder) / _CONFIG, Path(folder) / _WEIGHTS
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {folder} must be a folder written by save_pretrained.")
        student_config = _read_config(config_path)
        try:
            with torch.device("meta"):  # the weights come from the file: nothing to initialise
                student = cls(**student_config, attention=attention)
        except BackendError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{config_path} describes no student ({error}); export it again.") from error
        try:
            state = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(f"{weights_path} is damaged ({error}); copy or export it again.") from error
        problems = _mismatches(student.state_dict(), state)
        if problems:
            raise ValueError(
                f"{weights_path} does not fit {config_path} in {len(problems)} tensors "
                f"({'; '.join(problems[:3])}); they must come from one export, made by this version of kpu_fast."
            )
        student.load_state_dict(state, assign=True)
        return student.eval()


def _load_vit(weights: str) -> ViT:
    """A ViT of transformers, or that of an exported student without an adapter. Raises WeightsError."""
    folder = find_folder(KEY, weights, processor=True)
    if not is_student(read_json(KEY, folder / _CONFIG)):
        return ViT.from_hf(folder)
    try:
        student = Student.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{KEY}: {error}") from error
    if student.adapter is not None:
        raise WeightsError(f"{KEY}: {folder} is a student with an adapter; only one that was trained without can go on")
    return student.vit


def is_student(config: Mapping) -> bool:
    """Whether a config.json is a student's, as `save_pretrained` writes it or transformers does."""
    return config.get("format") == _FORMAT or "student" in config


def _as_spec(name: str, spec: FeatureSpec | Mapping) -> FeatureSpec:
    if isinstance(spec, Mapping):
        if set(spec) != set(FeatureSpec._fields):
            raise ValueError(f"Student: heads.{name} has the keys {sorted(spec)}; expected {FeatureSpec._fields}.")
        spec = FeatureSpec(**spec)
    if len(spec.map_dims) != len(spec.strides):
        raise ValueError(
            f"Student: heads.{name} has {len(spec.map_dims)} map_dims and {len(spec.strides)} strides; "
            "give one of each per map."
        )
    return FeatureSpec(spec.x_dim, tuple(spec.map_dims), tuple(float(stride) for stride in spec.strides))


def _adapter_settings(adapter) -> dict | None:
    if adapter is None:
        return None
    return {key: value for key, value in dict(adapter).items() if value is not None}  # None: Adapter's own default


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the student again.") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT or "student" not in config:
        raise ValueError(f'{path} is not a student of kpu_fast (no "format": "{_FORMAT}").')
    if config.get("version") not in _VERSIONS:
        raise ValueError(
            f"{path} has format version {config.get('version')!r}, this kpu_fast reads {_VERSIONS[0]} to "
            f"{_VERSIONS[-1]}; install the version that wrote it."
        )
    return config["student"]


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    for name, tensor in found.items():
        if name in expected and expected[name].shape != tensor.shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
    return problems
