"""From what a user writes as `source` to the files behind it."""

import glob
import importlib.util
import os
import re
import tarfile
from collections import Counter
from typing import NamedTuple

_SUFFIXES = "jpg jpeg jpe jfif png bmp webp tif tiff ppm pgm pbm pnm jp2 gif avif"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split())
PACKAGE_PREFIX = "package:"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_BLOCK = 512


class SourceError(ValueError):
    """A source that is missing, empty or unusable; the message names it and says what would do."""


class SourceFile(NamedTuple):
    """One file of a source: absolute path, size in bytes, modification time in nanoseconds; 0 and 0 of a dead link."""

    path: str
    size: int
    mtime_ns: int


class Candidate(NamedTuple):
    """Bytes that claim to be an image: `length` bytes at `offset` of file number `file`, shown to people as `name`."""

    file: int
    offset: int
    length: int
    name: str


def normalise(source: str | list[str]) -> list[str]:
    """`source` as a list of absolute paths, patterns and `package:` names.

    Raises SourceError for an empty list or an entry that is no string.
    """
    entries = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    entries = [os.fspath(entry) if isinstance(entry, os.PathLike) else entry for entry in entries]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise SourceError(f"source {source!r}: expected a path, a glob, 'package:NAME/path', or a list of these")
    return [
        entry if entry.startswith(PACKAGE_PREFIX) else os.path.abspath(os.path.expanduser(entry)) for entry in entries
    ]


def list_files(source: str | list[str]) -> list[SourceFile]:
    """Every image file and tar shard behind `source`, in a fixed order, each once.

    A folder is searched recursively for image suffixes (links followed, dot files and lost+found skipped). A pattern
    may hold `*`, `?`, `[...]` and ranges such as `{000..007}`. A file that is there but leads nowhere (a dead link) is
    listed too: reading it says why. Raises SourceError when an entry is missing or holds nothing to read, and when a
    folder cannot be listed.
    """
    paths: dict[str, None] = {}
    for entry in normalise(source):
        for path in _expand(entry):
            paths.update(dict.fromkeys(_walk(path, entry) if os.path.isdir(path) else [path]))
    files = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:
            files.append(SourceFile(path, 0, 0))
        else:
            files.append(SourceFile(path, stat.st_size, stat.st_mtime_ns))
    return files


def is_shard(path: str) -> bool:
    """Whether `path` is read as a WebDataset shard (by its suffix)."""
    return path.endswith(".tar")


def shard_candidates(number: int, file: SourceFile) -> tuple[list[Candidate], int, str | None]:
    """The images of tar shard `file`, the count of its other members, and what is wrong with the tar (None: nothing).

    A WebDataset sample (members that share the name up to the first dot) gives one image: the one with the plainest
    extension (`0.jpg` rather than `0.depth.png`). A shard cut short keeps the members that are whole.
    """
    samples: dict[str, tarfile.TarInfo] = {}
    members = end = 0
    problem = None
    try:
        with tarfile.open(file.path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _TAR_BLOCK) * _TAR_BLOCK
                if member.offset_data + member.size > file.size:
                    problem = f"cut short inside {member.name}"
                    break
                if not member.isreg():
                    continue
                members += 1
                key, suffixes = _split_member(member.name)
                if os.path.splitext(member.name)[1].lower() not in IMAGE_SUFFIXES or not key:
                    continue
                if key not in samples or len(suffixes) < len(_split_member(samples[key].name)[1]):
                    samples[key] = member
        problem = problem or _tail_problem(file, end)
    except (tarfile.TarError, OSError) as error:
        gzip = file.size >= 2 and _read(file.path, 0, 2) == b"\x1f\x8b"
        problem = "compressed: unpack it first (gunzip)" if gzip else f"not a readable tar ({error})"
    candidates = [
        Candidate(number, member.offset_data, member.size, f"{file.path}::{member.name}") for member in samples.values()
    ]
    return candidates, members - len(candidates), problem


def _split_member(name: str) -> tuple[str, list[str]]:
    folder, base = os.path.split(name)
    stem, *suffixes = base.split(".")
    return (f"{folder}/{stem}" if stem else ""), suffixes  # a leading dot: no sample, as in WebDataset


def _tail_problem(file: SourceFile, end: int) -> str | None:
    # tarfile takes a damaged or missing header after the first member for the end of the archive without a word.
    tail = _read(file.path, end, _TAR_BLOCK)
    if tail == bytes(_TAR_BLOCK):
        return None
    if len(tail) < _TAR_BLOCK:
        return f"cut short at byte {end:,} (no end-of-archive mark)"
    return f"unreadable from byte {end:,} on"


def _read(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _expand(entry: str) -> list[str]:
    path = _package_path(entry) if entry.startswith(PACKAGE_PREFIX) else entry
    if os.path.exists(path):
        return [path]
    found = sorted({match for pattern in _braces(path) for match in glob.glob(pattern, recursive=True)})
    if found:
        return found
    if glob.has_magic(path) or _RANGE.search(path):
        raise SourceError(f"source {entry!r}: no file matches the pattern; check the folder and the range")
    parent = path
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    raise SourceError(
        f"source {entry!r}: no such file or folder (the path exists up to {parent!r}); "
        "give a folder of images, .tar shards, a glob, an image file, or 'package:NAME/path'"
    )


def _braces(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [
        expanded
        for number in range(int(first), int(last) + 1)
        for expanded in _braces(f"{head}{number:0{len(first)}d}{tail}")
    ]


def _package_path(entry: str) -> str:
    package, _, rest = entry.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise SourceError(
            f"source {entry!r}: no installed package {package!r} that has a folder; install it or use a path"
        )
    return os.path.join(folders[0], rest) if rest else folders[0]


def _walk(folder: str, entry: str) -> list[str]:
    def refuse(error: OSError):  # os.walk itself would go on without the folder, and the data set shrink
        raise SourceError(
            f"source {entry!r}: {error.filename} cannot be listed ({error.strerror}); make it readable, or name the "
            "folders to read one by one"
        ) from error

    images, others, seen = [], Counter(), set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "lost+found")
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                images.append(os.path.join(root, name))
            else:
                others[suffix or "no suffix"] += 1
    if not images:
        found = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(4)) or "no files"
        hint = f"; to read its shards write {os.path.join(folder, '*.tar')!r}" if others[".tar"] else ""
        raise SourceError(f"source {entry!r}: the folder holds no image (found {found}){hint}")
    return images
