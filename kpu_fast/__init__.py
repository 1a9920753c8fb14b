"""kpu_fast: train one vision student from several frozen teachers."""

__version__ = "0.1.0"
