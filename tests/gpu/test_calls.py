"""What a call promises on a GPU, whatever it computes: graphs, streams, launches, refusals."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.errors import InputError, TargetError

from .cases import BOTH, CASES, COMPACT, WIDE
from .run import Case, limit_tokens, load, poisoned

GRAPHED = ("gather", "stream16", "stream64", "stream160", "mma16", "simple", "loop")


@pytest.fixture
def swiglu(folder: Path) -> Case:
    return load(folder, "hopper")["swiglu"]


def captured(call: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # By default a capture forbids other threads to wait or to allocate, on any GPU.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    return graph


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it wants two GPUs")


@pytest.mark.parametrize("schedule", GRAPHED)
def test_a_replayed_graph_gives_what_a_call_gives(swiglu: Case, schedule: str) -> None:
    tokens = 5 if schedule == "gather" else 100
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    out = torch.empty_like(x)
    graph = captured(lambda: swiglu.block(x, out=out, schedule=schedule))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        out.view(torch.uint8).fill_(0xFF)
        graph.replay()
        assert torch.equal(out, swiglu.block(x, schedule=schedule))


def test_calls_on_several_streams_do_not_disturb_each_other(swiglu: Case) -> None:
    xs = [torch.randn(n, 256, device="cuda").bfloat16() for n in (3, 40, 300, 1500)]
    want = [swiglu.block(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    got: list[list[Any]] = [[] for _ in xs]
    torch.cuda.synchronize()
    for _ in range(10):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[n].append(swiglu.block(xs[n]))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want[n]) for n, ys in enumerate(got) for y in ys)


def test_threads_with_a_stream_each(swiglu: Case) -> None:
    xs = [torch.randn(n, 256, device="cuda").bfloat16() for n in (1, 8, 64, 512)]
    want = [swiglu.block(x) for x in xs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                y = swiglu.block(xs[n])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(y, want[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_artifacts_in_one_process(folder: Path, swiglu: Case) -> None:
    other = load(folder, "portable")["swiglu"]
    x = torch.randn(64, 256, device="cuda").bfloat16()
    first, second = swiglu.block(x), other.block(x)
    for _ in range(3):
        assert torch.equal(first, swiglu.block(x)) and torch.equal(second, other.block(x))
    assert (first.float() - second.float()).norm() <= 5e-3 * first.float().norm()


def test_an_artifact_that_is_loaded_again(folder: Path) -> None:
    """As `model = moec.load(path)` twice does: the first is dropped when the second is there."""
    x = torch.randn(64, 256, device="cuda").bfloat16()
    layer = json.loads((folder / "portable.json").read_text()).index("swiglu")
    results = []
    for _ in range(3):
        model = moec.load(folder / "portable.moec", device="cuda:0")
        gc.collect()
        results.append(model[layer](x))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("tokens", [1, 7, 40, 150, 700])
def test_compact_weights_give_the_same_bits(folder: Path, tokens: int) -> None:
    plain, compact = load(folder, "hopper"), load(folder, "compact")
    for name in compact.keys() & plain.keys():
        given = {n: v[:tokens].contiguous() for n, v in plain[name].inputs(2048).items()}
        x, extra = given["x"], {n: given[n] for n in plain[name].extra}
        for schedule in COMPACT[name][1]:
            if limit_tokens(schedule, tokens):
                same = "stream160" if schedule == WIDE else schedule
                expected = plain[name].block(x, schedule=same, **extra)
                result = compact[name].block(x, schedule=schedule, **extra)
                assert torch.equal(result, expected), (name, schedule)


@pytest.mark.parametrize("tokens", [1, 7, 40, 150, 700])
def test_both_forms_give_the_bits_of_each(folder: Path, tokens: int) -> None:
    both, alone = load(folder, "both"), {n: load(folder, n) for n in ("hopper", "compact")}
    for name, case in both.items():
        x = case.inputs(2048)["x"][:tokens].contiguous()
        for schedule in BOTH[name][1]:
            if limit_tokens(schedule, tokens):
                faster = schedule in ("gather", "stream16", "stream32", "stream64")
                other = alone["compact" if faster else "hopper"][name].block
                result = case.block(x, schedule=schedule)
                assert torch.equal(result, other(x, schedule=schedule)), (name, schedule)


def launches(call: Any) -> int:
    call()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if "_op_" in e.key)


@pytest.mark.parametrize(
    ("schedule", "tokens", "count"),
    [
        ("gather", 1, 2), ("gather", 8, 2), ("stream16", 16, 4), ("stream32", 50, 4),
        ("stream64", 150, 4), ("stream160", 700, 4), ("loop", 33, 35),
    ],
)  # fmt: skip
def test_launches(swiglu: Case, schedule: str, tokens: int, count: int) -> None:
    """Experts; then the block, where router and selection are one more launch."""
    given = swiglu.inputs(2048)
    x, ids, weights = (given[name][:tokens].contiguous() for name in ("x", "random", "weights"))
    assert launches(lambda: swiglu.block.experts(x, ids, weights, schedule=schedule)) == count
    assert launches(lambda: swiglu.block(x, schedule=schedule)) == count + 1


def test_rows_do_not_depend_on_their_neighbours(swiglu: Case) -> None:
    """Permuted tokens give permuted bits, within a schedule."""
    x = torch.randn(200, 256, device="cuda").bfloat16()
    order = torch.randperm(200, device="cuda")
    for schedule in ("stream16", "stream64", "stream160", "mma64", "simple"):
        y = swiglu.block(x, schedule=schedule)
        again = poisoned(lambda s=schedule: swiglu.block(x[order].contiguous(), schedule=s))
        assert torch.equal(y[order], again), schedule


def test_more_values_than_32_bits_count(folder: Path) -> None:
    """The last tokens of many give what they give alone."""
    x = torch.randn((1 << 16) + 100, 4096, device="cuda").bfloat16()
    for artifact, table in (("hopper", CASES), ("compact", COMPACT)):
        block = load(folder, artifact)["wide rows"].block
        for schedule in table["wide rows"][1]:
            y = block(x, schedule=schedule)
            for few in (slice(100), slice(-100, None)):
                alone = block(x[few].contiguous(), schedule=schedule)
                assert torch.equal(y[few], alone), (artifact, schedule)


def test_what_does_not_fit_is_refused(swiglu: Case) -> None:
    x = torch.randn(4, 256, device="cuda").bfloat16()
    ids = torch.zeros(4, 4, dtype=torch.int32, device="cuda")
    weights = torch.ones(4, 4, device="cuda")
    bad: list[tuple[Any, str]] = [
        (lambda: swiglu.block(x.cpu()), "cpu"),
        (lambda: swiglu.block(x.float()), "float32"),
        (lambda: swiglu.block(x[:, :255].contiguous()), "shape"),
        (lambda: swiglu.block(torch.cat([x, x], 1)[:, ::2]), "contiguous"),
        (lambda: swiglu.block(x, out=x), "overlaps"),
        (lambda: swiglu.block(x, out=torch.empty_like(x[:3])), "rows"),
        (lambda: swiglu.block.experts(x, ids.long().float(), weights), "dtype"),
        (lambda: swiglu.block.experts(x, ids[:3], weights), "rows"),
        (lambda: swiglu.block.experts(x, ids, weights.bfloat16()), "dtype"),
        (lambda: swiglu.block(x.clone().requires_grad_()), "gradient"),
    ]
    for call, text in bad:
        with pytest.raises(InputError, match=text):
            call()
    with pytest.raises(TargetError, match="plain"):
        swiglu.block(x, schedule="plain")
    assert torch.isfinite(swiglu.block(x).float()).all()


def test_int64_ids_are_converted(swiglu: Case) -> None:
    given = swiglu.inputs(33)
    want = swiglu.experts(given, "random", None)
    wide = swiglu.block.experts(given["x"], given["random"].long(), given["weights"])
    assert torch.equal(want, wide)


class Borrowed:
    """A tensor of a library that moec has never heard of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **more: Any) -> Any:
        return self._tensor.__dlpack__(**more)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


@pytest.mark.parametrize("tokens", [5, 300])
def test_tensors_of_another_library(swiglu: Case, tokens: int) -> None:
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    out, want = torch.empty_like(x), swiglu.block(x)
    for _ in range(3):
        out.fill_(torch.nan)
        torch.cuda.synchronize()  # such tensors are worked on on the default stream
        swiglu.block(Borrowed(x), out=Borrowed(out))
        torch.cuda.synchronize()
        assert torch.equal(out, want)


@pytest.mark.parametrize("tokens", [5, 300])
def test_cupy_arrays(folder: Path, tokens: int) -> None:
    cupy = pytest.importorskip("cupy")
    case = load(folder, "hopper")["float16, biases, clamp"]
    x = torch.randn(tokens, 256, device="cuda").half()
    want = case.block(x)
    torch.cuda.synchronize()
    got = case.block(cupy.asarray(x))
    cupy.cuda.get_current_stream().synchronize()
    assert isinstance(got, cupy.ndarray) and torch.equal(torch.as_tensor(got, device="cuda"), want)


@two_gpus
def test_two_gpus_in_one_process(folder: Path) -> None:
    devices = "cuda:0", "cuda:1"
    blocks = [moec.load(folder / "hopper.moec", device=device)[0] for device in devices]
    for tokens in (1, 5, 40, 300, 1500):
        xs = [torch.randn(tokens, 256).bfloat16().to(device) for device in devices]
        want = blocks[0](xs[0]), blocks[0](xs[1].to(devices[0]))
        for current in (0, 1):  # the current device is nothing to a call
            with torch.cuda.device(current):
                got = [block(x) for block, x in zip(blocks, xs, strict=True)]
            assert [y.device for y in got] == [x.device for x in xs]
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1].to(devices[0]), want[1])
    with pytest.raises(InputError, match="is on device cuda:0"):
        blocks[1](xs[0])


@two_gpus
def test_a_thread_for_each_gpu(folder: Path) -> None:
    devices, wrong = ("cuda:0", "cuda:1"), []
    x = torch.randn(7, 256).bfloat16()
    want = moec.load(folder / "hopper.moec", device=devices[0])[0](x.to(devices[0])).cpu()

    def work(device: str) -> None:
        block, own = moec.load(folder / "hopper.moec", device=device)[0], x.to(device)
        with torch.cuda.device(device):
            graph = captured(lambda: block(own))
            for _ in range(50):
                graph.replay()
                if not torch.equal(block(own).cpu(), want):
                    wrong.append(device)

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_devices_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(TargetError, match="there is no CUDA device 99"):
        moec.load(folder / "hopper.moec", device="cuda:99")
    torch.ones(1, device="cuda")  # the refused call left no error behind for others to find
    with pytest.raises(TargetError, match="sm_90a"):
        moec.load(folder / "hopper.moec", device="cpu")


def test_an_artifact_for_another_gpu_says_what_it_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moec.runtime import cuda

    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_80")
    with pytest.raises(TargetError) as caught:
        moec.load(folder / "hopper.moec", device="cuda:0")
    assert caught.value.need == "cuda-sm_90a: holds code for sm_90a, cuda:0 is sm_80"
    assert "cuda:compute_80" in str(caught.value.hint)
