"""What `import kernels` is meant to find when it finds this folder."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def step_aside(name: str) -> None:
    """Put the package `name` that lies behind this one on sys.path, if one does, in its place in sys.modules.

    With the repository's root on sys.path, as `python -m` puts it there, this folder is found as `kernels` too. That is
    the name of Hugging Face's library, which transformers imports wherever it is installed.
    """
    here = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry or ".").resolve() != here])
    if spec is None or spec.loader is None:  # without a loader it is a folder of any kind
        return
    for ours in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
        del sys.modules[ours]  # that package may have files of these names too
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
