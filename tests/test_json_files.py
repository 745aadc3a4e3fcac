"""JSON: what fits its shape is returned, the rest is one line that names the file and the value at fault."""

import json

import pytest

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import COUNT, OneOf, parse_json, read_json

SHAPE = {
    "epoch": COUNT,
    "tracker?": {"rewards": [(OneOf((str, int)), [float])]},
    "best?": OneOf(({"apr": float}, None)),
    "scores?": {str: float},
    "done?": bool,
}
GOOD = [
    {"epoch": 0},
    {"epoch": 3, "other": {"any": [None, 1e5]}, "best": None, "done": True},
    {"epoch": 3, "best": {"apr": 1}, "scores": {"a": 0.5, "b?": 2}, "tracker": {"rewards": [["ä", [1, 0.5]], [3, []]]}},
]
BAD = {
    "torn": ('{"epoch": 3', "JSON"),
    "empty": ("", "JSON"),
    "two values": ('{"epoch": 3}{}', "JSON"),
    "not text": (b"\xff\xfe\x00", "JSON"),
    "list": ("[]", "[]"),
    "null": ("null", "None"),
    "missing": ('{"epochs": 3}', "'epoch' is missing"),
    "bool": ('{"epoch": true}', "'epoch' is True"),
    "float": ('{"epoch": 3.0}', "'epoch' is 3.0"),
    "negative": ('{"epoch": -1}', "'epoch' is -1"),
    "large": ('{"epoch": 9007199254740992}', "9007199254740992"),
    "beyond Python's digits": ('{"epoch": 1, "x": %s}' % ("9" * 10_000), "64 bits"),
    "deep lists": ("[" * 10**6, "nested"),
    "deep objects": ('{"epoch": 1, "x": ' + '{"x": ' * 100 + "1" + "}" * 101, "nested"),
    "twice": ('{"epoch": 1, "x": [{"y": 1, "y": 1}]}', "'y' appears twice"),
    "surrogate": ('{"epoch": 1, "x": "\\ud800"}', "Unicode"),
    "surrogate as a name": ('{"epoch": 1, "\\udfff": 1}', "Unicode"),
    "nan": ('{"epoch": 1, "best": {"apr": NaN}}', "'best'"),
    "infinite": ('{"epoch": 1, "scores": {"a?": 1e999}}', "'scores'.'a?' is inf"),
    "no list": ('{"epoch": 1, "tracker": {"rewards": {}}}', "'tracker'.'rewards' is {}"),
    "too short": ('{"epoch": 1, "tracker": {"rewards": [["a"]]}}', "'tracker'.'rewards'[0]"),
    "an element": ('{"epoch": 1, "tracker": {"rewards": [["a", [1]], ["b", [1, null]]]}}', "[1][1][1] is None"),
}


@pytest.mark.parametrize("value", GOOD)
def test_a_value_that_fits_is_returned(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json", SHAPE) == value
    assert parse_json(str(2**64 - 1), int, "x") == 2**64 - 1  # a seed


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_does_not_fit_is_named(tmp_path, case):
    text, said = BAD[case]
    path = tmp_path / "progress.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_json(path, SHAPE, "do this")
    message = str(caught.value)
    assert message.startswith(f"{str(path)!r} ") and said in message and message.endswith("; do this")
    assert "\n" not in message and len(message) < 500 + len(str(path))
