"""Values of a thread's own."""

import threading
from typing import Any


class PerThread(threading.local):
    """A value for each thread, None until it is set.

    torch.compile traces `threading.local` (but not a `ContextVar`), and compiles anew where an attribute that it has
    found missing is there: so it always is.
    """

    def __init__(self) -> None:
        self.value: Any = None


class ModelToken:
    """Stands for the modules that are one model: an object of its own in every copy of the model."""
