"""Reading of experiments and profiles from YAML files and overrides, and writing them as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dsno_cluster import console
from dsno_cluster.config.experiment import Config
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.config.places import RunConfig
from dsno_cluster.config.profile import Profile
from dsno_cluster.config.protocols import with_keys_of_protocol
from dsno_cluster.config.renamed import RenamedKey, by_older_name, warning, with_current_names
from dsno_cluster.config.validation import validate
from dsno_cluster.errors import UserError, closest
from dsno_cluster.files import shown_path, too_long
from dsno_cluster.yaml_text import dump_yaml, parse_written

EVALUATION_FILES = ("weights_path", "precision_recall_weights_path", "reference")


def load_config(path: str, overrides: Sequence[str] = (), folder: Path = Path()) -> Config:
    """Read an experiment that a person wrote. `overrides` are `dotted.key=value`, the value read as YAML.

    Its paths become absolute (`config.paths`); relative ones are relative to `folder`, by default the working
    directory. Says in a line which keys have been renamed. Raises UserError, in one line, if the file is missing
    or not YAML, and for keys that are unknown, of the wrong type or inconsistent with each other.
    """
    values, renamed, replaced = _read_config(path, overrides)
    for key in renamed:
        try:
            console.say(f"{path}: {warning(key)}")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    config = _checked(values, path, folder)
    if replaced:
        console.say(
            f"evaluation.protocol={config.evaluation.protocol} takes the place of what {path} says of {', '.join(replaced)}"
        )
    return config


def load_dumped_config(file: Path, overrides: Sequence[str] = (), folder: Path = Path()) -> Config:
    """Read an experiment that `dump_config` of this version or an earlier one wrote. Otherwise as `load_config`."""
    values, *_ = _read_config(str(file), overrides)
    return _checked(values, str(file), folder)


def _read_config(path: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[RenamedKey], list[str]]:
    """The values of a config by the current names of their keys, those keys that had an older one, and the keys of
    `evaluation` that gave way to a protocol.
    """
    values, renamed = with_current_names(_read_yaml(find_file(path, "configs")))
    asked: set[str] = set()  # keys of `evaluation`
    for override in overrides:
        key, _, text = override.partition("=")
        if (older := by_older_name(key)) is not None:
            renamed.append(older)
            key = older.newer
        value = parse_written(text, override)
        _set(values, key, value, override)
        section, _, rest = key.partition(".")
        if section == "evaluation":
            asked |= {rest} if rest else {*value} if isinstance(value, dict) else set()
    values, of_sections = with_current_names(values)  # which an override may have set as a whole
    replaced: list[str] = []
    if isinstance(evaluation := values.get("evaluation"), dict):
        values["evaluation"], replaced = with_keys_of_protocol(evaluation, asked)
    return values, list(dict.fromkeys([*renamed, *of_sections])), replaced


def _checked(values: dict[str, object], path: str, folder: Path) -> Config:
    values.setdefault("name", "-".join(Path(path).stem.split()))
    config = _with_further_metrics(validate(Config, values, path, folder), path)
    # the default is relative to the working directory
    if config.run.dir is None and "://" in config.storage.root:
        run = RunConfig(dir=str((folder / config.run_dir).absolute()))
        config = config.model_copy(update={"run": run})
    return config


def _with_further_metrics(config: Config, path: str) -> Config:
    """The config, with those of `finish.further_metrics` among its metrics if it finishes the student."""
    if config.finish is None or not config.finish.enabled:
        return config
    metrics = list(dict.fromkeys([*config.evaluation.metrics, *config.finish.further_metrics]))
    if len(metrics) == len(config.evaluation.metrics):
        return config
    values = config_values(config)
    values["evaluation"]["metrics"] = metrics
    return validate(Config, values, path)


def load_profile(stage: str, changes: Mapping[str, int | None]) -> Profile:
    """The profile `jobs/<stage>.yaml`, overridden by the values of `changes` that are not None.

    Raises UserError, in one line, as `load_config` does.
    """
    path = f"jobs/{stage}.yaml"
    data = _read_yaml(find_file(path, "jobs"))
    return validate(Profile, {**data, **{k: v for k, v in changes.items() if v is not None}}, path)


def load_resolved_profile(file: Path) -> Profile:
    """A profile that `dump_profile` wrote."""
    return validate(Profile, _read_yaml(file), str(file))


def dump_profile(profile: Profile) -> str:
    """The profile as YAML that `load_resolved_profile` reads back to an equal object."""
    return dump_yaml(profile.model_dump(mode="json"))


def config_values(config: Config) -> dict[str, Any]:
    """The config as plain values, by the current names of its keys."""
    return with_current_names(config.model_dump(mode="json"))[0]


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal object."""
    return dump_yaml(config_values(config))


def is_config_file(word: str) -> bool:
    """Whether a command-line word is the path of a config, not a run or an address."""
    return word.endswith((".yaml", ".yml"))


def files_not_there(config: Config) -> dict[str, str]:
    """The files and folders, by key, that training and evaluation need and that are not on this machine."""
    evaluation = {key: getattr(config.evaluation, key) for key in EVALUATION_FILES}
    if set(config.evaluation.metrics) == {"trajectory_error"}:  # it compares only with the teacher
        evaluation = {}
    named = {f"evaluation.{key}": path for key, path in evaluation.items() if path not in NAMED_IMAGES}
    if config.training.reads_trajectories:
        named["training.lpips_weights"] = config.training.lpips_weights
    return {
        key: shown_path(path)
        for key, path in named.items()
        if path is not None and not path.startswith(("package:", "s3://")) and not Path(path).exists()
    }


def find_file(path: str, folder: str) -> Path:
    """`path` in the working directory, or the copy of it in the package.

    Raises UserError if neither exists.
    """
    here = Path(path)
    if problem := too_long(path):
        raise UserError(problem)
    if here.is_file():
        return here
    if here.is_dir():
        raise UserError(f"{path} is a folder; name a YAML file")
    package = Path(str(resources.files("dsno_cluster")))
    # an installed wheel, or a checkout
    roots = [package, package.parent] if here.parts[:1] == (folder,) else []
    for root in roots:
        if (root / path).is_file():
            return root / path
    if len(here.parts) == 1 and (Path(folder) / here).is_file():
        raise UserError(f"{path}: no such file; did you mean {Path(folder) / here}?")
    beside = {p.name for root in [Path(), *roots] for p in (root / here.parent).glob("*.yaml")}
    near = closest(path, [str(here.parent / name) for name in sorted(beside)])
    raise UserError(f"{path}: no such file" + (f"; did you mean {near}?" if near else ""))


def _read_yaml(path: Path) -> dict[str, object]:
    """The keys of a YAML file, without those that only hold what `<<` and `*` use: `x-...`."""
    try:
        data = parse_written(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: is not a mapping of keys to values, as in `seed: 0`")
    return {key: value for key, value in data.items() if not key.startswith("x-")}


def _set(data: dict[str, object], key: str, value: object, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{override}: {parent} is a value, not a group of keys")
        data = child
    data[last] = value
