import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from datamodules.images.files import ImageError, channels_first, image_size, label_size, read_image, read_labels

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def picture():
    """Smooth, so that JPEG changes it little; 4 rows of 6 would be too small for that."""
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([x * 4, y * 6, 255 - x * 4], axis=2).astype(np.uint8))


def distance(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [
        ("RGB", "a.png", 0),
        ("RGB", "a.bmp", 0),
        ("RGB", "a.tiff", 0),
        ("RGB", "a.jpg", 12),
        ("RGB", "a.webp", 40),
        ("RGBA", "a.png", 0),
        ("CMYK", "a.jpg", 12),
        ("CMYK", "a.tif", 0),
        ("P", "a.png", 60),
        ("YCbCr", "a.jpg", 12),
    ],
)
def test_colour_images_keep_their_colours(tmp_path, picture, mode, name, tolerance):
    converted = picture.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else picture.convert(mode)
    if mode == "RGBA":
        converted.putalpha(Image.new("L", converted.size, 7))
    converted.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (40, 60, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert distance(image, picture) <= tolerance


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("L", "a.jpg"), ("LA", "a.png"), ("1", "a.png")])
def test_grey_images_get_three_equal_channels(tmp_path, picture, mode, name):
    picture.convert(mode).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (40, 60, 3)
    assert (image == image[:, :, :1]).all()
    assert distance(image[:, :, 0], picture.convert(mode).convert("L")) <= 12


def test_a_palette_with_transparency(tmp_path):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80\xff")
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_become_eight(tmp_path, name):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert read_image(tmp_path / name)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_thirty_two_bits_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((3, 3), dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif has 32-bit pixels.*Convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


# Orientation


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(tmp_path, picture, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / name
    picture.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    image = read_image(path)
    assert distance(image, expected) == 0
    assert image_size(path) == image.shape[:2]
    assert image_size(path) == ((60, 40) if 5 <= orientation <= 8 else (40, 60))


@pytest.mark.parametrize(("orientation", "policy"), [(6, "apply"), (8, "apply"), (3, "ignore"), (6, "ignore")])
def test_annotations_of_the_stored_pixels_are_not_turned(tmp_path, picture, orientation, policy):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    assert distance(read_image(tmp_path / "a.png", (40, 60), exif=policy), picture) == 0
    assert image_size(tmp_path / "a.png", (40, 60)) == (40, 60)


def test_annotations_of_the_upright_image_are_met(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    assert distance(read_image(tmp_path / "a.png", (60, 40)), picture.transpose(Image.Transpose.ROTATE_270)) == 0
    assert image_size(tmp_path / "a.png", (60, 40)) == (60, 40)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_annotations_of_another_size_are_refused(tmp_path, picture, read):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "plain.png")
    text = r"turned\.png is 60x40 pixels \(40x60 upright, by its EXIF orientation\), but its annotation says 61x40"
    with pytest.raises(ImageError, match=text):
        read(tmp_path / "turned.png", (40, 61))
    with pytest.raises(ImageError, match=r"plain\.png is 60x40 pixels, but its annotation says 40x60"):
        read(tmp_path / "plain.png", (60, 40))


# Damaged files


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "a.bmp"])
@pytest.mark.parametrize("part", [0.5, 0.75, 0.0])
def test_files_that_are_cut_off(tmp_path, picture, name, part):
    picture.save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ImageError, match=rf"{name} is damaged, cut short, or not an image .* take it out of the data"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_what_is_no_image(tmp_path, read):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(ImageError, match=r"a\.jpg is damaged, cut short, or not an image"):
        read(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg does not exist"):
        read(tmp_path / "b.jpg")
    with pytest.raises(ImageError, match="is a folder, not an image"):
        read(tmp_path)


# Sizes


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[1, 2, 3]]]


def test_a_very_large_image_is_read(tmp_path):
    Image.new("1", (12_000, 9_000), 1).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (9_000, 12_000, 3)
    assert image[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_header_that_promises_too_much_is_refused(tmp_path, read):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bomb\.png is too large \(.*400000000 pixels.*Scale it down"):
        read(tmp_path / "bomb.png")


# Parts, labels, channels


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_part_of_an_image(tmp_path, picture, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.convert(mode).save(tmp_path / "a.png", exif=exif)
    whole = read_image(tmp_path / "a.png")
    part = read_image(tmp_path / "a.png", window=(3, 7, 11, 20))
    assert part.shape == (11, 20, 3)
    assert part.flags.writeable
    assert (part == whole[3:14, 7:27]).all()
    stored = read_image(tmp_path / "a.png", (40, 60), (3, 7, 11, 20))
    assert (stored == read_image(tmp_path / "a.png", (40, 60))[3:14, 7:27]).all()


def test_labels(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    labels = read_labels(tmp_path / "a.png")
    assert (labels == values).all()
    assert labels.dtype == np.uint8
    assert label_size(tmp_path / "a.png") == (8, 32)


@pytest.mark.parametrize("read", [read_labels, label_size])
@pytest.mark.parametrize(
    ("mode", "found"), [("RGB", "pixels of RGB"), ("P", "a palette"), ("I;16", "16 bits"), ("LA", "pixels of LA")]
)
def test_colours_are_no_labels(tmp_path, picture, read, mode, found):
    image = Image.new("I;16", (3, 3)) if mode == "I;16" else picture.convert(mode)
    image.save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=rf"a\.png has {found}, but a label file holds .* Give such a file"):
        read(tmp_path / "a.png")


def test_damaged_labels(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 33, (40, 60), dtype=np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"a\.png is damaged, cut short, or not an image"):
        read_labels(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png does not exist"):
        label_size(tmp_path / "b.png")


def test_channels_first(picture):
    pixels = np.asarray(picture)
    for image in (pixels, pixels[5:20, 7:30]):
        made = channels_first(image)
        assert made.shape == (3, *image.shape[:2])
        assert made.is_contiguous()
        assert (made.numpy() == image.transpose(2, 0, 1)).all()


def test_a_format_that_another_program_would_open_is_refused(tmp_path, monkeypatch):
    """Pillow takes a file for what it begins with, and Encapsulated PostScript for Ghostscript."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("started a program"))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="not an image of JPEG, PNG, TIFF, WEBP, BMP or GIF"):
            read(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_formats_that_are_read(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (12, 8), (200, 100, 50)).save(path, format=kind)
    assert image_size(path) == (8, 12)
    assert np.abs(read_image(path).astype(int) - (200, 100, 50)).max() < 20
