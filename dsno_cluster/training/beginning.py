"""The starting point of a training: the data set, the checkpoint to resume from, the student and its weights.

Rank 0 reads it, above all the teacher, and passes it to the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import same_times
from dsno_cluster.errors import UserError
from dsno_cluster.features.extractors import check_differentiable, main_weights
from dsno_cluster.model_folder import FeatureWeights, StartModel
from dsno_cluster.networks.backbones import Backbone
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.students.dsno import DSNO, form_of
from dsno_cluster.teachers import ConfiguredTeacher, find_teacher
from dsno_cluster.training import checkpoint
from dsno_cluster.training.checkpoint import CheckpointState
from dsno_cluster.training.identity import Inputs
from dsno_cluster.training.judging import can_judge
from dsno_cluster.training.objectives.making import find_real_images
from dsno_cluster.training.online import planned_manifest
from dsno_cluster.training.ownership import hold_students, students_claim
from dsno_cluster.training.start import check_start, find_start, start_weights
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.reader import open_trajectories
from dsno_cluster.trajectories.shards import Manifest, trajectory_spec
from dsno_cluster.trajectories.spec import AnySpec, imported_folder


@dataclass(frozen=True)
class Beginning:
    """Where a training begins: its inputs, the data set's manifest, and the `backbone` if it is the teacher's.

    There is no manifest if no trajectories are needed and none are there. `state` is that of the newest checkpoint, None for a
    new training; `network` describes the teacher's own network, if there is a teacher and it is known.
    """

    inputs: Inputs
    manifest: Manifest | None
    backbone: Backbone | DiffusersModel | None
    state: CheckpointState | None
    network: Backbone | None = None

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return 0 if self.state is None else self.state.step

    @property
    def warmed(self) -> int:
        """The number of updates that were made before the first step, if no step is done."""
        return 0 if self.state is None else self.state.warmed or 0


@dataclass(frozen=True)
class DataSet:
    """What a training reads, and the manifest of its trajectories; None if it needs none and none are there."""

    inputs: Inputs
    manifest: Manifest | None


def find_training_teacher(config: Config) -> ConfiguredTeacher | None:
    """The config's teacher; None if it names none and its trajectories were imported, as training then needs none.

    Raises UserError as `find_teacher` does, and for settings that need a teacher that is not named.
    """
    if config.trajectories.imported is None or config.teacher.path is not None:
        return find_teacher(config)
    needing = {
        "training.objective": (config.training.objective == "distribution", "trajectories"),
        "training.heldout_every": (config.training.heldout_every is not None, "null"),
        "student.warm_start": (config.student.warm_start, "false"),
        "student.backbone": (config.student.backbone != "unet", "unet"),
    }
    for key, (needed, otherwise) in needing.items():
        if needed:
            raise UserError(
                f"{key}: needs a teacher, and imported trajectories came with none; set {key}={otherwise}, or name in "
                "teacher.path the model that made them"
            )
    return None


def find_beginning(config: Config, teacher: ConfiguredTeacher | None) -> Beginning:
    """Where a run of this config begins; `teacher` is that of `find_training_teacher`.

    From then on the config's name belongs to this run. Raises UserError if there are no finished trajectories, if the
    teacher does not fit, and if students or checkpoints of the name belong to another run; WorkError if the newest
    checkpoint cannot be read.
    """
    data = find_data_set(config, teacher)
    checkpoint.check_published(config, data.inputs)
    newest = checkpoint.newest_step(config)
    state = None if newest is None else checkpoint.read_state(config, newest, data.inputs)
    hold_students(students_claim(config, data.inputs), newest)
    backbone, network = (teacher.backbone(), teacher.info.backbone) if teacher else (None, None)
    return Beginning(data.inputs, data.manifest, backbone, state, network)


def find_data_set(config: Config, teacher: ConfiguredTeacher | None) -> DataSet:
    """The finished trajectories of a config, or those that online training will make.

    A run is known by the data set that its config describes, whether or not it is read and there. Raises UserError if there
    are no trajectories and the training needs them, and if imported ones are not those that the config describes.
    """
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    if config.trajectories.imported is not None:
        folder = imported_folder(config.trajectories.imported)
        manifest = _find_trajectories(config, storage, folder)
        if manifest is not None:
            _check_imported(config, trajectory_spec(manifest, f"{storage.url}/{folder}"))
        return DataSet(_inputs(config, teacher, folder), manifest)
    plan = make_plan(config, teacher)
    if config.training.online and config.training.reads_trajectories:
        manifest = planned_manifest(plan)
    else:
        manifest = _find_trajectories(config, storage, plan.folder)
    return DataSet(_inputs(config, teacher, plan.folder, plan.other_folders), manifest)


def _find_trajectories(config: Config, storage: Storage, folder: str) -> Manifest | None:
    """The finished trajectories of a folder; None if they are not needed and cannot be used. Raises UserError if they are."""
    try:
        return open_trajectories(storage, folder, config.trajectories.num_samples)
    except UserError as error:
        if not config.needs_trajectories:
            return None
        if config.training.reads_trajectories:
            raise
        raise UserError(
            f"{error}; checkpoints are judged by the teacher's images at their ends: do without them by real images "
            "(data.images), or by training.heldout_every=null"
        ) from None


def _inputs(
    config: Config, teacher: ConfiguredTeacher | None, folder: str, other_folders: tuple[str, ...] = ()
) -> Inputs:
    """What a training of this config reads. Raises UserError if the student that it starts from is not there, and as
    `main_weights`.
    """
    images = teacher_hash = features = None
    if config.training.objective == "distribution":
        assert teacher is not None
        images, features = find_matched(config, teacher)
        teacher_hash = canonical_hash(teacher.info.identity.model_dump(mode="json"))
    return Inputs(
        folder,
        other_folders,
        start=find_start(config),
        teacher=teacher_hash,
        images=images,
        features=features,
    )


def check_matched(config: Config) -> None:
    """Raises UserError if the config's training matches distributions and lacks what it needs, as far as this can be known before
    there are trajectories or a student to start from.
    """
    if config.training.objective == "distribution" and (teacher := find_training_teacher(config)) is not None:
        find_matched(config, teacher)


def find_matched(config: Config, teacher: ConfiguredTeacher) -> tuple[str | None, FeatureWeights | None]:
    """The identity of the real images, and the features, by which distribution matching trains; None: by none.

    Raises UserError as `find_real_images`, `check_differentiable` and `main_weights`, the last one also for weights by which
    checkpoints are only judged; and for a `patience` without images to judge by.
    """
    settings = config.training.distribution
    learned = settings.frechet_weight > 0.0
    judged = config.training.heldout_every is not None and can_judge(config, teacher.states)
    if learned:
        check_differentiable(config.evaluation.feature_extractor, "training.distribution.frechet_weight")
    if settings.patience is not None and not judged:
        raise UserError(
            "training.distribution.patience: no images are known that would tell checkpoints apart; set data.images "
            "or data.name, and teacher.decoder for latents, or set patience to null"
        )
    weights = main_weights(config.evaluation) if learned or judged else None
    images = find_real_images(config, teacher, quiet=True) if settings.needs_images else None
    features = FeatureWeights(extractor=weights.extractor, sha256=weights.sha256) if weights else None
    return None if images is None else images.identity, features if learned else None


def _check_imported(config: Config, spec: AnySpec) -> None:
    """Raises UserError unless imported trajectories have the config's times, shape and classes."""
    name, times = config.trajectories.imported, config.trajectories.time_points
    if not same_times(times, spec.times):
        raise UserError(
            f"trajectories.times: {list(times)}, those of the imported {name} are {list(spec.times)}"
        )
    if config.network.state_shape != spec.shape:
        raise UserError(
            f"network: images of {config.network.state_shape}, those of the imported {name} are {spec.shape}"
        )
    if config.network.num_classes != spec.labels.num_classes:
        raise UserError(
            f"network.num_classes: {config.network.num_classes}, the imported {name} has {spec.labels.num_classes}"
        )


def make_student(config: Config, backbone: Backbone | DiffusersModel | None) -> DSNO:
    """The config's student with random weights; one that is finished by its samples has no dropout, as when `eval` draws them."""
    settings = config.student
    times, init = config.trajectories.time_points, settings.temporal_init
    student = DSNO(config.network, form_of(settings), times, backbone=backbone, init=init)
    return student.without_dropout() if config.training.objective == "distribution" else student


def check_begins(config: Config, teacher: ConfiguredTeacher | None = None) -> None:
    """Raises UserError if `training.start` names no student, or another than the config's. `teacher` is found unless given."""
    if config.training.start is None:
        return
    teacher = teacher or find_training_teacher(config)
    with torch.device("meta"):
        check_start(config, make_student(config, teacher.backbone() if teacher else None))


def new_student(
    config: Config, teacher: ConfiguredTeacher | None = None, start: StartModel | None = None
) -> DSNO:
    """A student at initialisation: that of `start`, or the teacher's backbone if `student.warm_start`.

    `teacher` is found unless it is given. Raises UserError if the teacher's shapes are not the config's, no
    student can start from its network, or the start is another student than the config's.
    """
    teacher = teacher or find_training_teacher(config)
    student = make_student(config, teacher.backbone() if teacher else None)
    if start is not None:
        student.load_state_dict(start_weights(config, start, student))
    elif config.student.warm_start and teacher is not None:
        student.warm_start(teacher.warm_start())
    return student
