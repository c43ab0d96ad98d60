"""A scheduler's config, the options, and what follows from them: how a network is used, and the scheduler's own steps.

A file says what a network is; an option only adds what no file says. An option that contradicts a file is refused, except
for the keys that only choose the scheduler's own steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsno_cluster.diffusion import native_grids
from dsno_cluster.diffusion.discrete_levels import noise_levels
from dsno_cluster.diffusion.schedule import karras_sigmas
from dsno_cluster.errors import UserError, closest
from dsno_cluster.teachers import diffusers_schedulers as schedulers
from dsno_cluster.teachers.diffusers_schedulers import BETAS, REFUSED, SUPPORTED, Class, Kind
from dsno_cluster.teachers.facts import PREDICTED, Facts, sigmas_of_levels
from dsno_cluster.teachers.teacher import NativeGrid, Options, plain

PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
_BETAS_NEEDED = {"prediction_type", "beta_schedule"}
OPTIONS = ("scheduler", *dict.fromkeys(key for keys in schedulers.KEYS.values() for key in keys))


@dataclass(frozen=True)
class Schedule:
    """How a folder's network is used, by its scheduler.

    `values` define it, and are part of the teacher's identity. `native` are the scheduler's own steps, or the reason why
    there are none. `levels` are those of kind betas, as log-SNRs. `clips`: the scheduler bounds the clean image.
    `former_values` are those that earlier versions recorded for the same noise levels.
    """

    kind: Kind
    values: dict[str, Any]
    native: NativeGrid | str
    levels: tuple[float, ...] = ()
    clips: bool = False
    former_values: dict[str, Any] | None = None

    @property
    def distilled(self) -> bool:
        """Whether the network knows only one step, from the noisiest level to the image."""
        return self.kind == "consistency"

    @property
    def prediction(self) -> str:
        """What a network of kind betas predicts: x, eps or v."""
        return PREDICTIONS[self.values["prediction_type"]]

    def facts(self, network: str) -> Facts:
        """What people want to know of a network that is used so."""
        values = self.values
        if self.kind == "betas":
            named = "trained" if values["trained_betas"] else values["beta_schedule"]
            words = PREDICTED[self.prediction], f"betas {named}, {len(self.levels)} levels"
            return Facts(network, *words, sigmas=sigmas_of_levels(self.levels))
        if self.kind == "flow":
            low = values["sigma_min"]
            words = "the velocity eps - x0 of a linear path", "linear flow, every level"
            return Facts(network, *words, sigmas=(low / (1 - low), math.inf))
        sigmas = values["sigma_min"], values["sigma_max"]
        words = {
            "edm": (f"F, preconditioned as EDM with sigma_data {values.get('sigma_data')}", "every sigma"),
            "consistency": ("the end of the trajectory, in one step (consistency model)", "one step"),
            "ve": ("the score of images in [0, 1]", "variance exploding, every sigma"),
        }[self.kind]
        return Facts(network, *words, sigmas=sigmas)


@dataclass(frozen=True)
class Saved:
    """A scheduler as a folder's files have it: its config, the file that holds it, and the class in `model_index.json`."""

    config: dict[str, Any]
    file: str
    listed_class: str | None = None


def read_schedule(saved: Saved | None, options: Options, path: str) -> Schedule:
    """Raises UserError if the class is refused or unknown, and for values that are missing, wrong or contradictory."""
    values = _Values(saved, options, path)
    row = _class(values)
    kind = _kind_in_use(row, values)
    values.check_options(kind)
    values.defaults = row.defaults
    clips = any(values.said(key) for key in ("clip_sample", "thresholding", "clip_denoised"))
    if kind == "edm":
        return _edm(row, values, clips)
    if kind == "consistency":
        low, high = values.range("sigma_min", "sigma_max")
        numbers = {
            "kind": kind,
            "sigma_data": values.positive("sigma_data"),
            "sigma_min": low,
            "sigma_max": high,
        }
        grid = native_grids.times_of_ratios((high,))
        return Schedule(kind, numbers, lambda _: grid, clips=clips)
    if kind == "flow":
        return _flow(values, clips)
    if kind == "ve":
        return _ve(values, clips)
    return _betas(row, values, clips)


class _Values:
    """The values of a scheduler by key: those of its file, else those of the options, else its class's defaults."""

    def __init__(self, saved: Saved | None, options: Options, path: str) -> None:
        self.saved, self.options, self.path = saved, options, path
        self.defaults: Mapping[str, Any] = {}

    @property
    def file(self) -> str:
        return self.saved.file if self.saved else "its scheduler"

    @property
    def class_name(self) -> str | None:
        """The class that `model_index.json`, the scheduler's own file or an option names."""
        listed = self.saved.listed_class if self.saved else None
        name = listed or self.said("_class_name") or self.options.get("scheduler")
        if name is None:
            return None
        if not isinstance(name, str):
            raise UserError(f"{self.path}: {name!r} is no scheduler class")
        return name.removeprefix("Flax")

    def said(self, key: str) -> Any:
        """The value in the scheduler's file, or None."""
        return self.saved.config.get(key) if self.saved else None

    def get(self, key: str, default: Any = None) -> Any:
        """Raises UserError for an option that contradicts the file."""
        if self.saved and key in self.saved.config:
            value = self.saved.config[key]
            if key not in self.options or plain(self.options[key]) == value:
                return value
            if key in schedulers.SAMPLER_KEYS:
                return plain(self.options[key])
            raise UserError(
                f"{self.path}: option {key} is {self.options[key]!r}, but {self.file} says {value!r}; leave the option out, "
                "or correct the file if it is wrong"
            )
        return plain(self.options[key]) if key in self.options else self.defaults.get(key, default)

    def without_class_default(self, key: str, default: Any) -> Any:
        """As `get`, with `default` in place of the class's own, as earlier versions read it."""
        config = self.saved.config if self.saved else {}
        return plain(self.options.get(key, config.get(key, default)))

    def check_options(self, kind: Kind) -> None:
        """Raises UserError for an option that this kind of scheduler does not have."""
        for key in OPTIONS[1:]:
            if key in self.options and key not in schedulers.KEYS[kind]:
                raise UserError(
                    f"{self.path}: option {key} is {self.options[key]!r}, but {self.class_name} in {self.file} has no {key}: its "
                    f"noise levels {schedulers.LEVELS[kind]}; leave the option out"
                )

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{self.path}: {key} {value!r} in {self.file} must be a number above 0")
        return float(value)

    def range(self, low: str, high: str) -> tuple[float, float]:
        lowest, highest = self.positive(low), self.positive(high)
        if lowest >= highest:
            raise UserError(f"{self.path}: {low} {lowest} in {self.file} must be below {high} {highest}")
        return lowest, highest

    def count(self, least: int) -> int:
        value = self.get("num_train_timesteps", BETAS["num_train_timesteps"])
        if type(value) is not int or value < least:
            raise UserError(f"{self.path}: num_train_timesteps {value!r} must be {least} or more")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.get(key, default)
        if value not in allowed:
            raise UserError(f"{self.path}: {key} {value!r} is not one of: {', '.join(allowed)}")
        return str(value)


def _class(values: _Values) -> Class:
    """The scheduler class of a folder. Raises UserError if it is refused, unknown or named twice differently."""
    path, name = values.path, values.class_name
    has_file, has_betas = bool(values.saved and values.saved.config), values.options.keys() >= _BETAS_NEEDED
    if not has_file and not has_betas and "scheduler" not in values.options:
        raise UserError(
            f"{path}: has no scheduler_config.json, here or in scheduler/; save it there (scheduler.save_pretrained), or "
            "give 'teacher.options={prediction_type: epsilon, beta_schedule: linear}' as the model was trained; for "
            "models without betas, give 'teacher.options={scheduler: EDMEulerScheduler}' or another class"
        )
    if name is None:
        if "beta_schedule" not in {**(values.saved.config if values.saved else {}), **values.options}:
            raise UserError(f"{path}: {values.file} names no _class_name and has no beta_schedule")
        return SUPPORTED["DDIMScheduler"]
    row = _known(name, path)
    if not has_file and row.kind == "betas" and not has_betas:
        raise UserError(
            f"{path}: has no scheduler_config.json; as {name} has betas, also give options prediction_type and beta_schedule"
        )
    if (wanted := values.options.get("scheduler", name)) != name:
        raise UserError(
            f"{path}: option scheduler is {wanted!r}, but the folder has {name}; leave the option out"
        )
    other = values.said("_class_name") or name
    if _known(str(other).removeprefix("Flax"), path).kind != row.kind:
        raise UserError(
            f"{path}: {values.file} says {other}, but model_index.json says {name}, whose noise levels "
            f"{schedulers.LEVELS[row.kind]}; they cannot both be right"
        )
    return row


def _known(name: str, path: str) -> Class:
    if name in REFUSED:
        raise UserError(f"{path}: {name} is not supported: {REFUSED[name]}")
    if name not in SUPPORTED:
        near = closest(name, SUPPORTED)
        raise UserError(
            f"{path}: {name} is no scheduler class that is known here{f'; did it mean {near}?' if near else ''}; if its noise "
            "levels are those of a class of diffusers, save that one in its place"
        )
    return SUPPORTED[name]


def _kind_in_use(row: Class, values: _Values) -> Kind:
    """The kind of network, which two settings of schedulers on betas change."""
    if values.said("use_flow_sigmas"):
        return "flow"
    if _is_continuous(values):
        return "edm"
    return row.kind


def _is_continuous(values: _Values) -> bool:
    """Whether an Euler scheduler treats its network as preconditioned: stable video diffusion's setting."""
    said = values.said("timestep_type"), values.said("prediction_type")
    return values.class_name == "EulerDiscreteScheduler" and said == ("continuous", "v_prediction")


def _edm(row: Class, values: _Values, clips: bool) -> Schedule:
    """EDM's preconditioning. Its sign is the other one for v_prediction."""
    path = values.path
    if row.kind == "betas":  # v of a VP network is EDM's F for data of standard deviation 1
        values.defaults = {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 700.0, "rho": 7.0}
    if (precondition := values.get("precondition_type", "edm")) != "edm":
        raise UserError(f"{path}: precondition_type {precondition!r} in {values.file} is not 'edm'")
    allowed = ("sample",) if row.defaults.get("prediction_type") == "sample" else ("epsilon", "v_prediction")
    prediction = values.one_of("prediction_type", allowed, "epsilon")
    low, high = values.range("sigma_min", "sigma_max")
    rho = values.positive("rho")
    numbers = {
        "kind": "edm",
        "sigma_data": values.positive("sigma_data"),
        "sigma_min": low,
        "sigma_max": high,
        "prediction_type": prediction,
        "time": row.time,
    }
    spacing = values.one_of("sigma_schedule", ("karras", "exponential"), "karras")

    def grid(steps: int) -> tuple[float, ...]:
        if spacing == "karras":
            return native_grids.times_of_ratios(karras_sigmas(steps, low, high, rho))
        return native_grids.times_of_ratios(native_grids.exponential_ratios(steps, low, high))

    return Schedule("edm", numbers, grid, clips=clips)


def _flow(values: _Values, clips: bool) -> Schedule:
    """Velocities on the linear path; the network's time is the number of training timesteps times the share of noise."""
    path, multistep = values.path, bool(values.said("use_flow_sigmas"))
    count = values.count(2)
    shift = values.positive("flow_shift" if multistep else "shift", 1.0)
    if multistep and values.said("prediction_type") != "flow_prediction":
        raise UserError(
            f"{path}: use_flow_sigmas with prediction_type {values.said('prediction_type')!r} in {values.file} is not "
            "supported, only flow_prediction"
        )
    if values.said("invert_sigmas"):
        raise UserError(f"{path}: invert_sigmas true in {values.file} is not supported")
    dynamic = bool(values.said("use_dynamic_shifting"))
    lowest = 1 / count if dynamic or multistep else native_grids.shifted(1 / count, shift)
    stretched_to = values.said("shift_terminal")
    if stretched_to is not None and not (type(stretched_to) is float and 0 < stretched_to < 1):
        raise UserError(
            f"{path}: shift_terminal {stretched_to!r} in {values.file} must be a number between 0 and 1"
        )
    native: NativeGrid | str
    unsupported = [key for key in ("use_beta_sigmas", "use_dynamic_shifting") if values.said(key)]
    spacing = [key for key in ("use_karras_sigmas", "use_exponential_sigmas") if values.said(key)]
    if unsupported or (multistep and (spacing or stretched_to)):
        native = (
            f"{', '.join(unsupported or spacing or ['shift_terminal'])} in {values.file} is not supported"
        )
    else:
        first = 1.0 if values.class_name == "UniPCMultistepScheduler" else 1 - 1 / count

        def native(steps: int) -> tuple[float, ...]:
            if multistep:
                sigmas: list[float] = native_grids.multistep_flow_sigmas(steps, count, shift, first)
            else:
                sigmas = native_grids.flow_sigmas(steps, lowest, shift, stretched_to)
            if spacing == ["use_karras_sigmas"]:
                sigmas = list(karras_sigmas(steps, sigmas[-1], sigmas[0]))
            elif spacing:
                sigmas = list(native_grids.exponential_ratios(steps, sigmas[-1], sigmas[0]))
            return native_grids.times_of_ratios([s / (1 - s) if s < 1 else math.inf for s in sigmas])

    numbers = {"kind": "flow", "num_train_timesteps": count, "sigma_min": lowest}
    return Schedule("flow", numbers, native, clips=clips)


def _ve(values: _Values, clips: bool) -> Schedule:
    """Scores of images in [0, 1]: noise of sigma there is twice as much on images in [-1, 1]."""
    low, high = values.range("sigma_min", "sigma_max")
    native: NativeGrid | str = "the steps of KarrasVeScheduler do not follow its sigmas"
    if values.class_name != "KarrasVeScheduler":  # which speaks of images in [-1, 1]
        low, high = 2 * low, 2 * high
        last = low * (high / low) ** values.positive("sampling_eps", 1e-5)

        def native(steps: int) -> tuple[float, ...]:
            return native_grids.times_of_ratios(native_grids.exponential_ratios(steps, last, high))

    return Schedule("ve", {"kind": "ve", "sigma_min": low, "sigma_max": high}, native, clips=clips)


def _betas(row: Class, values: _Values, clips: bool) -> Schedule:
    """Discrete levels. Raises UserError if the betas define none, or cannot be used with the prediction."""
    path = values.path
    numbers = {key: values.get(key, default) for key, default in BETAS.items()}
    values.one_of("prediction_type", tuple(PREDICTIONS), BETAS["prediction_type"])
    values.one_of("timestep_spacing", native_grids.SPACINGS, BETAS["timestep_spacing"])
    zero_snr = values.get(schedulers.ZERO_SNR, False)
    if zero_snr not in (True, False, None):
        raise UserError(f"{path}: {schedulers.ZERO_SNR} {zero_snr!r} is not one of: true, false")
    values.count(3 if zero_snr else 2)
    _check_betas(numbers, values)
    if type(numbers["steps_offset"]) is not int or numbers["steps_offset"] < 0:
        raise UserError(f"{path}: steps_offset {numbers['steps_offset']!r} must be a whole number, 0 or more")
    if zero_snr and numbers["prediction_type"] == "epsilon":
        raise UserError(
            f"{path}: {schedulers.ZERO_SNR} with prediction_type epsilon: the last level is pure noise, from which eps says "
            "nothing about the image; only v_prediction and sample make sense"
        )
    former = {key: values.without_class_default(key, default) for key, default in BETAS.items()}
    if zero_snr:
        numbers[schedulers.ZERO_SNR] = True
    levels = noise_levels(numbers, path)
    same_levels = all(former[key] == numbers[key] for key in BETAS if key not in schedulers.SAMPLER_KEYS)
    return Schedule(
        "betas",
        numbers,
        _steps_on_betas(row, values, numbers, levels),
        levels,
        clips,
        former_values=former if same_levels and not zero_snr and former != numbers else None,
    )


def _check_betas(numbers: dict[str, Any], values: _Values) -> None:
    """Raises UserError unless the values are of the types that `noise_levels` expects."""
    for key in ("beta_start", "beta_end"):
        values.positive(key, BETAS[key])
    trained = numbers["trained_betas"]
    if trained is not None and not (
        isinstance(trained, list) and all(type(beta) in (int, float) for beta in trained)
    ):
        raise UserError(f"{values.path}: trained_betas in {values.file} is no list of numbers")
    if not isinstance(numbers["beta_schedule"], str) and trained is None:
        raise UserError(f"{values.path}: beta_schedule {numbers['beta_schedule']!r} is no name of a schedule")


def _steps_on_betas(
    row: Class, values: _Values, numbers: dict[str, Any], levels: tuple[float, ...]
) -> NativeGrid | str:
    """The times of the scheduler's own steps, then 0.

    A scheduler whose last step ends at the first level, not at the image, returns the state there; the grid passes
    through that level before 0. (diffusers' DDIM steps by N // steps even if `linspace`, or a `trailing` spacing that
    does not divide N, puts the next timestep elsewhere; here each step ends where the next begins.)
    """
    if row.steps is None:
        return f"{values.class_name} does not only step from noise to images"
    multistep, rounded = row.steps == schedulers.MULTISTEP, row.steps == schedulers.ROUNDED
    keys = (*("use_beta_sigmas", "use_lu_lambdas"), *("use_karras_sigmas", "use_exponential_sigmas"))
    chosen = [] if rounded else [key for key in keys if values.said(key)]
    if len(chosen) > 1 or any(key not in keys[2:] for key in chosen):
        return f"{', '.join(chosen)} in {values.file} is not supported"
    if not rounded and values.said("interpolation_type") not in (None, "linear"):
        return f"interpolation_type {values.said('interpolation_type')!r} in {values.file} is not supported"
    if chosen and numbers.get(schedulers.ZERO_SNR):
        return f"{chosen[0]} with {schedulers.ZERO_SNR} in {values.file} is not supported"
    lowest_lambda = values.get("lambda_min_clipped", -math.inf)
    clipped = (
        float(lowest_lambda) if multistep and isinstance(lowest_lambda, (int, float, str)) else -math.inf
    )
    noisiest = sum(level / 2 >= clipped for level in levels)
    count, spacing, offset = len(levels), numbers["timestep_spacing"], numbers["steps_offset"]
    if values.class_name == "DPMSolverSinglestepScheduler":
        spacing, offset = "linspace", 0
    ends_at_level = (
        not numbers["set_alpha_to_one"] if rounded else values.get("final_sigmas_type") == "sigma_min"
    )
    own = [math.exp(-level / 2) for level in (levels[0], levels[-1])]
    ends = [values.said(key) for key in ("sigma_min", "sigma_max")]

    def grid(steps: int) -> tuple[float, ...]:
        if multistep:
            timesteps: list[Any] = list(
                native_grids.spaced_timesteps_without_last(count, steps, spacing, offset, noisiest)
            )
        else:
            timesteps = native_grids.spaced_timesteps(count, steps, spacing, offset)
        if rounded:
            timesteps = [round(timestep) for timestep in timesteps]
        ratios = native_grids.at_timesteps(levels, timesteps)
        if chosen:
            low, high = own if multistep else (ratios[-1], ratios[0])
            low, high = ends[0] or low, ends[1] or high
            spaced = karras_sigmas if chosen == ["use_karras_sigmas"] else native_grids.exponential_ratios
            ratios = list(spaced(steps, low, high))
        if ends_at_level and ratios[-1] > own[0] * (1 + 1e-9):
            ratios.append(own[0])
        return native_grids.times_of_ratios(ratios)

    return grid
