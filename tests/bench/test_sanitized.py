"""bench/sanitized.py: memcheck sees every operator, on dense tensors and views, and sizes that are wrong."""

import pytest
import sanitized
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_runs(monkeypatch, dtype):
    seen = set()

    def watch(name, function):
        def watched(first, *rest, **options):
            tensor = first[0].target if name == "align_losses" else first
            dense = "dense" if tensor.is_contiguous() else "a view"
            seen.add((name, dense, options.get("valid") is not None, options.get("deterministic")))
            if name == "deform_attn" and isinstance(rest[0], torch.Tensor):
                assert rest[0].prod(1).sum() != first.shape[1]  # wrong on purpose, for the kernels; not for plain torch
                rest = ([(5, 7), (1, 1), (3, 2)], *rest[1:])
                seen.add("sizes that are wrong")
            return function(first, *rest, **options)

        return watched

    for name in ("align_loss", "align_losses", "deform_attn", "moments", "resize_bilinear"):
        monkeypatch.setattr(sanitized, name, watch(name, getattr(sanitized, name)))
    sanitized.run("cpu", dtype)
    wanted = {(name, dense, False, None) for name in ("align_loss", "resize_bilinear") for dense in ("dense", "a view")}
    wanted |= {("moments", dense, masked, None) for dense in ("dense", "a view") for masked in (False, True)}
    wanted |= {("deform_attn", "dense", False, fixed) for fixed in (False, True)}
    assert seen == wanted | {("align_losses", "a view", False, None), "sizes that are wrong"}
