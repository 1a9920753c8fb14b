"""DALI, imported where it is first needed; and its decoder for one image at a time."""

import numpy as np


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


class Decoder:
    """`decoder(data)`: the pixels, uint8 (H, W, 3), of one encoded image, (length,) uint8.

    device_id: None for the CPU. options: of `fn.decoders.image`. For one thread at a time.
    Raises what DALI does on data that it cannot decode (RuntimeError, ValueError, IndexError, …), and can go on then.
    """

    def __init__(self, device_id: int | None = None, **options):
        self._device_id, self._options = device_id, options
        self._pipe = None

    def __call__(self, data: np.ndarray) -> np.ndarray:
        self.prepare()
        pipe, self._pipe = self._pipe, None  # DALI calls a pipeline that raised invalid: keep it only after a success
        pipe.feed_input("data", [data])
        (images,) = pipe.run()
        self._pipe = pipe
        return np.asarray(images.as_cpu().at(0))

    def prepare(self) -> None:
        """Raise here, and not on the next data, what keeps DALI from decoding anything."""
        if self._pipe is not None:
            return
        dali = import_dali()
        pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipe:
            data = dali.fn.external_source(name="data", dtype=dali.types.UINT8, ndim=1)
            pipe.set_outputs(dali.fn.decoders.image(data, **self._options))
        pipe.build()
        self._pipe = pipe
