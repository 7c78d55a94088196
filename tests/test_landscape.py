"""Curvature, surfaces, slices and noise against dense Hessians and slow loops; interruptions; refusals."""

import copy
import json
import shlex
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_eval
from nas_kmix.analysis import landscape
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.analysis.landscape import Views, displacements, read_landscape
from nas_kmix.analysis.objective import (
    Objective,
    cross_entropy_objective,
    filter_normalised_direction,
    top_eigenpairs,
)
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.run import Run, StoppedError
from nas_kmix.engine.sources import Source

VIEWS = shlex.split("--points 3 --slice-points 5 --sigmas .01 .1 --draws 3 --images 12 --batch-size 8 --tolerance .1")
# Few convolutions, for time: most of the seconds here are Hessian products.
EDGES = "('skip_connect', 0), ('sep_conv_3x3', 1)" + ", ('max_pool_3x3', 0), ('skip_connect', 1)" * 3
GENOTYPE = f"Genotype(normal=[{EDGES}], normal_concat=[2, 3, 4, 5], reduce=[{EDGES}], reduce_concat=[2, 3, 4, 5])"
EVALUATIONS = 3 * 3 + 5 + 2 * 3


def draw(n, seed=0):
    """Noise with one brighter channel, which gives the class away."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 130, (n, 16, 16, 3))
    images[np.arange(n), :, :, labels] += 100
    return images.astype(np.uint8), labels


def image_data(n=11):
    pixels, labels = draw(n)
    source = Source("noise", "test", labels, ("a", "b", "c"), arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageData(source, 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), torch.device("cpu"), images)


def small_network(seed=0):
    """130 parameters, with BatchNorm whose running statistics are not those of any batch here."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Conv2d(3, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
            *(nn.Conv2d(3, 2, 3, stride=2), nn.Flatten(), nn.Linear(2 * 9, 3)),
        )
        network[1].running_mean.uniform_(-1, 1)
        network[1].running_var.uniform_(0.5, 2)
    return network


def in_order(model, vector):
    """A copy of `model` in evaluation mode whose parameters are `vector`, filled in one by one."""
    model, start = copy.deepcopy(model).eval(), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(vector[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    assert start == len(vector)
    return model


def loss_of(model, data, indices=None):
    """By the engine's evaluation, which does not use the objective."""
    return evaluate(model, data, indices=indices)["loss"]


# -- curvature ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense():
    """The whole Hessian of the small network in float64, without the objective: (model, data, H, gradient)."""
    model, data = small_network().double().eval(), image_data()
    names, tensors = zip(*model.named_parameters(), strict=True)
    images = ((data.images.double() / 255) - torch.tensor(data.mean).double().view(3, 1, 1)) / torch.tensor(
        data.std
    ).double().view(3, 1, 1)

    def loss(*parameters):
        logits = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (images,))
        return F.cross_entropy(logits, torch.as_tensor(data.labels))

    tensors = tuple(tensor.detach() for tensor in tensors)
    blocks = torch.autograd.functional.hessian(loss, tensors)
    rows = [
        torch.cat([block.reshape(a.numel(), b.numel()) for block, b in zip(row, tensors, strict=True)], dim=1)
        for row, a in zip(blocks, tensors, strict=True)
    ]
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.functional.jacobian(loss, tensors)])
    return model, data, torch.cat(rows), gradient


def test_eigenpairs_agree_with_a_dense_hessian(dense):
    model, data, hessian, _ = dense
    objective = cross_entropy_objective(model, data, np.arange(len(data)), chunk_size=4)
    values, vectors = top_eigenpairs(objective, 2, rng=np.random.default_rng(0), tolerance=0.0)
    expected, basis = np.linalg.eigh(hessian.numpy())
    assert expected[-1] > expected[-2] > expected[-3] + 1e-3 and len(expected) == len(objective.centre)
    np.testing.assert_allclose(values, expected[[-1, -2]], atol=1e-6)
    for vector, truth in zip(vectors, basis.T[[-1, -2]], strict=True):
        assert vector[np.abs(vector).argmax()] > 0
        np.testing.assert_allclose(vector * np.sign(vector @ truth), truth, atol=1e-6)


def test_gradients_and_products_agree_with_the_dense_ones_in_any_chunks(dense):
    model, data, hessian, gradient = dense
    vector = torch.from_numpy(np.random.default_rng(0).standard_normal(len(hessian)))
    for chunk_size in (1, 4, 11, 100):
        objective = cross_entropy_objective(model, data, np.arange(len(data)), chunk_size=chunk_size)
        at = objective.centre
        # 1e-6, not less: the images are normalised in float32 there, in float64 here.
        torch.testing.assert_close(objective.gradient(at), gradient, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(objective.hessian_product(at, vector), hessian @ vector, atol=1e-5, rtol=1e-5)


def test_eigenvalues_of_a_diagonal_are_the_largest_not_the_largest_in_magnitude():
    diagonal = torch.tensor([-9.0, 1.0, 5.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    objective = Objective(lambda p, _: (diagonal * p["x"] ** 2).sum() / 2, {"x": torch.ones(6).double()}, [None])
    values, vectors = top_eigenpairs(objective, 2, rng=np.random.default_rng(0), tolerance=0.0)
    np.testing.assert_allclose(values, [5.0, 3.0], atol=1e-10)
    np.testing.assert_allclose(vectors, np.eye(6)[[2, 4]], atol=1e-10)


def test_what_does_not_converge_is_refused():
    spectrum = torch.linspace(1.0, 1.0001, 500, dtype=torch.float64)
    objective = Objective(lambda p, _: (spectrum * p["x"] ** 2).sum() / 2, {"x": torch.ones(500).double()}, [None])
    with pytest.raises(ValueError, match="did not converge in 1 restarts"):
        top_eigenpairs(objective, 2, rng=np.random.default_rng(0), tolerance=1e-15, restarts=1)


# -- views -------------------------------------------------------------------------------------------------------------


def losses(objective, vectors, views):
    found = [objective.value(objective.centre + step) for step in displacements(objective, vectors, views)]
    surface, line, noise = np.split(found, np.cumsum([views.points**2, views.slice_points]))
    return surface.reshape(views.points, -1), line, noise.reshape(views.draws, -1)


def test_a_quadratic_gives_its_paraboloid():
    """f(x, y) = 3 + g.x + x' A x / 2 in two tensors; along eigenvectors the mixed term vanishes."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    spectrum = np.array([7.0, 4.0, 1.0, 0.5, -2.0])
    matrix, slope, at = (torch.from_numpy(a) for a in (basis * spectrum @ basis.T, *rng.standard_normal((2, 5))))

    def share(parameters, weight):
        x = torch.cat([parameters["first"].flatten(), parameters["second"]])
        return weight * (3.0 + slope @ x + x @ matrix @ x / 2)

    objective = Objective(share, {"first": at[:4].view(2, 2), "second": at[4:]}, [0.25, 0.75])
    values, vectors = top_eigenpairs(objective, 2, rng=rng, tolerance=0.0)
    np.testing.assert_allclose(values, [7.0, 4.0], atol=1e-10)
    views = Views(radius=0.5, points=5)
    surface, _, _ = losses(objective, torch.from_numpy(vectors), views)
    centre, gradient = 3.0 + slope @ at + at @ matrix @ at / 2, (slope + matrix @ at).numpy()
    for i, a in enumerate((-0.5, -0.25, 0.0, 0.25, 0.5)):
        for j, b in enumerate((-0.5, -0.25, 0.0, 0.25, 0.5)):
            curved = a * gradient @ vectors[0] + b * gradient @ vectors[1] + (7 * a * a + 4 * b * b) / 2
            assert surface[i, j] == pytest.approx(float(centre) + curved, abs=1e-10)


def test_every_loss_is_that_of_a_copy_with_its_parameters_moved():
    model, data = small_network(), image_data()
    chosen = np.array([0, 2, 3, 7, 10])
    objective = cross_entropy_objective(model, data, chosen, chunk_size=2)
    views = Views(points=3, slice_points=3, sigmas=(0.1, 0.2), draws=2, seed=5)
    vectors = F.normalize(torch.randn(2, len(objective.centre), generator=torch.Generator().manual_seed(0)))
    surface, line, noise = losses(objective, vectors, views)
    centre = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert surface[1, 1] == line[1] == objective.value(centre)
    assert surface[1, 1] == pytest.approx(loss_of(in_order(model, centre), data, chosen), rel=1e-6)
    for i, j, a, b in ((0, 1, -0.5, 0.0), (2, 0, 0.5, -0.5), (1, 2, 0.0, 0.5)):
        moved = in_order(model, centre + a * vectors[0] + b * vectors[1])
        assert surface[i, j] == pytest.approx(loss_of(moved, data, chosen), rel=1e-5)
    steps = list(displacements(objective, vectors, views))
    assert line[2] == pytest.approx(loss_of(in_order(model, centre + steps[11]), data, chosen), rel=1e-5)
    assert noise[1, 0] == pytest.approx(loss_of(in_order(model, centre + steps[14]), data, chosen), rel=1e-5)


def test_noise_has_the_standard_deviation_it_is_called_by():
    objective = Objective(lambda p, _: p["x"].sum(), {"x": torch.zeros(20_000)}, [None])
    views = Views(points=3, slice_points=3, sigmas=(0.01, 0.2), draws=2)
    first, _, second, _ = (steps := list(displacements(objective, torch.zeros(2, 20_000), views))[-4:])
    for sigma, step in zip((0.01, 0.2) * 2, steps, strict=True):
        assert step.std().item() == pytest.approx(sigma, rel=0.03) and abs(step.mean().item()) < 0.03 * sigma
    torch.testing.assert_close(steps[1], 20 * steps[0])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_filters_of_the_direction_are_as_long_as_the_networks():
    parameters = dict(small_network().named_parameters())
    objective = Objective(lambda p, _: 0.0, parameters, [None])
    found = objective.unravel(filter_normalised_direction(parameters, rng=np.random.default_rng(3)))
    for name, tensor in parameters.items():
        if tensor.ndim == 1:
            assert not found[name].any()
            continue
        for mine, filter in zip(found[name], tensor, strict=True):
            assert mine.norm().item() == pytest.approx(filter.norm().item(), rel=1e-5)
            assert F.cosine_similarity(mine.flatten(), filter.flatten(), dim=0).abs() < 0.9


def test_the_model_is_left_as_it_was():
    model, data = small_network().train(), image_data()
    before = copy.deepcopy(model.state_dict())
    objective = cross_entropy_objective(model, data, np.arange(5), chunk_size=3)
    objective.hessian_product(objective.centre, torch.ones_like(objective.centre))
    objective.value(objective.centre + 1.0)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A genotype's network, with an auxiliary head, and a backbone, on the same generated images."""
    folder = tmp_path_factory.mktemp("trained")
    arrays = {}
    for split, n, seed in (("train", 30, 0), ("test", 40, 1)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = draw(n, seed)
    np.savez(folder / "tiny.npz", **arrays)
    flags = shlex.split("--device cpu --threads 1 -j 0 --epochs 1 --batch-size 10 --val-share 0 --data")
    for name, network in (
        ("cells", ["--genotype", GENOTYPE, "--channels", "2", "--layers", "3"]),
        ("tiny", ["--backbone", "tiny"]),
    ):
        argv = [*flags, str(folder / "tiny.npz"), "--image-size", "32", "--out", str(folder / name), *network]
        train_eval.run(train_eval.parse(argv))
    return folder


def command(trained, out, *names):
    return [*(str(trained / name) for name in names), "--out", str(out), *VIEWS, "--device", "cpu", "--threads", "1"]


def contents(folder, *, without=()):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert landscape.main(command(trained, out, "cells", "tiny")) == 0
    return out


def test_what_the_command_leaves(trained, undisturbed, capsys):
    pictures = {"landscape.png", "landscape.svg"}
    records = {"config.json", "env.json", "cost.json", ".lock"}
    assert {path.name for path in undisturbed.iterdir()} == {"cells.npz", "tiny.npz", *pictures, *records}
    for name in ("cells", "tiny"):
        found = read_landscape(undisturbed / f"{name}.npz")
        assert found["surface"].shape == (3, 3) and found["slice"].shape == (5,) and found["noise"].shape == (3, 2)
        assert found["eigenvalues"][0] >= found["eigenvalues"][1]
        np.testing.assert_array_equal(found["axis"], [-0.5, 0.0, 0.5])
        assert found["loss"] == found["surface"][1, 1] == found["slice"][2] and found["meta"]["images"] == 12
    svg = (undisturbed / "landscape.svg").read_text()
    assert ">cells<" in svg and ">tiny<" in svg
    assert landscape.main(command(trained, undisturbed, "cells", "tiny")) == 0  # nothing is left to do
    assert "cells" in capsys.readouterr().out.splitlines()[-2]


def test_the_centre_is_the_evaluated_loss_of_the_checkpoint(trained, undisturbed):
    for name in ("cells", "tiny"):
        found = read_landscape(undisturbed / f"{name}.npz")
        classifier = load_classifier(trained / name / "last.pt")
        config = landscape.Config(runs=(trained / name,))
        data = landscape.load_images(config.input, classifier, device=torch.device("cpu"), workers=0)
        chosen = landscape.subset(data, 12, seed=0)
        assert len(data) == 40 and len(chosen) == 12
        assert found["loss"] == pytest.approx(loss_of(classifier.model, data, chosen), rel=1e-5)


def stop_at(monkeypatch, method, calls):
    """A signal comes in during the call of this number, counted from 1, of a method of Objective."""
    original, count = getattr(Objective, method), [0]

    def counted(self, *arguments):
        count[0] += 1
        if count[0] == calls:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Objective, method, counted)


def test_interrupted_again_and_again_it_ends_in_the_same_files(trained, undisturbed, tmp_path, monkeypatch):
    before = contents(trained)
    # In the eigenvectors, in the surface, at its last point, in the noise of the first network, in the second's slice.
    for method, calls in (("hessian_product", 7), ("value", 3), ("value", 6), ("value", 8), ("value", 13)):
        with monkeypatch.context() as patch:
            stop_at(patch, method, calls)
            assert landscape.main(command(trained, tmp_path, "cells", "tiny")) == 143
        assert contents(trained) == before and not (tmp_path / "landscape.png").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == [tmp_path / "checkpoints" / "tiny.pt"]
    with monkeypatch.context() as patch:  # what is done is not done again
        stop_at(patch, "value", EVALUATIONS)
        stop_at(patch, "hessian_product", 1)
        assert landscape.main(command(trained, tmp_path, "cells", "tiny")) == 0
    varying = ("cost.json", "env.json", "config.json", ".lock")
    assert contents(tmp_path, without=varying) == contents(undisturbed, without=varying)
    assert contents(trained) == before


def test_a_crash_loses_what_came_after_the_last_save_and_no_more(trained, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint_due", lambda self: True)
        original, count = Objective.value, [0]

        def failing(self, at):
            count[0] += 1
            if count[0] == 12:
                raise MemoryError
            return original(self, at)

        patch.setattr(Objective, "value", failing)
        assert landscape.main(command(trained, tmp_path, "tiny")) == 1
    state = torch.load(tmp_path / "checkpoints" / "tiny.pt", weights_only=True)
    assert len(state["losses"]) == 11 and not list(tmp_path.glob("*.npz"))
    assert landscape.main(command(trained, tmp_path, "tiny")) == 0
    assert (tmp_path / "tiny.npz").read_bytes() == (undisturbed / "tiny.npz").read_bytes()


def test_other_settings_are_refused_and_fresh_starts_over(trained, undisturbed, tmp_path, capsys):
    argv = command(trained, tmp_path, "tiny")
    for name in ("tiny.npz", "env.json", "cost.json"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    assert landscape.main([*argv, "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert "seed was 0, now 1" in said and "--fresh" in said
    assert (tmp_path / "tiny.npz").read_bytes() == (undisturbed / "tiny.npz").read_bytes()
    assert landscape.main([*argv, "--seed", "1", "--fresh"]) == 0
    old, new = (read_landscape(folder / "tiny.npz") for folder in (undisturbed, tmp_path))
    assert (new["slice"] != old["slice"]).any() and (new["noise"] != old["noise"]).all()
    assert new["meta"]["key"]["inputs"]["images"] != old["meta"]["key"]["inputs"]["images"]


def test_an_unfinished_training_and_foreign_files_are_refused(trained, tmp_path, capsys):
    out = str(tmp_path / "out")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (tmp_path / "other" / "tiny").mkdir(parents=True)
    (unfinished / "last.pt").write_bytes((trained / "tiny" / "last.pt").read_bytes())
    torch.save({"format": "nas_kmix/classifier", "model": {}}, tmp_path / "damaged.pt")
    data = str(trained / "tiny.npz")
    for argv, named in (
        ([str(unfinished)], "unfinished training"),
        ([str(tmp_path)], "neither last.pt nor scorer.pt"),
        ([str(tmp_path / "nowhere.pt")], "nowhere.pt"),
        ([str(tmp_path / "damaged.pt"), "--data", data], "damaged.pt is damaged"),
        ([str(unfinished / "last.pt")], "config.json does not say"),
        ([str(trained / "tiny"), str(trained / "tiny")], "is named twice"),
        ([str(trained / "tiny"), str(tmp_path / "other" / "tiny")], "would both be called tiny"),
        ([str(trained / "tiny"), "--split", "val"], "val_images"),
        ([str(trained / "tiny"), "--data", "digits"], "other classes"),
        ([str(trained / "tiny"), "--points", "4"], "--points must be odd"),
        ([str(trained / "tiny"), "--slice-points", "1"], "at least 3"),
        ([str(trained / "tiny"), "--draws", "1"], "--draws"),
        ([str(trained / "tiny"), "--amp", "bf16"], "--amp"),
        ([], "at least one RUN"),
    ):
        assert landscape.main([*argv, "--out", out, "--device", "cpu"]) == 2, named
        said = capsys.readouterr().err
        assert said.startswith("error: ") and named in said and "Traceback" not in said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_checkpoint_is_compared_with_another_of_its_training(trained, tmp_path):
    """last.pt and best.pt of one folder have names of their own."""
    folder = tmp_path / "net"
    folder.mkdir()
    for name in ("last.pt", "best.pt"):
        (folder / name).write_bytes((trained / "tiny" / "last.pt").read_bytes())
    (folder / "config.json").write_text(json.dumps({"input": {"data": str(trained / "tiny.npz")}}))
    config = landscape.Config(runs=(folder / "last.pt", folder / "best.pt"))
    assert set(landscape.open_runs(config.runs)) == {"net-last", "net-best"}


def test_stopped_and_mismatched_are_the_errors_of_run(trained, tmp_path, monkeypatch):
    """For notebooks, which call run."""
    config = landscape.Config(
        runs=(trained / "tiny",),
        out=tmp_path,
        input=landscape.InputConfig(images=12),
        views=Views(points=3, slice_points=3, draws=2),
    )
    with monkeypatch.context() as patch:
        stop_at(patch, "value", 2)
        with pytest.raises(StoppedError):
            landscape.run(config)
    with pytest.raises(StageMismatchError):
        landscape.run(landscape.Config(runs=config.runs, out=tmp_path, input=config.input, views=Views()))
