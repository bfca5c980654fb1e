"""Frames between two processes of one party: whole, in order, private, and not waited for too long."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from ffm_secure.errors import StoreError
from ffm_secure.transport.local_socket import Answering, Door, Gone, Late, ask, connect


def test_a_frame_arrives_as_it_was_written(tmp_path: Path) -> None:
    door = Door(tmp_path / "door")
    one = connect(tmp_path / "door")
    other = door.accept(5.0)
    assert other is not None
    large = os.urandom(3_000_000)
    threading.Thread(target=one.write, args=({"number": 3, "names": ["a"]}, large)).start()
    assert other.read(5.0) == ({"number": 3, "names": ["a"]}, large)
    assert other.read(0.05) is None
    one.close()
    with pytest.raises(Gone):
        other.read(5.0)
    door.close()
    assert not (tmp_path / "door").exists()


@pytest.mark.parametrize("size", [0, 1, 1000, 2500])
def test_a_frame_in_pieces_is_a_frame_like_any_other(size: int, tmp_path: Path) -> None:
    door = Door(tmp_path / "door")
    one = connect(tmp_path / "door")
    other = door.accept(5.0)
    assert other is not None
    content = os.urandom(size)
    pieces = deque(content[place : place + 700] for place in range(0, size, 700))
    one.write_pieces({"number": 1}, pieces)
    assert not pieces, "what was sent is let go of"
    assert other.read(5.0) == ({"number": 1}, content)
    other.write({"number": 2}, content)
    answer = one.read_pieces(1000, 5.0)
    assert answer is not None
    assert (answer[0], b"".join(answer[1])) == ({"number": 2}, content)
    assert all(len(piece) == 1000 for piece in list(answer[1])[:-1])
    assert one.read_pieces(1000, 0.05) is None
    door.close()


def test_frames_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    door = Door(tmp_path / "door")
    one = connect(tmp_path / "door")
    other = door.accept(5.0)
    assert other is not None
    writers = [
        threading.Thread(target=one.write, args=({"number": number}, bytes([number]) * 300_000))
        for number in range(8)
    ]
    for writer in writers:
        writer.start()
    seen = set()
    for _ in writers:
        frame = other.read(10.0)
        assert frame is not None
        number = frame[0]["number"]
        assert isinstance(number, int)
        assert frame[1] == bytes([number]) * 300_000
        seen.add(number)
    assert seen == set(range(8))
    door.close()


def test_what_is_no_frame_ends_the_connection(tmp_path: Path) -> None:
    answering = Answering(tmp_path / "door", lambda words, content: (words, content))
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"ffm1" + b"\xff" * 12,
        b"ffm1\x02\x00\x00\x00" + bytes(8) + b"{[",
    ):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(tmp_path / "door"))
            stranger.sendall(noise)
            stranger.settimeout(5.0)
            assert received(stranger) == b""
    assert ask(tmp_path / "door", {"word": "x"}, b"y", seconds=5.0) == ({"word": "x"}, b"y")
    answering.close()


def received(end: socket.socket) -> bytes:
    """Return what arrives before the connection ends."""
    try:
        return end.recv(100)
    except ConnectionResetError:
        return b""


def test_nobody_waits_longer_than_said(tmp_path: Path) -> None:
    answering = Answering(tmp_path / "door", lambda words, content: (time.sleep(3.0), (words, content))[1])
    began = time.monotonic()
    with pytest.raises(Late):
        ask(tmp_path / "door", {}, seconds=0.3)
    assert time.monotonic() - began < 2.0
    answering.close()
    with pytest.raises(Gone) as gone:
        ask(tmp_path / "door", {}, seconds=1.0)
    assert not isinstance(gone.value, Late)


def test_a_door_is_its_owners_alone_and_may_lie_deep(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a folder with a long name"] * 6)
    deep.mkdir(parents=True)
    path = deep / "door"
    assert len(str(path)) > 108
    answering = Answering(path, lambda words, content: (words, content))
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask(path, {"deep": True}, seconds=5.0)[0] == {"deep": True}
    answering.close()


def test_a_door_where_somebody_waits_is_not_taken(tmp_path: Path) -> None:
    answering = Answering(tmp_path / "door", lambda words, content: (words, content))
    with pytest.raises(StoreError, match="stop that one first"):
        Door(tmp_path / "door")
    assert ask(tmp_path / "door", {"a": 1}, seconds=5.0)[0] == {"a": 1}
    answering.close()
    Door(tmp_path / "door").close()


def test_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "door"))
    left.close()
    answering = Answering(tmp_path / "door", lambda words, content: (words, content))
    assert ask(tmp_path / "door", {"a": 1}, seconds=5.0)[0] == {"a": 1}
    answering.close()
