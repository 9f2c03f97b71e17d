"""Stands for the supervisor with a run below it: reads the configuration, writes what a run writes, and ends as it is
told by the environment: STUB is JSON of {run: {"code", "hold", "metrics", "values"}}.

``hold`` is the step at which it waits for SIGTERM, once it has said its name to the pipe STUB_PIPE; then it saves, and
leaves with 75. The next start goes on from there, and holds no more.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

SHARED, OWN = "embed.tokens.weight", "own.weight"


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    config = json.loads(Path(sys.argv[-1]).read_bytes())
    run = Path(config["run_dir"])
    wanted = json.loads(os.environ.get("STUB", "{}")).get(run.name, {})
    run.mkdir(parents=True, exist_ok=True)
    saved = run / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    note = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with open(run / "starts.jsonl", "a") as starts:
        starts.write(json.dumps({"first": first, "resume": config["resume"], "command": sys.argv[1:], **note}) + "\n")
    if first == 0:
        (run / "initial.json").write_text(json.dumps(initial(config, wanted.get("values", "the same"))))
        (run / "metrics.jsonl").write_text("")
    for step in range(first + 1, config["steps"] + 1):
        if wanted.get("metrics", True):
            row = {"step": step, "train_loss": 5.0, "training_seconds": wanted.get("pace", 0.5) * step}
            with open(run / "metrics.jsonl", "a") as metrics:
                metrics.write(json.dumps(row) + "\n")
        if first == 0 and step == wanted.get("hold"):
            with open(os.environ["STUB_PIPE"], "w") as pipe:
                pipe.write(f"{run.name}\n")
            signal.sigwait({signal.SIGTERM})
            saved.write_text(str(step))
            return 75
    if code := wanted.get("code", 0):
        print("error: it is told to fail", flush=True)
    return code


def initial(config: dict, values: str) -> dict:
    """As ``initial.json``: each parameter's digest follows from the seed, the name and ``values``."""
    order = {"seed": config["seed"], "sha256": hashlib.sha256(str(config["seed"]).encode()).hexdigest()}
    parameters = {
        name: {
            "shape": [3, 2],
            "rule": "Normal(std=0.02)" if name == SHARED else config["residual"],
            "sha256": hashlib.sha256(f"{config['seed']}/{name}/{values}".encode()).hexdigest(),
        }
        for name in (SHARED, OWN)
    }
    return {"schema": 1, "order": order, "parameters": parameters}


if __name__ == "__main__":
    sys.exit(main())
