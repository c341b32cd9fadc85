"""The emulation itself: every primitive against NumPy or torch, and every planted bug seen caught."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation import build_library, sanitized_environment

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "primitives.cu", HERE / "planted.cu")
ASCENDING, DESCENDING, RANDOM = range(3)
ORDERS = [(ASCENDING, 0), (DESCENDING, 0), (RANDOM, 1), (RANDOM, 2), (RANDOM, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # numbered as csrc/core/dtype.h does
DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


pytestmark = pytest.mark.needs_compiler


class Library:
    """Calls the exported functions; an error text that one returns becomes a RuntimeError."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.pyreg_emulation_set_thread_order.argtypes = [ctypes.c_int, ctypes.c_uint64]

    def set_order(self, order: int, seed: int = 0) -> None:
        self._library.pyreg_emulation_set_thread_order(order, seed)

    def cooperative_grid(self) -> int:
        return int(self._library.cooperative_grid())

    def run(self, name: str, *arguments: int | np.ndarray | torch.Tensor) -> None:
        function = getattr(self._library, f"run_{name}")
        function.restype = ctypes.c_char_p
        error = function(*(self._pointer(x) if not isinstance(x, int) else ctypes.c_int64(x) for x in arguments))
        if error is not None:
            raise RuntimeError(error.decode())

    @staticmethod
    def _pointer(array: np.ndarray | torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)


@pytest.fixture(scope="module")
def loaded() -> Library:
    return Library(build_library("emulation_tests", SOURCES))


@pytest.fixture(params=ORDERS, ids=["ascending", "descending", "random1", "random2", "random3"])
def library(loaded: Library, request: pytest.FixtureRequest) -> Library:
    """The library in each thread order."""
    loaded.set_order(*request.param)
    return loaded


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Warp operations.


def shuffle_source(kind: int, lane: int, parameter: int, width: int) -> int:
    """The lane read, from the documentation of shfl: groups of `width` lanes, own value where the source is beyond."""
    group = range(lane // width * width, lane // width * width + width)
    if kind == 0:
        return group[parameter % width]
    source = {1: lane - parameter, 2: lane + parameter, 3: lane ^ parameter}[kind]
    if kind == 3:  # xor may reach down into an earlier group, not up into a later one
        return source if source <= group[-1] else lane
    return source if source in group else lane


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", range(5), ids=["int32", "uint32", "int64", "float32", "float64"])
def test_shuffles(library: Library, rng: np.random.Generator, kind: int, width: int) -> None:
    dtype = [np.int32, np.uint32, np.int64, np.float32, np.float64][kind]
    values = (rng.random(32) * 2**31).astype(dtype) * np.array([1, 1, 2**30, 1, 1][kind], dtype)
    assert len(np.unique(values)) == 32
    for parameter in range(32):
        out = np.zeros((4, 32), dtype)
        library.run("shuffles", kind, values, out, parameter, width)
        source = [[shuffle_source(k, lane, parameter, width) for lane in range(32)] for k in range(4)]
        np.testing.assert_array_equal(out, values[np.array(source)])


@pytest.mark.parametrize("true_lanes", [0, 1, 0x80000000, 0x55555555, 0xAAAAAAAA, 0xFFFFFFFF, 0x12345678])
def test_votes(library: Library, true_lanes: int) -> None:
    predicate = np.array([true_lanes >> lane & 1 for lane in range(32)], np.int32) * 5
    out = np.zeros((4, 32), np.uint32)
    library.run("votes", predicate, out)
    mask = np.array([0x55555555, 0xAAAAAAAA] * 16, np.uint32)
    np.testing.assert_array_equal(out[0], mask & true_lanes)
    np.testing.assert_array_equal(out[1], (mask & true_lanes) != 0)
    np.testing.assert_array_equal(out[2], (mask & true_lanes) == mask)
    np.testing.assert_array_equal(out[3], 0xFFFFFFFF)


def arguments_of_maxima(groups: np.ndarray) -> np.ndarray:
    """Index of the first NaN, else of the first maximum, of each row. np.argmax does just that."""
    return np.asarray(np.argmax(groups, axis=-1))


def with_ties_and_nans(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.integers(-4, 4, shape).astype(np.float64)
    values[rng.random(shape) < 0.02] = np.nan
    values[rng.random(shape) < 0.1] = -np.inf
    return values


@pytest.mark.parametrize("log2_width", range(6))
def test_group_reductions(library: Library, rng: np.random.Generator, log2_width: int) -> None:
    width = 2**log2_width
    values = rng.standard_normal(64)
    out = np.zeros((5, 64))
    library.run("groups", log2_width, values, out)
    sums = values.reshape(-1, width).sum(1).repeat(width)
    np.testing.assert_allclose(out[0], sums, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(out[2], sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[3], width)
    np.testing.assert_array_equal(out[4], np.arange(64).reshape(-1, width).sum(1).repeat(width))
    for _ in range(20):
        values = with_ties_and_nans(rng, (64,))
        library.run("groups", log2_width, values, out)
        first = np.arange(0, 64, width)
        expected = (first + arguments_of_maxima(values.reshape(-1, width))).repeat(width)
        np.testing.assert_array_equal(out[1], expected)


@pytest.mark.parametrize("threads", [32, 64, 96, 416, 1024])
def test_block_reductions(library: Library, rng: np.random.Generator, threads: int) -> None:
    repeats = 7
    values = rng.standard_normal((repeats, threads))
    out = np.zeros((4, repeats, threads))
    library.run("blocks", threads, values, out, repeats)
    assert (out == out[:, :, :1]).all(), "all threads get the same bits"
    np.testing.assert_allclose(out[0, :, 0], values.sum(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out[1, :, 0], values.sum(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out[2, :, 0], (values**2).sum(1), rtol=1e-12)
    values = with_ties_and_nans(rng, (repeats, threads))
    values[0] = -np.inf
    values[1] = np.where(np.isnan(values[1]), 0, values[1])
    library.run("blocks", threads, values, out, repeats)
    np.testing.assert_array_equal(out[3], arguments_of_maxima(values)[:, None].repeat(threads, 1))


def test_block_sums_are_the_same_bits_in_every_order(loaded: Library, rng: np.random.Generator) -> None:
    values = rng.standard_normal((3, 416)) * 10.0 ** rng.integers(-8, 8, (3, 416))
    results = []
    for order, seed in ORDERS:
        loaded.set_order(order, seed)
        out = np.zeros((4, 3, 416))
        loaded.run("blocks", 416, values, out, 3)
        results.append(out.tobytes())
    assert len(set(results)) == 1


# Atomics, cooperative launches.


def test_atomics(library: Library, rng: np.random.Generator) -> None:
    values = rng.integers(1, 1000, 600, dtype=np.int32)
    counts = np.zeros(12, np.int32)
    counts[9] = 1000
    extremes = np.zeros(1)
    total = np.zeros(1, np.uint64)
    library.run("atomics", values, 600, counts, extremes, total)
    np.testing.assert_array_equal(counts[:8], np.bincount(values % 8, minlength=8))
    assert (counts[8], counts[9], counts[11]) == (values.max(), values.min(), 7)
    assert counts[10] - 1 in values
    assert extremes[0] == total[0] == values.sum()


def cooperative_reference(values: np.ndarray) -> np.ndarray:
    kept = values.copy()
    for _ in range(3):
        kept += kept.sum()
    return np.asarray(kept[:, ::-1] - values)


def test_cooperative_launch_keeps_every_block_apart(library: Library, rng: np.random.Generator) -> None:
    assert library.cooperative_grid() == 6
    for blocks in (1, 2, 6):
        values = rng.integers(-8, 8, (blocks, 64)).astype(np.float32)
        out = np.zeros_like(values)
        library.run("cooperative", values, np.zeros(blocks, np.float32), out, blocks)
        np.testing.assert_array_equal(out, cooperative_reference(values))


def test_groups_of_a_cooperative_launch(library: Library, rng: np.random.Generator) -> None:
    for blocks in (1, 2, 5, 6):
        values = rng.integers(-8, 8, (blocks, 64)).astype(np.float32)
        out = np.zeros_like(values)
        library.run("grouped", values, np.zeros(blocks, np.float32), out, np.zeros(3, np.uint32), blocks)
        for group, first in enumerate(range(0, blocks, 2)):
            expected = values[first : first + 2].copy()
            for _ in range(group + 1):
                total = expected.sum()
                expected += total + (total < 0)
            np.testing.assert_array_equal(out[first : first + 2], expected)


def test_launches_from_several_host_threads(loaded: Library, rng: np.random.Generator) -> None:
    loaded.set_order(ASCENDING)
    values = rng.standard_normal((8, 7, 96))
    outs = [np.zeros((4, 7, 96)) for _ in values]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value, out: loaded.run("blocks", 96, value, out, 7), values, outs))
    for value, out in zip(values, outs, strict=True):
        np.testing.assert_allclose(out[0, :, 0], value.sum(1), rtol=1e-12, atol=1e-12)


# Conversions.


@pytest.mark.parametrize("dtype", [2, 3], ids=["bfloat16", "float16"])
def test_every_16_bit_value_widens_as_in_torch(loaded: Library, dtype: int) -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(DTYPES[dtype])
    out = torch.zeros(65536)
    loaded.run("widen", dtype, values, out, 65536)
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [2, 3], ids=["bfloat16", "float16"])
def test_every_rounding_case_narrows_as_in_torch(loaded: Library, dtype: int) -> None:
    """All bits that are kept, with the bits below: none, the least, around one half, all."""
    dropped = 16 if dtype == 2 else 13
    kept = np.arange(2 ** (32 - dropped), dtype=np.uint32) << np.uint32(dropped)
    half = 1 << (dropped - 1)
    for low in (0, 1, half - 1, half, half + 1, 2 * half - 1):
        values = torch.from_numpy((kept | np.uint32(low)).view(np.float32))
        out = torch.zeros(len(values), dtype=DTYPES[dtype])
        loaded.run("narrow", dtype, values, out, len(values))
        expected = values.to(DTYPES[dtype])
        number = ~expected.isnan()
        assert torch.equal(out.isnan(), ~number)
        assert torch.equal(out[number].view(torch.int16), expected[number].view(torch.int16))


# Rows.

LENGTHS = [*range(40), 63, 64, 65, 127, 250, 509, 1024, 2003]


@pytest.mark.parametrize("dtype", range(4), ids=DTYPE_NAMES)
@pytest.mark.parametrize("lanes", [1, 3, 8, 32, 96])
def test_for_each_in_row(loaded: Library, dtype: int, lanes: int) -> None:
    loaded.set_order(RANDOM, 4)
    size = DTYPES[dtype].itemsize
    for n in LENGTHS:
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(DTYPES[dtype])
        accumulate = torch.float64 if dtype == 0 else torch.float32
        for offset in range(16 // size):
            seen = torch.full((n,), torch.nan, dtype=accumulate)
            visits = torch.zeros(n, dtype=torch.int32)
            loaded.run("visit", dtype, values, n, offset, lanes, seen, visits)
            assert (visits == 1).all(), (n, offset)
            assert torch.equal(seen, values.to(accumulate)), (n, offset)


@pytest.mark.parametrize("dtype", range(4), ids=DTYPE_NAMES)
@pytest.mark.parametrize("lanes", [3, 32])
def test_transform_row(loaded: Library, dtype: int, lanes: int) -> None:
    loaded.set_order(RANDOM, 5)
    per_pack = 16 // DTYPES[dtype].itemsize
    in_place = -1
    for n in [0, 1, 7, 8, 9, 31, 100, 333]:
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(DTYPES[dtype])
        wide = values.to(torch.float64 if dtype == 0 else torch.float32)
        expected = (wide * 3 + torch.arange(n) % 5).to(DTYPES[dtype])
        for in_offset in range(per_pack):
            for out_offset in range(in_place, per_pack):
                out = torch.zeros_like(values)
                loaded.run("transform", dtype, values, n, in_offset, out_offset, lanes, out)
                assert torch.equal(out, expected), (n, in_offset, out_offset)


# Misuse ends the launch with an error.

MISUSE = [  # in the order of planted.cu
    r"deadlock: threads 0-47 wait at __syncthreads \(.*planted.cu:\d+\); threads 48-63 exited",
    r"__syncthreads at .*planted.cu:\d+ while other threads wait at .*planted.cu:\d+",
    r"deadlock: threads 0-4 wait at __syncthreads .*; threads 5-5 exited; threads 6-63 wait at",
    r"width 24 is not a power of two up to 32",
    r"lane \d+ has width (8 instead of 16|16 instead of 8)",
    r"lane \d+ names the mask 0x\w+ instead of 0x\w+",
    r"lane 15 reads lane 16, which is outside the mask",
    r"the mask does not name the calling lane",
    r"(the mask names lanes that have exited|deadlock: .*threads 5-5 exited)",
    r"deadlock: threads 0-0 wait at __syncthreads .*; threads 1-1 wait at warp shuffle",
    r"lane \d+ is at the (warp vote|warp shuffle) of .*planted.cu:\d+",
    r"grid barrier at .*cuda.cuh:\d+ in a launch that is not cooperative",
    r"the mask names lanes that the block does not have",
    r"deadlock: .*threads 5-63 wait at __syncthreads_or",
    r"group barrier at .*cuda.cuh:\d+ in a launch that is not cooperative",
]


FULL_MASK_IN_PART_OF_A_WARP = 12


@pytest.mark.parametrize("misuse", range(len(MISUSE)))
def test_misuse_is_an_error(library: Library, misuse: int) -> None:
    threads = 48 if misuse == FULL_MASK_IN_PART_OF_A_WARP else 64
    with pytest.raises(RuntimeError, match=rf"^misuse_kernel: block \(0, 0, 0\)(, thread \d+)?: .*{MISUSE[misuse]}"):
        library.run("misuse", misuse, threads, np.zeros(64, np.int32))
    library.run("misuse", -1, threads, np.zeros(64, np.int32))  # and the next launch runs


def test_groups_that_disagree_on_their_size_are_an_error(library: Library) -> None:
    text = r"^disagreeing_kernel: .*group barrier at .*cuda.cuh:\d+ of \d blocks, others expect another number"
    with pytest.raises(RuntimeError, match=text):
        library.run("disagreeing", np.zeros(1, np.uint32))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1025, 0, 0, 0), r"a block of \(1025, 1, 1\) threads; 1 to 1024 are allowed"),
        ((1, 0, 0, 0, 0), r"a block of \(0, 1, 1\) threads"),
        ((0, 32, 0, 0, 0), r"a grid of \(0, 1, 1\) blocks"),
        ((1, 32, 50000, 0, 0), r"50000 bytes of dynamic shared memory; the kernel is allowed 49152"),
        ((1, 32, 70000, 60000, 0), r"70000 bytes of dynamic shared memory; the kernel is allowed 60000"),
        ((1, 32, 232449, 232449, 0), r"cudaFuncSetAttribute\(MaxDynamicSharedMemorySize\): invalid argument"),
        ((7, 32, 0, 0, 1), r"a cooperative grid of 7 blocks; 6 fit at once"),
    ],
)
def test_launch_beyond_the_limits_is_an_error(loaded: Library, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        loaded.run("idle", *shape)


def test_launch_at_the_limits(loaded: Library) -> None:
    loaded.run("idle", 1, 1024, 232448, 232448, 0)
    loaded.run("idle", 6, 32, 0, 0, 1)


# Planted bugs.


def results_in_every_order(library: Library, name: str, *arguments: int) -> list[bytes]:
    values = np.arange(128, dtype=np.float32)
    results = []
    for order, seed in ORDERS:
        library.set_order(order, seed)
        out = np.zeros(128, np.float32)
        library.run(name, *arguments, values, out)
        results.append(out.tobytes())
    return results


@pytest.mark.parametrize("twice", [0, 1], ids=["before the read", "before the next write"])
def test_planted_missing_barrier_shows_between_thread_orders(loaded: Library, twice: int) -> None:
    right = np.roll(np.arange(128, dtype=np.float32), -1 - twice).tobytes()
    assert set(results_in_every_order(loaded, "rotate", 1, twice)) == {right}
    assert len(set(results_in_every_order(loaded, "rotate", 0, twice))) > 1


def test_planted_shuffle_width_gives_a_wrong_sum(library: Library, rng: np.random.Generator) -> None:
    values = rng.integers(1, 100, 32).astype(np.float32)
    expected = values.reshape(2, 16).sum(1).repeat(16)
    right, wrong = np.zeros(32, np.float32), np.zeros(32, np.float32)
    library.run("sum_of_16", 16, values, right)
    library.run("sum_of_16", 8, values, wrong)
    np.testing.assert_array_equal(right, expected)
    assert (wrong != expected).any()


def test_unwritten_shared_memory_is_nan_in_every_block(library: Library) -> None:
    out = np.zeros((4, 32), np.float32)
    library.run("uninitialized", out, 4)
    assert np.isnan(out).all()


OVERRUN = """
import sys
import numpy as np
from emulation import build_library
from test_emulation import SOURCES, Library
where, start = map(int, sys.argv[1:])
library = Library(build_library("emulation_tests", SOURCES))
library.run("overrun", where, np.ones(4096, np.float32)[-32:], np.zeros(32, np.float32), start)
print("ran to the end")
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return sanitized_environment()


@pytest.mark.parametrize(
    ("where", "report"),
    [
        (0, r"AddressSanitizer: heap-buffer-overflow"),
        (1, r"AddressSanitizer: heap-buffer-overflow"),
        (2, r"runtime error: index 32 out of bounds for type 'float \[32\]'"),
    ],
    ids=["global", "dynamic shared", "static shared"],
)
def test_planted_read_out_of_bounds_is_caught(environment: dict[str, str], where: int, report: str) -> None:
    def overrun(start: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", OVERRUN, str(where), str(start)]
        return subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)

    right = overrun(0)
    assert (right.returncode, right.stdout) == (0, "ran to the end\n"), right.stderr
    caught = overrun(1)
    assert caught.returncode != 0
    assert "ran to the end" not in caught.stdout
    assert re.search(report, caught.stderr), caught.stderr
    assert re.search(r"#\d+ 0x\w+ in .*overrun_kernel.*planted.cu", caught.stderr), caught.stderr


def test_fibers_by_ucontext(rng: np.random.Generator) -> None:
    """The way that processors other than x86-64 take."""
    library = Library(build_library("emulation_tests_ucontext", SOURCES, ["-DPYREG_EMULATION_UCONTEXT"]))
    values = rng.standard_normal((3, 96))
    out = np.zeros((4, 3, 96))
    library.run("blocks", 96, values, out, 3)
    np.testing.assert_allclose(out[0, :, 0], values.sum(1), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="deadlock"):
        library.run("misuse", 0, 64, np.zeros(64, np.int32))
