"""`python -m jaxmoe.supervise -- COMMAND`: runs a command again after faults, as long as it gains.

A fault is any end but those of `jaxmoe.exits` that a restart cannot help (a mistake, an alarm, a
request to end, Ctrl-C). Progress is a step of the run directory that was never logged or saved
before; PATIENCE faults without any, and the supervisor gives up, naming the step.

With several sizes the command has {n} in it: the first is tried after every fault that came behind
progress, the next smaller one after each without. So a run that has lost a machine goes on with the
others, and comes back to the full size when it is started again.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jaxmoe import exits
from jaxmoe.errors import UserError
from jaxmoe.run import record

PATIENCE = 3  # faults in a row without a step forward
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before a restart; doubled after each fault
SIZE = "{n}"
JITTER = 0.25  # of a wait, so that many runs do not come back at once
BY_REQUEST = tuple(128 + one for one in exits.REQUESTS)
FINAL = (exits.DONE, exits.MISTAKE, exits.ALARM, exits.REQUEUE, exits.INTERRUPTED)

EXAMPLES = f"""examples:
  python -m jaxmoe.supervise -- python -m jaxmoe.train --run-dir runs/mine
  python -m jaxmoe.supervise --run-dir runs/two -- launch/local.sh 2 --run-dir runs/two
  python -m jaxmoe.supervise --sizes 4,2,1 -- launch/local.sh {{n}} --run-dir runs/four
                                                 with fewer processes where four cannot go on

exit codes: those of the command (0 done, 2 a mistake, 3 an alarm, 75 asked to end and saved: run
it again, 130 interrupted); 4 after {PATIENCE} faults in a row without a step forward"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        command = args.command[1:] if args.command[:1] == ["--"] else args.command
        if not command:
            raise UserError("say what to run: python -m jaxmoe.supervise -- COMMAND")
        run_dir = args.run_dir or _run_dir(command)
        sizes = _sizes(args.sizes, command, run_dir)
        return supervise(command, run_dir, args.patience, sizes)
    except UserError as error:
        print(f"jaxmoe.supervise: {error}", file=sys.stderr)
        return exits.MISTAKE


def supervise(
    command: Sequence[str], run_dir: Path, patience: int = PATIENCE, sizes: Sequence[int] = ()
) -> int:
    """Runs the command until it ends for good; its last exit code, or NO_PROGRESS.

    Args:
        patience: faults in a row without progress, at the smallest of the sizes.
        sizes: of the job, for {n} in the command, the one that is wanted first.

    Raises:
        UserError: there is no such command.
    """
    child = _Child(command)
    furthest, fruitless, wait = furthest_step(run_dir), 0, FIRST_WAIT
    patience += max(0, len(sizes) - 1)
    while True:
        size = sizes[min(fruitless, len(sizes) - 1)] if sizes else None
        code = child.run(size)
        too_small = code == exits.MISTAKE and bool(sizes) and size != sizes[0]
        if code in FINAL and not too_small:
            return code
        if child.interrupted:
            return exits.INTERRUPTED
        if child.asked:  # a command that had not begun to train ends by the signal itself
            return exits.REQUEUE if code in BY_REQUEST else code
        step = furthest_step(run_dir)
        if step > furthest:
            furthest, fruitless, wait = step, 0, FIRST_WAIT
        else:
            fruitless += 1
        fault = f"{_ended(code)} at step {step}"
        if fruitless >= patience:
            _say(
                f"{fault}: {fruitless} faults in a row with nothing beyond it, giving up; look at"
                f" {run_dir / record.EVENTS}"
            )
            return exits.NO_PROGRESS
        pause = wait * (1 + JITTER * random.random())
        known = f" ({fruitless} of {patience} without a step forward)" if fruitless else ""
        size = f", of size {sizes[min(fruitless, len(sizes) - 1)]}" if sizes else ""
        _say(f"{fault}{known}; again in {pause:.1f} s{size}")
        if not child.pause(pause):
            return exits.INTERRUPTED if child.interrupted else exits.REQUEUE
        wait = min(2 * wait, LONGEST_WAIT)


def furthest_step(run_dir: Path) -> int:
    """The largest step that was logged or saved; 0 where there is none."""
    steps = [0, *record.checkpoint_steps(run_dir)]
    for name in (record.METRICS, record.EVENTS):
        steps += [row["step"] for row in record.read_lines(run_dir / name)[-1:]]
    return max(steps)


class _Child:
    """The command, and requests to end that are passed on to it.

    A terminal's Ctrl-C goes to the command as well, which ends by it: here it is only noted.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self.asked = self.interrupted = False
        for one in exits.REQUESTS:
            signal.signal(one, self._pass_on)
        signal.signal(signal.SIGINT, self._interrupt)

    def run(self, size: int | None = None) -> int:
        """Its exit code; 128 and the signal that ended it, as a shell says it."""
        words = self._command
        if size is not None:
            words = [word.replace(SIZE, str(size)) for word in words]
        try:
            self._process = subprocess.Popen(words)
        except OSError as error:
            raise UserError(f"cannot run {self._command[0]}: {error.strerror}") from error
        if self.asked:  # while it was started
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def pause(self, seconds: float) -> bool:
        """Whether nobody asked to end meanwhile."""
        end = time.monotonic() + seconds
        while not (self.asked or self.interrupted) and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return not (self.asked or self.interrupted)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        if self._process is not None:
            self._process.send_signal(number)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True


def _ended(code: int) -> str:
    known = {128 + one: f"signal {one.name}" for one in signal.Signals}
    return known.get(code, f"exit code {code}")


def _run_dir(command: Sequence[str]) -> Path:
    """What --run-dir of the command says."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--run-dir" and following:
            return Path(following)
        if word.startswith("--run-dir="):
            return Path(word.partition("=")[2])
    raise UserError("the command has no --run-dir; say where its run is: --run-dir DIR")


def _sizes(text: str | None, command: Sequence[str], run_dir: Path) -> list[int]:
    """Raises UserError where there are none to take, or no place for them."""
    if (text is not None) != any(SIZE in word for word in command):
        raise UserError(f"--sizes and {SIZE} in the command belong together")
    if text is None:
        return []
    if SIZE in str(run_dir):
        raise UserError(f"{SIZE} in --run-dir: the run must be the same one at every size")
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--sizes {text}: write them as 4,2,1")
    return [int(word) for word in words]


def _say(text: str) -> None:
    print(f"jaxmoe.supervise: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.supervise",
        description="Runs a command again after faults, as long as each start gets further.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "whose steps are progress (default: --run-dir of the command)"
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help=where)
    faults = f"faults in a row without a step forward before it gives up (default {PATIENCE})"
    parser.add_argument("--patience", type=int, default=PATIENCE, metavar="N", help=faults)
    sizes = "of the job, the one that is wanted first; {n} in the command stands for it"
    parser.add_argument("--sizes", metavar="N,M", help=sizes)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
