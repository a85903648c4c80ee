"""Photos as they really come, made for the tests: ICC profiles by hand, and files of every kind that is refused."""

import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

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
