from __future__ import annotations

from axattn.plotting import _units


def test_seconds():
    texts = {None: "-", 1.234: "1.23 s", 0.9999: "1.00 s", 0.9994: "999 ms", 12.34: "12.3 s"}
    texts |= {4.5678e-3: "4.57 ms", 123.4e-6: "123 us", 1.2e-8: "0.01 us"}
    assert {value: _units.format_seconds(value) for value in texts} == texts


def test_size():
    texts = {None: "-", 0: "0 B", 500 * 2**10: "500 KiB", 2**20: "1.00 MiB", 3 * 2**29: "1.50 GiB"}
    assert {value: _units.format_bytes(value) for value in texts} == texts


def test_amount():
    assert _units.format_amount(1.5e12) == "1.50 T"
    assert _units.format_amount(2.5e6, "B") == "2.50 MB"
    assert _units.format_amount(12) == "12"
    assert _units.format_amount(None) == "-"


def test_three_digits():
    assert [_units.format_digits(value) for value in (1.234, 9.996, 99.96)] == [
        "1.23",
        "10.0",
        "100",
    ]
