"""What a run needs of the cluster, and what is said where there is less."""

import os

import pytest
from pydantic import ValidationError

from raydistil import plan
from raydistil.config.cluster import ClusterConfig
from raydistil.errors import PlanError
from raydistil.plan import Node, Threads, check_fits, check_placed, cores, local_cpus, matches, need_of, threads

CLUSTER = ClusterConfig(students=2, student_cpus=3, teachers=(2, 5), teacher_cpus=0.5, student_gpus=1, teacher_gpus=0.5)
ARITHMETIC = "CPUs: 2 students x 3 + 2 teachers x 0.5 + 0.25 to read = 7.25; GPUs: 2 x 1 + 2 x 0.5 = 3"


def test_the_need_is_that_of_the_fewest_teachers() -> None:
    need = need_of(CLUSTER, pools=1)
    assert (need.teachers, need.cpus, need.gpus) == (2, 7.25, 3.0)
    alone = need_of(CLUSTER, pools=0)
    assert (alone.teachers, alone.cpus, alone.gpus) == (0, 6.25, 2.0)


def test_a_cluster_of_just_that_size_is_enough() -> None:
    check_fits(need_of(CLUSTER, pools=1), 7.25, 3, 3)


@pytest.mark.parametrize(("cpus", "gpus"), [(7, 3), (7.25, 2)])
def test_a_smaller_cluster_is_refused_with_the_arithmetic(cpus: float, gpus: float) -> None:
    with pytest.raises(PlanError) as caught:
        check_fits(need_of(CLUSTER, pools=1), cpus, gpus, 64)
    assert str(caught.value) == (
        f"expected a cluster that holds the run ({ARITHMETIC}), found {cpus:g} CPUs and {gpus:g} GPUs: "
        f"lower cluster.students, cluster.teachers or their cpus and gpus, or add nodes"
    )


def test_the_largest_node_must_hold_the_widest_worker() -> None:
    with pytest.raises(PlanError, match="expected a node with 3 CPUs for one worker, the largest has 2: lower"):
        check_fits(need_of(CLUSTER, pools=1), 100, 100, 2)
    wide = ClusterConfig(teacher_cpus=8)
    with pytest.raises(PlanError, match="expected a node with 8 CPUs"):
        check_fits(need_of(wide, pools=1), 100, 0, 4)
    check_fits(need_of(wide, pools=0), 100, 0, 4)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True), ({"pool": "a"}, True), ({"pool": "b"}, False), ({"pool": "!b"}, True), ({"pool": "!a"}, False),
        ({"pool": "in(b, a)"}, True), ({"pool": "in(b,c)"}, False), ({"pool": "!in(b, c)"}, True),
        ({"pool": "!in(a, b)"}, False), ({"other": "a"}, False), ({"other": "!a"}, True),
        ({"pool": "a", "zone": "1"}, True), ({"pool": "a", "zone": "2"}, False),
    ],
)  # fmt: skip
def test_which_nodes_a_selector_means(selector: dict[str, str], expected: bool) -> None:
    assert matches(selector, {"pool": "a", "zone": "1"}) is expected


@pytest.mark.parametrize("value", ["", "in(a", "in()", "a b", "!!a", "a,b"])
def test_a_selector_that_ray_would_not_read_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match=r"teacher_label_selector\.pool"):
        ClusterConfig(teacher_label_selector={"pool": value})


def test_the_labelled_nodes_must_hold_who_asks_for_them() -> None:
    nodes = [Node(8, 2, {"pool": "students"}), Node(1, 1, {"pool": "teachers"})]
    selectors = {"student_label_selector": {"pool": "students"}, "teacher_label_selector": {"pool": "teachers"}}
    check_placed(need_of(CLUSTER.model_copy(update=selectors), pools=1), nodes)
    with pytest.raises(PlanError, match=r"2 CPUs and 2 GPUs for 4 teachers .* pool=teachers, found 1 and 1 on"):
        check_placed(need_of(CLUSTER.model_copy(update=selectors), pools=2), nodes)
    elsewhere = CLUSTER.model_copy(update={"student_label_selector": {"pool": "!students"}})
    with pytest.raises(PlanError, match=r"on 1 of 2 nodes: change cluster\.student_label_selector"):
        check_placed(need_of(elsewhere, pools=0), nodes)


@pytest.mark.parametrize(
    ("number", "cluster", "pools", "expected"),
    [
        (8, ClusterConfig(), 1, Threads(8, 8, shared=True)),
        (8, ClusterConfig(), 0, Threads(8, 8, shared=False)),
        (8, ClusterConfig(students=2, teachers=(1, 6)), 1, Threads(4, 8, shared=True)),
        (8, ClusterConfig(teachers=(2, 6)), 2, Threads(8, 2, shared=True)),
        (2, ClusterConfig(students=2, teachers=(3, 3)), 1, Threads(1, 1, shared=True)),
        (8, ClusterConfig(student_threads=7), 1, Threads(7, 8, shared=True)),
        (8, ClusterConfig(student_threads=4, teacher_threads=4), 1, Threads(4, 4, shared=False)),
        (8, ClusterConfig(teacher_gpus=1), 1, Threads(4, 4, shared=False)),
        (8, ClusterConfig(student_gpus=1), 1, Threads(4, 4, shared=False)),
        (1, ClusterConfig(), 1, Threads(1, 1, shared=True)),
    ],
)
def test_both_sides_may_use_every_core_of_a_machine_of_our_own(
    monkeypatch: pytest.MonkeyPatch, number: int, cluster: ClusterConfig, pools: int, expected: Threads
) -> None:
    monkeypatch.setattr(plan, "cores", lambda: number)
    assert threads(cluster, pools) == expected


@pytest.mark.parametrize(
    ("cluster", "pools", "expected"),
    [
        (ClusterConfig(), 1, Threads(4, 4, shared=False)),
        (ClusterConfig(students=2, teachers=(1, 6)), 1, Threads(2, 2, shared=False)),
        (ClusterConfig(students=9), 1, Threads(1, 1, shared=False)),
        (ClusterConfig(student_threads=7), 1, Threads(7, 4, shared=False)),
    ],
)
def test_on_a_cluster_that_others_use_the_cores_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, cluster: ClusterConfig, pools: int, expected: Threads
) -> None:
    monkeypatch.setattr(plan, "cores", lambda: 8)
    assert threads(cluster, pools, joined=True) == expected


@pytest.mark.parametrize(
    ("number", "cluster", "expected"),
    [
        (8, ClusterConfig(), Threads(7, 8, shared=False)),
        (8, ClusterConfig(students=2, teachers=(2, 6)), Threads(3, 4, shared=False)),
        (1, ClusterConfig(), Threads(1, 1, shared=False)),
        (8, ClusterConfig(student_threads=8), Threads(8, 8, shared=False)),
    ],
)
def test_a_core_is_left_to_what_reads_kept_targets(
    monkeypatch: pytest.MonkeyPatch, number: int, cluster: ClusterConfig, expected: Threads
) -> None:
    monkeypatch.setattr(plan, "cores", lambda: number)
    assert threads(cluster, 1, cached=True) == threads(cluster, 3, cached=True) == expected


def test_a_local_cluster_counts_every_core_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    for number, expected in ((1, 8), (4, 8), (5, 10), (64, 128)):
        monkeypatch.setattr(plan, "cores", lambda number=number: number)
        assert local_cpus() == expected


def test_the_default_run_fits_a_machine_with_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "cores", lambda: 1)
    check_fits(need_of(ClusterConfig(), pools=1), local_cpus(), 0, local_cpus())
