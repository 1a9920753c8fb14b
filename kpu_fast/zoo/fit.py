"""The loop that trains a network of the zoo: steps that can be repeated, checkpoints, a record of the losses."""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kpu_fast.zoo.pixels import generator

_SAVE_SECONDS = 120
_LOG_EVERY = 20
_TIMED = (5, 25)  # steps between which the clock decides how many fit into --minutes


class ZooError(ValueError):
    """Something the user gave or left behind cannot be used; the message says what, and what to do."""


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train: steps of `batch` images; peak learning rates of Muon and of AdamW."""

    steps: int
    batch: int
    muon_lr: float | None  # None: AdamW for every weight
    lr: float
    weight_decay: float = 0.02
    warmup: int = 60
    # True: forward and backward run in a bf16 copy of the weights. False: in fp32, for networks that compute
    # coordinates (the largest bf16 below 1 is 0.996: a box cannot come closer to a border).
    bf16_copy: bool = True


def fit(
    net: nn.Module,
    loss_of_step: Callable[[nn.Module, int], dict[str, Tensor]],
    recipe: Fit,
    folder: Path,
    *,
    device: torch.device,
    seed: int,
    name: str,
    facts: dict,
    minutes: float | None = None,
) -> dict:
    """Train `net` in place; returns {"steps", "seconds", "images", "loss"}.

    loss_of_step(network, step) → {"loss": to minimise, others: to record}, all its randomness from (seed, step) or from
    torch's generator, which is seeded before each step. folder holds checkpoint.pt and metrics.jsonl; a checkpoint in
    it is gone on from, on a CPU to the same bits as without the break. facts: what it must agree with for that.
    minutes: replaces recipe.steps by what fits, measured over 20 steps. Raises ZooError when the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    net.to(device).train()
    work = copy.deepcopy(net).to(torch.bfloat16) if recipe.bf16_copy else net
    optimizers = _optimizers(net, recipe)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    facts = {**facts, "seed": seed, "minutes": minutes}
    state = {"step": 0, "seconds": 0.0, "steps": None if minutes else recipe.steps, "loss": None}
    saved = _load(folder / "checkpoint.pt", facts, name)
    if saved:
        net.load_state_dict(saved["net"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state = saved["state"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # after loading, which renews them
    metrics = _open_metrics(folder / "metrics.jsonl", state["step"])
    began = time.monotonic() - state["seconds"]
    last_save, timed_from, look_at, seen = time.monotonic(), None, _TIMED[0], []  # look_at the clock

    def save():
        state["seconds"] = time.monotonic() - began
        values = {
            "net": net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "state": state,
            "facts": facts,
        }
        temporary = folder / "checkpoint.tmp"
        try:
            torch.save(values, temporary)
        except RuntimeError as error:  # what a full disk comes as
            raise OSError(f"{temporary} cannot be written ({error})") from error
        os.replace(temporary, folder / "checkpoint.pt")

    bar = tqdm(total=state["steps"], initial=state["step"], desc=name, unit="step", dynamic_ncols=True, mininterval=5)
    with metrics, bar:
        while state["steps"] is None or state["step"] < state["steps"]:
            step = state["step"]
            if state["steps"] is None and step >= look_at:
                if seen:
                    seen[-1]["loss"].item()  # waits for a GPU, which the clock below does not
                if timed_from is None:
                    timed_from, look_at = (step, time.monotonic()), step + _TIMED[1] - _TIMED[0]
                else:
                    per_step = (time.monotonic() - timed_from[1]) / (step - timed_from[0])
                    bar.total = state["steps"] = max(step + 1, int(minutes * 60 / per_step))
            # Until the clock has decided, the rate is that of the beginning, so the schedule does not depend on it.
            progress = step / state["steps"] if state["steps"] else 0.0
            rate = _schedule(step, progress, recipe.warmup)
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * rate
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator(seed, 2, step))))
            seen.append(_step(net, work, optimizers, lambda step=step: loss_of_step(work, step)))
            state["step"] = step + 1
            bar.update()
            if state["step"] % _LOG_EVERY == 0 or state["step"] == state["steps"]:
                means, seen = _means(seen, name, state["step"]), []
                state["loss"] = means["loss"]
                seconds = round(time.monotonic() - began, 1)
                metrics.write(json.dumps({"step": state["step"], **means, "rate": rate, "seconds": seconds}) + "\n")
                metrics.flush()
                bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
                # Here alone, so that the record of a run that goes on has no gap.
                if time.monotonic() - last_save > _SAVE_SECONDS or state["step"] == state["steps"]:
                    save()
                    last_save = time.monotonic()
    net.eval()
    return {
        "steps": state["step"],
        "seconds": state["seconds"],
        "images": state["step"] * recipe.batch,
        "loss": state["loss"],
    }


def _step(net: nn.Module, work: nn.Module, optimizers: list, losses_of: Callable) -> dict[str, Tensor]:
    """One step of `net`'s weights by gradients from `work`: net itself, or its copy in bf16. Returns the losses."""
    if work is not net:
        _copy_weights(net, work)
    losses = losses_of()
    losses["loss"].backward()
    if work is not net:
        _move_gradients(work, net)
    else:
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {key: value.detach().float() for key, value in losses.items()}


def _means(seen: list[dict[str, Tensor]], name: str, step: int) -> dict[str, float]:
    means = {key: torch.stack([row[key] for row in seen]).mean().item() for key in seen[0]}
    if not all(map(math.isfinite, means.values())):
        raise ZooError(
            f"{name}: the loss is {means['loss']} at step {step}; a smaller learning rate in kpu_fast/zoo/recipes.py "
            "may help (the checkpoint before it is kept)"
        )
    return means


def _schedule(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up; then the peak for a tenth of the time, and a straight line to 0."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (1 - progress) / 0.9)


def _optimizers(net: nn.Module, recipe: Fit) -> list[torch.optim.Optimizer]:
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    # Muon is for matrices between hidden states: not for embeddings, tables, first and last layers, nor coordinates.
    other = ("bias_table", "sampling_offsets", "attention_weights", "bbox_embed")
    matrices = [
        p
        for name, p in trained.items()
        if recipe.muon_lr
        and p.ndim == 2
        and (".layers." in name or ".layer." in name)
        and not any(part in name for part in other)
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in chosen]
    made = [torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98))]
    if matrices:
        rates = {"lr": recipe.muon_lr, "weight_decay": recipe.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        made.append(torch.optim.Muon(matrices, **rates))
    return made


@torch.no_grad()
def _copy_weights(net: nn.Module, work: nn.Module) -> None:
    for ours, theirs in zip(net.state_dict().values(), work.state_dict().values(), strict=True):
        theirs.copy_(ours)


def _move_gradients(work: nn.Module, net: nn.Module) -> None:
    for theirs, ours in zip(work.parameters(), net.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.float()
        theirs.grad = None


def _load(path: Path, facts: dict, name: str) -> dict | None:
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ZooError(f"{path}: not a checkpoint that can be read ({error}); remove it to begin again") from error
    if not isinstance(saved, dict) or not {"net", "optimizers", "state", "facts"} <= saved.keys():
        raise ZooError(f"{path}: not a checkpoint of this command; remove it to begin again")
    different = [key for key, value in facts.items() if saved["facts"].get(key) != value]
    if different:
        raise ZooError(
            f"{path}: {name} was begun with different {' and '.join(different)}; run the same command on the same kind "
            f"of device to go on, or remove {path.parent} to begin again"
        )
    return saved


def _open_metrics(path: Path, step: int):
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step]
    path.write_text("".join(row + "\n" for row in kept))
    return path.open("a")
