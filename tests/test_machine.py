import pytest
import torch

from kpu_fast.machine import device_name, missing, usable_device


def test_what_is_missing_is_named():
    assert missing("torch json") is None
    assert missing("torch no_such_thing nor_this").startswith("not installed: no_such_thing, nor_this; pip install")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"--device {name}: cannot be used here"):
        usable_device(name)


def test_a_device_and_its_name():
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    assert device_name(torch.device("cpu")).endswith(f"{threads} thread{'s' * (threads > 1)} (CPU)")
