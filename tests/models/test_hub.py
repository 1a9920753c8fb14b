"""What of the hub's loader no teacher and no ViT shows; their own tests load checkpoints, whole and broken."""

import re

import pytest

from kpu_fast.models.hub import WeightsError, _wanted_files, read_json


def test_of_a_hub_repository_only_what_is_read_is_fetched():
    both = ["README.md", "config.json", "flax_model.msgpack", "preprocessor_config.json", "onnx/model.safetensors"]
    pickled = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    sharded = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    small = ["config.json", "preprocessor_config.json"]
    assert sorted(_wanted_files(both + pickled + sharded)) == sorted(sharded + small)
    assert sorted(_wanted_files(both + pickled)) == sorted(pickled[:2] + small)


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
