"""The feature picture: colours against an SVD, padding and crop read back from the pixels of the file."""

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from kpu_fast.engine import picture  # noqa: E402
from kpu_fast.engine.picture import Panel, save_feature_picture  # noqa: E402


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def panel(n=2, size=(64, 96), channels=12, **changes):
    h, w = size[0] // 8, size[1] // 8
    values = dict(
        name="clip",
        images=torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1)),
        valid=None,
        teacher=maps(n, h, w, channels),
        projected=maps(n, h, w, channels, seed=2),
        student=maps(n, h // 2, w // 2, 20, seed=3),
    )
    return Panel(**{**values, **changes})


def read(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)


def share(pixels, colour):
    """Share of the picture that has a colour, exactly."""
    return (pixels == np.array(colour)).all(1).mean()


@pytest.mark.parametrize(("tokens", "channels"), [(401, 12), (1271, 768)])  # exact and randomised solver
def test_colours_are_the_principal_components(tokens, channels):
    # A spectrum with clear steps, so that the components are unique up to their sign.
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([9.0, 5.0, 3.0] + [0.1] * (channels - 3))
    x = torch.randn(tokens, channels, generator=generator) * scales + 4.0
    rgb = torch.from_numpy(picture.fit_colours(x.numpy())(x.numpy()))
    u, s, _ = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    for i in range(3):
        inner = (rgb[:, i] > 0) & (rgb[:, i] < 1)
        assert inner.double().mean() == pytest.approx(0.98, abs=0.01)  # 1st to 99th percentile
        both = torch.stack([rgb[inner, i].double(), u[inner, i] * s[i]])
        assert torch.corrcoef(both)[0, 1].abs() > 0.9999


def test_the_same_feature_has_the_same_colour_on_both_sides(tmp_path):
    """A student that equals its teacher, mirrored: its picture is the mirrored picture, whatever its grid."""
    teacher = maps(1, 6, 8, 12).numpy()
    colour = picture.fit_colours(teacher.reshape(-1, 12))
    assert np.allclose(colour(teacher)[:, ::-1], colour(teacher[:, ::-1]))
    assert np.allclose(colour(teacher)[:, :2, :3], colour(teacher[:, :2, :3]))
    assert not np.allclose(colour(teacher), colour(2 * teacher), atol=0.1)  # one scale: a wrong size shows


def test_padding_is_cut_off_and_not_looked_at(tmp_path):
    images = torch.zeros(2, 3, 64, 96)
    images[:, 0] = 1.0  # red picture
    images[:, :, 48:] = images[:, :, :, 80:] = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)  # green padding
    valid = torch.zeros(2, 64, 96, dtype=torch.bool)
    valid[:, :48, :80] = True
    save_feature_picture(tmp_path / "all.png", [panel(images=images)])
    save_feature_picture(tmp_path / "cut.png", [panel(images=images, valid=valid)])
    assert share(read(tmp_path / "all.png"), (0, 255, 0)) > 0.05
    assert share(read(tmp_path / "cut.png"), (0, 255, 0)) == 0
    assert share(read(tmp_path / "cut.png"), (255, 0, 0)) > 0.1

    wild = panel(images=images, valid=valid)
    for m in (wild.teacher, wild.projected, wild.student):
        pixels = 64 // m.shape[1]  # pixels per cell
        m[:, 48 // pixels :] = 1e6
        m[:, :, 80 // pixels :] = float("nan")
    save_feature_picture(tmp_path / "wild.png", [wild])
    assert np.array_equal(read(tmp_path / "wild.png"), read(tmp_path / "cut.png"))


def test_cells_are_enlarged_without_blending(tmp_path):
    colours = picture.fit_colours(maps(4, 12).numpy())(maps(1, 2, 2, 12).numpy())
    flat = panel(n=1, size=(64, 64), images=torch.ones(1, 3, 64, 64), teacher=maps(1, 2, 2, 12))
    flat = flat._replace(projected=torch.zeros(1, 2, 2, 12), student=torch.zeros(1, 2, 2, 20))
    save_feature_picture(tmp_path / "cells.png", [flat])
    pixels = read(tmp_path / "cells.png")
    for colour in colours.reshape(-1, 3):
        near = np.abs(pixels - colour * 255).max(1) <= 1
        assert near.mean() > 0.03  # a quarter of one of four columns


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_degenerate_features_are_grey(tmp_path, value):
    dead = panel(teacher=torch.full((2, 8, 12, 12), value), student=torch.full((2, 4, 6, 20), value))
    save_feature_picture(tmp_path / "dead.png", [dead])
    grey = share(read(tmp_path / "dead.png"), (128, 128, 128)) + share(read(tmp_path / "dead.png"), (127, 127, 127))
    assert grey > 0.3  # three of four columns (the projected student has no basis to be drawn in)


def test_few_channels_few_cells_and_bf16(tmp_path):
    small = panel(n=1, size=(16, 16), channels=2, teacher=maps(1, 1, 2, 2).bfloat16().requires_grad_())
    small = small._replace(projected=maps(1, 2, 2, 2), student=maps(1, 1, 1, 1))
    empty = panel(valid=torch.zeros(2, 64, 96, dtype=torch.bool))
    save_feature_picture(tmp_path / "small.png", [small, empty])
    assert len(read(tmp_path / "small.png")) > 10_000


def test_written_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "features.png"
    save_feature_picture(path, [panel()])
    before = path.read_bytes()
    from matplotlib.figure import Figure

    def half(self, file, **options):
        file.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save_feature_picture(path, [panel()])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["features.png"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projected": maps(2, 8, 12, 5)}, "'clip': projected has 5 channels, the teacher 12"),
        ({"student": maps(1, 4, 6, 20)}, "student is \\(1, 4, 6, 20\\), expected \\(2,"),
        ({"teacher": maps(2, 96, 12)}, "teacher is"),
        ({"valid": torch.ones(2, 8, 12, dtype=torch.bool)}, "valid is \\(2, 8, 12\\), expected \\(2, 64, 96\\)"),
    ],
)
def test_shapes_that_do_not_belong_together(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        save_feature_picture(tmp_path / "no.png", [panel(**changes)])


def test_a_student_without_heads_has_a_column_less(tmp_path):
    """The teacher's colours and the student's own stay what they are beside a projection."""
    for name, made in (("with", panel()), ("without", panel(projected=None))):
        save_feature_picture(tmp_path / f"{name}.png", [made])
    from matplotlib.image import imread

    width = {name: imread(tmp_path / f"{name}.png").shape[1] for name in ("with", "without")}
    assert width["without"] / width["with"] == pytest.approx(3 / 4, abs=0.02)
    for part in ("teacher", "student"):
        values = getattr(panel(), part).numpy()
        colours = picture.fit_colours(values.reshape(-1, values.shape[-1]))(values).reshape(-1, 3)
        pixels = read(tmp_path / "without.png")
        for colour in colours[:8]:
            assert (np.abs(pixels - colour * 255).max(1) <= 1).any()
