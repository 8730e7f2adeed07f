"""What the answers of a store tell of the way to it, and so which gaps are cheaper to bring than a request."""

import pytest

from udfs.wsi.store.about import Link


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(0.005, 400e6), (0.03, 50e6), (0.2, 5e6)])
def test_the_gap_follows_latency_and_width(latency_s: float, bytes_per_s: float) -> None:
    link = Link()
    for _ in range(200):
        link.learn(1000, latency_s)
        link.learn(2_000_000, latency_s + 2_000_000 / bytes_per_s)
    assert link.gap_bytes == pytest.approx(latency_s * bytes_per_s, rel=0.1)


def test_an_answer_quicker_than_ever_is_no_endless_width() -> None:
    link = Link()
    for _ in range(200):
        link.learn(2_000_000, 1e-3)
    assert link.bytes_per_s <= 2_000_000 / 1e-4
