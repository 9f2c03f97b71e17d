"""fla's chunked operators by the definition: what their documentation promises, on a CPU and without fla.

With them the calls are tested in milliseconds; the interpreter's tests hold the same calls against fla's own kernels.
"""

import sys
from types import ModuleType

import torch

from megaresid.attention.kernels.routes import KERNELS
from megaresid.attention.recurrence import by_steps


def install(monkeypatch, **replaced) -> None:
    """Let fla's modules be stand-ins, with some of their operators ``replaced``."""
    for kernel in KERNELS:
        module = ModuleType(kernel.module)
        setattr(module, kernel.name, replaced.get(kernel.name, _operator(kernel.name)))
        monkeypatch.setitem(sys.modules, kernel.module, module)


def _operator(name: str):
    gates = [kernel for kernel in KERNELS if kernel.name == name]

    def operator(q, k, v, g=None, g_gamma=None, beta=None, *, scale, initial_state, cu_seqlens=None, **options):
        """[B, T, H, K or V]; with ``cu_seqlens`` B is 1 and there is one state for each of its documents."""
        assert options == {"output_final_state": True, **gates[0].options}
        assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and q.shape[:3] == v.shape[:3]
        assert q.shape[-1] % 2 == 0 and v.shape[-1] % 2 == 0 and min(q.shape[-1], v.shape[-1]) >= 16
        assert beta is None or beta.shape == q.shape[:3]
        shapes = {"none": None, "constant": q.shape[2:3], "head": q.shape[:3], "channel": q.shape}
        given = g_gamma if g is None else g
        assert (None if given is None else given.shape) in [shapes[kernel.decay] for kernel in gates]
        assert all(x is None or x.dtype == torch.float32 for x in (given, beta, initial_state))
        assert not torch.is_autocast_enabled(q.device.type)
        assert g_gamma is None or (g_gamma.dim() == 1 and not g_gamma.requires_grad)
        if cu_seqlens is None:
            return by_steps(q, k, v, given, beta, scale=scale, state=initial_state)
        assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        outputs, states = [], []
        for n, (start, stop) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
            cut = [x if x is None or x.dim() == 1 else x[:, start:stop] for x in (q, k, v, given, beta)]
            first = None if initial_state is None else initial_state[n : n + 1]
            output, state = by_steps(*cut, scale=scale, state=first)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    return operator
