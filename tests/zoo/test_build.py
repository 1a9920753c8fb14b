"""A tiny zoo trained end to end: its folders load where they are meant to, its cards say what was measured."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kpu_fast.data.labelled import LabelledImages, to_batch
from kpu_fast.data.sources import SourceError
from kpu_fast.evaluate.knn import knn
from kpu_fast.evaluate.zero_shot import class_names
from kpu_fast.models.teachers import build_teacher
from kpu_fast.models.vit import ViT
from kpu_fast.zoo import build
from kpu_fast.zoo.__main__ import main
from kpu_fast.zoo.build import build_zoo
from kpu_fast.zoo.dinov2 import save_dinov2
from kpu_fast.zoo.fit import ZooError
from kpu_fast.zoo.pixels import Pixels
from kpu_fast.zoo.sample import balanced

NAMES = ("clip", "gdino", "dinov2")


@pytest.fixture(scope="module")
def made(shapes, tiny, tmp_path_factory):
    """(folder, what build_zoo returned, what it said)"""
    out = tmp_path_factory.mktemp("made") / "zoo"
    said = []
    torch.set_num_threads(1)
    figures = build_zoo(
        LabelledImages(shapes / "train"), LabelledImages(shapes / "test"), out, zoo=tiny, say=said.append
    )
    return out, figures, said


def teacher(folder, kind, size):
    cfg = SimpleNamespace(kind=kind, weights=str(folder), arch={}, levels=None)
    return build_teacher("t", cfg, device="cpu", dtype=torch.float32, image_size=(size, size))


def test_the_production_loaders_take_the_folders(made, shapes, monkeypatch):
    out, *_ = made
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images = to_batch([LabelledImages(shapes / "test")[i][0] for i in (0, 10, 20)], 64)
    clip = teacher(out / "clip", "clip", 64)
    assert clip.spec.x_dim == 24
    found = clip(images)
    assert found.x.isfinite().all()
    assert (found.x[0] - found.x[1]).abs().max() > 1e-3
    gdino = teacher(out / "gdino", "grounding_dino", 64)
    assert gdino.spec.strides == (8, 16, 32)
    assert gdino.spec.map_dims == (32, 64, 128)
    assert all(m.isfinite().all() for m in gdino(images).maps)
    # The sentinel's own code and transformers' agree on it.
    vit = ViT.from_hf(out / "dinov2")
    reference = teacher(out / "dinov2", "dinov2", 64)(images)
    with torch.no_grad():
        cls, patches = vit(images)
    assert (cls - reference.x).abs().max() < 1e-4
    assert (patches - reference.maps[0]).abs().max() < 1e-4


def test_weights_are_bf16_and_text_needs_no_network(made, monkeypatch):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPModel

    out, *_ = made
    for name in NAMES:
        state = load_file(out / name / "model.safetensors")
        assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.bfloat16}
        assert (out / name / "model.safetensors").stat().st_mode & 0o444 == 0o444
    tokenizer = AutoTokenizer.from_pretrained(out / "clip", local_files_only=True)
    tokens = tokenizer(["a photo of a box", "Größe"], padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        text = model.get_text_features(**tokens).pooler_output
    assert text.shape == (2, 24)
    assert (text[0] - text[1]).abs().max() > 1e-3
    assert tokenizer("box")["input_ids"] == tokenizer(["box"], padding=True)["input_ids"][0]
    for name in ("clip", "gdino"):
        saved = json.loads((out / name / "tokenizer.json").read_text())
        assert saved["padding"] is None
        assert saved["truncation"] is None
    words = AutoTokenizer.from_pretrained(out / "gdino", local_files_only=True)
    assert words("box. stick.")["input_ids"].count(1012) == 2
    for known in (tokenizer, words):  # the folder was called red_ball; evaluation asks for what people write
        assert [token.removesuffix("</w>") for token in known.tokenize("red ball")] == ["red", "ball"]


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_what_was_measured(made, tiny, name):
    out, figures, said = made
    card, record = (out / name / "README.md").read_text(), json.loads((out / name / "training.json").read_text())
    assert record["figures"] == figures[name]
    for key, row in figures[name].items():
        assert f"| {key} | {row['value']:.4f} | {row['on']} |" in card
    phases = record["phases"]
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    assert [phase["loss"] for phase in phases.values()] == [row["loss"] for row in rows if row["step"] == 3]
    steps = "3 steps, 24 images seen" if name != "gdino" else "3 steps, 6 mosaics seen"
    assert steps in card
    assert "72 from `" in card
    assert f"| commit | {record['commit'] or 'unknown'} |" in card
    assert "3: box, red ball, stick" in card
    assert "CIFAR" not in card  # these images are not its
    assert str(out.parent) not in card + json.dumps(record)  # nor are a machine's folders anyone's business
    assert record["recipe"] == json.loads(json.dumps(build.asdict(getattr(tiny, name))))
    assert any(str(out / name) in line for line in said)


def test_the_reported_figures_are_those_of_the_saved_weights(made, shapes):
    """Zero-shot once more, by transformers alone."""
    from transformers import AutoTokenizer, CLIPModel

    from kpu_fast.models.mean_std import CLIP_MEAN_STD
    from kpu_fast.zoo.clip import TEMPLATES

    out, figures, _ = made
    model = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "clip", local_files_only=True)
    test = LabelledImages(shapes / "test")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in CLIP_MEAN_STD)
    with torch.no_grad():
        pixels = (to_batch([test[i][0] for i in range(len(test))], 64) - mean) / std
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = 0
        for template in TEMPLATES:
            texts = [template.format(c) for c in class_names(test, None)]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            text += torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
    found = (image @ torch.nn.functional.normalize(text, dim=1).T).argmax(1)
    accuracy = (found == torch.tensor(test.labels)).float().mean().item()
    assert accuracy == pytest.approx(figures["clip"]["zero-shot top-1"]["value"], abs=1e-6)


def test_figures_are_of_the_test_images(tiny, monkeypatch):
    train, test = (
        Pixels(torch.zeros(n, 8, 8, 3, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), ("a", "b")) for n in (5, 7)
    )
    seen = []

    def figures(_, *given, **options):
        seen.append(next(images for images in reversed(given) if isinstance(images, Pixels)))
        return {"top1": 0.5, "k": 3, "ap": 0.5, "ap50": 0.5, "ap75": 0.5}

    for name in ("load_encoder", "load_detector", "embed_texts"):
        monkeypatch.setattr(build, name, lambda *_, **__: None)
    for name in ("zero_shot", "knn", "detect"):
        monkeypatch.setattr(build, name, figures)
    monkeypatch.setattr(build, "Mosaics", lambda images, *_: images)
    for name in NAMES:
        build._measure(name, getattr(tiny, name), None, train, test, torch.device("cpu"), 0)
    assert len(seen) == 3
    assert all(images is test for images in seen)


def test_cifar10_gets_a_word_on_its_licence(made, tmp_path):
    from kpu_fast.zoo.card import _CIFAR10, write_card

    record = json.loads((made[0] / "clip" / "training.json").read_text()) | {"classes": list(_CIFAR10)}
    write_card(tmp_path, "clip", record, record["phases"], record["figures"])
    assert "names no\nlicence" in (tmp_path / "README.md").read_text()


def test_samples_are_balanced_and_as_found(made, shapes):
    out, *_ = made
    train, source = LabelledImages(out / "images" / "train.tar"), LabelledImages(shapes / "train")
    assert source.classes == ("box", "red_ball", "stick")
    assert train.classes == ("box", "red ball", "stick")
    assert train.labels == source.labels
    assert [train.encoded(i) for i in range(72)] == [source.encoded(i) for i in range(72)]
    assert len(LabelledImages(out / "images" / "test.tar")) == 30
    labels = [0] * 5 + [1, 2] * 2 + [1]
    assert balanced(labels, 6) == [0, 1, 5, 6, 7, 8]
    assert balanced(labels, 100) == list(range(10))
    with tarfile.open(out / "images" / "train.tar") as tar:
        assert tar.getnames()[:4] == ["000000.png", "000000.cls", "000001.png", "000001.cls"]


def test_what_is_finished_stays_and_what_is_foreign_is_not_touched(made, shapes, tiny, tmp_path):
    out, *_ = made
    train, test = LabelledImages(shapes / "train"), LabelledImages(shapes / "test")
    before = (out / "clip" / "model.safetensors").read_bytes()
    said = []
    assert build_zoo(train, test, out, zoo=tiny, say=said.append) == {}
    assert len(said) == 3
    assert all("left as it is" in line for line in said)
    assert (out / "clip" / "model.safetensors").read_bytes() == before
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "mine.txt").write_text("x")
    with pytest.raises(ZooError, match="clip: is in the way"):
        build_zoo(train, test, tmp_path, zoo=tiny)
    assert (tmp_path / "clip" / "mine.txt").read_text() == "x"
    with build._alone(out), pytest.raises(ZooError, match="another run is writing"):
        build_zoo(train, test, out, zoo=tiny)


def test_an_interrupted_zoo_goes_on(made, shapes, tiny, tmp_path, monkeypatch):
    """Ctrl-C between training and measuring: nothing half made is in sight, and the same command ends as without."""
    out, *_ = made
    images = LabelledImages(shapes / "train"), LabelledImages(shapes / "test")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "zero_shot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_zoo(*images, tmp_path, zoo=tiny, only=("clip",))
    assert not (tmp_path / "clip").exists()
    monkeypatch.undo()
    build_zoo(*images, tmp_path, zoo=tiny, only=("clip",), say=lambda line: None)
    torch_bytes = [(folder / "clip" / "model.safetensors").read_bytes() for folder in (out, tmp_path)]
    assert torch_bytes[0] == torch_bytes[1]


def test_a_checkpoint_knows_its_images(shapes, tiny, tmp_path, monkeypatch):
    """As many others, of the same names, are others; and so are the same of another class."""
    train, test = tmp_path / "train", LabelledImages(shapes / "test")
    shutil.copytree(shapes / "train", train)

    def build():
        build_zoo(LabelledImages(train), test, tmp_path / "zoo", zoo=tiny, only=("clip",), say=lambda line: None)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kpu_fast.zoo.build.zero_shot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build()
    monkeypatch.undo()
    shutil.copy(shapes / "test" / "box" / "00.png", train / "box" / "00.png")
    with pytest.raises(ZooError, match="clip was begun with different images"):
        build()
    shutil.copy(shapes / "train" / "box" / "00.png", train / "box" / "00.png")
    build()
    pixels = Pixels(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    assert pixels.digest() != dataclasses.replace(pixels, labels=torch.tensor([1, 0])).digest()


def test_a_broken_sample_is_made_anew(shapes, tmp_path, monkeypatch):
    images = LabelledImages(shapes / "train"), LabelledImages(shapes / "test")

    def interrupted(folder, *rest):
        folder.mkdir()
        (folder / "train.tar").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_zoo(*images, tmp_path / "zoo", only=())
    assert not (tmp_path / "zoo" / "images").exists()
    monkeypatch.undo()
    build_zoo(*images, tmp_path / "zoo", only=())
    found = {path.name for path in (tmp_path / "zoo" / "images").iterdir()}
    assert found == {"train.tar", "test.tar", "classes.txt"}
    assert len(LabelledImages(tmp_path / "zoo" / "images" / "train.tar")) == 72


def test_no_sample_is_written_of_images_that_do_not_decode(shapes, tmp_path):
    shutil.copytree(shapes / "train", tmp_path / "train")
    (tmp_path / "train" / "box" / "00.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"00\.png: not an image"):
        build_zoo(LabelledImages(tmp_path / "train"), LabelledImages(shapes / "test"), tmp_path / "zoo", only=())
    assert not (tmp_path / "zoo" / "images").exists()


def test_small_sets_and_banks_are_counted_as_they_are(shapes, tiny, tmp_path, monkeypatch):
    """A batch is at most the set; what kNN looks among has every class though the images are sorted by class."""
    banks = []

    def watched(encoder, bank, test, **kwargs):
        banks.append(bank)
        return knn(encoder, bank, test, **kwargs)

    monkeypatch.setattr(build, "_BANK", 30)
    monkeypatch.setattr(build, "knn", watched)
    fit = dataclasses.replace(tiny.dinov2.fit, batch=256)
    zoo = dataclasses.replace(tiny, dinov2=dataclasses.replace(tiny.dinov2, fit=fit))
    images = LabelledImages(shapes / "train"), LabelledImages(shapes / "test")
    build_zoo(*images, tmp_path, zoo=zoo, only=("dinov2",), say=lambda line: None)
    card = (tmp_path / "dinov2" / "README.md").read_text()
    assert "3 steps, 216 images seen" in card
    assert "20 nearest of 30 training images drawn at random" in card
    assert len(banks[0]) == 30
    assert min(banks[0].labels.bincount(minlength=3)) >= 5
    assert build._within(tiny.gdino, 5).classify.batch == 5
    assert build._within(tiny.gdino, 1).fit == tiny.gdino.fit  # of mosaics there are any number


def test_what_cannot_be_measured_is_not_handed_over(shapes, tiny, tmp_path, monkeypatch):
    def broken(vit, folder):
        vit.layernorm.bias.data[0] = torch.nan
        save_dinov2(vit, folder)

    monkeypatch.setattr(build, "save_dinov2", broken)
    images = LabelledImages(shapes / "train"), LabelledImages(shapes / "test")
    message = r"dinov2 cannot be measured \(.*NaN or Inf in .*\); remove .*training/dinov2 to train it again"
    with pytest.raises(ZooError, match=message):
        build_zoo(*images, tmp_path, zoo=tiny, only=("dinov2",), say=lambda line: None)
    assert not (tmp_path / "dinov2").exists()


def cifar(folder):
    folder.mkdir()
    rows = {b"data": np.zeros((10, 3072), np.uint8), b"labels": list(range(10))}
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}))
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(rows))
    return folder


def shard(path, label, random):
    Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path.with_suffix(".png"))
    path.with_suffix(".cls").write_text(str(label))
    with tarfile.open(path, "w") as tar:
        tar.add(path.with_suffix(".png"), "0.png")
        tar.add(path.with_suffix(".cls"), "0.cls")
    return path


def test_training_images_are_no_test_images(shapes, tiny, tmp_path):
    """However the two are written."""
    archive = cifar(tmp_path / "cifar-10-batches-py")
    tar = shard(tmp_path / "train.tar", 0, np.random.default_rng(0))
    (tmp_path / "link.tar").symlink_to(tar)
    (tmp_path / "link").symlink_to(shapes / "train")
    for one, other in (
        (archive, f"{archive}:train"),
        (f"{archive}:train", archive),
        (f"{archive}/:test", f"{archive}:test"),
        (tar, tmp_path / "t*.tar"),
        (tar, tmp_path / "link.tar"),
        (shapes / "train", tmp_path / "link"),
        (shapes / "train", shapes / "train" / ".." / "train"),
    ):
        with pytest.raises(ZooError, match=r"--test-images: shares \d+ files? with --images"):
            build_zoo(LabelledImages(one), LabelledImages(other), tmp_path / "zoo", classes=("a", "b"), zoo=tiny)
    sources = LabelledImages(archive), LabelledImages(f"{archive}:test")
    assert build._check(*sources, None, ()) == sources[0].classes
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("names", "only", "message"),
    [
        (("st. bernard", "cat"), "gdino", r"class 'st\. bernard': gdino separates names by"),
        (("what?", "cat"), "gdino", r"class 'what\?': gdino separates"),
        (("é1", "e1"), "gdino", "classes 'é1' and 'e1' are one to gdino"),
        (("cat", "x" * 120), "gdino", "no token for a part of it"),
        (("Box", "box"), "clip", "classes 'Box' and 'box' are one to clip"),
        (("cat", "very " * 30 + "small"), "clip", "captions of 38 tokens, and clip takes 32; shorten it"),
        (("red_ball", "red ball"), "dinov2", "none empty and none twice"),
        (("_", "cat"), "dinov2", "none empty and none twice"),
    ],
)
def test_names_that_a_text_tower_cannot_tell_apart_are_refused_before_any_work(names, only, message, tiny, tmp_path):
    random = np.random.default_rng(0)
    tars = [str(shard(tmp_path / f"{part}{i}.tar", i, random)) for part in ("a", "b") for i in (0, 1)]
    sources = [LabelledImages(tars[0][:-5] + "*.tar"), LabelledImages(tars[2][:-5] + "*.tar")]
    with pytest.raises(ZooError, match=message):
        build_zoo(*sources, tmp_path / "zoo", classes=names, only=(only,), zoo=tiny)
    assert not (tmp_path / "zoo").exists()
    if only != "dinov2":  # which never sees the names
        assert build._check(*sources, names, ("dinov2",)) == tuple(name.strip() for name in names)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "OUT/zoo is not finished ([Errno 28] No space left on device)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory. Tried. With"),
    ],
    ids=["disk", "memory"],
)
def test_what_is_full_is_one_line(error, message, shapes, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise error

    monkeypatch.setattr(build, "write_samples", full)
    sources = ["--images", str(shapes / "train"), "--test-images", str(shapes / "test"), "--only", "clip"]
    assert main([*sources, "--out", str(tmp_path / "zoo")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: " + message.replace("OUT", str(tmp_path)))


def test_bad_input_is_named_and_exits_with_2(shapes, tmp_path, capsys):
    def said(*arguments):
        assert main([*map(str, arguments), "--out", str(tmp_path / "zoo")]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    train, test = shapes / "train", shapes / "test"
    assert "no such file" in said("--images", tmp_path / "none", "--test-images", test)
    assert "shares 72 files with --images" in said("--images", train, "--test-images", train)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "box").mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "box" / "0.png")
    assert "has the classes" in said("--images", one, "--test-images", test)
    assert "all of one class" in said("--images", one, "--test-images", two)
    random = np.random.default_rng(0)
    shards = ["--images", shard(tmp_path / "s.tar", 7, random), "--test-images", shard(tmp_path / "t.tar", 7, random)]
    assert "does not name its classes" in said(*shards)
    (tmp_path / "names").write_text("a\nb\n")
    assert "class 7" in said(*shards, "--classes", tmp_path / "names")
    assert "not a text file" in said("--images", train, "--test-images", test, "--classes", tmp_path / "none")
    for minutes in (0, "inf", "nan"):
        assert "--minutes" in said("--images", train, "--test-images", test, "--minutes", minutes)
    assert "--device" in said("--images", train, "--test-images", test, "--device", "cuda:99")
    (tmp_path / "zoo").write_text("a file")
    assert "is a file" in said("--images", train, "--test-images", test)


def test_only_gdino_needs_what_judges_boxes(shapes, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(build, "build_zoo", lambda *args, only, **kwargs: made.append(only))
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    sources = ["--images", str(shapes / "train"), "--test-images", str(shapes / "test"), "--out", str(tmp_path)]
    assert main([*sources, "--only", "dinov2"]) == 0
    assert made == [("dinov2",)]
    for arguments in ([], ["--only", "gdino"]):
        assert main([*sources, *arguments]) == 2
        assert "not installed: pycocotools" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # which counts what the other two get right
    assert main([*sources, "--only", "dinov2"]) == 2
    assert "not installed: torchmetrics;" in capsys.readouterr().err


def test_help_needs_no_torch():
    """It is what a new user asks first; it must come at once."""
    code = "import sys; from kpu_fast.zoo.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--test-images" in done.stdout
