"""Repeat a bad step that a run has kept: ``python -m megaresid.replay --run RUN [--step N]``"""

import argparse
import os
import sys
from pathlib import Path

from megaresid.errors import UserError, exits_with_user_errors


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megaresid.replay",
        description="Repeat a bad step of a run on one process: from the newest checkpoint before it, with the same "
        "samples. Prints the loss, the norms of each layer, the first tensor that is not finite and the sequences with "
        "the highest loss. Exit code 0 where the losses are those that the run had, else 1. The run stays as it is.",
    )
    parser.add_argument("--run", type=Path, required=True, help="the run directory")
    parser.add_argument("--step", type=int, help="one of RUN/forensics/step_*.json; by default the first")
    parser.add_argument("--data", type=Path, nargs="+", help="where the run's data is now; by default where it was")
    chosen = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("replay is one process: start it with python, not with a launcher")
    # After the options are parsed: --help must not wait for these imports.
    from megaresid.accelerator import choose_accelerator
    from megaresid.training.compiled_ops import use_environment_folder

    use_environment_folder()
    choose_accelerator()
    from megaresid.training.engine import start_process_group
    from megaresid.training.repeat import open_step, repeat

    bad = open_step(chosen.run, chosen.step, tuple(chosen.data or ()))
    start_process_group()
    repeated = repeat(bad)
    print("\n".join(repeated.lines()))
    sys.exit(0 if repeated.reproduced else 1)


if __name__ == "__main__":
    main()
