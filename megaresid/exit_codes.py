"""How a training ends, as its exit code says it; ``launch/train.sh`` returns the one that the ranks agreed on."""

FINISHED = 0
FAULT = 1
"""A fault in the middle: a rank that died or hung, a full disk at the end, an error of the program."""
USERS_MISTAKE = 2
STOPPED = 75
"""Stopped by a signal after saving (EX_TEMPFAIL): start it again with --resume auto."""
UNHEALTHY = 76
"""Stopped by the health guard: too many bad steps in a row."""

AGREED = frozenset({STOPPED, UNHEALTHY})
"""What all ranks decide together."""
NOT_MENDED_BY_A_RESTART = frozenset({FINISHED, USERS_MISTAKE, STOPPED, UNHEALTHY})
