"""Whole messages over blocking sockets: whatever pieces they come in, whoever hangs up, however long it takes."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvtransfer.transports.sockets import receive, receive_bytes, send

LARGE = random.Random(0).randbytes((3 << 20) + 17)
"""More than who receives is woken for, and no multiple of it."""


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Over TCP: only there does who receives say how much it wants."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    with first, second:
        yield first, second


def soon() -> float:
    return time.monotonic() + 30


@pytest.mark.parametrize("piece", [1000, 65537, len(LARGE)])
def test_a_message_may_come_in_any_pieces(pair: tuple[socket.socket, socket.socket], piece: int) -> None:
    first, second = pair

    def say() -> None:
        for start in range(0, len(LARGE), piece):
            send(first, [LARGE[start : start + piece]], soon())

    sender = threading.Thread(target=say)
    sender.start()
    into = bytearray(len(LARGE))
    whole = memoryview(into)
    receive(second, [whole[:7], whole[7 : 2 << 20], whole[2 << 20 :]], soon())
    sender.join()
    assert into == LARGE


def test_a_short_message_behind_a_long_one_is_not_waited_behind(pair: tuple[socket.socket, socket.socket]) -> None:
    first, second = pair
    for message in (LARGE[: 1 << 20], b"!", LARGE[:100_000], b"??"):
        sender = threading.Thread(target=send, args=(first, [message], soon()))
        sender.start()
        assert receive_bytes(second, len(message), soon()) == message
        sender.join()


def test_what_does_not_come_in_time_is_a_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    first, second = pair
    first.sendall(b"half")
    with pytest.raises(TimeoutError):
        receive_bytes(second, 8, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        receive_bytes(second, 8, time.monotonic() - 1)


def test_who_hangs_up_in_the_middle_is_an_end_of_file(pair: tuple[socket.socket, socket.socket]) -> None:
    first, second = pair
    first.sendall(b"half")
    first.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="in the middle"):
        receive_bytes(second, 8, soon())


def test_who_is_waiting_is_woken_when_its_own_socket_is_shut_down(pair: tuple[socket.socket, socket.socket]) -> None:
    _, second = pair
    timer = threading.Timer(0.05, second.shutdown, [socket.SHUT_RDWR])
    timer.start()
    with pytest.raises(EOFError):
        receive_bytes(second, 8, soon())
    timer.join()


def test_a_reader_that_does_not_read_is_a_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    first, _ = pair
    with pytest.raises(TimeoutError):
        send(first, [LARGE] * 16, time.monotonic() + 0.1)
