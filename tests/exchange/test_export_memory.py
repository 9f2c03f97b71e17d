"""Exports hold one model, or one file of weights, never the checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import configuration, made_run

MIB = 2**20
EXPORT = """
import re, sys
from pathlib import Path
import transformers
from transformers import GPT2LMHeadModel
from megaresid.export import export
from megaresid.exchange import weights, write

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

weights.write_weights.__defaults__ = (16 * 2**20,)
start = peak()
whole = write.logits_of
write.logits_of = lambda saved: [each[:, :1] for each in whole(saved)]
at_files = []
for name in ("write_folder", "write_gpt2"):
    def measured(*given, original=getattr(write, name), **named):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        original(*given, **named)
        at_files.append(peak() - before)
    setattr(write, name, measured)
_, run, format, out = sys.argv
if format == "hf":
    logits_on = write.logits_on
    write.logits_on = lambda model, shape: [each[:, :1] for each in logits_on(model, shape)]
export(Path(run), format, Path(out))
print(start, *at_files, peak())
"""


@pytest.mark.full
@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_memory_is_bounded(tmp_path, format):
    model = made_run(tmp_path / "run", configuration(layers=48, width=256, heads=4), ranks=3)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert size > 190 * MIB
    line = [sys.executable, "-W", "ignore", "-c", EXPORT, str(tmp_path / "run"), format, str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, at_files, end = map(int, done.stdout.split()[-3:])
    assert len(list(Path(tmp_path / "out").glob("model-*.safetensors"))) > 8
    # The embedding is a file of its own, 49 MiB. Pages of the checkpoint that were read stay in memory for as long as
    # nobody else wants it, and count.
    assert at_files < size + 3 * 50 * MIB, f"{at_files / MIB:.0f} MiB while writing"
    assert end - start < 2 * size + 150 * MIB, f"{(end - start) / MIB:.0f} MiB in all"
