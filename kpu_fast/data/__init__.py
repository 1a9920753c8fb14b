"""Images for the teachers: a scan that finds what decodes, and endless DALI streams of it."""

from importlib import import_module

_HOME = {
    "SourceError": "sources",
    "Index": "index",
    "load_or_scan": "scan",
    "load_same": "scan",
    "Stream": "pipeline",
    "Batch": "pipeline",
}
__all__ = ["Batch", "Index", "SourceError", "Stream", "load_or_scan", "load_same"]


def __getattr__(name):
    # Looked up on first use: the scan command then starts without torch, and `-m kpu_fast.data.scan` runs one copy.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
