"""Pieces of files are on the wire what protobuf makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prodisco_sandbox.proto import files_pb2 as pb
from prodisco_sandbox.proto.pieces import data_of, encoded


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, (1 << 21) - 1, 1 << 21])
def test_a_piece_is_the_message(size: int) -> None:
    data = b"\x12" * size
    for message in (pb.WriteRequest(data=data), pb.ReadResponse(data=data)):
        assert encoded(data) == message.SerializeToString()
        assert bytes(data_of(encoded(memoryview(data))) or b"") == data


@given(st.binary(max_size=20) | st.binary(max_size=12).map(lambda rest: b"\x12" + rest))
def test_any_bytes_are_read_as_protobuf_reads_them_or_left_to_it(message: bytes) -> None:
    found = data_of(message)
    if found is not None:
        assert pb.WriteRequest.FromString(message) == pb.WriteRequest(data=bytes(found))


def test_what_holds_something_else_is_left_to_protobuf() -> None:
    for message in (pb.WriteRequest(path="x"), pb.WriteRequest(size=5), pb.WriteRequest()):
        assert data_of(message.SerializeToString()) is None
    assert data_of(encoded(b"a") + pb.WriteRequest(size=5).SerializeToString()) is None
