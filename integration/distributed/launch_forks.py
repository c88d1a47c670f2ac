"""`accelerate launch`, but that it forks the processes which it starts: so they have imported what it has."""

import forks
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


def fork(handler: SubprocessHandler, command: tuple[str, ...], env: dict[str, str]) -> forks.Fork:
    _, unbuffered, *command = command
    assert unbuffered == "-u"
    return forks.Fork(command, env)


if __name__ == "__main__":
    SubprocessHandler._popen = fork
    main()
