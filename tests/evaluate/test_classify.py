"""zero-shot, knn and linear: against transformers' CLIP, scikit-learn, and cases whose accuracy is known."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")

from kpu_fast.data.labelled import LabelledImages, to_batch  # noqa: E402
from kpu_fast.evaluate import knn as knn_file  # noqa: E402
from kpu_fast.evaluate.encoder import Encoder, load_encoder  # noqa: E402
from kpu_fast.evaluate.images import check_apart, read_images  # noqa: E402
from kpu_fast.evaluate.knn import knn, vote  # noqa: E402
from kpu_fast.evaluate.linear import linear, regress  # noqa: E402
from kpu_fast.evaluate.result import EvaluateError  # noqa: E402
from kpu_fast.evaluate.zero_shot import class_names, embed_texts, repeated, zero_shot  # noqa: E402
from kpu_fast.models import Features, FeatureSpec, Student, ViT  # noqa: E402

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # green, red, sky_blue: the classes' order
FEW = {"size": 32, "batch_size": 8, "workers": 0}


class Colour(nn.Module):
    """x is the image's mean colour times `scale`; its one map is the image itself."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return Features(images.mean((2, 3)) * self.scale, (images.permute(0, 2, 3, 1),))


def colours(scale=1.0):
    return Encoder("colours", "clip", Colour(scale), 32)


class Relabelled(torch.utils.data.Dataset):
    """Images with other labels."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels, self.classes = images, list(labels), classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i][0], self.labels[i]


@pytest.fixture(scope="module")
def images(coloured):
    return LabelledImages(coloured)


# ---- zero-shot ----


def test_top1_is_the_share_of_images_whose_class_is_the_closest_text(images):
    labels = list(images.labels)
    for i in (0, 5, 13):
        labels[i] = (labels[i] + 1) % 3
    found = zero_shot(colours(), TEXTS, Relabelled(images, labels), **FEW)
    assert found == {"top1": pytest.approx(33 / 36), "images": 36, "size": 32, "head": None}


def test_the_length_of_x_and_of_the_texts_does_not_count(images):
    texts = TEXTS * torch.tensor([[1.0], [50.0], [0.1]])
    assert zero_shot(colours(7.0), texts, images, **FEW)["top1"] == 1.0


def test_top5_is_given_where_there_are_more_than_five_classes(images):
    # To each image its own colour is closest, then come the four greys, then the other two colours.
    texts = torch.cat([torch.ones(4, 3), TEXTS])
    cases = [(lambda n: 4 + n, (1, 1)), (lambda n: n, (0, 1)), (lambda n: 4 + (n + 1) % 3, (0, 0))]
    for number, expected in cases:
        found = zero_shot(colours(), texts, Relabelled(images, map(number, images.labels)), **FEW)
        assert (found["top1"], found["top5"]) == expected


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a {}", "the {} photo.")])
def test_on_a_clip_the_accuracy_is_that_of_transformers_own_forward(zoo, images, templates):
    encoder = load_encoder(zoo["clip"])
    names = class_names(images, None)
    assert names == ("green", "red", "sky blue")
    model = transformers.CLIPModel.from_pretrained(zoo["clip"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["clip"])
    pixels = to_batch([images[i][0] for i in range(len(images))], 64)
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        embedded = []
        for name in names:
            tokens = [tokenizer(template.replace("{}", name), return_tensors="pt") for template in templates]
            one = torch.cat([model.get_text_features(**t).pooler_output for t in tokens])
            embedded.append(F.normalize(F.normalize(one, dim=1).mean(0), dim=0))
        x = model.get_image_features(pixel_values=pixels).pooler_output
    predicted = (F.normalize(x, dim=1) @ torch.stack(embedded).T).argmax(1)
    # Labels of which a known part agrees with CLIP's own predictions.
    labels = predicted.clone()
    labels[::4] = (labels[::4] + 1) % 3
    texts = embed_texts(zoo["clip"], names, templates)
    torch.testing.assert_close(texts, torch.stack(embedded))
    found = zero_shot(encoder, texts, Relabelled(images, labels.tolist()), size=64, batch_size=8)
    assert found["top1"] == pytest.approx(0.75)


def test_a_student_is_read_through_the_head_whose_x_is_in_the_texts_space(zoo, student, images):
    encoder = load_encoder(student)
    texts = embed_texts(zoo["clip"], class_names(images, None))
    own = Student.from_pretrained(student)
    with torch.no_grad():
        pixels = to_batch([images[i][0] for i in range(len(images))], 64)
        x = own.project(own(pixels), "clip").x
    predicted = (F.normalize(x, dim=1) @ texts.T).argmax(1).tolist()
    labels = [label if i % 3 else (label + 1) % 3 for i, label in enumerate(predicted)]
    for name in (None, "clip"):
        found = zero_shot(encoder, texts, Relabelled(images, labels), size=64, batch_size=8, teacher_name=name)
        assert found["top1"] == pytest.approx(2 / 3)
        assert (found["head"], found["size"]) == ("clip", 64)


def test_siglips_texts_are_lower_case_and_their_padding_is_read(zoo):
    model = transformers.SiglipModel.from_pretrained(zoo["siglip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["siglip"])
    tokens = tokenizer(["a photo of a red", "a photo of the sky"], padding="max_length", max_length=32)
    with torch.no_grad():
        wanted = model.get_text_features(input_ids=torch.tensor(tokens["input_ids"])).pooler_output
    found = embed_texts(zoo["siglip"], ("Red", "Sky"), ("A photo of a {}",))
    torch.testing.assert_close(found[0], F.normalize(wanted, dim=1)[0])
    assert (found[1] - F.normalize(wanted, dim=1)[1]).abs().max() > 1e-3


def test_siglips_predictions_are_transformers(zoo, images):
    names = class_names(images, None)
    model = transformers.SiglipModel.from_pretrained(zoo["siglip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo["siglip"])
    tokens = tokenizer([f"a photo of a {name}." for name in names], padding="max_length", max_length=32)
    pixels = (to_batch([images[i][0] for i in range(len(images))], 64) - 0.5) / 0.5
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=torch.tensor(tokens["input_ids"]))
    predicted = out.logits_per_image.argmax(1)
    labels = predicted.clone()
    labels[::4] = (labels[::4] + 1) % 3
    texts = embed_texts(zoo["siglip"], names)
    encoder = load_encoder(zoo["siglip"])
    assert (encoder.kind, encoder.image_size) == ("siglip", 64)
    found = zero_shot(encoder, texts, Relabelled(images, labels.tolist()), size=64, batch_size=8, tower="siglip")
    assert found["top1"] == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_tower_alone_will_do_and_an_image_tower_will_not(zoo, kind, tmp_path):
    names = {
        "clip": ("CLIPTextModelWithProjection", "CLIPVisionModel"),
        "siglip": ("SiglipTextModel", "SiglipVisionModel"),
    }
    for name, part in zip(names[kind], ("text", "vision"), strict=True):
        shutil.copytree(zoo[kind], tmp_path / part)  # with its tokenizer
        getattr(transformers, name).from_pretrained(zoo[kind]).save_pretrained(tmp_path / part)
    expected, found = (embed_texts(folder, ("red", "green")) for folder in (zoo[kind], tmp_path / "text"))
    torch.testing.assert_close(found, expected)
    with pytest.raises(
        EvaluateError, match=f"of type '{kind}_vision_model', expected CLIP or SigLIP with its text tower"
    ):
        embed_texts(tmp_path / "vision", ("red", "green"))


def test_clips_texts_keep_their_capitals(zoo):
    found = embed_texts(zoo["clip"], ("red", "Red"))  # the second is no word of its tokenizer
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_siglip_1_has_its_own_tokenizer(zoo, tmp_path):
    """Of sentencepiece, which the `train` extra brings."""
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("a photo of a red ball\nthe sky is blue and the ball is red\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=40, pad_id=-1, unk_id=2,
        bos_id=-1, eos_id=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    folder = shutil.copytree(zoo["siglip"], tmp_path / "siglip", ignore=shutil.ignore_patterns("*token*"))
    shutil.copy(tmp_path / "spiece.model", folder)
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 32, "pad_token": "</s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = embed_texts(folder, ("red ball", "RED, ball", "blue sky"))
    torch.testing.assert_close(found[0], found[1])  # capitals and punctuation count for nothing
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_one_towers_texts_are_not_the_others(zoo, images):
    texts = embed_texts(zoo["siglip"], class_names(images, None))
    with pytest.raises(EvaluateError, match="is a clip, whose x is not in SigLIP's space; give a student or SigLIP"):
        zero_shot(load_encoder(zoo["clip"]), texts, images, size=64, tower="siglip")
    with pytest.raises(EvaluateError, match="is a siglip, whose x is not in CLIP's space; give a student or CLIP"):
        zero_shot(load_encoder(zoo["siglip"]), texts, images, size=64)


@pytest.mark.parametrize(
    ("head", "asked", "warned"), [("dino", None, True), ("dino", "dino", False), ("ViT CLIP", None, False)]
)
def test_a_head_that_nobody_named_and_that_may_be_no_clips_is_warned_of(images, capsys, head, asked, warned):
    vit = {"patch_size": 16, "dim": 32, "depth": 1, "heads": 2, "image_size": 32}
    own = Student(vit=vit, adapter=None, heads={head: FeatureSpec(3, (8,), (16.0,))}, head_hidden=8)
    found = zero_shot(Encoder("own", "student", own, 32), TEXTS, images, **FEW, teacher_name=asked)
    assert found["head"] == head
    assert ("warning: own: read through its head 'dino', the only one" in capsys.readouterr().err) == warned


def test_braces_in_a_class_or_a_template_are_text(zoo):
    found = embed_texts(zoo["clip"], ("{x}", "red"), ("a {} {x} photo",))
    expected = embed_texts(zoo["clip"], ("a {x} {x} photo", "a red {x} photo"), ("{}",))
    torch.testing.assert_close(found, expected)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_class_names_are_lines_none_empty(images, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("green\nred\nsky_blue\n")
    assert class_names(images, path) == ("green", "red", "sky blue")
    assert repeated(class_names(images, path)) == []
    path.write_text("Green\nred\nsky blue\n")
    assert class_names(images, path) == ("Green", "red", "sky blue")
    path.write_text("green\n\nsky_blue\nred\n")
    with pytest.raises(EvaluateError, match=r"--classes: .*none empty"):
        class_names(images, path)
    path.write_text("sky_blue\nred\nsky blue\nred\ngreen\n")
    assert repeated(class_names(images, path)) == ["sky blue", "red"]


def test_the_images_own_names_in_another_order_are_refused(images, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("green\nsky blue\nRed\n")
    message = rf"^--classes: {path} has the images' own class names in another order, 'sky blue' where class 1 is 'red'"
    with pytest.raises(EvaluateError, match=message):
        class_names(images, path)
    other = Relabelled(images, images.labels)  # images that name no class: the file is all there is
    assert class_names(other, path) == ("green", "sky blue", "Red")


def test_wordnets_numbers_are_no_names(images, tmp_path):
    numbers = ("n01440764", "n01443537", "n02102040")
    folders = Relabelled(images, images.labels, classes=numbers)
    with pytest.raises(EvaluateError, match=r"^--images: a class is called 'n01440764', WordNet's number of it"):
        class_names(folders, None)
    path = tmp_path / "names.txt"
    path.write_text("tench\ngoldfish\nspringer\n")
    assert class_names(folders, path) == ("tench", "goldfish", "springer")


def test_one_class_alone_is_nothing_to_choose_from(images, monkeypatch):
    monkeypatch.setattr(Colour, "forward", None)
    with pytest.raises(EvaluateError, match=r"^--images, --classes: the name of one class only"):
        zero_shot(colours(), TEXTS[:1], Relabelled(images, [0] * 36), **FEW)


def test_what_is_not_in_the_texts_space_is_an_error(zoo, student, images):
    texts = torch.eye(7)
    with pytest.raises(EvaluateError, match=r"no head gives x of 7 channels; it has \"clip\", \"gdino\""):
        zero_shot(load_encoder(student), texts, images, **FEW)
    with pytest.raises(EvaluateError, match=r"--teacher-name gdino: that head of .* gives no x of 24 channels"):
        zero_shot(load_encoder(student), torch.eye(24), images, **FEW, teacher_name="gdino")
    with pytest.raises(EvaluateError, match=r"--teacher-name dino: .* has heads for"):
        zero_shot(load_encoder(student), torch.eye(24), images, **FEW, teacher_name="dino")
    with pytest.raises(EvaluateError, match="x has 24 channels, the text tower gives 7"):
        zero_shot(load_encoder(zoo["clip"]), texts, images, size=64)
    with pytest.raises(EvaluateError, match="is a sentinel, whose x is not in CLIP's space"):
        zero_shot(load_encoder(zoo["dinov2"]), texts, images, **FEW)
    with pytest.raises(EvaluateError, match="is no student and has no heads"):
        zero_shot(load_encoder(zoo["clip"]), torch.eye(24), images, size=64, teacher_name="clip")


# ---- neighbours and the linear probe ----


@pytest.mark.parametrize("chunk", [7, 1 << 16])  # several parts of the training set, and one
def test_votes_are_scikit_learns_with_dinos_weights(monkeypatch, chunk):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(knn_file, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    known, queries = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (60, 40))
    labels = torch.randint(0, 4, (60,), generator=generator)
    reference = KNeighborsClassifier(9, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = reference.fit(known.numpy(), labels.numpy()).predict_proba(queries.numpy())
    found = vote(queries, known, labels, 4, 9, 0.07)
    torch.testing.assert_close(F.normalize(found, p=1, dim=1).double(), torch.tensor(expected), atol=1e-4, rtol=0)


def test_more_neighbours_than_training_images_means_all_of_them():
    known = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    found = vote(known[:1], known, torch.tensor([0, 1, 1]), 2, 20, 0.5)
    cosines = torch.tensor([1.0, 0.0, 2**-0.5])
    weights = ((cosines - 1) / 0.5).exp()
    torch.testing.assert_close(found[0], torch.stack([weights[0], weights[1] + weights[2]]))


@pytest.mark.parametrize("features", ["x", "map"])  # the mean of Colour's map is its x
@pytest.mark.parametrize("score", [knn, linear])
def test_classes_that_lie_apart_are_told_apart_and_wrong_labels_are_counted(images, score, features):
    found = score(colours(), images, images, **FEW, features=features)
    assert (found["top1"], found["images"], found["train_images"]) == (1.0, 36, 36)
    wrong = [(label + 1) % 3 if i % 6 == 0 else label for i, label in enumerate(images.labels)]
    for labels in (wrong, torch.tensor(wrong)):
        found = score(colours(), images, Relabelled(images, labels), **FEW, features=features)
        assert found["top1"] == pytest.approx(5 / 6)


def test_the_probe_says_when_it_did_not_converge(images):
    assert linear(colours(), images, images, **FEW, max_iter=1)["converged"] is False
    assert linear(colours(), images, images, **FEW)["converged"] is True


def test_the_scale_of_a_channel_does_not_count_for_the_probe():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 6, generator=generator), torch.randint(0, 3, (300,), generator=generator)
    x[:, 0] += labels  # what tells the classes apart, in part
    known, asked = (x[:200], labels[:200]), (x[200:], labels[200:])
    top1, _ = regress(known, asked, 3)
    assert 0.4 < top1 < 0.9
    scales = torch.tensor([1e-3, 1.0, 1.0, 1.0, 1.0, 100.0])
    scaled, _ = regress((known[0] * scales + 5, known[1]), (asked[0] * scales + 5, asked[1]), 3)
    assert scaled == pytest.approx(top1, abs=0.011)  # an image or none, by rounding


def test_teacher_name_takes_the_features_into_that_space(student, images):
    encoder = load_encoder(student)
    pixels = to_batch([images[i][0] for i in range(3)], 64)
    own = Student.from_pretrained(student)
    with torch.no_grad():
        projected = own.project(own(pixels), "gdino")
    means = torch.cat([m.mean((1, 2)) for m in projected.maps], dim=1)
    torch.testing.assert_close(encoder.vectors(pixels, "map", "gdino"), means)
    # Labels that are those of the nearest image in that space, for 2 of 3 images: no other features give that figure.
    known = torch.utils.data.Subset(images, range(0, 36, 2))
    asked = torch.utils.data.Subset(images, range(1, 36, 2))
    space = [to_batch([half[i][0] for i in range(18)], 32) for half in (known, asked)]
    vectors = [F.normalize(encoder.vectors(p, "map", "gdino"), dim=1) for p in space]
    nearest = (vectors[1] @ vectors[0].T).argmax(1).tolist()
    labels = [n if i % 3 else (n + 1) % 18 for i, n in enumerate(nearest)]
    common = dict(size=32, features="map", k=1)
    sets = Relabelled(known, range(18)), Relabelled(asked, labels)
    found = knn(encoder, *sets, **common, teacher_name="gdino")
    assert (found["top1"], found["head"], found["size"]) == (pytest.approx(2 / 3), "gdino", 32)
    assert knn(encoder, *sets, **common)["top1"] < 0.6
    with pytest.raises(EvaluateError, match="has no x for an image as a whole; use --features map"):
        knn(encoder, images, images, size=32, teacher_name="gdino")


def test_classes_must_be_the_same_on_both_sides_and_more_than_one(images, monkeypatch):
    monkeypatch.setattr(Colour, "forward", None)  # what does not fit is seen before anything is encoded
    with pytest.raises(EvaluateError, match="numbers would mean different things"):
        knn(colours(), images, Relabelled(images, images.labels, ("a", "b", "c")), **FEW)
    alike = Relabelled(images, [0] * 36)
    with pytest.raises(EvaluateError, match="one class only"):
        knn(colours(), alike, alike, **FEW)
    with pytest.raises(EvaluateError, match="one class only"):
        linear(colours(), alike, images, **FEW)


def test_features_that_are_not_finite_stop_every_evaluation(images):
    for score in (knn, linear):
        with pytest.raises(EvaluateError, match="NaN or Inf in the features of images 0 to 8"):
            score(colours(float("nan")), images, images, **FEW)


# ---- what can be evaluated ----


def test_a_sentinel_is_the_students_own_vit(zoo):
    encoder = load_encoder(zoo["dinov2"])
    assert (encoder.kind, encoder.image_size) == ("sentinel", 64)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    with torch.no_grad():
        out = transformers.Dinov2WithRegistersModel.from_pretrained(zoo["dinov2"])(
            pixel_values=(pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        )
        x, _ = ViT.from_hf(zoo["dinov2"])(pixels)
    torch.testing.assert_close(encoder.vectors(pixels), out.pooler_output)
    torch.testing.assert_close(encoder.vectors(pixels), x)


@pytest.mark.parametrize(
    "wrong", [{"vision_config": None}, {"vision_config": []}, {"vision_config": {"image_size": "64"}},
              {"model_type": ["clip"]}],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_named(zoo, tmp_path, wrong):
    shutil.copytree(zoo["clip"], tmp_path / "clip")
    file = tmp_path / "clip/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    part = "image_size" if "image_size" in str(wrong) else next(iter(wrong))
    with pytest.raises(EvaluateError, match=rf"^--model: {file}: {part} is .*; fetch the model again$"):
        load_encoder(tmp_path / "clip")


def test_models_come_with_the_size_they_are_evaluated_at(zoo, student):
    assert [load_encoder(path).image_size for path in (zoo["clip"], student, zoo["gdino"])] == [64, 64, 224]
    assert load_encoder(zoo["gdino"]).kind == "grounding_dino"


def test_bf16_stays_close_to_fp32(zoo, student, images):
    pixels = to_batch([images[i][0] for i in range(6)], 64)
    for path in (zoo["clip"], zoo["dinov2"], student):
        exact, rounded = (load_encoder(path, dtype=d).vectors(pixels) for d in (torch.float32, torch.bfloat16))
        assert rounded.dtype == torch.float32
        assert F.cosine_similarity(exact, rounded).min() > 0.99
        assert not torch.equal(exact, rounded)


def cifar(folder):
    """CIFAR-10 as it unpacks, with two images a batch."""
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = np.full((2, 3072), 200 if name == "test_batch" else 50, np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": [0, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}))
    return folder


def test_cifars_parts_are_named_and_are_apart(tmp_path):
    source = cifar(tmp_path / "cifar-10-batches-py")
    with pytest.raises(EvaluateError, match=rf"^--images: {source} holds training and test images; give .*:test$"):
        read_images("--images", str(source))
    assert read_images("--images", f"{source}:test")[0][0].min() == 200
    assert len(read_images("--images", f"{source}:train")) == 10
    check_apart(f"{source}:train", f"{source}:test")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(EvaluateError, match="shares 2 files"):
        check_apart(f"{source}:test", f"{tmp_path / 'link'}:test")


def test_a_limit_draws_the_same_images_of_every_class_again(coloured, images):
    part, again = (read_images("--images", str(coloured), 18) for _ in range(2))
    assert part.labels == again.labels == [part[i][1] for i in range(18)]
    assert set(part.labels) == {0, 1, 2}
    assert part.classes == images.classes
    assert read_images("--images", str(coloured), 18, seed=1).indices != part.indices
    assert len(read_images("--images", str(coloured), 100)) == 36
