"""What a soak says: now and then how far it is, and each promise that was not kept."""

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
