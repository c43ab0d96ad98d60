"""The parsed command line that a command receives."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from dsno_cluster.config import Config

DEFAULT_CONFIG = "configs/digits.yaml"


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: its options, its positional words and its key=value overrides."""

    options: argparse.Namespace
    words: list[str]
    overrides: list[str]
    command_line: str

    def config(self) -> Config:
        """The named experiment, or the default one. Raises UserError for more than one."""
        from dsno_cluster.config import load_config

        torn = next((word for word in self.words if word.endswith(("]", "}"))), None)
        if torn is not None:
            raise UserError(
                f"{torn}: not a config; put an override that contains spaces within quotes: 'a.b=[1, 2]'"
            )
        if len(self.words) > 1:
            raise UserError(
                f"one config at a time, found {' '.join(self.words)}; an override is written key=value"
            )
        return load_config(self.words[0] if self.words else DEFAULT_CONFIG, self.overrides)

    def address(self, what: str, of_config: Callable[[Config], str]) -> tuple[str, str | None]:
        """Address and S3 endpoint of what is named, directly or by a config.

        `of_config` gives the address for a config. Raises UserError that asks for `what`, and as `of_config`
        does.
        """
        from dsno_cluster.config import is_config_file

        endpoint_url = self.options.endpoint_url
        if not (self.words and is_config_file(self.words[0])):
            return self.only_word(what), endpoint_url
        config = self.config()
        return of_config(config), endpoint_url or config.storage.endpoint_url

    def run_word(self) -> str:
        """The named config or submitted run, or the default config. Raises UserError for more than one."""
        if len(self.words) > 1:
            raise UserError(
                f"one RUN at a time, found {' '.join(self.words)}; an override is written key=value"
            )
        return self.words[0] if self.words else DEFAULT_CONFIG

    def only_word(self, what: str) -> str:
        """The only positional word of a command that takes no config.

        Raises UserError that asks for `what`.
        """
        if len(self.words) != 1 or self.overrides:
            raise UserError(f"name one {what}")
        return self.words[0]


class Unwatched(KeyboardInterrupt):
    """Ctrl-C while a Slurm job was followed: the job continues."""
