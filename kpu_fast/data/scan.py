"""Preflight: decode every image once, index what is usable, set aside what is not.

    python -m kpu_fast.data.scan SOURCE [SOURCE …] [--workers N]

One image that DALI cannot decode ends a DALI pipeline for good. So an image is usable only after it was decoded in full
by Pillow (which notices truncated and broken files) and by DALI (which training reads with). Images that only Pillow
reads, that DALI sees otherwise than Pillow, and CMYK are converted to RGB PNG in the cache.
"""

import argparse
import contextlib
import hashlib
import io
import multiprocessing
import os
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from kpu_fast.data import index as index_file
from kpu_fast.data.dali import Decoder, import_dali
from kpu_fast.data.decode import to_rgb
from kpu_fast.data.index import Index
from kpu_fast.data.sources import (
    CANNOT_BE_READ,
    Candidate,
    Shard,
    SourceError,
    SourceFile,
    is_shard,
    list_files,
    normalise,
    open_regular,
    read_shard,
    survey,
)

MAX_PIXELS = 80_000_000  # 240 MB decoded; below the size at which Pillow suspects a decompression bomb
MAX_BYTES = 1 << 28
_DALI_FORMATS = frozenset(["JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
# From here on processes pay for their start. Below it threads do: both decoders release the interpreter lock.
PROCESS_BYTES = 1 << 30
_LEVELS = 1.0  # of 255, the mean over an image: what two right decoders of one file may differ by, from rounding
_ROWS = 64  # compared at least, spread over the image, where it has so many: all would cost a sixth of the scan
_SAMPLE = 256  # images of a copy that are compared
_CHUNK = 32  # images per task: small enough for a lively progress bar, large enough to hide the cost of a task
_local = threading.local()


def load_or_scan(source: str | list[str]) -> Index:
    """The index of `source`: the stored one if no file was added, removed or changed since, else a new scan's.

    A stored index that lacks a file because it could not be read holds only while that file cannot be read.
    Else images of files with the size and time of before are taken as they were found then, not decoded again; but
    not those that were left out or converted. Ranks of one job: let rank 0 call it, and then the others `load_same`.
    Raises SourceError as `scan` does.
    """
    stored = index_file.load(source)
    if stored and stored.source_files() == list_files(source) and _converted_exist(stored) and _still_unread(stored):
        return stored
    return scan(source, progress=True, known=stored)


def load_same(source: str | list[str], digest: str, *, look: bool = False) -> Index | None:
    """The stored index of `source` if it is of the images that `Index.digest` gave `digest` for; else None.

    look: only if it fits the files here, too. Where their times differ, as copies' do, that is: their names and sizes,
    the places of all images in shards, and the bytes of _SAMPLE images.
    """
    stored = index_file.load(source)
    if stored is None or stored.digest() != digest:
        return None
    if look:
        here, seen = list_files(source), stored.source_files()
        alike = [file[:2] for file in here] == [file[:2] for file in seen]
        if not alike or not _converted_exist(stored) or (here != seen and not _same_bytes(stored)):
            return None
    return stored


def _same_bytes(stored: Index) -> bool:
    files = stored.source_files()
    lying = np.flatnonzero(stored.file < len(files))  # the others were converted
    for number, file in enumerate(files):
        if is_shard(file.path):
            members = {(member.offset, member.length) for member in read_shard(number, file).images}
            mine = lying[stored.file[lying] == number]
            if not members.issuperset(zip(stored.offset[mine].tolist(), stored.length[mine].tolist(), strict=True)):
                return False
    some = lying[np.linspace(0, len(lying) - 1, min(_SAMPLE, len(lying))).astype(int)]
    try:
        return all(zlib.crc32(stored.read(i)) == stored.crc[i] for i in some)
    except OSError:
        return False


def scan(
    source: str | list[str], *, workers: int | None = None, progress: bool = False, known: Index | None = None
) -> Index:
    """Decode every image of `source`, store the index in the cache folder, return it.

    workers: threads, or processes above PROCESS_BYTES (default: the CPUs this process may use); these start afresh, so
    a script that scans that much needs the usual `if __name__ == "__main__":`. progress: a bar on stderr.
    known: an earlier index; what it has of files that have not changed is not decoded again.
    Raises SourceError when the source is missing or holds no usable image, ImportError without DALI, OSError when a
    process was killed or the index cannot be stored.
    """
    import_dali()
    files, others = survey(source)
    before = {} if known is None else _verdicts(known)
    try:
        with _pool(files, workers or len(os.sched_getaffinity(0))) as pool:
            numbered = {number: file for number, file in enumerate(files) if is_shard(file.path)}
            shards = dict(zip(numbered, pool.map(read_shard, numbered, numbered.values()), strict=True))
            candidates = _candidates(files, shards)
            verdicts = {c: before.get((files[c.file], c.offset, c.length)) for c in candidates}
            new = [candidate for candidate, verdict in verdicts.items() if verdict is None]
            chunks = [new[i : i + _CHUNK] for i in range(0, len(new), _CHUNK)]
            tasks = ([(candidate, files[candidate.file]) for candidate in chunk] for chunk in chunks)
            check = partial(_check_chunk, index_file.cache_folder(source) / "converted")
            with tqdm(total=len(new), desc="scan", unit="img", disable=not progress, leave=False) as bar:
                for chunk, found in zip(chunks, pool.map(check, tasks), strict=True):
                    verdicts.update(zip(chunk, found, strict=True))
                    bar.update(len(chunk))
    except BrokenExecutor as error:
        raise OSError(
            "a process that decodes images was killed, as happens where memory runs out; scan with fewer: "
            "python -m kpu_fast.data.scan SOURCE --workers N"
        ) from error
    found = _collect(normalise(source), files, others, shards, verdicts.items())
    if not len(found):
        raise SourceError(_nothing_usable(found))
    found.save()
    return found


def _verdicts(known: Index) -> dict[tuple[SourceFile, int, int], tuple[int, int, int]]:
    """(height, width, CRC-32) of each image that is used as it lies in the source, by (file, offset, length)."""
    files = known.source_files()
    columns = (known.file, known.offset, known.length, known.height, known.width, known.crc)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(files[file], at, length): tuple(facts) for file, at, length, *facts in rows if file < len(files)}


def _pool(files: list[SourceFile], workers: int) -> Executor:
    if sum(file.size for file in files) < PROCESS_BYTES:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"))


def _candidates(files: list[SourceFile], shards: dict[int, Shard]) -> list[Candidate]:
    candidates = []
    for number, file in enumerate(files):
        if number in shards:
            candidates += shards[number].images
        else:
            candidates.append(Candidate(number, 0, file.size, file.path))
    return candidates


def _collect(source, files: list[SourceFile], others: list[str], shards: dict[int, Shard], verdicts) -> Index:
    rows, converted = [], []
    rejected = [row for shard in shards.values() for row in shard.rejected]
    unread = {number for number, shard in shards.items() if (shard.problem or "").startswith(CANNOT_BE_READ)}
    for candidate, verdict in verdicts:
        match verdict:
            case str():
                rejected.append((candidate.name, verdict))
                if verdict.startswith(CANNOT_BE_READ):
                    unread.add(candidate.file)
            case (height, width, crc):
                rows.append((candidate.file, candidate.offset, candidate.length, height, width, crc))
            case (height, width, crc, path):
                made = os.stat(path)
                rows.append((len(files) + len(converted), 0, made.st_size, height, width, crc))
                converted.append(SourceFile(str(path), made.st_size, made.st_mtime_ns))
    return index_file.from_rows(
        rows,
        source=source,
        files=files + converted,
        converted=len(converted),
        rejected=rejected,
        problems=_problems(files, others, shards),
        unread=[files[number].path for number in sorted(unread)],
        ignored=sum(shard.ignored for shard in shards.values()) + sum(not is_shard(path) for path in others),
    )


def _problems(files: list[SourceFile], others: list[str], shards: dict[int, Shard]) -> list[str]:
    problems = [f"{files[number].path}: {shard.problem}" for number, shard in shards.items() if shard.problem]
    further = [f"{files[number].path}::{name}" for number, shard in shards.items() for name in shard.further]
    if further:
        problems.append(
            f"{_some(further)}: not read, since the sample has another image (its name ends at the first dot; of one "
            "name the last member counts)"
        )
    beside = [path for path in others if is_shard(path)]
    if beside:
        pattern = os.path.join(os.path.dirname(beside[0]), "*.tar")
        problems.append(f"{_some(beside)}: not read, being in a folder of images; add {pattern!r} to the source")
    return problems


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def _check_chunk(folder: Path, chunk: list[tuple[Candidate, SourceFile]]) -> list:
    return [_check(file, candidate, folder) for candidate, file in chunk]


def _check(file: SourceFile, candidate: Candidate, folder: Path) -> str | tuple:
    """Why the candidate is left out; or its (height, width, CRC-32); or these and the PNG that stands in for it."""
    if candidate.length > MAX_BYTES:
        return f"more than {MAX_BYTES >> 20} MiB"
    try:
        with open_regular(file.path) as stream:
            stream.seek(candidate.offset)
            data = stream.read(candidate.length)
    except OSError as error:
        return f"{CANNOT_BE_READ} ({error.strerror})"
    if not data:
        return "empty file"
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            return f"more than {MAX_PIXELS // 1_000_000} megapixels"
        image.load()
    except UnidentifiedImageError:
        return "not an image"
    except Image.DecompressionBombError:
        return f"more than {MAX_PIXELS // 1_000_000} megapixels"
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, … on broken data
        return "truncated or corrupt"
    try:
        pixels = to_rgb(image)
    except ValueError as error:
        return str(error)
    facts = (*pixels.shape[:2], zlib.crc32(data))
    if image.mode != "CMYK" and image.format in _DALI_FORMATS and _dali_agrees(data, pixels):
        return facts
    name = hashlib.sha256(f"{file}{candidate.offset}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    path = folder / f"{name}.png"
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", compress_level=1)
    index_file.write_atomically(path, png.getvalue())
    return (*facts, path)


def _dali_agrees(data: bytes, pixels: np.ndarray) -> bool:
    """Whether DALI decodes `data`, and to `pixels`; it takes some files for what they are not, such as LAB for RGB."""
    if not hasattr(_local, "decoder"):
        _local.decoder = Decoder()
    _local.decoder.prepare()
    try:
        decoded = _local.decoder(np.frombuffer(data, np.uint8))
    except Exception:  # DALI raises RuntimeError, ValueError, IndexError, … on broken data
        return False
    if decoded.shape != pixels.shape:
        return False
    step = max(1, len(pixels) // _ROWS)
    difference = np.subtract(decoded[::step], pixels[::step], dtype=np.int16)
    return np.abs(difference).mean() <= _LEVELS


def _converted_exist(stored: Index) -> bool:
    made = stored.files[len(stored.source_files()) :]
    return all(os.path.isfile(file.path) and os.path.getsize(file.path) == file.size for file in made)


def _still_unread(stored: Index) -> bool:
    for path in stored.unread:
        with contextlib.suppress(OSError), open_regular(path) as file:
            while file.read(1 << 20):
                pass
            return False
    return True


def _nothing_usable(found: Index) -> str:
    reasons = Counter(reason for _, reason in found.rejected)
    told = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(4))
    told = "; ".join(filter(None, [told, *found.problems[:2], found.ignored and f"{found.ignored} other files"]))
    return f"source {', '.join(found.source)}: no usable image (found {told or 'nothing'}); give it images that decode"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 when there are usable images, 2 when not."""
    parser = argparse.ArgumentParser(prog="python -m kpu_fast.data.scan", description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="+", help="folder, .tar shard, glob, image file, or package:NAME/path")
    parser.add_argument("--workers", type=_count, help="parallel decoders (default: the CPUs this process may use)")
    options = parser.parse_args(arguments)
    try:
        found = scan(options.source, workers=options.workers, progress=True)
    except (SourceError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was stored", file=sys.stderr)
        return 130
    print(found.summary())
    print(f"index: {index_file.index_path(options.source)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
