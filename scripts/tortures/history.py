"""What happened in a round, with times."""

import threading
import time
from pathlib import Path


class History:
    def __init__(self, path: Path, is_shown: bool) -> None:
        self.file, self.is_shown, self.begun = open(path, "w", buffering=1), is_shown, time.monotonic()
        self.lock = threading.Lock()

    def add(self, what: str) -> None:
        with self.lock:
            line = f"{time.monotonic() - self.begun:8.3f} {what[:2000]}"
            print(line, file=self.file)
            if self.is_shown:
                print(line, flush=True)
