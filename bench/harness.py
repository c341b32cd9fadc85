"""Workloads, contenders, and the interleaved runner.

A workload is one operator on one kind of input; its contenders do the same work in different ways, and its floor is one
of them. Contenders take turns in an order shuffled anew in every round, so that whatever else the machine does meets
all of them, and each reports the median, the 20th and the 80th percentile of its samples. Inputs are rotated through
more memory than the last cache holds, unless the real use finds them in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import floor
from .budget import fill
from .machine import cache_bytes, core_count
from .memory import RESIDENT_BYTES, launch_count, peak_extra_bytes

OURS = "ours"
FLOOR = "floor"

SAMPLE_SECONDS = 2e-3  # a sample is as many calls as fill this: the clock and the loop are then below 0.1 %
LONG_CALL_SECONDS = 0.5  # a first call of this length gains nothing from a warm-up: it counts as a sample
MIN_SAMPLES = 3
MAX_SAMPLES = 60
# After a parallel loop of torch its worker threads spin for some milliseconds, ready for the next one. They would hold
# the core that a thread of the floor needs.
SPIN_SECONDS = 0.02
# Memory of this size goes back to the system after every call. What another contender has just given back may cost ten
# times as much to touch, of a virtual machine whose host takes free pages away: calls that are not timed go before a
# sample, as steps of training do before the next.
RETURNED_BYTES = 32 << 20
ROTATED_BYTES = 1280 << 20  # at most this much memory for the input sets of one workload

# In the sharing of a run's time a slow contender, in seconds a call or to compile, counts as so many others.
SLOW_WEIGHT = 4
# It is not begun where its workload has already taken so many times its share, or where the fast contenders to come
# would have less than so many seconds each.
PATIENCE = 3
RESERVED_SECONDS = 1.5
LEFT_OUT = "left out"  # how the reason begins for which a contender was not measured

Call = Callable[[], object]
Inputs = tuple[torch.Tensor, ...]  # of a loss


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `prepare` takes one set of inputs and returns the call to be timed, compiled where it
    compiles. With `consumes_inputs` the call is prepared anew, untimed, before every sample. Slow contenders, in
    seconds a call or to compile, are left out of quick runs. `elsewhere`: in another process, whose memory is not
    measured. `imports`: a module that is imported before the first call, which may be the only one."""

    name: str
    prepare: Callable[[Any], Call]
    slow: bool = False
    consumes_inputs: bool = False
    elsewhere: bool = False
    imports: str = ""

    @property
    def weight(self) -> int:
        """Of its time in a run."""
        return SLOW_WEIGHT if self.slow else 1


@dataclass(frozen=True)
class Workload:
    """`make_inputs` returns tensors, nested in tuples and lists as the contenders like them. `cached`: in real use the
    inputs have just been computed and are small, so one set is used over and over. `resident`: what a call needs beside
    its small inputs is large, and no tensor owns all of it."""

    operator: str
    name: str
    dtype: str
    device: str
    make_inputs: Callable[[torch.Generator], Any]
    contenders: list[Contender]
    cached: bool = False
    resident: bool = False

    def __str__(self) -> str:
        return f"{self.operator} {self.name} {self.dtype}"

    def picked(self, settings: Settings) -> list[Contender]:
        """The contenders that a run with these settings measures."""
        return [one for one in self.contenders if not (settings.skip_slow and one.slow)]


@dataclass
class Measurement:
    """What one contender did on one workload: seconds a call, or the error that stopped it. `sweep` names what grows
    with `size`, where the workload is a point of a sweep. `work` is what a floor does: bytes, flops, exponentials."""

    operator: str
    workload: str
    dtype: str
    device: str
    contender: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    error: str | None = None
    sweep: str = ""
    size: int | None = None
    work: floor.Work | None = None

    def percentile(self, percent: float) -> float:
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(percent / 100).item()

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def spread(self) -> float:
        """The 80th percentile over the 20th."""
        return self.percentile(80) / self.percentile(20)


@dataclass(frozen=True)
class Settings:
    """`minutes` is the time of a run of all operators, and decides; `seconds` is the most that the samples of one
    contender may take of it, so that a run of one operator is short. At least `MIN_SAMPLES` samples are taken, whatever
    they cost, but of calls of `only_call_seconds`, whose first call is the only sample."""

    seconds: float
    minutes: float = math.inf
    skip_slow: bool = False
    warm_up_seconds: float = 0.1
    only_call_seconds: float = 5.0
    settling_seconds: float = 0.0  # of calls before a sample, where one takes less and much memory


# A full run is to end within 15 minutes, a quick one within 3: the rest is for what is not stopped, such as a
# compilation.
FULL = Settings(seconds=2.5, minutes=14, settling_seconds=0.5)
QUICK = Settings(seconds=0.4, minutes=2.75, skip_slow=True, warm_up_seconds=0.03, only_call_seconds=0.3)


def discover(device: str, operators: Iterable[str] = (), smoke: bool = False) -> list[Workload]:
    """The workloads of every `bench_<op>.py` for a device; of the operators whose names contain one of `operators`."""
    found = [workload for module in modules() for workload in module.workloads(device, smoke)]
    wanted = list(operators)
    unknown = [word for word in wanted if not any(word in workload.operator for workload in found)]
    if unknown:
        known = ", ".join(sorted({workload.operator for workload in found}))
        raise ValueError(f"bench: no operator named {', '.join(unknown)} on {device}; there are: {known}")
    return [w for w in found if is_wanted(w.operator, wanted)]


def modules() -> list[Any]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return [importlib.import_module(f".{name}", __package__) for name in names]


def is_wanted(operator: str, wanted: Iterable[str]) -> bool:
    """None wanted: all."""
    words = list(wanted)
    return not words or any(word in operator for word in words)


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """`torch.compile(function)`, one and the same for all input sets, and not before a contender needs it."""
    return torch.compile(function, dynamic=dynamic)


def step(loss: Callable[..., torch.Tensor]) -> Callable[[Inputs], Call]:
    """What a training step does to a loss: the forward, `backward()` down to the inputs, and the release of their
    gradients."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [tensor for tensor in inputs if tensor.requires_grad]

        def call() -> None:
            loss(*inputs).backward()
            for leaf in leaves:
                leaf.grad = None

        return call

    return prepare


def compiled_step(loss: Callable[..., torch.Tensor]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        call = step(compiled(loss, dynamic=False))(inputs)
        call()  # compiles
        return call

    return prepare


def set_up_process() -> None:
    torch.set_num_threads(core_count())


def run(
    workload: Workload,
    settings: Settings = FULL,
    on_step: Callable[[str, float], None] = lambda step, done: None,
    share: float = math.inf,
    end: float = math.inf,
    reserved: float = 0.0,
) -> list[Measurement]:
    """Measures all contenders of one workload, in turns. `share`: the seconds it should take; `end`: when the run is to
    end, by `time.monotonic`, after which no contender is begun, and no slow one in so many seconds before it as are
    `reserved` for others. `on_step` hears what is done next and how much of the workload is done."""
    begin = time.monotonic()
    results: dict[str, Measurement] = {}
    runners: list[Runner] = []
    inputs: list[Any] = []
    for i, contender in enumerate(sorted(workload.contenders, key=lambda one: one.slow)):
        now = time.monotonic()
        is_late = now - begin > PATIENCE * share
        if reason := _reason_against(contender, settings, is_late, left=end - now, reserved=reserved):
            results[contender.name] = left_out(workload, contender.name, reason)
            continue
        on_step(f"{contender.name}: warm-up", i / len(workload.contenders) / 2)
        inputs = inputs or input_sets(workload)
        runners.append(Runner(workload, contender, inputs, settings))
        runners[-1].warm_up()

    if not runners:
        return [results[contender.name] for contender in workload.contenders]
    _share_out(runners, share - (time.monotonic() - begin), settings)
    gc.collect()
    gc.disable()  # a collection in the middle of a sample would be somebody's bad luck
    try:
        rounds = list(turns({runner: runner.samples_left for runner in runners}))
        for i, runner in enumerate(rounds):
            on_step(runner.contender.name, 0.5 + i / len(rounds) / 2)
            runner.take_sample()
    finally:
        gc.enable()
    torch.compiler.reset()  # compiled code of this workload's shapes counts against the limit of the next one's
    results |= {runner.contender.name: runner.result for runner in runners}
    return [results[contender.name] for contender in workload.contenders]


def _reason_against(contender: Contender, settings: Settings, is_late: bool, left: float, reserved: float) -> str:
    """Why a contender is not begun, if there is a reason."""
    if contender.slow and settings.skip_slow:
        return "slow, and the run is a quick one"
    if left <= 0:
        return "the time of the run was over"
    if contender.slow and left <= reserved:
        return "slow, and the time was needed for others"
    if contender.slow and is_late:
        return f"slow, and its workload had taken {PATIENCE} times its share of the run"
    return ""


def left_out(workload: Workload, contender: str, reason: str) -> Measurement:
    error = f"{LEFT_OUT}: {reason}"
    return Measurement(workload.operator, workload.name, workload.dtype, workload.device, contender, error=error)


def _share_out(runners: list[Runner], seconds: float, settings: Settings) -> None:
    """Divides what a workload has left of its share among the samples of its contenders."""
    open_ = [runner for runner in runners if runner.result.error is None]
    least, most = ([runner.cost(limit) for runner in open_] for limit in (0.0, settings.seconds))
    for runner, share in zip(open_, fill(least, most, seconds), strict=True):
        runner.plan(share)


def turns(samples: dict[Any, int], seed: int = 0) -> Iterator[Any]:
    """Every key as often as its number says, in shuffled rounds; one with few turns has them evenly over the rounds."""
    rounds = max(samples.values(), default=0)
    shuffle = random.Random(seed).shuffle
    for i in range(rounds):
        due = [key for key, count in samples.items() if (i + 1) * count // rounds > i * count // rounds]
        shuffle(due)
        yield from due


def plan(
    estimate: float, seconds: float, only_call_seconds: float = FULL.only_call_seconds, overhead: float = 0.0
) -> tuple[int, int]:
    """(samples, calls in each sample) for a call that takes `estimate` seconds, and a sample `overhead` more."""
    if estimate >= only_call_seconds:
        return 1, 1
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(estimate, 1e-9)))
    samples = int(seconds / (estimate * calls + overhead)) if estimate > 0 else MAX_SAMPLES
    return min(max(samples, MIN_SAMPLES), MAX_SAMPLES), calls


def input_sets(workload: Workload) -> list[Any]:
    """As many sets of inputs as exceed the last cache, made from one fixed seed."""
    generator = torch.Generator(workload.device).manual_seed(0)
    sets = [workload.make_inputs(generator)]
    size = max(input_bytes(sets[0]), 1)
    if not workload.cached:
        count = min(cache_bytes(workload.device) // size + 1, ROTATED_BYTES // size)
        sets += [workload.make_inputs(generator) for _ in range(count - 1)]
    return sets


def input_bytes(inputs: Any) -> int:
    """The bytes of all tensors in nested tuples and lists, and of their gradients."""
    if isinstance(inputs, torch.Tensor):
        return inputs.nbytes + (inputs.grad.nbytes if inputs.grad is not None else 0)
    return sum(input_bytes(one) for one in inputs)


class Runner:
    """One contender on its workload: prepared calls on every input set, and what was measured so far."""

    def __init__(self, workload: Workload, contender: Contender, inputs: list[Any], settings: Settings) -> None:
        self.contender = contender
        self.samples_left = 0
        self.result = Measurement(workload.operator, workload.name, workload.dtype, workload.device, contender.name)
        self._inputs = inputs
        self._input_bytes = max(input_bytes(inputs[0]), RESIDENT_BYTES if workload.resident else 0)
        self._settings = settings
        self._calls: list[Call | None] = [None] * len(inputs)
        self._estimate = self._overhead = 0.0
        self.calls_per_sample = 1
        self._settling_seconds = 0.0
        self._next = 0

    def warm_up(self) -> None:
        """Learns what a call costs and what memory it takes; a contender that fails here is out, with its reason."""
        try:
            if self.contender.imports:
                importlib.import_module(self.contender.imports)
            first = self._measure_memory()
            has_large_memory = self.result.device == "cpu" and (self.result.peak_bytes or 0) >= RETURNED_BYTES
            self._settling_seconds = self._settings.settling_seconds if has_large_memory else 0.0
            long = min(LONG_CALL_SECONDS, self._settings.only_call_seconds)
            if first >= (4 * long if self._settling_seconds > 0 else long):
                self.result.seconds.append(first)
                self._estimate = first
                return
            times, begin = [first], time.monotonic()
            while (elapsed := time.monotonic() - begin) < self._settings.warm_up_seconds:
                times.append(self._time(calls=1))
            # What a sample takes beside its calls: a floor waits, and consumed inputs are made anew.
            self._overhead = max(0.0, elapsed - sum(times[1:])) / max(len(times) - 1, 1)
            self._measure_memory()
            self._estimate = min(times)
            if self._estimate >= self._settling_seconds:
                self._settling_seconds = 0.0
        except Exception as error:
            self._fail(error)

    def plan(self, seconds: float) -> None:
        """Takes so many samples as this time allows."""
        samples, self.calls_per_sample = self._plan(seconds)
        self.samples_left = samples - len(self.result.seconds)

    def cost(self, seconds: float) -> float:
        """The time that the samples to come would take, if they were to take so long."""
        samples, calls = self._plan(seconds)
        return (samples - len(self.result.seconds)) * (calls * self._estimate + self._overhead)

    def _plan(self, seconds: float) -> tuple[int, int]:
        return plan(self._estimate, seconds, self._settings.only_call_seconds, self._overhead)

    def take_sample(self) -> None:
        if self.result.error is not None:
            return
        try:
            self.result.seconds.append(self._time(self.calls_per_sample))
        except Exception as error:
            self._fail(error)

    def _measure_memory(self) -> float:
        """One call; its seconds are right, because the clock runs inside of the memory measurement."""
        seconds: list[float] = []
        call = self.prepare(1)[0]
        device = self.result.device
        counted = floor.counted() if self.contender.name == FLOOR else contextlib.nullcontext()

        def timed() -> None:
            with counted as self.result.work:
                seconds.append(_elapsed([call], device))

        if self.contender.elsewhere:
            timed()
            return seconds[0]
        self.result.peak_bytes = peak_extra_bytes(timed, device, self._input_bytes)
        if device == "cuda":
            self.result.launches = launch_count(self.prepare(1)[0])
        return seconds[0]

    def _time(self, calls: int) -> float:
        begin = time.monotonic()
        while time.monotonic() - begin < self._settling_seconds:
            self.prepare(1)[0]()
        prepared = self.prepare(calls)
        if self.contender.name == FLOOR:
            time.sleep(SPIN_SECONDS)
        return _elapsed(prepared, self.result.device) / calls

    def prepare(self, count: int) -> list[Call]:
        """The next `count` calls, through the input sets in turn."""
        sets = [(self._next + i) % len(self._inputs) for i in range(count)]
        self._next += count
        for i in set(sets):
            if self._calls[i] is None or self.contender.consumes_inputs:
                self._calls[i] = None  # the old copy is freed before the new one is made
                self._calls[i] = self.contender.prepare(self._inputs[i])
        prepared = [self._calls[i] for i in sets]
        if self.contender.consumes_inputs:
            self._calls = [None] * len(self._calls)
        return prepared  # type: ignore[return-value]

    def _fail(self, error: Exception) -> None:
        self.samples_left = 0
        self.result.seconds.clear()
        self.result.error = f"{type(error).__name__}: {error}".splitlines()[0]


def _elapsed(calls: list[Call], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin
