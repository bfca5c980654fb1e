"""Large messages are cut, put together, bounded and forgotten as they should be."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np
import pytest

from ffm_secure.engines.nvflare import pieces
from ffm_secure.engines.nvflare.pieces import PIECE, Parcel, Room, Shelf

SIZES = [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_cut_is_put_together_again(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    parcel, shelf = Parcel(content), Shelf()
    for piece in parcel.before_last():
        assert len(piece) == PIECE
        shelf.add(7, piece, 60.0)
    assert len(parcel.last) <= PIECE
    assert parcel.size == size
    shelf.add(7, parcel.last, 60.0)
    assert b"".join(shelf.take(7)) == content
    assert not shelf.take(7), "what was taken is gone"


@pytest.mark.parametrize("size", SIZES[3:])
def test_what_is_fetched_piece_by_piece_is_whole_and_then_gone(size: int) -> None:
    content, shelf = np.random.default_rng(size).bytes(size), Shelf()
    pieces = [content[place : place + PIECE] for place in range(0, size, PIECE)]
    shelf.keep(3, deque(pieces[1:]), PIECE, 60.0)
    fetched = pieces[0]
    while len(fetched) < size:
        assert shelf.piece(3, len(fetched) + 1) == b"", "from another place"
        piece = shelf.piece(3, len(fetched))
        assert 0 < len(piece) <= PIECE
        fetched += piece
    assert fetched == content
    assert shelf.piece(3, 0) == b""


def test_what_nobody_asks_for_again_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, now = Shelf(), [0.0]
    monkeypatch.setattr(pieces.time, "monotonic", lambda: now[0])
    shelf.add(1, b"of a site that died", 5.0)
    shelf.add(2, b"new", 50.0)
    now[0] = 6.0
    assert shelf.piece(1, 0) == b""
    assert shelf.piece(2, 0) == b"new"


def test_no_more_is_put_together_than_fits_whoever_sends_it() -> None:
    shelf = Shelf(limit=10)
    assert shelf.add(1, b"123456", 60.0)
    assert not shelf.add(2, b"12345", 60.0), "two messages share the room"
    assert shelf.add(1, b"7890", 60.0)
    assert not shelf.add(1, b"!", 60.0)
    assert not shelf.take(1), "nothing stays of what was too large"
    assert shelf.add(3, b"1234567890", 60.0)


def test_a_room_holds_what_fits_or_one_that_is_larger() -> None:
    room, over, entered = Room(limit=10), threading.Event(), []

    def enter(size: int) -> None:
        room.enter(size, over)
        entered.append(size)

    enter(25)  # alone, whatever its size
    waiting = threading.Thread(target=enter, args=(4,), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert entered == [25]
    room.leave(25)
    waiting.join(5.0)
    enter(6)
    assert entered == [25, 4, 6]
    last = threading.Thread(target=enter, args=(1,), daemon=True)
    last.start()
    over.set()
    last.join(5.0)
    assert entered == [25, 4, 6, 1], "nobody waits when everything is over"
