"""The texts in a TIFF's directories: descriptions, and the XML of OME, Leica, Philips and Ventana."""

import re
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

DESCRIPTION, SOFTWARE, XMP = 270, 305, 700  # tags

_XML = {"OME": "OME-XML", "scn": "Leica XML", "DataObject": "Philips XML", "iScan": "Ventana XML"}
_ELEMENT = re.compile(rf"<(?:[\w.-]+:)?({'|'.join(_XML)})[\s/>]")


@dataclass(frozen=True)
class Texts:
    """The texts and XML of a directory; all of these writers put them in the first."""

    description: str
    software: str
    xml: dict[str, Element]  # by name: OME, scn, DataObject or iScan
    broken: dict[str, str]  # the parser's errors, by the same names

    @property
    def vendor(self) -> str | None:
        """Maker of the scanner; None if it is unknown."""
        for name, vendor in {"scn": "leica", "DataObject": "philips", "iScan": "ventana"}.items():
            if name in self.xml or name in self.broken:
                return vendor
        if self.description.startswith("Aperio"):
            return "aperio"
        return "trestle" if self.software.startswith("MedScan") else None

    @property
    def warnings(self) -> list[str]:
        """A warning for each XML that cannot be parsed."""
        return [f"its {_XML[name]} cannot be parsed ({error}) and is not used" for name, error in self.broken.items()]


def texts_of(first: Any) -> Texts:
    """Reads the text and parses the XML of a file's first `tifffile.TiffPage`."""
    description = text_of(first, DESCRIPTION)
    xml: dict[str, Element] = {}
    broken: dict[str, str] = {}
    for text in (description, text_of(first, XMP)):
        if found := _ELEMENT.search(text):
            try:
                root = ElementTree.fromstring(text.strip("\ufeff \r\n\t"))
            except ElementTree.ParseError as error:
                broken[found[1]] = str(error)
            else:
                xml[found[1]] = next(part for part in root.iter() if part.tag.rpartition("}")[2] == found[1])
    return Texts(description, text_of(first, SOFTWARE), xml, broken)


def text_of(page: Any, tag: int) -> str:
    """Returns a tag as text, whatever its type and encoding; empty if the page lacks it."""
    value = page.tags.valueof(tag, default="")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    return str(value).rstrip("\0")


def number_of(text: str | None) -> float | None:
    """Returns a text as a number; some scanners write a decimal comma. None if it is no number."""
    try:
        return float((text or "").strip().replace(",", "."))
    except ValueError:
        return None


def directory_of(plane: Element, root: Element) -> int | None:
    """Returns the directory of this file that a TiffData element of OME-XML begins at.

    None if its UUID is that of another file, or it gives no directory.
    """
    uuid, file = root.get("UUID"), plane.findtext("{*}UUID")
    is_here = file is None or uuid is None or file.strip() == uuid
    number = plane.get("IFD", "").strip()
    return int(number) if is_here and number.isascii() and number.isdecimal() and len(number) < 10 else None
