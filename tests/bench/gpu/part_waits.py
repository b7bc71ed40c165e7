"""How much of a training step the GPU is idle, and the kernels that take the most time."""

from __future__ import annotations

from bases import config_of, pictures, random_base, sd15_of, side_of
from measure import Bench, busy_share
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import Training

BATCH, STEPS, KERNELS = 16, 3, 10


def run(bench: Bench) -> None:
    """Profile some steps of SD1.5."""
    with bench.case("sd15") as has_time:
        if not has_time:
            return
        side, batch = side_of(bench, 512), 2 if bench.dry else BATCH
        config, checkpoint = (
            config_of(side, batch, device=str(bench.device)),
            random_base(sd15_of(bench), bench.device),
        )
        student = load_student(config, checkpoint, bench.device, bench.dtype)
        training = Training(student, pictures(checkpoint, side, batch), config)  # type: ignore[arg-type]
        for _ in range(1 if bench.dry else 3):
            training.train_step()
        bench.wait()
        kind = DeviceType.CPU if bench.dry else DeviceType.CUDA
        activities = [ProfilerActivity.CPU] if bench.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as profiler:
            for _ in range(1 if bench.dry else STEPS):
                training.train_step()
            bench.wait()
        events = [event for event in profiler.events() if event.device_type == kind]
        busy = busy_share([(event.time_range.start, event.time_range.end) for event in events])
        bench.keep(
            f"{sd15_of(bench)} {side} px batch {batch}, share of the time without work for the device",
            round(1 - busy, 4),
        )
        totals: dict[str, float] = {}
        for event in events:
            totals[event.name] = totals.get(event.name, 0.0) + (
                event.self_cpu_time_total if bench.dry else event.time_range.elapsed_us()
            )
        whole = sum(totals.values())
        longest = sorted(totals, key=lambda name: -totals[name])[:KERNELS]
        bench.keep(
            "the longest kernels, share of the time",
            {name[:100]: round(totals[name] / whole, 4) for name in longest},
        )
