"""The output of a soak test: the progress at intervals, and each broken promise."""

import time

violations: list[str] = []
reported_at = time.monotonic()


def violate(text: str) -> None:
    violations.append(text)
    print(f"soak: VIOLATION: {text}", flush=True)


def progress(text: str) -> None:
    global reported_at
    if time.monotonic() - reported_at > 10:
        reported_at = time.monotonic()
        print(f"soak: {text}", flush=True)
