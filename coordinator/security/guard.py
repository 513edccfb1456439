"""The one door of the mTLS port: every call of every service goes through it, before any code of ours reads a request.

A method without a row in `rules.RULES` is refused, and so is what goes beyond the limits of one device (`limits`). Who
calls is what the certificate of its connection says; whether that still holds is looked up at every call, and every
second for calls that last: a device whose certificate was revoked may have had its connection for weeks.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc
import structlog
from fedepth_wire.channel import MOST_STREAMS
from fedepth_wire.times import BUSY_RETRY_S
from fedepth_wire.tls import Caller, Role, caller_of
from google.protobuf.message import DecodeError

from coordinator.security.authority import Subject
from coordinator.security.limits import READ, WRITTEN, Limits, too_many
from coordinator.security.registry import Entry, Registry
from coordinator.security.rules import RULES, Rule
from fedepth.errors import FedepthError, TrustError
from fedepth.printable import as_typed, printable, quoted

LOOK_S = 1.0
_MOST_CACHED = 20_000
# A call beyond the limits is answered after so long, as far as there are not more of them than one connection can have:
# whoever asks again at once is slowed down by that.
HELD_S = 1.0
_MOST_HELD = MOST_STREAMS
_HELD_BYTES = 16 << 10
_KINDS = {Role.DEVICE: "a device", Role.OPERATOR: "an operator", Role.COORDINATOR: "a coordinator"}

if TYPE_CHECKING:  # generic in the stubs only
    Handler = grpc.RpcMethodHandler[Any, Any]

Context = grpc.aio.ServicerContext[Any, Any]
_log = structlog.get_logger()


class _Call:
    """A call that is going on. `refused` is why it was ended before its time, `code` the status with which."""

    def __init__(self, entry: Entry, task: asyncio.Task[Any]) -> None:
        self.entry = entry
        self.task = task
        self.refused = ""
        self.code = grpc.StatusCode.UNAUTHENTICATED

    def end(self, code: grpc.StatusCode, why: str) -> None:
        if not self.refused:
            self.code, self.refused = code, why
            self.task.cancel()


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Refuses calls that `rules.RULES` does not allow, and ends those whose certificate is not valid any more.

    Attributes:
        owner_of: the device that a task was given to, "" if nobody knows the task.
    """

    def __init__(
        self, registry: Registry, clock: Callable[[], float] = time.time, limits: Limits[_Call] | None = None
    ) -> None:
        self.owner_of: Callable[[str], str] = lambda task_id: ""
        self._registry = registry
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._revoked: frozenset[str] = frozenset()
        self._calls: set[_Call] = set()
        self._limits: Limits[_Call] = limits or Limits()
        self._held: Counter[str] = Counter()
        self._trouble = ""

    async def look(self) -> None:
        """Learns what was revoked by now, and ends the calls of those that may not call any more."""
        try:
            # Never fewer: a record that was restored from an older copy has forgotten some.
            self._revoked |= await asyncio.to_thread(self._registry.revoked)
            self._trouble = ""
        except FedepthError as error:  # what was revoked stays revoked, and expiry needs no record
            if str(error) != self._trouble:
                self._trouble = str(error)
                _log.error("what was revoked cannot be read; going on with what is known", error=self._trouble)
        for call in list(self._calls):
            if why := self._refusal(call.entry):
                call.end(grpc.StatusCode.UNAUTHENTICATED, why)

    async def watch(self) -> None:
        """Looks every LOOK_S, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # gRPC answers UNIMPLEMENTED
        return self._guarded(handler, str(handler_call_details.method))

    def _guarded(self, handler: Handler, method: str) -> Handler:
        rule = RULES.get(method, Rule(frozenset()))
        inner, make = _parts(handler)
        streams_in, streams_out = bool(handler.request_streaming), bool(handler.response_streaming)

        async def answered(received: Any, context: Context) -> Any:
            size = 0 if streams_in else len(received)
            async with self._admitted(rule, method, size, streams_out, context) as (caller, pause):

                async def checked(encoded: bytes) -> Any:
                    message = await _decoded(handler, encoded, context)
                    await self._check(message, rule, caller, context)
                    return message

                if streams_in:
                    read = _Read(context, checked, pause)
                    request, context = aiter(read), cast(Context, read)
                else:
                    request = await checked(received)
                if not streams_out:
                    return await inner(request, context)
                if not inspect.isasyncgenfunction(inner):
                    return await inner(request, context)  # it writes by itself
                async with contextlib.aclosing(inner(request, context)) as replies:
                    async for reply in replies:
                        await context.write(reply)
                return None

        async def served(received: Any, context: Context) -> Any:
            try:
                return await answered(received, context)
            except BaseException as error:
                received = None
                _let_go(error)
                raise

        # What is not admitted is not decoded either: a message of 1 MiB can take twenty then.
        return make(served, response_serializer=handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _admitted(
        self, rule: Rule, method: str, size_bytes: int, streams_out: bool, context: Context
    ) -> AsyncIterator[tuple[Caller, Callable[[str], float]]]:
        """Lets a call in while its certificate is valid, and within the limits of its caller.

        Returns who that is, and a function that says for how long its next message, READ or WRITTEN, should wait.
        """
        caller, entry = await self._caller(context, size_bytes)
        kind, who = method.rpartition("/")[2], _who(caller)
        if why := self._limits.take(who, caller.name, kind):
            await self._hold(who, size_bytes)
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        if caller.role not in rule.roles:
            allowed = " and ".join(sorted(f"{role.value}s" for role in rule.roles)) or "nobody"
            await _abort(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"{kind} is for {allowed}, and {printable(caller.name)} is {_KINDS[caller.role]}",
            )
        if streams_out:
            # Otherwise they go with the first message, and a call that is ended during its first write cannot be told
            # why: grpc would send them once more.
            await context.send_initial_metadata(())
        task = asyncio.current_task()
        assert task is not None
        call = _Call(entry, task)
        self._calls.add(call)
        if (oldest := self._limits.enter(who, caller.name, kind, call)) is not None:
            oldest.end(grpc.StatusCode.RESOURCE_EXHAUSTED, too_many(kind))
        try:
            yield caller, lambda kind: self._limits.message_pause(who, kind)
        except asyncio.CancelledError:
            if not call.refused:
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            # If not, an answer of its own was on its way.
            with contextlib.suppress(grpc.aio.UsageError):
                await _abort(context, call.code, call.refused)
        finally:
            self._calls.discard(call)
            self._limits.leave(who, kind, call)

    async def _hold(self, who: str, size_bytes: int) -> None:
        # A large request would be held with its call.
        if self._held[who] >= _MOST_HELD or size_bytes > _HELD_BYTES:
            return
        self._held[who] += 1
        try:
            await asyncio.sleep(HELD_S)
        finally:
            self._held[who] -= 1
            if not self._held[who]:
                del self._held[who]

    async def _caller(self, context: Context, size_bytes: int) -> tuple[Caller, Entry]:
        caller = None
        try:
            caller = caller_of(context.auth_context())
            if caller is None:
                raise TrustError("this coordinator takes calls with a certificate only")
            entry = await self._entry(caller)
            if why := self._refusal(entry):
                raise TrustError(why)
        except TrustError as error:
            if caller is not None:  # such as one that was revoked since it floods
                await self._hold(_who(caller), size_bytes)
            await _abort(context, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except FedepthError as error:
            await _abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"busy: the record of certificates cannot be read: {error}; come back in {BUSY_RETRY_S:g} s",
            )
        return caller, entry

    async def _entry(self, caller: Caller) -> Entry:
        """What is recorded of the caller's certificate.

        Raises:
            TrustError: nothing is.
        """
        entry = self._entries.get(caller.fingerprint)
        if entry is None:
            entry = await asyncio.to_thread(self._registry.find, caller.fingerprint)
            if entry is None:
                raise TrustError(
                    f"the certificate of {printable(caller.name)} is not in this coordinator's record, such as after "
                    f"that was restored from a copy; {_again(caller)}"
                )
            if len(self._entries) >= _MOST_CACHED:
                self._entries.clear()
            self._entries[caller.fingerprint] = entry
        return entry

    def _refusal(self, entry: Entry) -> str:
        """Why a certificate is not valid now; "" if it is."""
        issued = entry.issued
        name, what = printable(issued.subject.name), _again(issued.subject)
        if entry.revoked_at is not None or issued.fingerprint in self._revoked:
            return f"the certificate of {name} was revoked; {what}"
        if self._clock() >= issued.not_after:
            return f"the certificate of {name} has expired; {what}"
        return ""

    async def _check(self, request: Any, rule: Rule, caller: Caller, context: Context) -> None:
        if rule.device_id is not None:
            claimed = rule.device_id(request)
            if claimed is not None and claimed != caller.id:
                await _abort(
                    context,
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"{printable(caller.name)} is the device {caller.id} and speaks for {quoted(claimed)}; its "
                    "device-id is not the one that its certificate is for",
                )
        if rule.task_id is not None:
            task_id = rule.task_id(request)
            owner = "" if task_id is None else self.owner_of(task_id)
            if owner and owner != caller.id:
                await _abort(
                    context, grpc.StatusCode.PERMISSION_DENIED, f"this task is not one of {printable(caller.name)}"
                )


class _Read:
    """A context whose messages are decoded and checked as they are read, by whichever of grpc's two ways that is.

    Too many are read more slowly: flow control then holds up whoever sends them. So it is with those that are written:
    a device decides how small the pieces are in which a file is sent to it.
    """

    def __init__(
        self, context: Context, checked: Callable[[bytes], Awaitable[Any]], pause: Callable[[str], float]
    ) -> None:
        self._context = context
        self._checked = checked
        self._pause = pause

    async def read(self) -> Any:
        await self._counted(READ)
        encoded = await self._context.read()
        if encoded is grpc.aio.EOF:  # type: ignore[attr-defined]  # not in the stubs
            return encoded
        return await self._checked(encoded)

    async def write(self, message: Any) -> None:
        await self._counted(WRITTEN)
        await self._context.write(message)

    async def _counted(self, kind: str) -> None:
        if seconds := self._pause(kind):
            await asyncio.sleep(seconds)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (request := await self.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            yield request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _parts(handler: Handler) -> tuple[Callable[..., Any], Callable[..., Handler]]:
    """What a handler calls, and how to make another of its kind."""
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler  # type: ignore[return-value]
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler  # type: ignore[return-value]
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler  # type: ignore[return-value]
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler  # type: ignore[return-value]


async def _decoded(handler: Handler, encoded: bytes, context: Context) -> Any:
    if handler.request_deserializer is None:
        return encoded
    try:
        return handler.request_deserializer(encoded)
    except DecodeError as error:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"this is not a valid message: {error}")


def _let_go(error: BaseException | None) -> None:
    """Frees what the frames of an error hold, such as a request of megabytes. Errors that end a call are in cycles, and
    would be collected some thousand calls later."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _who(caller: Caller) -> str:
    return f"{caller.role.value} {caller.id}"


def _again(who: Caller | Subject) -> str:
    how = "enroll {}" if who.role is Role.DEVICE else "certs issue {} --operator"
    return f"for a new one: fedepth-coordinator {how.format(as_typed(who.name))}"


async def _abort(context: Context, code: grpc.StatusCode, why: str) -> NoReturn:
    await context.abort(code, why)
    raise TrustError(why)  # not reached: abort raises
