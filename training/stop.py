"""TODO training/stop.py"""
import multiprocessing
import os
import signal
import threading


class Stop:
    """Whether somebody sent SIGTERM (a scheduler that wants the machine back): finish the step, save, leave."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_):
        self.asked = True

    @staticmethod
    def in_reader(*_):
        """For the processes that read pictures: a signal to the whole group reaches them, too, but the trainer's step
        still needs them. So they end at its word alone, where the system tells who sent a signal (Linux)."""
        def wait():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
                pass
            os._exit(0)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=wait, daemon=True).start()
