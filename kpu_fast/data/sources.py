"""From what a user writes as `source` to the files behind it."""

import errno
import glob
import importlib.util
import os
import re
import stat
import tarfile
from collections import Counter
from typing import BinaryIO, NamedTuple

_SUFFIXES = "jpg jpeg jpe jfif png bmp webp tif tiff ppm pgm pbm pnm jp2 gif avif"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split())
PACKAGE_PREFIX = "package:"
CANNOT_BE_READ = "cannot be read"  # how a problem begins that may pass
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_BLOCK = 512
_TAIL_CHUNK = 1 << 16
_TAR_ERRORS = (tarfile.TarError, ValueError)  # ValueError: of a damaged pax header


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


class Shard(NamedTuple):
    """What a tar shard holds; its problem is what is wrong with the tar, or None.

    images: one per sample. rejected: (name, reason) of images that cannot be read. further: names of a sample's other
    images, and of images that came again under their name. ignored: number of the other members.
    """

    images: list[Candidate]
    rejected: list[tuple[str, str]]
    further: list[str]
    ignored: int
    problem: str | None


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
    return survey(source)[0]


def survey(source: str | list[str]) -> tuple[list[SourceFile], list[str]]:
    """What `list_files` gives, and the paths of the other files in the folders that it searched."""
    paths: dict[str, None] = {}
    others: dict[str, None] = {}
    for entry in normalise(source):
        for path in _expand(entry):
            images, rest = _walk(path, entry) if os.path.isdir(path) else ([path], [])
            paths.update(dict.fromkeys(images))
            others.update(dict.fromkeys(rest))
    return [_source_file(path) for path in paths], [path for path in others if path not in paths]


def _source_file(path: str) -> SourceFile:
    try:
        found = os.stat(path)
    except OSError:
        return SourceFile(path, 0, 0)
    return SourceFile(path, found.st_size, found.st_mtime_ns)


def is_shard(path: str) -> bool:
    """Whether `path` is read as a WebDataset shard (by its suffix)."""
    return path.endswith(".tar")


def open_regular(path: str) -> BinaryIO:
    """`path`, opened for reading. Raises OSError, also for what is no regular file: a pipe would wait for a writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "no regular file", path)
    return open(path, "rb")


def read_shard(number: int, file: SourceFile) -> Shard:
    """The images of tar shard `file`, number `number` of its source. A shard cut short keeps the whole members.

    A WebDataset sample (members that share the name up to the first dot) gives one image: the one with the plainest
    extension (`0.jpg` rather than `0.depth.png`).
    """
    members, replaced, problem = tar_members(file)
    further = [name for name in replaced if _is_image(name)]
    ignored = len(replaced) - len(further)
    rejected = []
    samples: dict[str, str] = {}
    for name, member in members.items():
        key, suffixes = split_member(name)
        if not _is_image(name):
            ignored += 1
        elif member is None:
            rejected.append((f"{file.path}::{name}", "a link to nothing in its tar"))
        elif member.issparse():
            rejected.append((f"{file.path}::{name}", "stored sparse: pack it without --sparse"))
        elif key not in samples:
            samples[key] = name
        elif len(suffixes) < len(split_member(samples[key])[1]):
            further.append(samples[key])
            samples[key] = name
        else:
            further.append(name)
    images = [
        Candidate(number, members[name].offset_data, members[name].size, f"{file.path}::{name}")
        for name in samples.values()
    ]
    return Shard(images, rejected, further, ignored, problem)


def tar_members(file: SourceFile) -> tuple[dict[str, tarfile.TarInfo | None], list[str], str | None]:
    """Name → the member of tar `file` with its bytes; the names that came again; what is wrong with the tar, or None.

    As for `tar x`, the last member of a name counts, and a link is what it leads to; None where that is not in the tar.
    """
    found: dict[str, tarfile.TarInfo | str | None] = {}
    replaced: list[str] = []
    try:
        with open_regular(file.path) as stream:
            problem = _read_members(stream, file.size, found, replaced)
    except OSError as error:
        problem = f"{CANNOT_BE_READ} ({error.strerror or error})"
    return {name: _follow(found, target) for name, target in found.items()}, replaced, problem


def _read_members(stream: BinaryIO, size: int, found: dict, replaced: list[str]) -> str | None:
    """Fill `found` (name → member, or where a symbolic link leads) and `replaced`; returns what is wrong."""
    try:
        tar = tarfile.TarFile(fileobj=stream)
    except _TAR_ERRORS as error:
        stream.seek(0)
        gzip = stream.read(2) == b"\x1f\x8b"
        return "compressed: unpack it first (gunzip)" if gzip else f"not a readable tar ({error})"
    try:
        for member in tar:
            name = os.path.normpath(member.name)
            if member.isreg():
                if not member.issparse() and member.offset_data + member.size > size:
                    return f"cut short inside {member.name}"
                target = member
            elif member.islnk():
                target = found.get(os.path.normpath(member.linkname))
            elif member.issym():
                target = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
            else:
                continue
            if name in found:
                replaced.append(name)
            found[name] = target
    except _TAR_ERRORS as error:
        return f"unreadable from byte {tar.offset:,} on ({error})"
    return _tail_problem(stream, tar.offset, size)


def _follow(found: dict[str, tarfile.TarInfo | str | None], target: tarfile.TarInfo | str | None):
    seen = set()
    while isinstance(target, str) and target not in seen:
        seen.add(target)
        target = found.get(target)
    return None if isinstance(target, str) else target


def _is_image(member: str) -> bool:
    return os.path.splitext(member)[1].lower() in IMAGE_SUFFIXES and split_member(member)[0] != ""


def split_member(name: str) -> tuple[str, list[str]]:
    """What the members of one WebDataset sample have in common, and the suffixes of this one."""
    folder, base = os.path.split(name)
    stem, *suffixes = base.split(".")
    return (f"{folder}/{stem}" if stem else ""), suffixes  # a leading dot: no sample, as in WebDataset


def _tail_problem(stream: BinaryIO, end: int, size: int) -> str | None:
    # tarfile takes a damaged or missing header after the first member for the end of the archive without a word.
    stream.seek(end)
    mark = stream.read(_TAR_BLOCK)
    if len(mark) < _TAR_BLOCK:
        return f"cut short at byte {end:,} (no end-of-archive mark)"
    if any(mark):
        return f"unreadable from byte {end:,} on"
    while chunk := stream.read(_TAIL_CHUNK):
        if rest := len(chunk.lstrip(b"\0")):
            after = size - (stream.tell() - rest)
            return f"{after:,} bytes after the end-of-archive mark are not read; joined tars? (`tar -A` joins rightly)"
    return None


def _expand(entry: str) -> list[str]:
    path = _package_path(entry) if entry.startswith(PACKAGE_PREFIX) else entry
    matches = {path: [path]} if os.path.exists(path) else {p: glob.glob(p, recursive=True) for p in _braces(path)}
    found = sorted({match for matched in matches.values() for match in matched})
    if found:
        missing = [pattern for pattern, matched in matches.items() if not matched]
        if missing:
            named = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
            raise SourceError(
                f"source {entry!r}: {len(missing)} of {len(matches)} in the range are not there ({named}); fetch them, "
                "or change the range"
            )
        if path.endswith(_COMPRESSED) and not os.path.isdir(path):
            raise SourceError(f"source {entry!r}: compressed: unpack it first")
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


def _walk(folder: str, entry: str) -> tuple[list[str], list[str]]:
    """The paths of the images below `folder`, and of the other files."""

    def refuse(error: OSError):  # os.walk itself would go on without the folder, and the data set shrink
        raise SourceError(
            f"source {entry!r}: {error.filename} cannot be listed ({error.strerror}); make it readable, or name the "
            "folders to read one by one"
        ) from error

    images, others, seen = [], [], set()
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
                others.append(os.path.join(root, name))
    if not images:
        suffixes = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in others)
        found = ", ".join(f"{count} × {suffix}" for suffix, count in suffixes.most_common(4)) or "no files"
        hint = f"; to read its shards write {os.path.join(folder, '*.tar')!r}" if suffixes[".tar"] else ""
        raise SourceError(f"source {entry!r}: the folder holds no image (found {found}){hint}")
    return images, others
