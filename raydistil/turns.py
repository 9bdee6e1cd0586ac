"""How a student and its teachers share the cores of a machine: by turns, a micro-batch each.

Threads of two processes on one core wait for each other at every barrier. So a student leaves the teachers their part
of the cores in as many of its micro-batches as they need to keep up with it, and takes all cores in the others, in
which they run where a core would be idle. Which micro-batches those are follows from the configuration and the number
of cores: gradients differ in the last bit with the threads, and a resumed run ends as one that never stopped.
"""

from raydistil.cache.sizes import compared_share
from raydistil.chain import Link
from raydistil.config import Config
from raydistil.config.cluster import ClusterConfig
from raydistil.models import outline
from raydistil.plan import cores
from raydistil.size import forward_flops
from raydistil.specs import Turns
from raydistil.types import labels_texts

INFERENCE = 0.75  # a teacher's seconds a FLOP over a student's: nothing is kept for a backward pass


def turns(cluster: ClusterConfig, shared: int, teachers: int, work: float) -> Turns:
    """Of a student with `shared` threads beside `teachers` of all its teachers, whose work is `work` times its own.

    Threads that the configuration gives stay as they are.
    """
    if cluster.student_threads or cluster.student_gpus or cluster.teacher_gpus:
        return Turns(shared, shared, 1.0)
    return Turns(shared, max(shared, cores() // cluster.students), min(1.0, work * shared / teachers))


def teachers_work(config: Config, link: Link, init: str, students_head: bool) -> float:
    """What the teachers of `link` take to make a micro-batch's targets, over what the student takes to learn from them.

    `students_head`: whether the student's side applies the teacher's vocabulary head to its states.
    """
    length, task = config.tokens.length, config.task
    compared = 1.0 if labels_texts(task) else compared_share(link.train.loss, config.masking.share)
    models = [outline(model, task) for model in link.teachers]
    layers = [forward_flops(model, length, 0.0) for model in models]
    whole = [forward_flops(model, length, compared) for model in models]
    student = 3 * forward_flops(outline(init, task), length, compared)
    moved = whole[0] - layers[0] if students_head else 0.0
    return INFERENCE * (sum(whole) - moved) / (student + INFERENCE * moved)
