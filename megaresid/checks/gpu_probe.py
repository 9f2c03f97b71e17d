"""What torch sees of the GPUs; started by ``megaresid.checks.gpu``, in a process of its own."""

import warnings

from megaresid.checks.child import give


def main() -> None:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        devices.append({"name": name, "architecture": f"sm_{major}{minor}", "free": free, "total": total})
    architectures = torch.cuda.get_arch_list() if count else []
    # Code for sm_80 runs on sm_86 too: what counts is the same major version and no newer minor one.
    known = {_number(architecture) for architecture in architectures if architecture.startswith("sm_")}
    for device in devices:
        own = _number(device["architecture"])
        if any(other // 10 == own // 10 and other <= own for other in known):
            architectures.append(device["architecture"])
    why = " ".join(str(said[-1].message).split()) if said else ""
    answer = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices}
    give(answer | {"architectures": sorted(set(architectures)), "why": why})


def _number(architecture: str) -> int:
    return int("".join(filter(str.isdigit, architecture)))


if __name__ == "__main__":
    main()
