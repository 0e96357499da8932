"""``optimum-cli catquant``: the same verbs as ``catquant``. optimum loads every file of this folder."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CatQuantCommand(BaseOptimumCLICommand):
    """Hands everything behind ``optimum-cli catquant`` to the package's own command line."""

    COMMAND = CommandInfo(name="catquant", help="Binary, ternary and 2-8 bit quantization with an output correction.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all words as they are: importing the verbs here would slow down every other command."""
        parser.add_argument(
            "words", nargs="...", help="demo, quantize, inspect, eval, verify or push; --help behind one"
        )

    def run(self) -> None:
        """Run the verb and leave with its exit status."""
        from hf_catquant.cli import main

        sys.exit(main(self.args.words))


REGISTER_COMMANDS = [CatQuantCommand]
