"""Detection: a student that gives the backbone's own maps changes nothing, boxes and AP have known values."""

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("pycocotools")

from types import SimpleNamespace  # noqa: E402

from kpu_fast.data.labelled import LabelledImages  # noqa: E402
from kpu_fast.evaluate.boxes import CocoImages, Mosaics, Truth, average_precision  # noqa: E402
from kpu_fast.evaluate.detect import Detector, detect, load_detector, save_picture, see_through  # noqa: E402
from kpu_fast.evaluate.detector import Prompt, detect_boxes, make_prompt, with_student_backbone  # noqa: E402
from kpu_fast.evaluate.encoder import Encoder, load_encoder  # noqa: E402
from kpu_fast.evaluate.result import EvaluateError  # noqa: E402
from kpu_fast.models import FeatureSpec, Student  # noqa: E402
from kpu_fast.models.teachers import build_teacher  # noqa: E402

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


class Impostor(nn.Module):
    """Stands where a student does and gives the teacher's own maps."""

    def __init__(self, folder):
        super().__init__()
        cfg = SimpleNamespace(kind="grounding_dino", weights=str(folder), arch={}, levels=None)
        self.net = build_teacher("gdino", cfg, device="cpu", dtype=torch.float32, image_size=(64, 64))
        self.head_specs = {"gdino": self.net.spec}

    def forward(self, images):
        return self.net(images)

    def project(self, features, teacher):
        return features


def inputs(zoo, height=64, width=96, text="red. green. sky blue."):
    generator = torch.Generator().manual_seed(0)
    tokens = transformers.AutoTokenizer.from_pretrained(zoo["gdino"])([text] * 2, return_tensors="pt")
    mask = torch.ones(2, height, width, dtype=torch.long)
    pixels = (torch.rand(2, 3, height, width, generator=generator) - MEAN) / STD
    mask[1, height - 20 :], pixels[1, :, height - 20 :] = 0, 0
    return {"pixel_values": pixels, "pixel_mask": mask, **{k: tokens[k] for k in ("input_ids", "attention_mask")}}


def load(zoo):
    return transformers.GroundingDinoForObjectDetection.from_pretrained(zoo["gdino"]).eval()


# ---- the student as backbone ----


@torch.no_grad()
@pytest.mark.parametrize("text", ["red. green. sky blue.", "a."])
def test_with_the_teachers_own_maps_the_detector_is_the_original(zoo, text):
    given = inputs(zoo, text=text)
    original, changed = load(zoo), with_student_backbone(load(zoo), Impostor(zoo["gdino"]), "gdino")
    expected, found = original(**given), changed(**given)
    # Images are normalised twice over in between; the decoder makes up to 4e-4 of the rounding, depending on the CPU.
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-3, rtol=1e-4)
    # The comparison means something: another image gives other boxes.
    other = original(**{**given, "pixel_values": given["pixel_values"].flip(3)})
    assert (other.pred_boxes - expected.pred_boxes).abs().max() > 1e-2


@torch.no_grad()
def test_the_detector_sees_what_the_student_projects(zoo, student):
    own = Student.from_pretrained(student)
    detector = with_student_backbone(load(zoo), own, "gdino")
    given = inputs(zoo)
    backbone = detector.model.backbone.conv_encoder
    maps = own.project(own(given["pixel_values"] * STD + MEAN), "gdino").maps
    for (found, mask), expected, stride in zip(
        backbone(given["pixel_values"], given["pixel_mask"]), maps, (8, 16, 32), strict=True
    ):
        torch.testing.assert_close(found.permute(0, 2, 3, 1), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(mask, given["pixel_mask"][:, ::stride, ::stride].bool())
    before = detector(**given).pred_boxes
    head = own.heads["gdino"].maps[1].fc2
    head.weight.copy_(head.weight.flip(1))
    assert (detector(**given).pred_boxes - before).abs().max() > 1e-3


@torch.no_grad()
def test_sides_are_padded_to_multiples_of_32_as_in_a_batch_of_several_sizes(zoo, student):
    given = inputs(zoo, 50, 90)
    detector = with_student_backbone(load(zoo), Student.from_pretrained(student), "gdino")
    padded = {**given}
    for key in ("pixel_values", "pixel_mask"):
        padded[key] = nn.functional.pad(given[key], (0, 6, 0, 14))
    expected = detector(**padded)
    assert torch.equal(detector(**given).pred_boxes, expected.pred_boxes)
    text = (given["input_ids"], None, given["attention_mask"], given["pixel_mask"])
    states = detector.model(given["pixel_values"], *text)  # arguments without names
    assert torch.equal(states.last_hidden_state, expected.last_hidden_state)
    # Without a mask the whole image counts, the padding does not.
    del given["pixel_mask"]
    padded["pixel_mask"] = nn.functional.pad(torch.ones(2, 50, 90, dtype=torch.long), (0, 6, 0, 14))
    assert torch.equal(detector(**given).pred_boxes, detector(**padded).pred_boxes)


@torch.no_grad()
def test_one_student_can_take_the_place_of_another(zoo, student):
    given, own = inputs(zoo, 50, 90), Student.from_pretrained(student)
    expected = with_student_backbone(load(zoo), own, "gdino")(**given)
    changed = with_student_backbone(with_student_backbone(load(zoo), Impostor(zoo["gdino"]), "gdino"), own, "gdino")
    assert torch.equal(changed(**given).pred_boxes, expected.pred_boxes)


@torch.no_grad()
def test_what_the_docs_print_works_as_printed(zoo, student, tmp_path, monkeypatch):
    # The zoo is saved in bf16, transformers loads in the saved dtype, the processor gives fp32.
    half, folder = load(zoo).bfloat16(), tmp_path / "zoo" / "gdino"
    half.save_pretrained(folder)
    size = {"shortest_edge": 50, "longest_edge": 90}
    processor = {"image_processor_type": "GroundingDinoImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "runs" / "demo" / "kpu-0").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "kpu-0" / "student").symlink_to(student)
    monkeypatch.chdir(tmp_path)
    docs = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"```python\n([^`]*with_student_backbone[^`]*)```", docs)
    names = {}
    exec(printed, names)
    detector = names["detector"]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (50, 90, 3), dtype=np.uint8)) for _ in range(2)]
    given = inputs(zoo) | transformers.AutoImageProcessor.from_pretrained("zoo/gdino")(images, return_tensors="pt")
    assert (given["pixel_values"].shape, given["pixel_values"].dtype) == ((2, 3, 50, 90), torch.float32)
    full = with_student_backbone(load(zoo), Student.from_pretrained(student), "gdino")
    full.load_state_dict(detector.state_dict())
    expected = full(**given)
    torch.testing.assert_close(detector(**given).pred_boxes, expected.pred_boxes, rtol=0, atol=0)
    # Behind the student in bf16: the maps are the same but rounded at the end, the rest differs by bf16's rounding.
    detector = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    detector = with_student_backbone(detector, Student.from_pretrained(student), "gdino")
    found = detector(**given)
    padded = [nn.functional.pad(given[key], (0, 6, 0, 14)) for key in ("pixel_values", "pixel_mask")]
    maps, exact = (d.model.backbone.conv_encoder(*padded) for d in (detector, full))
    for (m, mask), (e, expected_mask) in zip(maps, exact, strict=True):
        assert torch.equal(m, e.bfloat16())
        assert torch.equal(mask, expected_mask)
    seen, wanted = (out.encoder_last_hidden_state_vision.float() for out in (found, expected))
    assert (seen - wanted).norm() < 0.05 * wanted.norm()
    # A dtype that the detector is given later is followed.
    assert detector.float()(**given).pred_boxes.dtype == torch.float32


def test_a_head_that_does_not_fit_the_detector_is_an_error(zoo, student):
    own = Student.from_pretrained(student)
    with pytest.raises(ValueError, match=r"maps of \(32,\) channels, the detector's backbone \(16, 32, 64\)"):
        with_student_backbone(load(zoo), own, "clip")
    with pytest.raises(KeyError, match=r"no head for 'dino'; it has \['clip', 'gdino'\]"):
        with_student_backbone(load(zoo), own, "dino")
    detector = load_detector(zoo["gdino"])
    with pytest.raises(EvaluateError, match="is a sentinel; --detector takes a student"):
        see_through(detector, load_encoder(zoo["dinov2"]))
    with pytest.raises(EvaluateError, match="holds a model of type 'clip', expected 'grounding-dino' or 'mm-ground"):
        load_detector(zoo["clip"])
    other = Student(vit=own.config["vit"], adapter=None, heads={"a": FeatureSpec(None, (8,), (8.0,))})
    with pytest.raises(EvaluateError, match=r"no head gives maps of \(16, 32, 64\) channels; it has \"a\""):
        see_through(detector, Encoder("other", "student", other, 64))


@pytest.fixture
def mm(zoo, tmp_path):
    """The folder of an MM Grounding DINO of the same sizes, its layers new."""
    settings = json.loads((zoo["gdino"] / "config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(3)
    net = transformers.MMGroundingDinoForObjectDetection(transformers.MMGroundingDinoConfig(**settings)).eval()
    shutil.copytree(zoo["gdino"], tmp_path / "mm")
    net.save_pretrained(tmp_path / "mm")
    return tmp_path / "mm"


def test_mm_grounding_dino_is_a_teacher_and_a_detector_too(zoo, mm, student, coco):
    assert json.loads((mm / "config.json").read_text())["model_type"] == "mm-grounding-dino"
    given = inputs(zoo)
    detector = load_detector(mm)
    own = detector.net.model.backbone.conv_encoder
    assert load_encoder(mm).kind == "grounding_dino"
    expected = detector.net(**given)
    for m, (e, _) in zip(
        Impostor(mm)(given["pixel_values"] * STD + MEAN).maps, own(*list(given.values())[:2]), strict=True
    ):
        torch.testing.assert_close(m.permute(0, 3, 1, 2), e, atol=1e-4, rtol=1e-4)
    found = with_student_backbone(detector.net, Impostor(mm), "gdino")(**given)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=1e-4)
    images = CocoImages(coco / "annotations.json", coco)
    scores = detect(see_through(load_detector(mm), load_encoder(student)), images, images.classes)
    assert (scores["head"], 0 <= scores["ap"] <= 1) == ("gdino", True)


def test_in_bf16_only_the_backbone_computes_so(zoo, student):
    given = inputs(zoo)
    exact, half = load_detector(zoo["gdino"]).net, load_detector(zoo["gdino"], dtype=torch.bfloat16).net
    encoder = half.model.backbone.conv_encoder
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for name, p in half.named_parameters() if "conv_encoder" not in name} == {torch.float32}
    images = given["pixel_values"], given["pixel_mask"]
    for (m, mask), (e, expected) in zip(encoder(*images), exact.model.backbone.conv_encoder(*images), strict=True):
        assert m.dtype == torch.float32
        assert 0 < (m - e).norm() < 0.02 * e.norm()
        assert torch.equal(mask, expected)
    assert half(**given).pred_boxes.dtype == torch.float32
    through = see_through(load_detector(zoo["gdino"]), load_encoder(student, dtype=torch.bfloat16)).net
    assert through(**given).pred_boxes.dtype == torch.float32
    assert {p.dtype for p in through.model.backbone.parameters()} >= {torch.bfloat16}


# ---- boxes out of it ----


def test_a_class_is_its_tokens_in_the_prompt(zoo):
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["gdino"])
    prompt = make_prompt(("Red", "sky blue", "green"), tokenizer, 32)
    words = [tokenizer.convert_ids_to_tokens(int(i)) for i in prompt.input_ids[0]]
    assert words == ["<s>", "red", ".", "sky", "blue", ".", "green", ".", "</s>"]
    expected = torch.zeros(3, 9)
    expected[0, 1], expected[1, 3:5], expected[2, 6] = 1.0, 0.5, 1.0
    assert torch.equal(prompt.spans, expected)
    with pytest.raises(ValueError, match="9 tokens, the text tower takes 8"):
        make_prompt(("Red", "sky blue", "green"), tokenizer, 8)
    for wrong in ("a. b", " ", "what? red"):
        with pytest.raises(ValueError, match=r"is not empty and has no '\.' or '\?'"):
            make_prompt(("red", wrong), tokenizer, 32)
    with pytest.raises(ValueError, match="class 'sky mauve': the tokenizer does not know some of it"):
        make_prompt(("red", "sky mauve"), tokenizer, 32)


def test_boxes_are_the_best_pairs_of_query_and_class_in_pixels(zoo):
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["gdino"])
    prompt = make_prompt(("red", "sky blue"), tokenizer, 32)
    probabilities = torch.full((1, 2, 32), 1e-6)  # of tokens <s> red . sky blue . </s>, then padding
    probabilities[0, 0, [1, 3, 4]] = torch.tensor([0.9, 0.2, 0.6])
    probabilities[0, 1, [1, 3, 4]] = torch.tensor([0.1, 0.7, 0.5])
    probabilities[0, :, [0, 2, 10]] = 0.99  # no class's tokens: they do not count
    out = SimpleNamespace(
        logits=torch.logit(probabilities), pred_boxes=torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    )
    sizes = torch.tensor([[100, 200]])
    (found,) = detect_boxes(lambda **_: out, torch.zeros(1, 3, 32, 32), None, prompt, sizes, most=3)
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.6, 0.4]))
    assert found["labels"].tolist() == [0, 1, 1]
    first, second = [80.0, 30.0, 120.0, 70.0], [0.0, 0.0, 100.0, 100.0]
    torch.testing.assert_close(found["boxes"], torch.tensor([first, second, first]))


def test_as_many_boxes_as_groundingdino_is_evaluated_with(zoo):
    spans = torch.eye(20)
    prompt = Prompt(*torch.zeros(3, 1, 20, dtype=torch.long), spans)
    generator = torch.Generator().manual_seed(0)
    out = SimpleNamespace(logits=torch.randn(1, 20, 20, generator=generator), pred_boxes=torch.rand(1, 20, 4))
    (found,) = detect_boxes(lambda **_: out, torch.zeros(1, 3, 32, 32), None, prompt, torch.tensor([[100, 200]]))
    expected = out.logits.flatten().sigmoid().sort(descending=True).values[:300]
    torch.testing.assert_close(found["scores"], expected)


# ---- average precision ----


def truth(*boxes, labels=None, crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    n = len(boxes)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Truth(boxes, torch.tensor(labels or [0] * n), area, torch.tensor(crowd or [False] * n))


def boxes(*rows, labels=None, scores=None):
    n = len(rows)
    return {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [0] * n),
        "scores": torch.tensor(scores or [0.9] * n),
    }


A, B, SHIFTED = (0, 0, 100, 100), (200, 200, 240, 230), (0, 0, 78, 100)  # IoU of A and SHIFTED: 0.78


def test_perfect_boxes_have_ap_1():
    truths = [truth(A, B, labels=[0, 1]), truth(B, labels=[1])]
    found = average_precision(truths, [boxes(A, B, labels=[0, 1]), boxes(B, labels=[1])], ("a", "b"))
    assert (found["ap"], found["ap50"], found["ap75"], found["ar100"]) == (1, 1, 1, 1)
    assert (found["ap_small"], found["ap_medium"], found["ap_large"]) == (None, pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(
    ("found", "ap"),
    [
        # At the 4 thresholds that 0.78 misses, the best-scored box is false: precision 1/2 up to recall 1/2.
        pytest.param(
            boxes(SHIFTED, B, scores=[0.9, 0.8]), 0.6 + 0.4 * 51 / 101 / 2, id="IoU 0.78 passes 6 of 10 thresholds"
        ),
        pytest.param(boxes(A), 51 / 101, id="one of two found: precision 1 at the recalls up to 0.5"),
        pytest.param(boxes(A, B, labels=[0, 1]), 51 / 101, id="the other under a wrong class"),
        pytest.param(
            boxes(A, A, B, scores=[0.9, 0.8, 0.7]),
            (51 + 50 * 2 / 3) / 101,
            id="one found twice, between the right ones",
        ),
        pytest.param(
            boxes(B, A, (300, 0, 310, 10), scores=[0.9, 0.8, 0.1]), 1.0, id="a false one below the right ones"
        ),
        pytest.param(boxes(), 0.0, id="nothing found"),
    ],
)
def test_average_precision_has_the_known_value(found, ap):
    result = average_precision([truth(A, B)], [found], ("a", "b"))
    assert result["ap"] == pytest.approx(ap, abs=1e-6)


def test_boxes_on_a_crowd_neither_count_nor_cost():
    result = average_precision([truth(A, B, crowd=[True, False])], [boxes((0, 0, 50, 50), B)], ("a",))
    assert result["ap"] == pytest.approx(1.0)


# ---- images with boxes ----


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (50, 90), "b.png": (70, 40)}.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / name)
    tree = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "categories": [{"id": 5, "name": "sky blue"}, {"id": 2, "name": "red"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 5, 20, 30], "area": 300, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 8], "area": 70, "iscrowd": 1},
        ],
    }
    (root / "annotations.json").write_text(json.dumps(tree))
    return root


def test_cocos_annotations_are_read_as_they_are(coco):
    images = CocoImages(coco / "annotations.json", coco)
    assert (images.classes, len(images)) == (("red", "sky blue"), 2)
    pixels, found = images[0]
    assert np.array_equal(pixels, np.asarray(Image.open(coco / "a.png")))
    assert found.boxes.tolist() == [[10, 5, 30, 35], [0, 0, 9, 8]]
    assert (found.labels.tolist(), found.area.tolist(), found.crowd.tolist()) == ([1, 0], [300, 70], [False, True])
    assert images[1][1].boxes.shape == (0, 4)
    for seed in range(3):
        (one,) = CocoImages(coco / "annotations.json", coco, limit=1, seed=seed)._images
        assert one in images._images


def test_coco_boxes_lie_on_the_pixels_as_stored(coco, tmp_path):
    # COCO's boxes were drawn on the stored pixels: turning the image would move what they hold.
    turned = Image.Exif()
    turned[0x0112] = 6
    colour = np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png", exif=turned)
    sixteen = (np.arange(70 * 40, dtype=np.uint16) * 23).reshape(70, 40)
    Image.fromarray(sixteen).save(tmp_path / "b.png", exif=turned)
    images = CocoImages(coco / "annotations.json", tmp_path)
    assert np.array_equal(images[0][0], colour)
    assert np.array_equal(images[1][0], np.stack([sixteen >> 8] * 3, axis=2))


def test_annotations_that_do_not_fit_are_errors(coco, tmp_path):
    with pytest.raises(EvaluateError, match=r"a\.png is not there, and 1 more"):
        CocoImages(coco / "annotations.json", tmp_path)
    for text in ("{", "[]", json.dumps({"images": [], "categories": [], "annotations": []})):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(EvaluateError, match=r"--annotations: .*wrong\.json"):
            CocoImages(tmp_path / "wrong.json", coco)
    for part, change, said in (
        ("images", {"file_name": None}, "file_name None"),
        ("categories", {"name": None}, "name None"),
        ("annotations", {"bbox": [0, 0, float("nan"), 1]}, r"bbox \[0, 0, nan, 1\] of image 7"),
        ("annotations", {"bbox": [0, float("inf"), 1, 1]}, r"bbox \[0, inf, 1, 1\] of image 7"),
    ):
        tree = json.loads((coco / "annotations.json").read_text())
        tree[part][0] |= change
        (tmp_path / "wrong.json").write_text(json.dumps(tree))
        with pytest.raises(
            EvaluateError, match=rf"--annotations: .*wrong\.json is not COCO's JSON \(ValueError: {said}\)"
        ):
            CocoImages(tmp_path / "wrong.json", coco)


class Oracle(nn.Module):
    """Finds the one object of each image, brighter than the rest; red ones are class 0 unless it is `wrong`."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong
        self.config = SimpleNamespace(max_text_len=32)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, pixel_mask, input_ids, attention_mask, token_type_ids):
        b = len(pixel_values)
        assert pixel_mask.amax((0, 2)).all()  # no more padding than the largest image asks for
        assert pixel_mask.amax((0, 1)).all()
        assert len(input_ids) == len(attention_mask) == len(token_type_ids) == b
        assert not pixel_values.masked_select(pixel_mask[:, None] == 0).any()
        logits, pred = torch.full((b, 1, 32), -9.0), torch.zeros(b, 1, 4)
        for i, (pixels, mask) in enumerate(zip(pixel_values, pixel_mask, strict=True)):
            rows, columns = mask.any(1).sum(), mask.any(0).sum()
            image = (pixels * STD + MEAN)[:, :rows, :columns]
            ys, xs = torch.nonzero(image.amax(0) > 0.5, as_tuple=True)
            red, blue = image[0, ys, xs].mean(), image[2, ys, xs].mean()
            logits[i, 0, [1] if (red > blue) != self.wrong else [3, 4]] = 5.0  # tokens: <s> red . sky blue . </s>
            y0, y1, x0, x1 = ys.min() / rows, (ys.max() + 1) / rows, xs.min() / columns, (xs.max() + 1) / columns
            pred[i, 0] = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
        return SimpleNamespace(logits=logits, pred_boxes=pred)


@pytest.mark.parametrize(("size", "key"), [(None, "ap"), (64, "ap75")])  # resizing blurs the borders
@pytest.mark.parametrize("workers", [0, 1])
def test_a_detector_that_is_right_has_ap_1_on_images_of_several_sizes(zoo, tmp_path, size, key, workers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["gdino"])
    tree = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "sky blue"}]}
    for i, (height, width) in enumerate([(50, 90), (100, 40), (64, 64), (33, 100), (48, 130)]):
        pixels = np.full((height, width, 3), 40, np.uint8)
        x, y, w, h = 5 + 2 * i, 4 + i, 20, 16
        pixels[y : y + h, x : x + w] = [(255, 0, 0), (0, 0, 255)][i % 2]
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        tree["images"].append({"id": i, "file_name": f"{i}.png"})
        tree["annotations"].append({"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [x, y, w, h]})
    (tmp_path / "a.json").write_text(json.dumps(tree))
    images = CocoImages(tmp_path / "a.json", tmp_path)
    right, wrong = (Detector(Oracle(w), tokenizer, MEAN.flatten().tolist(), STD.flatten().tolist()) for w in (0, 1))
    picture = tmp_path / "found.png"
    found = detect(right, images, images.classes, size=size, batch_size=3, workers=workers, picture=picture)
    assert found[key] == pytest.approx(1.0)
    assert (found["images"], found["boxes"]) == (5, 5)
    assert np.asarray(Image.open(picture)).std() > 10
    # Each query counts for both classes, the right one now behind all wrong ones: precision 3/5 for red, 2/5 for blue.
    assert detect(wrong, images, images.classes, size=size, batch_size=3)["ap50"] == pytest.approx(0.5)


class Knows(nn.Module):
    """Answers with the objects of `truths`, image by image, each under its class; boxes moved by `shift`."""

    places = ([1], [3], [5, 6])  # tokens: <s> green . red . sky blue . </s>

    def __init__(self, truths, canvas, shift):
        super().__init__()
        self.truths, self.canvas, self.shift = iter(truths), canvas, shift
        self.config = SimpleNamespace(max_text_len=32)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, **_):
        logits, pred = torch.full((len(input_ids), 8, 32), -9.0), torch.full((len(input_ids), 8, 4), 0.01)
        for row, boxes in zip(logits, pred, strict=True):
            found = next(self.truths)
            first, last = (found.boxes / self.canvas).split(2, dim=1)
            boxes[: len(first)] = torch.cat([(first + last) / 2, last - first], dim=1) + self.shift
            for query, label in enumerate(found.labels):
                row[query, self.places[label]] = 9.0
        return SimpleNamespace(logits=logits, pred_boxes=pred)


@pytest.mark.parametrize(("shift", "ap"), [(0.0, 1.0), (0.9, 0.0)])
def test_a_detector_that_knows_the_mosaics_has_ap_1_and_with_every_box_moved_aside_0(zoo, coloured, shift, ap):
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["gdino"])
    mosaics = Mosaics(LabelledImages(coloured), 5, 128, seed=1)
    truths = [mosaics[i][1] for i in range(len(mosaics))]
    assert {len(t.labels) for t in truths} > {1, 2}
    assert {label for t in truths for label in t.labels.tolist()} == {0, 1, 2}
    knows = Detector(Knows(truths, 128, shift), tokenizer, MEAN.flatten().tolist(), STD.flatten().tolist())
    found = detect(knows, mosaics, ("green", "red", "sky blue"), batch_size=3)
    assert (found["ap"], found["ap50"], found["ap75"]) == pytest.approx((ap, ap, ap))


def test_one_image_at_a_time_has_no_padding_but_what_a_student_needs(zoo, student, coco):
    images = CocoImages(coco / "annotations.json", coco)  # 50×90 and 70×40
    detectors = load_detector(zoo["gdino"]), see_through(load_detector(zoo["gdino"]), load_encoder(student))
    seen = []
    for detector in detectors:
        encoder = detector.net.model.backbone.conv_encoder
        encoder.register_forward_pre_hook(lambda _, args: seen.append(args))
        detect(detector, images, images.classes, batch_size=1)
    for i, ((pixels, mask), (padded, padded_mask)) in enumerate(zip(seen[:2], seen[2:], strict=True)):
        image = (torch.tensor(images[i][0]).permute(2, 0, 1) / 255 - MEAN) / STD
        torch.testing.assert_close(pixels, image[None], atol=1e-5, rtol=1e-5)
        assert mask.all()
        height, width = pixels.shape[2:]
        more = (0, -width % 32, 0, -height % 32)
        assert torch.equal(padded, nn.functional.pad(pixels, more))
        assert torch.equal(padded_mask, nn.functional.pad(mask, more))


def test_a_picture_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch):
    def fill_the_disk(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    picture = tmp_path / "found.png"
    picture.write_bytes(b"before")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_the_disk)
    with pytest.raises(EvaluateError, match=r"--picture: .* cannot be written \(No space left on device\)"):
        save_picture(picture, [(np.zeros((32, 32, 3), np.uint8), truth(A), boxes(A))], ("a",))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_mosaics_are_the_same_again_and_their_boxes_hold_the_images(coloured):
    images = LabelledImages(coloured)
    mosaics = Mosaics(images, 3, 128, seed=0)
    mean = {
        label: np.mean([images[i][0].mean((0, 1)) for i in range(36) if images[i][1] == label], axis=0)
        for label in range(3)
    }
    for i in range(3):
        pixels, found = mosaics[i]
        assert np.array_equal(pixels, mosaics[i][0])
        assert pixels.shape == (128, 128, 3)
        assert len(found.labels) >= 1
        for (x0, y0, x1, y1), label in zip(found.boxes.round().int().tolist(), found.labels.tolist(), strict=True):
            inside = pixels[y0:y1, x0:x1].mean((0, 1))
            assert min(mean, key=lambda n: np.abs(mean[n] - inside).sum()) == label
    assert not np.array_equal(mosaics[0][0], mosaics[1][0])
    assert not np.array_equal(mosaics[0][0], Mosaics(images, 3, 128, seed=1)[0][0])
