"""An endless stream of image batches: bytes read ahead by threads, decoded and cut by DALI.

DALI holds no state here. The order, the crops and the flips come from `sampler.py`, which needs only the position; so
a stream continues exactly from a position, whatever DALI had in flight, and shards are shuffled as thoroughly as files.
"""

import json
import threading
import warnings
import weakref
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from kpu_fast.data.dali import Decoder, import_dali
from kpu_fast.data.index import Index
from kpu_fast.data.sampler import Sampler, canvases_of
from kpu_fast.data.sources import SourceError
from kpu_fast.machine import is_out_of_memory

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]: what padding is filled with
READERS = 8  # threads that read files; they hide latency, not work: a read keeps no core busy
READ_AHEAD = 3  # batches being read beside the PREFETCH ones that DALI decodes
PREFETCH = 2
_READ_CHUNK = 16
_NAMED = 3  # images in a message


class Batch(NamedTuple):
    """images: (B, 3, H, W) float32 RGB in [0, 1]; valid: (B, H, W) bool, True on real pixels, or None (fit "crop")."""

    images: torch.Tensor
    valid: torch.Tensor | None


class Stream:
    """Endless full batches for one rank; `next(stream)` → Batch on `device`.

    data_cfg: an object with source, batch_size, size (H, W), fit, hw_decoder_load, threads, crop_scale, flip,
      aspect_ratio_grouping and buckets.
      fit "crop": a random part with crop_scale of the area and ratio 3/4–4/3, resized to size.
      fit "pad": the whole image resized to fit into size, placed top left, the rest IMAGENET_MEAN. With
      aspect_ratio_grouping, images that lie otherwise than size come in batches of their own, of (W, H), and those
      that one of the smaller buckets shows as large in batches of that, either way.
      Both: antialiased bilinear; half of the images mirrored if flip.
    index: of data_cfg.source, from `load_or_scan`. device: "cpu" or a CUDA device, which then decodes too.
    seed: ≥ 0; fixes order, crops and flips. state: a string from `state()` to go on from. skip: batches of every rank
    to pass over from there. step_batches: that all ranks together take for an optimiser step, whose canvases are of one
    area; None: one from each.

    In each epoch every image comes once, at one rank; an epoch may end inside a batch, the next one fills it. Grouped
    images have epochs of their own, as fast as the others'.
    Raises SourceError when there are fewer images than ranks, ValueError on a bad argument or a state of another seed.
    """

    def __init__(
        self, data_cfg, index: Index, *, rank, world_size, device, seed, state=None, skip=0, step_batches=None
    ):
        self._digest = index.digest()
        self._seed = seed
        self._source = data_cfg.source
        self._device = torch.device(device)
        step_batches = world_size if step_batches is None else step_batches
        self._check(data_cfg, len(index), rank, world_size, step_batches)
        self._stride = world_size * data_cfg.batch_size
        sampler = Sampler(
            np.stack([index.height, index.width], axis=1),
            batch_size=data_cfg.batch_size,
            canvases=canvases_of(data_cfg),
            fit=data_cfg.fit,
            crop_scale=data_cfg.crop_scale,
            flip=data_cfg.flip,
            step_batches=step_batches,
            rank=rank,
            seed=seed,
        )
        position = self._position_of(state) if state is not None else 0
        self._images_seen = sampler.align(position + skip * self._stride)
        crop = data_cfg.fit == "crop"
        self._handed_out: list[torch.Tensor] = []  # on a GPU: of the last batch, in DALI's memory
        self._in_use: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()  # of those before it
        self._reader = _Reader(index, sampler, self._images_seen, self._stride, crop)
        # A stream that is dropped goes at once, DALI's memory and all threads with it. A cycle would keep them until
        # Python looks for cycles, which may be never, and DALI has one that holds what it calls.
        reader = weakref.ref(self._reader)
        self._decoding = {
            "device": "mixed" if self._device.type == "cuda" else "cpu",
            "hw_decoder_load": data_cfg.hw_decoder_load,
            "jpeg_fancy_upsampling": True,  # on a GPU too: the pixels of the scan, of evaluation and of a CPU
        }
        self._pipe = _build(data_cfg, self._device, self._decoding, lambda: reader()())

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        try:
            images, *size = self._pipe.run()
        except OSError:  # a read failed; the message names the file
            raise
        except Exception as error:  # DALI raises RuntimeError, ValueError, IndexError, … on data it cannot use
            if is_out_of_memory(error):
                raise
            decoder = Decoder(_device_id(self._device), **self._decoding)
            raise RuntimeError(f"source {self._source!r}: {self._reader.what_failed(decoder, error)}") from error
        self._images_seen += self._stride
        images, *size = outputs = [torch.from_dlpack(output.as_tensor()) for output in (images, *size)]
        if self._device.type == "cuda":
            self._keep_until_used(outputs)
        return Batch(images, _valid(size[0], images.shape[2:]) if size else None)

    def _keep_until_used(self, outputs: list[torch.Tensor]):
        """Keep `outputs` until the GPU has done what was queued before the next batch was asked for.

        DALI writes to memory again as soon as no tensor holds it: it waits for its own stream, not for torch's. The
        host drops a batch when the work on it is queued, which is before the GPU has read it.
        """
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(self._device))
        self._in_use.append((used, self._handed_out))
        self._handed_out = outputs
        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()

    @property
    def images_seen(self) -> int:
        """Images handed out or skipped so far by all ranks together; batches only prefetched do not count."""
        return self._images_seen

    def state(self) -> str:
        """What `Stream(…, state=…)` needs to hand out the batches that would come next. The same at every rank."""
        return json.dumps({"images_seen": self._images_seen, "seed": self._seed, "images": self._digest})

    def _check(self, data_cfg, images, rank, world_size, step_batches):
        if data_cfg.fit not in ("crop", "pad"):
            raise ValueError(f"data.fit is {data_cfg.fit!r}: expected 'crop' or 'pad'")
        if self._device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {str(self._device)!r}: images go to 'cpu' or 'cuda'")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}: expected 0 ≤ rank < world_size")
        if step_batches < 1 or step_batches % world_size:
            raise ValueError(f"step_batches is {step_batches}: expected a multiple of the {world_size} ranks")
        if images < world_size:
            raise SourceError(
                f"source {self._source!r} has {images} usable images for {world_size} ranks: "
                "each rank needs at least one; add images or use fewer ranks"
            )

    def _position_of(self, state: str) -> int:
        saved = json.loads(state)
        if saved["seed"] != self._seed:
            raise ValueError(
                f"source {self._source!r}: the stream was saved with seed {saved['seed']}, the run has "
                f"seed {self._seed}; set it back, or start anew without the checkpoint"
            )
        if saved["images"] != self._digest:
            warnings.warn(
                f"source {self._source!r}: the images changed since the checkpoint; the stream goes on after "
                f"{saved['images_seen']:,} images, but not with the batches it would have had",
                stacklevel=3,
            )
        return saved["images_seen"]


class _Reader:
    """What DALI calls for a batch: (files, target sizes, mirrored or not, heights and widths of the canvas).

    With fit "crop" the corners and sizes of the parts to cut out come after them.
    """

    def __init__(self, index: Index, sampler: Sampler, position: int, stride: int, crop: bool):
        self._index, self._sampler, self._crop = index, sampler, crop
        self._position, self._stride = position, stride
        self._failed = threading.Event()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="kpu_fast-read")
        self._reads = deque()
        self._given = deque(maxlen=PREFETCH)  # numbers of the images of each batch that DALI has yet to hand out
        for _ in range(READ_AHEAD):
            self._read_next()

    def _read_next(self):
        plan = self._sampler.plan(self._position)
        self._position += self._stride
        chunks = [plan.image[i : i + _READ_CHUNK] for i in range(0, len(plan.image), _READ_CHUNK)]
        self._reads.append((plan, [self._pool.submit(self._read, chunk) for chunk in chunks]))

    def _read(self, images: np.ndarray) -> list[np.ndarray]:
        return [self._index.read(image, self._failed) for image in images]

    def __call__(self):
        plan, chunks = self._reads.popleft()
        self._read_next()
        try:
            data = [data for chunk in chunks for data in chunk.result()]
        except OSError:  # the stream ends; reads that still wait would keep the process from ending
            self._failed.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        self._given.append(plan.image)
        canvas = (np.full(len(data), side, np.float32) for side in plan.canvas)
        return (data, plan.target, plan.flip, *canvas) + ((plan.start, plan.shape) if self._crop else ())

    def what_failed(self, decoder: Decoder, error: Exception) -> str:
        """Of the batches that DALI had when it raised `error`, the images that fail alone too, and what to do."""
        index, bad, changed = self._index, [], []
        images = sorted({i for given in self._given for i in given.tolist()})
        in_source = len(index.source_files())  # the checksum of a converted image is of the one in the source
        for i in images:
            data = index.read(i)
            if not _decodes(decoder, data, (index.height[i], index.width[i])):
                bad.append(i)
                if index.file[i] < in_source and zlib.crc32(data) != index.crc[i]:
                    changed.append(i)
        if changed:
            return (
                f"DALI cannot use {self._names(changed)}, changed since the scan; put back what was there, or run "
                "`python -m kpu_fast.data.scan` on the source, which leaves out what cannot be decoded"
            )
        if 0 < len(bad) < len(images):  # where all fail it may be the device that does
            return f"DALI cannot decode {self._names(bad)}, which the scan could; replace or remove what is named"
        said = " ".join(str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0].split())[:300]
        return f"DALI could not make a batch ({said}); it was decoding {self._names(images)}"

    def _names(self, images: list[int]) -> str:
        names = ", ".join(self._index.name(i) for i in images[:_NAMED])
        return names + (f" and {len(images) - _NAMED:,} more" if len(images) > _NAMED else "")


def _decodes(decoder: Decoder, data: np.ndarray, size: tuple[int, int]) -> bool:
    try:
        return decoder(data).shape[:2] == size
    except Exception as error:  # see Decoder
        return is_out_of_memory(error)  # which says nothing about the image


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def _build(data_cfg, device: torch.device, decoding: dict, read):
    """The DALI graph; the same on both devices but for where the decoder runs. decoding: options of the decoder."""
    dali = import_dali()
    fn, types = dali.fn, dali.types
    crop = data_cfg.fit == "crop"
    gpu = device.type == "cuda"
    pipe = dali.Pipeline(data_cfg.batch_size, data_cfg.threads, _device_id(device), prefetch_queue_depth=PREFETCH)
    with pipe:
        data, target, flip, height, width, *part = fn.external_source(read, num_outputs=7 if crop else 5, batch=True)
        images = fn.decoders.image(data, **decoding)
        if crop:
            # Not image_slice, which decodes the part alone: nvImageCodec 0.9.0 (DALI 2.3 and later) ends with a
            # segmentation fault there on an H100 (github.com/NVIDIA/nvImageCodec/issues/55). On a CPU decoding the
            # whole costs 15 % more per ImageNet photograph (2.98 against 2.59 ms, resize included, DALI 2.4.0).
            images = fn.slice(images, *part, axes=(0, 1))
        images = fn.resize(images, size=fn.cast(target, dtype=types.FLOAT), antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            crop_h=height,
            crop_w=width,
            crop_pos_y=0.0,
            # An image narrower than the canvas lies at its left. Mirroring turns the canvas too: start at the right.
            crop_pos_x=fn.cast(flip, dtype=types.FLOAT),
            mirror=flip,
            out_of_bounds_policy="pad",
            fill_values=IMAGENET_MEAN,
            std=[255.0] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipe.set_outputs(*([images] if crop else [images, target.gpu() if gpu else target]))
    pipe.build()
    return pipe


def _valid(size: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """(B, 2) heights and widths of the real pixels → (B, H, W) bool."""
    rows, columns = (torch.arange(extent, device=size.device) for extent in canvas)
    return (rows < size[:, :1])[:, :, None] & (columns < size[:, 1:])[:, None, :]
