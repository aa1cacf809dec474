"""An aggregate's fields are its constructor, and a part of what Triton's cache goes by."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl

from megakernel.device.compat import aggregate


def made(**fields: Any) -> Any:
    return aggregate(type("Made", (), {"__annotations__": fields}))


def key(kind: Any) -> str:
    [constructor] = kind.hash_attrs
    return str(constructor.cache_key)


def test_fields_are_taken_in_their_order() -> None:
    kind = made(first=gl.constexpr, second=gl.constexpr)
    one, two = gl.constexpr(1), gl.constexpr(2)
    value = object.__new__(kind)
    kind.hash_attrs[0].fn(value, one, two)
    assert (value.first, value.second) == (one, two)


def test_other_fields_are_another_constructor() -> None:
    keys = [
        key(made(**fields)) for fields in ({"a": gl.tensor, "b": gl.tensor}, {"b": gl.tensor, "a": gl.tensor}, {"a": gl.tensor})
    ]
    assert len(set(keys)) == 3
    assert key(made(a=gl.tensor, b=gl.tensor)) == keys[0]
