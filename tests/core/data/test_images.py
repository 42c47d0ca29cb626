"""Pictures: what is drawn, what is read from files, and batches that go on where they stopped."""

import numpy as np
import pytest
import torch
from PIL import Image

from canon.core.data import shapes as drawn
from canon.core.data.images import (
    THINGS,
    PictureBatches,
    emoji,
    jitter,
    load_pictures,
    open_image,
    sheet,
    to_float,
    to_uint8,
)
from canon.core.data.picture_files import example_caption
from canon.core.errors import UserError


def test_emoji_have_their_names_in_four_languages_and_their_colours():
    noto = emoji(32)
    apple = noto.characters.index("🍎")
    assert {lang: labels[apple] for lang, labels in noto.labels.items()} == {
        "en": "red apple",
        "de": "roter Apfel",
        "fr": "pomme rouge",
        "zh": "红苹果",
    }
    assert "fruit" in noto.tags["en"][apple]
    assert noto.groups[apple] == "food & drink"
    red, green, blue = noto.images[apple, :, 14:22, 12:20].float().mean((1, 2))
    assert red > 2 * max(green, blue)
    assert (noto.images[apple, :, 0, 0] == 255).all()  # on white
    assert len(noto.images) > 1600
    captions = [ways[0] for ways in load_pictures("things", 32).captions]
    assert len(captions) == sum(group in THINGS for group in noto.groups)
    assert {"red apple", "cat face", "sunflower", "soccer ball"} < set(captions)
    assert not {"rocket", "keycap: 1", "flag: France"} & set(captions)


def test_another_style_draws_the_same_things_differently():
    noto, other = emoji(32), emoji(32, "twemoji")
    a, b = noto.characters.index("🍎"), other.characters.index("🍎")
    assert other.labels["en"][b] == "red apple"
    assert not torch.equal(noto.images[a], other.images[b])


def test_shorter_captions_say_less_of_the_same_shape():
    (ways,) = drawn.shorter(["a large red star at the top left"])
    assert ways.count("a large red star at the top left") == len(ways) / 2
    assert set(ways[len(ways) // 2 :]) == {
        "a star", "a red star", "a star at the top left", "a red star at the top left", "a large red star"
    }  # fmt: skip
    pictures = load_pictures("shapes", 32)
    full = drawn.shapes(6_000, 32).captions
    assert [some[0] for some in pictures.captions] == full


def test_shapes_are_what_their_captions_say():
    some = drawn.shapes(400, seed=5)
    for i, caption in enumerate(some.captions):
        said = drawn.read_prompt(caption)
        assert said == {name: int(getattr(some, name)[i]) for name in drawn.ATTRIBUTES}
        ys, xs = some.masks[i].nonzero(as_tuple=True)
        x, y = (xs.float().mean() / 16 - 1).item(), (ys.float().mean() / 16 - 1).item()
        place = list(drawn.PLACES.values())[said["place"]]
        assert abs(x - place[0]) < 0.2
        assert abs(y - place[1]) < 0.2
        inside = to_float(some.images[i])[:, some.masks[i]].median(1).values
        paints = torch.tensor(list(drawn.COLOURS.values()))
        assert int((paints - inside).norm(dim=1).argmin()) == said["colour"]
    areas = some.masks.float().mean((1, 2))
    assert areas[some.size == 1].mean() > 2 * areas[some.size == 0].mean()
    assert some.images.min() > 12
    assert some.images.max() < 243  # within [-0.9, 0.9]


def test_the_oracle_reads_unseen_pictures():
    fresh = drawn.shapes(2000, seed=99)
    read = drawn.oracle(32).read(to_float(fresh.images))
    for name in drawn.ATTRIBUTES:
        assert (read[name] == getattr(fresh, name)).float().mean() >= 0.99, name
    noise = drawn.oracle(32).read(torch.randn(500, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5)
    assert (noise["form"] == fresh.form[:500]).float().mean() < 0.5


def test_batches_go_on_exactly_and_show_every_picture_once_an_epoch():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4).contiguous()
    tokens = torch.arange(20).view(10, 2, 1)
    batches = PictureBatches(images, tokens, 5, seed=3, augment=jitter)
    first = [next(batches) for _ in range(2)]
    seen = torch.cat([batch["tokens"][:, 0] for batch in first])
    assert sorted((seen // 2).tolist()) == list(range(10))
    state = batches.state_dict()
    expected = next(batches)
    again = PictureBatches(images, tokens, 5, seed=3, augment=jitter)
    again.load_state_dict(state)
    for key, value in next(again).items():
        assert torch.equal(value, expected[key])
    with pytest.raises(UserError, match="do not fill a batch of 11"):
        PictureBatches(images, tokens, 11)


def test_jitter_moves_in_white():
    black = torch.full((8, 3, 16, 16), -1.0)
    moved = jitter(black, torch.Generator().manual_seed(0), shift=0.3, scale=0.0)
    corners = torch.stack([moved[:, 0, 0, 0], moved[:, 0, 0, -1], moved[:, 0, -1, 0], moved[:, 0, -1, -1]])
    assert corners.max() == 1
    assert (moved[:, 0, 8, 8] == -1).all()


@pytest.fixture
def pictures(tmp_path):
    for index, colour in enumerate(("red", "lime")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"a {colour} wall\n\nall {colour}\n")
    return tmp_path


def test_a_folder_of_ones_own(pictures):
    found = load_pictures(str(pictures), 8)
    assert found.captions == [("a red wall", "all red"), ("a lime wall", "all lime")]
    assert found.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0]]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "0.txt").write_text("\n"), "has no caption"),
        (lambda folder: (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture"), "no readable picture"),
        (lambda folder: (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60]), "no readable picture"),
        (
            lambda folder: Image.new("1", (9000, 9000)).save(folder / "0.png"),
            "9000 x 9000 pixels: reduce it to 64 million",
        ),
        (lambda folder: Image.new("1", (10_000, 9_000)).save(folder / "0.png"), "10000 x 9000 pixels: reduce it"),
        (lambda folder: Image.new("1", (14_000, 13_000)).save(folder / "0.png"), "has 182000000 pixels: reduce it"),
        (lambda folder: Image.fromarray(np.full((4, 4), np.nan, "float32")).save(folder / "0.tiff"), ""),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "holds no picture"),
    ],
)
def test_bad_pictures_are_one_line(pictures, spoil, said):
    spoil(pictures)
    if not said:
        with pytest.raises(UserError, match="pixels of mode F"):
            open_image(pictures / "0.tiff")
        return
    with pytest.raises(UserError, match=said) as error:
        load_pictures(str(pictures), 8)
    assert "\n" not in str(error.value)


def test_a_large_picture_is_refused_without_warnings(tmp_path, recwarn):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="reduce it to 64 million"):
        open_image(tmp_path / "large.png")
    assert not recwarn.list


def test_pictures_of_a_turned_camera_are_upright(tmp_path):
    picture, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    picture.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").shape == (3, 4, 2)
    picture.save(tmp_path / "damaged.jpg", exif=b"Exif\0\0no directory")
    assert open_image(tmp_path / "damaged.jpg").shape == (3, 2, 4)


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (open_image(tmp_path / "clear.png") == 1).all()


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="not numbers"):
        to_uint8(torch.tensor([[[float("nan")]]]))


def test_a_sheet_shows_its_pictures_in_order():
    page = sheet(torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 2, 2), columns=2, scale=2, gap=1)
    assert page.size == (9, 9)
    assert [page.getpixel((0, 0)), page.getpixel((8, 0)), page.getpixel((0, 8))] == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_an_example_is_a_caption_of_its_source(tmp_path):
    for source in ("things", "shapes"):
        assert any(example_caption(source) in ways for ways in load_pictures(source, 16).captions)
    assert example_caption(str(tmp_path / "gone")) == ""
    (tmp_path / "LICENSE.txt").write_text("of no picture\n")
    for name, words in (("b", "second\n"), ("a", "\n  first one \n another\n")):
        (tmp_path / f"{name}.txt").write_text(words)
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    assert load_pictures(str(tmp_path), 16).captions[0][0] == "first one"
    assert example_caption(str(tmp_path)) == "first one"
