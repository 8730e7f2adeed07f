"""What the doctor tells of a cohort from a sample of it: bounds that hold where few slides are most of the work."""

import random

import pytest

from jobs.checks.clock import Workforce, estimate
from jobs.checks.extent import Bounds, CohortSize, PerSlide, spread_over, total
from udfs.sample_cohort import Sample, SeenSlide

MB = 10**6


def skewed(seed: int, small: int, outlying: int) -> list[tuple[int, int]]:
    """Sizes and tiles: many small slides, and some of a hundred times the bytes; tiles follow bytes within a factor of 2."""
    rng = random.Random(seed)
    sizes = [rng.randint(MB // 2, 2 * MB) for _ in range(small)]
    sizes += [rng.randint(100 * MB, 200 * MB) for _ in range(outlying)]
    rng.shuffle(sizes)
    return [(size, round(size / 40_000 * rng.uniform(0.7, 1.4))) for size in sizes]


@pytest.mark.parametrize("n", [3, 6, 12])
@pytest.mark.parametrize(("small", "outlying"), [(10, 1), (98, 2), (500, 5), (40, 0)])
def test_slides_that_hold_most_of_the_bytes_are_in_the_sample(n: int, small: int, outlying: int) -> None:
    for seed in range(20):
        sizes = [size for size, _ in skewed(seed, small, outlying)]
        chosen = spread_over(sizes, min(n, len(sizes)))
        assert len(set(chosen)) == len(chosen) == min(n, len(sizes))
        of_chosen = [sizes[i] for i in chosen]
        assert of_chosen[0] == max(sizes) and of_chosen == sorted(of_chosen, reverse=True)
        if outlying and n > 3:
            assert min(of_chosen) < 3 * MB
    assert sorted(spread_over(sizes, len(sizes))) == list(range(len(sizes)))
    assert spread_over([7], 1) == [0] and set(spread_over([5, 5, 5], 2)) <= {0, 1, 2}


@pytest.mark.parametrize(("small", "outlying"), [(98, 2), (500, 5), (40, 0), (9, 1)])
def test_bounds_hold_the_truth_and_the_estimate_is_near(small: int, outlying: int) -> None:
    held = 0
    for seed in range(50):
        slides = skewed(seed, small, outlying)
        sizes = [size for size, _ in slides]
        sampled = [slides[i] for i in spread_over(sizes, 6)]
        told = total(map(PerSlide(sampled, sizes).of, sizes))
        truth = sum(tiles for _, tiles in slides)
        held += told.low <= truth <= told.high
        assert truth / 1.7 < told.likely < truth * 1.7
        naive = len(slides) * sum(tiles for _, tiles in slides[:6]) / 6  # what the first slides would tell
        assert outlying == 0 or abs(told.likely - truth) < abs(naive - truth) or abs(naive - truth) < truth / 2
    assert held >= 45


def test_a_cohort_that_was_seen_whole_has_no_spread() -> None:
    slides = skewed(0, 5, 2)
    sizes = [size for size, _ in slides]
    truth = float(sum(tiles for _, tiles in slides))
    assert total(map(PerSlide(slides, sizes).of, sizes)) == pytest.approx(Bounds(truth, truth, truth))


def test_slides_of_one_size_may_differ_in_tissue() -> None:
    """Uncompressed scans: their bytes say nothing, so the bounds are those of the sample, and of few slides wider."""
    sizes = [10 * MB] * 50
    told = total(map(PerSlide([(10 * MB, 10), (10 * MB, 100)], sizes).of, sizes))
    assert told == pytest.approx(Bounds(0, 2750, 8250))


@pytest.mark.parametrize("sampled", [[(MB, 30)], [(MB, 30), (MB, 30)], [(MB, 30), (2 * MB, 60)]])
def test_one_or_two_sampled_slides_leave_the_spread_unknown(sampled: list[tuple[int, float]]) -> None:
    sizes = [size for size, _ in sampled] + [5 * MB]
    assert PerSlide(sampled, sizes).of(5 * MB) == pytest.approx(Bounds(50, 150, 450))
    assert PerSlide(sampled, sizes).of(MB) == pytest.approx(Bounds(30, 30, 30))  # all slides of that size were seen
    more = [*sampled, (3 * MB, 90), (4 * MB, 120)]
    assert PerSlide(more, [*sizes, 3 * MB, 4 * MB]).of(5 * MB) == pytest.approx(Bounds(150, 150, 150))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_clock_says_that_few_slides_were_sampled(n: int) -> None:
    work = Workforce(tasks=1, executors=1, heap_bytes=64 * 10**9, is_local=False)
    sample = Sample([SeenSlide(0.1, 10, 1000, MB)] * n, 300, 10.0, 300_000, {"e": (100, 100)})
    said = "fewer than 3 slides were sampled, so tiles may be 3 times fewer or more"
    assert (said in estimate([sample], CohortSize({"p": [MB] * 10}, None), work).found) == (n < 3)
    assert said not in estimate([sample], CohortSize({"p": [MB] * n}, None), work).found


def test_a_limit_cuts_each_bound_and_the_largest_patient_is_the_one_with_the_bytes() -> None:
    tiles = PerSlide([(MB, 10), (2 * MB, 40)], [MB, 2 * MB, MB, 4 * MB])
    bags = CohortSize({"many": [MB, MB], "large": [4 * MB]}, None).bags(tiles)
    assert bags[0] == pytest.approx(Bounds(10, 30, 90)) and bags[1] == pytest.approx(Bounds(20, 60, 180))
    assert CohortSize({"large": [4 * MB]}, 45).bags(tiles) == [pytest.approx(Bounds(20, 45, 45))]


def test_the_clock_tells_two_ends_where_the_sample_leaves_room_and_plans_by_the_later() -> None:
    """98 slides of 25 tiles and two of 3,000: the sample has one of these, and one has twice the tiles a byte."""
    cohort = CohortSize({"p": [MB] * 98, "q": [100 * MB, 120 * MB]}, None)
    slides = [SeenSlide(5.0, MB, 3000, 120 * MB), SeenSlide(0.1, MB, 25, MB), SeenSlide(0.1, MB, 50, MB)]
    samples = [
        Sample(slides, 300, 10.0, 10_000 * 300, {"e": (100, 100)}),
        Sample([], 200, 10.0, 10_000 * 200, {"e": (100, 100)}),
    ]
    work = Workforce(tasks=2, executors=1, heap_bytes=64 * 10**9, is_local=False)
    row = estimate(samples, cohort, work, deadline_h=0.05)
    # beside 3,000 tiles that were seen, 198 MB of 20.8 to 58.3 tiles: at 60 to 40 tiles/s they take 119 to 364 s, and masks
    # 5 to 24 s
    assert "about 9,600 tiles (7,100 to 15,000), 2.1 min to 6.5 min beside the start-up" in row.found
    assert "for 0.05 h: 3 executors like these" in row.found and "or give it 6.5 min" in row.remedy
