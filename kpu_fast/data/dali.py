"""DALI, imported where it is first needed."""


def import_dali():
    """The `nvidia.dali` package with `fn` and `types`. Raises ImportError that says what to install."""
    try:
        from nvidia import dali
        from nvidia.dali import fn, types  # noqa: F401 - attributes of the package from here on
    except ImportError as error:
        raise ImportError(
            f"reading images needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130 "
            "(CUDA 12: nvidia-dali-cuda120). The PyPI package 'nvidia-dali' is not it."
        ) from error
    return dali
