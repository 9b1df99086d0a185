"""Server-sent events, read strictly: bytes in, the data of each event out."""

from mesh.verify.finding import Fault

__all__ = ("EventReader",)

_FIELDS = ("event", "id", "retry")


class EventReader:
    """Takes the bytes of a stream as they come, cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that are now complete.

        Raises:
            Fault: the bytes are no stream of events.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found: list[str] = []
        for raw in lines:
            try:
                line = raw.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise Fault(f"a line of the stream is not UTF-8: {error.reason}") from None
            if not line:
                if self._data:
                    found.append("\n".join(self._data))
                    self._data = []
                continue
            name, colon, value = line.partition(":")
            if not colon or name not in ("", "data", *_FIELDS):
                raise Fault(f"a line of the stream is no field of an event: {line[:80]!r}")
            if name == "data":
                self._data.append(value.removeprefix(" "))
        return found

    def end(self) -> None:
        """The stream is over.

        Raises:
            Fault: in the middle of an event.
        """
        if self._rest or self._data:
            raise Fault("the stream ends in the middle of an event, without an empty line")
