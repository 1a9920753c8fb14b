"""`python -m kpu_fast.evaluate`: every evaluation from its command line to its JSON, and every way to ask wrongly."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

import kpu_fast
from kpu_fast.data.labelled import LabelledImages
from kpu_fast.evaluate import __main__ as command
from kpu_fast.evaluate import detect as detect_file
from kpu_fast.evaluate import pca as pca_file
from kpu_fast.evaluate.__main__ import main
from kpu_fast.evaluate.boxes import CocoImages
from kpu_fast.evaluate.detect import detect, load_detector, see_through
from kpu_fast.evaluate.detector import detect_boxes
from kpu_fast.evaluate.encoder import load_encoder
from kpu_fast.evaluate.knn import knn
from kpu_fast.evaluate.linear import linear
from kpu_fast.evaluate.zero_shot import class_names, embed_texts, zero_shot
from kpu_fast.models import FeatureSpec, Student
from kpu_fast.models.teachers import build_teacher

COMMON = ["--device", "cpu", "--workers", "0"]


def coco(folder, coloured):
    """Two images of the coloured folder with a box each, as COCO."""
    boxes = [{"id": i, "image_id": i, "category_id": i + 1, "bbox": [4, 4, 30, 30]} for i in range(2)]
    images = [{"id": i, "file_name": f"{name}/00.png"} for i, name in enumerate(("red", "green"))]
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    path = folder / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return ["--images", coloured, "--annotations", path]


def test_the_same_command_gives_the_students_and_its_teachers_figure(zoo, student, coloured, evaluate, tmp_path):
    images, templates = LabelledImages(coloured), ["a {}", "the photo of {}."]
    texts = embed_texts(zoo["clip"], class_names(images, None), templates)
    asked = [word for template in templates for word in ("--template", template)]
    for model in (student, zoo["clip"]):
        command = ["zero-shot", "--model", model, "--images", coloured, "--clip", zoo["clip"], *COMMON]
        found = evaluate(*command, *asked)
        expected = zero_shot(load_encoder(model), texts, images, size=64)
        assert {key: found[key] for key in expected} == expected
        assert found["templates"] == templates
        assert found["settings"]["model"] == str(model)
    more = tmp_path / "templates.txt"
    more.write_text("a {}\n\n  the photo of {}.\n")
    from_file = evaluate(*command, "--template-file", more)
    assert (from_file["top1"], from_file["templates"]) == (found["top1"], templates)
    assert evaluate(*command, "--template", "{}", "--template-file", more)["templates"] == ["{}", *templates]
    # What was used where nothing was asked for.
    found = evaluate(*command)
    assert (found["templates"], found["size"], found["settings"]["size"]) == (["a photo of a {}."], 64, None)
    for key in ("date", "commit", "versions", "device"):
        assert found[key]
    assert found["versions"]["torch"] == torch.__version__
    assert found["task"] == "zero-shot"


def test_a_siglip_is_asked_by_its_own_text_tower(zoo, coloured, evaluate, refused):
    command = ["zero-shot", "--images", coloured, "--clip", zoo["siglip"], *COMMON]
    found = evaluate(*command, "--model", zoo["siglip"])
    images = LabelledImages(coloured)
    texts = embed_texts(zoo["siglip"], class_names(images, None))
    expected = zero_shot(load_encoder(zoo["siglip"]), texts, images, size=64, tower="siglip")
    assert found["top1"] == expected["top1"]
    assert refused(*command, "--model", zoo["clip"]).endswith("is a clip, whose x is not in SigLIP's space; give a "
                                                              "student or SigLIP")  # fmt: skip
    line = refused("zero-shot", "--model", zoo["clip"], "--images", coloured, "--clip", zoo["dinov2"])
    assert line.endswith("holds a model of type 'dinov2_with_registers', expected CLIP or SigLIP with its text tower")


def test_a_student_is_read_through_its_head_for_a_siglip(zoo, coloured, tmp_path, capsys):
    vit = {"patch_size": 16, "dim": 32, "depth": 1, "heads": 2, "image_size": 64}
    for head, warned in (("siglip2", False), ("clip", True)):
        torch.manual_seed(1)
        heads = {head: FeatureSpec(32, (32,), (16.0,)), "other": FeatureSpec(24, (32,), (16.0,))}
        Student(vit=vit, adapter=None, heads=heads, head_hidden=8).save_pretrained(tmp_path / head)
        words = ["--model", tmp_path / head, "--images", coloured, "--clip", zoo["siglip"], *COMMON]
        assert main([*map(str, ["zero-shot", *words])]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["head"] == head
        assert (
            "its head 'clip', the only one with an x of 32 channels; if that teacher was no SigLIP" in err
        ) == warned


@pytest.mark.parametrize(("config", "size"), [({}, 288), ({"image_size": None}, 1024)])
def test_a_sams_size_is_transformers_where_its_config_has_none(zoo, tmp_path, config, size, refused, coloured, copied):
    shutil.copytree(zoo["sam"], tmp_path / "sam")
    tree = json.loads((tmp_path / "sam" / "config.json").read_text()) | config
    (tmp_path / "sam" / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    if size == 288:
        assert load_encoder(tmp_path / "sam").image_size == size
    else:  # the weights are those of a smaller one
        line = refused("knn", "--model", tmp_path / "sam", "--train-images", coloured, "--test-images", copied)
        assert line.startswith("--model: ")
        assert "(1, 64, 64, 32)" in line


def test_a_sam_is_shown_images_of_its_own_size(zoo, coloured, copied, evaluate, refused):
    command = ["knn", "--model", zoo["sam"], "--train-images", coloured, "--test-images", copied, "--features", "map"]
    assert evaluate(*command, "--k", 1, *COMMON)["size"] == 288
    line = refused(*command, "--size", 64)
    assert "sam: fails on images of 64×64: ValueError: Input image size (64*64)" in line


def test_a_size_that_a_backbone_refuses_in_its_own_way_is_one_line(coloured, copied, refused, tmp_path):
    transformers = pytest.importorskip("transformers")
    net = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": [224, 224]}
    transformers.HieraBackbone(transformers.HieraConfig(**net)).save_pretrained(tmp_path / "hiera")
    command = ["knn", "--model", tmp_path / "hiera", "--train-images", coloured, "--test-images", copied]
    line = refused(*command, "--features", "map", "--size", 96, *COMMON)
    assert "hiera: fails on images of 96×96: RuntimeError: " in line


def test_zero_shot_takes_a_name_twice_with_a_warning(zoo, coloured, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("red_ball\nsky blue\nred ball\n")
    command = ["zero-shot", "--model", zoo["clip"], "--images", coloured, "--clip", zoo["clip"], "--classes", names]
    assert main([*map(str, command), *COMMON]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("warning: ")] == [
        "warning: --classes: 'red ball' more than once; classes of one name have one text, which tells none of their "
        "images apart"
    ]
    images = LabelledImages(coloured)
    texts = embed_texts(zoo["clip"], ("red ball", "sky blue", "red ball"))
    assert json.loads(out)["top1"] == zero_shot(load_encoder(zoo["clip"]), texts, images, size=64)["top1"]


def test_detect_takes_no_name_twice(zoo, coloured, tmp_path, refused):
    names, folders = tmp_path / "names.txt", tmp_path / "folders"
    for name in ("red_ball", "Red ball", "green"):
        shutil.copytree(coloured / "red", folders / name)
    detect = ["detect", "--model", zoo["gdino"], "--images"]
    for text in ("red\ngreen\nred\n", "red_ball\ngreen\nred ball\n", "Red\ngreen\nred\n"):
        names.write_text(text)
        line = refused(*detect, coloured, "--classes", names)
        assert line.startswith("--classes: the prompt names each class once, found 'red")
    assert refused(*detect, folders).startswith("--images: the prompt names each class once, found 'red ball' twice")
    where = coco(tmp_path, coloured)
    tree = json.loads(where[3].read_text())
    tree["categories"][1]["name"] = "Red"
    where[3].write_text(json.dumps(tree))
    line = refused("detect", "--model", zoo["gdino"], *where)
    assert line == "--annotations: the prompt names each class once, found 'red' twice (capitals count for nothing)"


def test_a_name_that_makes_no_prompt_is_blamed_on_what_brought_it(zoo, coloured, tmp_path, refused):
    detect = ["detect", "--model", zoo["gdino"]]
    where = coco(tmp_path, coloured)
    where[3].write_text(where[3].read_text().replace('"green"', '"st. green"'))
    assert refused(*detect, *where).startswith(
        "--annotations: class 'st. green': a name is not empty and has no '.' or '?'"
    )
    for name in ("red", "st. green"):
        shutil.copytree(coloured / "red", tmp_path / "folders" / name)
    assert refused(*detect, "--images", tmp_path / "folders").startswith("--images: class 'st. green': ")
    (tmp_path / "names.txt").write_text("red\nst. green\nblue\n")
    mosaics = [*detect, "--images", coloured, "--classes", tmp_path / "names.txt"]
    assert refused(*mosaics).startswith("--classes: class 'st. green': ")


def test_the_command_gives_what_the_function_gives(student, coloured, copied, evaluate):
    sides = ["--train-images", coloured, "--test-images", copied]
    options = ["--k", 3, "--temperature", 0.5, "--features", "map", "--size", 32, "--limit", 20, "--batch-size", 7]
    found = evaluate("knn", "--model", student, *sides, *options, *COMMON)
    images = LabelledImages(coloured)
    drawn = torch.randperm(36, generator=torch.Generator().manual_seed(0))[:20].sort().values.tolist()
    part = torch.utils.data.Subset(images, drawn)
    part.classes, part.labels = images.classes, [images.labels[i] for i in drawn]
    expected = knn(load_encoder(student), part, part, size=32, k=3, temperature=0.5, features="map")
    assert {key: found[key] for key in expected} == expected
    found = evaluate("linear", "--model", student, *sides, "--teacher-name", "clip", *COMMON)
    assert found["top1"] == 1.0
    iterations = set()
    for c, max_iter in ((1e-3, 1000), (10.0, 1000), (10.0, 2)):
        options = ["--c", c, "--max-iter", max_iter, "--size", 32]
        found = evaluate("linear", "--model", student, *sides, *options, *COMMON)
        expected = linear(load_encoder(student), images, LabelledImages(copied), size=32, c=c, max_iter=max_iter)
        assert {key: found[key] for key in expected} == expected
        iterations.add(found["iterations"])
    assert len(iterations) == 3


def test_detect_through_the_student_and_by_the_detector_itself(zoo, student, coloured, tmp_path, evaluate, monkeypatch):
    where = coco(tmp_path, coloured)
    for model, more in ((student, ["--detector", zoo["gdino"]]), (zoo["gdino"], [])):
        picture = tmp_path / f"{len(more)}.png"
        found = evaluate("detect", "--model", model, *more, *where, "--picture", picture, "--size", 64, *COMMON)
        assert (found["images"], found["boxes"], found["batch_size"]) == (2, 2, 1)
        images = CocoImages(where[3], coloured)
        detector = load_detector(zoo["gdino"])
        detector = see_through(detector, load_encoder(student)) if more else detector
        expected = detect(detector, images, images.classes, size=64)
        assert {key: found[key] for key in expected} == expected
        assert (found["shortest"], found["longest"], found["head"]) == (64, 1333, "gdino" if more else None)
        assert np.asarray(Image.open(picture)).std() > 10
    shapes = []
    monkeypatch.setattr(detect_file, "detect_boxes", lambda net, pixels, *rest: shapes.append(pixels.shape[2:]) or
                        detect_boxes(net, pixels, *rest))  # fmt: skip
    options = ["--size", 64, "--longest", 80, "--batch-size", 1, "--picture", picture]
    found = evaluate("detect", "--model", zoo["gdino"], *where, *options, *COMMON)
    assert (found["shortest"], found["longest"]) == (64, 80)
    assert shapes == [(50, 80)] * 2  # 40 × 64


def test_detect_on_mosaics(zoo, student, coloured, tmp_path, evaluate):
    options = ["--images", coloured, "--canvas", 128, "--mosaics", 3, "--picture", tmp_path / "m.png"]
    found = evaluate("detect", "--model", student, "--detector", zoo["gdino"], *options, *COMMON)
    assert found["images"] == 3
    assert found["boxes"] >= 3
    assert (found["shortest"], found["longest"], found["canvas"], found["batch_size"]) == (None, None, 128, 8)


def test_pca_of_files_and_of_labelled_images(student, zoo, coloured, tmp_path, evaluate):
    files = [coloured / "red" / "00.png", coloured / "green" / "01.png"]
    picture = tmp_path / "p.png"
    found = evaluate("pca", "--model", student, "--images", *files, "--picture", picture)
    assert (found["images"], found["picture"]) == (2, str(picture))
    found = evaluate(
        "pca", "--model", student, "--teacher", zoo["gdino"], "--images", coloured, "--count", 3, "--picture", picture
    )
    assert found["images"] == 3


def test_pcas_teacher_dinov2_is_the_one_that_a_run_has(student, coloured, tmp_path, monkeypatch, capsys):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    folder = tmp_path / "dinov2"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    panels, save = [], pca_file.save_feature_picture
    monkeypatch.setattr(pca_file, "save_feature_picture", lambda path, p, **k: (panels.extend(p), save(path, p, **k)))
    words = ["pca", "--model", student, "--teacher", folder, "--images", coloured, "--count", 1, "--size", 96]
    assert main([*map(str, words), "--device", "cpu", "--picture", str(tmp_path / "p.png")]) == 0
    assert "warning: " in capsys.readouterr().err  # the only head with maps of 32 channels is clip's
    (panel,) = panels
    cfg = SimpleNamespace(kind="dinov2", weights=str(folder), arch={}, levels=None)
    teacher = build_teacher("dinov2", cfg, device="cpu", dtype=torch.float32, image_size=(96, 96))
    expected = teacher(panel.images).maps[0]
    assert expected.shape == (1, 7, 7, 32)  # 96 is resized to 98, seven patches; a sentinel has six
    assert torch.equal(panel.teacher, expected)
    assert panel.projected.shape == expected.shape


def test_from_a_shell_the_result_is_the_only_thing_on_standard_output(student, coloured, copied, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "kpu_fast.evaluate", "knn", "--model", str(student)]
    command += ["--train-images", str(coloured), "--test-images", str(copied), "--size", "32", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == 1.0


def test_wrong_questions_get_one_line_and_exit_code_2(zoo, student, coloured, copied, tmp_path, refused):
    zero_shot = ["zero-shot", "--model", student, "--clip", zoo["clip"], "--images", coloured]
    sides = ["--train-images", coloured, "--test-images", copied]
    empty, gdino = tmp_path / "empty", zoo["gdino"]
    empty.mkdir()
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    blank = tmp_path / "blank.txt"
    blank.write_text("\n")
    asked = {
        "--model: '/nowhere' is not a folder": ["knn", "--model", "/nowhere", *sides],
        f"--model: {tmp_path} has": ["knn", "--model", tmp_path, *sides],
        "--images: ": [*zero_shot[:-1], empty],
        "--classes: 2 names, but an image is of class 2": [*zero_shot, "--classes", names],
        "--classes: /nowhere: not a text file that can be read": [*zero_shot, "--classes", "/nowhere"],
        "--template 'x': expected one {}": [*zero_shot, "--template", "x"],
        "--template-file: /nowhere: not a text file": [*zero_shot, "--template-file", "/nowhere"],
        f"--template-file: {blank}: has no template": [*zero_shot, "--template-file", blank],
        "--size 100: expected a multiple of 32, such as 96": [*zero_shot, "--size", 100],
        "--batch-size 0: expected at least 1": [*zero_shot, "--batch-size", 0],
        "--limit 0: expected at least 1": [*zero_shot, "--limit", 0],
        "--device tpu9: cannot be used here": [*zero_shot, "--device", "tpu9"],
        "--json: ": [*zero_shot, *COMMON, "--json", "/proc/nowhere/result.json"],
        "--k 0 --temperature 0.07: expected": ["knn", "--model", student, *sides, "--k", 0],
        "--k 20 --temperature nan: expected": ["knn", "--model", student, *sides, "--temperature", "nan"],
        "--k 20 --temperature inf: expected": ["knn", "--model", student, *sides, "--temperature", "inf"],
        "--c 0.0 --max-iter 1000: expected": ["linear", "--model", student, *sides, "--c", 0],
        "--c nan --max-iter 1000: expected": ["linear", "--model", student, *sides, "--c", "nan"],
        "--c inf --max-iter 1000: expected": ["linear", "--model", student, *sides, "--c", "inf"],
        "--count 0: expected at least 1": ["pca", "--model", student, "--images", coloured, "--count", 0],
        "--batches 0: expected at least 1": ["std-gap", "--run", tmp_path, "--batches", 0],
        f"--run {tmp_path}: ": ["std-gap", "--run", tmp_path],
        "--model (a student needs --detector beside it): ": ["detect", "--model", student, "--images", coloured],
        "--detector: ": ["detect", "--model", student, "--images", coloured, "--detector", zoo["clip"]],
        "--canvas 100 --mosaics 500: expected": ["detect", "--model", gdino, "--images", coloured, "--canvas", 100],
        "--annotations: ": ["detect", "--model", gdino, "--images", coloured, "--annotations", names],
    }  # fmt: skip
    for beginning, words in asked.items():
        assert refused(*words).startswith(beginning)
    (tmp_path / "CLIP").mkdir()
    without = zoo["dinov2"]
    assert refused(*zero_shot[:3], "--clip", without, *zero_shot[5:]).startswith(
        f"--clip: {without} holds a model of type"
    )


def test_memory_that_does_not_suffice_is_one_line(student, coloured, refused, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee")

    monkeypatch.setattr("kpu_fast.evaluate.knn.run", full)
    line = refused("knn", "--model", student, "--train-images", coloured, "--test-images", coloured)
    assert line.startswith("out of memory: CUDA out of memory. Tried to allocate 2 GiB. --dtype bf16, smaller")


def test_options_that_would_do_nothing_are_refused(zoo, coloured, tmp_path, refused):
    detect = ["detect", "--model", zoo["gdino"]]
    mosaics, annotated = [*detect, "--images", coloured], [*detect, *coco(tmp_path, coloured)]
    for words, message in (
        ([*mosaics, "--teacher-name", "gdino"], "--teacher-name gdino: there is no --detector"),
        ([*annotated, "--mosaics", 500], "--mosaics: --annotations brings its own images"),
        ([*annotated, "--canvas", 192], "--canvas: --annotations brings its own images"),
        ([*mosaics, "--longest", 1333], "--longest: mosaics are not resized"),
        ([*annotated, "--longest", 0], "--longest 0: expected at least 32"),
        ([*annotated, "--classes", "names.txt"], "--classes: --annotations brings its own names"),
        (["pca", "--model", zoo["clip"], "--images", "a.png", "b.jpg", "--count", 3], "--count: image files are all"),
    ):
        assert refused(*words).startswith(message)


def test_what_cannot_be_written_is_said_before_the_work(student, coloured, copied, zoo, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("kpu_fast.evaluate.encoder.load_encoder", None)
    monkeypatch.setattr("kpu_fast.evaluate.detect.load_detector", None)
    file = tmp_path / "file"
    file.write_text("")
    detect = ["detect", "--model", zoo["gdino"], "--images", coloured]
    for path in (file / "a.png", tmp_path):
        assert refused(*detect, "--picture", path).startswith(f"--picture: {path} cannot be written")
        assert refused(*detect, "--json", path).startswith(f"--json: {path} cannot be written")
        line = refused("pca", "--model", student, "--images", coloured, "--picture", path)
        assert line.startswith(f"--picture: {path} cannot be written")


def test_one_file_is_not_result_and_picture_at_once(student, coloured, zoo, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("kpu_fast.evaluate.encoder.load_encoder", None)
    monkeypatch.setattr("kpu_fast.evaluate.detect.load_detector", None)
    pca = ["pca", "--model", student, "--images", coloured, "--picture", "p.png"]
    assert refused(*pca, "--json", tmp_path / "p.png") == (
        f"--json {tmp_path / 'p.png'}: is the file of --picture too; give another name"
    )
    detect = ["detect", "--model", zoo["gdino"], "--images", coloured]
    assert refused(*detect, "--json", "detections.png").startswith("--json detections.png: is the file of --picture")


def test_ctrl_c_during_the_imports_is_an_interruption(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.importlib, "import_module", interrupt)
    assert main(["pca"]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


def test_images_to_learn_from_and_to_be_tested_on_share_no_file(student, coloured, tmp_path, refused):
    (tmp_path / "link").symlink_to(coloured)
    for task in ("knn", "linear"):
        for other in (coloured, tmp_path / "link"):
            line = refused(task, "--model", student, "--train-images", coloured, "--test-images", other, "--limit", 3)
            assert line.startswith("--test-images: shares 36 files with --train-images, such as ")


def test_an_image_of_too_many_pixels_is_named(zoo, student, coloured, tmp_path, refused, monkeypatch):
    where = coco(tmp_path, coloured)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    image = coloured / "red" / "00.png"
    assert refused("detect", "--model", zoo["gdino"], *where, *COMMON).startswith(f"{image}: not an image that can")
    assert refused("pca", "--model", student, "--images", image).startswith(f"--images: {image} is not an image that")


def test_an_image_that_does_not_decode_is_named_by_whichever_process_reads_it(student, coloured, tmp_path, refused):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes((coloured / "red" / "00.png").read_bytes())
    (tmp_path / "images" / "b" / "2.png").write_bytes(b"not a picture")
    shutil.copytree(tmp_path / "images", tmp_path / "others")
    sides = ["--train-images", tmp_path / "images", "--test-images", tmp_path / "others"]
    for workers in (0, 1):
        line = refused("knn", "--model", student, *sides, "--workers", workers, "--size", 32)
        assert line.startswith(f"{tmp_path / 'images' / 'b' / '2.png'}: not an image")
    line = refused("pca", "--model", student, "--images", tmp_path / "images", "--count", 3, "--size", 32)
    assert line.startswith(f"--images: {tmp_path / 'images' / 'b' / '2.png'}: not an image")


def test_many_batches_from_workers_do_not_pile_up_open_files(zoo, student, coloured, copied, tmp_path, evaluate):
    import resource

    tree = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "red"}]}
    for i in range(36):
        tree["images"].append({"id": i, "file_name": f"red/{i % 12:02}.png"})
        tree["annotations"].append({"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 30, 30]})
    (tmp_path / "a.json").write_text(json.dumps(tree))
    sides = ["--train-images", coloured, "--test-images", copied]
    one = ["--batch-size", 1, "--workers", 1, "--size", 96]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
    try:
        assert evaluate("linear", "--model", student, *sides, *one)["images"] == 36
        where = ["--images", coloured, "--annotations", tmp_path / "a.json", "--picture", tmp_path / "a.png"]
        assert evaluate("detect", "--model", zoo["gdino"], *where, *one)["images"] == 36
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_training_script_does_not_hide_a_library_called_evaluate(monkeypatch):
    """As `deepspeed kpu_fast/train.py` starts it: with the script's folder first on sys.path."""
    script = Path(kpu_fast.__file__).with_name("train.py")
    monkeypatch.syspath_prepend(str(script.parent))
    assert importlib.util.find_spec("evaluate").origin == str(script.parent / "evaluate" / "__init__.py")
    runpy.run_path(str(script))
    importlib.invalidate_caches()
    found = importlib.util.find_spec("evaluate")
    assert found is None or str(script.parent) not in found.origin
