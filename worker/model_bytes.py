"""Where a model's bytes come from: files on this host, or an HTTP(S) server by ranges.

Of a model elsewhere only the headers and the wanted tensors are asked for. All parts of one model
come from one place. A server must take ranges (RFC 9110, section 14), and the file must stay the
same while it is read: `If-Match` with its ETag sees to that, where it has one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import httpx

from worker.gguf_file import GgufFile, Truncated, parse, read_files, split_parts

__all__ = ("FileBytes", "HttpBytes", "ModelBytes", "SourceError", "open_model")

_FIRST_READ = 2**20
_MOST_HEADER = 2**28
_CHUNK = 2**20
_TIMEOUT = httpx.Timeout(30.0)


class SourceError(Exception):
    """The bytes cannot be had; the message is one line."""


class ModelBytes(Protocol):
    """A model's files, wherever they are."""

    name: str

    @property
    def identity(self) -> str:
        """Tells the files from others that have the same headers.

        Raises:
            SourceError: they cannot be had.
        """
        ...

    def headers(self) -> tuple[GgufFile, ...]:
        """Read the headers of all parts.

        Raises:
            GgufError: they are no model's.
            SourceError: they cannot be had.
        """
        ...

    def values(self, stop: int) -> bytes:
        """The first part's bytes up to `stop`."""
        ...

    def read(self, part: int, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to before `stop` of a part, in pieces.

        Raises:
            SourceError: they cannot be had.
        """
        ...


class FileBytes:
    """Files on this host."""

    def __init__(self, path: Path) -> None:
        self.name = path.name.removesuffix(".gguf")
        self._path = path
        self._parts = split_parts(path)

    @property
    def identity(self) -> str:
        """When the files were written."""
        try:
            return ",".join(str(part.stat().st_mtime_ns) for part in self._parts)
        except OSError as error:
            raise SourceError(f"{error.filename}: {error.strerror or error}") from None

    def headers(self) -> tuple[GgufFile, ...]:
        """See `ModelBytes.headers`."""
        return read_files(self._path)

    def values(self, stop: int) -> bytes:
        """See `ModelBytes.values`."""
        return b"".join(self.read(0, 0, stop))

    def read(self, part: int, start: int, stop: int) -> Iterator[bytes]:
        """See `ModelBytes.read`."""
        try:
            with self._parts[part].open("rb") as file:
                file.seek(start)
                while start < stop:
                    data = file.read(min(_CHUNK, stop - start))
                    if not data:
                        raise SourceError(f"{self._parts[part].name} has become shorter")
                    start += len(data)
                    yield data
        except OSError as error:
            raise SourceError(f"{self._parts[part].name}: {error.strerror or error}") from None


class HttpBytes:
    """Files on a server."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._client = client
        path = Path(unquote(urlsplit(url).path))
        self.name = path.name.removesuffix(".gguf")
        base = url[: len(url) - len(urlsplit(url).path.rpartition("/")[2])]
        self._urls = [base + part.name for part in split_parts(path)]
        self._etags = [""] * len(self._urls)
        self._first = b""

    @property
    def identity(self) -> str:
        """The ETags that the server gave."""
        return ",".join(self._etags)

    def headers(self) -> tuple[GgufFile, ...]:
        """See `ModelBytes.headers`."""
        return tuple(self._header(number) for number in range(len(self._urls)))

    def _header(self, number: int) -> GgufFile:
        name = self._urls[number].rpartition("/")[2]
        wanted = _FIRST_READ
        data, size = b"", -1
        while True:
            with self._get(number, len(data), wanted) as response:
                size = _size(response, name)
                data += response.read()
            self._etags[number] = response.headers.get("etag", "")
            try:
                header = parse(data, name, size)
            except Truncated:
                if len(data) >= min(size, _MOST_HEADER):
                    raise
                wanted = min(size, 4 * wanted)
                continue
            if number == 0:
                self._first = data
            return header

    def values(self, stop: int) -> bytes:
        """See `ModelBytes.values`; of what `headers` has read."""
        return self._first[:stop]

    def read(self, part: int, start: int, stop: int) -> Iterator[bytes]:
        """See `ModelBytes.read`."""
        got = start
        with self._get(part, start, stop) as response:
            try:
                for data in response.iter_bytes(_CHUNK):
                    got += len(data)
                    yield data
            except httpx.HTTPError as error:
                raise SourceError(f"{self._urls[part]}: {_why(error)}") from error
        if got != stop:
            raise SourceError(
                f"{self._urls[part]}: {stop - got} of {stop - start} bytes are missing"
            )

    @contextmanager
    def _get(self, part: int, start: int, stop: int) -> Iterator[httpx.Response]:
        url, etag = self._urls[part], self._etags[part]
        # Compressed, a range would be one of something else.
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if etag and not etag.startswith("W/"):
            asked["If-Match"] = etag
        try:
            with self._client.stream("GET", url, headers=asked) as response:
                if response.status_code == httpx.codes.PRECONDITION_FAILED:
                    raise SourceError(f"{url}: the file was replaced while it was read")
                if response.status_code == httpx.codes.OK:
                    raise SourceError(f"{url}: the server does not give ranges of a file")
                if response.status_code != httpx.codes.PARTIAL_CONTENT:
                    raise SourceError(f"{url}: the server answers {response.status_code}")
                yield response
        except httpx.HTTPError as error:
            raise SourceError(f"{url}: {_why(error)}") from error


def _size(response: httpx.Response, name: str) -> int:
    told = response.headers.get("content-range", "").rpartition("/")[2]
    if not told.isdigit():
        raise SourceError(f"{name}: the server does not tell how large the file is")
    return int(told)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextmanager
def open_model(
    source: str | Path, headers: Mapping[str, str] | None = None
) -> Iterator[ModelBytes]:
    """A model by its path or its URL; of a split one, its first part's.

    Args:
        source: where it is.
        headers: for the server, as credentials; not sent to another one that it refers to.

    Raises:
        SourceError: it is neither.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with httpx.Client(timeout=_TIMEOUT, follow_redirects=True, headers=headers) as client:
            yield HttpBytes(source, client)
    elif isinstance(source, str) and "://" in source:
        raise SourceError(f"{source!r}: wanted a path, or a URL with http or https")
    else:
        yield FileBytes(Path(source))
