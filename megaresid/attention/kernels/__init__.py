"""flash-linear-attention's kernels behind ``recurrence`` on a GPU; the chunked plain form is their reference.

``routes`` decides from facts, ``calls`` calls, ``self_check`` holds a machine's kernels against the reference. Nothing
here imports fla or Triton before a kernel is called.
"""
