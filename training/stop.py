"""Somebody wants a training to end: a scheduler that wants the machine back (SIGTERM), a user
(Ctrl-C), a terminal that is closed (SIGHUP). The step is finished and saved before the trainer
leaves."""
import multiprocessing
import os
import signal
import threading

from core.common import rank

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
           if hasattr(signal, name)]                 # Windows has no SIGHUP
SAID = (b"\nCtrl-C: this step is finished and saved first; again, and all ends at once, without "
        b"what was done since the last checkpoint\n")


class Stop:
    """Whether somebody asked for the end since this was made: `asked`. Ctrl-C a second time is no
    longer caught. As a context manager it leaves signals as they were.

    by_key: whether Ctrl-C ended the last training of this process.
    """
    by_key = False

    def __init__(self):
        self.asked, Stop.by_key = False, False
        self.process = os.getpid()
        self.before = {}
        if threading.current_thread() is threading.main_thread():    # others can't catch any
            self.before = {number: signal.signal(number, self.ask) for number in SIGNALS
                           if signal.getsignal(number) != signal.SIG_IGN}        # nohup's, say

    def ask(self, number: int | None = None, *_) -> None:
        self.asked = True
        if number == signal.SIGINT and os.getpid() == self.process:    # not a reader, just forked
            Stop.by_key = True
            signal.signal(number, signal.SIG_DFL)
            if rank() == 0:
                try:
                    os.write(2, SAID)                # print can't be called again within a print
                except OSError:
                    pass

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @staticmethod
    def in_reader(*_) -> None:
        """For the processes that read pictures: a signal to the whole group reaches them, too, but
        the trainer's step still needs them. So they end at its word alone, where the system tells
        who sent a signal (Linux)."""
        def wait():
            trainer = multiprocessing.parent_process().pid
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
                pass
            os._exit(0)

        for number in set(SIGNALS) - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=wait, daemon=True).start()
