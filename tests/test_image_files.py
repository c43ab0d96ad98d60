"""Images as people have them: pictures of every mode and format, folders that hold other files too, .npz files."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from test_weight_files import PAGE, POINTER
from tiny import answer

from dsno_cluster.config import load_config
from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.metrics import frechet
from dsno_cluster.evaluation.reference import imported
from dsno_cluster.features.statistics import moments_of
from dsno_cluster.image_sets.image_set import DataIdentity
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.images import to_uint8

SIZE = 16
GREY = np.tile(np.arange(SIZE, dtype=np.uint8) * 17, (SIZE, 1))  # 0 to 255, of mean 127.5
COLOUR = np.stack([GREY, GREY.T, np.full_like(GREY, 90)], axis=2)


def deep_png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits: grey (type 0), RGB (2), grey with alpha (4), RGBA (6)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(height, -1))
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def deep(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint16) * 257


def saved_as(form: str, image: Image.Image, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def image_of(pixels: np.ndarray, mode: str | None = None) -> Image.Image:
    image = Image.fromarray(pixels)
    return image if mode is None else image.convert(mode)


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    """The picture with all of its pixels opaque except one."""
    band = Image.new("L", image.size, 255)
    band.putpixel((3, 2), alpha)
    return Image.merge(f"{image.mode}A", [*image.split(), band])


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


BITS = np.where(GREY > 127, 255, 0).astype(np.uint8)
OF_GREY = np.repeat(GREY[..., None], 3, axis=2)

# name: (file name, bytes, pixels as RGB)
RIGHT: dict[str, tuple[str, Callable[[], bytes], np.ndarray]] = {
    "grey": ("x.png", lambda: saved_as("PNG", image_of(GREY)), OF_GREY),
    "16-bit grey PNG": ("x.png", lambda: deep_png(deep(GREY), 0), OF_GREY),
    "16-bit grey TIFF": ("x.tif", lambda: saved_as("TIFF", Image.fromarray(deep(GREY))), OF_GREY),
    "16-bit grey TIFF, big-endian": (
        "x.tiff",
        lambda: saved_as("TIFF", Image.frombytes("I;16B", (SIZE, SIZE), deep(GREY).astype(">u2").tobytes())),
        OF_GREY,
    ),
    "16-bit RGB": ("x.png", lambda: deep_png(deep(COLOUR), 2), COLOUR),
    "16-bit opaque RGBA": (
        "x.png",
        lambda: deep_png(deep(np.dstack([COLOUR, np.full_like(GREY, 255)])), 6),
        COLOUR,
    ),
    "one bit": ("x.png", lambda: saved_as("PNG", image_of(BITS).convert("1")), np.repeat(BITS[..., None], 3, 2)),
    "palette": ("x.png", lambda: saved_as("PNG", image_of(GREY, "P")), OF_GREY),
    "opaque palette": (
        "x.png",
        lambda: saved_as("PNG", image_of(GREY, "P"), transparency=bytes([255] * 256)),
        OF_GREY,
    ),
    "opaque grey": ("x.png", lambda: saved_as("PNG", with_alpha(image_of(GREY), 255)), OF_GREY),
    "opaque RGBA": ("x.png", lambda: saved_as("PNG", with_alpha(image_of(COLOUR), 255)), COLOUR),
    "upper case": ("X.PNG", lambda: saved_as("PNG", image_of(COLOUR)), COLOUR),
    "WebP": ("x.webp", lambda: saved_as("WEBP", image_of(COLOUR), lossless=True), COLOUR),
    "BMP": ("x.bmp", lambda: saved_as("BMP", image_of(COLOUR)), COLOUR),
    "turned": ("x.png", lambda: saved_as("PNG", image_of(COLOUR), exif=exif(6)), np.rot90(COLOUR, -1)),
    "turned 16-bit grey": (
        "x.tif",
        lambda: saved_as("TIFF", Image.fromarray(deep(GREY)), tiffinfo={0x0112: 8}),
        np.rot90(OF_GREY),
    ),
    "a photograph with previews": (
        "x.jpg",
        lambda: saved_as(
            "MPO", Image.new("RGB", (SIZE, SIZE), (90, 90, 90)), save_all=True,
            append_images=[Image.new("RGB", (4, 4))], quality=100,
        ),
        np.full((SIZE, SIZE, 3), 90, np.uint8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_a_picture_of_every_mode_is_seen_as_it_is(kind: str, tmp_path: Path) -> None:
    name, make, pixels = RIGHT[kind]
    (tmp_path / name).write_bytes(make())
    images = open_images(str(tmp_path))
    assert images.count == 1 and images.shape == (3, SIZE, SIZE)
    assert np.array_equal(images.read(0, 1)[0].permute(1, 2, 0).numpy(), pixels)


def test_colour_differences_become_rgb(tmp_path: Path) -> None:
    """Up to rounding, since YCbCr is rounded to 8 bit too."""
    image_of(COLOUR).convert("YCbCr").save(tmp_path / "x.tif")
    found = open_images(str(tmp_path)).read(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - COLOUR).max() <= 3


def lab() -> Image.Image:
    image = image_of(COLOUR)
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    turned = ImageCms.applyTransform(image, transform)
    assert turned is not None
    return turned


def frames(form: str, **options: Any) -> bytes:
    first, second = image_of(COLOUR), image_of(COLOUR[::-1].copy())
    return saved_as(form, first, save_all=True, append_images=[second], **options)


def long_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat, " * 300_000, zip=True)
    return saved_as("PNG", image_of(COLOUR), pnginfo=info)


def bomb(side: int) -> bytes:
    """A PNG that says that it is very large; its pixels are missing."""
    data = bytearray(saved_as("PNG", image_of(COLOUR)))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def bad_chunk() -> bytes:
    data = saved_as("PNG", image_of(COLOUR))
    at = data.index(b"IDAT") + 10
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


# name: (file name, bytes, what a message must say of it)
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "transparent": ("x.png", lambda: saved_as("PNG", with_alpha(image_of(COLOUR), 254)), "transparent pixels (mode RGBA)"),
    "transparent grey": ("x.png", lambda: saved_as("PNG", with_alpha(image_of(GREY), 0)), "transparent pixels (mode LA)"),
    "transparent palette": (
        "x.png", lambda: saved_as("PNG", image_of(GREY, "P"), transparency=bytes([0] + [255] * 255)),
        "transparent pixels (mode P)",
    ),
    "transparent colour": (
        "x.png", lambda: saved_as("PNG", image_of(COLOUR), transparency=(0, 0, 90)), "transparent pixels (mode RGB)"
    ),
    "transparent 16-bit RGBA": (
        "x.png", lambda: deep_png(np.dstack([deep(COLOUR), deep(GREY)]), 6), "transparent pixels (mode RGBA)"
    ),
    "CMYK": ("x.jpg", lambda: saved_as("JPEG", image_of(COLOUR, "CMYK")), "mode CMYK"),
    "LAB": ("x.tif", lambda: saved_as("TIFF", lab()), "mode LAB"),
    "32-bit grey": ("x.tif", lambda: saved_as("TIFF", image_of(GREY).convert("I")), "mode I (32-bit"),
    "floating point": ("x.tif", lambda: saved_as("TIFF", image_of(GREY).convert("F")), "mode F (floating-point"),
    "animated PNG": ("x.png", lambda: frames("PNG"), "has 2 frames"),
    "animated WebP": ("x.webp", lambda: frames("WEBP"), "has 2 frames"),
    "animated GIF with another name": ("x.png", lambda: frames("GIF"), "has 2 frames"),
    "several pages": ("x.tif", lambda: frames("TIFF"), "has 2 frames or pages"),
    "a long text": ("x.png", long_text, "Pillow says: "),
    "a bomb": ("x.png", lambda: bomb(20_000), "Pillow says: Image size (400000000 pixels) exceeds limit"),
    "a small bomb": ("x.png", lambda: bomb(10_000), "Pillow says: Image size (100000000 pixels) exceeds limit"),
    "cut off": ("x.png", lambda: saved_as("PNG", image_of(COLOUR))[:-40], "Pillow says: "),
    "cut off JPEG": ("x.jpg", lambda: saved_as("JPEG", image_of(COLOUR))[:-40], "Pillow says: "),
    "cut off TIFF": ("x.tif", lambda: saved_as("TIFF", image_of(COLOUR))[:60], "Pillow says: "),
    "damaged": ("x.png", bad_chunk, "Pillow says: "),
    "not a picture": ("x.png", lambda: bytes(range(256)), "Pillow says: cannot identify"),
    "pointer": ("x.png", lambda: POINTER, "is a Git LFS pointer"),
    "page": ("x.jpg", lambda: PAGE, "is a web page"),
    "empty": ("x.jpg", lambda: b"", "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_picture_that_is_not_certain_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """First or not: the others are read by the actors, whose errors are the same."""
    name, make, says = REFUSED[kind]
    (tmp_path / name).write_bytes(make())
    done = answer("eval", "--samples", ".", "--dry-run", "--launcher", "local", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"/{name}" in line and says in line, line
    image_of(COLOUR).save(tmp_path / "a.png")
    images = open_images(str(tmp_path))
    assert images.count == 2
    with pytest.raises(UserError) as refused:
        images.read(0, 2)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def clutter(folder: Path) -> None:
    """Four pictures of digits, one of them in a linked class folder, and what else such folders hold."""
    digits = to_uint8(load_data("digits")[1].images)[:, 0].numpy()
    elsewhere = folder.parent / "elsewhere"
    for place in (folder / "cats", folder / "dogs", elsewhere, folder / ".thumbnails"):
        place.mkdir(parents=True)
    for number, file in enumerate(
        (folder / "cats/0.png", folder / "cats/1.PNG", folder / "dogs/2.webp", elsewhere / "3.jpg")
    ):
        image_of(digits[number]).save(file, **({"lossless": True} if file.suffix == ".webp" else {}))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "dogs/again").symlink_to(folder / "cats")
    (folder / "dogs/above").symlink_to(folder.parent)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "labels.txt", "notes.txt", "README"):
        (folder / "cats" / name).write_bytes(b"\0\1\2")
    image_of(digits[4]).save(folder / ".thumbnails/0.png")
    image_of(digits[5]).save(folder / "dogs/5.gif")


NOTE = (
    "4 pictures taken, left out: 1 .db files, 1 .gif files, 2 .txt files, 1 broken links, 1 files without a suffix, "
    "2 hidden files (such as .DS_Store, ._0.png), 1 hidden folders, 2 links to folders that are taken anyway"
)


def test_what_is_taken_of_a_folder_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    clutter(folder)
    images = open_images(str(folder))
    assert images.count == 4 and images.note == NOTE and images.read(0, 4).shape == (4, 3, 8, 8)
    done = answer("eval", "--samples", "pictures", "--dry-run", "--launcher", "local", cwd=tmp_path)
    assert done.returncode == 0 and f"4 images of {folder} ({NOTE})" in done.stdout, done.stdout
    reference = [
        "evaluation.reference=pictures",
        "evaluation.feature_extractor=vgg16",
        "evaluation.metrics=[fid]",
    ]
    planned = answer("plan", *reference, "evaluation.weights_path=null", cwd=tmp_path)
    assert planned.returncode == 0 and f"note: pictures: {NOTE}\n" in planned.stderr, planned.stderr
    whole = tmp_path / "whole"
    whole.mkdir()
    image_of(GREY).save(whole / "0.png")
    assert open_images(str(whole)).note is None
    only = tmp_path / "only"
    only.mkdir()
    (only / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(
        UserError, match=r"nor pictures \(\.png, .*\) are here; 0 pictures taken, left out: 1 \.gif files"
    ):
        open_images(str(only))


def test_statistics_of_pictures_that_an_earlier_version_kept_are_computed_again(tmp_path: Path) -> None:
    """It may have seen other pixels."""
    image_of(GREY).save(tmp_path / "0.png")
    identity = open_images(str(tmp_path)).identity
    assert identity.reading == 2
    assert identity != DataIdentity(kind="pictures", files=identity.files)


# ---- .npz ----------------------------------------------------------------------------------------------------

ROWS = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8, 1)


def npz(**arrays: Any) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def flipped(data: bytes, at: float) -> bytes:
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def compressed(**arrays: Any) -> bytes:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    return data.getvalue()


def one_array() -> bytes:
    data = io.BytesIO()
    np.save(data, ROWS)
    return data.getvalue()


def immense() -> bytes:
    """An array of which there is only the header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
    )
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue())
    return data.getvalue()


MEAN, COVARIANCE = np.arange(64.0), np.eye(64)
NOISE = np.random.default_rng(0).standard_normal((64, 64))
BAD_STATISTICS: dict[str, tuple[Callable[[], bytes], str]] = {
    "NaN": (lambda: npz(mu=MEAN, sigma=np.where(COVARIANCE, np.nan, 0)), "64 of the 4096 numbers of sigma are NaN"),
    "infinite": (lambda: npz(mu=MEAN / 0.0, sigma=COVARIANCE), "numbers of mu are NaN or infinite"),
    "not square": (lambda: npz(mu=MEAN, sigma=COVARIANCE[:60]), "sigma of (60, 64)"),
    "of other widths": (lambda: npz(mu=MEAN[:60], sigma=COVARIANCE), "mu of (60,) and sigma of (64, 64)"),
    "of other axes": (lambda: npz(mu=MEAN[None], sigma=COVARIANCE), "mu of (1, 64)"),
    "a number": (lambda: npz(mu=np.float64(1), sigma=np.float64(1)), "mu of () and sigma of ()"),
    "empty": (lambda: npz(mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu is empty"),
    "not symmetric": (lambda: npz(mu=MEAN, sigma=NOISE), "sigma is no covariance"),
    "negative": (lambda: npz(mu=MEAN, sigma=-COVARIANCE), "sigma is no covariance"),
    "complex": (lambda: npz(mu=MEAN, sigma=COVARIANCE * 1j), "sigma is complex128, not real"),
    "text": (lambda: npz(mu=np.array(["a"]), sigma=COVARIANCE), "mu is <U1, not real"),
    "objects": (lambda: npz(mu=np.array([object], object), sigma=COVARIANCE), "Object arrays cannot be loaded"),
    "another's": (lambda: npz(mean=MEAN, cov=COVARIANCE), "it holds mean, cov"),
    "no arrays": (lambda: npz(), "it holds nothing"),
    "page": (lambda: PAGE, "is a web page"),
    "pointer": (lambda: POINTER, "is a Git LFS pointer"),
    "nothing": (lambda: b"", "is empty"),
    "cut off": (lambda: npz(mu=MEAN, sigma=COVARIANCE)[:-100], "is cut off"),
    "damaged": (lambda: flipped(npz(mu=MEAN, sigma=COVARIANCE), 0.5), "cannot be read: numpy says: Bad CRC-32"),
    "damaged and compressed": (
        lambda: flipped(compressed(mu=MEAN, sigma=NOISE), 0.5), "cannot be read: numpy says: "
    ),
    "immense": (immense, "cannot be read: numpy says: "),
    "a single array": (one_array, "is a single array (.npy)"),
    "other bytes": (lambda: bytes(range(256)), "is not an .npz file"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("kind", BAD_STATISTICS)
def test_statistics_that_are_none_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, says = BAD_STATISTICS[kind]
    (tmp_path / "real.npz").write_bytes(make())
    planned = answer("plan", "evaluation.reference=real.npz", cwd=tmp_path)
    assert planned.returncode == 2 and "package:digits-teacher: fits" in planned.stdout
    (line,) = planned.stderr.splitlines()
    assert line.startswith("dsno-cluster: evaluation.reference: ") and "real.npz" in line and says in line, (
        line
    )


def test_statistics_in_any_order_and_precision(tmp_path: Path) -> None:
    covariance = np.cov(NOISE.astype(np.float32)).astype(np.float32)
    np.savez(tmp_path / "real.npz", mu=MEAN.astype(np.float32), sigma=np.asfortranarray(covariance))
    settings = load_config(
        "configs/digits.yaml", [f"evaluation.reference={tmp_path / 'real.npz'}"]
    ).evaluation
    found = imported(settings)
    assert found is not None
    kept = found.statistics["fid"].covariance
    assert np.array_equal(kept, covariance) and kept.dtype == np.float64


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_images_in_fortran_order(name: str, save: Any, tmp_path: Path) -> None:
    rows = np.asfortranarray(ROWS if name == "arr_0" else ROWS.transpose(0, 3, 1, 2))
    save(tmp_path / "x.npz", **{name: rows})
    images = open_images(str(tmp_path / "x.npz"))
    wanted = torch.from_numpy(ROWS.transpose(0, 3, 1, 2).copy())
    assert (
        images.count == 5
        and torch.equal(images.read(0, 5), wanted)
        and torch.equal(images.read(3, 4), wanted[3:4])
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (npz(arr_0=ROWS[:0]), "arr_0 is empty: its shape is (0, 8, 8, 1)"),
        (npz(images=ROWS[:, :, :0]), "images is empty"),
        (npz(arr_0=ROWS.astype(float)), "arr_0 is float64 of (5, 8, 8, 1); images are uint8 of four axes"),
        (npz(arr_0=ROWS[..., 0]), "arr_0 is uint8 of (5, 8, 8); images are uint8 of four axes"),
        (npz(x=ROWS), "it holds x"),
        (flipped(compressed(arr_0=np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)), 0.5), "numpy says"),
        (PAGE, "is a web page"),
    ],
    ids=["none", "of no width", "float", "three axes", "another's", "damaged", "page"],
)  # fmt: skip
def test_batches_that_hold_no_images(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    done = answer("eval", "--samples", "x.npz", "--dry-run", "--launcher", "local", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "x.npz" in line and says in line, line


def test_features_that_are_not_finite_are_said() -> None:
    right = moments_of(NOISE)
    wrong = moments_of(np.where(NOISE > 3, np.nan, NOISE))
    for samples, reference, whose in ((wrong, right, "samples"), (right, wrong, "reference")):
        with pytest.raises(UserError, match=f"features of the {whose} are not finite"):
            frechet("fid", samples, NOISE, reference.gaussian)


@pytest.mark.parametrize("whose", ["samples", "reference"])
def test_one_image_has_no_covariance(whose: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", arr_0=ROWS[:1])
    np.savez(tmp_path / "two.npz", arr_0=ROWS[:2])
    samples, reference = ("one.npz", "two.npz") if whose == "samples" else ("two.npz", "one.npz")
    words = ["eval", "--samples", samples, "evaluation.metrics=[fid]", f"evaluation.reference={reference}"]
    done = answer(*words, "--launcher", "local", cwd=tmp_path)
    assert done.returncode == 2 and "fid, as it is set, needs 2 images" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "one.npz" in done.stderr
