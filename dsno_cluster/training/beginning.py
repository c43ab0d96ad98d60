"""The starting point of a training: the data set, the checkpoint to resume from, the student and its weights.

Rank 0 reads it, above all the teacher, and passes it to the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsno_cluster.config import Config
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.teachers import ConfiguredTeacher, find_teacher
from dsno_cluster.training import checkpoint
from dsno_cluster.training.checkpoint import CheckpointState
from dsno_cluster.training.online import planned_manifest
from dsno_cluster.training.ownership import hold_students, students_claim
from dsno_cluster.trajectories.plan import Plan, make_plan
from dsno_cluster.trajectories.reader import open_trajectories
from dsno_cluster.trajectories.shards import Manifest


@dataclass(frozen=True)
class Beginning:
    """Where a training begins: the data set's `folder` and `manifest`, and a `diffusers` backbone.

    `state` is that of the newest checkpoint, None for a new training.
    """

    folder: str
    manifest: Manifest
    diffusers: DiffusersModel | None
    state: CheckpointState | None

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return 0 if self.state is None else self.state.step


def find_beginning(config: Config, teacher: ConfiguredTeacher | None) -> Beginning:
    """Where a run of this config begins.

    From then on the config's name belongs to this run. Raises UserError if there are no finished trajectories, if the
    teacher does not fit, and if students or checkpoints of the name belong to another run; WorkError if the newest
    checkpoint cannot be read.
    """
    assert teacher is not None  # on rank 0
    plan = make_plan(config, teacher)
    manifest = find_trajectories(config, plan)
    same = (plan.folder, *plan.other_folders)
    checkpoint.check_published(config, same)
    newest = checkpoint.newest_step(config)
    state = None if newest is None else checkpoint.read_state(config, newest, same)
    hold_students(students_claim(config, plan.folder), newest)
    return Beginning(plan.folder, manifest, teacher.backbone(), state)


def find_trajectories(config: Config, plan: Plan) -> Manifest:
    """The manifest of the plan's finished trajectories, or of those that online training will make.

    Raises UserError if there are none.
    """
    if config.training.online:
        return planned_manifest(plan)
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    return open_trajectories(storage, plan.folder, config.trajectories.num_samples)


def make_student(config: Config, diffusers: DiffusersModel | None) -> DSNO:
    """The config's student with random weights."""
    settings = config.student
    form = Form(settings.modes, settings.operator, settings.prediction, settings.points)
    times, init = config.trajectories.time_points, settings.temporal_init
    return DSNO(config.network, form, times, diffusers=diffusers, init=init)


def new_student(config: Config, teacher: ConfiguredTeacher | None = None) -> DSNO:
    """A student at initialisation: the teacher's backbone if `student.warm_start`, new temporal layers.

    `teacher` is found unless it is given. Raises UserError if the teacher's shapes are not the config's, or no
    student can start from its network.
    """
    teacher = teacher or find_teacher(config)
    student = make_student(config, teacher.backbone())
    if config.student.warm_start:
        student.warm_start(teacher.warm_start())
    return student
