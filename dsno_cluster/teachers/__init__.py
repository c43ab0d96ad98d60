"""Teachers: pretrained denoisers behind one interface, `teacher(x, t, labels) -> x0`.

Load one with `load_teacher(path, options={...})`. Each module is a family of checkpoints and recognises its
own:

    own.py               a dsno-cluster model folder: model.safetensors, config.yaml, meta.json; package:NAME for one that ships
    diffusers_folder.py  a UNet2DModel or DiT, by itself or in a pipeline folder
    state_dicts.py       OpenAI's U-Nets, DiT and SiT in their authors' own files, with options for what these do not say
    published.py         progressive distillation's flax file, with option `config`, or the folder of it and its config.yaml
    factories.py         package.module:function, called with the options
    closed_forms.py      closed-form:gaussian, options mean, std, shape
                         closed-form:mixture, options means, stds, shape, weights, classes, null_class

`loading.py` lists the families; `of_config.py` finds the teacher that a config names; `decoders.py` turns states that are
latents into images. A trajectory spec
records the teacher's `identity`: everything about it that can change a byte. Importing this package does not
import torch.
"""

from dsno_cluster.teachers.closed_forms import (
    gaussian_teacher,
    gaussian_trajectory,
    mixture_teacher,
)
from dsno_cluster.teachers.compared import Sampling, compared_samplings
from dsno_cluster.teachers.decoders import Decoder, DecoderIdentity, LoadedDecoder, States, states_of
from dsno_cluster.teachers.loading import load_teacher, open_teacher, read_identity, teacher_info
from dsno_cluster.teachers.of_config import ConfiguredTeacher, NoTeacher, find_teacher
from dsno_cluster.teachers.teacher import Teacher, TeacherInfo, check_fits

__all__ = [
    "ConfiguredTeacher",
    "Decoder",
    "DecoderIdentity",
    "LoadedDecoder",
    "NoTeacher",
    "Sampling",
    "States",
    "Teacher",
    "TeacherInfo",
    "check_fits",
    "compared_samplings",
    "find_teacher",
    "gaussian_teacher",
    "gaussian_trajectory",
    "load_teacher",
    "mixture_teacher",
    "open_teacher",
    "read_identity",
    "states_of",
    "teacher_info",
]
