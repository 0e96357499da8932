"""The build step that puts ``hf_catquant_autoload.pth`` where Python looks for such files: beside the installed package.

A part of setuptools' ``build``, so that it is the same for wheels and for editable installations.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Command
from setuptools.command.build import build

FILE = "hf_catquant_autoload.pth"


class BuildAutoload(Command):
    """Copies the .pth file to the top of what will be installed."""

    description = "copy the file that makes Python run hf_catquant_autoload"
    user_options: list[tuple[str, str, str]] = []  # noqa: RUF012  as setuptools declares it
    build_lib: str
    editable_mode = False

    def initialize_options(self) -> None:
        """Nothing is asked."""

    def finalize_options(self) -> None:
        """An editable installation is not made from the build folder: there the file goes straight into the wheel."""
        source, name = ("install", "install_lib") if self.editable_mode else ("build", "build_lib")
        self.build_lib = getattr(self.get_finalized_command(source), name)

    def run(self) -> None:
        """Copy."""
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        self.copy_file(FILE, str(Path(self.build_lib) / FILE))

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        return [FILE]

    def get_outputs(self) -> list[str]:
        """What is in the build folder afterwards."""
        return [] if self.editable_mode else [str(Path(self.build_lib) / FILE)]

    def get_output_mapping(self) -> dict[str, str]:
        """Where it comes from."""
        return dict.fromkeys(self.get_outputs(), FILE)


build.sub_commands = [*build.sub_commands, ("build_autoload", None)]
