"""A run records how it ended, and while it runs that it has not."""

import json
from pathlib import Path

from bad_runs import STEPS, carry_out, write_data

from megaresid.training.engine import Engine


class Looking(Engine):
    """Notes what the run says of its end while it trains."""

    run: Path
    found: set[str]

    def train_step(self, *args):
        self.found.add((self.run / "outcome.json").read_text())
        return super().train_step(*args)


def _looking(run: str, data: str, options: dict) -> tuple[str, list[dict]]:
    Looking.run, Looking.found = Path(run), set()
    ended, _ = carry_out(run, data, 0, Looking, **options)
    return ended, [json.loads(text) for text in Looking.found]


def test_the_end_is_recorded_and_forgotten_when_the_run_goes_on(ranks1, tmp_path):
    data, run = write_data(tmp_path / "data", bad={22, 23}), tmp_path / "run"
    ((ended, during),) = ranks1.run(_looking, str(run), str(data), {"max_bad_steps": 2})
    assert ended == "UNHEALTHY" and during == [{"schema": 1, "outcome": None, "step": 0}]
    assert json.loads((run / "outcome.json").read_text()) == {"schema": 1, "outcome": "unhealthy", "step": 24}
    ((ended, during),) = ranks1.run(_looking, str(run), str(data), {"resume": "auto"})
    assert ended == "FINISHED" and during == [{"schema": 1, "outcome": None, "step": 20}]
    assert json.loads((run / "outcome.json").read_text()) == {"schema": 1, "outcome": "finished", "step": STEPS}
