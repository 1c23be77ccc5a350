"""What happens in a round. The seed determines all of it."""

import random

from faults import FAULTS

# In most rounds, the faults of the broker are among the others.
SCENARIOS = ("tools", "broker", "broker", "disk", "clock", "cluster")
RECEIVERS = ("exclusive", "exclusive", "queue", "shared", "stream", "copy", "copy")
EMITTERS = ("words", "lines", "lines", "lines", "spool", "spool", "follow", "follow")
RATES = (1, 100, 1_000, 2_000, 5_000, 100_000)


class Plan:
    def __init__(self, seed: int, scenarios: list[str]) -> None:
        self.seed, rng = seed, random.Random(seed)
        self.scenario = rng.choice(scenarios)
        self.nodes = 3 if self.scenario == "cluster" else 1
        self.seconds = rng.uniform(15, 30)
        self.type = rng.choice(["fanout", "fanout", "fanout", "topic"])
        self.emitters = [self.emitter(kind, number, rng) for number, kind in enumerate(rng.sample(EMITTERS, 4))]
        kinds = rng.sample(RECEIVERS, 4)
        self.receivers = [spec for number, kind in enumerate(kinds) for spec in self.receiver(kind, number, rng)]
        self.tracks = [self.track(rng) for _ in range(rng.choice([2, 2, 3]))]
        self.seed_of_timing = rng.random()

    def emitter(self, kind: str, number: int, rng: random.Random) -> dict:
        rate, size = rng.choice(RATES), rng.choice(["short", "mixed", "large"])
        if self.scenario == "disk":
            size = "short"
        options = ["--exchange-type", self.type, "--tag", f"e{number}", "--retry", rng.choice(["3s", "60s", "forever"])]
        batches = False
        if kind == "follow":
            options[-1] = "forever"
        if kind != "words":
            options += ["--lines"] if kind != "follow" else []
            batches = rng.random() < 0.5
            options += ["--batch"] if batches else []
            if batches and rng.random() < 0.5:
                options += ["--linger", rng.choice(["0s", "5ms", "300ms"])]
            options += ["--null"] if kind != "follow" and rng.random() < 0.2 else []
        if rng.random() < 0.3 and kind != "spool":
            options.append("--mandatory")
        if self.type == "topic":
            options += ["--routing-key", "{tag}.{severity}"]
        records = {"short": 20_000, "mixed": 10_000, "large": 400}[size]
        if kind == "words":
            rate, records = min(rate, 30), 300
        elif batches and size == "short" and self.scenario != "disk":
            records *= 5
        return {"kind": kind, "options": options, "rate": rate, "size": size, "records": records,
                "with_empty": rng.random() < 0.3, "copytruncate": rng.random() < 0.3,
                "clock": self.scenario == "clock" and rng.random() < 0.6}

    def receiver(self, kind: str, number: int, rng: random.Random) -> list[dict]:
        options = ["--exchange-type", self.type, "--retry", "forever"]
        if self.type == "topic":
            options += ["--bind", rng.choice(["#", "#", "*.error"]) if kind != "shared" else "#"]
        queue = None
        if kind in ("queue", "shared"):
            queue_type = rng.choice(["quorum", "classic"])
            queue = f"{queue_type}-{kind}"
            options += ["--queue", queue, "--queue-type", queue_type]
        if kind in ("stream", "copy"):
            queue = f"stream-{number}"
            options += ["--stream", queue] + (["--from-start"] if kind == "copy" else [])
        spec = {"kind": kind, "options": options, "queue": queue, "format": rng.choice(["json", "raw"]),
                "pace": rng.choice([0, 0, 0.005, 0.1]) if kind != "copy" else 0,
                "clock": self.scenario == "clock" and rng.random() < 0.6}
        return [spec] * (2 if kind == "shared" else 1)

    def track(self, rng: random.Random) -> list[tuple[float, str, float, float]]:
        """Faults, one after another: the pause before it, its name, the seed of its choices, and its duration."""
        faults = [name for name, fault in FAULTS.items() if self.scenario in fault.scenarios]
        weights = [FAULTS[name].weight for name in faults]
        track, time = [], 0.0
        while time < self.seconds:
            name = rng.choices(faults, weights)[0]
            pause, duration = rng.choice([0.05, 0.3, 1, 3]) * rng.random(), rng.choice([0.1, 1, 4, 9]) * rng.random()
            track.append((pause, name, rng.random(), duration if FAULTS[name].lasts else 0))
            time += pause + track[-1][3] + 0.5
        return track

    def describe(self) -> list[str]:
        text = [f"seed {self.seed}: scenario {self.scenario}, {self.type}, {self.seconds:.0f} s"]
        for what, specs in (("e", self.emitters), ("r", self.receivers)):
            text += [f"{what}{number}: {spec}" for number, spec in enumerate(specs)]
        for number, track in enumerate(self.tracks):
            text.append(f"faults {number}: " + ", ".join(f"{pause:.2f}+{name}({lasts:.1f})"
                                                         for pause, name, _, lasts in track))
        return text
