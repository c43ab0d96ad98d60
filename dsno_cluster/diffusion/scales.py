"""Scales in which trainers keep noisy states: the same states as ours, times a number that depends on the time.

Our states are variance preserving, x = cos(theta) x0 + sin(theta) eps, with the angle theta(t) of the cosine time t
(`schedule.angle`). States of other scales with an equal ratio sigma / alpha = tan(theta) are multiples of them:

- vp: x itself, at the time theta in radians (the trigonometric flow of Lu & Song 2024, *Simplifying, Stabilizing and Scaling
  Continuous-Time Consistency Models*, with sigma_d = 1);
- edm: y = x / cos(theta) = x0 + sigma eps, at the time sigma = tan(theta) (Karras et al. 2022, section 2 and table 1);
- flow: z = x / (cos(theta) + sin(theta)) = (1 - u) x0 + u eps, at the time u = sin(theta) / (sin(theta) + cos(theta)) (Liu et al.
  2022, *Rectified Flow*).

At t=0 a state counts as clean in every scale: its time is 0 and it is not multiplied.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from dsno_cluster.diffusion.schedule import angle, time_of_angle

ScaleName = Literal["vp", "edm", "flow"]
SCALES: tuple[ScaleName, ...] = get_args(ScaleName)

FORMULAS: dict[ScaleName, str] = {
    "vp": "state(t) = cos(t) x0 + sin(t) eps, t in [0, pi/2]",
    "edm": "state(t) = x0 + t eps, t is sigma",
    "flow": "state(t) = (1 - t) x0 + t eps, t in [0, 1]",
}
# the largest time that trainers of the scale take, at which their noise stands
_NOISIEST: dict[ScaleName, float] = {"vp": angle(1.0), "edm": 80.0, "flow": 0.999}


def noise_timestep(scale: ScaleName) -> float:
    """The time of the pure noise, in the scale's own time."""
    return _NOISIEST[scale]


def noise_factor(scale: ScaleName, timestep: float) -> float:
    """What unit noise is multiplied with at the noisiest `timestep`: sigma for edm, 1 for the others.

    It is what samplers of the scale start from; the share of x0 in the state there is left out.
    """
    return timestep if scale == "edm" else 1.0


def timestep_of(scale: ScaleName, t: float) -> float:
    """The time in a scale of the cosine time `t` in [0, 1]."""
    theta = angle(t)
    if t == 0.0:
        return 0.0
    if scale == "vp":
        return theta
    return math.tan(theta) if scale == "edm" else math.sin(theta) / (math.sin(theta) + math.cos(theta))


def cosine_time(scale: ScaleName, timestep: float) -> float:
    """The cosine time in [0, 1] of a scale's time; the inverse of `timestep_of`, clamped at the ends."""
    return time_of_angle(_angle_of(scale, timestep))


def factor_of(scale: ScaleName, timestep: float) -> float:
    """What a variance preserving state is multiplied with at a scale's time; 1 at time 0."""
    theta = _angle_of(scale, timestep)
    if scale == "vp" or timestep == 0.0:
        return 1.0
    return 1.0 / math.cos(theta) if scale == "edm" else 1.0 / (math.sin(theta) + math.cos(theta))


def logsnr_of(scale: ScaleName, timestep: float) -> float:
    """log(alpha^2 / sigma^2) at a scale's time above 0, the same in all scales: -2 log tan(theta)."""
    return -2.0 * math.log(math.tan(_angle_of(scale, timestep)))


def largest_timestep(scale: ScaleName) -> float:
    """The end of a scale's times, which no state reaches."""
    return {"vp": math.pi / 2, "edm": math.inf, "flow": 1.0}[scale]


def _angle_of(scale: ScaleName, timestep: float) -> float:
    if scale == "vp":
        return timestep
    return math.atan(timestep) if scale == "edm" else math.atan2(timestep, 1.0 - timestep)
