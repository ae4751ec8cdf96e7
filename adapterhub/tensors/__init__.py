"""Operations on tensors that know no adapter: files of them, factors, largest entries, entropy codes. Floor 2, runtime."""

from typing import Any


def __getattr__(name: str) -> Any:
    from adapterhub.moved import heir

    return heir(__name__, name)
