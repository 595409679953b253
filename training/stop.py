"""SIGTERM: a scheduler wants the machine back. The step is finished and saved before the trainer
leaves."""
import multiprocessing
import os
import signal
import threading


class Stop:
    """Whether somebody sent SIGTERM since this was made: `asked`."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_) -> None:
        self.asked = True

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

        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=wait, daemon=True).start()
