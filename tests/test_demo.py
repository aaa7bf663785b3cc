"""The demo, with few steps: the numbers that it prints are those of the files that it writes."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file

import mergekit_cl
from mergekit_cl import MergeError, demo, demo_report, registry

pytest.importorskip("torch")
pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

Run = tuple[demo_report.DemoResults, str, Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the quick demo once: its results, what it printed on 80 columns, and the folder."""
    folder, output = tmp_path_factory.mktemp("demo"), io.StringIO()
    results = demo.run_demo(folder / "new" / "out", quick=True, console=Console(file=output, width=80))
    return results, output.getvalue(), folder / "new" / "out"


@pytest.fixture(scope="module")
def tasks() -> list[demo.Task]:
    return demo.rotated_digits(seed=0)


def accuracy_of(weights: dict[str, NDArray[Any]], task: demo.Task) -> float:
    """Score weights on a task in NumPy, without torch or the demo's own code."""
    activation = np.asarray(task.test_images, np.float64)
    for layer in (0, 2, 4):
        activation = activation @ weights[f"{layer}.weight"].T.astype(np.float64) + weights[f"{layer}.bias"]
        activation = activation if layer == 4 else np.maximum(activation, 0)
    return float((activation.argmax(1) == np.asarray(task.test_digits)).mean())


def test_data_are_the_rotated_digits_split_by_digit(tasks: list[demo.Task]) -> None:
    upright = np.asarray(tasks[0].train_images).reshape(-1, 28, 28)
    for turns, task in enumerate(tasks):
        assert task.train_images.shape == (4000, 784)
        assert np.bincount(task.train_digits).tolist() == [400] * 10
        assert np.bincount(task.test_digits).tolist() == [100] * 10
        turned = np.asarray(task.train_images).reshape(-1, 28, 28)
        np.testing.assert_array_equal(turned[7], np.rot90(upright[7], turns))
    train, test = ({image.tobytes() for image in np.asarray(part)} for part in (tasks[0].train_images, tasks[0].test_images))
    assert not train & test


def test_matrices_are_the_accuracies_of_the_saved_weights(run: Run, tasks: list[demo.Task]) -> None:
    results, _, folder = run
    for name, matrix in results.accuracy.items():
        assert matrix.shape == (4, 4)
        for after, row in enumerate(matrix):
            weights = load_file(folder / "weights" / f"{name.lower()}-after-task-{after}.safetensors")
            np.testing.assert_allclose(row, [accuracy_of(weights, task) for task in tasks], atol=0.002)


def test_sfa_starts_after_the_first_task(run: Run) -> None:
    plain, sfa = (run[0].accuracy[name] for name in demo_report.RUNS)
    assert plain[0].tolist() == sfa[0].tolist()
    assert plain[1].tolist() != sfa[1].tolist()


def assert_average(merged: dict[str, Any], *files: Path) -> None:
    """Check weights against the float64 average of files, within the library's error bound for float32."""
    models = [load_file(file) for file in files]
    assert merged.keys() == models[0].keys()
    for name, tensor in merged.items():
        values = np.stack([model[name] for model in models]).astype(np.float64)
        exact = values.mean(axis=0)
        bound = 2**-24 * np.abs(exact) + 2**-22 * np.abs(values).mean(axis=0)
        assert (np.abs(np.asarray(tensor, np.float64) - exact) <= bound).all()


def test_linear_is_the_average_of_the_saved_files(run: Run) -> None:
    results, _, folder = run
    files = [folder / "weights" / f"fine-tuning-after-task-{task}.safetensors" for task in range(4)]
    assert results.merged["linear"].inputs == "all 4"
    assert_average(results.merged["linear"].weights, *files)


def test_wise_ft_is_halfway_from_the_start_to_the_last_checkpoint(run: Run) -> None:
    results, _, folder = run
    files = [folder / "weights" / f"{name}.safetensors" for name in ("start", "fine-tuning-after-task-3")]
    assert results.merged["wise_ft"].inputs == "last + start"
    assert_average(results.merged["wise_ft"].weights, *files)


def test_tables_have_every_run_and_every_method(run: Run) -> None:
    results, output, _ = run
    rows = {row.split("│")[1].strip(): row for row in output.splitlines() if row.startswith("│")}
    assert {*mergekit_cl.methods(), *demo_report.RUNS} <= set(rows)
    for name, merged in results.merged.items():
        assert merged.accuracy is not None
        assert rows[name].split("│")[-2].strip() == f"{100 * merged.accuracy.mean():.1f}"
    assert rows["SFA"].split("│")[-4].strip() == f"{100 * results.accuracy['SFA'][-1].mean():.1f}"
    assert max(map(len, output.splitlines()[:-12])) <= 80


def test_files_are_listed_and_complete(run: Run) -> None:
    results, output, folder = run
    assert sorted(results.files) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(results.files) == 10
    for file in results.files:
        assert f"  {file}\n" in output


def test_picture_has_both_matrices(run: Run) -> None:
    from matplotlib.image import imread

    picture = imread(run[2] / "accuracy.png")
    height, width = picture.shape[:2]
    assert 1200 <= width <= 1600
    assert 600 <= height <= 800
    blue = (picture[..., 2] - picture[..., 0] > 0.2).any(axis=0)
    assert blue[: width // 2].any()
    assert blue[width // 2 :].any()


def test_same_seed_same_numbers_and_another_seed_others(run: Run, tmp_path: Path) -> None:
    again, other = (
        demo.run_demo(tmp_path / str(seed), seed=seed, quick=True, console=Console(file=io.StringIO())) for seed in (0, 1)
    )
    for name, matrix in run[0].accuracy.items():
        assert matrix.tolist() == again.accuracy[name].tolist()
        assert matrix.tolist() != other.accuracy[name].tolist()
    for name, merged in run[0].merged.items():
        assert merged.accuracy.tolist() == again.merged[name].accuracy.tolist()  # type: ignore[union-attr]


def results_of(plain: float, sfa: float, merged: float) -> demo_report.DemoResults:
    """Make results of two tasks in which the first is forgotten to these accuracies, the rest is 0.75."""
    accuracy = {name: np.array([[0.75, 0], [last, 0.75]]) for name, last in zip(demo_report.RUNS, (plain, sfa), strict=True)}
    return demo_report.DemoResults(5, accuracy, {"mean": demo_report.Merged("all 2", {}, np.array([merged, merged]))}, ())


def test_summary_says_what_the_numbers_say() -> None:
    better = demo_report.summary(results_of(plain=0.25, sfa=0.5, merged=0.6))
    assert "seed 5" in better
    assert "average accuracy 12.5 points higher (62.5 instead of 50.0)" in better
    assert "backward transfer 25.0 points higher (-25.0 instead of -50.0)" in better
    assert "learning accuracy as high (75.0)" in better
    assert "mean, has an average accuracy 2.5 points lower (60.0 instead of 62.5)" in better
    worse = demo_report.summary(results_of(plain=0.5, sfa=0.25, merged=0.6))
    assert "average accuracy 12.5 points lower (50.0 instead of 62.5)" in worse
    assert "backward transfer 25.0 points lower (-50.0 instead of -25.0)" in worse
    assert "mean, has an average accuracy 10.0 points higher (60.0 instead of 50.0)" in worse
    assert "merge" not in demo_report.summary(replace(results_of(0.5, 0.5, 0.5), merged={}))


def test_methods_that_need_parameters_or_fail_are_listed(
    run: Run, tasks: list[demo.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, _, folder = run
    monkeypatch.setattr(registry, "_methods", dict(registry.methods()))

    @mergekit_cl.method(paper="https://example.org")
    def sparse(scope: mergekit_cl.Scope, *, density: mergekit_cl.Fraction, t: float) -> mergekit_cl.Sum:
        """Weigh the models by density (0.2) and t (0.5)."""
        return mergekit_cl.Sum([density, t, 0, 0])

    @mergekit_cl.method(paper="https://example.org", models=(2, 2))
    def strange(scope: mergekit_cl.Scope, *, strangeness: float) -> mergekit_cl.Sum:
        """Have a parameter that the demo has no value for."""
        raise AssertionError

    @mergekit_cl.method(paper="https://example.org", models=(5, None))
    def many(scope: mergekit_cl.Scope) -> mergekit_cl.Sum:
        """Need more models than there are."""
        raise AssertionError

    files = [folder / "weights" / f"fine-tuning-after-task-{task}.safetensors" for task in range(4)]
    merged = demo._merge_with_all(files, folder / "weights" / "start.safetensors", tasks, seed=0)
    bias = [load_file(file)["4.bias"].astype(np.float64) for file in files]
    np.testing.assert_allclose(merged["sparse"].weights["4.bias"], 0.2 * bias[0] + 0.5 * bias[1], rtol=1e-6, atol=1e-8)
    assert merged["strange"].problem == "needs parameters: strangeness"
    assert merged["many"].problem == "many merges 5 or more models, but got 4"
    output = io.StringIO()
    Console(file=output, width=80).print(demo_report.merges_table(replace(results, merged=merged)))
    assert "strangeness" in output.getvalue()


@pytest.mark.parametrize("package", ["torch", "mlxtend", "matplotlib"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MergeError, match=rf'needs {package}, .*pip install "mergekit-cl\[demo\]"'):
        demo.run_demo(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError, match="another folder"):
        demo.run_demo(tmp_path / "file", quick=True)
