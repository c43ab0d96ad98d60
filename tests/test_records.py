"""Records: what one model writes another version of it reads, and a damaged file is one line."""

import math
from typing import Literal

import pytest

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.records import Record, SparseRecord, read_record, record_bytes


class Measurement(Record):
    """Of one version."""

    schema_version: Literal[1] = 1
    name: str
    shape: tuple[int, ...]
    error: float | None = None


class LaterMeasurement(Measurement):
    """With a key that was added."""

    seconds: float = 0.0


def test_a_record_survives_its_file() -> None:
    record = Measurement(name="FID of Å", shape=(3, 8, 8), error=math.inf)
    data = record_bytes(record)
    assert data.startswith(b'{\n  "schema_version": 1,\n  "name": ') and data.endswith(b"}\n")
    assert read_record(Measurement, data, "m.json") == record


def test_absent_values_can_be_left_out() -> None:
    class Sparse(SparseRecord):
        name: str
        shape: tuple[int, ...] = ()
        error: float | None = None

    assert b'"error": null' in record_bytes(Measurement(name="x", shape=()))
    assert record_bytes(Sparse(name="x")) == b'{\n  "name": "x"\n}\n'
    assert Sparse(name="x", error=0.0).values() == {"name": "x", "error": 0.0}


def test_versions_that_add_a_key_read_each_other() -> None:
    later = LaterMeasurement(name="x", shape=(1,), seconds=2.0)
    assert read_record(Measurement, record_bytes(later), "m.json") == Measurement(name="x", shape=(1,))
    earlier = record_bytes(Measurement(name="x", shape=(1,)))
    assert read_record(LaterMeasurement, earlier, "m.json").seconds == 0.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"name": "x"}', "m.json: not a measurement (shape: Field required)"),
        (b'{"name": 1, "shape": []}', "m.json: not a measurement (name: Input should be a valid string)"),
        (b'{"schema_version": 2, "name": "x", "shape": []}', "m.json: schema version 2; this dsno-cluster reads version 1"),
        (b"[1]", "m.json: not a measurement (Input should be an object)"),
        (b'{"name": "x", "sha', "m.json: not a measurement (Invalid JSON: EOF while parsing a string"),
        (b'\xff\xfe"', "m.json: not a measurement (Invalid JSON"),
        (b"", "m.json: not a measurement (Invalid JSON"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(data: bytes, message: str) -> None:
    for error in (UserError, WorkError):
        with pytest.raises(error) as raised:
            read_record(Measurement, data, "m.json", error)
        assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
