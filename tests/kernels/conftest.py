"""Runs the Triton kernels on the GPU where there is one, in Triton's interpreter elsewhere."""

import os
import sys

import pytest
import torch

# Triton reads the variable when it is imported, so this cannot wait for a fixture. Harmless to every other test: on the
# CPU impl="auto" is the torch path whatever the variable says.
_TOO_LATE = "triton.language" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def impl(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if _TOO_LATE and not torch.cuda.is_available():
            pytest.fail("triton was imported before TRITON_INTERPRET=1 was set; set it in the environment of this run")
    return request.param
