"""Photos as they really come: read right, or refused with one clear error and nothing left behind."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile

from forgedit import EditConfig, InputError, TuneConfig
from forgedit.cli import main
from forgedit.quality.report import write_atomic
from forgedit.session import Edit
from forgedit.stages.photo import composite_photo, open_photo, restore_size

TUNE = TuneConfig(num_steps=1, batch_size=1, caption="a cat")
EDIT = EditConfig(num_steps=1)
SIZE = (40, 24)
QUARTERS = np.array([[[220, 30, 40], [30, 200, 60]], [[40, 50, 210], [230, 220, 60]]], dtype=np.uint8)


def picture() -> Image.Image:
    """40 by 24 pixels, a quarter each of red, green, blue, yellow."""
    return Image.fromarray(QUARTERS).resize(SIZE, Image.Resampling.NEAREST)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def equal(image: Image.Image, expected: Image.Image) -> bool:
    return image.mode == expected.mode and np.array_equal(np.asarray(image), np.asarray(expected))


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_primaries() -> bytes:
    """An RGB profile: sRGB with the columns of red and green exchanged."""
    return srgb().replace(b"rXYZ", b"tEmp", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tEmp", b"gXYZ", 1)


def grey_profile(gamma: float) -> bytes:
    """A small ICC profile for grey, made by hand: a gamma curve and the D50 white point."""
    white = struct.pack(">4sIiii", b"XYZ ", 0, round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256)) + b"\0\0"
    start = 128 + 4 + 2 * 12
    table = struct.pack(">I", 2) + struct.pack(">4sII", b"wtpt", start, len(white))
    table += struct.pack(">4sII", b"kTRC", start + len(white), 14)
    header = struct.pack(">I4sI4s4s4s", start + len(white) + len(curve), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">iii", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    return header.ljust(128, b"\0") + table + white + curve


def png_chunks(size: tuple[int, int], depth: int, colour: int, extra: bytes, rows: bytes) -> bytes:
    """A PNG that Pillow cannot write itself."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.PNG", "no_suffix"])
def test_a_plain_photo(tmp_path, name):
    kind = {"a.webp": "WEBP", "a.jpg": "JPEG"}.get(name, "PNG")
    picture().save(tmp_path / name, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(tmp_path / name) as image:
        expected = image.convert("RGB")
    for photo in (tmp_path / name, str(tmp_path / name), expected):
        assert equal(open_photo(photo), expected)
    if kind != "JPEG":
        assert equal(expected, picture())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, kind, orientation):
    """How the camera stored it, from how it should be seen: the inverse of what each orientation asks."""
    upright = picture()
    t = Image.Transpose
    stored_by = {
        2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE,
        6: t.ROTATE_90, 7: t.TRANSVERSE, 8: t.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(stored_by[orientation]) if orientation in stored_by else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a", kind, exif=exif, **({} if kind == "PNG" else {"quality": 100}))
    opened = open_photo(tmp_path / "a")
    assert opened.size == upright.size and opened.mode == "RGB"
    # the middle of each quarter, where compression does not reach over
    assert np.abs(pixels(opened)[6::12, 10::20] - QUARTERS.astype(int)).max() <= 8
    with Image.open(tmp_path / "a") as image:
        assert equal(open_photo(image), opened)
    assert equal(open_photo(opened), opened)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_dropped(editor, tmp_path, kind):
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 14.0), 3: "E", 4: (11.0, 34.0, 31.0)})
    picture().save(tmp_path / "a", kind, exif=exif, icc_profile=srgb())
    with Image.open(tmp_path / "a") as image:
        assert dict(image.getexif().get_ifd(0x8825))  # it was there
    opened = open_photo(tmp_path / "a")
    session = editor.tune(tmp_path / "a", TUNE)
    edit = session.edit("a dog", EDIT)
    session.save(tmp_path / "session")
    assert b"SecretCamera" not in (tmp_path / "session").read_bytes()
    for ours in (opened, session.source, edit.image, edit.at_photo_size()):
        assert ours.info == {} and dict(ours.getexif()) == {}
        for written in ("JPEG", "PNG", "WEBP"):
            ours.save(buffer := io.BytesIO(), written)
            assert b"SecretCamera" not in buffer.getvalue() and b"Exif" not in buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_icc_profile(tmp_path, kind):
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    picture().save(tmp_path / "plain", kind, **lossless)
    picture().save(tmp_path / "srgb", kind, icc_profile=srgb(), **lossless)
    picture().save(tmp_path / "swapped", kind, icc_profile=swapped_primaries(), **lossless)
    plain, same, swapped = (pixels(open_photo(tmp_path / name)) for name in ("plain", "srgb", "swapped"))
    assert np.abs(same - plain).max() <= 1
    assert np.abs(swapped - plain[..., [1, 0, 2]]).max() <= 3  # 'red' meant green: the colours are exchanged
    assert np.abs(swapped - plain).max() > 100


def test_icc_profile_of_grey_and_with_transparency(tmp_path):
    grey = picture().convert("L")
    linear = grey_profile(1.0)
    grey.save(tmp_path / "grey.png", icc_profile=linear)
    light = pixels(grey) / 255
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(pixels(open_photo(tmp_path / "grey.png")) - expected[..., None]).max() <= 2
    clear = picture()
    clear.putalpha(100)
    clear.save(tmp_path / "clear.png", icc_profile=swapped_primaries())
    opened = pixels(open_photo(tmp_path / "clear.png"))
    assert (opened[..., 3] == 100).all() and np.abs(opened[..., :3] - pixels(picture())[..., [1, 0, 2]]).max() <= 3


@pytest.mark.parametrize(
    "profile, message", [(b"no profile", "cannot be used"), (grey_profile(1.0), "is for GRAY, its pixels are RGB")]
)
def test_an_icc_profile_that_cannot_be_used(tmp_path, caplog, profile, message):
    picture().save(tmp_path / "a.png", icc_profile=profile)
    with caplog.at_level(logging.WARNING, "forgedit"):
        assert equal(open_photo(tmp_path / "a.png"), picture())
    assert message in caplog.text


def transparent() -> Image.Image:
    """The upper half opaque, the lower half clear over a hidden red, a stripe half-way."""
    image = picture().convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 12, 40, 24))
    image.paste((0, 0, 0, 128), (0, 10, 40, 12))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composited_and_put_back(editor, tmp_path, kind):
    photo = transparent()
    photo.save(tmp_path / "a", kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    opened = open_photo(tmp_path / "a")
    seen = pixels(composite_photo(opened))
    assert equal(opened, photo)
    assert np.array_equal(seen[:10], pixels(picture())[:10])
    assert (seen[12:] == 255).all() and np.abs(seen[10:12] - 127).max() <= 1
    session = editor.tune(tmp_path / "a", TUNE)
    assert session.source.mode == "RGB"
    session.save(tmp_path / "session")
    for each in (session, editor.load_session(tmp_path / "session")):
        edit = each.edit("a dog", EDIT)
        full = edit.at_photo_size()
        assert edit.image.mode == "RGB" and (full.mode, full.size) == ("RGBA", SIZE)
        assert equal(full.getchannel("A"), photo.getchannel("A"))


def test_other_kinds_of_transparency(tmp_path):
    def save(image: Image.Image, **more: object) -> Image.Image:
        image.save(tmp_path / "a.png", **more)
        return open_photo(tmp_path / "a.png")

    palette = Image.new("P", SIZE, 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 20, 24))
    one = save(palette, transparency=0)
    assert one.getpixel((0, 0))[3] == 0 and one.getpixel((30, 0)) == (40, 50, 60, 255)
    several = save(palette, transparency=bytes([255, 60]))
    assert several.getpixel((0, 0)) == (10, 20, 30, 255) and several.getpixel((30, 0)) == (40, 50, 60, 60)
    colour = save(picture(), transparency=(220, 30, 40))
    assert colour.getpixel((0, 0))[3] == 0 and colour.getpixel((30, 0)) == (30, 200, 60, 255)
    grey = Image.new("LA", SIZE, (90, 51))
    assert save(grey).getpixel((0, 0)) == (90, 90, 90, 51)
    opaque = picture().convert("RGBA")
    assert equal(save(opaque), picture())


def test_palette_and_one_bit(tmp_path):
    indexed = picture().quantize(8)
    indexed.save(tmp_path / "a.png")
    assert np.abs(pixels(open_photo(tmp_path / "a.png")) - pixels(picture())).max() <= 8
    one_bit = Image.new("1", SIZE)
    ImageDraw.Draw(one_bit).rectangle((0, 0, 19, 23), fill=1)
    one_bit.save(tmp_path / "b.png")
    opened = pixels(open_photo(tmp_path / "b.png"))
    assert (opened[:, :20] == 255).all() and (opened[:, 20:] == 0).all()


def test_cmyk(tmp_path):
    """Ink to light: no ink is white, all of cyan takes the red; Adobe's inverted JPEG too."""
    image = Image.new("CMYK", SIZE, (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (0, 0, 20, 24))
    image.save(tmp_path / "a.jpg", quality=100)
    assert isinstance(Image.open(tmp_path / "a.jpg"), JpegImageFile)
    for photo in (image, tmp_path / "a.jpg"):
        opened = pixels(open_photo(photo))
        assert np.abs(opened[10, 5] - [0, 255, 255]).max() <= 6 and np.abs(opened[10, 35] - 255).max() <= 6


def test_sixteen_bits(tmp_path):
    """30000 of 65535 is 117 of 255."""
    values = np.full((24, 40), 30000, dtype=np.uint16)
    values[0, :4] = 0, 65535, 128, 129
    Image.fromarray(values).save(tmp_path / "a.png")
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    for photo in (tmp_path / "a.png", Image.fromarray(values), wide):
        opened = pixels(open_photo(photo))
        assert opened[0, :5, 0].tolist() == [0, 255, 0, 1, 117] and (opened[1:] == 117).all()
    row = b"\0" + values[1].astype(">u2").tobytes()
    key = struct.pack(">I4sH", 2, b"tRNS", 30000)
    key += struct.pack(">I", zlib.crc32(key[4:]))
    first = b"\0" + values[0].astype(">u2").tobytes()
    (tmp_path / "key.png").write_bytes(png_chunks(SIZE, 16, 0, key, first + row * 23))
    opened = pixels(open_photo(tmp_path / "key.png"))
    assert opened[0, :5].tolist() == [[0] * 3 + [255], [255] * 4, [0] * 3 + [255], [1] * 3 + [255], [117] * 3 + [0]]
    colours = b"\0" + np.tile(np.array([30000, 0, 65535], dtype=">u2"), SIZE[0]).tobytes()
    (tmp_path / "rgb.png").write_bytes(png_chunks(SIZE, 16, 2, b"", colours * SIZE[1]))
    assert open_photo(tmp_path / "rgb.png").getpixel((3, 3)) == (117, 0, 255)


@pytest.mark.parametrize("image, message", [(("I", SIZE, 70000), "16 bits"), (("F", SIZE), "floating-point")])
def test_pixels_without_a_known_range(image, message):
    with pytest.raises(InputError, match=message):
        open_photo(Image.new(*image))


@pytest.mark.parametrize("size", [(96, 48), (50, 130)])
def test_edited_at_the_models_size_and_given_at_the_photos(editor, tmp_path, size):
    picture().resize(size).save(tmp_path / "a.png")
    session = editor.tune(tmp_path / "a.png", TUNE)
    session.save(tmp_path / "session")
    for each in (session, editor.load_session(tmp_path / "session")):
        assert each.photo_size == size
        edit = each.edit("a dog", EDIT)
        full = edit.at_photo_size()
        assert edit.image.size == each.source.size != size and (full.size, full.mode) == (size, "RGB")
        assert equal(full, restore_size(edit.image, size, None))


def test_an_edit_of_a_session_that_keeps_no_size():
    edit = Edit(picture(), None, EDIT, "a dog", {})
    assert equal(edit.at_photo_size(), picture())


def test_a_phones_jpeg_with_a_second_picture(tmp_path):
    """A depth or gain map behind the photo (MPO) does not make it an animation."""
    picture().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
        assert equal(open_photo(image), open_photo(tmp_path / "a.jpg"))


def cut(kind):
    def write(path):
        picture().resize((200, 100)).save(path, kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


def animated(kind):
    def write(path):
        picture().save(path, kind, save_all=True, append_images=[Image.new("RGB", SIZE)], duration=100)

    return write


def of_kind(kind):
    return lambda path: picture().save(path, kind)


def of_size(*size):
    return lambda path: Image.new("RGB", size).save(path, "PNG")


def huge(path):
    """64 million and 8000 pixels by its header; hardly any behind it."""
    path.write_bytes(png_chunks((8000, 8001), 8, 2, b"", b""))


def bomb(path):
    """So many that Pillow itself would refuse, or warn, before we can."""
    path.write_bytes(png_chunks((60000, 60000), 8, 2, b"", b""))


def huge_jpeg(path):
    picture().save(path, "JPEG")
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 9000, 9000)
    path.write_bytes(content)


REFUSED = {
    "truncated JPEG": (cut("JPEG"), "cannot read the photo"),
    "truncated PNG": (cut("PNG"), "cannot read the photo"),
    "truncated WebP": (cut("WEBP"), "cannot read the photo"),
    "only a PNG's first bytes": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "cannot read the photo"),
    "only a JPEG's first bytes": (lambda path: path.write_bytes(b"\xff\xd8\xff"), "cannot read the photo"),
    "another RIFF": (lambda path: path.write_bytes(b"RIFF\0\0\0\0WAVEfmt "), "cannot read the photo"),
    "empty": (lambda path: path.write_bytes(b""), "unknown format"),
    "text": (lambda path: path.write_bytes(b"no picture"), "unknown format"),
    "EPS": (of_kind("EPS"), "unknown format"),
    "GIF": (of_kind("GIF"), "unknown format"),
    "TIFF": (of_kind("TIFF"), "unknown format"),
    "BMP": (of_kind("BMP"), "unknown format"),
    "a folder": (lambda path: path.mkdir(), "cannot read the photo"),
    "missing": (lambda path: None, "No such file"),
    "animated PNG": (animated("PNG"), "animated"),
    "animated WebP": (animated("WEBP"), "animated"),
    "over 64 megapixels": (huge, "8000 by 8001 pixels; expected at most 64 megapixels"),
    "a decompression bomb": (bomb, "60000 by 60000 pixels"),
    "a huge JPEG": (huge_jpeg, "9000 by 9000 pixels"),
    "narrow": (of_size(15, 400), "15 by 400 pixels; expected at least 16 a side"),
    "low": (of_size(400, 1), "400 by 1 pixels"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, capsys, monkeypatch, folder, name):
    write, message = REFUSED[name]
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
    path = tmp_path / "here" / "photo.jpg"
    path.parent.mkdir()
    write(path)
    with pytest.raises(InputError, match=message):
        open_photo(path)
    monkeypatch.chdir(tmp_path)
    assert main(["edit", str(path), "a dog", "--save", "s", "--model", str(folder), "--threads", "1"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert message in line and out == ""
    assert [each.name for each in tmp_path.iterdir()] == ["here"] and len(list(path.parent.iterdir())) <= 1


def test_sixteen_pixels_are_enough(tmp_path):
    of_size(16, 16)(tmp_path / "a.png")
    assert open_photo(tmp_path / "a.png").size == (16, 16)


def test_too_many_pixels_are_seen_before_they_are_decoded(tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    huge_jpeg(tmp_path / "a.jpg")
    monkeypatch.setattr(JpegImageFile, "load", decode)
    with pytest.raises(InputError, match="megapixels"):
        open_photo(tmp_path / "a.jpg")


def test_a_pil_image_is_checked_too(tmp_path):
    for image in (Image.new("L", (15, 15)), Image.new("1", (8001, 8000))):
        with pytest.raises(InputError, match="pixels; expected"):
            open_photo(image)
    animated("GIF")(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image, pytest.raises(InputError, match="animated"):
        open_photo(image)
    cut("JPEG")(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(InputError, match="cannot read"):
        open_photo(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_anywhere_is_an_input_error(tmp_path, kind):
    """Bytes overwritten at random: either still a picture, or an InputError, never another exception."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "a", kind, exif=exif, icc_profile=srgb())
    whole, rng = (tmp_path / "a").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        (tmp_path / "b").write_bytes(content)
        try:
            assert min(open_photo(tmp_path / "b").size) >= 16
        except InputError:
            refused += 1
    assert refused


@pytest.mark.parametrize("prompt", ["a\ndog", "a dog\0", "\x1b[31ma dog", "a\tdog", "a \x85dog", "a \ud800dog"])
def test_control_characters_in_a_prompt(editor, photo, tmp_path, monkeypatch, folder, capsys, prompt):
    session = editor.tune(photo, TUNE)
    with pytest.raises(InputError, match="target prompt has the control character"):
        session.edit(prompt, EDIT)
    with pytest.raises(InputError, match="caption has the control character"):
        editor.tune(photo, TUNE.replace(caption=prompt))
    monkeypatch.chdir(tmp_path)
    assert main(["edit", str(photo), prompt, "--model", str(folder), "--threads", "1"]) == 2
    assert "control character" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_prompts_in_other_scripts_are_taken(editor, photo):
    assert editor.tune(photo, TUNE).edit("ein Hündchen 🐕\u200d🦺 犬", EDIT).cut == ""


def test_what_was_cut_from_a_long_prompt_is_reported(editor, photo, caplog):
    session = editor.tune(photo, TUNE)
    with caplog.at_level(logging.WARNING, "forgedit"):
        edits = [session.edit("ab " * 37 + "c def", EDIT) for _ in range(2)]
    assert "longer than 77 tokens" in caplog.text and "def" in caplog.text
    assert [edit.cut.replace(" ", "") for edit in edits] == ["def"] * 2


def test_a_full_disk_leaves_no_partial_file(tmp_path, editor, photo, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    target = tmp_path / "a.png"
    with pytest.raises(OSError, match=r"cannot write '.*a.png': .*No space left on device"):
        write_atomic(target, lambda file: (file.write(b"half"), full()))
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, full)
    session = editor.tune(photo, TUNE)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write '.*session': .*No space left on device"):
        session.save(tmp_path / "session")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_full_disk_on_the_command_line(folder, photo, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "save", full)
    words = ["edit", photo, "a dog", "--caption", "a cat", "--tune-num-steps", "1", "--batch-size", "1"]
    words += ["--num-steps", "1", "--model", folder, "--threads", "1", "--out", "o"]
    assert main(list(map(str, words))) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
