"""A message in the engine's form: words and bytes become objects that travel one by one, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from ffm_secure.transport.local_socket import Words

SPEAKS: Final = 1
"""The version of what both relays say to each other; a site answers no other."""
TYPE: Final = "query.carry"
PIECE: Final = 4 << 20  # bytes: the engine holds an object several times over
LARGEST: Final = 1 << 33  # bytes of one message
_SOONEST, _LATEST = 0.02, 0.5  # seconds between two looks for an object that is still on its way
_WORDS, _CONTENT = "words", "content"
_AT_A_TIME, _SMALL = 3, 3  # objects on their way at a time; so many are not worth it
T = TypeVar("T")
BROKEN: Final = (httpx.HTTPError, ValueError, OSError)
"""What a call of the engine raises when the other side is away, refuses, or answers nonsense."""


class NotWhole(ValueError):
    """A message did not come whole before its time was over, or is none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message that is ready to be sent: its heading, the tree of its objects, and the objects."""

    heading: ProtoMessage
    tree: ObjectTree
    objects: Mapping[str, InflatableObject]

    @property
    def name(self) -> str:
        """Return the name by which the engine knows the message."""
        return str(self.tree.object_id)


def outgoing(metadata: Metadata, words: Words, content: bytes | memoryview) -> Outgoing:
    """Return a message under its metadata, in objects of at most `PIECE` bytes and a little."""
    message = make_message(metadata=metadata, content=_records(words, content))
    message.metadata.__dict__["_message_id"] = message.object_id
    with no_object_id_recompute():
        return Outgoing(
            heading=message_to_proto(remove_content_from_message(message)),
            tree=get_object_tree(message),
            objects=get_all_nested_objects(message),
        )


def push(message: Outgoing, wanted: Iterable[str], send: Callable[[str, bytes], bool]) -> None:
    """Send the objects that are wanted.

    Raises:
      NotWhole: the other side takes no more of them.
    """

    def send_one(name: str) -> bool:
        return send(name, message.objects[name].deflate())

    if not all(_few_at_a_time(send_one, tuple(wanted))):
        raise NotWhole("the message was dropped by the other side")


def pull(tree: ObjectTree, ask: Callable[[str], PullObjectResponse], until: float) -> Message:
    """Return the message of a tree; its objects may still be on their way when it is announced.

    `ask` returns the engine's response for one object; `until` is in seconds since 1970.

    Raises:
      NotWhole: it does not come whole in time.
    """
    names = tuple(dict.fromkeys(item.object_id for item in iterate_object_tree(tree)))
    if len(names) > LARGEST // PIECE:
        raise NotWhole("the message has more objects than the largest message")
    parts = _few_at_a_time(lambda name: _pull_object(name, ask, until), names)
    contents = dict(zip(names, parts, strict=True))
    message = inflate_object_from_contents(tree.object_id, contents)
    if not isinstance(message, Message):
        raise NotWhole("what came is no message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def opened(message: Message) -> tuple[Words, bytes]:
    """Return the words and the bytes of a message.

    Raises:
      NotWhole: it is none of ours.
    """
    if not message.has_content():
        raise NotWhole("the engine reports an error")
    records: Mapping[str, Any] = message.content
    first = records.get(_WORDS)
    if not isinstance(first, ConfigRecord) or not isinstance(first.get(_CONTENT), bytes):
        raise NotWhole("the message has no words")
    words = {name: value for name, value in first.items() if name != _CONTENT}
    pieces = [first[_CONTENT], *(records[name][_CONTENT] for name in sorted(records) if name != _WORDS)]
    return words, pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _few_at_a_time(work: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Do the same for several objects, many of them a few in parallel; what one raises is raised."""
    if len(names) <= _SMALL:
        return [work(name) for name in names]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(work, names))


def _records(words: Words, content: bytes | memoryview) -> RecordDict:
    whole = memoryview(content)
    records = RecordDict({_WORDS: ConfigRecord({**words, _CONTENT: bytes(whole[:PIECE])})})
    for place in range(PIECE, len(whole), PIECE):
        records[f"{place:016d}"] = ConfigRecord({_CONTENT: bytes(whole[place : place + PIECE])})
    return records


def _pull_object(name: str, ask: Callable[[str], PullObjectResponse], until: float) -> bytes:
    pause = _SOONEST
    while True:
        response = ask(name)
        if not response.object_found:
            raise NotWhole("a part of the message is gone")
        if response.object_available:
            return bytes(response.object_content)
        if time.time() + pause > until:
            raise NotWhole("the message did not come whole in time")
        time.sleep(pause)
        pause = min(2 * pause, _LATEST)


class VersionHeaders:
    """Tell the other side which release of the engine speaks; what does not fit is refused there."""

    def __init__(self, component: str) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component(component).as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers to one request."""
        add_headers(context.request, self._headers)
        response: httpx.Response = call_next(context)
        return response
