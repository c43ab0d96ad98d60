"""A run of Weights & Biases (wandb), in a local folder or on its server.

The key of the server comes only from wandb's own sources: `wandb login`, or WANDB_API_KEY in the environment.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config, config_values
from dsno_cluster.errors import UserError, WorkError, said_by, without_passwords
from dsno_cluster.files import replace_file, shown_path
from dsno_cluster.images import to_uint8

FINISH_SECONDS = 30.0  # for the last uploads; a job that must leave its node has two minutes for everything


class WeightsAndBiases:
    """A tracker that continues the same wandb run, by its id, in every resumption.

    Offline files are in `<folder>/wandb/offline-run-...`, one folder for each start of the training; the id is
    in `<folder>/wandb/id`. Raises UserError if the package is not installed or there is no key for the mode
    online, WorkError if the server cannot be reached.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        settings = config.training.wandb
        assert settings is not None
        try:
            import wandb
        except ImportError:
            raise UserError(
                "training.wandb: the package wandb is not installed; pip install wandb, or set it to null"
            ) from None
        self.wandb = wandb
        # without what wandb would add from this machine: console output, code, the state of a checkout
        quiet = wandb.Settings(
            console="off", save_code=False, disable_git=True, silent=True, finish_timeout=FINISH_SECONDS
        )
        try:
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                name=config.name,
                id=_run_id(folder / "wandb"),
                resume="allow",
                dir=str(folder),
                config=json.loads(without_passwords(json.dumps(config_values(config)))),
                settings=quiet,
            )
        except wandb.errors.UsageError as error:
            raise UserError(
                f"training.wandb: {said_by('wandb', error)}; give it the key by `wandb login` or by WANDB_API_KEY in the "
                "environment, or take mode: offline"
            ) from None
        except (wandb.Error, OSError) as error:
            raise WorkError(
                f"training.wandb: {said_by('wandb', error)}; take mode: offline, and upload later with `wandb sync`"
            ) from None
        self.ended = False
        where = shown_path(str(Path(self.run.dir).parent)) if settings.mode == "offline" else self.run.url
        upload = "; `wandb sync` with that folder uploads it" if settings.mode == "offline" else ""
        console.say(f"wandb run {self.run.id}, {settings.mode}: {where}{upload}")

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        self._unless_ended(lambda: self.run.log(dict(numbers), step=step))

    def images(self, step: int, images_NCHW: Tensor) -> None:
        pixels_NHWC = to_uint8(images_NCHW).permute(0, 2, 3, 1).cpu().numpy()
        shown = [self.wandb.Image(image if image.shape[-1] > 1 else image[..., 0]) for image in pixels_NHWC]
        self._unless_ended(lambda: self.run.log({"samples": shown}, step=step))

    def close(self, *, failed: bool) -> None:
        self._unless_ended(lambda: self.run.finish(exit_code=int(failed)))
        with contextlib.suppress(Exception):  # as in `_unless_ended`
            self.wandb.teardown()  # its process, and what would complain about the end of that when Python exits

    def _unless_ended(self, work: Callable[[], object]) -> None:
        """Do it unless wandb's process has ended, which a signal to all processes of a job may do: training continues."""
        if self.ended:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 (wandb's errors have no common class, and none may end a training)
            self.ended = True
            console.say(
                f"training.wandb: gets no more figures ({said_by('wandb', error)}); metrics.jsonl has them all"
            )


def _run_id(folder: Path) -> str:
    """The id of the training's run, drawn at its first start."""
    file = folder / "id"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, secrets.token_hex(4).encode())
    return file.read_text()
