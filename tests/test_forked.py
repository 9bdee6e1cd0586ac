"""What the tests' forked workers must not have of each other."""

import ray
from ray._raylet import TaskID


def drawn() -> str:
    """A name as Ray's core draws it for a task of a thread's."""
    name: str = TaskID.for_fake_task(ray.JobID.from_int(1)).hex()
    return name


class Drawing:
    def drawn(self) -> str:
        return drawn()


def test_no_two_workers_draw_the_same_names(ray_cluster: None) -> None:
    actors = [ray.remote(Drawing).options(num_cpus=0).remote() for _ in range(3)]
    names = ray.get([actor.drawn.remote() for actor in actors])
    assert len(set(names)) == 3
