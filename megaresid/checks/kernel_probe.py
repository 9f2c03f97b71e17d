"""Every mixer's kernel against the plain form; started by ``megaresid.checks.gpu``, in a process of its own."""

from megaresid.checks.child import give

SHAPE = "gpt2-medium"


def main() -> None:
    import torch

    from megaresid.attention.kernels.self_check import self_check
    from megaresid.attention.mixer import MIXERS
    from megaresid.errors import UserError
    from megaresid.model.plan import ModelPlan
    from megaresid.model.presets import PRESETS

    right, wrong = {}, {}
    for name in MIXERS.classes():
        try:
            kinds = ModelPlan(PRESETS[SHAPE], name).kinds()
        except UserError:  # needs arguments of its own, such as blend
            continue
        if not kinds:
            continue
        try:
            found = self_check(kinds, torch.device("cuda"), torch.bfloat16)["recurrences"]
            right[name] = "; ".join(_words(entry) for entry in found)
        except UserError as error:
            wrong[name] = str(error)
    give({"right": right, "wrong": wrong})


def _words(entry: dict) -> str:
    errors = [f"{entry[key]:.1g}" for key in ("forward_error", "gradient_error") if key in entry]
    return f"{entry['form']}{', off by ' + ' and '.join(errors) if errors else ''}"


if __name__ == "__main__":
    main()
