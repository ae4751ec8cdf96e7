"""A registry under load, and killed: the runs of benchmarks/soak.py, scaled down. What each holds stands there."""

import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    sys.path.insert(0, str(SOAK.parent))
    import soak

    return soak


@pytest.mark.slow
def test_a11_the_server_is_killed_before_every_step_at_full_length(soak):
    assert soak.a11()["kills"] > 20


@pytest.mark.slow
def test_b8_8_clients_for_10_seconds_beside_gc(soak):
    figures = soak.b8(clients=8, seconds=10, every=0.5)
    assert figures["push"] == figures["pull"] == figures["deleted"] > 0 and figures["gc"] > 0


@pytest.mark.slow
def test_g1_2000_adapters_in_6000_releases(soak):
    assert soak.g1(adapters=2000, asked=100)["releases"] == 6000


@pytest.mark.slow
def test_g2_1000_versions_and_a_lineage_of_200(soak):
    assert soak.g2(versions=1000, depth=200)["versions"] == 1000


@pytest.mark.slow
def test_g5_20_uploads_of_20_megabytes_at_once(soak):
    assert soak.g5(clients=20, size=20)["uploads"] == 20


@pytest.mark.slow
def test_g6_10_seconds_of_50_requests(soak):
    assert soak.g6(seconds=10)["requests"] > 100


def test_every_long_run_has_a_row_in_the_table(soak):
    table = (SOAK.parent.parent / "docs" / "evidence" / "soak.md").read_text()
    assert {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")} >= set(soak.RUNS)
