"""Teachers: pretrained denoisers behind one interface, `teacher(x, t, labels) -> x0`.

`load_teacher(path, **options)` is the door. What `path` is decides the kind:

    a folder or URL of ours      model.safetensors, config.yaml, meta.json; package:NAME for one that ships
    a diffusers folder           a UNet2DModel, alone or in a pipeline folder (`diffusers_folder.py`)
    a flax msgpack file          a published progressive-distillation teacher, with `config=PUBLISHED.yaml`;
                                 or the folder of such a file and its config.yaml (`models/importers/`)
    package.module:function      a Python factory, called with the options
    closed-form:gaussian         options mean, std, shape
    closed-form:mixture          options means, stds, shape, weights, classes, null_class

`teacher_info` is what can be known without building the network; its `identity` is what a trajectory spec
records: everything about the teacher that can change a byte. Importing this module does not import torch.
"""

from dsno_cluster.teachers.closed_forms import (
    gaussian_teacher,
    gaussian_trajectory,
    mixture_teacher,
)
from dsno_cluster.teachers.loading import (
    diffusers_model,
    load_teacher,
    teacher_info,
    warm_start_weights,
)
from dsno_cluster.teachers.teacher import Teacher, TeacherInfo, check_fits

__all__ = [
    "Teacher",
    "TeacherInfo",
    "check_fits",
    "diffusers_model",
    "gaussian_teacher",
    "gaussian_trajectory",
    "load_teacher",
    "mixture_teacher",
    "teacher_info",
    "warm_start_weights",
]
