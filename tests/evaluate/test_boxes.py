"""Average precision where nothing was found: what has no true box has no figure."""

import pytest
import torch

pytest.importorskip("pycocotools")

from kpu_fast.evaluate.boxes import Truth, average_precision

NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
FALSE = {"boxes": torch.tensor([[300.0, 300, 310, 310]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}
SIZES = ("ap_small", "ap_medium", "ap_large")


def truth(side: float, *, crowd: bool = False) -> Truth:
    box = torch.tensor([[0.0, 0, side, side]])
    return Truth(box, torch.tensor([0]), torch.tensor([side * side]), torch.tensor([crowd]))


@pytest.mark.parametrize("found", [NOTHING, FALSE], ids=["nothing found", "a false box"])
def test_sizes_without_a_true_box_have_no_figure(found):
    result = average_precision([truth(200)], [found], ["a"])
    assert [result[size] for size in SIZES] == [None, None, 0.0]
    assert [result[name] for name in ("ap", "ap50", "ap75", "ar1", "ar10", "ar100")] == [0.0] * 6


@pytest.mark.parametrize("found", [NOTHING, FALSE], ids=["nothing found", "a false box"])
def test_a_crowd_alone_has_no_figure(found):
    assert set(average_precision([truth(200, crowd=True)], [found], ["a"]).values()) == {None}


def test_no_true_box_and_none_found_has_no_figure():
    empty = Truth(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0).bool())
    assert set(average_precision([empty], [NOTHING], ["a"]).values()) == {None}
