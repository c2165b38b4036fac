"""Commands that are forked from the server, whatever the process that started it was doing."""

import os
import signal

from tests import forked


def test_a_command_blocks_no_signal_though_its_server_does():
    process = forked.CONTEXT.Process(target=_interrupt_itself)
    process.start()
    process.join(60)
    assert process.exitcode == 7


def _interrupt_itself():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    code = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: os._exit(7)"
    forked.become(["-c", code], dict(os.environ))
