"""Train: ``deepspeed --module megaresid.train --deepspeed_config ds_configs/zero1.json --data DIR …``"""

import os
import sys

from megaresid.accelerator import choose_accelerator
from megaresid.config import parse
from megaresid.errors import exits_with_user_errors
from megaresid.training.compiled_ops import use_environment_folder


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    use_environment_folder()
    choose_accelerator()
    # After the options are parsed: --help must not wait for these imports.
    from megaresid.training.estimate import print_estimate
    from megaresid.training.prepare import prepare
    from megaresid.training.run import execute

    prepared = prepare(config)
    if not config.run.dry_run:
        execute(prepared)
    elif os.environ.get("RANK", "0") == "0":
        print_estimate(prepared.plan, config, prepared.ds_config, prepared.batch, prepared.data.training_tokens)
        for hook in prepared.hooks:
            print(f"evaluate  {hook.name} {hook.when()}")


if __name__ == "__main__":
    main()
