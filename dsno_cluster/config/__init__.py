"""The configuration of an experiment: strict, frozen pydantic models, read from YAML and dotted overrides.

Start with `load_config("configs/digits.yaml", ["training.lr=1e-4"])`. Every mistake in the input is a
`UserError` of one line that names the key and the nearest valid one. `Profile` describes where a stage runs.
"""

from dsno_cluster.config.container import Container
from dsno_cluster.config.evaluation import Evaluation, MetricName
from dsno_cluster.config.experiment import Config, DataConfig
from dsno_cluster.config.loading import (
    config_values,
    dump_config,
    dump_profile,
    files_not_there,
    is_config_file,
    load_config,
    load_dumped_config,
    load_profile,
    load_resolved_profile,
)
from dsno_cluster.config.networks import Network, StudentConfig, TeacherConfig, too_many_modes
from dsno_cluster.config.places import RunConfig, StorageConfig
from dsno_cluster.config.profile import Profile, slurm_minutes
from dsno_cluster.config.training import TeacherTraining, Training
from dsno_cluster.config.trajectories import Reader, TimeGrid, Trajectories
from dsno_cluster.config.validation import validate

__all__ = [
    "Config",
    "Container",
    "DataConfig",
    "Evaluation",
    "MetricName",
    "Network",
    "Profile",
    "Reader",
    "RunConfig",
    "StorageConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherTraining",
    "TimeGrid",
    "Training",
    "Trajectories",
    "config_values",
    "dump_config",
    "dump_profile",
    "files_not_there",
    "is_config_file",
    "load_config",
    "load_dumped_config",
    "load_profile",
    "load_resolved_profile",
    "slurm_minutes",
    "too_many_modes",
    "validate",
]
