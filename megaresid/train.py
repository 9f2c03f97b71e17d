"""Train: ``deepspeed --module megaresid.train --deepspeed_config ds_configs/zero1.json --data DIR …``"""

import os
import sys

from megaresid import exit_codes
from megaresid.accelerator import choose_accelerator
from megaresid.config import parse
from megaresid.errors import exits_with_user_errors
from megaresid.training.compiled_ops import use_environment_folder
from megaresid.training.signals import Wishes
from megaresid.training.supervisor import Report, die_with_launcher, is_supervised


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    die_with_launcher()
    wishes = Wishes()
    with wishes.listening():
        # Only now: the supervisor sends signals to ranks that have reported.
        report = Report()
        with report.of_the_end():
            code = _train(sys.argv[1:] if arguments is None else arguments, wishes, report)
        report.ends(code)
        # What all ranks agreed on the supervisor knows from them; to a launcher, a code would be a failure to tell of.
        if code not in (exit_codes.FINISHED, *(exit_codes.AGREED if is_supervised() else ())):
            sys.exit(code)


def _train(arguments: list[str], wishes: Wishes, report: Report) -> int:
    """The exit code."""
    config = parse(arguments)
    use_environment_folder()
    choose_accelerator()
    # After the options are parsed: --help must not wait for these imports.
    from megaresid.training.estimate import print_estimate
    from megaresid.training.loop import Outcome
    from megaresid.training.prepare import prepare
    from megaresid.training.run import execute

    prepared = prepare(config)
    if not config.run.dry_run:
        codes = {Outcome.FINISHED: exit_codes.FINISHED, Outcome.STOPPED: exit_codes.STOPPED}
        codes |= {Outcome.UNHEALTHY: exit_codes.UNHEALTHY}
        return codes.get(execute(prepared, wishes, report), exit_codes.FAULT)
    if os.environ.get("RANK", "0") == "0":
        print_estimate(prepared.plan, config, prepared.ds_config, prepared.batch, prepared.data.training_tokens)
        for hook in prepared.hooks:
            print(f"evaluate  {hook.name} {hook.when()}")
    return exit_codes.FINISHED


if __name__ == "__main__":
    main()
