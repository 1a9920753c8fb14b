"""kpu_fast: train one vision student from several frozen teachers."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels/__init__.py").is_file():
    # A clone, where kernels/ lies beside this folder: kpu_fast.kernels is that one, whatever else is installed.
    __path__.append(str(_here.parent))
