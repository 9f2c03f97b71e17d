"""What may not be imported: heavy libraries before they are needed."""

import subprocess
import sys


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_training_imports_no_kernels_and_no_evaluation_libraries():
    loaded = loaded_after("import megaresid.train, megaresid.training.run")
    assert "deepspeed" in loaded, "the check would pass on anything"
    assert not loaded & {"fla", "triton", "transformers", "lm_eval", "datasets"}


def test_help_and_data_preparation_wait_for_no_torch():
    loaded = loaded_after("import megaresid.train, data_prep.__main__")
    assert not loaded & {"torch", "deepspeed"}
