"""Exit codes: what a command says as it ends, to a person, a supervisor or a scheduler."""

import signal

__all__ = [
    "ALARM",
    "CORRUPTION",
    "DONE",
    "FAULT",
    "HUNG",
    "INTERRUPTED",
    "MISTAKE",
    "NO_PROGRESS",
    "REQUESTS",
    "REQUEUE",
]

DONE = 0
FAULT = 1  # something broke, with a traceback; the same command may go on from the last checkpoint
MISTAKE = 2  # the user's, in one line; the same command would say it again
ALARM = 3  # an alarm ended the run (forecast.on_alarm=stop); its state is saved
NO_PROGRESS = 4  # the supervisor gave up: faults without a step forward between them
CORRUPTION = 5  # devices held different copies; the newest checkpoint is of before
HUNG = 6  # a deadline passed; where every thread stood is written
REQUEUE = 75  # asked to end (SIGTERM, SIGUSR1), state saved: run it again (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C

REQUESTS = (signal.SIGTERM, signal.SIGUSR1)  # signals that ask a run to end, and are answered 75
