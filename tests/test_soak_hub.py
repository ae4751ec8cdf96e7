"""The long tests of `benchmarks/soak_hub.py`, scaled; `benchmarks/soak.py ID` runs them at full length."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import soak_hub


@pytest.mark.slow
def test_A2_twenty_of_two_hundred_kills():
    assert soak_hub.kills(0.1) == {"kills": 20, "bad": 0}


def test_b12_no_locks():
    assert soak_hub.no_locks() == {"refused in words": 9, "silent": 0}


@pytest.mark.slow
def test_g8_twenty_thousand_of_a_million_blobs():
    assert soak_hub.million_blobs(0.02)["blobs"] == 20_000
