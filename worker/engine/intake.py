"""The intake thread: requests off the link, made ready for the loop.

Templates, tokenization and grammars can take milliseconds to seconds; here they cost the decode
loop nothing, as llama.cpp and llguidance work without the interpreter lock.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable

import msgspec
import structlog

from shared.errors import ContextExceeded, DeadlineExceeded, InvalidRequest, MeshError
from shared.protocol import (
    ChatInput,
    Constraint,
    Embed,
    Generate,
    TextInput,
    TokenInput,
    decode_request,
)
from worker.engine.constraint import ConstraintCompiler, Matcher
from worker.engine.earlier import Earlier
from worker.engine.embedding import EmbedJob
from worker.engine.job import Job
from worker.engine.llama import Model
from worker.engine.reading_log import ReadingLog
from worker.engine.sequence import Sequence
from worker.engine.template import FALLBACK_TEMPLATE, ChatTemplate
from worker.engine.tools import (
    ReasoningParser,
    ToolParser,
    detect_family,
    reasoning_open,
    tool_constraint,
)
from worker.link import (
    LENGTH,
    CancelAttempts,
    EngineConfig,
    Join,
    RingPlace,
    Stop,
    Submit,
    decode_to_engine,
)

__all__ = ("Inbox", "Intake", "Rejected", "read_message")

log = structlog.get_logger()


class Rejected(msgspec.Struct, frozen=True):
    """A request that cannot be served as it stands."""

    reply: str
    attempt: int
    error: MeshError


Arrival = Job | EmbedJob | Rejected | CancelAttempts | Stop


class Inbox:
    """What comes for one loop: the engine's only one, or that of a ring of which it is the head."""

    def __init__(self, place: RingPlace | None = None) -> None:
        self.place = place
        """In the ring; None: the engine is not part of one."""
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        """What the loop is to act on."""
        self.log = ReadingLog()
        """What the loop keeps of answers; the intake only reads it."""
        self.on_cancel: Callable[[CancelAttempts], None] = lambda cancelled: None
        """Called in the thread that reads, when the message is among the arrivals already."""


def read_message(link: socket.socket) -> bytes | None:
    """One message without its length; None: the agent is gone."""
    head = _read(link, LENGTH.size)
    return None if head is None else _read(link, LENGTH.unpack(head)[0])


def _read(link: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view = memoryview(data)
    filled = 0
    while filled < size:
        count = link.recv_into(view[filled:])
        if count == 0:
            return None
        filled += count
    return bytes(data)


class Intake:
    """Reads the link in a thread of its own; `inbox` is for the loop that is to run now."""

    def __init__(
        self, link: socket.socket, model: Model, config: EngineConfig, context: int
    ) -> None:
        self._link = link
        self._model = model
        self._context = context
        self._name = config.model
        source = config.chat_template or model.metadata("tokenizer.chat_template")
        self._pieces = model.pieces(special=False)
        self._special_pieces = model.pieces(special=True)
        bos = self._special_pieces[model.bos].decode(errors="replace") if model.bos >= 0 else ""
        eos = self._special_pieces[model.eos].decode(errors="replace") if model.eos >= 0 else ""
        self._bos_text = bos
        source = source or FALLBACK_TEMPLATE
        self._template = ChatTemplate(source, bos=bos, eos=eos)
        self._family = detect_family(source)
        self._thinks = "<think>" in source
        self._constraints = ConstraintCompiler(model.vocab)
        self.inbox = Inbox(config.ring)
        self.on_leave: Callable[[], None] = lambda: None
        """Called in the thread that reads: the loop is to end, whatever it waits for."""
        self._following: queue.SimpleQueue[Inbox | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    @property
    def leaving(self) -> bool:
        """Whether there is an inbox to go on with, or the engine is to end."""
        return not self._following.empty()

    def following(self) -> Inbox | None:
        """Wait for the inbox to go on with, the last of several; None: the engine ends."""
        inbox = self._following.get()
        while inbox is not None and self.leaving:
            inbox = self._following.get()
        return inbox

    def _run(self) -> None:
        while True:
            data = read_message(self._link)
            message = Stop() if data is None else decode_to_engine(data)
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, CancelAttempts):
                self.inbox.arrivals.put(message)
                self.inbox.on_cancel(message)
            elif isinstance(message, Join):
                self._leave(Inbox(message.place))
            else:
                self._leave(None)
                return

    def _leave(self, following: Inbox | None) -> None:
        """End the loop, and go on with another inbox."""
        left = self.inbox
        if following is not None:
            self.inbox = following
        self._following.put(following)
        left.arrivals.put(Stop())
        self.on_leave()

    def _submit(self, message: Submit) -> None:
        try:
            request = decode_request(message.request)
        except msgspec.DecodeError as error:  # the agent decodes before it submits
            log.error("request.undecodable", error=str(error))
            return
        try:
            if request.deadline < time.time():
                # Told although its router has given up: the agent counts it until it is.
                raise DeadlineExceeded("the deadline passed before its worker came to it")
            if isinstance(request, Embed):
                self.inbox.arrivals.put(self._embedding(request, message))
            else:
                self.inbox.arrivals.put(self._generation(request, message))
        except MeshError as error:
            self.inbox.arrivals.put(Rejected(message.reply, request.attempt, error))
        except Exception as error:
            log.exception("request.failed", request=request.id)
            self.inbox.arrivals.put(
                Rejected(message.reply, request.attempt, MeshError(f"engine error: {error}"))
            )

    def _generation(self, request: Generate, message: Submit) -> Job:
        source = request.input
        rendered = self._template.render(source) if isinstance(source, ChatInput) else ""
        prompt = self._tokens(source, rendered)
        if not prompt:
            raise InvalidRequest(
                "the prompt is empty: at least one token is needed", param="prompt"
            )
        room = self._context - len(prompt)
        if room < 1:
            raise ContextExceeded(
                f"This model's maximum context length is {self._context} tokens, but the prompt "
                f"has {len(prompt)} tokens; shorten it.",
                param="messages" if isinstance(source, ChatInput) else "prompt",
            )
        if any(not 0 <= token < self._model.vocab_size for token in request.sampling.logit_bias):
            raise InvalidRequest(
                f"logit_bias: token ids must be from 0 to {self._model.vocab_size - 1}",
                param="logit_bias",
            )
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        job = Job(request, message.reply, message.received, prompt, self._model.end_tokens)
        constraint = request.constraint
        opened = reasoning_open(rendered)
        tools = isinstance(source, ChatInput) and source.tools and source.tool_choice.mode != "none"
        if isinstance(source, ChatInput) and tools:
            constraint = (
                tool_constraint(self._family, source.tools, source.tool_choice) or constraint
            )
        earlier = Earlier(request, self.inbox.log)
        job.record = earlier.record
        for choice, before in enumerate(earlier.resumed):
            if before.done >= 0:
                job.completion += before.done
                continue
            sequence = Sequence(
                job,
                choice,
                limit=limit,
                pieces=self._special_pieces if tools else self._pieces,
                matcher=self._matcher(constraint),
                tools=self._tool_parser(source, request, choice) if tools else None,
                reasoning=ReasoningParser(opened=opened) if self._reasons(source) else None,
                quiet=earlier.quiet(choice),
            )
            earlier.bring(sequence, job.told)
            job.sequences.append(sequence)
        job.begun = earlier.begun
        job.replayed = job.completion
        job.open = len(job.sequences)
        return job

    def _matcher(self, constraint: Constraint | None) -> Matcher | None:
        return None if constraint is None else self._constraints.compile(constraint)

    def _tool_parser(
        self, source: ChatInput | TextInput | TokenInput, request: Generate, choice: int
    ) -> ToolParser | None:
        if not isinstance(source, ChatInput):
            return None
        salt = f"{request.sampling.seed:x}-{choice}"
        return ToolParser(self._family, source.tools, source.tool_choice, salt=salt)

    def _reasons(self, source: ChatInput | TextInput | TokenInput) -> bool:
        return self._thinks and isinstance(source, ChatInput)

    def _tokens(self, source: ChatInput | TextInput | TokenInput, rendered: str = "") -> list[int]:
        if isinstance(source, TokenInput):
            wrong = next((t for t in source.tokens if not 0 <= t < self._model.vocab_size), None)
            if wrong is not None:
                raise InvalidRequest(
                    f"token {wrong} is not in the vocabulary of {self._model.vocab_size}",
                    param="prompt",
                )
            return list(source.tokens)
        if isinstance(source, TextInput):
            return self._model.tokenize(source.text, add_special=True, parse_special=True)
        has_bos = bool(self._bos_text) and rendered.startswith(self._bos_text)
        return self._model.tokenize(rendered, add_special=not has_bos, parse_special=True)

    def _embedding(self, request: Embed, message: Submit) -> EmbedJob:
        size = self._model.embedding_size
        if request.dimensions is not None and not 1 <= request.dimensions <= size:
            raise InvalidRequest(
                f"dimensions: must be from 1 to {size} for this model", param="dimensions"
            )
        if not request.inputs:
            raise InvalidRequest("input is empty", param="input")
        inputs = [self._tokens(source) for source in request.inputs]
        for index, tokens in enumerate(inputs):
            if not tokens:
                raise InvalidRequest(f"input[{index}] is empty", param="input")
            if len(tokens) > self._context:
                raise ContextExceeded(
                    f"This model's maximum context length is {self._context} tokens, but "
                    f"input[{index}] has {len(tokens)} tokens; shorten it.",
                    param="input",
                )
        return EmbedJob(request, message.reply, message.received, inputs)
