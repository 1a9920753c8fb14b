"""`compile=true` on a GPU, as far as it goes without one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from processes import HELPERS


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU inductor compiles for it by itself")
def test_what_inductor_writes_for_a_gpu_is_taken_by_triton():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HELPERS / "inductor_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] == {}
    assert found["kernels"] > 50
