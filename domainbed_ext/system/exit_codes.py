"""Exit codes of runs and commands."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the exit code of a run means; any other is a crash's."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    TAKEN = 69  # sysexits' EX_UNAVAILABLE: another process works on the run
    INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: it stopped where it can resume, so start it again


STOPPED = 130  # of a command that Ctrl-C ended, as in shells
