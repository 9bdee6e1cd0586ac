"""The cluster on paper: laws of closed queueing networks, and which part binds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil.bench.paper import Costs, Machines, Station, outlook, throughput

COSTS = Costs(
    tokens=16_384, teacher_s=0.05, student_s=0.1, scheduler_s=0.002, num_bytes=25_000_000, parameters=66_985_530
)
MACHINES = Machines(gpus_per_node=8, network_bytes_s=50e9, store_bytes_s=10e9, gpu_hour=2.5)
STATIONS = st.lists(
    st.builds(Station, st.just("any"), st.floats(1e-4, 1.0), st.integers(1, 16)), min_size=1, max_size=4
).map(tuple)


@given(STATIONS, st.integers(1, 60))
def test_no_faster_than_the_slowest_station_and_faster_with_more_on_the_way(
    stations: tuple[Station, ...], jobs: int
) -> None:
    now, more = throughput(stations, jobs), throughput(stations, jobs + 1)
    least, alone = min(station.capacity for station in stations), sum(station.seconds for station in stations)
    assert now <= more * (1 + 1e-9)
    assert now <= least * (1 + 1e-9)
    assert now <= jobs / alone * (1 + 1e-9)


def test_one_micro_batch_meets_no_queue() -> None:
    stations = (Station("a", 0.1, 1), Station("b", 0.4, 2))
    assert throughput(stations, 1) == pytest.approx(1 / 0.5)


def test_two_equal_stations_share_what_is_on_the_way() -> None:
    """The closed form of a balanced network: n / (n + 1) of the capacity with n on the way between two stations."""
    stations = (Station("a", 0.1, 1), Station("b", 0.1, 1))
    assert throughput(stations, 9) == pytest.approx(10 * 9 / 10)


def test_a_small_cluster_is_bound_by_its_gpus_and_a_large_one_by_the_one_scheduler() -> None:
    small, large = (outlook(gpus, COSTS, MACHINES, 16) for gpus in (8, 1024))
    assert small.binds in ("teacher", "student")
    assert large.binds == "scheduler" and large.tok_s == pytest.approx(COSTS.tokens / COSTS.scheduler_s)
    assert large.cost_per_billion_tokens > small.cost_per_billion_tokens
    assert small.teachers + small.students == 8
