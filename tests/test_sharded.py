"""Merges of tensors that processes share: bit for bit those of the whole tensors, for every method.

This file, run as a program, forks the processes, so that one import and one merge of the whole tensors serve all of them. Each
carries out all checks, and says which of them fail.
"""

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Along

from mergekit_cl import (
    Elementwise,
    KthOf,
    MergeError,
    MismatchError,
    NonFiniteError,
    Scope,
    Steps,
    SumOf,
    Values,
    execute,
    merge,
    method,
    methods,
    survey,
)
from mergekit_cl.api import prepare
from mergekit_cl.kernels import BLOCK
from mergekit_cl.models.sharded import Shard, local_of, with_local

Model = dict[str, Any]
Check = Callable[[], None]

REQUIRED = {"density": 0.3, "t": 0.3, "window": 2}
MODES: dict[str, list[dict[str, Any]]] = {
    "ties": [{"elect": "unweighted", "combine": "count_mean", "weight": [0.7, -1.2, 0.4]}, {"rescale": "l1"}],
    "dare_ties": [{"density": [1, 0, 0.9], "seed": 3, "rescale": "l1"}],
    "breadcrumbs_ties": [{"gamma": [0, 0.2, 0.9]}],
    "sce": [{"select_topk": 0.3}],
    "nuslerp": [{"nuslerp_flatten": False}],
    "model_stock": [{"filter_wise": True}],
    "della": [{"rescale": None, "seed": 3}],
}
SHAPES: dict[str, tuple[int, ...]] = {
    "large": (2011, 101),  # three blocks and a part of one
    "uneven": (5, 7),
    "few": (3,),
    "nothing": (0, 3),
    "single": (1, 1, 11),
    "columns": (7, 26),
    "fragment": (1313, 103),
    "tiny": (2, 3),
    "scalar": (),
}
DTYPES = {"uneven": torch.bfloat16, "fragment": torch.bfloat16}
WORLDS = [2, 3, 4]
KINDS = ["sfa", "dare_ties", "breadcrumbs", "slerp", "sce", "tsv_m"]


def full_model(seed: int, names: Any = SHAPES, dtype: torch.dtype | None = None) -> Model:
    """Tensors with equal magnitudes, zeros, and entries in which the models agree."""
    generator = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed + 1)
    model = {}
    for name in names:
        base = torch.randn(SHAPES[name], generator=generator)
        change = torch.randn(SHAPES[name], generator=own) * 0.1
        change[torch.rand(SHAPES[name], generator=own) < 0.3] = 0.0625
        change[torch.rand(SHAPES[name], generator=own) < 0.3] = 0
        model[name] = (base + change).to(dtype or DTYPES.get(name, torch.float32))
    return model


def odd_range(length: int, rank: int, world: int) -> tuple[int, int]:
    """Cut at odd places; the first process has nothing of a small tensor, and the last of them comes first."""
    cuts = [0, *(min(length, (number * length // world) | 1) for number in range(1, world)), length]
    if length < 10:
        cuts = [0] * world + [length]
    place = (rank + 1) % world
    return cuts[place], cuts[place + 1]


def fragment_of(full: torch.Tensor) -> Shard:
    start, stop = odd_range(full.numel(), dist.get_rank(), dist.get_world_size())
    return Shard(full.reshape(-1)[start:stop].clone(), tuple(full.shape), start)


def placed(full: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)


def shared_model(full: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> Model:
    kinds: dict[str, Any] = {
        "columns": lambda t: placed(t, mesh, Along(1)),
        "fragment": fragment_of,
        "tiny": fragment_of,
        "single": lambda t: placed(t, mesh, Along(2)),
        "scalar": lambda t: t.clone(),
    }
    return {name: kinds.get(name, lambda t: placed(t, mesh, Along(0)))(tensor) for name, tensor in full.items()}


def part_of(full: torch.Tensor, like: Any) -> torch.Tensor:
    """The elements that a process has to get."""
    if isinstance(like, Shard):
        return full.reshape(-1)[like.start : like.start + like.local.numel()].view(like.local.shape)
    if isinstance(like, DTensor):
        return local_of(distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None))
    return full


def bits(tensor: torch.Tensor) -> bytes:
    whole: bytes = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy().tobytes()
    return whole


def check_equal(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor], like: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, full in expected.items():
        assert type(found[name]) is type(like[name]), name
        local, wanted = local_of(found[name]), part_of(full, like[name])
        assert local.dtype == wanted.dtype, name
        assert local.shape == wanted.shape, name
        assert bits(local) == bits(wanted), name


def arguments(name: str, models: list[Model], how: Mapping[str, Any], scope: str) -> tuple[list[Model], dict[str, Any]]:
    """What `merge` is called with: the first model is the base, where one can be used."""
    chosen = methods()[name]
    given = models[1 : 1 + (1 if name == "slerp" else chosen.most or len(models))]
    parameters = {p: value for p, value in REQUIRED.items() if p in chosen.parameters} | dict(how)
    if "scope" in chosen.shown:
        parameters["scope"] = scope
    parameters |= {p: [{t: absolute(v) for t, v in m.items()} for m in given] for p in chosen.companions}
    return given, parameters | {"base": None if chosen.base == "unused" else models[0]}


def absolute(leaf: Any) -> Any:
    return with_local(leaf, local_of(leaf).abs())


def compare(name: str, full: list[Model], shared: list[Model], how: Mapping[str, Any], scope: str, **options: Any) -> None:
    given, parameters = arguments(name, full, how, scope)
    expected = merge(given, name, **parameters, **options)
    given, parameters = arguments(name, shared, how, scope)
    check_equal(merge(given, name, **parameters, **options), expected, given[0])


@contextmanager
def counted() -> Iterator[list[str]]:
    """List the collectives that are called."""
    calls: list[str] = []

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return original(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_object", "all_gather_into_tensor", "all_gather", "broadcast"):
            patch.setattr(dist, name, wrapped(name, getattr(dist, name)))
        yield calls


def expect(kind: type[Exception], message: str, call: Callable[..., Any], *given: Any, **named: Any) -> None:
    with pytest.raises(kind) as caught:
        call(*given, **named)
    assert message in str(caught.value), str(caught.value)
    assert "NaN" not in message or "overflow" not in str(caught.value), str(caught.value)


# The checks, each in every process


def world_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def models_of(names: Any = SHAPES, dtype: torch.dtype | None = None) -> tuple[list[Model], list[Model]]:
    mesh = world_mesh()
    full = [full_model(seed, names, dtype) for seed in range(4)]
    return full, [shared_model(model, mesh) for model in full]


@cache
def merged_whole() -> list[tuple[str, dict[str, Any], str, Model]]:
    """The merges of the whole tensors by every method, in every mode."""
    full = [full_model(seed) for seed in range(4)]
    merged = []
    for name in methods():
        for how in [{}, *MODES.get(name, [])]:
            by_slices = {"nuslerp_flatten", "filter_wise"} & how.keys()
            for scope in ["tensor", "model"] if "scope" in methods()[name].shown and not by_slices else ["tensor"]:
                given, parameters = arguments(name, full, how, scope)
                merged.append((name, how, scope, merge(given, name, **parameters, backend="numpy", threads=1)))
    return merged


def every_method() -> None:
    """All of them in two processes; in more, one of each kind."""
    shared = models_of()[1]
    failures = []
    for name, how, scope, expected in merged_whole():
        if dist.get_world_size() == 2 or name in KINDS:
            given, parameters = arguments(name, shared, how, scope)
            try:
                check_equal(merge(given, name, **parameters, backend="numpy", threads=1), expected, given[0])
            except AssertionError as error:
                failures.append(f"{name} {how} {scope}: {error}")
    assert not failures, "\n".join(failures)


def every_backend() -> None:
    """Also in the other dtypes, with threads, and with windows that begin anywhere."""
    for dtype in (torch.float16, torch.float64):
        full, shared = models_of(["uneven", "columns", "fragment", "tiny"], dtype)
        for name in ("sfa", "ties", "dare_ties", "breadcrumbs", "slerp", "sce"):
            compare(name, full, shared, {}, "tensor", backend="numba", threads=3)
    full, shared = models_of(["uneven", "columns", "tiny", "few"], torch.bfloat16)
    for name in ("linear", "ties", "dare_ties", "slerp", "sce"):
        compare(name, full, shared, {}, "model", backend="triton")


def called(scope: Scope) -> Steps:
    """A method of formulas that cannot be traced, one of them with random numbers."""
    (total,) = yield SumOf(lambda base, models: np.sort(models, axis=0)[0])
    (cut,) = yield KthOf(lambda base, models: np.sort(models, axis=0)[-1] - base, [scope.elements // 3])

    def formula(base: Values, models: list[Values], uniform: list[Values]) -> Values:
        chosen = (np.sort(models, axis=0)[1] - base > cut.magnitude) | (uniform[0] < 0.5)
        return np.where(chosen, models[0], base + models[1] / (1 + abs(total)))

    return Elementwise(formula, seed=scope.seed)


def formulas_that_the_interpreter_leaves_to_numpy() -> None:
    full, shared = models_of(["uneven", "columns", "fragment", "few"])
    for name in ("called", "arcee_fusion", "iso_c"):
        for scope in ("tensor", "model") if "scope" in methods()[name].shown else ("tensor",):
            compare(name, full, shared, {}, scope, backend="triton")


def pieces_and_threads() -> None:
    full, shared = models_of(["large", "fragment"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "CHUNK", BLOCK)
        for name in ("ties", "dare_linear", "karcher"):
            compare(name, full, shared, {"rescale": "l1"} if name == "dare_linear" else {}, "model", threads=3)


def every_placement() -> None:
    """A mesh of two dimensions: replicas, parts of parts, and parts that are no ranges."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    copy = Replicate()
    kinds: list[tuple[Placement, Placement]] = [
        (copy, copy), (copy, Along(0)), (Along(0), Along(0)), (Along(0), Along(1)), (Along(1), copy)
    ]  # fmt: skip
    full = [{str(kind): full_model(seed, ["large"])["large"] for kind in kinds} for seed in range(4)]
    shared = [{str(kind): placed(model[str(kind)], mesh, *kind) for kind in kinds} for model in full]
    for name in ("sfa", "ties", "dare_ties", "slerp", "sce", "tsv_m"):
        for scope in ("tensor", "model") if "scope" in methods()[name].shown else ("tensor",):
            compare(name, full, shared, {}, scope, backend="numpy")


def in_place() -> None:
    """The memory of the parts is written, and nothing else."""
    full, shared = models_of(["large", "uneven", "few", "columns", "fragment", "tiny", "scalar"])
    for name in ("sfa", "ties", "dare_ties", "della", "tsv_m", "sce"):
        given, parameters = arguments(name, full, {}, "tensor")
        expected = merge(given, name, **parameters, backend="numpy")
        given, parameters = arguments(name, shared, {}, "tensor")
        out = {tensor: with_local(leaf, local_of(leaf).clone()) for tensor, leaf in given[-1].items()}
        places = {tensor: local_of(leaf).data_ptr() for tensor, leaf in out.items()}
        before = {tensor: bits(local_of(leaf)) for model in given for tensor, leaf in model.items()}
        assert merge([*given[:-1], out], name, **parameters, out=out, backend="numpy") is out
        check_equal(out, expected, out)
        assert {tensor: local_of(leaf).data_ptr() for tensor, leaf in out.items()} == places
        assert {tensor: bits(local_of(leaf)) for model in given for tensor, leaf in model.items()} == before


def integers_and_what_is_not_merged() -> None:
    mesh = world_mesh()
    weight, count = torch.arange(12.0).view(6, 2), torch.arange(7)
    models = [{"w": weight * k, "head": torch.full((5,), k), "count": count} for k in (1, 3)]
    shared = [{name: placed(tensor, mesh, Along(0)) for name, tensor in model.items()} for model in models]
    merged = merge(shared, "linear", exclude="head")
    check_equal(merged, {"w": models[0]["w"] * 2, "head": models[0]["head"], "count": torch.arange(7)}, shared[0])
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        local_of(shared[1]["count"])[:] += 1
    if local_of(shared[1]["count"]).numel() or dist.get_rank() != last:
        expect(MismatchError, 'tensor "count": its int64 values differ', lambda: merge(shared, "linear"))


def tied_tensors_are_one() -> None:
    """Also for a process that has nothing of them."""
    weight, other = (placed(torch.tensor(values), world_mesh(), Along(0)) for values in ([1.0], [3.0]))
    executor, _ = prepare(
        methods()["linear"], [{"a": weight, "b": weight.detach()}, {"a": other, "b": other}], None, None, parameters={}
    )
    assert [item.names for item in executor.plan.items] == [("a", "b")]
    assert local_of(executor.run()["b"]).tolist() == ([2.0] if dist.get_rank() == 0 else [])


def a_module_of_fsdp() -> None:
    """Modules that `fully_shard` has sharded, one of them written in place."""
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1, bias=False)) for _ in range(2)]
    expected = merge([dict(module.state_dict()) for module in modules], "sfa", beta=0.25)
    for module in modules:
        fully_shard(module, mesh=world_mesh())
    assert merge(modules, "sfa", beta=0.25, out=modules[1]) is modules[1]
    check_equal(dict(modules[1].state_dict()), expected, dict(modules[1].state_dict()))


def all_processes_refuse_what_one_has() -> None:
    """Nothing is written, and the processes go on together."""
    shared = models_of(["large", "uneven", "columns", "fragment", "scalar"])[1]
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    faulty = {**shared[2], "columns": with_local(shared[2]["columns"], local_of(shared[2]["columns"]).clone())}
    if rank == last:
        local_of(faulty["columns"])[1, 2] = torch.nan
    before = {name: bits(local_of(leaf)) for name, leaf in shared[3].items()}
    message = f'model 0, tensor "columns": 1 NaN (in the part of process {last})'
    for name in ("sfa", "ties", "dare_ties", "slerp", "sce", "della", "tsv_m"):
        _, parameters = arguments(name, shared, {}, "tensor")
        models = [faulty] if name == "slerp" else [faulty, shared[3]]
        for out in (None, shared[3]):
            wanted = message if name in ("sfa", "ties", "slerp") else message.partition(" (")[0]  # others have gathered it
            expect(NonFiniteError, wanted, merge, models, name, **parameters, out=out, backend="numpy")
            assert {tensor: bits(local_of(leaf)) for tensor, leaf in shared[3].items()} == before, name
        merge(models, name, **parameters, nonfinite="allow", backend="numpy")
    large = [with_local(leaf, local_of(leaf).clone()) for leaf in (shared[0]["uneven"], shared[1]["uneven"])]
    if rank == 0:
        for leaf in large:
            local_of(leaf)[0, 3] = 3e38
    for place in (None, large[1]):
        message = "the array: finite inputs overflow bfloat16 when merged"
        expect(NonFiniteError, message, merge, large, "linear", out=place, weight=[1, 1], normalize=False)


def unlike_placements_are_refused() -> None:
    mesh, world, tensor = world_mesh(), dist.get_world_size(), torch.arange(24.0).view(12, 2)
    one, other, fragment = placed(tensor, mesh, Along(0)), placed(tensor, mesh, Along(1)), fragment_of(tensor)
    first = f"model 0 has sharded as S(0) over {mesh}"
    expect(MismatchError, f'model 1, tensor "w": sharded as S(1) over {mesh}, but {first}', merge, [{"w": one}, {"w": other}])
    expect(MismatchError, f'model 1, tensor "w": not sharded, but {first}', merge, [{"w": one}, {"w": tensor}])
    expect(MismatchError, f"out, the array: a Shard of elements {fragment.start} to ", merge, [one, one], out=fragment)
    there = {"w": tensor.clone(), "v": one}
    expect(MismatchError, 'tensor "v": sharded', merge, [{"w": tensor, "v": tensor}] * 2, only="w", out=there)
    replicated = placed(tensor, mesh, Replicate())
    assert type(merge([replicated, tensor])) is DTensor  # every process has all of both
    partial = DTensor.from_local(tensor, mesh, [Partial()], run_check=False)
    expect(MergeError, "partial sums", merge, [partial, partial])
    wrong = DTensor.from_local(torch.zeros(2, 2), mesh, [Along(0)], run_check=False, shape=torch.Size([12, 2]), stride=(2, 1))
    expect(MergeError, "the local part of the DTensor has the shape (2, 2)", merge, [wrong, wrong])
    gap = Shard(torch.zeros(2), (12, 2), 0)
    expect(MergeError, "do not cover its 24 elements once each", merge, [gap], "slerp", base=gap, t=0.5)
    if world > 2:
        some = placed(tensor, DeviceMesh("cpu", [0, 1]), Along(0))
        if dist.get_rank() < 2:
            check_equal({"w": merge([some, some])}, {"w": tensor}, {"w": some})
        else:
            expect(MergeError, "this process is not part of the mesh", merge, [some, some])


def what_is_sent() -> None:
    """Nothing for what goes entry by entry; a sum over the processes for each round of cuts, for all tensors."""
    shared = models_of(["large", "uneven", "few", "fragment"])[1]
    for name in ("sfa", "linear", "task_arithmetic", "dare_ties", "magmax"):
        given, parameters = arguments(name, shared, {}, "tensor")
        with counted() as calls:
            merge(given, name, **parameters, nonfinite="allow")
        assert calls == [], name
        with counted() as calls:
            merge(given, name, **parameters)
        assert calls == ["all_reduce"], name
        base = parameters.pop("base")
        executor, _ = prepare(methods()[name], given, base, given[0], parameters=parameters)
        for _ in range(2):
            with counted() as calls:
                executor.run()
            assert calls == ["all_reduce"], name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "_BINS", (1 << 12, 1 << 12))
        patch.setattr(survey, "SAMPLED", 10**9)
        given, parameters = arguments("ties", shared, {}, "tensor")
        with counted() as calls:
            merge(given, "ties", **parameters, nonfinite="allow")
    assert calls == ["all_reduce"] * 3  # 31 bits, 12 at a time
    with counted() as calls:
        merge(given, "ties", **parameters, nonfinite="allow")
    assert calls.count("all_reduce") <= 7  # the size of a sample, two rounds in it, and up to four more
    assert set(calls) == {"all_reduce"}


def names_in_another_order() -> None:
    """What the processes send each other belongs to the same tensors in all of them; each gets its own order back."""
    names = ["uneven", "few", "fragment", "tiny"]
    full, shared = models_of(names)
    order = names if dist.get_rank() == 0 else names[::-1]
    turned = [{name: model[name] for name in order} for model in shared]
    for name in ("sfa", "ties", "karcher", "tsv_m", "dare_ties"):
        for scope in ("tensor", "model") if "scope" in methods()[name].shown else ("tensor",):
            given, parameters = arguments(name, full, {}, scope)
            expected = merge(given, name, **parameters, backend="numpy")
            given, parameters = arguments(name, turned, {}, scope)
            found = merge(given, name, **parameters, backend="numpy")
            check_equal(found, expected, given[0])
            assert list(found) == order


def two_kinds_of_parallelism() -> None:
    """Parameters that are sharded over one dimension of a mesh, and then by `fully_shard` over the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    full, shared = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        module = torch.nn.Linear(7, 10)
        full.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        for name in ("weight", "bias"):
            setattr(module, name, torch.nn.Parameter(placed(full[-1][name], mesh["tensor"], Along(0))))
        fully_shard(module, mesh=mesh["data"])
        shared.append(dict(module.state_dict()))
    for name, how in {"sfa": {}, "ties": {"density": 0.3}, "dare_ties": {"density": 0.5}, "slerp": {"t": 0.3}}.items():
        base = {} if name == "sfa" else {"base": 0}
        results = []
        for models in (full, shared):
            results.append(merge(models[len(base) :], name, **how, **dict.fromkeys(base, models[0])))
        assert {key: bits(value.full_tensor()) for key, value in results[1].items()} == {
            key: bits(value) for key, value in results[0].items()
        }


CHECKS: dict[Check, list[int]] = {
    every_method: WORLDS,
    every_backend: [2],
    formulas_that_the_interpreter_leaves_to_numpy: [2],
    pieces_and_threads: [2],
    every_placement: [2, 4],
    in_place: [2],
    integers_and_what_is_not_merged: [2, 4],
    tied_tensors_are_one: [2, 4],
    a_module_of_fsdp: [2, 4],
    names_in_another_order: [2, 3],
    two_kinds_of_parallelism: [4],
    all_processes_refuse_what_one_has: [2, 3],
    unlike_placements_are_refused: [2, 4],
    what_is_sent: [2, 3],
}


def work(rank: int, world: int, store: str, only: list[str]) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for check in [check for check, worlds in CHECKS.items() if world in worlds and (not only or check.__name__ in only)]:
        began = time.process_time()
        try:
            check()
        except BaseException:
            print(f"{check.__name__} failed in process {rank} of {world}:\n{traceback.format_exc()}", flush=True)
            os._exit(1)  # the processes may have parted
        print(f"{check.__name__}, process {rank} of {world}: {time.process_time() - began:.1f} s", flush=True)
    dist.destroy_process_group()


def launch(folder: str, only: list[str]) -> int:
    """Fork the processes, as many as each of the numbers says in turn; return how many fail."""
    torch.set_num_threads(1)
    method(paper="", base="required")(called)
    for backend in ("numba", "triton"):  # loaded once
        merge([torch.ones(1), torch.ones(1)], "task_arithmetic", base=torch.ones(1), backend=backend)
    merged_whole()
    failed = 0
    for world in WORLDS:
        given = [(rank, world, f"{folder}/{world}", only) for rank in range(world)]
        processes = [multiprocessing.get_context("fork").Process(target=work, args=each) for each in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            failed += process.exitcode != 0
    return failed


@pytest.mark.timeout(300)
def test_processes(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    done = sum(f", process {rank} of {world}: " in ended.stdout for world in WORLDS for rank in range(world))
    assert done == sum(WORLDS)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1], sys.argv[2:]))
