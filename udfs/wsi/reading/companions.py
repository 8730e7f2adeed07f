"""The files that belong to a slide that is more than one file: MIRAX, Hamamatsu VMS and VMU, series of DICOM files."""

import re
from pathlib import PurePosixPath
from urllib.parse import quote, unquote

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store import File, FileInfo, Pending, StorageOptions, secrets_of
from udfs.wsi.store.faults import OutOfTimeError, slide_error_of

DICOM_HEAD_BYTES = 2**16  # the series stands before everything long
DICOM_SERIES = re.compile(rb"\x20\x00\x0e\x00UI..([0-9.]+)", re.DOTALL)  # (0020,000E), explicit VR, little-endian

_INI_BYTES = 2**20  # more than any such text has
_HAMAMATSU_NAMES = re.compile(
    # of several focal planes only the first, 0, is read
    r"^(?:MapFile|MacroImage|OptimisationFile|ImageFile(?:\((?:0|\d+,\d+|0,\d+,\d+)\))?)[ \t]*=[ \t]*(.+?)\s*$",
    re.MULTILINE,
)
_MIRAX_NAMES = re.compile(r"^(?:INDEXFILE|FILE_\d+)[ \t]*=[ \t]*(.+?)\s*$", re.MULTILINE)
_URLS = ("http://", "https://")


def companions(file: File, uri: str, storage_options: StorageOptions | None, kind: str | None) -> dict[str, File]:
    """Opens the other files of a slide: by their paths from the slide's folder, without those that are named but missing.

    `file` is the slide, open; `uri` holds its secrets; `kind` is from `udfs.wsi.reading.foreign.sniff`. Raises SlideError:
    `read_failed` if a series is in a folder that cannot be listed, and what reading raises.
    """
    names: list[str] = []
    if kind == "DICOM":
        names = _series(file, uri, storage_options)
    elif kind in ("Hamamatsu VMS", "Hamamatsu VMU"):
        names = _HAMAMATSU_NAMES.findall(_text(file))
    elif kind == "MIRAX":
        folder = path_in(uri).stem
        ini = File(beside(uri, f"{folder}/Slidedat.ini"), storage_options, traffic=file.traffic)
        names = [f"{folder}/{name}" for name in ("Slidedat.ini", *_MIRAX_NAMES.findall(_text(ini)))]
    files = {}
    for path in map(PurePosixPath, names):
        if path.is_absolute() or ".." in path.parts:  # nothing that a slide says may lead out of its copy
            continue
        try:
            files[str(path)] = File(beside(uri, str(path)), storage_options, traffic=file.traffic)
        except SlideError as error:
            if error.code is not ErrorCode.FILE_MISSING:
                raise
    return files


def path_in(uri: str) -> PurePosixPath:
    """Returns the path in a URI, decoded if the URI is a URL. In a chain, it is that of the first link that has one."""
    _, link, _ = _links(uri)
    return PurePosixPath(unquote(link.partition("?")[0]) if link.startswith(_URLS) else link)


def beside(uri: str, name: str) -> str:
    """Returns the URI of the file `name` (it may have folders) in the folder of another, with the same chain and query."""
    before, link, after = _links(uri)
    mark = query = ""
    if link.startswith(_URLS):
        link, mark, query = link.partition("?")
        name = quote(name)
    folder, slash, _ = link.rpartition("/")
    return f"{before}{folder}{slash}{name}{mark}{query}{after}"


def _links(uri: str) -> tuple[str, str, str]:
    """Splits a chain: what precedes its first link with a path, that link, what follows it."""
    if "://" not in uri:
        return "", uri, ""
    first, chain, rest = uri.partition("::")
    if "://" in first:
        return "", first, chain + rest
    before, link, after = _links(rest)  # simplecache::s3://...
    return first + chain + before, link, after


def _text(file: File) -> str:
    [data] = file.ranges([0], [min(file.info.size_bytes, _INI_BYTES)])
    return data.decode("utf-8-sig", errors="replace")


def _series(file: File, uri: str, storage_options: StorageOptions | None) -> list[str]:
    """Returns the other files of a DICOM series. A folder may hold many series; a file that does not name its own is taken."""
    own_name = path_in(uri).name
    try:
        listed = file.siblings()
    except Exception as error:
        failure = slide_error_of(error, file.uri, secrets_of(uri, storage_options))
        if failure.code is ErrorCode.ACCESS_DENIED or isinstance(error, OutOfTimeError):
            raise failure from None
        raise SlideError(
            ErrorCode.READ_FAILED,
            f"{file.uri}: its folder cannot be listed for the other files of the series ({type(error).__name__}): "
            "put the slide in a store that lists folders",
        ) from None
    heads: dict[str, Pending] = {}
    for info in listed:
        other = path_in(info["name"])
        if info["type"] == "file" and other.suffix == PurePosixPath(own_name).suffix and info.get("size") != 0:
            known = FileInfo.from_fsspec(info) if info.get("size") else None
            sibling = File(beside(uri, other.name), storage_options, known, file.traffic)
            heads[other.name] = sibling.request(0, min(sibling.info.size_bytes, DICOM_HEAD_BYTES))
    # A file may refer to other series too, so one in common is enough.
    series = {name: set(DICOM_SERIES.findall(head.result())) for name, head in heads.items()}
    own = series.pop(own_name, set())
    return [name for name, theirs in series.items() if not own or not theirs or own & theirs]
