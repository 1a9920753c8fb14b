"""The index of a source: where every usable image lies, how large it is, and what was left out and why."""

import contextlib
import hashlib
import json
import logging
import os
import threading
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kpu_fast.data.sources import SourceFile, normalise

_LOG = logging.getLogger(__name__)

VERSION = 3  # raise it when the meaning of the stored fields changes: older files are then scanned anew
_COLUMNS = {
    "file": np.int32, "offset": np.int64, "length": np.int64, "height": np.int32, "width": np.int32, "crc": np.uint32,
}  # fmt: skip
RETRY_AFTER = (1.0, 5.0, 25.0)  # seconds
_PLAIN = ("source", "files", "converted", "rejected", "problems", "unread", "ignored")


class _ShortError(OSError):
    """A file has become shorter."""


@dataclass(frozen=True, eq=False)
class Index:
    """N usable images: image i is `length[i]` bytes at `offset[i]` of `files[file[i]]`, and decodes to (height, width).

    `file`, `offset`, `length`, `height`, `width`: (N,) integer arrays; sizes in pixels, after EXIF rotation.
    `crc`: (N,), the CRC-32 of each image's bytes in the source.
    `files`: the source's files, then `converted` PNG files of the cache that stand in for what DALI cannot read or
    reads wrongly.
    `rejected`: (name, reason) of each image left out. `problems`: what was wrong with whole shards, and which images
    and shards were not read. `unread`: paths of files that could not be read when the scan was made.
    `ignored`: number of other files in the folders and of other members in the shards.
    """

    source: list[str]
    files: list[SourceFile]
    converted: int
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    height: np.ndarray
    width: np.ndarray
    crc: np.ndarray
    rejected: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.file)

    def name(self, i: int) -> str:
        """Image i for people: its path, with the byte offset when it lies in a shard."""
        path = self.files[self.file[i]].path
        return f"{path} at byte {self.offset[i]}" if self.offset[i] else path

    def read(self, i: int, give_up: threading.Event | None = None) -> np.ndarray:
        """The encoded bytes of image i, (length,) uint8. Raises OSError, with its name, when they cannot be read.

        What may pass, as on a network file system for a moment, is tried again after each of RETRY_AFTER unless
        `give_up` is set; not a file that is gone or too short.
        """
        give_up = give_up or threading.Event()
        for pause in (*RETRY_AFTER, None):
            try:
                return self._read(i)
            except (FileNotFoundError, PermissionError, NotADirectoryError, _ShortError):
                raise
            except OSError as error:
                if pause is None or give_up.wait(0):
                    raise OSError(error.errno, error.strerror or str(error), self.name(i)) from error
                _LOG.warning("%s: %s; trying again in %g s", self.name(i), error, pause)
                give_up.wait(pause)

    def _read(self, i: int) -> np.ndarray:
        data = np.empty(self.length[i], np.uint8)
        with open(self.files[self.file[i]].path, "rb") as file:
            file.seek(self.offset[i])
            got = file.readinto(memoryview(data))
        if got != len(data):
            raise _ShortError(
                f"{self.name(i)}: {got} bytes left of the {len(data)} that the scan saw; the file changed: "
                "scan the source again"
            )
        return data

    def digest(self) -> str:
        """Tells one set of images from another; the same wherever the files lie and whoever converted them."""
        columns = (np.ascontiguousarray(getattr(self, name), np.int64).tobytes() for name in ("height", "width", "crc"))
        return hashlib.sha256(b"".join(columns)).hexdigest()[:16]

    def summary(self) -> str:
        """What a person wants to know after a scan, in a few lines."""
        lines = [f"{len(self):,} images usable, {len(self.rejected):,} left out"]
        if self.converted:
            lines.append(f"  {self.converted:,} of them converted to RGB PNG in {cache_folder(self.source)}")
        reasons = defaultdict(list)
        for name, reason in self.rejected:
            reasons[reason].append(name)
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            more = ", …" if len(names) > 3 else ""
            lines.append(f"  {reason}: {len(names):,} ({', '.join(names[:3])}{more})")
        if self.ignored:
            lines.append(f"  {self.ignored:,} other files, such as labels, not read")
        text = "\n".join(lines + [f"  shard {problem}" for problem in self.problems])
        return text.encode("utf-8", "backslashreplace").decode()  # a file's name may be in no encoding at all

    def source_files(self) -> list[SourceFile]:
        """The files of the source as the scan saw them, without the converted ones."""
        return self.files[: len(self.files) - self.converted]

    def save(self) -> Path:
        """Write to the cache folder of the source, whole or not at all; returns the path."""
        body = {name: getattr(self, name) for name in _PLAIN} | {
            name: getattr(self, name).tolist() for name in _COLUMNS
        }
        path = index_path(self.source)
        write_atomically(path, json.dumps({"version": VERSION, **body}).encode("ascii"))
        return path


def load(source: str | list[str]) -> Index | None:
    """The stored index of `source`; None where there is none that this version can read."""
    try:
        body = json.loads(index_path(source).read_bytes())
    except (FileNotFoundError, ValueError):  # not JSON, or not even text
        return None
    if not isinstance(body, dict) or body.pop("version", None) != VERSION:
        return None
    body["files"] = [SourceFile(*row) for row in body["files"]]
    body["rejected"] = [tuple(row) for row in body["rejected"]]
    return Index(**{**body, **{name: np.array(body[name], dtype) for name, dtype in _COLUMNS.items()}})


def from_rows(rows: Sequence[tuple[int, int, int, int, int, int]], **plain) -> Index:
    """An Index from one (file, offset, length, height, width, crc) per image and the remaining fields."""
    columns = zip(*rows, strict=True) if rows else ([] for _ in _COLUMNS)
    arrays = {name: np.array(column, dtype) for (name, dtype), column in zip(_COLUMNS.items(), columns, strict=True)}
    return Index(**arrays, **plain)


def cache_folder(source: str | list[str]) -> Path:
    """The folder of what was found out about `source`: under $KPU_FAST_CACHE, else ~/.cache/kpu_fast."""
    root = Path(os.environ.get("KPU_FAST_CACHE") or Path.home() / ".cache" / "kpu_fast")
    return root / hashlib.sha256(json.dumps(normalise(source)).encode()).hexdigest()[:16]


def index_path(source: str | list[str]) -> Path:
    """The JSON file that holds the index of `source`."""
    return cache_folder(source) / "index.json"


def write_atomically(path: Path, data: bytes) -> None:
    """`data` in `path`, complete or absent. Raises OSError that names KPU_FAST_CACHE when the folder takes no files."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(
            f"cannot write to {path.parent} ({error.strerror}); set KPU_FAST_CACHE to a folder that takes files"
        ) from error
