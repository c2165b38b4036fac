"""What the tests of launchers share: commands, launches, and waiting for what processes do."""

import os
import threading
import time

from domainbed_ext.launchers import get_launcher
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch

FAST = (
    "--algorithm LP --steps 2 --checkpoint_freq 0 --train_eval_share 0.1 --weights none --skip_model_save "
    "--save_steps 5"
)
ENDLESS = ("--steps", "1000000")


def train_command(folder, *words, **facts):
    """A short run, `words` overriding; `facts` are what the command says of itself."""
    return Command.for_run([*FAST.split(), "--output_dir", str(folder), *words], folder, **facts)


def as_commands(commands):
    """Commands, of which some may be the text of a shell command."""
    return [command if isinstance(command, Command) else Command(command) for command in commands]


def execute(name, commands, launch):
    """Runs commands by the launcher of a name."""
    return get_launcher(name).run(as_commands(commands), launch)


def launch(tmp_path, parallel=1, progress=lambda index, share: None, **options):
    path = tmp_path / "launches" / "one"
    path.mkdir(parents=True, exist_ok=True)
    return Launch(path, (), parallel, options, progress)


def wait_for(condition, seconds=300):
    """Until it holds; a test that waits for longer has failed."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.02)


def when(condition, act):
    """Acts, in a thread, as soon as the condition holds."""

    def wait():
        wait_for(condition)
        act()

    threading.Thread(target=wait, daemon=True).start()


def stop(one, how):
    """Asks a launch of this process to stop: by a signal, or by cancelling it."""
    if how == "cancel":
        (one.path / "cancel").touch()
    else:
        os.kill(os.getpid(), how)
