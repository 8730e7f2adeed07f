"""What a file is that was given for weights and holds none: the usual mistakes by their first bytes, each with its remedy."""

import codecs
import json
import os
import re
import zipfile
from typing import BinaryIO

_TEXT_BYTES = 4096  # of a file, to tell whether it is text
_MOST_HEADER_BYTES = 100_000_000  # as safetensors itself has it
_QUOTED = 40  # characters of a text
_AGAIN = "download it again"
_BINARY = {  # first bytes
    b"\x1f\x8b": "a gzip archive: unpack it, and give the weights in it",
    b"\xfd7zXZ": "an xz archive: unpack it, and give the weights in it",
    b"7z\xbc\xaf": "a 7z archive: unpack it, and give the weights in it",
    b"Rar!": "a RAR archive: unpack it, and give the weights in it",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it, and give the weights in it",
    b"\x89HDF": "an HDF5 file, as Keras writes: give weights of PyTorch, or safetensors",
    b"\x93NUMPY": "a NumPy array: give weights of PyTorch, or safetensors",
    b"GGUF": "a GGUF file: give weights of PyTorch, or safetensors",
    b"%PDF": "a PDF: give the weights themselves",
    b"\x89PNG": "a picture: give the weights themselves",
    b"\xff\xd8\xff": "a picture: give the weights themselves",
}


def reason_of(file: BinaryIO) -> str | None:
    """Return what a file is and the remedy, to stand behind its name; None if its first bytes promise weights."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return f"has 0 bytes: {_AGAIN}"
    head = _first(file, _TEXT_BYTES)
    for magic, kind in _BINARY.items():
        if head.startswith(magic):
            return f"is {kind}"
    if head.startswith(b"PK\x03\x04"):
        return _reason_of_zip(file, size)
    text = _text_of(head, is_whole=size == len(head))
    if text is not None:
        return _reason_of_text(text, file)
    return _reason_of_safetensors(file, size) if begins_as_safetensors(file) else None


def begins_as_safetensors(file: BinaryIO) -> bool:
    """Whether a file begins with 8 bytes of length, and then JSON."""
    return _first(file, 9)[8:] == b"{"


def _first(file: BinaryIO, n_bytes: int) -> bytes:
    file.seek(0)
    return file.read(n_bytes)


def _reason_of_zip(file: BinaryIO, size: int) -> str | None:
    """torch.save writes a zip with a file data.pkl; torch.jit.save adds code."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"has {size:,} bytes and was cut off, for its end is missing: {_AGAIN}"
    if any("/code/" in f"/{name}" for name in names):
        return "is a TorchScript program: load it with torch.jit.load, and save model.state_dict()"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return None
    return f"is a zip archive of {len(names)} files, such as {names[0]!r:.60}: unpack it, and give the weights in it"


def _reason_of_safetensors(file: BinaryIO, size: int) -> str | None:
    """8 bytes of length, then JSON with the place of each tensor."""
    header_bytes = int.from_bytes(_first(file, 8), "little")
    if header_bytes > _MOST_HEADER_BYTES:
        return None
    expected = 8 + header_bytes
    if expected <= size:
        try:
            header = json.loads(_first(file, expected)[8:])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected += max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None  # damaged: whoever reads it says so
    if size < expected:
        return f"has {size:,} bytes where its header counts on {expected:,}: {_AGAIN}"
    return None


def _text_of(head: bytes, *, is_whole: bool) -> str | None:
    """The beginning of a text; None if these bytes are none."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:  # a character that the head cuts in two is left out
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=is_whole)
    except UnicodeDecodeError:
        return None
    return None if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", text) else text


def _reason_of_text(text: str, file: BinaryIO) -> str:
    start = text.lstrip().lower()
    if start.startswith("version https://git-lfs.github.com/spec/"):
        size = re.search(r"^size (\d+)$", text, re.MULTILINE)
        target = f" to a file of {int(size[1]):,} bytes" if size else ""
        return f"is a Git LFS pointer{target}, not the file: run git lfs pull where it was cloned"
    if start.startswith("<!doctype html") or "<html" in start:
        return f"is an HTML page: {_AGAIN} by the link of the file itself, logged in where the site asks for it"
    if start.startswith("<"):
        return f"is an XML text, such as a store's refusal: {_AGAIN}"
    if start.startswith(("{", "[")):
        return _reason_of_json(file)
    line = text.strip().partition("\n")[0].strip()
    quoted = f" that begins with {line[:_QUOTED]!r}" if line else ""
    return f"is a text file{quoted}: give the weights themselves"


def _reason_of_json(file: BinaryIO) -> str:
    try:
        n_files = len({str(name) for name in json.loads(_first(file, -1))["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "is a JSON text, such as a model's config: give the weights themselves"
    return f"is the index of weights in {n_files} files: load them together, and save one state dict"
