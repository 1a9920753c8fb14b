"""Export a student for programs that do not have kpu_fast, as torch.export's .pt2 or ONNX; or out of a checkpoint.

    python -m kpu_fast.export --student DIR --out FILE.pt2|FILE.onnx [--height H --width W] [--batch N] [--head NAME]
    python -m kpu_fast.export --run runs/NAME [--checkpoint step-N] --out DIR

A file has float32, images of one size, any batch unless --batch is given. It is read back and compared with the student
before it takes its place; a file of that name is replaced. With --run the student of a checkpoint is written, as the
end of the run writes one; the run may go on meanwhile.
Exit codes: 0 done; 2 a student, size or option that cannot be used; 3 the file does not compute what the student
computes; 4 it cannot be written; 130 interrupted.
"""

import argparse
import importlib.util
import io
import json
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import kpu_fast
from kpu_fast.models.hf_files import usual_size
from kpu_fast.models.student import Student

FORMATS = {".pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime")}  # suffix: packages needed beside torch
LARGEST_BATCH = 1024  # of a dynamic batch; torch.export wants to know that the number of cells fits in an int32
# |file − student| over |student|, Euclidean norms, of the worst output. A ViT with patches of 14 pixels resizes its
# images, and torch and onnxruntime both miss float64 by some 4e-6 there, each by its own: in the maps it was 1.1e-5.
TOLERANCE = {".pt2": 1e-5, ".onnx": 1e-4}
_ONNX_BYTES = 2**31  # of one file; a limit of protobuf


class ExportError(ValueError):
    """A student, size or option that cannot be used."""


class ParityError(RuntimeError):
    """The exported program does not compute what the student computes."""


class NamedOutputs(nn.Module):
    """images (B, 3, H, W) in [0, 1] → {"x": (B, C), "map8": (B, H/8, W/8, C), …}: maps are named by their stride.

    Where maps share a stride they are "map14_0", "map14_1", … in their order.
    head: None for the student's own features, or the teacher in whose space; x is left out where that has none.
    The student is taken over: with a head, what only the others need is dropped from it.
    """

    def __init__(self, student: Student, head: str | None = None):
        super().__init__()
        if head is not None:
            for name in set(student.heads) - {head}:
                del student.heads[name], student.head_specs[name]
            student.drop_unused_levels()
        else:
            student.heads.clear()
        self.student, self.head = student.float().eval().requires_grad_(False), head
        spec = student.spec if head is None else student.head_specs[head]
        self.names = ["x"] * (spec.x_dim is not None) + _map_names(spec.strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.student(images)
        if self.head is not None:
            features = self.student.project(features, self.head)
        values = [value for value in (features.x, *features.maps) if value is not None]
        return dict(zip(self.names, values, strict=True))


def _map_names(strides: tuple[float, ...]) -> list[str]:
    names = [f"map{stride:g}" for stride in strides]
    return [f"{name}_{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


@torch.no_grad()
def trace(model: NamedOutputs, height: int, width: int, batch: int | None = None) -> torch.export.ExportedProgram:
    """The program of `model` for images of one size, on the CPU. batch: None for any up to LARGEST_BATCH."""
    shape = None if batch else {"images": {0: torch.export.Dim("batch", max=LARGEST_BATCH)}}
    # Two images where any number will do: torch.export takes one for a constant.
    return torch.export.export(model, (torch.rand(batch or 2, 3, height, width),), dynamic_shapes=shape)


def save(program: torch.export.ExportedProgram, model: NamedOutputs, out: Path) -> None:
    """Write `program` as .pt2 or .onnx, by out's suffix, with a note of where it comes from."""
    note = {
        "kpu_fast": kpu_fast.__version__,
        "torch": torch.__version__,
        "head": model.head,
        "student": model.student.config,
    }
    if out.suffix == ".pt2":
        content = io.BytesIO()  # given a file that it cannot write, torch's own writer ends the process
        torch.export.save(program, content, extra_files={"kpu_fast.json": json.dumps(note)})
        out.write_bytes(content.getbuffer())
        return
    with _quiet_onnx():
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=model.names
        )
    written.model.metadata_props["kpu_fast"] = json.dumps(note)
    written.save(out, external_data=False)


@torch.no_grad()
def difference(out: Path, model: NamedOutputs, images: Tensor) -> float:
    """|file − model| / |model| on `images`, Euclidean norms over each output; the largest of the outputs'.

    Norms, not the worst value: a norm layer on a nearly constant cell makes much of the last bit, in eager mode too.
    .pt2 is run by torch, .onnx by onnxruntime on the CPU. Raises ParityError for outputs of other names or shapes.
    """
    expected = model(images)
    if out.suffix == ".pt2":
        found = torch.export.load(out).module()(images)
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        arrays = session.run(names, {"images": images.numpy()})
        found = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
    shapes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ParityError(f"the file gives {shapes[0]}, the student {shapes[1]}")
    tiny = torch.finfo(torch.float32).tiny
    shares = [(found[name] - value).norm() / value.norm().clamp(min=tiny) for name, value in expected.items()]
    return torch.stack(shares).max().item()  # NaN wins over every number


def export(student: Student, out: Path, *, height: int, width: int, batch: int | None, head: str | None) -> str:
    """Trace, write, read back, compare, move into place. Returns a line that says what was written.

    Raises ParityError, and OSError where the file cannot be written; nothing is left behind then.
    """
    model = NamedOutputs(student, head)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp{out.suffix}")  # torch goes by the suffix
    try:
        _say(f"tracing  {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {height}×{width} pixels")
        program = trace(model, height, width, batch)
        _say(f"writing  {out}")
        save(program, model, temporary)
        _say("checking")
        # Other images and, where it may vary, another batch than the one it was traced with.
        images = torch.rand(batch or 3, 3, height, width, generator=torch.Generator().manual_seed(0))
        share = difference(temporary, model, images)
        if not share <= TOLERANCE[out.suffix]:
            raise ParityError(
                f"it differs from the student by {share:.1e} of an output's norm, more than {TOLERANCE[out.suffix]:g}"
            )
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    size = out.stat().st_size / 2**20
    return (
        f"{out}: {size:.1f} MiB, images ({batch or 'any'}, 3, {height}, {width}) → {', '.join(model.names)}; "
        f"differs from the student by {share:.1e} of an output's norm"
    )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, export; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kpu_fast.export", description=__doc__.splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--student", metavar="DIR", help="a folder written by save_pretrained")
    given.add_argument("--run", type=Path, metavar="DIR", help="a run's folder: export the student of a checkpoint")
    parser.add_argument("--checkpoint", metavar="step-N", help="of the run (default: the newest)")
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help="a .pt2 or .onnx; with --run a folder")
    parser.add_argument("--height", type=int, help="of the images, in pixels (default: the width)")
    parser.add_argument("--width", type=int, help="of the images (default: the height, or what suits the student)")
    parser.add_argument("--batch", default="dynamic", help="a number of images, or %(default)s")
    parser.add_argument("--head", metavar="NAME", help="the teacher in whose space (default: the student's own)")
    args = parser.parse_args(argv)
    try:
        if args.run is not None:
            print(_export_checkpoint(parser, args))
            return 0
        if args.checkpoint is not None:
            raise ExportError(f"--checkpoint {args.checkpoint}: belongs to --run")
        batch = _checked_batch(args.batch)
        _check_out(args.out)
        student = _checked_student(args.student, args.head, args.out)
        height, width = _checked_size(student, args.height, args.width)
        print(export(student, args.out, height=height, width=width, batch=batch, head=args.head))
    except ExportError as error:
        return _fail(error, 2)
    except ParityError as error:
        return _fail(f"{args.out} was not written: {error}; torch {torch.__version__}", 3)
    except OSError as error:
        return _fail(f"{args.out} cannot be written ({error})", 4)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)
    return 0


def _export_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Write the student of a run's checkpoint into a folder; returns a line that says so."""
    extra = [
        f"--{name}" for name in ("height", "width", "batch", "head") if getattr(args, name) != parser.get_default(name)
    ]
    if extra:
        raise ExportError(f"{extra[0]}: belongs to --student; export the checkpoint first, then that folder")
    if args.out.is_file() or args.out.suffix in FORMATS:
        raise ExportError(f"--out {args.out}: expected a folder with --run; export its student to a file afterwards")
    try:
        from kpu_fast.engine.trained import TrainedError, load_student
    except ImportError as error:
        raise ExportError(f"--run needs what trains: pip install -e '.[train]' ({error})") from error
    try:
        student, card, name = load_student(args.run, args.checkpoint)
    except TrainedError as error:
        raise ExportError(f"--run: {error}") from error
    student.save_pretrained(args.out, card)
    return f"{args.out}: the student of {name}"


def _checked_batch(batch: str) -> int | None:
    if batch == "dynamic":
        return None
    if not batch.isdecimal() or int(batch) < 1:
        raise ExportError(f"--batch {batch}: expected a number of images, at least 1, or dynamic")
    return int(batch)


def _check_out(out: Path) -> None:
    if out.suffix not in FORMATS:
        raise ExportError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    missing = [name for name in FORMATS[out.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--out {out}: {out.suffix} needs {', '.join(missing)}; pip install {' '.join(missing)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ExportError(f"--out {out}: expected a file in a folder that exists")


def _checked_student(folder: str, head: str | None, out: Path) -> Student:
    try:
        student = Student.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(f"--student: {error}") from error
    if head is not None and head not in student.head_specs:
        raise ExportError(f"--head {head}: {folder} has heads for {', '.join(sorted(student.head_specs)) or 'none'}")
    size = 4 * sum(p.numel() for p in student.parameters())
    if out.suffix == ".onnx" and size >= _ONNX_BYTES:
        raise ExportError(f"--out {out}: {size / 2**30:.1f} GiB of weights, and an .onnx file holds 2; use .pt2")
    return student


def _checked_size(student: Student, height: int | None, width: int | None) -> tuple[int, int]:
    given = [value for value in (height, width) if value is not None] or [usual_size(student.vit.config)]
    height, width = given[0], given[-1]
    multiple = 16 if student.adapter is None else 32
    for option, value in (("--height", height), ("--width", width)):
        if value < multiple or value % multiple:
            near = max(1, round(value / multiple)) * multiple
            raise ExportError(f"{option} {value}: expected a multiple of {multiple}, such as {near}")
    return height, width


@contextmanager
def _quiet_onnx():
    """Without its warnings: of torchvision's operators, which are not needed, and of changes inside torch."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(error: Exception | str, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
