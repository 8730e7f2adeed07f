"""The page on sizing has the tables that the script calculates, and the script counts what was published."""

from pathlib import Path

import pytest

from benchmarks import sizing


def test_the_page_has_the_tables_of_today() -> None:
    page = (Path(__file__).parents[2] / "docs/sizing.md").read_text()
    for table in "\n".join(sizing.tables()).split("\n\n"):
        assert table in page


@pytest.mark.parametrize(
    ("name", "published"),
    [("h0-mini", 44.6), ("phikon-v2", 119), ("virchow2", 329), ("h-optimus-0", 592), ("midnight-12k", 583)],
)
def test_operations_are_those_published_and_attention(name: str, published: float) -> None:
    """The published figures leave out the products of attention, 2 to 5 per cent."""
    assert 1.02 * published < sizing.gflop_per_tile(name) < 1.06 * published


def test_time_is_that_of_the_slower_of_gpu_and_decoding() -> None:
    rows = {
        line.split("`")[1]: [cell.strip(" *") for cell in line.split("|")] for line in sizing.tables() if "`" in line
    }
    hours = float(rows["efficientnet_b0"][9])
    assert hours == pytest.approx(sizing.TILES / (sizing.CORES_PER_GPU * sizing.DECODED_PER_CORE) / 3600, rel=0.05)
