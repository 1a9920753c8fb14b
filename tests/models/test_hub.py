"""What of the hub's loader no teacher and no ViT shows; their own tests load checkpoints, whole and broken."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from kpu_fast.models import Student
from kpu_fast.models.hub import WeightsError, _wanted_files, read_json


def test_of_a_hub_repository_only_what_is_read_is_fetched():
    both = ["README.md", "config.json", "flax_model.msgpack", "preprocessor_config.json", "onnx/model.safetensors"]
    pickled = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    sharded = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    small = ["config.json", "preprocessor_config.json"]
    assert _wanted_files(both + pickled + sharded) == [small, sharded[:1], sharded[1:]]
    assert _wanted_files(both + pickled) == [small, pickled[:1], pickled[1:2]]


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for one repository, lab/net."""

    files = dict.fromkeys(
        ["config.json", "model.safetensors", "preprocessor_config.json", "README.md", "net.h5"], b"{}"
    )
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        self.asked.append(path)
        headers = {"X-Repo-Commit": "a" * 40}
        if path.startswith("/api/models/lab/net/tree/"):
            found = [{"type": "file", "oid": "b" * 40, "size": len(x), "path": f} for f, x in self.files.items()]
            body = json.dumps(found).encode()
        elif path.startswith("/api/models/lab/net"):
            siblings = [{"rfilename": file} for file in self.files]
            body = json.dumps({"id": "lab/net", "sha": "a" * 40, "siblings": siblings}).encode()
        else:
            body = self.files[name]
            headers["ETag"] = f'"{name}"'
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_what_was_fetched_is_found_again_without_a_network(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    environment = os.environ | own | {"HF_HUB_DISABLE_XET": "1"}
    code = "from kpu_fast.models.hub import find_folder; print(find_folder('some.key', 'lab/net'{}))"

    def find(more=""):
        done = subprocess.run(
            [sys.executable, "-c", code.format(more)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.splitlines()[-1])

    first = find()
    assert sorted(path.name for path in first.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    fetched = [path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path]
    assert fetched.index("preprocessor_config.json") < fetched.index("model.safetensors")
    Hub.asked.clear()
    assert find() == first
    assert Hub.asked == []
    processor = first / "preprocessor_config.json"
    processor.unlink()  # as where transformers' from_pretrained fetched the weights alone
    assert find() == first
    assert Hub.asked == []
    assert find(", processor=True") == first
    assert processor.is_file()
    processor.unlink()
    server.shutdown()
    server.server_close()
    assert find() == find(", processor=True") == first
    assert not processor.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[]", b"3", b"null"])
def test_only_a_json_object_will_do(tmp_path, content):
    path = tmp_path / "config.json"
    with pytest.raises(WeightsError, match=rf"^some\.key: {re.escape(str(path))} .*fetch it again"):
        read_json("some.key", path)  # no file at all
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"^some\.key: {re.escape(str(path))} .*fetch it again"):
        read_json("some.key", path)
    path.write_text('{"model_type": "dinov2"}')
    assert read_json("some.key", path) == {"model_type": "dinov2"}


def test_a_student_comes_from_the_hub(tmp_path):
    student = Student(vit={"dim": 32, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 32}, adapter=None)
    student.save_pretrained(tmp_path / "student")
    files = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("StudentHub", (Hub,), {"files": files, "asked": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    code = """
import torch
from kpu_fast.models import Student
print(sum(p.double().sum() for p in Student.from_pretrained("lab/net").parameters()).item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own | {"HF_HUB_DISABLE_XET": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    expected = sum(p.double().sum() for p in student.parameters()).item()
    assert float(done.stdout.splitlines()[-1]) == expected
