"""Networks of transformers with every weight in its place, from a local folder, the hub's cache or the hub.

Every function takes `key`, the configuration key that its error messages begin with, such as "student.vit.weights".
transformers and huggingface_hub are imported when a network is asked for: a trained student loads without them.
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Index tables that are computed, not learned, and a token for masked patches, which starts at 0 where it is missing.
_NOT_WEIGHTS = ("position_ids", "relative_position_index", "relative_coords_table", "mask_token")


class WeightsError(ValueError):
    """A network cannot be had as configured; the message names the key, what was found and what to do."""


def import_transformers(key: str):
    """The module transformers. Raises WeightsError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise WeightsError(f"{key}: needs transformers, which is missing: pip install transformers") from error
    return transformers


def find_folder(key: str, weights: str | Path, *, processor: bool = False) -> Path:
    """The local folder of `weights`: itself, else the hub's local cache, else a download.

    processor: the image processor's file is read too; a cache that lacks it asks the hub, if that can be reached.
    Raises WeightsError when it is no folder with config.json and weights, and no hub id that can be had.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        if _is_complete(folder):
            return folder
        raise WeightsError(
            f"{key}: {folder} has {', '.join(sorted(p.name for p in folder.iterdir())) or 'no file'}; expected "
            f"config.json and {_WEIGHT_FILES[0]} (or {_WEIGHT_FILES[2]}), as `hf download` and save_pretrained leave it"
        )
    if isinstance(weights, Path) or weights.startswith((".", "/", "~")) or folder.exists():
        raise WeightsError(f'{key}: {str(weights)!r} is not a folder; give a folder, a hub id, or "random"')
    import_transformers(key)  # it brings huggingface_hub
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        # The cache first: with no network, transformers itself retries each file for some 20 s. Not snapshot_download,
        # which wants every file of the repository there, read or not.
        config = try_to_load_from_cache(weights, "config.json")
    except HFValidationError as error:
        raise WeightsError(f"{key}: {weights!r} is neither a folder nor a hub id ({error})") from error
    if isinstance(config, str) and _is_complete(Path(config).parent):
        folder = Path(config).parent
        if processor and not any((folder / file).is_file() for file in PROCESSORS):
            _fetch_processor(weights, folder.name)
        return folder
    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(weights, timeout=10).siblings]
        for wanted in _wanted_files(files):
            folder = Path(snapshot_download(weights, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{key}: the hub has no model {weights!r} that you may read; check the id, or log in with `hf auth login`"
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{key}: {weights!r} is no folder in {Path.cwd()} and not in the local cache, and the hub cannot be "
            f"reached ({type(error).__name__}: {error}). Run `hf download {weights}` on a machine with network and "
            'copy the cache, or give a local folder or "random"'
        ) from error
    if not _is_complete(folder):
        raise WeightsError(
            f"{key}: the hub's {weights!r} has {', '.join(sorted(files)[:20]) or 'no file'}; expected config.json and "
            f"{_WEIGHT_FILES[0]} (or {_WEIGHT_FILES[2]})"
        )
    return folder


def _fetch_processor(repository: str, commit: str) -> None:
    """Put the image processor's file beside weights that some `from_pretrained` cached alone."""
    from huggingface_hub import HfApi, snapshot_download

    try:  # model_info first: unlike a download it tries once
        files = [sibling.rfilename for sibling in HfApi().model_info(repository, revision=commit, timeout=10).siblings]
        if wanted := [file for file in PROCESSORS if file in files]:
            snapshot_download(repository, revision=commit, allow_patterns=wanted)
    except Exception:  # no network, no permission: whoever reads the file says what is taken instead
        return


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / file).is_file() for file in _WEIGHT_FILES)


def _wanted_files(files: list[str]) -> list[list[str]]:
    """Of a hub repository's files, those that are read: safetensors, or pickled weights where there are none.

    In the order in which they are fetched, so that a cache that looks complete to another process is.
    """
    weights = [f for f in files if f.startswith("model") and f.endswith((".safetensors", ".safetensors.index.json"))]
    weights = weights or [f for f in files if f.startswith("pytorch_model") and f.endswith((".bin", ".bin.index.json"))]
    small = [f for f in files if f in ("config.json", *PROCESSORS)]
    shards, lists = ([f for f in weights if f.endswith(".json") == is_list] for is_list in (False, True))
    return [some for some in (small, shards, lists) if some]


def read_json(key: str, path: Path) -> dict:
    """The JSON object in `path`. Raises WeightsError when it is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{key}: {path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{key}: {path} holds {str(values)[:40]}, expected a JSON object {{…}}; fetch it again")
    return values


def load_config(key: str, folder: Path):
    """transformers' configuration in `folder`. Raises WeightsError when config.json describes no network."""
    with _reading(key, folder) as hf:
        return hf.AutoConfig.from_pretrained(folder, local_files_only=True)


def load_net(
    key: str, net_class: type, folder: Path, *, dtype: torch.dtype, config=None, part: str = "", optional=()
) -> nn.Module:
    """A network of transformers with the weights in `folder`, on the CPU, in `dtype`.

    config: None for the folder's own. part: only weights with this in their names are checked. optional: beginnings of
    names of weights that a checkpoint may lack or have for nothing. A head or a second tower that the network has no
    use for is ignored.
    Raises WeightsError where transformers fails, would fill in a weight at random, or would drop one.
    """
    with _reading(key, folder):
        net, info = net_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    _check_keys(key, folder, net, info, part, tuple(optional))
    return net


@contextmanager
def _reading(key: str, folder: Path):
    """Quiet transformers, its errors turned into WeightsErrors."""
    hf = import_transformers(key)
    before = hf.utils.logging.get_verbosity()
    # Its report of unused weights (CLIP's text tower) is no news here; missing ones are errors of ours.
    hf.utils.logging.set_verbosity_error()
    try:
        yield hf
    except Exception as error:
        raise WeightsError(
            f"{key}: the network in {folder} does not load ({type(error).__name__}: {error}). If a file is damaged, "
            "fetch it again; otherwise check that config.json and the weights belong together"
        ) from error
    finally:
        hf.utils.logging.set_verbosity(before)


def _check_keys(key: str, folder: Path, net: nn.Module, info: dict, part: str, optional: tuple[str, ...]) -> None:
    modules = dict(net.named_children())

    def matters(weight: str) -> bool:
        first, second = [*weight.split("."), ""][:2]
        ours = first in modules or (first in (net.base_model_prefix, "model") and second in modules)
        return ours and part in weight and not weight.endswith(_NOT_WEIGHTS)

    def required(weight: str) -> bool:
        return matters(weight) and not weight.startswith(optional)

    faults = {
        "lacks": list(filter(required, info["missing_keys"])),
        "has weights its config.json has no place for:": list(filter(required, info["unexpected_keys"])),
        "has other shapes:": [
            f"{w} {tuple(has)}, expected {tuple(wants)}" for w, has, wants in info["mismatched_keys"] if matters(w)
        ],
    }
    for fault, weights in faults.items():
        if weights:
            raise WeightsError(
                f"{key}: the checkpoint in {folder} {fault} {', '.join(sorted(weights)[:4])}"
                + (f" and {len(weights) - 4} more" if len(weights) > 4 else "")
                + ". Give a complete checkpoint whose config.json belongs to its weights"
            )
