"""What the owner of a run sees while it goes: bar, metrics.jsonl, TensorBoard, and the stop when a loss is not finite.

The losses of a step are averaged over ranks and copied to the host while the next step already runs: reading them costs
no wait on a GPU. So a NaN is noticed one step later, and `flush` looks at what is outstanding before a checkpoint is
written.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from kpu_fast.engine.distributed import World, shared
from kpu_fast.engine.run_folder import OutputError
from kpu_fast.machine import written_whole

METRICS = "metrics.jsonl"
NOT_FINITE = "step {step}: the gradient is not finite, though every loss is"


class Diverged(RuntimeError):
    """A loss term, or the gradient's length, is NaN or Inf."""


class _Pending(NamedTuple):
    step: int
    terms: list[str]
    shares: list[str]  # teachers with a share in the total; none where all count the same
    normed: bool  # whether the length of the gradient is there
    host: Tensor  # loss terms, shares, total, length of the gradient; % waited by each rank; ranks that want to stop
    copied: torch.cuda.Event | None
    facts: dict[str, float]  # what the host knew at once: lr, times


class Monitor:
    """Reports steps. Every rank makes one; rank 0 writes. `stop` turns true on all ranks at the same step.

    others: DeepSpeed's monitors (wandb …), which are told what TensorBoard is.
    """

    def __init__(self, folder: Path, world: World, *, start: int, steps: int, images_per_step: int, others=None):
        self.world, self.images_per_step, self.stop = world, images_per_step, False
        self._others = others
        self._pending: _Pending | None = None
        self._bar = self._file = self._board = None
        if world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            try:
                _keep_until(folder / METRICS, start)
                self._file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
            except OSError as error:
                raise OutputError(f"{error.filename or folder} cannot be written ({error.strerror})") from error
            quiet = 0.5 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=steps, initial=start, desc="train", unit="step", mininterval=quiet, dynamic_ncols=True
            )

    def push(
        self,
        step: int,
        terms: dict[str, Tensor],
        total: Tensor,
        grad_norm: Tensor | float | None,
        shares: dict[str, Tensor],
        want_stop: bool,
        facts: dict[str, float],
    ) -> None:
        """Hand in a step's losses and teachers' shares (device scalars), report the step before. Raises Diverged.

        grad_norm: of all ranks' gradients together, the same at each, before clipping; None where it was not computed.
        facts: this rank's; the report has rank 0's, and of data_wait_percent the largest, with its rank.
        """
        numbers = [*terms.values(), *shares.values(), total]
        if grad_norm is not None:
            # A number, or with an offloaded optimiser on the CPU.
            numbers.append(torch.as_tensor(grad_norm, dtype=torch.float32).to(total.device, non_blocking=True))
        vector = torch.stack([number.detach().float() for number in numbers])
        waited = vector.new_zeros(self.world.size)  # a rank that waits for data makes all others wait for it
        waited[self.world.rank].fill_(facts["data_wait_percent"])
        vector = torch.cat([vector / self.world.size, waited, vector.new_full((1,), float(want_stop))])
        dist.all_reduce(vector)
        host, copied = _to_host(vector)
        self.flush()
        self._pending = _Pending(step, list(terms), list(shares), grad_norm is not None, host, copied, facts)
        if copied is None:
            self.flush()

    def flush(self) -> None:
        """Report what is outstanding. Raises Diverged naming the terms that are not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.copied is not None:
            pending.copied.synchronize()
        *values, stop = pending.host.tolist()
        self.stop = self.stop or stop > 0
        waited = values[-self.world.size :]
        del values[-self.world.size :]
        facts = pending.facts | {"data_wait_percent": max(waited)}
        if self.world.size > 1:
            facts["data_wait_rank"] = waited.index(facts["data_wait_percent"])
        facts |= {"grad_norm": values.pop()} if pending.normed else {}
        total = values.pop()
        losses, shares = values[: len(pending.terms)], values[len(pending.terms) :]
        row = dict(zip(pending.terms, losses, strict=True)) | {"loss": total}
        bad = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
        if bad:
            # `loss` only repeats what the terms say, unless they are finite and their sum is not.
            raise shared(Diverged(f"step {pending.step}: {', '.join(bad[:-1] or bad)}"))
        if not math.isfinite(facts.get("grad_norm", 0.0)):
            raise shared(Diverged(NOT_FINITE.format(step=pending.step)))
        self._report(pending.step, row, dict(zip(pending.shares, shares, strict=True)), facts)

    def _report(self, step: int, row: dict[str, float], shares: dict[str, float], facts: dict[str, float]) -> None:
        if self._file is None:
            return
        seconds = facts["step_seconds"]
        record: dict[str, Any] = {"step": step} | row
        record |= {f"{name}/share": value for name, value in shares.items()} | facts
        record |= {"images_per_second": self.images_per_step / seconds, "time": time.time()}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            told = {f"loss/{key}": value for key, value in row.items()}
            told |= {f"share/{name}": value for name, value in shares.items()}
            keys = ("lr", "grad_norm", "images_per_second", "data_wait_percent")
            told |= {f"run/{key}": record[key] for key in keys if key in record}
            for tag, value in told.items():
                self._board.add_scalar(tag, value, step)
            if self._others is not None:
                self._others.write_events([(tag, value, step) for tag, value in told.items()])
        except OSError as error:
            raise OutputError(f"{self._file.name} or tensorboard/ cannot be written ({error.strerror})") from error
        teachers = {key.partition("/")[0] for key in row if "/" in key}
        per_teacher = {t: sum(v for k, v in row.items() if k.startswith(f"{t}/")) for t in sorted(teachers)}
        percent = {name: f" ({value:.0%})" for name, value in shares.items()}
        shown = [f"{name} {value:.3f}{percent.get(name, '')}" for name, value in per_teacher.items()]
        where = f" at rank {facts['data_wait_rank']}" if "data_wait_rank" in facts else ""
        shown += [f"{record['images_per_second']:.1f} img/s", f"data {facts['data_wait_percent']:.0f}%{where}"]
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line without tearing the bar; rank 0 only."""
        if self._bar is not None:
            self._bar.write(line)

    def close(self) -> None:
        """End the bar and the files."""
        if self._file is not None:
            self._bar.close()
            for writer in (self._file, self._board):
                with contextlib.suppress(OSError):  # a full disk was reported when a row could not be written
                    writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; lines that a kill or a full disk left damaged are left out."""
    rows = []
    for line in (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _keep_until(file: Path, step: int) -> None:
    """Drop the rows of steps that will be run again after resuming from `step`."""
    if not file.exists():
        return
    rows = [row for row in read_metrics(file.parent) if row["step"] <= step]
    with written_whole(file) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _to_host(vector: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if vector.device.type != "cuda":
        return vector, None
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    host.copy_(vector, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
