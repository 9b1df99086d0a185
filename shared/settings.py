"""What the operator has set for each model: kept in a bucket, told by routers to workers.

Workers may read no bucket (`shared.kv` says why). They hear each change from the server, and all
that is set from the routers, one of which announces it every `ANNOUNCE_SECONDS`.
"""

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress

import msgspec
import structlog

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.kv import MODELS, Entry, Kv
from shared.snapshot import ModelSettings

__all__ = (
    "ANNOUNCE_SECONDS",
    "SettingsAnnouncer",
    "SettingsView",
    "decode_settings",
    "encode_settings",
)

ANNOUNCE_SECONDS = 3.0
"""Pause between two announcements; a router that has just heard another's keeps silent."""

_log = structlog.get_logger()


class _Announcement(msgspec.Struct, frozen=True):
    router: str
    revision: int
    """Of the bucket, as far as the router knows."""
    settings: tuple[ModelSettings, ...]


_one = msgspec.json.Decoder(ModelSettings)
_all = msgspec.json.Decoder(_Announcement)
_encoder = msgspec.json.Encoder()


def encode_settings(settings: ModelSettings) -> bytes:
    """One model's settings as JSON, so that `nats kv get` shows them."""
    return _encoder.encode(settings)


def decode_settings(data: bytes) -> ModelSettings:
    """Undo `encode_settings`; raises msgspec.DecodeError."""
    return _one.decode(data)


class SettingsView:
    """What is set for each model, as far as it has been told."""

    def __init__(self) -> None:
        self.known = False
        """Whether all that is set has been heard since the start, or since NATS was away."""
        self._settings: dict[str, ModelSettings] = {}
        self._revision = 0

    @property
    def settings(self) -> Mapping[str, ModelSettings]:
        """By model."""
        return self._settings

    async def open(self, bus: Bus) -> None:
        """Begin to listen; raises BusUnavailable."""
        await Kv(bus).follow(MODELS, self.hear)
        await bus.subscribe(subjects.SETTINGS, self.announced)

    def reconnected(self) -> None:
        """NATS is back; what was said meanwhile has been missed."""
        self.known = False
        self._revision = 0

    def hear(self, entry: Entry) -> None:
        """One model's settings were written or deleted."""
        if entry.revision < self._revision:
            return
        try:
            model = subjects.read_model_key(entry.key)
            settings = None if entry.value is None else decode_settings(entry.value)
        except (ValueError, msgspec.DecodeError) as error:
            _log.warning("settings.unreadable", key=entry.key, reason=str(error))
            return
        self._revision = entry.revision
        if settings is None:
            self._settings.pop(model, None)
        else:
            self._settings[model] = msgspec.structs.replace(settings, model=model)

    def announced(self, message: BusMessage) -> None:
        """A router tells all that is set."""
        try:
            announcement = _all.decode(message.data)
        except msgspec.DecodeError as error:
            _log.warning("settings.unreadable", reason=str(error))
            return
        if announcement.revision >= self._revision:
            self._revision = announcement.revision
            self._settings = {settings.model: settings for settings in announcement.settings}
            self.known = True


class SettingsAnnouncer:
    """A router's part: reads the bucket, follows it, and tells the workers; `run` does it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._kv = Kv(bus)
        self._settings: dict[str, ModelSettings] = {}
        self._revisions: dict[str, int] = {}
        self._read = False
        self._heard = False

    @property
    def settings(self) -> Mapping[str, ModelSettings]:
        """By model, as far as they have been read."""
        return self._settings

    def reconnected(self) -> None:
        """NATS is back; what was written meanwhile has been missed."""
        self._read = False

    async def run(self) -> None:
        """Announce until cancelled. While NATS or the bucket is away it is tried again."""
        await self._kv.follow(MODELS, self._hear)
        await self._bus.subscribe(subjects.SETTINGS, self._overhear)
        while True:
            try:
                if not self._read:
                    await self._read_all()
                if not self._heard:
                    await self._announce()
            except BusUnavailable as error:
                _log.debug("settings.not_announced", reason=str(error))
            self._heard = False
            await asyncio.sleep(ANNOUNCE_SECONDS * random.uniform(0.8, 1.2))

    async def _read_all(self) -> None:
        await self._kv.make(MODELS)
        self._settings.clear()
        self._revisions.clear()
        for entry in await self._kv.read(MODELS):
            self._hear(entry)
        self._read = True

    async def _announce(self) -> None:
        every = tuple(self._settings[model] for model in sorted(self._settings))
        revision = max(self._revisions.values(), default=0)
        data = _encoder.encode(_Announcement(self._bus.identity, revision, every))
        await self._bus.publish(subjects.SETTINGS, data)

    def _hear(self, entry: Entry) -> None:
        # By key: while the bucket is read, what is written meanwhile comes in between.
        if entry.revision < self._revisions.get(entry.key, 0):
            return
        self._revisions[entry.key] = entry.revision
        try:
            model = subjects.read_model_key(entry.key)
            self._settings.pop(model, None)
            if entry.value is not None:
                settings = decode_settings(entry.value)
                self._settings[model] = msgspec.structs.replace(settings, model=model)
        except (ValueError, msgspec.DecodeError) as error:
            _log.warning("settings.unreadable", key=entry.key, reason=str(error))

    def _overhear(self, message: BusMessage) -> None:
        with suppress(msgspec.DecodeError):
            other = _all.decode(message.data)
            if other.router != self._bus.identity:
                known = max(self._revisions.values(), default=0)
                self._heard = other.revision >= known
